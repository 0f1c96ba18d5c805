"""`export_onnx`: a transformed model as a folder that ONNX Runtime and onnxruntime-genai serve unmodified.

The order is: refuse what the target cannot express, ask the installed runtime whether it does what the graph will need,
lower, export, optimize, write beside the output's place, check what was written (`gate`), and only then let the folder
appear. So a folder that is there was compared with the torch program that it came from.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvpass.errors import RequestError, UnsupportedError
from kvpass.export.onnx.chosen import choices_of
from kvpass.export.onnx.genai import GenaiFacts, write_genai_config
from kvpass.export.onnx.lower import (
    OnnxGraph,
    Reads,
    check_plan,
    check_program,
    folded_rows,
    laid,
    lower,
    rows_kept,
    stored,
    window_kept,
)
from kvpass.export.onnx.standard import OPSETS, Target
from kvpass.export.onnx.weights import attached, halve, write, write_beside
from kvpass.export.program_folder import copy_companions
from kvpass.ir.fixpoint import limits
from kvpass.ir.program import aten
from kvpass.output import output_folder

if TYPE_CHECKING:
    from kvpass.runtime.transformed import Transformed

Weights = Literal["int4"]
MARKER = "kvpass-onnx.json"
FILE, DATA = "model.onnx", "model.onnx.data"
SECOND = {"pass": "pass.onnx", "prompt": "prompt.onnx"}
FORMAT = 1
POSITIONS = 4096  # of the tables, where the model has more
LEAST = 16  # more than the texts that graphs are traced with
_NEEDED = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """What was written and how it was checked.

    Attributes:
        folder: where.
        target: the runtime it is for.
        positions: tokens per row that it reads at most.
        nodes: how many of each operator the graph has, in the bodies of choices too.
        bytes: of all files.
        checks: what was compared, how large the difference is, the bound, and the unit of both.
        seconds: what each step took.
    """

    folder: str
    target: str
    positions: int
    nodes: dict[str, int]
    bytes: int
    checks: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def export_onnx(
    model: Transformed,
    folder: str | Path,
    *,
    target: Target = "ort",
    dtype: Literal["fp32", "fp16"] = "fp32",
    weights: Weights | None = None,
    positions: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model as an ONNX package and check it against torch before it appears.

    Args:
        model: what `kvpass.transform` gave.
        folder: where it is to be; made whole or not at all.
        target: "ort", operators of ONNX Runtime (GroupQueryAttention); "onnx", operators of the standard alone (opset
            23), whose caches grow; "onnx-static", likewise (opset 24), whose caches are written in place.
        dtype: of weights, caches and arithmetic.
        weights: "int4" for matrices of 4 bits, in blocks of 32 that share a scale; as `dtype` says where None.
        positions: tokens per row that the package reads at most; the model's own number, 4096 at most, where None.
        overwrite: replace a folder that is there.

    Raises:
        PlanError: the target has no operator for this cache; nothing was read.
        RequestError: a package is missing, or a folder is in the way.
        CheckError: the runtime computes something else; nothing is left behind.
        OutputError: the folder cannot be written.
    """
    if target not in OPSETS:
        raise RequestError(f"there is no target {target!r}", fix=f"choose one of {', '.join(OPSETS)}")
    if weights not in (None, "int4"):
        raise RequestError(f"there are no weights {weights!r}", fix="choose 'int4', or leave it out")
    if weights and target != "ort":
        raise RequestError("the standard has no product with weights of 4 bits", fix="choose target='ort'")
    check_plan(model.plan, target)
    check_program(model.program, target)
    require(*_NEEDED)
    count = _positions(model, positions)
    from kvpass.export.onnx.gate import check_written, probe

    probe(model.plan, dtype, target)
    clock = _Clock()
    with output_folder(folder, overwrite=overwrite) as partial:
        nodes: Counter[str] = Counter()
        for reads in _graphs(model):
            with clock("lower"):
                graph = lower(model.program, model.plan, count, target, reads)
            with clock("export"):
                proto = _to_onnx(graph, dtype)
            with clock("optimize"):
                from kvpass.export.onnx.optimize import optimize

                optimize(proto, target, packed=not model.plan.selective)  # then two graphs read equal matrices
            if weights == "int4":
                from kvpass.export.onnx.quantize import quantize

                with clock("quantize"):
                    quantize(proto)
            nodes = nodes or Counter(n.op_type for n in proto.graph.all_nodes())
            with clock("write"):
                if reads in SECOND:
                    write_beside(proto, partial / SECOND[reads], partial / FILE)
                else:
                    write(proto, partial / FILE, DATA)
                    _describe(model, graph, partial, dtype, weights)
            del proto, graph
        original = None
        if weights == "int4":
            from kvpass.export.onnx.quantize import rounded

            original, model = model, model.with_program(rounded(model.program, dtype))
        with clock("check"):
            checks = check_written(model, partial, dtype, count, target, original)
        size = sum(f.stat().st_size for f in partial.iterdir())
    ordered = dict(sorted(nodes.items(), key=lambda item: (-item[1], item[0])))
    return Exported(str(folder), target, count, ordered, size, checks, clock.seconds)


