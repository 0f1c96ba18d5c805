"""Turn the plan into cache code: from the stateless `forward` entry to `prefill` and `decode`.

Every attention becomes `kvpass::attend`, which writes its layer's preallocated cache and reads it. Whatever the model
computes from positions alone (RoPE tables, learned positions, position ids) is found by what it depends on, proved to
be the same table for every length, and read from that table at each row's own positions; so rows of different lengths
decode together, and no trigonometry is done per token. `prefill` projects only the last token of each row to the
vocabulary. Where tokens are dropped by rank (`kvpass.ir.retention`), `prefill` attends over the prompt itself, writes
what is to stay into the stores, and gathers the survivors behind every `kvpass::prune`: what lies above that computes
with its own number of tokens, at the positions that they had.
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
    ATTEND_KEPT,
    ATTEND_SHARED,
    ATTENTION,
    COLUMN_MASS,
    FILLS,
    KEEP,
    OBSERVE,
    PRUNE,
    SHAPE_ONLY_READERS,
    SURVIVORS,
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
from kvpass.ir.selection import EXTRAS
from kvpass.ir.sites import AttentionSite, Refusal, SiteFinder


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

    Where tokens are dropped by rank, `prefill` reads whole prompts. It takes their lengths `prompt` [B] too; per layer
    l behind which tokens leave, how many stay: `count_l` [B], and the most of them, `width_l`; per owner o of a store
    that keeps a choice, `keep_o` [B] and `keep_width_o`. `decode` takes, per owner, the tokens that it holds, `fill_o`
    [B], the slots in use after the step, `end_o`, `ragged_o`, and where entries are replaced `budget_o` [B] and
    `recent_o` [B].

    Raises:
        UnsupportedError: something in the model depends on the length of the whole sequence.
    """
    tables: dict[fx.Node, Table] = {}
    for entry in ("decode", "prefill"):
        program.entries[entry] = _build(program, plan, tables, last_only=entry == "prefill")
    return Inserted(tuple(tables.values()))


@dataclass(frozen=True)
class Level:
    """The tokens between two cuts of the residual stream, as nodes of an entry.

    Attributes:
        width: how many there are at most, a number.
        lengths: [B] how many each row has; None where no tokens are dropped.
        positions: [B, S] where they stand in the text, less the tables' base; 0 for padding.
        marked: the same, -1 for padding.
    """

    width: fx.Node
    lengths: fx.Node | None
    positions: fx.Node
    marked: fx.Node


class _Entry:
    """One cached entry in the making: a copy of `forward` and what is added to it."""

    def __init__(self, program: Program, plan: CachePlan, small: dict[fx.Node, Any], large: dict[fx.Node, Any]) -> None:
        self.plan, self.small, self.large = plan, small, large
        self.graph = fx.Graph()
        self.mapping: dict[fx.Node, fx.Node] = {}
        result = self.graph.graph_copy(program.forward, self.mapping)
        assert isinstance(result, fx.Node)
        self.graph.output(result)
        self.ids = self.anchor = placeholder(self.graph, "input_ids")
        self.body = next(n for n in self.graph.nodes if n > self.ids)
        self.inputs: dict[fx.Node, fx.Node] = {}  # a table's node in `forward` -> the input that holds it here
        self.sizes: dict[tuple[fx.Node, int], fx.Node] = {}  # what is made of sizes, per level
        self.cuts: dict[int, fx.Node] = {}  # per layer, the survivors behind it, [B, S] indices into its own tokens
        self.named: dict[str, fx.Node] = {}

    def input(self, name: str) -> fx.Node:
        """A new input behind the last one made."""
        with self.graph.inserting_after(self.anchor):
            self.anchor = self.graph.placeholder(name)
        return self.anchor

    def shared_input(self, name: str) -> fx.Node:
        """An input that several nodes read."""
        if name not in self.named:
            self.named[name] = self.input(name)
        return self.named[name]

    def first(self, target: Any, *arguments: Any, **options: Any) -> fx.Node:
        """A call before everything that the model computes."""
        return insert_call(self.graph, self.body, target, *arguments, **options)

    def table(self, table: Table) -> fx.Node:
        """The input that holds a table."""
        if table.node not in self.inputs:
            self.inputs[table.node] = self.input(f"table_{table.node.name}")
        return self.inputs[table.node]

    def sized(self, node: fx.Node, before: fx.Node, key: int, width: fx.Node, role: dict[fx.Node, Role]) -> fx.Node:
        """A number, or a blank tensor, made from sizes, for a level that holds `width` tokens."""
        if role[node] not in (Role.SHAPE, Role.POSITION):
            return self.mapping[node]
        if (node, key) not in self.sizes:
            if node.target in SHAPE_ONLY_READERS:
                pair = (self.small[node], self.large[node])
                if pair == (5, 7):
                    return width
                if pair[0] != pair[1] and pair != (2, 3):
                    raise UnsupportedError(f"a size of {pair[0]} for 2 x 5 tokens is not known", where=node.name)
                return self.mapping[node]
            with self.graph.inserting_before(before):
                parts = {n: self.sized(n, before, key, width, role) for n in node.all_input_nodes}
                self.sizes[node, key] = self.graph.node_copy(node, parts.__getitem__)
        return self.sizes[node, key]


