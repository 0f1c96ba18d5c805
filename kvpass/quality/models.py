"""What the measures need of a model, an adaptor for plain Hugging Face decoders, and a scale for cache states."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvpass.errors import RequestError, SourceError


class Scored(Protocol):
    """A decoder with a cache: what `kvpass.transform` returns, or a `HuggingFaceModel`."""

    def prefill(self, input_ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """Read prompts [B, S]; logits [B, V] of each row's last token, and a state to go on from."""

    def decode(self, input_ids: Tensor, state: Any) -> Tensor:
        """Logits [B, S, V] of S >= 1 more tokens per row; `state` is updated in place."""


@dataclass
class HuggingFaceState:
    """What a Hugging Face decoder remembers between calls.

    Attributes:
        cache: the model's own cache object.
        lengths: tokens per row, B of them.
        mask: [B, T] which columns of the cache hold tokens; None when all do.
    """

    cache: Any
    lengths: list[int]
    mask: Tensor | None

    def used_bytes(self) -> int:
        """Bytes of the entries that hold tokens; columns of padding are left out."""
        total = sum(t.numel() * t.element_size() for t in tensors_of(self.cache))
        if self.mask is None:
            return total
        return round(total * int(self.mask.sum()) / self.mask.numel())


class HuggingFaceModel:
    """A plain transformers causal language model with its own cache, as the measures want it.

    Args:
        source: a folder or hub id, or a model object, which is used as it is.
        device: where to compute; a model object stays where it is when None.
        dtype: what a folder is loaded in; float32 on a CPU and the checkpoint's elsewhere when None.

    Raises:
        SourceError: nothing can be loaded from the folder.
    """

    def __init__(
        self,
        source: str | Path | nn.Module,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(source, nn.Module):
            self.model: Any = source if device is None else source.to(device)
        else:
            place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model = _load(str(source), dtype or (torch.float32 if place.type == "cpu" else "auto")).to(place)
        accepted = inspect.signature(self.model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_keep = "logits_to_keep" in accepted

    @property
    def device(self) -> torch.device:
        """Where the token embedding is."""
        found: torch.device = self.model.get_input_embeddings().weight.device
        return found

    def prefill(self, input_ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, HuggingFaceState]:
        """Read prompts into a fresh cache.

        Args:
            input_ids: [B, S] token ids; rows of different lengths are padded on the right with any id.
            lengths: [B] tokens per row; all S where None.

        Returns:
            Logits [B, V] of each row's last token, and the state that `decode` goes on from.

        Raises:
            RequestError: an empty prompt, a length outside 1..S, ids outside the vocabulary, a model without a cache.
        """
        ids = self._ids(input_ids)
        batch, length = ids.shape
        counts = torch.full((batch,), length) if lengths is None else torch.as_tensor(lengths).cpu().long()
        if counts.shape != (batch,) or int(counts.min()) < 1 or int(counts.max()) > length:
            raise RequestError(
                f"lengths must be {batch} numbers from 1 to {length}, not {counts.tolist()}",
                fix="lengths count the tokens of each row without its padding",
            )
        longest = int(counts.max())
        counts = counts.to(self.device)
        ids, mask = ids[:, :longest], None
        if int(counts.min()) < longest:  # to the right edge, where these models want their prompts
            column = torch.arange(longest, device=self.device)
            shift = (longest - counts).unsqueeze(1)
            mask = column >= shift
            ids = ids.gather(1, (column - shift).clamp_min(0))
        logits, cache = self._run(ids, None, mask, last_only=True)
        return logits[:, -1], HuggingFaceState(cache, counts.tolist(), mask)

    def decode(self, input_ids: Tensor, state: HuggingFaceState) -> Tensor:
        """Logits [B, S, V] of S >= 1 more tokens [B, S] per row; `state` is updated in place."""
        ids = self._ids(input_ids)
        batch, count = ids.shape
        if batch != len(state.lengths):
            raise RequestError(f"{batch} rows were given to a state of {len(state.lengths)}")
        if state.mask is not None:
            state.mask = torch.cat([state.mask, state.mask.new_ones(batch, count)], dim=1)
        logits, state.cache = self._run(ids, state.cache, state.mask)
        state.lengths = [held + count for held in state.lengths]
        return logits

    def _run(self, ids: Tensor, cache: Any, mask: Tensor | None, *, last_only: bool = False) -> tuple[Tensor, Any]:
        """Logits [B, S, V] (or [B, 1, V]) and the cache after tokens [B, S]; mask [B, T] covers them too."""
        options: dict[str, Any] = {}
        if mask is not None:
            options["attention_mask"] = mask.long()
            if self._takes_positions:
                columns = mask[:, -ids.shape[1] :].long()
                before = mask[:, : mask.shape[1] - ids.shape[1]].sum(dim=1, keepdim=True)
                options["position_ids"] = (before + columns.cumsum(dim=1) - 1).clamp_min(0)
        if last_only and self._takes_keep:
            options["logits_to_keep"] = 1
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        finally:
            self.model.train(was_training)
        held = getattr(output, "past_key_values", None)
        if held is None:
            raise RequestError(
                f"{type(self.model).__name__} returns no KV cache",
                where=type(self.model).__name__,
                fix="measure decoders that return `past_key_values` when called with use_cache=True",
            )
        return output.logits, held

    def _ids(self, input_ids: Tensor) -> Tensor:
        ids = torch.as_tensor(input_ids)
        if ids.dim() != 2 or ids.shape[1] == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise RequestError(
                f"token ids are integers [batch, length >= 1], not {ids.dtype} {tuple(ids.shape)}",
                fix="pass one row per sequence, also for a single one",
            )
        size = int(self.model.get_input_embeddings().weight.shape[0])
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise RequestError(
                f"token id {wrong} is outside the vocabulary of {size}", fix="tokenize with this model's own tokenizer"
            )
        return ids.to(self.device, torch.long)


def _load(source: str, dtype: torch.dtype | str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"no causal language model can be loaded: {str(error).splitlines()[0]}",
            where=source,
            fix="give the folder of a Hugging Face model, with config.json and its weights",
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------- cache bytes


@dataclass(frozen=True)
class CacheBytes:
    """A state's size, measured from its tensors.

    Attributes:
        allocated: every tensor the state holds, whole storages, each counted once: keys, values and all beside them.
        used: the entries that hold tokens.
    """

    allocated: int
    used: int


def cache_bytes(state: Any) -> CacheBytes:
    """Measure a state by walking it; weights (anything inside an `nn.Module`) are not counted."""
    tensors = list(tensors_of(state))
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    known = getattr(state, "used_bytes", None)
    used = int(known()) if callable(known) else sum(t.numel() * t.element_size() for t in tensors)
    return CacheBytes(sum(storages.values()), used)


def tensors_of(thing: Any) -> Iterator[Tensor]:
    """The distinct tensors reachable from an object through attributes, mappings and sequences."""
    seen: set[int] = set()
    stack = [thing]
    while stack:
        item = stack.pop()
        if item is None or isinstance(item, str | bytes | int | float | type | nn.Module) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            stack.extend(item)
        elif not callable(item):
            stack.extend(getattr(item, "__dict__", {}).values())
            slots = [s for kind in type(item).__mro__ for s in _slots(kind)]
            stack.extend(getattr(item, s) for s in slots if hasattr(item, s))


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


# ---------------------------------------------------------------------- shared by the measures


PIECE = 1 << 24  # logits of one decode call that a measure asks for: 64 MB in float32


def piece_length(batch: int, vocab_size: int, chunk: int | None) -> int:
    """Tokens per row of one decode call: `chunk`, or what keeps its logits under 64 MB."""
    if chunk is None:
        return max(1, PIECE // (batch * vocab_size))
    if chunk < 1:
        raise RequestError(f"chunk must be at least 1, not {chunk}")
    return chunk


def check_models(models: Mapping[str, Scored]) -> None:
    """At least one model is needed."""
    if not models:
        raise RequestError("no models were given", fix="give a mapping from a name to a model, the original first")


@contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that the block takes to `seconds[name]`; work queued on a GPU is waited for."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    try:
        yield
    finally:
        if gpu:
            torch.cuda.synchronize()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