def require(*packages: str) -> None:
    """Refuse to go on without these packages.

    Raises:
        RequestError: with what to install.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            f"ONNX export needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            fix="pip install 'kvpass[onnx]'",
        )


def _positions(model: Transformed, asked: int | None) -> int:
    count = min(model.program.facts.max_positions or POSITIONS, POSITIONS) if asked is None else asked
    if count < LEAST:
        raise RequestError(
            f"a package has {LEAST} positions at least, not {count}",
            where="the model's own number" if asked is None else "positions",
            fix=f"export a model that reads {LEAST} tokens" if asked is None else f"give {LEAST} or more",
        )
    return count


class _Clock:
    """Seconds of named steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)


def _graphs(model: Transformed) -> tuple[Reads, ...]:
    """What the graphs of a package read: where a layer reads one above it, prompts need one of their own."""
    if model.plan.selective:
        return "one", "prompt"
    return ("one", "pass") if model.plan.upward else ("chunks",)


def outputs_of(owners: tuple[int, ...]) -> list[str]:
    """The names of a graph's outputs, as onnxruntime-genai knows them."""
    return ["logits", *(f"present.{owner}.{part}" for owner in owners for part in ("key", "value"))]


@dataclass(frozen=True)
class _Input:
    """An input of a graph: an example, and the names of the axes whose sizes are free. Equal names say equal sizes."""

    name: str
    example: torch.Tensor
    axes: dict[int, str]


def _inputs(graph: OnnxGraph, kind: torch.dtype) -> list[_Input]:
    batch, length, past = 2, 1 if graph.reads == "one" else 5, 0 if graph.reads == "pass" else 3
    room = past + length + 1 if graph.target == "onnx-static" or graph.reads != "chunks" else past
    new = {0: "batch_size"} if graph.reads == "one" else {0: "batch_size", 1: "sequence_length"}
    whole = {0: "batch_size", 1: "sequence_length" if graph.reads == "pass" else "total_sequence_length"}
    found = [
        _Input("input_ids", torch.zeros((batch, length), dtype=torch.long), new),
        _Input("attention_mask", torch.ones((batch, length + past), dtype=torch.long), whole),
    ]
    for owner in graph.owners:
        cache = graph.plan[owner]
        window = window_kept(graph.plan, owner, graph.positions, graph.target)
        fixed = sum(rows_kept(graph.plan, owner))  # rows of a cache with sinks, which never grows
        rows = fixed or (window + 1 if window else room)
        element, width = stored(cache, kind)
        axes = {0: "batch_size"}
        if not fixed:
            axes[2] = f"past_sliding_length_{window}" if window else "past_sequence_length"
        for part in ("key", "value"):
            held = torch.zeros((batch, *laid(graph.plan, owner, rows), width), dtype=element)
            found.append(_Input(f"past_key_values.{owner}.{part}", held, axes))
    return found


def _inputs_of_prompt(graph: OnnxGraph) -> list[_Input]:
    """One prompt, and per ranking which of its tokens ask and how many stay."""
    choices = choices_of(graph.plan)
    length = 4 * len(choices) + 9  # no two sizes are equal
    found = [_Input("input_ids", torch.zeros((1, length), dtype=torch.long), {1: "sequence_length"})]
    for index, choice in enumerate(choices):
        if choice.name:
            found.append(_Input(choice.name, torch.arange(2 * index + 2), {0: choice.name}))
        found.append(_Input(choice.kept, torch.zeros(length - 2 * index - 1, dtype=torch.long), {0: choice.kept}))
    return found


def _inputs_of_step(graph: OnnxGraph, kind: torch.dtype) -> list[_Input]:
    """One token per row, caches of different lengths, where the token stands, and how many each layer holds."""
    batch = {0: "batch_size"}
    found = [_Input("input_ids", torch.zeros((2, 1), dtype=torch.long), batch)]
    for index, owner in enumerate(graph.owners):
        cache = graph.plan[owner]
        element, width = stored(cache, kind)
        axes = batch | {2: f"past_sequence_length_{owner}"}
        for part in ("key", "value"):
            held = torch.zeros((2, cache.kv_heads, index + 3, width), dtype=element)
            found.append(_Input(f"past_key_values.{owner}.{part}", held, axes))
    numbers = ["positions", *(f"held.{owner}" for owner in graph.owners)]
    return found + [_Input(name, torch.zeros(2, dtype=torch.long), batch) for name in numbers]