def _build(program: Program, plan: CachePlan, tables: dict[fx.Node, Table], *, last_only: bool) -> fx.Graph:
    source = program.forward
    role = roles(source)
    finder = SiteFinder(program)
    small, large = finder.scaled
    entry = _Entry(program, plan, small, large)
    graph, mapping = entry.graph, entry.mapping
    starts, stops, end, ragged, base = (entry.input(name) for name in ("starts", "stops", "end", "ragged", "base"))
    caches = {owner: [entry.input(name) for name in store_names(plan, owner)] for owner in plan.owners()}
    pruning = plan.selective and last_only
    prompt = entry.input("prompt") if pruning else None
    length = entry.first(aten.sym_size.int, entry.ids, 1)
    steps = entry.first(aten.arange.default, length, device=torch.device("cpu"))
    column = entry.first(aten.unsqueeze.default, starts, 1)
    absolute = entry.first(aten.add.Tensor, column, steps)
    positions = entry.first(aten.sub.Tensor, absolute, base)
    levels = {0: Level(length, prompt, positions, positions)}
    depth: dict[fx.Node, int] = {}

    for node in list(source.nodes):
        if node.op != "call_function" or role[node] != Role.DATA:
            continue
        copied = mapping[node]
        operands = [n for n in node.all_input_nodes if role[n] == Role.DATA]
        depth[node] = max(
            (depth.get(n, 0) for n in (operands[:1] if node.target is ATTENTION else operands)), default=0
        )
        if node.target is PRUNE:
            if pruning:
                depth[node] = int(str(node.kwargs["layer"])) + 1
                _gather(entry, finder, node, levels, depth)
            else:
                copied.replace_all_uses_with(copied.args[0])  # type: ignore[arg-type]
            continue
        level = levels[depth[node]]
        if node.target is ATTENTION:
            site = finder[int(node.kwargs["layer"])]
            if pruning:
                _attend_prompt(entry, site, level, levels[0], caches)
                continue
            arguments = [*copied.args, *[None] * 4][:7]
            mask = node.args[5] if len(node.args) > 5 else None
            if isinstance(mask, fx.Node):
                table = _square_table(mask, small, large, tables)
                between = small[mask].dim() - len(table.batch_axes) - 2
                arguments[5] = _read_mask(graph, copied, entry.table(table), positions, between)
            owner = site.kv_source
            options = {k: v for k, v in copied.kwargs.items() if k not in ("kv_format", "keeps")}
            readers = [c.layer for c in plan.readers(owner) if not c.upward]
            order = {"first": site.layer == readers[0], "last": site.layer == readers[-1]} if readers else {}
            if plan.selective:
                _attend_kept(entry, site, arguments, options | order, caches[owner], starts)
                continue
            options |= {"end": end, "ragged": ragged, "layout": str(plan.layout(owner))}
            if site.upward:
                copied.target = ATTEND_SHARED
                copied.args = (arguments[0], caches[owner], starts, *arguments[3:6])
                options["value_dim"] = site.value_dim
            else:
                options |= order
                copied.target = ATTEND
                copied.args = (*arguments[:3], caches[owner], starts, stops, *arguments[3:])
            copied.kwargs = options
            continue
        for operand in node.all_input_nodes:
            tabulated = role[operand] == Role.POSITION and node.target not in _SIZE_READERS and not _is_blank(operand)
            if not tabulated or not _runs_over_tokens(operand, small, large):
                if depth[node] and role[operand] != Role.DATA:
                    fresh = entry.sized(operand, copied, depth[node], level.width, role)
                    copied.replace_input_with(mapping[operand], fresh)
                continue
            table = _table(operand, small, large, tables)
            rank = max(small[n].dim() for n in [node, *node.all_input_nodes] if isinstance(small.get(n), Tensor))
            gathered = _read(graph, copied, entry.table(table), level.positions, table, small, rank)
            copied.replace_input_with(mapping[operand], gathered)
    for node in list(graph.nodes):
        if node.op == "call_function" and "arange" in str(node.target):
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    sweep(graph)
    if last_only:
        _project_last(program, entry)
    merge_equal(graph, data=True)
    sweep(graph)
    return graph


