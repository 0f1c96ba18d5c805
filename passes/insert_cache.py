"""Turn the plan into cache code: from the stateless `forward` entry to `prefill` and `decode`.

Every attention becomes `kvpass::attend`, which writes its layer's preallocated cache and reads it. Whatever the model
computes from positions alone (RoPE tables, learned positions, position ids) is found by what it depends on, proved to
be the same table for every length, and read from that table at each row's own positions; so rows of different lengths
decode together, and no trigonometry is done per token. `prefill` projects only the last token of each row to the
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvpass.errors import UnsupportedError
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import (
    ATTEND,
    ATTEND_SHARED,
    ATTENTION,
    FILLS,
    Program,
    Role,
    aten,
    insert_call,
    merge_equal,
    output_node,
    placeholder,
    roles,
    sweep,
)
from kvpass.ir.sites import Refusal, SiteFinder


@dataclass(frozen=True)
class Table:
    """A tensor that depends on positions only, as rows by position.

    Attributes:
        node: its node in the `forward` entry.
        query_axis: the axis of `node` that runs over tokens.
        batch_axes: axes that run over the batch (all rows are equal).
        square: the second token axis of a mask, or -1.
    """

    node: fx.Node
    query_axis: int
    batch_axes: tuple[int, ...]
    square: int = -1

    def rows(self, value: Tensor) -> Tensor:
        """[T, ...]: the value with its token axis first and its batch axes dropped."""
        axis = self.query_axis
        for batch in sorted(self.batch_axes, reverse=True):
            value = value.select(batch, 0)
            axis -= batch < self.query_axis
        return value.movedim(axis, 0).contiguous()


@dataclass(frozen=True)
class Inserted:
    """What the pass made: the tables in the order in which the entries take them."""

    tables: tuple[Table, ...]


def insert_cache(program: Program, plan: CachePlan) -> Inserted:
    """Add the entries `prefill` and `decode` to a program.

    Both take (input_ids [B, S], starts [B] int64, stops [B] int64 or None, end, ragged, base, *the tensors of each
    store, *tables); see `kvpass::attend`. The tables' first rows are those of position `base`. `prefill` also takes
    `last` [B] int64, the index of each row's last token among the S, and returns logits [B, 1, V].

    Raises:
        UnsupportedError: something in the model depends on the length of the whole sequence.
    """
    tables: dict[fx.Node, Table] = {}
    for entry in ("decode", "prefill"):
        program.entries[entry] = _build(program, plan, tables, last_only=entry == "prefill")
    return Inserted(tuple(tables.values()))


def _build(program: Program, plan: CachePlan, tables: dict[fx.Node, Table], *, last_only: bool) -> fx.Graph:
    source = program.forward
    role = roles(source)
    small, large = program.shapes("forward", 2, 5), program.shapes("forward", 3, 7)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(source, mapping)
    assert isinstance(result, fx.Node)
    graph.output(result)
    ids = placeholder(graph, "input_ids")
    with graph.inserting_after(ids):
        starts = graph.placeholder("starts")
    with graph.inserting_after(starts):
        stops = graph.placeholder("stops")
    with graph.inserting_after(stops):
        end = graph.placeholder("end")
    with graph.inserting_after(end):
        ragged = graph.placeholder("ragged")
    with graph.inserting_after(ragged):
        base = graph.placeholder("base")
    anchor = base
    caches: dict[int, list[fx.Node]] = {}
    for owner in plan.owners():
        caches[owner] = []
        for name in store_names(plan, owner):
            with graph.inserting_after(anchor):
                anchor = graph.placeholder(name)
            caches[owner].append(anchor)
    with graph.inserting_after(anchor):
        length = graph.call_function(aten.sym_size.int, (ids, 1))
    with graph.inserting_after(length):
        steps = graph.call_function(aten.arange.default, (length,), {"device": torch.device("cpu")})
    with graph.inserting_after(steps):
        column = graph.call_function(aten.unsqueeze.default, (starts, 1))
    with graph.inserting_after(column):
        absolute = graph.call_function(aten.add.Tensor, (column, steps))
    with graph.inserting_after(absolute):
        positions = graph.call_function(aten.sub.Tensor, (absolute, base))

    inputs: dict[fx.Node, fx.Node] = {}
    finder = SiteFinder(program)
    for node in list(source.nodes):
        if node.op != "call_function" or role[node] != Role.DATA:
            continue
        copied = mapping[node]
        if node.target is ATTENTION:
            site = finder[int(node.kwargs["layer"])]
            arguments = [*copied.args, *[None] * 4][:7]
            mask = node.args[5] if len(node.args) > 5 else None
            if isinstance(mask, fx.Node):
                table = _square_table(mask, small, large, tables)
                between = small[mask].dim() - len(table.batch_axes) - 2
                rows = _table_input(graph, anchor, table, inputs)
                arguments[5] = _read_mask(graph, copied, rows, positions, between)
            owner = site.kv_source
            options = {k: v for k, v in copied.kwargs.items() if k != "kv_format"}
            options |= {"end": end, "ragged": ragged, "layout": str(plan.layout(owner))}
            if site.upward:
                copied.target = ATTEND_SHARED
                copied.args = (arguments[0], caches[owner], starts, *arguments[3:6])
                options["value_dim"] = site.value_dim
            else:
                readers = [c.layer for c in plan.readers(owner) if not c.upward]
                options |= {"first": site.layer == readers[0], "last": site.layer == readers[-1]}
                copied.target = ATTEND
                copied.args = (*arguments[:3], caches[owner], starts, stops, *arguments[3:])
            copied.kwargs = options
            continue
        for operand in node.all_input_nodes:
            if role[operand] != Role.POSITION or node.target in _SIZE_READERS or _is_blank(operand):
                continue
            if not _runs_over_tokens(operand, small, large):
                continue
            table = _table(operand, small, large, tables)
            rank = max(small[n].dim() for n in [node, *node.all_input_nodes] if isinstance(small.get(n), Tensor))
            gathered = _read(graph, copied, _table_input(graph, anchor, table, inputs), positions, table, small, rank)
            copied.replace_input_with(mapping[operand], gathered)
    for node in list(graph.nodes):
        if node.op == "call_function" and "arange" in str(node.target):
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    sweep(graph)
    if last_only:
        _project_last(program, graph, source, mapping, anchor)
    merge_equal(graph, data=True)
    sweep(graph)
    return graph


def store_names(plan: CachePlan, owner: int) -> list[str]:
    """The inputs that hold an owner's store, in the order of `Layout.exchange`."""
    cache, layout = plan[owner], plan.layout(owner)
    names = [spec.name for spec in layout.specs(cache.key_dim, cache.value_dim, cache.dtype, layout.format.group or 1)]
    return [f"cache_{owner}_{name}" for name in [*names, *(["table"] if layout.page else [])]]


