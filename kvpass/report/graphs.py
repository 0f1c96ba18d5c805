"""What changed in the graph, layer by layer.

A layer is what its residual stream needs beyond that of the layer below. Within a layer, lines are those of
`kvpass.ir.text.graph_text` without the numbers of values, which would all move where one line is put in. The grade is
that of `kvpass.regression`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpass.ir.execute import ancestors
from kvpass.ir.program import Program, Role
from kvpass.ir.sites import Refusal, SiteFinder
from kvpass.ir.text import graph_text

if TYPE_CHECKING:
    from kvpass.runtime.transformed import Transformed

POSITIONS, HEAD = "positions and masks", "behind the last layer's attention"
_VALUE = re.compile(r"%\d+")


@dataclass(frozen=True)
class Section:
    """A part of the graph that changed.

    Attributes:
        name: which.
        removed, added: lines.
        lines: a unified diff.
    """

    name: str
    removed: int
    added: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class GraphChange:
    """All that changed.

    Attributes:
        grade: as `kvpass diff` grades it.
        words: per part that differs: the part, its grade, the first difference.
        sections: parts with other lines.
        same: parts without.
    """

    grade: str
    words: tuple[tuple[str, str, str], ...]
    sections: tuple[Section, ...]
    same: tuple[str, ...]


def graph_changes(before: Transformed, after: Transformed) -> GraphChange:
    """Compare what two models compute."""
    from kvpass.regression.diff import compare
    from kvpass.regression.snapshot import take

    graded = compare(*(take(m, weights="shapes", logits=False) for m in (before, after)))
    old, new = (layer_lines(m.executor.program) for m in (before, after))  # in which weights are folded
    sections, same = [], []
    for name in dict.fromkeys([*old, *new]):
        lines = list(difflib.unified_diff(old.get(name, []), new.get(name, []), lineterm="", n=2))[2:]
        if lines:
            removed, added = (sum(line.startswith(sign) for line in lines) for sign in "-+")
            sections.append(Section(name, removed, added, tuple(lines)))
        else:
            same.append(name)
    words = tuple((d.where, str(d.grade), d.what) for d in graded.differences if d.where != "recipe")
    return GraphChange(str(graded.grade), words, tuple(sections), tuple(same))


def layer_lines(program: Program) -> dict[str, list[str]]:
    """The lines of `forward`, in parts by their names: positions and masks, each layer, what follows."""
    graph = program.forward
    finder = SiteFinder(program)
    place: dict[object, str] = {}
    for layer, attention in enumerate(finder.nodes):
        try:
            end = finder.crossing(layer)[0] if layer + 1 < len(finder) else attention
        except Refusal:  # then what follows attention counts to the next layer
            end = attention
        for node in ancestors([end]):
            place.setdefault(node, f"layer {layer}")
    found: dict[str, list[str]] = {POSITIONS: []}
    nodes = [n for n in graph.nodes if n.op != "get_attr"]
    for node, line in zip(nodes, graph_text(program).splitlines(), strict=True):
        name = place.get(node, HEAD)
        if node.op == "call_function" and finder.roles[node] not in (Role.DATA, Role.WEIGHT):
            name = POSITIONS
        found.setdefault(name, []).append(_VALUE.sub("%", line))
    return found