_SCORING = ("scale", "causal", "strict", "window", "sinks", "softcap", "layer", "kv_format")


def _gather(
    entry: _Entry, finder: SiteFinder, node: fx.Node, levels: dict[int, Level], depth: dict[fx.Node, int]
) -> None:
    """Lower a cut: rank this level's tokens by the layer's attention, and take out what does not survive."""
    layer, rule = int(str(node.kwargs["layer"])), str(node.kwargs["rule"])
    source, copied = node.args[0], entry.mapping[node]
    assert isinstance(source, fx.Node)
    below = levels[depth.get(source, 0)]

    def call(target: Any, *arguments: Any, **options: Any) -> fx.Node:
        return insert_call(entry.graph, copied, target, *arguments, **options)

    if layer + 1 not in levels:
        width, counts = entry.input(f"width_{layer}"), entry.input(f"count_{layer}")
        site = finder[layer]
        ranks = _ranks(entry, site, below, levels[0], rule, copied)
        prompt = levels[0].lengths
        index = call(SURVIVORS, ranks, below.lengths, counts, prompt, width=width, rule=rule)
        flat = call(aten.squeeze.dim, index, 1)
        safe = call(aten.clamp.default, flat, 0)
        there = call(aten.ge.Scalar, flat, 0)
        where = call(aten.gather.default, below.positions, 1, safe)
        marked = call(aten.where.ScalarOther, there, where, -1)
        levels[layer + 1] = Level(width, counts, call(aten.clamp.default, marked, 0), marked)
        entry.cuts[layer] = safe
    safe = entry.cuts[layer]
    batch = call(aten.sym_size.int, entry.ids, 0)
    rows = call(aten.unsqueeze.default, call(aten.arange.default, batch, device=torch.device("cpu")), 1)
    taken = call(aten.index.Tensor, entry.mapping[source], [rows, safe])
    copied.replace_all_uses_with(taken)
    entry.mapping[node] = taken


def _ranks(entry: _Entry, site: AttentionSite, level: Level, whole: Level, rule: str, before: fx.Node) -> fx.Node:
    """What the layer's attention makes of the tokens of its level."""
    options = {name: site.option(name) for name in _SCORING} | {"rule": rule, "longest": whole.width}
    tensors = [entry.mapping.get(t) if t is not None else None for t in _learned(site)]
    places = [level.marked, level.marked] if level is not whole else [None, None]
    q, k = entry.mapping[site.q], entry.mapping[site.k]
    return insert_call(
        entry.graph, before, COLUMN_MASS, q, k, level.lengths, whole.lengths, *tensors, *places, **options
    )


def _learned(site: AttentionSite) -> list[fx.Node | None]:
    return [site.optional("sink_logits"), site.optional("alibi_slopes")]


