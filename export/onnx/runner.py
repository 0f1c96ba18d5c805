"""`OnnxModel`: runs an exported folder in ONNX Runtime, with caches that are written where they lie.

What `export_onnx` wrote is served by onnxruntime-genai too; this is the loop for Python, for the check of an export and
for benchmarks. One buffer per layer that has keys and values is bound as past and as present, so a step moves nothing
but its own tokens; for the target `onnx`, presents are longer than pasts, and become the pasts of the next step.
Neighbours may rely on rows of different lengths giving what they give alone.

Shapes: B batch, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvpass.errors import RequestError, SourceError
from kvpass.export.onnx.chosen import Choice, told
from kvpass.export.onnx.export import FILE, FORMAT, MARKER, SECOND

CHUNK = 512  # tokens that one run reads of a prompt; bounds the memory of its logits
SLACK = 16  # rows beside a window, so that rows are moved once in SLACK + 1 tokens
_KINDS: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,  # two codes of 4 bits
}


@dataclass(frozen=True)
class _Layer:
    """The cache of one layer: [B, kv_heads, rows, width] twice; with a window, rows do not grow.

    Where `folded` is not 0, the graph has that many rows, of more heads: see `kvpass.export.onnx.lower.folded_rows`.
    """

    owner: int
    kv_heads: int
    head_dim: int
    window: int
    sinks: int
    bits: int = 0  # of a code; 0 where there are none
    folded: int = 0

    @property
    def width(self) -> int:
        """Elements of a token and head."""
        return self.head_dim // 2 if self.bits == 4 else self.head_dim

    @property
    def graph_heads(self) -> int:
        """KV heads as they are in the graph."""
        return self.kv_heads * (self.sinks + self.window) // self.folded if self.folded else self.kv_heads

    def rows(self, capacity: int, slack: int) -> int:
        """Rows for `capacity` tokens; the operator asks for a whole window, however short the text."""
        if not self.window:
            return capacity
        if self.folded:
            return self.folded
        if self.sinks:
            return self.sinks + self.window
        return self.window + (slack if capacity > self.window else 0)


@dataclass(frozen=True)
class _Passes:
    """How prompts are read where a layer reads one above it: see `kvpass.ir.fixpoint.Limits`.

    `owners` are the layers that are read from below them.
    """

    session: Any
    passes: int
    tolerance: float
    fallback: bool
    owners: Sequence[int]


class OnnxModel:
    """An exported model and the caches of the rows that it is generating.

    Attributes:
        positions: tokens that a row has at most, generated ones included.
        vocab_size: token ids are below it.
        eos: ids that end a row where `generate` is not told others.
        target: what the package was exported for.
    """

    def __init__(
        self,
        session: Any,
        layers: Sequence[_Layer],
        positions: int,
        vocab_size: int,
        eos: Sequence[int],
        target: str = "ort",
    ) -> None:
        self.session = session
        self.target = target
        self.positions = positions
        self.vocab_size = vocab_size
        self.eos = tuple(eos)
        self._layers = tuple(layers)
        kind = next((i.type for i in session.get_inputs() if i.name.startswith("past_key_values.")), "tensor(float)")
        self._kind = _KINDS[kind]
        self._device = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        self._buffers: dict[str, Any] = {}
        self._held: NDArray[np.int64] = np.zeros(0, np.int64)
        self._padding: NDArray[np.int64] = np.zeros(0, np.int64)
        self._capacity = 0
        self._passes: _Passes | None = None
        self._choices: tuple[Any, Sequence[Choice]] | None = None
        self._fills: dict[int, NDArray[np.int64]] = {}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        packed: bool = True,
    ) -> OnnxModel:
        """Load what `export_onnx` wrote.

        Args:
            folder: with `model.onnx` and `kvpass-onnx.json`.
            providers: execution providers of ONNX Runtime, best first; the CPU's where None.
            threads: that compute an operator; one per core where None.
            packed: whether weights are rearranged for speed. Without that they are held once, and products with weights
                of 4 bits are of the numbers that these stand for, at a price in speed.

        Raises:
            RequestError: ONNX Runtime is not installed, or has none of a provider.
            SourceError: the folder is none of kvpass's, or is damaged.
        """
        path = Path(folder)
        marker = _read_marker(path)
        chosen = list(providers or ["CPUExecutionProvider"])
        session = _session(path, chosen, threads, packed=packed)
        try:
            layers = [
                _Layer(*(int(e[k]) for k in ("owner", "kv_heads", "head_dim", "window", "sinks", "bits", "folded")))
                for e in marker["layers"]
            ]
            positions, vocab_size, target = int(marker["positions"]), int(marker["vocab_size"]), str(marker["target"])
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(
                f"the exported folder is damaged: {error!r}", where=str(path / MARKER), fix="export the model again"
            ) from error
        _check_graph(session, layers, path)
        if session.get_providers()[0] != "CPUExecutionProvider" and any(layer.sinks for layer in layers):
            raise RequestError("caches with sinks are run on a CPU only", fix="leave out providers=")
        eos = marker.get("eos")
        listed = [] if eos is None else eos if isinstance(eos, list) else [eos]
        made = cls(session, layers, positions, vocab_size, listed, target)
        if marker.get("passes"):
            made._passes = _Passes(_session(path, chosen, threads, SECOND["pass"], packed=packed), **marker["passes"])
        if marker.get("choices") is not None:
            prompts = _session(path, chosen, threads, SECOND["prompt"], packed=packed)
            made._choices = prompts, tuple(Choice(**entry) for entry in marker["choices"])
        return made

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches take: those of all tokens that there is room for; of those held where caches grow."""
        return sum(int(np.prod(b.shape())) for b in self._buffers.values()) * np.dtype(self._kind).itemsize

    def prefill(
        self, ids: ArrayLike, lengths: ArrayLike | None = None, *, capacity: int | None = None
    ) -> NDArray[np.float32]:
        """Read prompts into new caches.

        Rows are read together where one run holds them all, else one after the other and in parts: the operator reads
        on behind a cache in one row only, and a window only takes prompts of one length. Where caches grow, rows are
        padded on the left, and are always read together.

        Args:
            ids: [B, S] prompts, padded on the right with anything.
            lengths: [B] tokens of each row; S where None.
            capacity: tokens per row to make caches for, those to come included; all positions where None.

        Returns:
            [B, V] logits of the token behind each prompt.

        Raises:
            RequestError: a prompt is empty or longer than the model reads, or holds unknown ids.
        """
        tokens, counts = self._prompts(ids, lengths)
        batch, longest = tokens.shape
        self._capacity = self.positions if capacity is None else min(max(capacity, longest), self.positions)
        if self._choices is not None:
            return self._read_chosen(tokens, counts, *self._choices)
        self._allocate(batch)
        if self.target == "onnx":
            return self._read_padded(tokens, counts)
        if self._passes is not None:
            read = [self._read_in_passes(tokens, row, int(n), self._passes) for row, n in enumerate(counts)]
            self._held = counts
            return np.concatenate(read)
        alike = bool((counts == longest).all()) or not any(layer.window for layer in self._layers)
        if longest <= CHUNK and alike:
            logits = self._run(tokens, counts, counts - 1, slice(0, batch))
        else:
            logits = np.concatenate([self._read_alone(tokens, row, int(count)) for row, count in enumerate(counts)])
        self._held = counts
        return logits

    def _read_padded(self, tokens: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [B, V] behind prompts, which are moved to the right of their rows and read in parts."""
        longest = tokens.shape[1]
        self._padding = longest - counts
        moved = np.take_along_axis(tokens, (np.arange(longest) - self._padding[:, None]) % longest, axis=1)
        self._held = counts
        for begin in range(0, longest, CHUNK):
            part = moved[:, begin : begin + CHUNK]
            logits = self._grow(part, begin + part.shape[1])
        return logits

    def _read_alone(self, tokens: NDArray[np.int64], row: int, count: int) -> NDArray[np.float32]:
        """Logits [1, V] behind one prompt, read in parts into its rows of the caches."""
        for begin in range(0, count, CHUNK):
            end = min(count, begin + CHUNK)
            part = tokens[row : row + 1, begin:end]
            logits = self._run(part, np.array([end]), np.array([end - begin - 1]), slice(row, row + 1))
        return logits

    def _read_chosen(
        self, tokens: NDArray[np.int64], counts: NDArray[np.int64], prompts: Any, choices: Sequence[Choice]
    ) -> NDArray[np.float32]:
        """Logits [B, V] behind prompts, of which every layer keeps a choice; one at a time."""
        owners = [layer.owner for layer in self._layers]
        given = [told(choices, owners, int(count)) for count in counts]
        self._fills = {owner: np.array([held[owner] for _, held in given], np.int64) for owner in owners}
        more = self._capacity - int(counts.min())
        self._allocate(len(tokens), {owner: int(fills.max()) + more for owner, fills in self._fills.items()})
        found = []
        for row, (indices, held) in enumerate(given):
            feeds = {"input_ids": tokens[row : row + 1, : counts[row]]}
            feeds |= {name: np.array(index, np.int64) for name, index in indices.items()}
            logits, *presents = prompts.run(None, feeds)
            for (name, buffer), present in zip(self._buffers.items(), presents, strict=True):
                buffer.numpy()[row, :, : held[int(name.split(".")[0])]] = present[0]
            found.append(logits[:, -1].astype(np.float32))
        self._held = counts
        return np.concatenate(found)

    def _step_chosen(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [B, V] behind one more token of each row."""
        self._binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens))
        self._binding.bind_cpu_input("positions", self._held)
        for owner, fills in self._fills.items():
            self._binding.bind_cpu_input(f"held.{owner}", fills)
        logits = _computed(self.session, self._binding, np.zeros_like(self._held))
        self._held = self._held + 1
        self._fills = {owner: fills + 1 for owner, fills in self._fills.items()}
        return logits

    def _read_in_passes(self, tokens: NDArray[np.int64], row: int, count: int, passes: _Passes) -> NDArray[np.float32]:
        """Logits [1, V] behind one prompt, read until keys and values of layers read from below them stand still."""
        rows, whole = slice(row, row + 1), tokens[row : row + 1, :count]
        caches = [self._buffers[f"{owner}.{part}"] for owner in passes.owners for part in ("key", "value")]
        most = min(passes.passes or count, count) if count > 1 else 0
        before = [np.float32(0)] * len(caches)
        for number in range(most):
            logits = self._run(whole, np.array([count]), np.array([count - 1]), rows, passes.session)
            now = [cache.numpy()[rows, :, :count].astype(np.float32) for cache in caches]
            change = max(float(np.abs(a - b).max()) for a, b in zip(now, before, strict=True))
            before = now
            if change <= passes.tolerance or number + 1 == count:
                return logits
        if most and not passes.fallback:
            return logits
        for at in range(count):
            logits = self._run(whole[:, at : at + 1], np.array([at + 1]), np.array([0]), rows)
        return logits

    def decode(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Read one more token of each row.

        Args:
            ids: [B, 1].

        Returns:
            [B, V] logits of the token behind it.

        Raises:
            RequestError: there was no prompt, the caches are full, or an id is unknown.
        """
        tokens = _integers(ids, "ids")
        if tokens.shape != (len(self._held), 1) or not len(tokens):
            raise RequestError(
                f"a step reads one token of each of {len(self._held)} rows, and was given {list(tokens.shape)}",
                fix="call prefill first, and give ids of shape [B, 1]",
            )
        self._check_ids(tokens)
        if int(self._held.max()) >= self._capacity:
            raise RequestError(
                f"the caches hold {self._capacity} tokens per row and are full",
                fix=f"call prefill with a larger capacity; the model reads {self.positions} tokens at most",
            )
        if self._choices is not None:
            return self._step_chosen(tokens)
        self._held = self._held + 1
        if self.target == "onnx":
            return self._grow(tokens, int(self._held.max()))
        return self._run(tokens, self._held, np.zeros_like(self._held), slice(0, len(tokens)))

    def generate(
        self,
        ids: ArrayLike,
        lengths: ArrayLike | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        eos: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continue prompts; see `stream` for the arguments.

        Returns:
            the new ids of each row, the one that ended it included.
        """
        rows: list[list[int]] = []
        for tokens in self.stream(
            ids, lengths, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
            eos=eos,
        ):  # fmt: skip
            rows = rows or [[] for _ in tokens]
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return rows

    def stream(
        self,
        ids: ArrayLike,
        lengths: ArrayLike | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        eos: Sequence[int] | None = None,
    ) -> Iterator[list[int | None]]:
        """Continue prompts token by token.

        Args:
            ids: [B, S] prompts, padded on the right.
            lengths: [B] tokens of each row; S where None.
            max_new_tokens: per row.
            temperature: divides the logits before a token is drawn; 0 takes the likeliest.
            top_p: draw from the fewest tokens that have this much of the probability together.
            top_k: draw from so many likeliest tokens; 0 for all.
            seed: of the draws.
            eos: ids that end a row; the model's own where None, () for none.

        Yields:
            the next id of each row, None where the row has ended.

        Raises:
            RequestError: as `prefill`, or the text would grow too long for the model, or an option is out of range.
        """
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
            raise RequestError(
                f"temperature={temperature}, top_p={top_p}, top_k={top_k} are no sampling options",
                fix="temperature >= 0, 0 < top_p <= 1, top_k >= 0",
            )
        tokens, counts = self._prompts(ids, lengths)
        asked = int(counts.max()) + max_new_tokens - 1  # the last token is not read again
        if asked > self.positions:
            raise RequestError(
                f"a prompt of {counts.max()} tokens and {max_new_tokens} new ones are more than the {self.positions} "
                "that the model reads",
                fix="ask for fewer tokens, or export with more positions",
            )
        ends = set(self.eos if eos is None else eos)
        random = np.random.default_rng(seed)
        logits = self.prefill(tokens, counts, capacity=asked)
        ended = np.zeros(len(tokens), bool)
        for step in range(max_new_tokens):
            chosen = _choose(logits, temperature, top_p, top_k, random)
            yield [None if over else token for over, token in zip(ended.tolist(), chosen.tolist(), strict=True)]
            ended |= np.isin(chosen, list(ends))
            if ended.all() or step + 1 == max_new_tokens:
                return
            logits = self.decode(chosen[:, None])

    # ------------------------------------------------------------------ what is asked

    def _prompts(self, ids: ArrayLike, lengths: ArrayLike | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The prompts with padding of id 0, and the tokens of each."""
        tokens = _integers(ids, "prompts")
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise RequestError(f"prompts are ids [B, S] of at least one token, not of shape {list(tokens.shape)}")
        batch, longest = tokens.shape
        counts = np.full(batch, longest, np.int64) if lengths is None else _integers(lengths, "lengths")
        if counts.shape != (batch,) or counts.min() < 1 or counts.max() > longest:
            raise RequestError(
                f"lengths of {batch} prompts of up to {longest} tokens are {batch} numbers from 1 to {longest}, "
                f"not {counts.tolist()}"
            )
        tokens = tokens[:, : int(counts.max())]
        tokens[np.arange(tokens.shape[1]) >= counts[:, None]] = 0
        if tokens.shape[1] > self.positions:
            raise RequestError(
                f"a prompt of {tokens.shape[1]} tokens is longer than the {self.positions} that the model reads",
                fix="shorten it, or export with more positions",
            )
        self._check_ids(tokens)
        return tokens, counts

    def _check_ids(self, tokens: NDArray[np.int64]) -> None:
        wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if wrong.size:
            raise RequestError(
                f"token id {wrong[0]} is none of the model's {self.vocab_size}",
                fix="encode the text with the tokenizer in the exported folder",
            )

    # ------------------------------------------------------------------ what runs

    def _allocate(self, batch: int, rooms: Mapping[int, int] | None = None) -> None:
        """Caches of their own size for every layer, or of the rows given, and one binding for steps of all rows."""
        from onnxruntime import OrtValue

        self._held = np.zeros(0, np.int64)
        # the CUDA kernel takes no more rows than the window; other operators have no use for them
        slack = SLACK if self._device == "cpu" and self.target == "ort" else 0
        self._buffers.clear()
        for layer in self._layers:
            rows = rooms[layer.owner] if rooms else layer.rows(self._capacity, slack)
            if self.target == "onnx" and not layer.sinks:
                rows = 0
            shape = (batch, layer.graph_heads, rows, layer.width)
            for part in ("key", "value"):
                empty = np.zeros(shape, self._kind)
                self._buffers[f"{layer.owner}.{part}"] = OrtValue.ortvalue_from_numpy(empty, self._device, 0)
        if self.target == "onnx":
            return
        self._all = slice(0, batch)
        self._binding = self._bound(self._all, self.session)

    def _bound(self, rows: slice, session: Any) -> Any:
        """A binding whose pasts and presents are these rows of the caches, where they lie."""
        binding = session.io_binding()
        for name, buffer in self._buffers.items():
            _, *rest = buffer.shape()
            shape, ahead = (
                [rows.stop - rows.start, *rest],
                rows.start * int(np.prod(rest)) * np.dtype(self._kind).itemsize,
            )
            place = (self._device, 0, self._kind, shape, buffer.data_ptr() + ahead)
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)
        return binding

    def _run(
        self,
        tokens: NDArray[np.int64],
        held: NDArray[np.int64],
        at: NDArray[np.int64],
        rows: slice,
        session: Any = None,
    ) -> NDArray[np.float32]:
        """Logits [rows, V] behind token `at` of each row, of tokens that are the last of `held` ones."""
        session = session or self.session
        bound = rows == self._all and session is self.session
        binding = self._binding if bound else self._bound(rows, session)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens))
        binding.bind_cpu_input("attention_mask", (np.arange(held.max()) < held[:, None]).astype(np.int64))
        return _computed(session, binding, at)

    def _grow(self, tokens: NDArray[np.int64], total: int) -> NDArray[np.float32]:
        """Logits [B, V] behind the last token of each row; of `total` columns, the first are padding."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens))
        binding.bind_cpu_input("attention_mask", (np.arange(total) >= self._padding[:, None]).astype(np.int64))
        binding.bind_output("logits")
        for name, buffer in self._buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            binding.bind_output(f"present.{name}", self._device)
        self.session.run_with_iobinding(binding)
        value, *presents = binding.get_outputs()
        self._buffers = dict(zip(self._buffers, presents, strict=True))
        for layer in self._layers:
            for part in ("key", "value") if layer.window and not layer.sinks else ():
                self._trim(f"{layer.owner}.{part}", layer.window)
        logits: NDArray[np.float32] = value.numpy()[:, -1].astype(np.float32)
        return logits

    def _trim(self, name: str, window: int) -> None:
        """Keep the last rows of a cache, once there are some more of them than its window: it is a copy."""
        from onnxruntime import OrtValue

        buffer = self._buffers[name]
        if buffer.shape()[2] > window + SLACK:
            kept = np.ascontiguousarray(buffer.numpy()[:, :, -window:])
            self._buffers[name] = OrtValue.ortvalue_from_numpy(kept, self._device, 0)


def _computed(session: Any, binding: Any, at: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [B, V] behind token `at` of each row, of a run with a binding; caches are written as it says."""
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    value = binding.get_outputs()[-1]  # its numpy() is a view that does not keep it alive
    logits: NDArray[np.float32] = value.numpy()[np.arange(len(at)), at].astype(np.float32)
    return logits


def _integers(values: ArrayLike, what: str) -> NDArray[np.int64]:
    """A copy of what the caller gave."""
    try:
        found = np.asarray(values)
    except ValueError as error:
        raise RequestError(f"{what} are rows of one length: {error}", fix="pad them on the right") from error
    if found.size and found.dtype.kind not in "iu":
        raise RequestError(f"{what} are integers, not {found.dtype}")
    return found.astype(np.int64)


def _choose(
    logits: NDArray[np.float32], temperature: float, top_p: float, top_k: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """One id per row of logits [B, V]: the likeliest, or drawn from what top_k and then top_p leave."""
    if temperature == 0:
        return logits.argmax(axis=-1)
    order = np.argsort(-logits, axis=-1, kind="stable")
    ranked = np.take_along_axis(logits, order, axis=-1).astype(np.float64) / temperature
    if top_k:
        ranked[:, top_k:] = -np.inf
    chances = np.exp(ranked - ranked[:, :1])
    chances /= chances.sum(axis=-1, keepdims=True)
    before = chances.cumsum(axis=-1) - chances
    chances[before >= top_p] = 0.0
    total = chances.cumsum(axis=-1)
    drawn = random.random((len(logits), 1)) * total[:, -1:]
    picked = (total <= drawn).sum(axis=-1)
    return np.take_along_axis(order, picked[:, None], axis=-1)[:, 0]


def _read_marker(path: Path) -> dict[str, Any]:
    marker = path / MARKER
    if not marker.is_file():
        raise SourceError(
            f"{path} holds no ONNX package of kvpass",
            where=str(marker),
            fix="give a folder that export_onnx or `kvpass export` wrote",
        )
    try:
        document: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        version = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"the exported folder is damaged: {error!r}", where=str(marker), fix="export the model again"
        ) from error
    if version != FORMAT:
        raise SourceError(
            f"the folder was exported in format {version}; this version reads format {FORMAT}",
            where=str(marker),
            fix="open it with the version of kvpass that exported it, or export the model again",
        )
    return document


def _session(path: Path, providers: list[str], threads: int | None, file: str = FILE, *, packed: bool = True) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RequestError(
            "running an ONNX package needs onnxruntime, which is not installed", fix="pip install 'kvpass[onnx]'"
        ) from error
    missing = [p for p in providers if p not in onnxruntime.get_available_providers()]
    if missing:
        raise RequestError(
            f"ONNX Runtime {onnxruntime.__version__} has no {missing[0]}",
            fix=f"choose from {onnxruntime.get_available_providers()}, or pip install 'kvpass[gpu]'",
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "0" if packed else "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path / file), options, providers=providers)
    except Exception as error:  # the runtime's own errors have no common base
        raise SourceError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the graph: {str(error).splitlines()[0]}",
            where=str(path / FILE),
            fix="export the model again",
        ) from error
    if session.get_providers()[0] != providers[0]:  # it falls back without an error
        raise RequestError(
            f"{providers[0]} does not start on this machine", fix="check its driver, or choose another provider"
        )
    return session


def _check_graph(session: Any, layers: Sequence[_Layer], path: Path) -> None:
    """Refuse a graph whose caches are not those that the folder says it has."""
    said = {
        f"past_key_values.{layer.owner}.{part}": (layer.graph_heads, layer.width)
        for layer in layers
        for part in ("key", "value")
    }
    inputs = {i.name: i for i in session.get_inputs()}
    found = {n: (i.shape[1], i.shape[3]) for n, i in inputs.items() if n.startswith("past_key_values.")}
    types = {inputs[n].type for n in found}
    if (
        found != said
        or not ({"input_ids", "attention_mask"} <= inputs.keys() or "positions" in inputs)
        or not types <= _KINDS.keys()
    ):
        raise SourceError(
            "the graph has other caches than the folder says",
            where=str(path),
            fix="export the model again",
        )
