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
            for rule in (cache.keeps, cache.passes):
                if rule is not None and (rule.prunes or rule.then != "append"):
                    total += 2 * cache.heads * cache.key_dim * min(rule.observed(prompt), count) * keys
            found.append(total)
        return found

    def total(self, plan: CachePlan, prompt: int) -> int:
        """Operations of a prompt, all layers and the last token's logits."""
        return sum(self.layers(plan, prompt)) + self.head


def prompt_cost(program: Program) -> PromptCost:
    """Count a program's products."""
    finder = SiteFinder(program)
    small = finder.scaled[0]
    depth: dict[fx.Node, int] = {}
    costs: dict[fx.Node, int] = {}
    for node in finder.graph.nodes:
        depth[node] = max((depth[n] for n in node.all_input_nodes), default=0)
        if node in finder.nodes:
            depth[node] = finder.nodes.index(node) + 1
        if node.target in _PRODUCTS and finder.roles[node] == Role.DATA:
            left: Any = node.args[_PRODUCTS[node.target]]
            value: Tensor = small[node]
            costs[node] = 2 * int(value.numel()) * int(small[left].shape[-1]) // 10  # of 2 x 5 tokens
    owner: dict[fx.Node, int] = {}
    for layer, site in enumerate(finder.nodes):  # what leads to attention belongs to its layer, not to the one below
        stack = [a for a in site.args[:3] if isinstance(a, fx.Node)]
        seen: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node in seen or finder.roles[node] != Role.DATA:
                continue
            seen.add(node)
            if node in costs:  # sites come in order, so a shared projection belongs to the first that reads it
                owner.setdefault(node, layer)
                continue
            stack.extend(node.all_input_nodes)
    try:
        head = finder.root(output_node(finder.graph)).node
    except Refusal:
        head = None
    per_token = [0] * len(finder)
    for node, cost in costs.items():
        if node is head:
            continue
        per_token[owner.get(node, max(0, depth[node] - 1))] += cost
    return PromptCost(tuple(per_token), costs.get(head, 0) if head is not None else 0)
