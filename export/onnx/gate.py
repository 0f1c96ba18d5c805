"""The check of a written package against torch, which no export leaves out.

A runtime computes what it is told, and some of what it can be told gives wrong numbers without a word: a layer that
writes keys without naming both of its outputs, for one. So what was written is looked at, run, and compared: a prompt,
steps behind it, a prompt in two parts, and rows of different lengths.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvpass.errors import CheckError, UnsupportedError
from kvpass.export.onnx.lower import laid, rows_kept, stored, window_kept
from kvpass.export.onnx.standard import Target
from kvpass.ir.fixpoint import logits_of
from kvpass.ir.fold import fold_weights, read_late
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import placeholder

if TYPE_CHECKING:
    from kvpass.runtime.transformed import Transformed

BOUNDS = {"fp32": 1e-4, "fp16": 2e-2}  # of the logits' spread
SERVED = 5e-2  # the same where products with weights of 4 bits round what they are given to 8 bits
CODES = {
    "fp32": 0.02,
    "fp16": 0.5,
}  # steps that codes of keys and values may differ by in the mean: roundings turn over
STEPS = 32
LARGE = 64 << 20  # bytes of weights whose remains are worth looking through all objects for
REPORT = "nothing was written; report it, with the model's config"


@dataclass(frozen=True)
class Check:
    """One comparison: how large the difference is, what is allowed, and in which unit."""

    name: str
    measured: float
    allowed: float | None  # None: it is told, not checked
    unit: str = "of the logits' spread"


def check_written(
    model: Transformed,
    folder: Path,
    dtype: str,
    positions: int,
    target: Target = "ort",
    original: Transformed | None = None,
) -> list[dict[str, Any]]:
    """Check a folder; what was compared.

    Args:
        model: what the package should compute, its weights rounded as the package's are.
        folder: what was written.
        dtype: of the package.
        positions: tokens per row that it reads.
        target: whose operators it is made of.
        original: the model before its weights were rounded, where they were.

    Raises:
        CheckError: with the comparison and the first layer that differs.
    """
    import onnx

    from kvpass.export.onnx.export import FILE, SECOND

    path = folder / FILE
    if target == "ort":
        _teach_checker()
    for file in [path, *(folder / name for name in SECOND.values() if (folder / name).exists())]:
        onnx.checker.check_model(str(file), full_check=target != "ort")  # shapes of foreign operators it cannot infer
        lint(onnx.load(str(file), load_external_data=False), target)
    if model.plan.selective:
        return [asdict(check) for check in _compare_chosen(model, folder, dtype, positions)]
    large = sum(file.stat().st_size for file in folder.iterdir()) > LARGE
    if large:
        _give_back()
    expected = _reference(model, positions)
    if large:
        _give_back()
    checks = _compare(model, expected, _session(path), dtype, positions, target)
    if model.plan.upward:
        checks.append(_compare_passes(model, folder, dtype, positions))
    if original is not None:
        checks.append(_as_served(model, expected, _session(path, packed=True), dtype, positions))
        full = _reference(original, positions).logits
        checks.append(Check("weights of 4 bits, against full ones", _apart(expected.logits, full), None))
    return [asdict(check) for check in checks]


def _allowed(model: Transformed, bound: float) -> float:
    """What logits may differ by: where a cache holds codes, noise of rounding may turn one into the next."""
    return bound + max(c.format.step for c in model.plan)


def _apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the spread of what is expected."""
    return float((found - expected).abs().max()) / max(float(expected.max() - expected.min()), 1e-6)


def _equal(
    name: str, found: Tensor, expected: Tensor, allowed: float, where: str | Callable[[], str], fix: str = REPORT
) -> Check:
    """The check that logits are torch's.

    Raises:
        CheckError: they are not; `where` says or finds out in which part.
    """
    check = Check(name, _apart(found, expected), allowed)
    if not check.measured <= allowed:
        raise CheckError(
            f"{name}: logits differ from torch's by {check.measured:.1e} of their spread, and {allowed:.0e} is allowed",
            where=where if isinstance(where, str) else where(),
            fix=fix,
        )
    return check


