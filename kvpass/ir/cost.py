"""What reading a prompt costs in arithmetic, counted from the graph: products with weights per token, attention per
pair of tokens.

The count is that of `torch.utils.flop_counter`: two operations per multiplication and addition, nothing for anything
that is no matrix product, and the whole square of queries and keys for causal attention. Of the vocabulary projection
only the last token's product counts, as in `prefill`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from kvpass.ir.execute import ancestors
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import Program, Role, aten, output_node
from kvpass.ir.sites import Refusal, SiteFinder

_PRODUCTS = {
    aten.linear.default: 0,
    aten.matmul.default: 0,
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
"""Matrix products, and which argument is the left factor."""


@dataclass(frozen=True)
class PromptCost:
    """What each layer computes.

    Attributes:
        per_token: per layer, operations per token, attention left out.
        head: operations of the vocabulary projection for one token.
    """

    per_token: tuple[int, ...]
    head: int

    def layers(self, plan: CachePlan, prompt: int) -> list[int]:
        """Operations of each layer for one prompt of so many tokens under a plan, rankings included."""
        counts = plan.reached(prompt)
        found = []
        for cache, each, count in zip(plan, self.per_token, counts, strict=True):
            keys = count if cache.kv_source is None else counts[cache.kv_source]
            total = each * count + 2 * cache.heads * (cache.key_dim + cache.value_dim) * count * keys
            for rule in (plan.rule(cache.layer) if cache.owner else None, cache.passes):
                if rule is not None and rule.observed(prompt) and (rule.prunes or rule.then != "append"):
                    total += 2 * cache.heads * cache.key_dim * min(rule.observed(prompt), count) * keys
            found.append(total)
        return found

    def total(self, plan: CachePlan, prompt: int) -> int:
        """Operations of a prompt, all layers and the last token's logits."""
        return sum(self.layers(plan, prompt)) + self.head


def prompt_cost(program: Program) -> PromptCost:
    """Count a program's products. Products of experts that run grouped are counted neither here nor by torch."""
    finder = SiteFinder(program)
    small, result = finder.scaled[0], output_node(finder.graph)
    costs: dict[fx.Node, int] = {}
    for node in finder.graph.nodes:
        if node.target in _PRODUCTS and finder.roles[node] == Role.DATA:
            left: Any = node.args[_PRODUCTS[node.target]]
            value: Tensor = small[node]
            costs[node] = 2 * int(value.numel()) * int(small[left].shape[-1]) // 10  # of 2 x 5 tokens
    layers = dict.fromkeys(costs, len(finder) - 1)
    for site in reversed(list(finder)):  # what leads up to an attention and nowhere else belongs to its layer
        above, around = ancestors([site.node]), ancestors([result], [site.node])
        for node in above & costs.keys():
            layers[node] = site.layer - 1 if node in around else site.layer
    for site in finder:  # and so do the projections of keys and values that layers above read too
        for node in _nearest([site.k, site.v], costs) if site.kv_source == site.layer else ():
            layers[node] = site.layer
    try:
        head = finder.root(result).node
    except Refusal:
        head = None
    per_token = [0] * len(finder)
    for node, cost in costs.items():
        if node is not head:
            per_token[max(0, layers[node])] += cost
    return PromptCost(tuple(per_token), costs.get(head, 0) if head is not None else 0)


def _nearest(starts: list[fx.Node], costs: dict[fx.Node, int]) -> set[fx.Node]:
    """The products that nodes are made from without another product between."""
    stop = set(costs)
    return {node for node in ancestors(starts, stop) if node in stop}
