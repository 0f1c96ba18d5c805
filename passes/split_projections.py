"""Give every attention operand a projection of its own, its rows ordered by head and channel.

Fused QKV weights, heads interleaved in them, transposed storage and KV heads that the model computes once per query
head all become `linear(x, rows of the weight)`, where the rows were found by execution (`kvpass.ir.sites`). A layout
pass: the same function, and what every rewrite of weights starts from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from kvpass.errors import CheckError, UnsupportedError
from kvpass.ir.program import Program, Weight, aten, insert_call, placeholder, sweep
from kvpass.ir.sites import AttentionSite, Path, Refusal, SiteFinder
from kvpass.passes.base import Context, Effect, Pass, Rewritten

FACT = "separate projections"


@dataclass(frozen=True)
class SplitProjections(Pass):
    """Separate q, k and v projections with rows in (head, channel) order, repeated KV heads computed once."""

    effect: ClassVar[Effect] = Effect.LAYOUT
    ensures: ClassVar[frozenset[str]] = frozenset({FACT})

    def rewrite(self, program: Program, context: Context) -> Rewritten:
        finder = SiteFinder(program)
        total = len(finder)
        details = []
        for layer in range(total):
            site = finder[layer]
            try:
                changed = split_site(program, site)
            except Refusal as refusal:
                raise UnsupportedError(
                    f"layer {layer}: the attention operands cannot be given projections of their own: {refusal}",
                    where=f"layer {layer} of {program.facts.family}",
                    fix="`kvpass inspect` shows what was found; attention that is not a projection per operand (MLA, "
                    "shared norms or RoPE) cannot be regrouped",
                ) from refusal
            details.append({"layer": layer, "changed": changed})
            if changed:
                sweep(program.forward)
                finder = SiteFinder(program)
        return Rewritten(total, total, details)


def split_site(program: Program, site: AttentionSite) -> list[str]:
    """Split one site; returns the operands that changed."""
    paths = {o: site.path(o) for o in ("q", "k", "v")}
    rows = {o: p.rows for o, p in paths.items()}
    repeat = _repeats(rows["k"], rows["v"])
    if repeat > 1:
        rows["k"], rows["v"] = rows["k"][::repeat], rows["v"][::repeat]
    changed = []
    replacements: dict[str, fx.Node] = {}
    for operand, path in paths.items():
        wanted = rows[operand]
        heads = wanted.shape[0]
        plain = path.row_count == wanted.numel() and torch.equal(wanted.flatten(), torch.arange(wanted.numel()))
        if plain and not path.projection.transposed and heads == path.heads:
            continue
        weight, bias = row_weights(program, path, wanted, f"{_stem(path)}.{operand}", site.node)
        replacements[operand] = rebuild(program, path, weight, bias, heads, before=site.node)
        changed.append(operand)
    arguments = list(site.node.args)
    for index, operand in enumerate(("q", "k", "v")):
        if operand in replacements:
            arguments[index] = replacements[operand]
    site.node.args = tuple(arguments)
    return changed


def _repeats(k: Tensor, v: Tensor) -> int:
    """How many neighbouring heads are copies of one, in keys and values alike."""
    heads = k.shape[0]
    for count in range(heads, 1, -1):
        if heads % count:
            continue
        same = [torch.equal(t, t[::count].repeat_interleave(count, dim=0)) for t in (k, v)]
        if all(same):
            return count
    return 1


def _stem(path: Path) -> str:
    name = str(next(iter(_weights_of(path.projection.weight))))
    return name.removesuffix(".weight")


def _weights_of(node: fx.Node) -> list[str]:
    from kvpass.ir.execute import ancestors

    return [str(n.target) for n in sorted(ancestors([node])) if n.op == "get_attr"]


def row_weights(
    program: Program, path: Path, rows: Tensor, name: str, before: fx.Node
) -> tuple[fx.Node, fx.Node | None]:
    """Expressions for the rows [heads, D] of a projection's weight [heads*D, in] and bias [heads*D]."""
    graph = program.forward
    index_name = f"{name}.rows"
    program.weights[index_name] = Weight.of(rows.flatten(), constant=True)
    index = insert_at(graph, before, "get_attr", index_name)
    source = path.projection.weight
    if path.projection.transposed:
        source = insert_call(graph, before, aten.transpose.int, source, 0, 1)
    weight = insert_call(graph, before, aten.index_select.default, source, 0, index)
    weight.meta["weight_name"] = f"{name}.weight"
    bias = None
    if path.projection.bias is not None:
        bias = insert_call(graph, before, aten.index_select.default, path.projection.bias, 0, index)
        bias.meta["weight_name"] = f"{name}.bias"
    return weight, bias


def insert_at(graph: fx.Graph, before: fx.Node, kind: str, target: str) -> fx.Node:
    """A `get_attr` node placed before another."""
    assert kind == "get_attr"
    with graph.inserting_before(before):
        return graph.get_attr(target)


