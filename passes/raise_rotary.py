"""Raising RoPE: what turns queries and keys by their positions becomes one op, `kvpass::rotary`.

RoPE (Su et al., arXiv 2104.09864) is proved of each operand by running it (`ir.sites.Path.rotary`); here the tables
that its angles come from are found among what the operand reads of positions, by the angles themselves. So the cosines
and sines are the model's own, to the last bit, whatever scaling made them. What cannot be shown to be this op stays as
it was captured: then runtimes compute it node by node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from kvpass.ir.execute import in_order
from kvpass.ir.ops import rotary_reference
from kvpass.ir.program import ROTARY, Program, Role, aten, insert_call, merge_equal, placeholder, sweep
from kvpass.ir.sites import AttentionSite, Path, Refusal, Rotary, SiteFinder


@dataclass(frozen=True)
class _Column:
    """Where the cosines or the sines of one pair stand."""

    table: fx.Node
    column: int


_Angles = list[tuple[_Column, _Column]]  # per pair, of its cosines and its sines
_SEEN = 24  # positions at which columns of tables are held against angles
_CLOSE = 1e-3


def raise_rotary(program: Program, positions: int) -> dict[int, Refusal]:
    """Rewrite `forward` in place, with tables for `positions` positions; per layer that keeps its nodes, the reason."""
    finder = SiteFinder(program)
    left: dict[int, Refusal] = {}
    made: dict[Any, tuple[fx.Node, fx.Node]] = {}
    sites = list(finder)
    found: dict[fx.Node, fx.Node] = {}
    for site in sites:
        try:
            for operand in _own(site):
                if (node := site.bare(operand)) not in found:
                    found[node] = _raised(program, finder, site, operand, positions, made)
        except Refusal as refusal:
            left[site.layer] = refusal
    for site in sites:
        for operand in _own(site) if site.layer not in left else ():
            node, given = site.bare(operand), {"q": site.q, "k": site.k}[operand]
            (site.node if node is given else given).replace_input_with(node, found.get(node, node))  # a shared one is
    sweep(program.forward)
    merge_equal(program.forward)
    return left


def _own(site: AttentionSite) -> tuple[Literal["q", "k"], ...]:
    """What a layer turns: not the keys of a layer above it, which turns them."""
    return ("q",) if site.upward else ("q", "k")


def _raised(
    program: Program, finder: SiteFinder, site: AttentionSite, operand: Any, positions: int, made: dict[Any, Any]
) -> fx.Node:
    """The operand as `kvpass::rotary` of what it is before it is turned."""
    path = site.path(operand)
    rotary = path.rotary
    if not rotary.pairs:
        return path.target
    interleaved = _arrangement(rotary, path.target)
    cut, turned = _before(path)
    columns = _columns(finder, path, rotary)
    key = (tuple(columns), positions)
    if key not in made:
        made[key] = _tables(program, finder, columns, positions, path.target)
    graph = program.forward
    x = cut if turned else insert_call(graph, path.target, aten.transpose.int, cut, 1, 2)
    rows = [_rows(graph, table, path.target) for table in made[key]]
    _check(finder, path, cut, turned, columns, interleaved)
    return insert_call(graph, path.target, ROTARY, x, *rows, interleaved=interleaved)


def _arrangement(rotary: Rotary, node: fx.Node) -> bool:
    """Whether pairs interleave; both usual arrangements take the first channels."""
    count = len(rotary.pairs)
    if rotary.pairs == tuple((j, j + count) for j in range(count)):
        return False
    if rotary.pairs == tuple((2 * j, 2 * j + 1) for j in range(count)):
        return True
    raise Refusal(
        "the turning channels are not the first ones in a usual order",
        node,
        near=f"its first pair are channels {rotary.pairs[0]}, where (0, {count}) or (0, 1) is usual",
        fix="put the channels that turn first, in halves or interleaved; until then runtimes compute RoPE node by node",
    )


def _before(path: Path) -> tuple[fx.Node, bool]:
    """The last node on the way that no position has changed, and whether it is [B, Hx, S, D] or [B, S, Hx, D]."""
    roles, shapes = path.finder.roles, path.finder.shapes
    moved: set[fx.Node] = set()
    for node in path.nodes:
        if any(n in moved or (roles[n] == Role.POSITION and _over_tokens(path, n)) for n in node.all_input_nodes):
            moved.add(node)
    batch, heads, length, dim = shapes[path.target].shape
    for node in reversed(path.cuts):
        if node in moved or not isinstance(shapes.get(node), Tensor):
            continue
        if shapes[node].shape == (batch, heads, length, dim) and heads != length:
            return node, True
        if shapes[node].shape == (batch, length, heads, dim) and heads != length:
            return node, False
    raise Refusal(
        "what is turned is not one tensor of heads",
        path.target,
        fix="turn a tensor of [batch, heads, length, channels], or with heads and length exchanged",
    )


def _over_tokens(path: Path, node: fx.Node) -> bool:
    small, large = (values[node] for values in path.finder.scaled)
    return isinstance(small, Tensor) and small.is_floating_point() and small.shape != large.shape


def _columns(finder: SiteFinder, path: Path, rotary: Rotary) -> _Angles:
    """Per pair: the table and the column of its cosines, and those of its sines."""
    inside = set(path.nodes)
    sources = in_order(
        {
            n
            for node in path.nodes
            for n in node.all_input_nodes
            if n not in inside and finder.roles[n] == Role.POSITION and _over_tokens(path, n)
        }
    )
    values = [_flat(v, path.target) for v in finder.run(sources, {}, 1, _SEEN)]
    time = torch.arange(_SEEN, dtype=torch.float64)
    found: _Angles = []
    for frequency in rotary.frequency:
        picked: list[_Column] = []
        for wave in (torch.cos(time * frequency), torch.sin(time * frequency)):
            for node, value in zip(sources, values, strict=True):
                if not value.numel():
                    continue
                scale = (value.double() * wave.unsqueeze(1)).sum(dim=0) / wave.square().sum().clamp(min=1e-12)
                misses = (value.double() - scale * wave.unsqueeze(1)).abs().amax(dim=0) / scale.clamp(min=1e-3)
                misses = misses.where((scale > 0.5) & (scale < 4), 1.0)  # YaRN scales its tables
                if float(misses.min()) < _CLOSE:
                    picked.append(_Column(node, int(misses.argmin())))
                    break
            else:
                raise Refusal(
                    "its angles stand in no table",
                    path.target,
                    near=f"{len(found)} of {len(rotary.frequency)} pairs have their cosines and sines in a table; the "
                    f"next turns by {frequency:.4g} per position",
                    fix="read cosines and sines from tensors of [positions, channels]",
                )
        found.append((picked[0], picked[1]))
    return found


def _flat(value: Tensor, node: fx.Node) -> Tensor:
    """A table [T, C] of a tensor with one axis of T positions and one of columns."""
    shape = [n for n in value.shape if n != 1]
    if len(shape) != 2 or shape[0] != value.shape[-2]:
        raise Refusal(
            "a table of angles has other axes than positions and channels",
            node,
            near=f"it is {list(value.shape)} for {_SEEN} positions",
            fix="read cosines and sines from tensors of [positions, channels]",
        )
    return value.reshape(shape)


def _tables(
    program: Program,
    finder: SiteFinder,
    columns: _Angles,
    positions: int,
    node: fx.Node,
) -> tuple[fx.Node, fx.Node]:
    """Weights [positions, P] that hold the cosines and the sines, as nodes at the start of the graph."""
    sources = _sources(columns)
    values = {n: _flat(v, node) for n, v in zip(sources, finder.run(sources, {}, 1, positions), strict=True)}
    graph = program.forward
    first = next(iter(graph.nodes))
    nodes = []
    for name, table in zip(("rotary_cos", "rotary_sin"), _cos_sin(columns, values), strict=True):
        with graph.inserting_before(first):
            nodes.append(graph.get_attr(program.add_weight(name, table, constant=True)))
    return nodes[0], nodes[1]


def _sources(columns: _Angles) -> list[fx.Node]:
    """The tables that angles stand in, in order."""
    return in_order({c.table for pair in columns for c in pair})


def _cos_sin(columns: _Angles, values: dict[fx.Node, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, P], a column per pair, of tables [T, C]."""
    cos, sin = (torch.stack([values[c.table][:, c.column] for c in part], 1) for part in zip(*columns, strict=True))
    return cos, sin