_SIZE_READERS = {aten.sym_size.int}


_VIEWS = {
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
}


def _is_blank(node: fx.Node) -> bool:
    """Whether a tensor is one value throughout: it says nothing about positions, and keeps the sizes it is given."""
    if node.target in FILLS:
        return True
    first = node.args[0] if node.args else None
    return node.target in _VIEWS and isinstance(first, fx.Node) and _is_blank(first)


def _runs_over_tokens(node: fx.Node, small: dict[fx.Node, Any], large: dict[fx.Node, Any]) -> bool:
    return any(a == 5 and b == 7 for a, b in zip(small[node].shape, large[node].shape, strict=True))


def _axes(node: fx.Node, small: dict[fx.Node, Any], large: dict[fx.Node, Any]) -> tuple[list[int], list[int]]:
    pairs = list(zip(small[node].shape, large[node].shape, strict=True))
    tokens = [i for i, p in enumerate(pairs) if p == (5, 7)]
    batch = [i for i, p in enumerate(pairs) if p == (2, 3)]
    for i, (a, b) in enumerate(pairs):
        if a != b and i not in tokens and i not in batch:
            raise UnsupportedError(
                f"a tensor made from positions has shape {tuple(small[node].shape)} for 2 x 5 tokens and "
                f"{tuple(large[node].shape)} for 3 x 7; kvpass cannot cache it token by token",
                where=f"{node.name} {node.meta.get('source', '')}".strip(),
            )
    return tokens, batch