def _attend_prompt(
    entry: _Entry, site: AttentionSite, level: Level, whole: Level, caches: dict[int, list[fx.Node]]
) -> None:
    """Attention of a prompt over itself, with what is to stay of it written into the store."""
    copied, layer = entry.mapping[site.node], site.layer
    by_distance = int(site.option("window")) > 0 or site.optional("alibi_slopes") is not None
    if by_distance and level is not whole:
        copied.args = (*[*copied.args, *[None] * 4][:7], level.marked, level.marked)
    if site.kv_source != layer:
        return
    rule = entry.plan.rule(layer)
    cache = caches[layer]
    k, v = entry.mapping[site.k], entry.mapping[site.v]
    index = ranks = None
    if rule.prunes or rule.then == "replace":
        ranks = _ranks(entry, site, level, whole, str(rule), copied)
    if rule.prunes:
        width, counts = entry.input(f"keep_width_{layer}"), entry.input(f"keep_{layer}")
        options = {"width": width, "rule": str(rule)}
        index = insert_call(entry.graph, copied, SURVIVORS, ranks, level.lengths, counts, whole.lengths, **options)
    split = len(cache) - len(EXTRAS[rule.then])
    held = cache[: split + 1] if rule.then == "replace" else cache[:split]
    kept_ranks = ranks if rule.then == "replace" else None
    layout = str(entry.plan.layout(layer))
    kept = {"layout": layout, "layer": layer}
    insert_call(entry.graph, copied, KEEP, k, v, held, level.lengths, level.positions, index, kept_ranks, **kept)
    if rule.then == "thin":
        options = {name: site.option(name) for name in ("scale", "softcap", "kv_format", "layer")}
        sink_logits = _learned(site)[0]
        learned = None if sink_logits is None else entry.mapping[sink_logits]
        q = entry.mapping[site.q]
        insert_call(
            entry.graph, copied, OBSERVE, q, k, cache[split:], level.lengths, level.positions, learned, **options
        )


def _attend_kept(
    entry: _Entry,
    site: AttentionSite,
    arguments: list[Any],
    options: dict[str, Any],
    cache: list[fx.Node],
    starts: fx.Node,
) -> None:
    """A step over a store whose entries were chosen: as usual where it only grows and distances do not count."""
    copied, owner = entry.mapping[site.node], site.kv_source
    fills, end = entry.shared_input(f"fill_{owner}"), entry.shared_input(f"end_{owner}")
    options["layout"] = str(entry.plan.layout(owner))
    q, k, v, sink_logits, alibi_slopes = arguments[:5]
    if grows_plainly(entry.plan, owner) and alibi_slopes is None:
        held = cache[: len(cache) - 1]  # all but the positions
        copied.target = ATTEND
        copied.args = (q, k, v, held, fills, None, sink_logits)
        copied.kwargs = {**options, "end": end, "ragged": entry.shared_input(f"ragged_{owner}")}
        return
    rule = entry.plan.rule(owner)
    budgets, recents = entry.shared_input(f"budget_{owner}"), entry.shared_input(f"recent_{owner}")
    copied.target = ATTEND_KEPT
    copied.args = (q, k, v, cache, starts, fills, budgets, recents, sink_logits, alibi_slopes)
    copied.kwargs = {**options, "end": end, "rule": str(rule)}


def grows_plainly(plan: CachePlan, owner: int) -> bool:
    """Whether a store takes each token in its next slot, and nothing is dropped after the prompt."""
    return plan.rule(owner).then == "append"


def store_names(plan: CachePlan, owner: int) -> list[str]:
    """The inputs that hold an owner's store, in the order of `Layout.exchange`; then what rules of retention need."""
    cache, layout = plan[owner], plan.layout(owner)
    names = [spec.name for spec in layout.specs(cache.key_dim, cache.value_dim, cache.dtype, layout.format.group or 1)]
    names += ["table"] if layout.page else []
    if plan.selective:
        names += ["positions", *EXTRAS[plan.rule(owner).then]]
    return [f"cache_{owner}_{name}" for name in names]


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


def _project_last(program: Program, entry: _Entry) -> None:
    """Keep only each row's last token before the vocabulary projection (or after, where it cannot be found)."""
    graph, source, mapping = entry.graph, program.forward, entry.mapping
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
    last = entry.input("last")
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
