"""From a program to a graph of ONNX operators: what `export` runs before weights are written.

The entry `decode` of the cache pass is the model with a cache; here its attention becomes GroupQueryAttention of ONNX
Runtime, whose inputs and outputs are the caches, RoPE included where `raise_rotary` has shown it; or operators of the
standard (`kvpass.export.onnx.standard`), for other targets. One graph serves prompts and decoding, as onnxruntime-genai
runs it: `attention_mask` says how long rows are.

Shapes: B batch, S new tokens, P tokens in the cache, H query heads, Hkv KV heads, D head_dim.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from kvpass.errors import PlanError, RequestError
from kvpass.export.onnx import standard
from kvpass.export.onnx.chosen import PromptLowering, why_not_chosen
from kvpass.export.onnx.contrib import group_query_attention, scoring
from kvpass.export.onnx.entry import Entry
from kvpass.export.onnx.standard import Target
from kvpass.export.onnx.weights import Reader, fake_mode, is_matrix, stand_in
from kvpass.ir.attention import scored, shared_out, visible
from kvpass.ir.execute import ancestors, evaluate
from kvpass.ir.fold import fold_weights
from kvpass.ir.ops import rotary_reference
from kvpass.ir.plan import CachePlan, LayerCache
from kvpass.ir.program import (
    ATTEND,
    ATTEND_SHARED,
    ROTARY,
    Program,
    Weight,
    aten,
    attribute_name,
    placeholder,
    to_module,
)
from kvpass.ir.sites import SiteFinder
from kvpass.passes.insert_cache import Inserted, insert_cache
from kvpass.passes.raise_rotary import raise_rotary

RUNTIMES: dict[Target, str] = {
    "ort": "ONNX Runtime",
    "onnx": "the operators of the ONNX standard",
    "onnx-static": "the operators of the ONNX standard",
}


Reads = Literal["chunks", "one", "pass", "prompt"]


@dataclass(frozen=True)
class OnnxGraph:
    """A program made of what ONNX has.

    Attributes:
        module: (input_ids [B, S], attention_mask [B, P + S], then the past key and value of every owner
            [B, Hkv, P, D]) -> (logits [B, S, V], then the present key and value of every owner).
        owners: the layers that have keys and values, in that order.
        plan: what they store.
        positions: how many positions its tables have.
        target: whose operators it is made of.
        reads: the new tokens that it takes: any number ("chunks"); or, where a layer reads one above it, "one" at a
            time, or a whole prompt again and again, from what the caches hold of the "pass" before; where tokens are
            dropped by rank, "one" and a whole "prompt" (see `kvpass.export.onnx.chosen`).
        readers: what reads the weights of which the module has only shapes, by the names that it has for them.
    """

    module: fx.GraphModule
    owners: tuple[int, ...]
    plan: CachePlan
    positions: int
    readers: dict[str, Reader]
    target: Target = "ort"
    reads: Reads = "chunks"


def lower(
    program: Program, plan: CachePlan, positions: int, target: Target = "ort", reads: Reads = "chunks"
) -> OnnxGraph:
    """Lower a program for sequences of up to `positions` tokens; see `check_plan` for what is refused."""
    check_plan(plan, target)
    folded = fold_weights(program)
    if reads != "prompt":
        raise_rotary(folded, positions)
    inserted = insert_cache(folded, plan)
    entry = "prefill" if reads == "prompt" else "decode"
    graph = folded.entries[entry]
    tables = _hold_tables(folded, inserted, graph, positions)
    if reads == "prompt":
        PromptLowering(plan, graph, tables).run()
    else:
        _Lowering(folded, plan, graph, tables, positions, target, reads).run()
    used = sorted({str(n.target) for n in graph.nodes if n.op == "get_attr"})
    late = {name for name in used if is_matrix(folded.weights[name])}
    mode = fake_mode()
    tensors = {n: stand_in(folded.weights[n], mode) if n in late else _parameter(folded, n) for n in used}
    module = to_module(folded, entry, tensors)
    readers: dict[str, Reader] = {attribute_name(name): functools.partial(folded.read, name) for name in late}
    return OnnxGraph(module, tuple(plan.owners()), plan, positions, readers, target, reads)


def check_plan(plan: CachePlan, target: Target = "ort") -> None:
    """Refuse what cannot be expressed, before anything is read.

    Raises:
        PlanError: with the layer and the reason.
    """
    for cache in plan:
        reason, fix = _why_not(cache, target)
        owner = cache.layer if cache.kv_source is None else cache.kv_source
        if not reason and target == "ort" and cache.sinks and not rows_kept(plan, owner)[1]:
            reason, fix = "it has sinks, in a cache that another layer reads beyond them", "choose target onnx"
        if reason:
            raise PlanError(f"layer {cache.layer} cannot be exported for {RUNTIMES[target]}: {reason}", fix=fix)
    if plan.selective:
        reason = (
            why_not_chosen(plan) if target == "ort" else "which tokens stay is computed by operators of ONNX Runtime"
        )
        if reason:
            raise PlanError(
                f"a cache whose tokens are chosen by rank cannot be exported for {RUNTIMES[target]}: {reason}",
                fix="choose target ort, and a policy that only drops tokens of the prompt",
            )


def check_program(program: Program, target: Target = "ort") -> None:
    """Refuse attention that the operator does not compute.

    Raises:
        PlanError: with the layer and the reason.
    """
    for site in SiteFinder(program):
        has, fix = "", "choose another runtime"
        if site.optional("sink_q") is not None:
            has = "positions counted in the cache"
        elif site.optional("alibi_slopes") is not None and (target == "ort" or site.option("sinks")):
            has, fix = "ALiBi" if target == "ort" else "ALiBi and sinks", "choose target onnx, and no sinks"
        elif site.option("strict") and not site.upward:
            has = "queries that do not read their own token, and the first one nothing"
        if has:
            words = f"layer {site.layer} cannot be exported for {RUNTIMES[target]}: its attention has {has}"
            raise PlanError(words, fix=fix)


def _why_not(cache: LayerCache, target: Target) -> tuple[str, str]:
    fmt = cache.format
    if not fmt.full and fmt.layout != "static":
        what = f"its numbers are stored as {fmt}, and a package's caches have fixed scales"
        return what, 'QuantizeKV(8, layout="static")'
    if fmt.bits == 4 and target != "ort":
        return "the standard has no codes of 4 bits that it computes with", "use 8 bits, or choose target ort"
    if fmt.bits == 4 and cache.sinks:
        return "it keeps sinks, and 4 bits are packed in a way of the operator, which has none", "use 8 bits"
    if fmt.bits == 4 and cache.window and cache.key_dim % 32:
        return f"a window in 4 bits needs heads of 32 channels, not {cache.key_dim}", "use 8 bits"
    if cache.page:
        return "pages belong to a server", "leave out PageKV"
    if cache.upward and target != "ort":
        return "it reads a layer above it", "choose target ort, or share layers downward (cla, yoco)"
    if cache.upward and cache.window == 1:
        return "it reads a layer above it through a window of its own token alone: nothing", "widen its window"
    if cache.positions and target == "ort":
        return f"its mask is a table ({cache.positions})", "choose target onnx"
    if cache.key_dim != cache.value_dim:
        return f"keys have {cache.key_dim} channels and values {cache.value_dim}", "choose another runtime"
    if cache.key_dim % 8 and target == "ort":
        return f"heads of {cache.key_dim} channels are no multiple of 8", "choose target onnx"
    return "", ""


def _parameter(program: Program, name: str) -> Tensor:
    tensor = program.read(name)
    return tensor if program.weights[name].constant else torch.nn.Parameter(tensor, requires_grad=False)


def _hold_tables(program: Program, inserted: Inserted, graph: fx.Graph, positions: int) -> dict[str, fx.Node]:
    """Make the tables of positions weights of the graph; per input that held one, what holds it now."""
    given = {placeholder(program.forward, "input_ids"): torch.zeros((1, positions), dtype=torch.long)}
    try:
        values = evaluate([t.node for t in inserted.tables], given, program.read)
    except IndexError as error:
        raise RequestError(
            f"the model has learned fewer than {positions} positions", fix="export with fewer positions"
        ) from error
    held: dict[str, fx.Node] = {}
    first = next(iter(graph.nodes))
    for table, value in zip(inserted.tables, values, strict=True):
        name = f"table_{table.node.name}"
        program.weights[name] = Weight.of(table.rows(value), constant=True)
        with graph.inserting_before(first):
            held[name] = graph.get_attr(name)
    return held


class _Lowering(Entry):
    """One graph on its way from the dialect to ONNX."""

    def __init__(
        self,
        program: Program,
        plan: CachePlan,
        graph: fx.Graph,
        tables: dict[str, fx.Node],
        positions: int,
        target: Target,
        reads: Reads,
    ) -> None:
        super().__init__(plan, graph, tables)
        self.program, self.positions, self.target, self.reads = program, positions, target, reads
        self.fresh: dict[int, tuple[fx.Node, fx.Node]] = {}
        self.readable: dict[int, tuple[fx.Node, fx.Node]] = {}
        self.biases: dict[Any, fx.Node] = {}
        self.owned: dict[int, tuple[fx.Node, fx.Node, fx.Node]] = {}  # lengths, the longest, positions of new tokens

    def run(self) -> None:
        graph = self.graph
        anchor = self.ids
        if not self.plan.selective:
            with graph.inserting_after(anchor):
                self.mask = anchor = graph.placeholder("attention_mask")
        self.past: dict[int, list[fx.Node]] = {}
        for owner in self.plan.owners():
            self.past[owner] = []
            for part in ("key", "value"):
                with graph.inserting_after(anchor):
                    anchor = graph.placeholder(f"past_{owner}_{part}")
                self.past[owner].append(anchor)
        if folded_rows(self.plan):
            for owner, pair in self.past.items():
                open_ = (self.plan[owner].kv_heads, sum(rows_kept(self.plan, owner)))
                self.past[owner] = [self._reshaped(self.body, owner, past, open_) for past in pair]
        if self.plan.selective:
            self._told_lengths()
        else:
            self._lengths()
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is ATTEND:
                (self._attend if self.target == "ort" else self._attend_standard)(node)
            elif node.op == "call_function" and node.target is ATTEND_SHARED:
                self._attend_above(node)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is ROTARY:
                _spell_out(node)
        if folded_rows(self.plan):
            for owner, (key, value) in self.presents.items():
                shape = laid(self.plan, owner, sum(rows_kept(self.plan, owner)))
                end = graph.output_node()
                self.presents[owner] = self._reshaped(end, owner, key, shape), self._reshaped(end, owner, value, shape)
        self.finish()

    def _reshaped(self, before: fx.Node, owner: int, held: fx.Node, shape: tuple[int, int]) -> fx.Node:
        """Keys or values with so many heads and rows."""
        width = stored(self.plan[owner], torch.float32)[1]
        return self.call(before, aten.reshape.default, held, [-1, *shape, width])

    def _told_lengths(self) -> None:
        """Where layers hold different tokens, inputs say how many each holds, and where the new one stands."""
        self.places = self.call(self.body, aten.unsqueeze.default, self.inputs["starts"], 1)
        self.start_at_zero()
        for owner in self.plan.owners():
            held = self.call(self.body, aten._to_copy.default, self.inputs[f"fill_{owner}"], dtype=torch.int32)
            most = self.call(self.body, aten.amax.default, held, [0])
            self.owned[owner] = (held, self.call(self.body, aten.add.Tensor, most, 1), self.places)

    def _lengths(self) -> None:
        """What the operator is told of lengths, and where rows start, all from the mask."""
        body = self.body
        held = self.call(body, aten.sum.dim_IntList, self.mask, [1])  # [B] tokens of each row, the new ones included
        self.seqlens = self.call(
            body, aten._to_copy.default, self.call(body, aten.sub.Tensor, held, 1), dtype=torch.int32
        )
        total = self.call(body, aten.sym_size.int, self.mask, 1)
        self.total = self.call(body, aten.scalar_tensor.default, total, dtype=torch.int32)
        starts = self.inputs["starts"]
        self.starts = starts
        numbers = [add for u in starts.users if u.target is aten.unsqueeze.default for add in u.users]  # [B, S]
        if self.target == "onnx":
            self._count_in_mask(numbers, held)
        sunk = self.target != "onnx" and (self.target == "onnx-static" or any(cache.sinks for cache in self.plan))
        if sunk or any(u.op == "call_function" and u.target not in (ATTEND, ATTEND_SHARED) for u in starts.users):
            # a prompt begins at 0, however short the row; one more token stands behind those that the row has
            length = self.call(body, aten.sym_size.int, self.ids, 1)
            count = self.call(body, aten.scalar_tensor.default, length, dtype=torch.int64)
            one = self.call(body, aten.eq.Scalar, count, 1)
            whole = self.call(body, aten.scalar_tensor.default, total, dtype=torch.int64)
            before = self.call(body, aten.sub.Tensor, whole, length)
            here = self.call(body, aten.where.self, one, self.call(body, aten.sub.Tensor, held, 1), before)
            self.starts = self.call(body, aten._to_copy.default, here, dtype=torch.int64)
            starts.replace_all_uses_with(self.starts)
        self.start_at_zero()
        if self.target == "onnx-static":
            self.numbers = numbers[0] if numbers else self.starts
            self.held = self.call(body, aten.add.Tensor, self.starts, self.call(body, aten.sym_size.int, self.ids, 1))

    def _count_in_mask(self, numbers: list[fx.Node], held: fx.Node) -> None:
        """Where columns may be padding, the mask tells the positions of new tokens."""
        self.numbers = self.call(self.body, standard.positions_of, self.ids, self.mask)
        for number in numbers:
            number.replace_all_uses_with(self.numbers)
        length = self.call(self.body, aten.sym_size.int, self.ids, 1)
        self.starts = self.call(self.body, aten.sub.Tensor, held, length)  # below 0 where a prompt begins with padding
        self.inputs["starts"].replace_all_uses_with(self.starts)

    def _attend(self, node: fx.Node) -> None:
        arguments: list[Any] = [*node.args, *[None] * 10][:10]
        options: dict[str, Any] = dict(node.kwargs)
        layer = int(options["layer"])
        cache = self.plan[layer]
        owner = layer if cache.kv_source is None else cache.kv_source
        if self.plan[owner].sinks:
            self._attend_sinks(node, owner, arguments, options)
            return
        q, k, v = arguments[:3]
        result, scales = node, None
        if not cache.format.full:
            (result,) = node.users
            scales = [self._wide_scale(node, x) for x in (k, v)]
            q, k, v = (x.args[0] for x in (q, k, v))
        attributes = scoring(cache, options)
        cos: fx.Node | None = None
        sin: fx.Node | None = None
        if _turned_alike(q, k) and (turn := self._turn(q, cache.key_dim)):
            cos, sin, rotary = turn
            attributes |= rotary
            q, k = q.args[0], k.args[0]
        dim = cache.key_dim
        seqlens, total, numbers = self.owned[owner] if self.owned else (self.seqlens, self.total, None)
        numbers = numbers if cos is not None else None
        query = self._packed(node, q)
        past = list(self.past[owner])
        if scales is not None:
            attributes |= dict.fromkeys(("k_quant_type", "v_quant_type"), "PER_CHANNEL")
            attributes["kv_cache_bit_width"] = cache.format.bits
        window = ring_window(self.plan, owner, self.positions)
        if window:
            attributes |= {"local_window_size": window, "sliding_window_cache": 1}
        elif options.get("window"):
            attributes["local_window_size"] = int(options["window"])
        fresh = bool(window) or owner not in self.presents
        if layer != owner and window:  # readers of a ring need keys too: all write it, and what the last wrote stays
            key, value = self.fresh[owner]
        elif fresh:
            key, value = self._packed(node, k), self._packed(node, v)
            self.fresh[owner] = (key, value)
        else:  # a reader: no keys of its own, the past is what the owner has now
            key = value = self._nothing(node, query, cache)
            past = list(self.presents[owner])
        found = self.call(
            node, group_query_attention,
            query, key, value, *past, seqlens, total, cos, sin, numbers, arguments[6], scales,
            attributes=attributes, fresh=fresh, ring=bool(window),
        )  # fmt: skip
        out = self.call(node, _item, found, 0)
        if fresh:
            self.presents[owner] = (self.call(node, _item, found, 1), self.call(node, _item, found, 2))
        result.replace_all_uses_with(self._apart(node, out, cache.heads, dim))
        if result is not node:
            self.graph.erase_node(result)
        self.graph.erase_node(node)

    def _attend_above(self, node: fx.Node) -> None:
        """Attention over what a layer above holds of the tokens before, which are not the new ones."""
        arguments: list[Any] = [*node.args, *[None] * 6][:6]
        cache = self.plan[int(str(node.kwargs["layer"]))]
        assert cache.kv_source is not None
        attributes = scoring(cache, dict(node.kwargs))
        if cache.window:  # counts the query's own token, which the operator takes the one before for
            attributes["local_window_size"] = cache.window - 1
        q, turn = arguments[0], self._turn(arguments[0], cache.key_dim)
        cos = sin = numbers = None
        if turn is not None:
            cos, sin, rotary = turn
            attributes |= rotary
            q = q.args[0]
        query = self._packed(node, q)
        length = self.call(node, aten.sym_size.int, self.ids, 1)
        one = self.call(node, aten.sub.Tensor, self.seqlens, 1)
        if self.reads == "one":
            seqlens, total = (
                self.call(node, aten.clamp.default, one, 0),
                self.call(node, aten.sub.Tensor, self.total, 1),
            )
            total = self.call(node, aten.clamp.default, total, 1)
            if turn is not None:
                wide = self.call(node, aten._to_copy.default, self.seqlens, dtype=torch.int64)
                numbers = self.call(node, aten.unsqueeze.default, wide, 1)
        else:  # the first token has nothing to read; the others see the pass before
            query = self.call(node, aten.slice.Tensor, query, 1, 1)
            seqlens, total = one, self.call(node, aten.sub.Tensor, self.total, 1)
            if turn is not None:
                count = self.call(node, aten.arange.start, 1, length, device=torch.device("cpu"))
                batch = self.call(node, aten.sym_size.int, self.ids, 0)
                rest = self.call(node, operator.sub, length, 1)
                numbers = self.call(node, aten.expand.default, count, [batch, rest])
        none = self._nothing(node, query, cache)
        found = self.call(
            node, group_query_attention,
            query, none, none, *self.past[cache.kv_source], seqlens, total, cos, sin, numbers, arguments[3], None,
            attributes=attributes, fresh=False, ring=False,
        )  # fmt: skip
        out = self.call(node, _item, found, 0)
        if self.reads == "one":
            there = self.call(node, aten.view.default, self.call(node, aten.gt.Scalar, self.seqlens, 0), [-1, 1, 1])
            out = self.call(node, aten.where.ScalarOther, there, out, 0.0)
        else:
            out = self.call(node, aten.constant_pad_nd.default, out, [0, 0, 1, 0])
        node.replace_all_uses_with(self._apart(node, out, cache.heads, cache.value_dim))
        self.graph.erase_node(node)

    def _turn(self, x: Any, dim: int) -> tuple[fx.Node, fx.Node, dict[str, Any]] | None:
        """Tables of cosines and sines, and attributes, where the operator turns an operand by itself."""
        if x.target is not ROTARY or dim % 16:
            return None
        cos, sin = (self._table(x.args[i]) for i in (1, 2))
        if self.program.weights[str(cos.target)].shape[-1] % 8:
            return None
        return cos, sin, {"do_rotary": 1, "rotary_interleaved": int(bool(x.kwargs["interleaved"]))}

    def _packed(self, node: fx.Node, x: fx.Node) -> fx.Node:
        """[B, S, heads*D] of [B, heads, S, D]"""
        return self.call(node, aten.flatten.using_ints, self.call(node, aten.transpose.int, x, 1, 2), 2)

    def _apart(self, node: fx.Node, x: fx.Node, heads: int, dim: int) -> fx.Node:
        """[B, heads, S, D] of [B, S, heads*D]"""
        batch, length = (self.call(node, aten.sym_size.int, self.ids, axis) for axis in (0, 1))
        apart = self.call(node, aten.reshape.default, x, [batch, length, heads, dim])
        return self.call(node, aten.transpose.int, apart, 1, 2)

    def _nothing(self, node: fx.Node, query: fx.Node, cache: LayerCache) -> fx.Node:
        """[B, 0, Hkv*D]: the keys of a layer that has none of its own."""
        none = self.call(node, aten.slice.Tensor, query, 1, 0, 0)
        return self.call(node, aten.slice.Tensor, none, 2, 0, cache.kv_heads * cache.key_dim)

    def _wide_scale(self, before: fx.Node, divided: Any) -> fx.Node:
        """The scale [1, Hkv, 1, D] that keys or values were divided by, as the operator takes it."""
        wide = self.call(before, aten._to_copy.default, divided.args[1], dtype=torch.float32)
        return self.call(before, aten.unsqueeze.default, wide, 0)

    def _attend_standard(self, node: fx.Node) -> None:
        """Attention of operators of the standard: with a past where caches grow, over what is there elsewhere."""
        arguments: list[Any] = [*node.args, *[None] * 10][:10]
        options: dict[str, Any] = dict(node.kwargs)
        layer = int(options["layer"])
        cache = self.plan[layer]
        owner = layer if cache.kv_source is None else cache.kv_source
        if rows_kept(self.plan, owner)[1]:
            heads = (cache.heads, cache.kv_heads)
            arguments[:2] = [self._turned(node, x, n) for x, n in zip(arguments[:2], heads, strict=True)]
            self._attend_sinks(node, owner, arguments, options)
            return
        q, k, v = arguments[:3]
        learned = arguments[6]
        window = window_kept(self.plan, owner, self.positions, self.target)
        bias = self._bias(node, owner, window, options, arguments)
        scoring = {"scale": float(options["scale"]), "softcap": float(options.get("softcap") or 0.0)}
        if layer == owner and self.target == "onnx" and learned is None and cache.format.full:
            batch, length = (self.call(node, aten.sym_size.int, self.ids, axis) for axis in (0, 1))
            sides = [(q, cache.heads), (k, cache.kv_heads), (v, cache.kv_heads)]
            operands = [self._turned(node, x, heads, (batch, length, heads * cache.key_dim)) for x, heads in sides]
            made = self.call(
                node, standard.attend_appended, *operands, *self.past[owner], bias,
                heads=cache.heads, kv_heads=cache.kv_heads, **scoring,
            )  # fmt: skip
            joined, key, value = (self.call(node, _item, made, index) for index in range(3))
            self.presents[owner] = self.readable[owner] = (key, value)
            apart = self.call(node, aten.reshape.default, joined, [batch, length, cache.heads, cache.key_dim])
            out = self.call(node, aten.transpose.int, apart, 1, 2)
        else:
            if layer == owner:
                self._remember(node, owner, window, (self._turned(node, k, cache.kv_heads), v))
            out = self.call(
                node, standard.attend_over, self._turned(node, q, cache.heads), *self.readable[owner], bias,
                None if bias is not None else self.held, learned, opset=standard.OPSETS[self.target], **scoring,
            )  # fmt: skip
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)

    def _turned(self, node: fx.Node, x: fx.Node, heads: int, packed: tuple[Any, ...] | None = None) -> fx.Node:
        """An operand [B, heads, S, D], or as `packed` [B, S, heads*D], turned by the operator if it is turned."""
        if x.target in (aten.mul.Tensor, aten.div.Tensor) and (inner := x.args[0]).target is ROTARY:  # type: ignore[union-attr]
            return self.call(node, x.target, self._turned(node, inner, heads), x.args[1])  # type: ignore[arg-type]
        rotary = x if x.target is ROTARY else None
        if rotary is not None:
            x = rotary.args[0]  # type: ignore[assignment]
        if packed is not None:
            x = self.call(node, aten.reshape.default, self.call(node, aten.transpose.int, x, 1, 2), list(packed))
        if rotary is None:
            return x
        tables = [self._table(rotary.args[i]) for i in (1, 2)]
        turn = {"heads": heads, "interleaved": bool(rotary.kwargs["interleaved"])}
        return self.call(node, standard.rotary_embedding, x, *tables, self.numbers, **turn)

    def _remember(self, node: fx.Node, owner: int, window: int, new: tuple[fx.Node, fx.Node]) -> None:
        """Write new keys and values into a layer's caches."""
        if not self.plan[owner].format.full:
            new = (self.call(node, standard.coded, new[0]), self.call(node, standard.coded, new[1]))
        pairs = list(zip(self.past[owner], new, strict=True))
        if self.target == "onnx":
            key, value = (self.call(node, standard.appended, past, x) for past, x in pairs)
            self.presents[owner] = self.readable[owner] = (key, value)
            return
        if window:
            made = [self.call(node, standard.slid, past, x) for past, x in pairs]
        else:
            made = [self.call(node, standard.placed, past, x, self.starts, self.mask) for past, x in pairs]
        key, value = made
        self.presents[owner] = (self.call(node, _item, key, 0), self.call(node, _item, value, 0))
        self.readable[owner] = (self.call(node, _item, key, 1), self.call(node, _item, value, 1))

    def _bias(
        self, node: fx.Node, owner: int, rows: int, options: dict[str, Any], arguments: list[Any]
    ) -> fx.Node | None:
        """What is added to scores; one node for all layers that see alike, None where causality is all there is."""
        learned, slopes, table = arguments[6:9]
        window, sinks = int(options.get("window") or 0), int(options.get("sinks") or 0)
        plain = self.target == "onnx-static" and not rows and not window
        if plain and learned is None and slopes is None and table is None:
            return None
        key = (rows, window, sinks, slopes, table)
        if key not in self.biases:
            past = self.past[owner][0]
            told = [arguments[0], past if rows else None, slopes, table]
            if self.target == "onnx":
                made = self.call(node, standard.bias_grown, self.ids, self.mask, *told, window=window, sinks=sinks)
            else:
                given = (self.ids, self.mask, self.starts)
                made = self.call(node, standard.bias_placed, *given, *told, window=window, sinks=sinks)
            self.biases[key] = made
        return self.biases[key]

    def _attend_sinks(self, node: fx.Node, owner: int, arguments: list[Any], options: dict[str, Any]) -> None:
        """Sinks and a window: no operator has them, so attention is spelled out over a cache of their size."""
        window, sinks = rows_kept(self.plan, owner)
        found = self.call(
            node, attend_sinks, *arguments[:3], *self.past[owner], self.starts, arguments[6],
            scale=float(options["scale"]), softcap=float(options.get("softcap") or 0.0),
            window=int(options["window"]), sinks=int(options["sinks"]), held=(window, sinks),
            padded=self.target == "onnx",
        )  # fmt: skip
        if int(str(options["layer"])) == owner:
            self.presents[owner] = (self.call(node, _item, found, 1), self.call(node, _item, found, 2))
        node.replace_all_uses_with(self.call(node, _item, found, 0))
        self.graph.erase_node(node)

    def _table(self, gathered: Any) -> fx.Node:
        """The whole table that rows were read from."""
        tables = [n for n in ancestors([gathered]) if n.op == "get_attr"]
        assert len(tables) == 1
        return tables[0]


