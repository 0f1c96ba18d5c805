"""A snapshot: what a model computes and stores, as one text file that people review and machines compare.

`take` makes one of a transformed model, `dump` and `parse` turn it into TOML and back. It holds the canonical text of
every entry (`kvpass.regression.canonical`), the cache plan, the operators, a fingerprint of every folded weight, the
logits of a few fixed tokens and, where asked, the same of the exported ONNX graph. No name of a module, node or file is
in it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kvpass.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from kvpass.ir.plan import CachePlan
    from kvpass.regression.canonical import Canonical, Node
    from kvpass.runtime.transformed import Transformed

FORMAT = 1
HEAD = "# A snapshot by kvpass: `kvpass diff` compares two of them, docs/regression.md says what is in one.\n"
Weights = Literal["content", "shapes"]
Target = Literal["ort", "onnx", "onnx-static"]
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class WeightLine:
    """One weight.

    Attributes:
        shape: its dtype and shape.
        rms: the root mean square of its numbers; None where only shapes are kept.
        projections: see `kvpass.regression.sketch`.
    """

    __pydantic_config__ = _STRICT

    shape: str
    rms: float | None = None
    projections: tuple[float, ...] = ()

    def moved(self, other: WeightLine) -> float:
        """How far apart two weights are, as a fraction of their norm: the largest of what can be seen of it."""
        mine, its = self.rms or 0.0, other.rms or 0.0
        size = max(mine, its)
        scale = abs(mine - its) / size if size else 0.0
        return max([scale, *(abs(a - b) for a, b in zip(self.projections, other.projections, strict=False))])


@dataclass(frozen=True)
class GraphText:
    """The canonical form of one graph: operators with their counts, its text, and a hash of what it computes."""

    __pydantic_config__ = _STRICT

    meaning: str
    ops: dict[str, int]
    text: str


@dataclass(frozen=True)
class Part:
    """Graphs by name, over one list of weights in the order of their numbers."""

    __pydantic_config__ = _STRICT

    weights: tuple[WeightLine, ...]
    graphs: dict[str, GraphText]


@dataclass(frozen=True)
class Row:
    """The logits [V] of one position.

    Attributes:
        at: which entry, row and position.
        tokens: the likeliest ones, best first.
        values: their logits.
        spread: the largest magnitude of all logits.
        projections: of all logits on fixed vectors of signs, by the root of V: they move as far as logits do.
    """

    __pydantic_config__ = _STRICT

    at: str
    tokens: tuple[int, ...]
    values: tuple[float, ...]
    spread: float
    projections: tuple[float, ...]


@dataclass(frozen=True)
class Logits:
    """The rows of a model, and how far they may move relative to their spread."""

    __pydantic_config__ = _STRICT

    tolerance: float
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class ModelLine:
    """What a model is, besides its graphs."""

    __pydantic_config__ = _STRICT

    dtype: str
    layers: int
    vocab_size: int
    max_positions: int | None = None


@dataclass(frozen=True)
class Snapshot:
    """Everything that a check compares.

    Attributes:
        format: of the file.
        recipe: the passes, in words; what they did is in the rest.
        model: what it is.
        bytes_per_token: of the whole cache, while no window is full.
        plan: one table per run of equal layers; what says nothing is left out.
        program: the graphs of kvpass's own runtime.
        logits: answers to fixed tokens; None where numbers were not asked for.
        onnx: the graph of the ONNX package by its target, where asked for.
    """

    __pydantic_config__ = _STRICT

    format: int
    recipe: tuple[str, ...]
    model: ModelLine
    bytes_per_token: int
    plan: tuple[dict[str, str | int], ...]
    program: Part
    logits: Logits | None = None
    onnx: Part | None = None


def take(
    model: Transformed,
    *,
    weights: Weights = "content",
    logits: bool = True,
    onnx: Target | None = None,
    tolerance: float | None = None,
) -> Snapshot:
    """The snapshot of a model.

    Args:
        model: what `kvpass.transform` or `kvpass.load` gave.
        weights: "content" reads every weight and keeps its fingerprint, "shapes" keeps shapes alone.
        logits: whether the model is asked for logits.
        onnx: the target that it is exported for, too; raises what `export_onnx` raises.
        tolerance: of logits, relative to their spread; by dtype where None.
    """
    from kvpass.regression.logits import read_logits

    facts = model.program.facts
    return Snapshot(
        format=FORMAT,
        recipe=tuple(step.describe() for step in model.recipe.passes),
        model=ModelLine(_name(facts.dtype), facts.layers, facts.vocab_size, facts.max_positions),
        bytes_per_token=model.plan.bytes_per_token(),
        plan=tuple(_plan_rows(model.plan)),
        program=_program(model, weights),
        logits=read_logits(model, tolerance) if logits else None,
        onnx=_onnx(model, weights, onnx) if onnx else None,
    )


def dump(snapshot: Snapshot) -> str:
    """The snapshot as TOML, with a line per thing that changes by itself."""
    lines = [HEAD + f"format = {snapshot.format}"]
    lines.append(f"recipe = {_toml(list(snapshot.recipe))}")
    lines.append(f"model = {_toml(_said(snapshot.model))}")
    lines.append(f"bytes_per_token = {snapshot.bytes_per_token}")
    lines += _array("plan", snapshot.plan)
    for name, part in (("program", snapshot.program), ("onnx", snapshot.onnx)):
        if part is None:
            continue
        lines += ["", f"[{name}]", *_array("weights", [_said(w) for w in part.weights])]
        for entry, graph in part.graphs.items():
            lines += ["", f"[{name}.graphs.{entry}]", f'meaning = "{graph.meaning}"', f"ops = {_toml(graph.ops)}"]
            lines.append(f"text = '''\n{graph.text}'''")
    if snapshot.logits is not None:
        lines += ["", "[logits]", f"tolerance = {_toml(snapshot.logits.tolerance)}"]
        lines += _array("rows", [_said(r) for r in snapshot.logits.rows])
    return "\n".join(lines) + "\n"


def parse(text: str, where: str) -> Snapshot:
    """Read what `dump` wrote.

    Raises:
        RequestError: it is no snapshot, or one of another format.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"the snapshot is no valid TOML: {error}", where=where, fix=REWRITE) from error
    if document.get("format") != FORMAT:
        raise RequestError(
            f"the snapshot has format {document.get('format')!r}; this version reads format {FORMAT}",
            where=where,
            fix=REWRITE,
        )
    return validated(Snapshot, document, where, REWRITE)