def _as_served(model: Transformed, expected: _Expected, session: Any, dtype: str, positions: int) -> Check:
    """A prompt and steps in a session that packs weights, as servers do.

    One that does not multiplies by the numbers that weights of 4 bits stand for, which shows to the last digit that
    they are right; one that does rounds what they are multiplied with, and shows that this does little.
    """
    ids, prompt = expected.ids[:1], expected.prompt
    run = _Run(model.plan, session, dtype, positions)
    logits, held = run(ids[:, :prompt], None)
    if prompt < ids.shape[1]:
        logits = torch.cat([logits, run.steps(ids[:, prompt:], held)[0]], 1)
    return _equal(
        "a prompt and steps, inputs of products rounded",
        logits,
        expected.logits[:1],
        _allowed(model, SERVED),
        "the ONNX graph",
        "nothing was written; leave out weights='int4'",
    )


def _teach_checker() -> None:
    """Tell onnx of the one operator that ONNX Runtime has in onnx's own domain and onnx does not."""
    import onnx

    name = "SimplifiedLayerNormalization"
    if onnx.defs.has(name):
        return
    formal, kinds = onnx.defs.OpSchema.FormalParameter, ["tensor(float)", "tensor(float16)"]
    attributes = [
        onnx.defs.OpSchema.Attribute("axis", onnx.defs.OpSchema.AttrType.INT, required=False),
        onnx.defs.OpSchema.Attribute("epsilon", onnx.defs.OpSchema.AttrType.FLOAT, required=False),
        onnx.defs.OpSchema.Attribute("stash_type", onnx.defs.OpSchema.AttrType.INT, required=False),
    ]
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            name, "", 1, inputs=[formal("X", "T"), formal("scale", "T")], outputs=[formal("Y", "T")],
            type_constraints=[("T", kinds, "")], attributes=attributes,
        )
    )  # fmt: skip


def lint(proto: Any, target: Target = "ort") -> None:
    """Refuse graphs that runtimes read wrongly without an error, or that other runtimes than ONNX Runtime cannot read.

    Raises:
        CheckError: an attention with keys of its own lacks an output for them, or a reader has one; or an operator is
            none of the standard where the target has no others.
    """
    foreign = sorted({n.op_type for n in _nodes(proto.graph) if n.domain not in ("", "ai.onnx")})
    if target != "ort" and foreign:
        raise CheckError(f"the standard has no {', '.join(foreign)}", where="the ONNX graph")
    shapes = {v.name: v for v in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]}
    for node in proto.graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        outputs = [o for o in node.output if o]
        fresh = not (len(node.input) > 1 and _empty(shapes.get(node.input[1])))
        if len(node.input) > 12:  # caches of codes: the operator wants both outputs of every layer
            fresh = True
        if fresh and len(outputs) < 3:
            raise CheckError(f"{node.name} writes keys and values and does not return both", where="the ONNX graph")
        if not fresh and len(outputs) > 1:
            raise CheckError(f"{node.name} reads another layer's cache and returns one", where="the ONNX graph")


def _nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph, and of the bodies in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g)


def _empty(value: Any) -> bool:
    if value is None:
        return False
    sizes = value.type.tensor_type.shape.dim
    return len(sizes) == 3 and sizes[1].HasField("dim_value") and sizes[1].dim_value == 0


