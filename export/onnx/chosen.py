"""Packages whose caches hold chosen tokens: a graph that reads a prompt and drops some of it, and one of single steps.

Which tokens stay is ranked in the first graph (`prompt.onnx`), which takes one prompt at a time and returns what every
layer keeps. How many stay follows from lengths alone (`kvpass.ir.retention`): the runner says so by the lengths of
index tensors, so that no graph has to compute a size. The second graph (`model.onnx`) appends a token to caches of
different lengths; it is told how many tokens each layer holds, and where in the text the new one stands.

Shapes: S tokens of the prompt, T of them that reached a layer, W that stay, R queries that rank, H query heads, Hkv KV
heads, G rows of ranks (Hkv where heads choose apart, else 1), D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvpass.export.onnx import standard
from kvpass.export.onnx.contrib import group_query_attention, scoring
from kvpass.export.onnx.entry import Entry
from kvpass.ir.attention import NEG_INF, scored, shared_out
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import ATTENTION, COLUMN_MASS, KEEP, SURVIVORS, aten
from kvpass.ir.retention import Retention
from kvpass.ir.selection import take


@dataclass(frozen=True)
class Choice:
    """One ranking of a prompt's tokens.

    Attributes:
        name: of the input whose length says how many queries rank, int64 [R]: which of the layer's tokens they are; ""
            where the rule looks at no attention.
        kept: of the input whose length says how many stay, [W] of anything.
        layer: whose attention ranks.
        rule: the `Retention`, as text.
        passes: whether tokens leave the residual stream behind the layer, or its cache alone.
    """

    name: str
    kept: str
    layer: int
    rule: str
    passes: bool


def choices_of(plan: CachePlan) -> list[Choice]:
    """Every ranking of a plan, in the order of its layers: of a layer's cache first."""
    found = []
    for cache in plan:
        for passes, rule in ((False, plan.rule(cache.layer) if cache.owner else None), (True, cache.passes)):
            if rule is not None and rule.prunes:
                place = f"{'behind' if passes else 'in'}.{cache.layer}"
                found.append(
                    Choice(f"observed.{place}" if rule.attends else "", f"kept.{place}", cache.layer, str(rule), passes)
                )
    return found


def told(choices: Sequence[Choice], owners: Sequence[int], prompt: int) -> tuple[dict[str, range], dict[int, int]]:
    """What `prompt.onnx` is told of a prompt of so many tokens, and how many of it each owner's cache then holds.

    Returns:
        by the name of an input, the indices that it takes; and by owner the number of tokens.
    """
    indices: dict[str, range] = {}
    reached, held = prompt, {}
    for layer in sorted({*owners, *(c.layer for c in choices)}):
        counts = {False: reached, True: reached}
        for choice in (c for c in choices if c.layer == layer):
            rule = Retention.parse(choice.rule)
            if choice.name:
                asked = min(rule.observed(prompt), reached)
                indices[choice.name] = range(reached - asked, reached)
            counts[choice.passes] = int(rule.count(reached, prompt))
            indices[choice.kept] = range(counts[choice.passes])
        held[layer] = counts[False]
        reached = counts[True]
    return indices, {owner: held[owner] for owner in owners}


def why_not_chosen(plan: CachePlan) -> str:
    """Why a selective plan has no package, or nothing."""
    for cache in plan:
        rules = [r for r in (cache.passes, plan.rule(cache.layer) if cache.owner else None) if r is not None]
        if cache.window:
            return f"layer {cache.layer} has a window, which counts tokens that were dropped"
        if any(r.then != "append" for r in rules):
            return f"what layer {cache.layer} keeps changes as text is generated"
        if any(r.by == "random" for r in rules):
            return f"what layer {cache.layer} keeps is random"
        if cache.format.bits == 4:
            return f"layer {cache.layer} packs codes of 4 bits in a way of the operator"
    return ""


