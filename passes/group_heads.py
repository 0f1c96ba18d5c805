"""GroupHeads: multi-head attention to grouped-query attention, by merging KV heads of the model at hand.

Fewer KV heads, a smaller cache, the same query heads (Ainslie et al. 2023, arXiv 2305.13245). The baseline averages
heads; `procrustes` first turns them towards each other (Jin et al. 2024, arXiv 2412.20677); `pca` takes the best shared
basis: a complex PCA of keys per RoPE frequency, an output-weighted PCA of values, heads grouped by what would be lost
(`kvpass.passes.head_merge` has the algebra). `refit` then repairs each attention block on calibration text, layer after
layer, on the student's own inputs: `o_proj` solves W_O by ridge regression, `distill` trains the block's four
projections for a few hundred steps. What is kept: query heads, head_dim, every other weight, a plain GQA checkpoint.
What is lost is measured, per layer by the KL of swapping that layer alone.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from kvpass.errors import CheckError, PlanError, UnsupportedError
from kvpass.ir.execute import ancestors, evaluate, in_order
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import Program, Role, Weight, aten, insert_call, output_node, placeholder, sweep
from kvpass.ir.sites import AttentionSite, Norm, Refusal, SiteFinder
from kvpass.ir.staged import Staged, block
from kvpass.ir.storage import first_nonfinite
from kvpass.passes.base import Context, Effect, Pass, Rewritten
from kvpass.passes.head_merge import (
    HeadMerge,
    KeyBasis,
    Method,
    SiteStats,
    merge_heads,
    output_gram,
    symmetric_transform,
)
from kvpass.passes.split_projections import FACT, insert_at, rebuild

Refit = Literal["none", "o_proj", "distill"]


@dataclass(frozen=True)
class GroupHeads(Pass):
    """Merge KV heads until each layer has `kv_heads` (GQA; 1 is MQA).

    Attributes:
        kv_heads: KV heads per layer afterwards; one number, or one per layer.
        method: how heads of a group become one; see the module.
        refit: what is fitted to calibration text afterwards.
        grouping: which heads share: `search` minimises what the method loses, `contiguous` takes neighbours, `auto`
            searches except where a reader of the checkpoint needs heads in place (ALiBi) and for `mean` and `first`.
        steps: optimiser steps per layer of `refit="distill"`.
        swap_windows: calibration windows on which each layer's damage is measured by converting it alone; 0 skips that.
    """

    kv_heads: int | tuple[int, ...]
    method: Method = "pca"
    refit: Refit = "none"
    grouping: Literal["auto", "search", "contiguous"] = "auto"
    steps: int = 150
    swap_windows: int = 4

    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[frozenset[str]] = frozenset({FACT})

    @property
    def needs_calibration(self) -> bool:
        return self.refit != "none"

    def targets(self, plan: CachePlan) -> list[int]:
        """KV heads per layer after the pass.

        Raises:
            PlanError: a count does not divide what the layer has, or the list has another length than the model.
        """
        if isinstance(self.kv_heads, int):
            counts = [self.kv_heads] * len(plan)
        else:
            counts = list(self.kv_heads)
            if len(counts) != len(plan):
                raise PlanError(
                    f"kv_heads lists {len(counts)} layers, the model has {len(plan)}", fix="give one number per layer"
                )
        if any(not c.owner or c.cache_positions or not c.format.full for c in plan):
            raise PlanError(
                "KV heads are merged where each layer has its own, in full precision and at positions of the text",
                where=f"GroupHeads(kv_heads={self.kv_heads})",
                fix="put GroupHeads before passes that share layers, use cache positions or quantize",
            )
        if self.steps < 1:
            raise PlanError(f"steps must be at least 1, not {self.steps}")
        for layer, count in zip(plan, counts, strict=True):
            if count < 1 or layer.kv_heads % count:
                choices = [d for d in range(1, layer.kv_heads + 1) if layer.kv_heads % d == 0]
                raise PlanError(
                    f"layer {layer.layer} has {layer.kv_heads} KV heads, which {count} does not divide",
                    where=f"GroupHeads(kv_heads={self.kv_heads})",
                    fix=f"choose from {choices}",
                )
        return counts

    def plan(self, plan: CachePlan) -> CachePlan:
        for layer, count in enumerate(self.targets(plan)):
            plan = plan.with_layer(layer, kv_heads=count)
        return plan

    def rewrite(self, program: Program, context: Context) -> Rewritten:
        teacher = program.copy()
        finder = SiteFinder(program)
        counts = [self.kv_heads] * len(finder) if isinstance(self.kv_heads, int) else list(self.kv_heads)
        sites = list(finder)
        bases = [basis_of(site) for site in sites]
        _self_test(program, bases, context)
        total = len(sites)
        job = _Job(self, program, teacher, context, counts, bases)
        for site in sites:
            context.progress(site.layer, total, f"rewiring layer {site.layer}")
            job.rewired.append(rewire(program, site, counts[site.layer]))
        sweep(program.forward)
        details = job.fill()
        done = sum(count < site.kv_heads for count, site in zip(counts, SiteFinder(teacher), strict=True))
        return Rewritten(done, total, details)


@dataclass
class _Rewired:
    """Where a site's new weights stand in the graph, and the constants that their expressions read."""

    x: dict[str, fx.Node]  # operand -> the projection's input
    nodes: dict[str, fx.Node]  # q, k, v, o and their biases -> expression
    attention: fx.Node
    mixed: fx.Node  # the input of the output projection, [B, S, H*Dv]
    y: fx.Node  # the output projection
    constants: dict[str, Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


@dataclass
class _Job:
    """One run of the pass: the program that is rewritten, the teacher it came from, and what was learned per layer."""

    options: GroupHeads
    program: Program
    teacher: Program
    context: Context
    counts: list[int]
    bases: list[KeyBasis]
    rewired: list[_Rewired] = field(default_factory=list)

    def fill(self) -> list[dict[str, Any]]:
        """Compute the merge of every layer, in order, and refit it where asked."""
        options, context = self.options, self.context
        batches = list(context.batches)
        teacher_sites = list(SiteFinder(self.teacher))
        teacher = Staged(self.teacher, batches, context.device) if batches else None
        student = Staged(self.program, batches, context.device) if batches and options.refit != "none" else None
        details = []
        for layer, site in enumerate(teacher_sites):
            began = time.perf_counter()
            context.progress(layer, len(teacher_sites), f"merging layer {layer}")
            operands = _operand_weights(self.teacher, site)
            y = site.output.projection.node
            if teacher is not None:
                teacher.advance([site.q, site.k, site.v, y])
                stats = _measure(site, teacher, operands, self.bases[layer])
            else:
                stats = _data_free(site, operands, self.bases[layer])
            with _one_thread():  # many small factorisations: threads only wait for one another
                merge = merge_heads(stats, self.bases[layer], self.counts[layer], options.method, self._grouping(site))
            del stats, operands
            self._set(layer, site, merge)
            record: dict[str, Any] = {
                "layer": layer,
                "kv_heads": f"{site.kv_heads} -> {self.counts[layer]}",
                "groups": [list(g) for g in merge.groups],
                "key_residual": float(merge.key_residual),
                "value_residual": float(merge.value_residual),
            }
            if student is not None and teacher is not None:
                record |= self._refit(layer, site, teacher, student)
            if teacher is not None:
                for node in (site.q, site.k, site.v, y):
                    teacher.forget(node)
            record["seconds"] = time.perf_counter() - began
            details.append(record)
        if batches and options.swap_windows:
            for layer, value in enumerate(self._swap_losses()):
                details[layer]["swap_kl"] = value
        self._settle(student)
        return details

    def _grouping(self, site: AttentionSite) -> Literal["search", "contiguous"]:
        if self.options.grouping != "auto":
            return self.options.grouping
        fixed = site.optional("alibi_slopes") is not None
        return "contiguous" if fixed else "search"

    def _set(self, layer: int, site: AttentionSite, merge: HeadMerge) -> None:
        place = self.rewired[layer]
        place.constants.update(merge_constants(merge, site.heads, site.kv_heads))

    # ------------------------------------------------------------------ refits

    def _refit(self, layer: int, site: AttentionSite, teacher: Staged, student: Staged) -> dict[str, Any]:
        """Fit the student's block to what the teacher adds to the residual stream, on the student's own inputs."""
        place = self.rewired[layer]
        y = site.output.projection.node
        inputs = in_order(set(place.x.values()))
        drift = _residual(y, teacher), _residual(place.y, student)
        shape = (*self.context.batches[0].shape, -1)  # the teacher's product may be [B*S, hidden]
        wanted = [w.reshape(shape) for w in teacher.values(y)]
        if drift[0] is not None and drift[1] is not None:
            teacher.advance([drift[0], y])
            student.advance([*inputs, drift[1]])
            pairs = zip(teacher.values(drift[0]), student.values(drift[1]), strict=True)
            wanted = [w + (t - s).reshape(shape) for w, (t, s) in zip(wanted, pairs, strict=True)]
        else:
            student.advance(inputs)
        given = [{n: environment[n] for n in inputs} for environment in student.environments]
        fitted = self._fit(place, student, given, wanted)
        student.overrides.update(fitted.weights)
        student.advance([place.y])
        for node in inputs:
            student.forget(node)
        return {"block_error_before": fitted.before, "block_error_after": fitted.after}

    def _fit(
        self, place: _Rewired, student: Staged, given: list[dict[fx.Node, Tensor]], wanted: list[Tensor]
    ) -> _Fitted:
        expressions = list(place.nodes.values())
        values = student.constants(expressions)
        inside = ancestors([place.y], given[0])
        run = [n for n in inside if n not in given[0] and student.roles[n] == Role.DATA and n.op != "placeholder"]
        border = in_order(
            {s for n in run for s in n.all_input_nodes if student.roles[s] != Role.DATA} - set(expressions)
        )
        shared = student.constants(border)
        function = block(run, shared, place.y, student.device)
        scale = sum(float(w.float().pow(2).mean()) for w in wanted) / len(wanted)

        def error(weights: dict[fx.Node, Tensor], index: int) -> Tensor:
            return (function({**given[index], **weights}) - wanted[index]).float().pow(2).mean() / scale

        with torch.no_grad():
            before = sum(float(error(values, i)) for i in range(len(given))) / len(given)
        mix = block(
            [n for n in run if n is not place.y and _before(n, place.mixed)], shared, place.mixed, student.device
        )
        new = dict(values)
        new[place.nodes["o"]] = _ridge(mix, values, given, wanted, place)
        if self.options.refit == "distill":
            new = _distill(error, new, len(given), self.options.steps, self.context.seed)
        with torch.no_grad():
            after = sum(float(error(new, i)) for i in range(len(given))) / len(given)
            if after > before:
                new, after = values, before
        return _Fitted({n: t.detach() for n, t in new.items()}, before, after)

    def _settle(self, student: Staged | None) -> None:
        """Write fitted weights into the program as parameters of their own, closed forms as lazy expressions."""
        for place in self.rewired:
            for name in place.names:
                held = place.constants[name.rsplit(".", 1)[-1]]
                self.program.weights[name] = Weight.of(held, constant=True)
        if student is not None:
            graph = self.program.forward
            for node, value in student.overrides.items():
                name = self.program.add_weight(str(node.meta["weight_name"]), value.cpu())
                with graph.inserting_before(node):
                    literal = graph.get_attr(name)
                node.replace_all_uses_with(literal)
            sweep(graph)
            used = self.program.used_weights()
            self.program.weights = {n: w for n, w in self.program.weights.items() if n in used}

    def _swap_losses(self) -> list[float]:
        """KL(original || original with one layer converted), in nats per token, per layer: the predictor of damage.

        Each converted block runs on the original's inputs, and the original goes on from its result.
        """
        context = self.context
        rows = torch.cat(list(context.batches))[: self.options.swap_windows]
        sites = list(SiteFinder(self.teacher))
        logits = output_node(self.teacher.forward)
        ids = placeholder(self.teacher.forward, "input_ids")
        losses = [0.0] * len(sites)

        def read(program: Program) -> Callable[[str], Tensor]:
            return lambda name: program.read(name).to(context.device)

        def run(given: dict[fx.Node, Any], *nodes: fx.Node) -> list[Any]:
            return evaluate(list(nodes), given, read(self.teacher), context.device)

        parts = rows.split(4)
        with torch.no_grad():
            for count, part in enumerate(parts):
                given: dict[fx.Node, Any] = {ids: part.to(context.device)}
                inputs = [{o: s.path(o).projection.x for o in ("q", "k", "v")} for s in sites]
                wanted = in_order({n for nodes in inputs for n in nodes.values()})
                reference, *values = run(given, logits, *wanted)
                known = dict(zip(wanted, values, strict=True))
                reference = torch.log_softmax(reference.float(), dim=-1)
                for layer, (site, place) in enumerate(zip(sites, self.rewired, strict=True)):
                    context.progress(count * len(sites) + layer, len(parts) * len(sites), f"layer {layer} alone")
                    fed = {placeholder(self.program.forward, "input_ids"): given[ids]}
                    fed |= {place.x[o]: known[n] for o, n in inputs[layer].items()}
                    y = evaluate([place.y], fed, read(self.program), context.device)[0]
                    old = site.output.projection.node
                    shape = y.flatten(0, 1).shape if site.finder.shapes[old].dim() == 2 else y.shape
                    changed = torch.log_softmax(run({**given, old: y.reshape(shape)}, logits)[0].float(), dim=-1)
                    losses[layer] += float((reference.exp() * (reference - changed)).sum(-1).mean()) * len(part)
        return [loss / len(rows) for loss in losses]


@dataclass(frozen=True)
class _Fitted:
    weights: dict[fx.Node, Tensor]
    before: float
    after: float


# ---------------------------------------------------------------------- structure


def rewire(program: Program, site: AttentionSite, kv_heads: int) -> _Rewired:
    """Give a site `kv_heads` KV heads, all its projections expressions over the old ones and named constants.

    The constants (`query_map`, `key_map`, `value_map`, `out_map` and orders) are read from `constants` of the result.
    """
    graph = program.forward
    heads, old = site.heads, site.kv_heads
    dim, value_dim, before = site.head_dim, site.value_dim, site.node
    paths = {o: site.path(o) for o in ("q", "k", "v")}
    output = site.output
    place = _Rewired({}, {}, site.node, site.node, site.node)
    stem = f"layers.{site.layer}.grouped"

    def constant(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        name = f"{stem}.{kind}"
        while name in program.weights:
            name = f"{name.rsplit('.', 1)[0]}+.{kind}"
        program.weights[name] = Weight(shape, dtype, lambda: place.constants[kind], True)
        place.names.append(name)
        return insert_at(graph, before, "get_attr", name)

    def merged(weight: fx.Node, order: fx.Node, maps: fx.Node, rows: int, dtype: torch.dtype, columns: int) -> fx.Node:
        wide = insert_call(graph, before, aten.to.dtype, weight, torch.float64)
        split = insert_call(graph, before, aten.reshape.default, wide, [-1, rows, columns])
        chosen = insert_call(graph, before, aten.index_select.default, split, 0, order)
        count = program_shape(program, maps)
        grouped = insert_call(graph, before, aten.reshape.default, chosen, [count[0], count[2], columns])
        product = insert_call(graph, before, aten.bmm.default, maps, grouped)
        size = [count[0] * count[1], columns] if columns > 1 else [count[0] * count[1]]
        flat = insert_call(graph, before, aten.reshape.default, product, size)
        return insert_call(graph, before, aten.to.dtype, flat, dtype)

    query_order = constant("query_order", (heads,), torch.long)
    head_order = constant("head_order", (old,), torch.long)
    per_group = old // kv_heads
    maps = {
        "q": constant("query_map", (heads, dim, dim), torch.float64),
        "k": constant("key_map", (kv_heads, dim, per_group * dim), torch.float64),
        "v": constant("value_map", (kv_heads, value_dim, per_group * value_dim), torch.float64),
    }
    out_map = constant("out_map", (heads, value_dim, value_dim), torch.float64)
    arguments = list(site.node.args)
    shapes = site.finder.shapes
    for index, operand in enumerate(("q", "k", "v")):
        path = paths[operand]
        projection = path.projection
        order = query_order if operand == "q" else head_order
        rows = value_dim if operand == "v" else dim
        dtype = shapes[projection.weight].dtype
        columns = int(shapes[projection.weight].shape[1])
        weight = merged(projection.weight, order, maps[operand], rows, dtype, columns)
        source = str(weight_name(projection.weight))
        weight.meta["weight_name"] = source
        bias = None
        if projection.bias is not None:
            bias = merged(projection.bias, order, maps[operand], rows, dtype, 1)
            bias.meta["weight_name"] = source.removesuffix("weight") + "bias"
            place.nodes[f"{operand}_bias"] = bias
        place.nodes[operand] = weight
        place.x[operand] = projection.x
        arguments[index] = rebuild(program, path, weight, bias, heads if operand == "q" else kv_heads, before=site.node)
    site.node.args = tuple(arguments)
    for name, axis in (("sink_logits", 0), ("alibi_slopes", 0), ("mask", 1)):
        value = site.optional(name)
        if value is not None and shapes[value].dim() > axis and shapes[value].shape[axis] == heads > 1:
            moved = insert_call(graph, before, aten.index_select.default, value, axis, query_order)
            if name == "sink_logits":
                moved.meta["weight_name"] = str(weight_name(value))
            site.set_optional(name, moved)

    projection = output.projection
    original = projection.weight
    after = projection.node
    if projection.transposed:
        original = insert_call(graph, after, aten.transpose.int, original, 0, 1)
    hidden = int(shapes[projection.weight].shape[1 if projection.transposed else 0])
    columns_name = f"{stem}.columns"
    while columns_name in program.weights:
        columns_name += "+"
    program.weights[columns_name] = Weight.of(output.columns.flatten(), constant=True)
    columns_node = insert_at(graph, after, "get_attr", columns_name)
    dtype = shapes[projection.weight].dtype
    ordered = insert_call(graph, after, aten.index_select.default, original, 1, columns_node)
    wide = insert_call(graph, after, aten.to.dtype, ordered, torch.float64)
    split = insert_call(graph, after, aten.reshape.default, wide, [hidden, heads, value_dim])
    by_head = insert_call(graph, after, aten.permute.default, split, [1, 0, 2])
    chosen = insert_call(graph, after, aten.index_select.default, by_head, 0, query_order)
    product = insert_call(graph, after, aten.bmm.default, chosen, out_map)
    back = insert_call(graph, after, aten.permute.default, product, [1, 0, 2])
    flat = insert_call(graph, after, aten.reshape.default, back, [hidden, heads * value_dim])
    weight = insert_call(graph, after, aten.to.dtype, flat, dtype)
    weight.meta["weight_name"] = str(weight_name(projection.weight))
    place.nodes["o"] = weight
    ids = placeholder(graph, "input_ids")
    batch = insert_call(graph, after, aten.sym_size.int, ids, 0)
    length = insert_call(graph, after, aten.sym_size.int, ids, 1)
    turned = insert_call(graph, after, aten.transpose.int, site.node, 1, 2)
    mixed = insert_call(graph, after, aten.reshape.default, turned, [batch, length, heads * value_dim])
    if shapes[projection.x].dtype != shapes[site.node].dtype:
        mixed = insert_call(graph, after, aten.to.dtype, mixed, shapes[projection.x].dtype)
    y = insert_call(graph, after, aten.linear.default, mixed, weight, projection.bias)
    place.mixed, place.y = mixed, y
    result = y
    if shapes[projection.node].dim() == 2:
        result = insert_call(graph, after, aten.reshape.default, y, [-1, hidden])
    projection.node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    return place


def weight_name(node: fx.Node) -> str:
    """The name that a rewritten weight goes by: that of the parameter it replaces."""
    if "weight_name" in node.meta:
        return str(node.meta["weight_name"])
    sources = [str(n.target) for n in in_order(ancestors([node])) if n.op == "get_attr"]
    return sources[0]


def program_shape(program: Program, node: fx.Node) -> tuple[int, ...]:
    """The shape of a named constant."""
    return program.weights[str(node.target)].shape


def merge_constants(merge: HeadMerge, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """The constants that a rewired site's expressions read, from a merge."""
    ratio = heads // kv_heads
    query_order = torch.tensor([h * ratio + i for g in merge.groups for h in g for i in range(ratio)])
    reader = query_order // ratio
    return {
        "head_order": torch.tensor([h for g in merge.groups for h in g]),
        "query_order": query_order,
        "query_map": merge.query_map[reader],
        "key_map": merge.key_map,
        "value_map": merge.value_map,
        "out_map": merge.out_map[reader],
    }


# ---------------------------------------------------------------------- what the merge needs to know


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def basis_of(site: AttentionSite) -> KeyBasis:
    """Which changes of basis keys and queries of a site allow, as found by running it.

    Raises:
        UnsupportedError: the site's keys or values cannot be merged across heads.
    """
    try:
        path, query = site.path("k"), site.path("q")
        rotary, norm = path.rotary, path.norm
        other, other_norm = query.rotary, query.norm
        site.path("v")
        if not site.path("v").norm.linear:
            raise Refusal(
                "its values pass through a norm or a clamp before attention",
                site.v,
                near="twice the values' projection does not give twice the values",
                fix="let values go from their projection to attention as they are",
            )
        if not norm.per_head:
            raise Refusal(
                "its keys are normalised over all heads together, so fewer heads change the norm",
                site.k,
                near=_norm_words(norm),
                fix="normalise each head alone, over head_dim, or not at all",
            )
        if not other_norm.per_head:
            raise Refusal(
                "its queries are normalised over all heads together",
                site.q,
                near=_norm_words(other_norm),
                fix="normalise each head alone, over head_dim, or not at all",
            )
        if rotary.pairs != other.pairs:
            apart = sorted(set(rotary.pairs) ^ set(other.pairs))
            raise Refusal(
                "RoPE turns other channels of the queries than of the keys",
                site.q,
                near=f"{len(set(rotary.pairs) & set(other.pairs))} pairs are turned in both, {apart[0]} in one alone",
                fix="turn the same channels of both",
            )
        _ = site.output
    except Refusal as refusal:
        raise UnsupportedError(
            f"layer {site.layer}: KV heads cannot be merged: {refusal}",
            where=f"layer {site.layer}",
            fix="`kvpass inspect` lists what each pass can do with this model",
        ) from refusal
    linear = norm.linear and other_norm.linear
    return KeyBasis(
        rotary.pairs, rotary.free, magnitude=linear, phase=norm.phase and other_norm.phase, free_full=linear
    )


def _norm_words(norm: Norm) -> str:
    turned = "commutes" if norm.phase else "does not commute"
    return f"a change of one head changes the others; turning a RoPE pair of all heads {turned} with the norm"


@dataclass(frozen=True)
class _Operands:
    """A site's weights by head, in their own dtype: wq [H,D,C], wk [Hkv,D,C], wv [Hkv,Dv,C], wo [H,hidden,Dv], biases
    or None."""

    wq: Tensor
    wk: Tensor
    wv: Tensor
    wo: Tensor
    bq: Tensor | None
    bk: Tensor | None
    bv: Tensor | None


def _operand_weights(program: Program, site: AttentionSite) -> _Operands:
    found: dict[str, Tensor] = {}
    biases: dict[str, Tensor | None] = {}
    for operand, heads in (("q", site.heads), ("k", site.kv_heads), ("v", site.kv_heads)):
        projection = site.path(operand).projection  # type: ignore[arg-type]
        weight = program.fold(projection.weight)
        if first_nonfinite(weight) is not None:
            raise CheckError(
                f"the {operand} projection of layer {site.layer} holds a NaN or an infinity",
                where=weight_name(projection.weight),
                fix="the checkpoint is damaged; get it again",
            )
        found[operand] = weight.reshape(heads, -1, weight.shape[-1])
        biases[operand] = None if projection.bias is None else program.fold(projection.bias).reshape(heads, -1)
    output = site.output
    wo = program.fold(output.projection.weight)
    if first_nonfinite(wo) is not None:
        raise CheckError(
            f"the output projection of layer {site.layer} holds a NaN or an infinity",
            where=weight_name(output.projection.weight),
            fix="the checkpoint is damaged; get it again",
        )
    wo = wo.T if output.projection.transposed else wo
    by_head = wo[:, output.columns.flatten()].reshape(wo.shape[0], site.heads, site.value_dim).permute(1, 0, 2)
    return _Operands(found["q"], found["k"], found["v"], by_head, biases["q"], biases["k"], biases["v"])


def _data_free(site: AttentionSite, operands: _Operands, basis: KeyBasis) -> SiteStats:
    return SiteStats.data_free(
        operands.wq, operands.wk, operands.wv, operands.wo, basis, operands.bq, operands.bk, operands.bv
    )


def _measure(site: AttentionSite, teacher: Staged, operands: _Operands, basis: KeyBasis) -> SiteStats:
    """Statistics of a site over the calibration batches; keys as attention sees them, centred per window."""
    kv, ratio = site.kv_heads, site.heads // site.kv_heads
    first, second, free = basis.first, basis.second, basis.rest
    pairs, loose = len(first), len(free)
    key_cov = torch.zeros((pairs, kv, kv), dtype=torch.complex128)
    key_free = torch.zeros((kv * loose, kv * loose), dtype=torch.float64)
    energy = torch.zeros((pairs, kv), dtype=torch.float64)
    query_free = torch.zeros((kv, loose, loose), dtype=torch.float64)
    value_cov = torch.zeros((kv * site.value_dim,) * 2, dtype=torch.float64)
    count = 0
    triples = zip(teacher.values(site.q), teacher.values(site.k), teacher.values(site.v), strict=True)
    for q, k, v in triples:
        q, k, v = q.cpu().double(), k.cpu().double(), v.cpu().double()
        tokens = k.shape[0] * k.shape[2]
        count += tokens
        centred = k - k.mean(dim=2, keepdim=True)
        z = basis.complex(centred).permute(3, 1, 0, 2).reshape(pairs, kv, tokens)
        key_cov += z @ z.mH
        flat = centred[..., free].permute(0, 2, 1, 3).reshape(tokens, kv * loose)
        key_free += flat.T @ flat
        power = (q[..., first] ** 2 + q[..., second] ** 2).sum(dim=(0, 2))  # [H, P]
        energy += power.reshape(kv, ratio, pairs).sum(1).T
        loose_q = q[..., free].reshape(q.shape[0], kv, ratio, q.shape[2], loose)
        query_free += torch.einsum("bkrsf,bkrsg->kfg", loose_q, loose_q)
        values = v.permute(0, 2, 1, 3).reshape(tokens, kv * site.value_dim)
        value_cov += values.T @ values
    return SiteStats(
        key_cov=key_cov / count,
        key_free_cov=key_free / count,
        query_energy=energy / count,
        query_free_cov=query_free / count,
        value_cov=value_cov / count,
        out_gram=output_gram(operands.wo, kv),
    )


def _self_test(program: Program, bases: list[KeyBasis], context: Context) -> None:
    """Apply a random exact symmetry to every site and see that it computes the same.

    One test catches a wrong RoPE layout, a forgotten bias, a norm in the way and a wrong head order together.

    Raises:
        CheckError: it does not.
    """
    trial = program.copy()
    batch, length = 2, 12
    shapes = trial.shapes("forward", batch, length)

    def weight(name: str) -> Tensor:
        return trial.read(name).to(context.device)

    for site, basis in zip(SiteFinder(trial), bases, strict=True):
        generator = torch.Generator().manual_seed(context.seed + site.layer)
        merge = symmetric_transform(basis, site.kv_heads, site.head_dim, site.value_dim, generator)
        y = site.output.projection.node
        given: dict[fx.Node, Any] = {
            placeholder(trial.forward, "input_ids"): torch.zeros((batch, length), dtype=torch.long).to(context.device)
        }
        for node in in_order({site.path(o).projection.x for o in ("q", "k", "v")}):
            noise = torch.randn(shapes[node].shape, generator=generator)
            given[node] = noise.to(shapes[node].dtype).to(context.device)
        heads, kv_heads = site.heads, site.kv_heads
        with torch.no_grad():
            expected = evaluate([y], given, weight, context.device)[0].double()
            place = rewire(trial, site, kv_heads)
            place.constants.update(merge_constants(merge, heads, kv_heads))
            got = evaluate([place.y], given, weight, context.device)[0].double().reshape(expected.shape)
        spread = float(expected.abs().max()) or 1.0
        error = float((got - expected).abs().max()) / spread
        allowed = 2e-4 if shapes[y].dtype == torch.float32 else 0.1
        if not error <= allowed:
            raise CheckError(
                f"layer {site.layer}: a change of basis that should not matter changes the attention block by "
                f"{error:.1e} of its spread",
                where=f"layer {site.layer}: {site.node.meta.get('source', site.node.name)}",
                fix="kvpass has misread this layer (RoPE pairs, biases, norms or head order); please report the model",
            )


# ---------------------------------------------------------------------- fitting


def _before(node: fx.Node, end: fx.Node) -> bool:
    return node in ancestors([end])


def _residual(y: fx.Node, staged: Staged) -> fx.Node | None:
    """What a block's output is added to, when it is added directly to something already computed from the tokens."""
    node = y
    for _ in range(3):
        users = list(node.users)
        if len(users) != 1:
            return None
        user = users[0]
        if user.target is aten.add.Tensor:
            other = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
            if len(other) == 1 and staged.roles.get(other[0]) == Role.DATA and y not in ancestors(other, [y]) - {y}:
                return other[0] if y not in ancestors(other) else None
            return None
        if user.target is not aten.reshape.default:
            return None
        node = user
    return None


def _ridge(mix: Any, values: dict[fx.Node, Tensor], given: list[Any], wanted: list[Tensor], place: _Rewired) -> Tensor:
    """W_O by ridge regression pulled to its closed form: one Gram matrix, no gradients."""
    node = place.nodes["o"]
    start = values[node]
    bias = place.y.args[2] if len(place.y.args) > 2 else None
    size = start.shape[1]
    gram = torch.zeros((size, size), dtype=torch.float64)
    cross = torch.zeros((size, start.shape[0]), dtype=torch.float64)
    with torch.no_grad():
        for inputs, target in zip(given, wanted, strict=True):
            rows = mix({**inputs, **values}).reshape(-1, size).cpu().double()
            goal = target.reshape(-1, start.shape[0]).cpu().double()
            if isinstance(bias, fx.Node) and bias in values:
                goal = goal - values[bias].cpu().double()
            gram += rows.T @ rows
            cross += rows.T @ goal
    strength = 1e-3 * float(gram.diagonal().mean()) + 1e-12
    identity = torch.eye(size, dtype=torch.float64)
    solved = torch.linalg.solve(gram + strength * identity, cross + strength * start.cpu().double().T)
    return solved.T.contiguous().to(start)


def _distill(error: Any, start: dict[fx.Node, Tensor], batches: int, steps: int, seed: int) -> dict[fx.Node, Tensor]:
    """Adam on a block's projections against the relative squared error of its output."""
    weights = {n: t.detach().float().clone().requires_grad_(True) for n, t in start.items()}
    dtypes = {n: t.dtype for n, t in start.items()}
    groups = [
        {"params": [t], "lr": 0.02 * float(t.detach().pow(2).mean().sqrt().clamp_min(1e-6))} for t in weights.values()
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.98))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = torch.randperm(batches, generator=generator).tolist()
        optimiser.zero_grad(set_to_none=True)
        loss = error({n: t.to(dtypes[n]) for n, t in weights.items()}, order.pop())
        loss.backward()
        optimiser.step()
        schedule.step()
    return {n: t.detach().to(dtypes[n]) for n, t in weights.items()}
