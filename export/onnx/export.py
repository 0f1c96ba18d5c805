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
from kvpass.export.onnx.genai import GenaiFacts, write_genai_config
from kvpass.export.onnx.lower import OnnxGraph, Reads, check_plan, check_program, lower, rows_kept, stored, window_kept
from kvpass.export.onnx.standard import OPSETS, Target
from kvpass.export.onnx.weights import attached, halve, write, write_beside
from kvpass.ir.fixpoint import limits
from kvpass.output import output_folder

if TYPE_CHECKING:
    from kvpass.runtime.transformed import Transformed

Weights = Literal["int4"]
MARKER = "kvpass-onnx.json"
FILE, PASS, DATA = "model.onnx", "pass.onnx", "model.onnx.data"
FORMAT = 1
POSITIONS = 4096  # of the tables, where the model has more
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

                optimize(proto, target)
            if weights == "int4":
                from kvpass.export.onnx.quantize import quantize

                with clock("quantize"):
                    quantize(proto)
            nodes = nodes or Counter(n.op_type for n in proto.graph.all_nodes())
            with clock("write"):
                if reads == "pass":
                    write_beside(proto, partial / PASS, partial / FILE)
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
    longest = model.program.facts.max_positions
    if asked is None:
        return min(longest or POSITIONS, POSITIONS)
    if asked < 1:
        raise RequestError(f"positions must be at least 1, not {asked}")
    return asked


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
    return ("one", "pass") if model.plan.upward else ("chunks",)


def names(owners: tuple[int, ...]) -> tuple[list[str], list[str]]:
    """The names of a graph's inputs and outputs, as onnxruntime-genai knows them."""
    parts = [(owner, part) for owner in owners for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(f"past_key_values.{o}.{p}" for o, p in parts)]
    return inputs, ["logits", *(f"present.{o}.{p}" for o, p in parts)]


def _to_onnx(graph: OnnxGraph, dtype: str) -> Any:
    """The graph as an `onnx_ir.Model`; its weights stay where they are."""
    if dtype == "fp16":
        halve(graph.module)
    batch, length, past = 2, 1 if graph.reads == "one" else 5, 0 if graph.reads == "pass" else 3
    room = past + length + 1 if graph.target == "onnx-static" or graph.reads != "chunks" else past
    caches = [graph.plan[owner] for owner in graph.owners]
    kind = torch.float16 if dtype == "fp16" else torch.float32
    rings = [window_kept(graph.plan, o, graph.positions, graph.target) for o in graph.owners]
    fixed = [sum(rows_kept(graph.plan, o)) for o in graph.owners]  # rows of caches with sinks, which never grow
    rows = [f or (w + 1 if w else room) for w, f in zip(rings, fixed, strict=True) for _ in range(2)]
    held = []
    for cache, count in zip((c for c in caches for _ in range(2)), rows, strict=True):
        element, width = stored(cache, kind)
        held.append(torch.zeros((batch, cache.kv_heads, count, width), dtype=element))
    # equal names say equal sizes: a past that is a window long has a name of its own
    lengths = [f"past_sliding_length_{w}" if w else "past_sequence_length" for w in rings for _ in range(2)]
    arguments = (
        torch.zeros((batch, length), dtype=torch.long),
        torch.ones((batch, length + past), dtype=torch.long),
        *held,
    )
    dynamic = torch.export.Dim.DYNAMIC
    still = [f > 0 for f in fixed for _ in range(2)]
    pasts = ({0: dynamic} if s else {0: dynamic, 2: dynamic} for s in still)
    new = {0: "batch_size"} if graph.reads == "one" else {0: "batch_size", 1: "sequence_length"}
    whole = {0: "batch_size", 1: "sequence_length" if graph.reads == "pass" else "total_sequence_length"}
    shapes: Any = (dict.fromkeys(new, dynamic), dict.fromkeys(whole, dynamic), *pasts)
    named: Any = (
        new,
        whole,
        *({0: "batch_size"} if s else {0: "batch_size", 2: n} for n, s in zip(lengths, still, strict=True)),
    )
    inputs, outputs = names(graph.owners)
    with _quiet():
        program = torch.export.export(graph.module, arguments, dynamic_shapes=shapes, strict=False)
        made = torch.onnx.export(
            program, input_names=inputs, output_names=outputs, opset_version=OPSETS[graph.target], dynamic_shapes=named,
            dynamo=True, optimize=False, verbose=False,
        )  # fmt: skip
        if made is None:
            raise UnsupportedError("torch exported no graph", where="torch.onnx.export")
        with attached(made.model, graph.readers):
            made.optimize()
    return made.model


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
        "eos": config.get("eos_token_id"),
        "layers": [
            {
                "owner": o,
                "kv_heads": graph.plan[o].kv_heads,
                "head_dim": graph.plan[o].key_dim,
                "bits": graph.plan[o].format.bits,
                "window": window or rows_kept(graph.plan, o)[0],
                "sinks": rows_kept(graph.plan, o)[1],
            }
            for o, window in zip(graph.owners, windows, strict=True)
        ],
        "recipe": model.recipe.dump(),
    }
    (folder / MARKER).write_text(json.dumps(document, indent=1), encoding="utf-8")
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