def _session(path: Path, *, packed: bool = False) -> Any:
    """A session; without packing weights stay where they are, as pages of the file, and are held once."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "0" if packed else "1")
    options.enable_cpu_mem_arena = False
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckError(
            f"ONNX Runtime {onnxruntime.__version__} does not load what was written: {str(error).splitlines()[0]}",
            where="the ONNX graph",
            fix="report it, with the model's config",
        ) from error


@dataclass(frozen=True)
class _Expected:
    """What torch says of two rows of tokens [2, S], of which the first `prompt` are read at once."""

    ids: Tensor
    logits: Tensor  # [2, S, V], float32
    prompt: int


def _reference(model: Transformed, positions: int) -> _Expected:
    """Run the program as it is, reading one weight after the other, so that none is left when the session comes."""
    facts = model.program.facts
    longest = min(facts.max_positions or positions, positions)
    reach = max((c.window + c.sinks for c in model.plan if c.window), default=0)
    prompt = reach + 7 if 0 < reach <= 256 else 19  # behind the wrap of a window that is not too long
    prompt = min(prompt, max(2, longest - STEPS))
    length = min(prompt + STEPS, longest)
    ids = torch.randint(0, facts.vocab_size, (2, length), generator=torch.Generator().manual_seed(23))
    if model.plan.upward:
        return _Expected(ids, _step_by_step(model, ids), prompt)
    program = fold_weights(model.program)
    read_late(program.forward)
    given = {placeholder(program.forward, "input_ids"): ids.to(model.device)}

    def weight(name: str) -> Tensor:
        return program.read(name).to(model.device)

    with torch.no_grad():
        logits = logits_of(program.forward, given, weight, model.device)
    return _Expected(ids, logits.float().cpu(), prompt)


def _give_back() -> None:
    """Hand memory that is free back to the system: glibc keeps what tensors of some megabytes leave behind."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _compare(
    model: Transformed, expected: _Expected, session: Any, dtype: str, positions: int, target: Target
) -> list[Check]:
    """Everything that is compared."""
    ids, right, prompt = expected.ids, expected.logits, expected.prompt
    length = int(ids.shape[1])
    run = _Run(model.plan, session, dtype, positions, target, room=length)
    allowed = _allowed(model, BOUNDS[dtype])
    checks = []

    def compare(name: str, found: Tensor, expected: Tensor, held: _Held | None, tokens: int = 0) -> None:
        def where() -> str:
            return "the ONNX graph" if held is None else _first_layer(model, held, ids[:1, :tokens], allowed, run)

        checks.append(_equal(name, found, expected, allowed, where))
        spread = float(expected.max() - expected.min())
        sure = (expected.topk(2, dim=-1).values.diff(dim=-1).abs() > 2 * allowed * spread).squeeze(-1)
        if not torch.equal(found.argmax(-1)[sure], expected.argmax(-1)[sure]):
            raise CheckError(f"{name}: the likeliest token is another one than torch's", where="the ONNX graph")

    one = ids[:1]
    logits, held = run(one[:, :prompt], None)
    compare("a prompt", logits, right[:1, :prompt], held, prompt)
    if any(not c.format.full for c in model.plan) and not run.rings:
        error = max((b - a).abs().mean() for _, a, b in _entries(model, held, one[:, :prompt], run))
        checks.append(Check("codes of keys and values", float(error), CODES[dtype], "steps in the mean"))
        if not error <= CODES[dtype]:
            raise CheckError(
                f"codes of keys and values differ from torch's by {float(error):.2g} steps in the mean",
                where=_first_layer(model, held, one[:, :prompt], allowed, run),
            )
    if prompt < length:
        steps, held = run.steps(one[:, prompt:], held)
        compare(f"{length - prompt} steps", steps, right[:1, prompt:], held, length)
    first = max(1, prompt // 2)
    _, held = run(one[:, :first], None)
    logits, held = run(one[:, first:prompt], held)
    compare("a prompt in two parts", logits, right[:1, first:prompt], held, prompt)
    counts = [prompt, max(1, prompt - 5)]
    if (run.rings or model.plan.upward) and target != "onnx":  # such prompts are read one at a time where windows wrap
        held = _Held.together([run(ids[i : i + 1, :n], None)[1] for i, n in enumerate(counts)])
    else:
        logits, held = run(ids[:, :prompt], None, counts)
        compare("prompts of two lengths", logits[1:, : counts[1]], right[1:, : counts[1]], None)
    if prompt < length:
        after = torch.stack([ids[i, n] for i, n in enumerate(counts)]).unsqueeze(1)
        logits, _ = run(after, held, [n + 1 for n in counts])
        compare(
            "a step of rows of two lengths",
            logits,
            torch.stack([right[i, n] for i, n in enumerate(counts)]).unsqueeze(1),
            None,
        )
    return checks


def _step_by_step(model: Transformed, ids: Tensor) -> Tensor:
    """Logits [B, S, V] by torch, token by token: what a layer reads of one above it is then there, and exact."""
    logits, state = model.prefill(ids[:, :1])
    rest = [model.decode(ids[:, at : at + 1], state)[:, -1] for at in range(1, ids.shape[1])]
    return torch.stack([logits, *rest], dim=1).float().cpu()


def _compare_passes(model: Transformed, folder: Path, dtype: str, positions: int) -> Check:
    """Prompts of two lengths that the runner reads in passes, and steps behind them, against torch."""
    longest = min(model.program.facts.max_positions or positions, positions)
    width, steps = min(17, longest), max(0, min(3, longest - 2))
    lengths = torch.tensor([width - steps, width - steps - 3]).clamp(min=1)
    found, expected = _by_runner(model, folder, lengths, steps, seed=29)
    return _equal("prompts in passes", found, expected, _allowed(model, BOUNDS[dtype]), "pass.onnx")


def _compare_chosen(model: Transformed, folder: Path, dtype: str, positions: int) -> list[Check]:
    """Prompts of two lengths, of which every layer keeps its choice, and steps behind them, against torch."""
    longest = min(model.program.facts.max_positions or positions, positions)
    steps = min(STEPS, longest // 2)
    longest -= steps
    drops = (n for n in (32, 64, 128, 256, 512, 1024) if any(k < n - 9 for k in model.plan.kept(n - 9).values()))
    length = min(2 * next(drops, longest), longest)  # twice what is the least of which tokens are dropped
    lengths = torch.tensor([max(1, length - 9), length])
    found, expected = _by_runner(model, folder, lengths, steps, seed=31)
    allowed = _allowed(model, BOUNDS[dtype])
    return [
        _equal("prompts of two lengths", found[:1], expected[:1], allowed, "prompt.onnx"),
        _equal(f"{steps} steps", found[1:], expected[1:], allowed, "model.onnx"),
    ]


def _by_runner(model: Transformed, folder: Path, lengths: Tensor, steps: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Logits [1 + steps, B, V] of prompts of several lengths, and of each token after: by the runner, by torch.

    The runner is opened when torch is done: threads of two runtimes get in each other's way.
    """
    from kvpass.export.onnx.runner import OnnxModel

    longest, rows = int(lengths.max()), torch.arange(len(lengths))
    shape = (len(lengths), longest + steps)
    ids = torch.randint(0, model.program.facts.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    tokens = [ids[rows, lengths + step].unsqueeze(1) for step in range(steps)]
    logits, state = model.prefill(ids[:, :longest], lengths)
    right = [logits, *(model.decode(token, state)[:, -1] for token in tokens)]
    runner = OnnxModel.open(folder, packed=False)
    found = [runner.prefill(ids[:, :longest].numpy(), lengths.numpy(), capacity=longest + steps)]
    found += [runner.decode(token.numpy()) for token in tokens]
    return torch.from_numpy(np.stack(found)), torch.stack(right).float().cpu()


@dataclass(frozen=True)
class _Held:
    """Caches between two runs, and how many tokens the longest row has."""

    past: list[Tensor]
    tokens: int

    @staticmethod
    def together(rows: list[_Held]) -> _Held:
        """Rows side by side, the shorter ones padded."""
        joined = []
        for parts in zip(*(r.past for r in rows), strict=True):
            most = max(int(p.shape[2]) for p in parts)
            joined.append(torch.cat([torch.nn.functional.pad(p, (0, 0, 0, most - p.shape[2])) for p in parts]))
        return _Held(joined, max(r.tokens for r in rows))


class _Run:
    """Runs of a session with caches that are handed on, as a target's runner does."""

    def __init__(
        self, plan: CachePlan, session: Any, dtype: str, positions: int, target: Target = "ort", room: int = 0
    ) -> None:
        self.plan, self.session, self.target = plan, session, target
        self.kind = torch.float16 if dtype == "fp16" else torch.float32
        self.outputs = [o.name for o in session.get_outputs()]
        windows = {o: window_kept(plan, o, positions, target) for o in plan.owners()}
        self.trimmed = windows if target == "onnx" else {}
        self.rings = {o: rows for o, w in windows.items() if (rows := w or sum(rows_kept(plan, o)))}
        grown = {o: sum(rows_kept(plan, o)) for o in windows}
        placed = dict.fromkeys(windows, room or positions)
        self.rows = {"ort": placed if plan.upward else self.rings, "onnx": grown, "onnx-static": placed | self.rings}[
            target
        ]

    def __call__(self, ids: Tensor, held: _Held | None, counts: list[int] | None = None) -> tuple[Tensor, _Held]:
        """Logits [B, S, V] of new tokens; `counts` are the tokens of each row, those before included."""
        if self.plan.upward and ids.shape[1] > 1:
            return self.steps(ids, held)
        before = 0 if held is None else held.tokens
        total = before + int(ids.shape[1])
        lengths = torch.tensor(counts or [total] * len(ids)).view(-1, 1)
        columns, padded = torch.arange(total), self.target == "onnx"
        mask = columns >= total - lengths if padded else columns < lengths
        aside = [int(total - n) if padded and held is None else 0 for n in lengths]
        given = torch.stack([row.roll(n) for row, n in zip(ids, aside, strict=True)])
        if held is None:
            past = []
            for owner in self.plan.owners():
                kind, width = stored(self.plan[owner], self.kind)
                shape = (len(ids), *laid(self.plan, owner, self.rows.get(owner, 0)), width)
                past += [torch.zeros(shape, dtype=kind) for _ in range(2)]
            held = _Held(past, 0)
        names = [n.replace("present", "past_key_values") for n in self.outputs[1:]]
        feeds = {"input_ids": given.numpy(), "attention_mask": mask.long().numpy()}
        if self.target == "onnx-static":
            logits, presents = self._in_place(feeds, dict(zip(names, held.past, strict=True)))
        else:
            feeds |= {name: t.numpy() for name, t in zip(names, held.past, strict=True)}
            logits, *presents = (torch.from_numpy(x) for x in self.session.run(self.outputs, feeds))
            pairs = zip(presents, [w for o in self.plan.owners() for w in [self.trimmed.get(o, 0)] * 2], strict=True)
            presents = [t[:, :, -w:] for t, w in pairs]
        found = torch.stack([row.roll(-n, 0) for row, n in zip(logits.float(), aside, strict=True)])
        return found, _Held(presents, total)

    def steps(self, ids: Tensor, held: _Held | None) -> tuple[Tensor, _Held]:
        """Logits [B, S, V] of S > 0 tokens that are read one at a time."""
        parts = []
        for at in range(ids.shape[1]):
            logits, held = self(ids[:, at : at + 1], held)
            parts.append(logits)
        assert held is not None
        return torch.cat(parts, dim=1), held

    def _in_place(self, feeds: dict[str, Any], past: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits, and copies of the caches in which presents were written where the pasts lie."""
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits")
        copies = {name: t.clone() for name, t in past.items()}
        for name, t in copies.items():
            place = ("cpu", 0, t.numpy().dtype.type, list(t.shape), t.data_ptr())
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values", "present"), *place)
        self.session.run_with_iobinding(binding)
        logits, *presents = (torch.from_numpy(v.numpy().copy()) for v in binding.get_outputs())
        return logits, presents


def _entries(model: Transformed, held: _Held, ids: Tensor, run: _Run) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of every cache that holds all tokens: what it is, and its entries by torch and by the runtime."""
    _, state = model.prefill(ids)
    plan, count = model.plan, ids.shape[1]
    for index, owner in enumerate(plan.owners()):
        if owner in run.rings:
            continue
        right = plan.layout(owner).entries(state.stores[owner], count, torch.float32)
        for what, wanted, found in zip(("keys", "values"), right, held.past[2 * index : 2 * index + 2], strict=True):
            if found.dtype == torch.uint8:  # two codes in a byte, the first in its lower half
                found = torch.stack([found & 15, found >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
            yield f"{what} of layer {owner}", wanted, found[:, :, :count].float()


def _first_layer(model: Transformed, held: _Held, ids: Tensor, allowed: float, run: _Run) -> str:
    """The first layer whose keys or values differ from torch's, as far as caches that hold all tokens tell."""
    seen = 0
    for what, right, found in _entries(model, held, ids, run):
        error = float((found - right).abs().max()) / max(float(right.abs().max()), 1e-6)
        if not error <= 10 * allowed:
            return f"the first keys or values that differ are the {what}"
        seen += 1
    return f"no keys or values differ in {seen} caches: look behind their attention" if seen else "no cache tells"


def probe(plan: CachePlan, dtype: str, target: Target = "ort") -> None:
    """Ask the installed runtime for what the graph will need, by running one operator.

    Raises:
        UnsupportedError: it does not do it, with its version.
    """
    import numpy
    import onnx
    import onnxruntime

    if target != "ort" or all(c.owner for c in plan):
        return
    kind = onnx.TensorProto.FLOAT16 if dtype == "fp16" else onnx.TensorProto.FLOAT
    tensor = onnx.helper.make_tensor_value_info
    inputs = [
        tensor("q", kind, [1, 1, 16]), tensor("k", kind, [1, 0, 16]), tensor("v", kind, [1, 0, 16]),
        tensor("pk", kind, [1, 1, 2, 16]), tensor("pv", kind, [1, 1, 2, 16]),
        tensor("n", onnx.TensorProto.INT32, [1]), tensor("t", onnx.TensorProto.INT32, []),
    ]  # fmt: skip
    node = onnx.helper.make_node(
        "GroupQueryAttention", [i.name for i in inputs], ["o"], domain="com.microsoft", num_heads=1, kv_num_heads=1
    )
    graph = onnx.helper.make_graph([node], "probe", inputs, [tensor("o", kind, [1, 1, 16])])
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    real = numpy.float16 if dtype == "fp16" else numpy.float32
    feeds = {i.name: numpy.ones([d.dim_value for d in i.type.tensor_type.shape.dim], real) for i in inputs[:5]}
    feeds |= {"n": numpy.array([1], numpy.int32), "t": numpy.array(2, numpy.int32)}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        out = session.run(None, feeds)[0]
    except Exception as error:
        raise UnsupportedError(
            f"ONNX Runtime {onnxruntime.__version__} does not let a layer read another one's cache",
            where="GroupQueryAttention with no keys of its own",
            fix="install onnxruntime 1.31 or later, or leave out ShareLayers",
        ) from error
    if not numpy.allclose(out, 1.0, atol=1e-2):
        raise UnsupportedError(
            f"ONNX Runtime {onnxruntime.__version__} reads another layer's cache wrongly",
            where="GroupQueryAttention with no keys of its own",
            fix="install onnxruntime 1.31 or later, or leave out ShareLayers",
        )