def _table(node: fx.Node, small: dict[fx.Node, Any], large: dict[fx.Node, Any], tables: dict[fx.Node, Table]) -> Table:
    if node not in tables:
        tokens, batch = _axes(node, small, large)
        if len(tokens) != 1:
            raise UnsupportedError(
                "a tensor with two token axes enters the model outside attention's mask",
                where=f"{node.name} {node.meta.get('source', '')}".strip(),
            )
        tables[node] = Table(node, tokens[0], tuple(batch))
    return tables[node]


def _square_table(
    node: fx.Node, small: dict[fx.Node, Any], large: dict[fx.Node, Any], tables: dict[fx.Node, Table]
) -> Table:
    if node not in tables:
        tokens, batch = _axes(node, small, large)
        assert len(tokens) == 2
        tables[node] = Table(node, tokens[0], tuple(batch), square=tokens[1])
    return tables[node]


def _table_input(graph: fx.Graph, anchor: fx.Node, table: Table, inputs: dict[fx.Node, fx.Node]) -> fx.Node:
    if table.node not in inputs:
        last = next((n for n in reversed(list(graph.nodes)) if n.op == "placeholder"), anchor)
        with graph.inserting_after(last):
            inputs[table.node] = graph.placeholder(f"table_{table.node.name}")
    return inputs[table.node]


def _read(
    graph: fx.Graph,
    before: fx.Node,
    table_input: fx.Node,
    positions: fx.Node,
    table: Table,
    shapes: dict[fx.Node, Any],
    rank: int,
) -> fx.Node:
    """The table at `positions`, broadcastable where its consumer (of that rank) took the original."""
    shape = list(shapes[table.node].shape)
    padded_axis = table.query_axis + rank - len(shape)
    lead = 1 if len(shape) < rank else shape[0]
    if padded_axis < 1 or (lead != 1 and not (len(shape) == rank and 0 in table.batch_axes)):
        raise UnsupportedError(
            f"a tensor of positions of shape {tuple(shape)} has no axis for the rows of a batch where it is read",
            where=f"{table.node.name} {table.node.meta.get('source', '')}".strip(),
        )
    gathered = insert_call(graph, before, aten.index.Tensor, table_input, [positions])  # [B, S, rest...]
    rest = [i for i in range(len(shape)) if i != table.query_axis and i not in table.batch_axes]
    # axes of the result, left to right: batch, then padded positions 1 .. rank-1
    order: list[int] = []
    for axis in range(1, rank):
        original = axis - (rank - len(shape))
        if axis == padded_axis:
            order.append(1)
        elif original in rest:
            order.append(2 + rest.index(original))
    dropped = [i for i in rest if i + rank - len(shape) < 1]
    for i in dropped:  # a leading axis of size one stands where the batch goes
        gathered = insert_call(graph, before, aten.squeeze.dim, gathered, 2 + rest.index(i))
        order = [o - (o > 2 + rest.index(i)) for o in order]
    permuted = gathered
    if [0, *order] != list(range(1 + len(order))):
        permuted = insert_call(graph, before, aten.permute.default, gathered, [0, *order])
    for axis in range(1, rank):
        original = axis - (rank - len(shape))
        if axis != padded_axis and original not in rest:
            permuted = insert_call(graph, before, aten.unsqueeze.default, permuted, axis)
    return permuted


def _read_mask(graph: fx.Graph, before: fx.Node, rows: fx.Node, positions: fx.Node, between: int) -> fx.Node:
    """Rows of a mask table [T, T], [T, H|1, T] or [T, 1, H|1, T] (0, 1 or 2 axes between) -> [B, H|1, S, T]."""
    gathered = insert_call(graph, before, aten.index.Tensor, rows, [positions])
    if between == 0:
        return insert_call(graph, before, aten.unsqueeze.default, gathered, 1)
    if between == 2:
        gathered = insert_call(graph, before, aten.squeeze.dim, gathered, 2)
    return insert_call(graph, before, aten.permute.default, gathered, [0, 2, 1, 3])