def _rows(graph: fx.Graph, table: fx.Node, before: fx.Node) -> fx.Node:
    """The rows of a table for a text from its first token on."""
    length = insert_call(graph, before, aten.sym_size.int, placeholder(graph, "input_ids"), 1)
    return insert_call(graph, before, aten.slice.Tensor, table, 0, 0, length)


def _check(
    finder: SiteFinder,
    path: Path,
    cut: fx.Node,
    turned: bool,
    columns: _Angles,
    interleaved: bool,
) -> None:
    """Show, by running both, that the op gives the operand.

    Raises:
        Refusal: it does not.
    """
    length = 7
    generator = torch.Generator().manual_seed(17)
    rows = torch.randn((2, length, path.row_count), generator=generator)
    shape = finder.shapes[path.projection.node].shape
    given = rows.flatten(0, 1) if len(shape) == 2 else rows
    given = given.to(finder.shapes[path.projection.node].dtype)
    sources = _sources(columns)
    wanted = [cut, path.target, *sources]
    before, after, *tables = finder.run(wanted, {path.projection.node: given}, 2, length, widen=True)
    flat = {n: _flat(t[:1] if t.dim() > 2 else t, path.target) for n, t in zip(sources, tables, strict=True)}
    cos, sin = _cos_sin(columns, flat)
    x = before if turned else before.transpose(1, 2)
    error = (rotary_reference(x, cos, sin, interleaved=interleaved) - after).abs().max() / after.abs().max()
    if float(error) > 1e-5:
        raise Refusal(
            "it is turned in another way than RoPE turns",
            path.target,
            near=f"kvpass::rotary with its tables is off by {float(error):.1e} of the operand's size, 1e-05 is allowed",
            fix="compute x cos + rotate(x) sin with the tables as they are",
        )