REWRITE = "write it again: `kvpass snapshot`, `kvpass check --update` or `pytest --kvpass-update`"


def validated(kind: type[Any], document: Mapping[str, Any], where: str, fix: str) -> Any:
    """A frozen dataclass from plain values, strictly.

    Raises:
        RequestError: a key that there is not, that is missing, or a value of the wrong kind.
    """
    try:
        # as JSON, in which strict schemas take a list for a tuple and a table for a dataclass
        return TypeAdapter(kind).validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        unknown = f"there is no key {key!r}"
        words = {"unexpected_keyword_argument": unknown, "missing": f"the key {key!r} is missing"}
        raise RequestError(words.get(first["type"], f"{key}: {first['msg']}"), where=where, fix=fix) from error


def read(path: str | Path) -> Snapshot:
    """Read a snapshot file.

    Raises:
        RequestError: there is none, or it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "it is no text"
        raise RequestError(f"the snapshot cannot be read: {words}", where=str(path), fix=REWRITE) from error
    return parse(text, str(path))


# ---------------------------------------------------------------------- taking


def _program(model: Transformed, weights: Weights) -> Part:
    from kvpass.ir.fold import fold_weights
    from kvpass.regression.canonical import canonical_text
    from kvpass.regression.programs import program_graph, weight_nodes

    held: Mapping[str, Tensor] = {}
    try:
        program, held = model.executor.program, model.executor.weights()
    except UnsupportedError:  # without a cache it still is a function
        program = fold_weights(model.program)
    read = (lambda name: held[name]) if held else program.read
    lines = {
        name: _weight_line(read(name) if weights == "content" else program.meta(name), weights)
        for name in sorted(program.used_weights())
    }
    nodes = weight_nodes(program, {n: (line.rms or 0.0, *line.projections) for n, line in lines.items()})
    numbers: dict[Node, int] = {}
    earlier: dict[str, tuple[str, ...]] = {}
    graphs: dict[str, GraphText] = {}
    for entry in ("forward", "decode", "prefill"):
        if entry in program.entries:
            result, effects = program_graph(program, entry, nodes)
            found = canonical_text([("", result)], effects, numbers, earlier)
            earlier |= {f"{entry} {letter}": lines for letter, lines in found.blocks.items()}
            graphs[entry] = _graph(found)
    return Part(tuple(lines[str(n.args[0][0])] for n in sorted(numbers, key=numbers.__getitem__)), graphs)


def _onnx(model: Transformed, weights: Weights, target: Target) -> Part:
    from kvpass.regression.canonical import canonical_text
    from kvpass.regression.packages import exported

    package = exported(model, target)
    lines = {node: _weight_line(tensor, weights) for node, tensor in package.weights.items()}
    for node, line in lines.items():
        node.order = (line.rms or 0.0, *line.projections)
    numbers: dict[Node, int] = {}
    earlier: dict[str, tuple[str, ...]] = {}
    graphs: dict[str, GraphText] = {}
    for name, outputs in package.graphs.items():
        entry = target if name == "model" else f"{target}-{name}"
        found = canonical_text(outputs, (), numbers, earlier)
        earlier |= {f"{entry} {letter}": block for letter, block in found.blocks.items()}
        graphs[entry] = _graph(found)
    return Part(tuple(lines[n] for n in sorted(numbers, key=numbers.__getitem__)), graphs)


def _graph(found: Canonical) -> GraphText:
    return GraphText(found.meaning, found.ops, found.text)


def _weight_line(tensor: Tensor, weights: Weights) -> WeightLine:
    from kvpass.regression.programs import dtype_text
    from kvpass.regression.sketch import sketch

    shape = f"{dtype_text(tensor.dtype)}{list(tensor.shape)}"
    if weights == "shapes":
        return WeightLine(shape)
    return WeightLine(shape, *sketch(tensor))


QUIET = {"window": 0, "sinks": 0, "page": 0, "keeps": "", "passes": "", "mask": "in the algebra", "kv_source": None}


def _plan_rows(plan: CachePlan) -> list[dict[str, str | int]]:
    rows = []
    for row in plan.table():
        first, last = int(str(row.pop("first"))), int(str(row.pop("last")))
        said: dict[str, Any] = {"layers": str(first) if first == last else f"{first}-{last}"}
        said |= {k: v for k, v in row.items() if k not in QUIET or v != QUIET[k]}
        if plan[first].cache_positions:
            said["positions"] = "cache"
        rows.append(said)
    return rows


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------- TOML


def _said(value: Any) -> dict[str, Any]:
    """A dataclass without what is None or empty."""
    named = {f.name: getattr(value, f.name) for f in fields(value)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in named.items() if v is not None and v != ()}


def _array(name: str, rows: Any) -> list[str]:
    return [f"{name} = [", *(f"  {_toml(dict(row))}," for row in rows), "]"]


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k if k.isidentifier() else json.dumps(k)} = {_toml(v)}" for k, v in value.items())
        return "{ " + inner + " }" if inner else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)