def _project_last(
    program: Program, graph: fx.Graph, source: fx.Graph, mapping: dict[fx.Node, fx.Node], anchor: fx.Node
) -> None:
    """Keep only each row's last token before the vocabulary projection (or after, where it cannot be found)."""
    finder = SiteFinder(program)
    result = output_node(source)
    try:
        projection = finder.root(result)
        node = mapping[projection.x]
        reader = mapping[projection.node]
        if finder.shapes[projection.x].dim() != 3 or not _token_by_token(finder, projection.node, result):
            raise Refusal("the vocabulary projection is not token by token")
        readers = [u for u in node.users if u is reader or any(m is reader for m in u.users)]
    except Refusal:
        node, readers = output_node(graph), [graph.output_node()]
    last_place = next(n for n in reversed(list(graph.nodes)) if n.op == "placeholder")
    with graph.inserting_after(last_place):
        last = graph.placeholder("last")
    before = readers[0]
    batch = insert_call(graph, before, aten.sym_size.int, last, 0)
    rows = insert_call(graph, before, aten.arange.default, batch, device=torch.device("cpu"))
    picked = insert_call(graph, before, aten.index.Tensor, node, [rows, last])
    kept = insert_call(graph, before, aten.unsqueeze.default, picked, 1)
    for reader in readers:
        reader.replace_input_with(node, kept)


def _token_by_token(finder: SiteFinder, start: fx.Node, result: fx.Node) -> bool:
    """Whether the way from the vocabulary projection to the logits treats each token alone, by running it."""
    shape = finder.shapes[start].shape
    value = torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(finder.shapes[start].dtype)
    whole = finder.run([result], {start: value}, 2, 3)[0]
    try:
        part = finder.run([result], {start: value[:, -1:]}, 2, 3)[0]
    except RuntimeError:
        return False
    return part.shape[1] == 1 and torch.equal(whole[:, -1:], part)


def movable(finder: SiteFinder, inserted: Inserted) -> list[fx.Node]:
    """The nodes that number the tokens, where moving them moves every table; none where that cannot be shown.

    Then the rows of any stretch of positions can be computed by themselves, and in more than single precision.
    """
    nodes = [t.node for t in inserted.tables]
    counts = finder.position_sources(nodes)
    if not counts or any(t.square >= 0 for t in inserted.tables):
        return []
    whole = [t.rows(v) for t, v in zip(inserted.tables, finder.run(nodes, {}, 1, 11), strict=True)]
    for base, length in ((3, 4), (9, 2)):
        moved: dict[fx.Node, Tensor] = {n: torch.arange(base, base + length) for n in counts}
        try:
            values = finder.run(nodes, moved, 1, length)
        except (IndexError, RuntimeError):  # rows of a table that itself does not move
            return []
        for table, value, rows in zip(inserted.tables, values, whole, strict=True):
            if not torch.equal(table.rows(value), rows[base : base + length]):
                return []
    return counts


def prove_tables(finder: SiteFinder, inserted: Inserted) -> None:
    """Show that every table is the same for every length and every batch row.

    Raises:
        UnsupportedError: a table changes with the length of the sequence (dynamic RoPE scaling, for one).
    """
    for table in inserted.tables:
        values = {n: finder.run([table.node], {}, 2, n)[0] for n in (1, 4, 9)}
        rows = {n: table.rows(v) for n, v in values.items()}
        for axis in table.batch_axes:
            if not torch.equal(values[9].select(axis, 0), values[9].select(axis, 1)):
                raise UnsupportedError("positions differ between the rows of a batch", where=table.node.name)
        for n in (1, 4):
            cut = rows[9][:n]
            if table.square >= 0:
                cut = cut[..., :n]
            if not torch.equal(cut, rows[n]):
                raise UnsupportedError(
                    "a tensor made from positions changes with the length of the whole sequence, so it cannot be read "
                    "token by token",
                    where=f"{table.node.name} {table.node.meta.get('source', '')}".strip(),
                    fix="dynamic RoPE scaling is such a case; fix the scaling in the model's config",
                )