def _to_onnx(graph: OnnxGraph, dtype: str) -> Any:
    """The graph as an `onnx_ir.Model`; its weights stay where they are."""
    if dtype == "fp16":
        halve(graph.module)
    kind = torch.float16 if dtype == "fp16" else torch.float32
    if graph.reads == "prompt":
        inputs = _inputs_of_prompt(graph)
    else:
        inputs = _inputs_of_step(graph, kind) if graph.plan.selective else _inputs(graph, kind)
    dynamic = torch.export.Dim.DYNAMIC
    shapes: Any = tuple(dict.fromkeys(i.axes, dynamic) for i in inputs)
    named: Any = tuple(i.axes for i in inputs)
    with _quiet():
        program = torch.export.export(
            graph.module, tuple(i.example for i in inputs), dynamic_shapes=shapes, strict=False
        )
        made = _translate(
            program, input_names=[i.name for i in inputs], output_names=outputs_of(graph.owners),
            opset_version=OPSETS[graph.target], dynamic_shapes=named,
        )  # fmt: skip
        with attached(made.model, graph.readers):
            made.optimize()
    return made.model


_SPELLED = {  # what Python's operators become, as operations that have a translation
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
}


def _translate(program: torch.export.ExportedProgram, **options: Any) -> torch.onnx.ONNXProgram:
    """A program in ONNX.

    `torch.onnx.export` traces it once more to decompose what it has no translation for, which takes as long as the
    rest together, and changes nothing in graphs whose every operation has one: so it is tried without that.
    """
    for node in program.graph.nodes:
        if node.target is aten.to.dtype:
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.args[1]}
        node.target = _SPELLED.get(node.target, node.target)
    setattr(program, "run_decompositions", lambda *_: program)  # noqa: B010
    try:
        made = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, **options)
    except torch.onnx.OnnxExporterError:
        delattr(program, "run_decompositions")
        made = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, **options)
    if made is None:
        raise UnsupportedError("torch exported no graph", where="torch.onnx.export")
    return made


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What exporters print and warn of is not for users; errors are raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _describe(model: Transformed, graph: OnnxGraph, folder: Path, dtype: str, weights: str | None) -> None:
    """Write what a runner has to know, and what genai does."""
    facts = model.program.facts
    config = facts.config or {}
    stop = limits(model.program.forward)
    above = sorted({c.kv_source for c in graph.plan if c.upward and c.kv_source is not None})
    windows = tuple(window_kept(graph.plan, o, graph.positions, graph.target) for o in graph.owners)
    document = {
        "format": FORMAT,
        "target": graph.target,
        "dtype": dtype,
        "weights": weights or dtype,
        "positions": graph.positions,
        "vocab_size": facts.vocab_size,
        "passes": None if stop is None else {**asdict(stop), "owners": above},
        "choices": [asdict(choice) for choice in choices_of(graph.plan)] if graph.plan.selective else None,
        "eos": config.get("eos_token_id"),
        "layers": [
            {
                "owner": o,
                "kv_heads": graph.plan[o].kv_heads,
                "head_dim": graph.plan[o].key_dim,
                "bits": graph.plan[o].format.bits,
                "window": window or rows_kept(graph.plan, o)[0],
                "sinks": rows_kept(graph.plan, o)[1],
                "folded": folded_rows(graph.plan),
            }
            for o, window in zip(graph.owners, windows, strict=True)
        ],
        "recipe": model.recipe.dump(),
    }
    (folder / MARKER).write_text(json.dumps(document, indent=1), encoding="utf-8")
    if graph.plan.selective:  # onnxruntime-genai runs one graph for prompts and steps
        copy_companions(facts.folder, folder)
        return
    caches = [graph.plan[o] for o in graph.owners]
    write_genai_config(
        folder,
        GenaiFacts(
            context_length=graph.positions,
            vocab_size=facts.vocab_size,
            hidden_size=facts.hidden_size or caches[0].heads * caches[0].key_dim,
            heads=caches[0].heads,
            layers=graph.owners,
            kv_heads=caches[0].kv_heads,
            head_dim=caches[0].key_dim,
            windows=windows if graph.target != "onnx" else (),  # it hands on all that a graph returns
            shared=graph.target != "onnx",
            chunk=1 if graph.reads == "one" else None,
            eos=_ids(config.get("eos_token_id")),
            bos=next(iter(_ids(config.get("bos_token_id"))), None),
            pad=next(iter(_ids(config.get("pad_token_id"))), None),
        ),
        facts.folder,
    )


def _ids(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (int(value),)