def rebuild(
    program: Program, path: Path, weight: fx.Node, bias: fx.Node | None, heads: int, before: fx.Node
) -> fx.Node:
    """An operand computed by a projection of its own with `heads` heads, through the same norm and RoPE as before.

    Raises:
        Refusal: the operand's path cannot take another number of heads.
    """
    graph = program.forward
    finder = path.finder
    frontier, permutation = path.frontier()
    ids = placeholder(graph, "input_ids")
    product = insert_call(graph, before, aten.linear.default, path.projection.x, weight, bias)
    batch = insert_call(graph, before, aten.sym_size.int, ids, 0)
    length = insert_call(graph, before, aten.sym_size.int, ids, 1)
    if permutation == ():
        if heads != path.heads:
            raise Refusal(
                "its norm runs over all heads together", frontier, fix="normalise each head alone, over head_dim"
            )
        start = insert_call(graph, before, aten.reshape.default, product, [batch, length, heads * path.head_dim])
    else:
        start = insert_call(graph, before, aten.reshape.default, product, [batch, length, heads, path.head_dim])
        if permutation != (0, 1, 2, 3):
            start = insert_call(graph, before, aten.permute.default, start, list(permutation))
    reach = {frontier}
    tail = []
    for node in path.nodes:
        if node is not frontier and any(n in reach for n in node.all_input_nodes):
            reach.add(node)
            tail.append(node)
    mapping: dict[fx.Node, fx.Node] = {frontier: start}
    axis = permutation.index(2) if permutation else -1
    shapes: dict[fx.Node, Tensor] = {}
    head_axis: dict[fx.Node, int] = {frontier: axis}
    shapes[frontier] = _resized(finder.shapes[frontier], axis, heads) if permutation else finder.shapes[frontier]
    for node in tail:
        with graph.inserting_before(before):
            copied = graph.node_copy(node, lambda n: mapping.get(n, n))
        mapping[node] = copied
        if heads != path.heads:
            _adapt_heads(finder, node, copied, shapes, head_axis, path.heads, heads)
    result = mapping[path.target]
    if heads != path.heads and tail:
        _prove_heads(finder, path, frontier, start, result, permutation, heads)
    return result


_RESHAPES = {aten.reshape.default: 1, aten.view.default: 1, aten._unsafe_view.default: 1}
_EXPANDS = {aten.expand.default: 1, aten.broadcast_to.default: 1}


def _resized(value: Tensor, axis: int, size: int) -> Tensor:
    shape = list(value.shape)
    shape[axis] = size
    return torch.empty(shape, dtype=value.dtype, device="meta")


def _adapt_heads(
    finder: SiteFinder,
    node: fx.Node,
    copied: fx.Node,
    shapes: dict[fx.Node, Tensor],
    head_axis: dict[fx.Node, int],
    old: int,
    new: int,
) -> None:
    """Rewrite the sizes in a copied reshape or expand that name the old number of heads; follow the head axis."""
    before = next(n for n in node.all_input_nodes if n in head_axis)
    axis_in = head_axis[before]
    shape_in, value = finder.shapes[before], finder.shapes[node]
    if not isinstance(value, Tensor):
        if isinstance(value, list | tuple):  # chunk, split: the parts keep the axis
            head_axis[node] = axis_in
            return
        raise Refusal("a number is computed from the operand", node)
    if isinstance(shape_in, list | tuple):  # one part of a split
        if value.shape[axis_in] != old:
            raise Refusal("heads are split apart between the projection and attention", node)
        head_axis[node] = axis_in
        return
    shape_out = list(value.shape)
    lead = _product(shape_in.shape[:axis_in])
    axis_out = next(
        (
            i
            for i, s in enumerate(shape_out)
            if _product(shape_out[:i]) == lead and s == old and _product(shape_out) > lead
        ),
        None,
    )
    if node.target in (aten.transpose.int, aten.permute.default, aten.movedim.int):
        marked = torch.empty([13 if i == axis_in else 1 for i in range(shape_in.dim())], device="meta")
        target = node.target
        assert callable(target)
        axis_out = list(target(marked, *node.args[1:]).shape).index(13)
    elif node.target not in _RESHAPES and value.dim() >= shape_in.dim():
        axis_out = axis_in if node.target is not aten.unsqueeze.default else axis_out
        if shape_out[axis_in] != old and node.target is not aten.unsqueeze.default:
            raise Refusal("an operation along the head axis stands between the projection and attention", node)
    if axis_out is None or shape_out[axis_out] != old:
        raise Refusal("the head axis is merged with another between the projection and attention", node)
    if node.target in _RESHAPES or node.target in _EXPANDS:
        sizes = list(copied.args[1])  # type: ignore[arg-type]
        if isinstance(sizes[axis_out], int) and sizes[axis_out] != -1:
            sizes[axis_out] = new
        copied.args = (copied.args[0], sizes, *copied.args[2:])
    head_axis[node] = axis_out


def _product(sizes: object) -> int:
    result = 1
    for size in sizes:  # type: ignore[attr-defined]
        result *= int(size)
    return result


def _prove_heads(
    finder: SiteFinder,
    path: Path,
    frontier: fx.Node,
    start: fx.Node,
    result: fx.Node,
    permutation: tuple[int, ...],
    heads: int,
) -> None:
    """The path with another number of heads must treat each head as it did before."""
    generator = torch.Generator().manual_seed(7)
    batch, length = 2, 3
    content = torch.randn((batch, length, heads, path.head_dim), generator=generator)
    wide = content[:, :, torch.arange(path.heads) % heads]
    dtype = finder.shapes[frontier].dtype
    fresh = SiteFinder(finder.program)
    try:
        new = fresh.run([result], {start: content.permute(permutation).to(dtype)}, batch, length)[0]
    except RuntimeError as error:
        raise Refusal(f"its path cannot take {heads} heads: {error}", path.target) from error
    old = fresh.run([path.target], {frontier: wide.permute(permutation).to(dtype)}, batch, length)[0]
    if not torch.equal(new, old[:, : new.shape[1]]) and not torch.allclose(new, old[:, : new.shape[1]], atol=1e-5):
        raise CheckError(
            f"with {heads} heads, the path of an operand computes something else than with {path.heads}",
            where=f"{path.target.name}",
        )