def ring_window(plan: CachePlan, owner: int, positions: int) -> int:
    """The window alone that an owner's past is bounded by, else 0."""
    window = plan.layout(owner).window
    if plan.layout(owner).sinks:
        return 0
    alike = all(c.window == window for c in plan.readers(owner))
    return window if alike and 0 < window < positions else 0


def stored(cache: LayerCache, dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """The dtype of a cache of a graph that computes in `dtype`, and its elements per head and token."""
    if cache.format.full:
        return dtype, cache.key_dim
    return (torch.int8, cache.key_dim) if cache.format.bits == 8 else (torch.uint8, cache.key_dim // 2)


def window_kept(plan: CachePlan, owner: int, positions: int, target: Target) -> int:
    """The window that an owner's past is bounded by in a target's package, else 0."""
    if target == "ort":
        return ring_window(plan, owner, positions)
    layout = plan.layout(owner)
    return layout.window if not layout.sinks and 0 < layout.window < positions else 0


def rows_kept(plan: CachePlan, owner: int) -> tuple[int, int]:
    """The window and the sinks of a cache that keeps both; (0, 0) for another one."""
    layout = plan.layout(owner)
    return (layout.window, layout.sinks) if layout.sinks else (0, 0)


def folded_rows(plan: CachePlan) -> int:
    """Rows of every cache in a graph where all keep sinks and windows, but not as many tokens; 0 where caches lie open.

    onnxruntime-genai makes all caches as long as one, of as many heads as each has in the graph. So C tokens of H heads
    become U of H*C/U: the same numbers in the same places.
    """
    rows = {sum(rows_kept(plan, owner)) for owner in plan.owners()}
    return math.gcd(*rows) if all(rows) and len(rows) > 1 else 0


def laid(plan: CachePlan, owner: int, rows: int) -> tuple[int, int]:
    """KV heads and rows of a cache as they are in a graph, see `folded_rows`."""
    heads, unit = plan[owner].kv_heads, folded_rows(plan)
    return (heads * rows // unit, unit) if unit else (heads, rows)


def attend_sinks(
    q: Tensor,  # [B, H, S, D]
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,
    past_key: Tensor,  # [B, Hkv, sinks + window, D]: the first tokens, then the latest in order
    past_value: Tensor,
    starts: Tensor,  # [B] tokens that were there before
    sink_logits: Tensor | None,
    *,
    scale: float,
    softcap: float,
    window: int,
    sinks: int,
    held: tuple[int, int],
    padded: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over sinks and a window (StreamingLLM, arXiv 2309.17453), and the cache with S new tokens in it.

    A runtime may write the new cache where the old one lies, as soon as it can: so the old one is read once, by a copy.
    """
    batch, kv_heads, length, dim = k.shape
    kept, first = held  # of the store: rows of its window, and of its sinks before them
    device = q.device
    new = torch.arange(length, device=device)
    here = starts.view(-1, 1) + new  # [B, S]
    slot = torch.arange(first, device=device).view(1, -1)
    sunk = torch.where(slot < starts.view(-1, 1), slot, -1)
    latest = starts.view(-1, 1) - kept + torch.arange(kept, device=device)
    places = torch.cat([sunk, torch.where(latest >= first, latest, -1), here], dim=1).view(batch, 1, 1, -1)
    options: dict[str, Any] = {"causal": True, "strict": False, "window": window, "sinks": sinks}
    inside = visible(here.view(batch, 1, -1, 1), places, **options)
    seen = places >= 0 if inside is None else inside & (places >= 0)
    if padded:  # before a text; what it computes is not read, but must be numbers
        seen = seen | (here.view(batch, 1, -1, 1) < 0)
    if past_key.dtype == torch.int8:
        k, v = (x.round().clamp(-128, 127).to(torch.int8) for x in (k, v))
    copies = [torch.cat(pair, dim=2) for pair in ((past_key, k), (past_value, v))]
    keys, values = (x.to(q.dtype) for x in copies)
    weights = shared_out(scored(q, keys, seen, None, scale, softcap), sink_logits, may_be_empty=False)
    out = torch.matmul(weights.to(q.dtype).flatten(2, 3), values).reshape(q.shape)
    presents = []
    index = (slot - starts.view(-1, 1)).clamp(0, length - 1).view(batch, 1, first, 1)  # of new tokens that are sinks
    arrives = ((slot >= starts.view(-1, 1)) & (slot < starts.view(-1, 1) + length)).view(batch, 1, first, 1)
    for whole, fresh in zip(copies, (k, v), strict=True):
        begin = torch.where(arrives, fresh.gather(2, index.expand(batch, kv_heads, first, dim)), whole[:, :, :first])
        presents.append(torch.cat([begin, whole[:, :, first + length : first + length + kept]], dim=2))
    return out, presents[0], presents[1]


def _item(values: tuple[Tensor, ...], index: int) -> Tensor:
    return values[index]


def _turned_alike(q: Any, k: Any) -> bool:
    if not (isinstance(q, fx.Node) and isinstance(k, fx.Node) and q.target is ROTARY and k.target is ROTARY):
        return False
    return q.args[1:] == k.args[1:] and q.kwargs == k.kwargs


def _spell_out(node: fx.Node) -> None:
    """RoPE that the operator does not do, as additions and products."""
    node.target = rotary_reference
