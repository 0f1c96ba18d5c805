"""EvictKV: keep the entries of a cache that will be asked for, and drop the others.

A prompt is read in full; then every layer keeps a budget of entries, chosen by the attention that they got. The methods
differ in whose attention counts, in what is never dropped, and in whether generated text is dropped too:

- `snapkv` (Li et al. 2024, arXiv 2404.14469): the prompt's latest queries, smoothed over neighbouring tokens, each KV
  head for itself; generated text is all kept.
- `pyramidkv` (Cai et al. 2024, arXiv 2406.02069): the same with budgets that fall from the first layer to the last.
- `h2o` (Zhang et al. 2023, arXiv 2306.14048): all queries summed up, half the budget for the latest tokens; each
  generated token takes the place of the entry with the least.
- `scissorhands` (Liu et al. 2023, arXiv 2305.17118): how often the latest queries gave an entry at least an even share;
  entries are replaced one at a time, over a window that forgets slowly, where the paper drops many at a time.
- `tova` (Oren et al. 2024, arXiv 2401.06104): the newest query alone, all heads of a layer together; replaces.
- `recent` (Xiao et al. 2023, arXiv 2309.17453): the first tokens and the latest; replaces.
- `random`: the control.

Where query heads share a KV head, its rank is their mean. What is kept: the weights, every entry's position, what
prefill computes, and layers that have a window, which are bounded as they are. What is lost: what the dropped entries
would have said to the text that follows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal

from kvpass.errors import PlanError
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import Program
from kvpass.ir.retention import Retention, fraction
from kvpass.ir.sites import SiteFinder
from kvpass.passes.base import Context, Effect, Pass, Rewritten

Policy = Literal["snapkv", "pyramidkv", "h2o", "scissorhands", "tova", "recent", "random"]

POLICIES: dict[str, Retention] = {
    "snapkv": Retention(recent=32, pool=5, apart=True),
    "pyramidkv": Retention(recent=32, pool=5, apart=True),
    "h2o": Retention(rows=0, apart=True, then="replace"),
    "scissorhands": Retention(by="persistence", rows=64, recent=32, apart=True, then="replace"),
    "tova": Retention(rows=1, then="replace"),
    "recent": Retention(by="recent", sinks=4, then="replace"),
    "random": Retention(by="random", apart=True),
}
"""What each method's paper or published code does; the budget comes on top."""


@dataclass(frozen=True)
class EvictKV(Pass):
    """Drop entries of the cache by rank.

    Attributes:
        policy: the method.
        keep: fraction of a prompt's entries that stay, above 0 and at most 1.
        budget: instead, entries that stay.
        window: latest tokens that always stay; the method's own number where None (`h2o`: half of what stays).
        rows: latest queries that are asked (0 all, -1 those of the window); the method's own number where None.
        sinks: first tokens that always stay; the method's own number where None.
        pool: tokens over which ranks are averaged (odd); the method's own number where None.
        heads: whether KV heads choose `apart` or `together`; the method's own way where None.
        generated: whether text after the prompt is kept (`append`) or takes the place of other entries (`replace`);
            the method's own way where None.
        beta: steepness of `pyramidkv`: the last layer gets 1 / beta of the mean budget.
    """

    policy: Policy
    keep: float | None = None
    budget: int | None = None
    window: int | None = None
    rows: int | None = None
    sinks: int | None = None
    pool: int | None = None
    heads: Literal["apart", "together"] | None = None
    generated: Literal["append", "replace"] | None = None
    beta: float = 20.0

    effect: ClassVar[Effect] = Effect.LOSSY

    def plan(self, plan: CachePlan) -> CachePlan:
        return self.placed(plan).checked(self.describe())

    def placed(self, plan: CachePlan) -> CachePlan:
        """The plan with the rules in it, not yet held against what else the layers keep.

        Raises:
            PlanError: a knob is wrong, or no layer's cache is open.
        """
        where = self.describe()
        rules = self._rules(len(plan), where)
        open_ = [layer for layer in plan.owners() if not plan[layer].window]
        if not open_:
            raise PlanError(
                "every layer keeps a window only", where=where, fix="make the windows smaller (SlideWindow)"
            )
        for layer in open_:
            if plan[layer].keeps is not None:
                raise PlanError(
                    f"layer {layer} drops entries of its cache already ({plan[layer].keeps})",
                    where=where,
                    fix="evict once",
                )
            plan = plan.with_layer(layer, keeps=rules[layer].check(where))
        return plan

    def _numbers(self) -> tuple[int | None, ...]:
        return self.window, self.rows, self.sinks, self.pool

    def _rules(self, layers: int, where: str) -> list[Retention]:
        if self.policy not in POLICIES:
            raise PlanError(f"there is no policy {self.policy!r}", where=where, fix=f"choose from {sorted(POLICIES)}")
        if (self.keep is None) == (self.budget is None):
            both = "not both a fraction and a number of entries" if self.keep is not None else "a fraction or a number"
            raise PlanError(
                f"say how much is to stay: {both}", where=where, fix="give keep=0.5, or budget=256 for 256 entries"
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise PlanError(f"keep must lie above 0 and not above 1, and is {self.keep}", where=where)
        if self.budget is not None and self.budget < 1:
            raise PlanError(f"a budget of {self.budget} entries keeps nothing", where=where)
        if self.beta < 1:
            raise PlanError(f"beta must be at least 1, and is {self.beta}", where=where)
        rule = POLICIES[self.policy]
        changes: dict[str, Any] = {
            name: value
            for name, value in zip(("recent", "rows", "sinks", "pool"), self._numbers(), strict=True)
            if value is not None
        }
        if self.heads is not None:
            changes["apart"] = self.heads == "apart"
        if self.generated is not None:
            changes["then"] = self.generated
        rule = replace(rule, **changes)
        halves = self.policy == "h2o" and self.window is None
        if self.keep is not None:
            share = fraction(self.keep)
            rule = replace(rule, share=share, recent_share=share / 2 if halves else Fraction(0))
            if self.policy != "pyramidkv":
                return [rule] * layers
            most = min(Fraction(1), 2 * share - share / fraction(self.beta))
            shares = _falling(most, 2 * share - most, layers)
            return [replace(rule, share=fraction(s)) for s in shares]
        assert self.budget is not None
        rule = replace(rule, budget=self.budget, recent=self.budget // 2 if halves else rule.recent)
        if self.policy != "pyramidkv":
            return [rule] * layers
        rule.check(where)
        fixed = rule.recent + rule.sinks
        free = self.budget - fixed
        least = Fraction(free) / fraction(self.beta)
        return [replace(rule, budget=fixed + max(1, round(f))) for f in _falling(2 * free - least, least, layers)]

    def rewrite(self, program: Program, context: Context) -> Rewritten:
        from kvpass.ir.check import plan_of

        plan = self.plan(plan_of(program))
        sites = list(SiteFinder(program))
        details: list[dict[str, Any]] = []
        for site in sites:
            rule = plan[site.layer].keeps
            if rule is not None:
                site.node.kwargs = {**site.node.kwargs, "keeps": str(rule)}
            share = rule.budget or float(rule.share) if rule is not None else 0
            details.append({"layer": site.layer, "keeps": share, "by": rule.by if rule is not None else ""})
        return Rewritten(sum(c.keeps is not None for c in plan), len(sites), details)


def _falling(first: Fraction, last: Fraction, count: int) -> list[Fraction]:
    """Numbers from first to last in even steps."""
    return [first - (first - last) * i / max(1, count - 1) for i in range(count)]