class PromptLowering(Entry):
    """The entry `prefill` of one prompt on its way to ONNX."""

    def __init__(self, plan: CachePlan, graph: fx.Graph, tables: dict[str, fx.Node]) -> None:
        super().__init__(plan, graph, tables)
        self.choices = choices_of(plan)

    def run(self) -> None:
        graph, anchor = self.graph, self.ids
        self.told: dict[str, fx.Node] = {}
        for choice in self.choices:
            for name in filter(None, (choice.name, choice.kept)):
                with graph.inserting_after(anchor):
                    anchor = self.told[name] = graph.placeholder(name.replace(".", "_"))
        self._lengths()
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _LOWERED:
                _LOWERED[node.target](self, node)
        self.finish()

    def _lengths(self) -> None:
        """Sizes and positions, all from what is given."""
        body = self.body
        whole = self.call(body, aten.sym_size.int, self.ids, 1)
        zero = self.call(body, aten.zeros.default, [1], dtype=torch.int64)
        last = whole
        put = {"starts": zero, "prompt": self._counted(whole)}
        for choice in self.choices:
            width = self.call(body, aten.sym_size.int, self.told[choice.kept], 0)
            names = ("width", "count") if choice.passes else ("keep_width", "keep")
            put |= {f"{names[0]}_{choice.layer}": width, f"{names[1]}_{choice.layer}": self._counted(width)}
            last = width if choice.passes else last
        put["last"] = self.call(body, aten.sub.Tensor, self._counted(last), 1)
        for name, node in put.items():
            if name in self.inputs:
                self.inputs[name].replace_all_uses_with(node)
        self.start_at_zero()

    def _counted(self, size: fx.Node) -> fx.Node:
        """A size as a tensor [1]."""
        number = self.call(self.body, aten.scalar_tensor.default, size, dtype=torch.int64)
        return self.call(self.body, aten.view.default, number, [1])

    def _mass(self, node: fx.Node) -> None:
        q, k, _, _, sink_logits = [*node.args, None][:5]
        options: dict[str, Any] = dict(node.kwargs)
        choice = next(c for c in self.choices if (c.layer, c.rule) == (options["layer"], options["rule"]))
        if not choice.name:
            made = self.call(node, in_order, k)
        else:
            made = self.call(
                node, mass_of_prompt, q, self._stored(node, k), self.told[choice.name], sink_logits,
                rule=choice.rule, scale=float(options["scale"]), softcap=float(options.get("softcap") or 0.0),
            )  # fmt: skip
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)

    def _survivors(self, node: fx.Node) -> None:
        choice = next(
            c for c in self.choices if node.kwargs["width"] is self._width(c) and c.rule == node.kwargs["rule"]
        )
        made = self.call(
            node, survivors_of_prompt, node.args[0], self.told[choice.kept], node.args[3], rule=choice.rule
        )
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)

    def _width(self, choice: Choice) -> fx.Node:
        return next(u for u in self.told[choice.kept].users if u.target is aten.sym_size.int)

    def _keep(self, node: fx.Node) -> None:
        k, v, index = node.args[0], node.args[1], node.args[5] if len(node.args) > 5 else None
        layer = int(str(node.kwargs["layer"]))
        codes = not self.plan[layer].format.full
        self.presents[layer] = tuple(  # type: ignore[assignment]
            self.call(node, kept_of_prompt, x, index, codes=codes) for x in (k, v)
        )
        self.graph.erase_node(node)

    def _attend(self, node: fx.Node) -> None:
        arguments: list[Any] = [*node.args, *[None] * 4][:4]
        cache = self.plan[int(str(node.kwargs["layer"]))]
        k, v = (self._stored(node, x) for x in arguments[1:3])
        made = self.call(
            node, attend_prompt, arguments[0], k, v, arguments[3], attributes=scoring(cache, dict(node.kwargs))
        )
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)

    def _stored(self, node: fx.Node, x: Any) -> fx.Node:
        """Keys or values as a cache gives them back."""
        return x if self.plan[0].format.full else self.call(node, rounded, x)


_LOWERED: dict[Any, Any] = {
    COLUMN_MASS: PromptLowering._mass,
    SURVIVORS: PromptLowering._survivors,
    KEEP: PromptLowering._keep,
    ATTENTION: PromptLowering._attend,
}


def in_order(k: Tensor) -> Tensor:
    """Ranks [1, 1, T] by which the latest of T keys [1, Hkv, T, D] stay."""
    return torch.arange(k.shape[2], device=k.device).float().view(1, 1, -1)


def mass_of_prompt(
    q: Tensor,  # [1, H, T, D]
    k: Tensor,  # [1, Hkv, T, D]
    observed: Tensor,  # [R]: which of the tokens ask
    sink_logits: Tensor | None,
    *,
    rule: str,
    scale: float,
    softcap: float,
) -> Tensor:
    """Ranks [1, G, T]; see `kvpass.ir.selection.column_mass_reference`."""
    said = Retention.parse(rule)
    keys = torch.arange(k.shape[2], device=k.device).view(1, 1, 1, 1, -1)
    seen = keys <= observed.view(1, 1, 1, -1, 1)
    shares = shared_out(
        scored(q.index_select(2, observed), k, seen, None, scale, softcap), sink_logits, may_be_empty=False
    )
    shares = shares.float()
    if said.by == "persistence":
        shares = shares.mean(dim=2, keepdim=True)
        shares = shares if said.apart else shares.mean(dim=1, keepdim=True)
        shares = (shares >= 1 / (observed + 1).float().view(1, 1, 1, -1, 1)).float()
    asked = torch.ones_like(observed).sum().float()
    nth = torch.arange(observed.shape[0], device=k.device).float()
    weight = 1 + (said.slope - 1) * nth / (asked - 1).clamp(min=1)
    if said.rows:
        weight = weight / asked
    mass = (shares * weight.view(1, 1, 1, -1, 1)).sum(dim=3).mean(dim=2)
    return mass if said.apart else mass.mean(dim=1, keepdim=True)


def survivors_of_prompt(ranks: Tensor, kept: Tensor, prompt: Tensor, *, rule: str) -> Tensor:
    """Which tokens stay: indices [1, G, W], ascending; see `kvpass.ir.selection.survivors_reference`.

    A number less a tensor has no translation to ONNX of its own: there is none here.
    """
    said = Retention.parse(rule)
    keys = ranks.shape[2]
    order = torch.arange(keys, device=ranks.device)
    recent = order + said.window(prompt) >= keys
    if said.pool > 1:
        smooth = ranks.masked_fill(recent, 0.0)
        ranks = torch.nn.functional.avg_pool1d(smooth, said.pool, stride=1, padding=said.pool // 2)
    ranks = ranks.masked_fill(recent | (order < said.sinks), -NEG_INF)
    best = ranks.flip(-1).topk(kept.shape[0], dim=-1).indices  # of equal ones the first: the latest
    return (best.neg() + (keys - 1)).sort(dim=-1).values


def kept_of_prompt(x: Tensor, index: Tensor | None, *, codes: bool) -> Tensor:
    """What of keys or values [1, Hkv, T, D] a cache holds: [1, Hkv, W, D]."""
    chosen = x.clone() if index is None else take(x, index)
    return standard.coded(chosen) if codes else chosen


def rounded(x: Tensor) -> Tensor:
    """Keys or values as codes of fixed scales say they are."""
    return standard.coded(x).to(x.dtype)


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, *, attributes: dict[str, Any]) -> Tensor:
    """Causal attention of T tokens over themselves, by GroupQueryAttention without a past."""
    length = q.shape[2]
    query, key, value = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    total = torch.scalar_tensor(length, dtype=torch.int32)
    seqlens = (total - 1).view(1)
    found = group_query_attention(
        query, key, value, k[:, :, :0], v[:, :, :0], seqlens, total, None, None, None, sink_logits, None,
        attributes=attributes, fresh=True, ring=False,
    )  # fmt: skip
    return found[0].view(q.shape[0], length, q.shape[1], v.shape[3]).transpose(1, 2)
