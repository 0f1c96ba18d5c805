"""PrunePyramid: let only the tokens that matter go on to the layers above, so that prefill itself gets cheaper.

PyramidInfer (Yang et al. 2024, arXiv 2405.12532): the latest tokens of a prompt show which earlier ones they attend to.
Behind each layer the others leave the residual stream for good: every layer above computes queries, keys, values and
its MLP for the survivors alone, and caches them alone, at the positions that they had. What is kept: the weights, the
latest tokens, the first ones, and every number where nothing is dropped. What is lost: what a dropped token would have
said to the layers above, and its logits. Without a cache (`forward`) there is no prompt, and nothing is dropped.

How many survive depends on the prompt's length alone. `keep` asks for a fraction of the cache's bytes, and the schedule
is solved for it: of a context, layer l of L gets the fraction (1 - l / L) ** a. `schedule="pyramidinfer"` is
the published rule with its own parameters, `schedule="step"` FastKV's (Jo et al. 2025, arXiv 2502.01068): one layer
from which only a fraction goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal

from kvpass.errors import PlanError, UnsupportedError
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import PRUNE, Program
from kvpass.ir.retention import Retention, fraction
from kvpass.ir.sites import Refusal, SiteFinder, reached_from
from kvpass.passes.base import Context, Effect, Pass, Rewritten

STEPS = 60  # of bisection
SLACK = 1e-3  # of the bytes asked for
BLOCK = 16  # generated tokens that are thinned at a time


@dataclass(frozen=True)
class PrunePyramid(Pass):
    """Prune the residual stream while a prompt is read.

    Attributes:
        keep: fraction of the cache's bytes that a prompt of `length` tokens is to take, above 0 and at most 1.
        bytes: instead, bytes that the cache of such a prompt is to take.
        length: the prompt that `keep` or `bytes` is solved for; other lengths come close to the same fraction.
        schedule: `solved`, `pyramidinfer` or `step`.
        at: the layer behind which tokens go (step); those below compute every token.
        recent_ratio, max_recent: the latest tokens, which rank the others and always stay: that share of the prompt and
            one more, at most `max_recent` (0 for no limit).
        min_context: tokens of context that are not pruned further.
        sinks: first tokens that always stay.
        distance_weight: weight of the latest query in the ranking, the earliest one's being 1.
        decay, strategy: the ratio of each layer to the one below (pyramidinfer): constant, or falling with a cosine
            from 1 to `decay`.
        interval: prune behind every n-th layer.
        thin: whether generated text is thinned as it grows old, 16 tokens at a time.
        thin_keep, thin_decay: of 16 tokens, the first layer keeps 16 * thin_keep, the last about thin_decay of that.
        lead: tokens of the prompt that the first thinned block takes in: 1 is what the published code does.
    """

    keep: float | None = None
    bytes: int | None = None
    length: int = 2048
    schedule: Literal["solved", "pyramidinfer", "step"] = "solved"
    at: int | None = None
    recent_ratio: float = 0.2
    max_recent: int = 32
    min_context: int = 32
    sinks: int = 4
    distance_weight: float = 1.2
    decay: float = 0.9
    strategy: Literal["cosine", "constant"] = "cosine"
    interval: int = 1
    thin: bool = False
    thin_keep: float = 0.9
    thin_decay: float = 0.1
    lead: int = 0

    effect: ClassVar[Effect] = Effect.LOSSY

    @classmethod
    def from_reference(cls, config: Mapping[str, Any]) -> PrunePyramid:
        """The pass for the parameters that PyramidInfer's published code takes, under their names there.

        Raises:
            PlanError: a parameter that it does not have.
        """
        given = dict(config)
        names = {
            "recent_ratio": "recent_ratio",
            "prefill_decay_ratio": "decay",
            "min_context_length": "min_context",
            "layerwise_downsample_interval": "interval",
            "streamingllm_sink_len": "sinks",
            "distance_weight": "distance_weight",
            "gen_decay_ratio": "thin_decay",
            "gen_compress_ratio": "thin_keep",
        }
        options: dict[str, Any] = {ours: given.pop(theirs) for theirs, ours in names.items() if theirs in given}
        strategies = {given.pop(f"{phase}_decay_strategy", "cosine") for phase in ("prefill", "gen")}
        block = given.pop("exceed_length_to_compress", BLOCK)
        if given:
            raise PlanError(f"PyramidInfer has no parameter {sorted(given)[0]!r}", fix=f"it has {sorted(names)}")
        if len(strategies) > 1 or block != BLOCK:
            raise PlanError(
                f"strategies {sorted(strategies)} and blocks of {block} tokens are not what kvpass can reproduce",
                fix=f"use one strategy for both phases, and blocks of {BLOCK}",
            )
        # its "linear" strategy is never reached: what it computes there is a constant ratio
        strategy: Literal["cosine", "constant"] = "cosine" if strategies == {"cosine"} else "constant"
        fixed: dict[str, Any] = {"schedule": "pyramidinfer", "max_recent": 0, "thin": True, "lead": 1}
        return cls(strategy=strategy, **{"min_context": 64, **options}, **fixed)

    # ------------------------------------------------------------------ the plan

    def plan(self, plan: CachePlan) -> CachePlan:
        where = self.describe()
        self._check(len(plan), where)
        pruned = [c.layer for c in plan if c.passes is not None]
        if pruned and (self.schedule != "step" or self.at in pruned):  # a step may join another one elsewhere
            raise PlanError(f"tokens leave behind layer {pruned[0]} already", where=where, fix="prune once")
        free = self.open_layers(plan, where)
        halves = [Fraction(1, 2) if f else Fraction(1) for f in free]
        self.with_ratios(plan, halves).checked(where)  # before anything is solved for it
        if self.schedule == "solved":
            ratios = self._solved(plan, free, where)
        elif self.schedule == "step":
            assert self.at is not None
            assert self.keep is not None
            if not free[self.at]:
                raise PlanError(
                    f"layers above read what layer {self.at} or one below it keeps, tokens included that would leave",
                    where=where,
                    fix="prune behind the last layer that reads it",
                )
            ratios = [Fraction(1)] * len(plan)
            ratios[self.at] = fraction(self.keep)
        else:
            ratios = [
                self._cosine(self.decay, layer, len(plan)) if is_free else Fraction(1)
                for layer, is_free in enumerate(free)
            ]
        return self.with_ratios(plan, ratios).checked(where)

    def open_layers(self, plan: CachePlan, where: str) -> list[bool]:
        """Behind which layers tokens may leave: where no layer above reads keys and values from below."""
        lowest, found = len(plan), []
        for cache in reversed(plan.layers):
            found.append(cache.layer < lowest and cache.layer < len(plan) - 1)
            lowest = min(lowest, cache.layer if cache.kv_source is None else cache.kv_source)
        if not any(found):
            shared = len(plan) > 1
            raise PlanError(
                "there is no layer behind which tokens could leave: "
                + ("the layers above read keys and values from below" if shared else "the model has one layer"),
                where=where,
                fix="share layers in shorter runs" if shared else "drop entries of the cache instead (EvictKV)",
            )
        return found[::-1]

    def _check(self, layers: int, where: str) -> None:
        if self.schedule == "pyramidinfer":
            if self.keep is not None or self.bytes is not None:
                raise PlanError(
                    "the published schedule has a decay ratio, not a fraction to keep",
                    where=where,
                    fix="give decay=, or leave out schedule=",
                )
        elif (self.keep is None) == (self.bytes is None):
            raise PlanError("say how much is to stay: keep=0.45, or bytes=", where=where, fix="give one of the two")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise PlanError(f"keep must lie above 0 and not above 1, and is {self.keep}", where=where)
        if self.bytes is not None and self.bytes < 1:
            raise PlanError(f"bytes must be positive, and are {self.bytes}", where=where)
        if self.schedule == "step":
            if self.keep is None:
                raise PlanError(
                    "a step lets a fraction of the tokens go on, not a number of bytes",
                    where=where,
                    fix="give keep=0.2",
                )
            if self.at is None or not 0 <= self.at < layers - 1:
                raise PlanError(
                    f"tokens cannot leave behind layer {self.at} of {layers}",
                    where=where,
                    fix=f"give a layer from 0 to {layers - 2}",
                )
        if not 0 <= self.recent_ratio < 1:
            raise PlanError(f"recent_ratio must be at least 0 and below 1, and is {self.recent_ratio}", where=where)
        if not 0 < self.decay <= 1 or not 0 < self.thin_keep <= 1 or not 0 <= self.thin_decay <= 1:
            raise PlanError("decay, thin_keep and thin_decay are ratios from 0 to 1", where=where)
        if self.interval < 1 or self.length < 1 or self.min_context < 1:
            raise PlanError("interval, length and min_context must be at least 1", where=where)

    def _rule(self) -> Retention:
        share = fraction(self.recent_ratio)
        return Retention(
            slope=self.distance_weight,
            sinks=self.sinks,
            recent=self.max_recent if share else max(1, self.max_recent),
            recent_share=share,
            of="context",
            floor=self.min_context,
            stays=self.schedule == "pyramidinfer",
            lead=self.lead,
        )

    def with_ratios(self, plan: CachePlan, ratios: list[Fraction]) -> CachePlan:
        """The plan whose layer l passes on ratios[l] of the context that it got."""
        rule = self._rule()
        last = len(plan) - 1
        for layer, ratio in enumerate(ratios):
            if layer < last and ratio < 1:
                plan = plan.with_layer(layer, passes=replace(rule, share=ratio).check(self.describe()))
            if self.thin and plan[layer].owner and not plan[layer].window:
                held = plan[layer].keeps
                if held is not None:
                    raise PlanError(
                        f"layer {layer} drops entries of its cache already ({held})",
                        where=self.describe(),
                        fix="thin generated text, or evict entries, not both",
                    )
                stays = self._cosine(self.thin_decay, layer, len(plan))
                count = max(1, int(BLOCK * self.thin_keep * float(stays)))
                plan = plan.with_layer(layer, keeps=replace(rule, of="prompt", then="thin", thinned=count, floor=0))
        return plan

    def _cosine(self, low: float, layer: int, layers: int) -> Fraction:
        if layer % self.interval:
            return Fraction(1)
        if self.strategy == "constant":
            return fraction(low)
        return fraction(low + (1 - low) * (math.cos(math.pi * layer / layers) + 1) / 2)

    def _solved(self, plan: CachePlan, free: list[bool], where: str) -> list[Fraction]:
        """The steepest schedule whose cache is not below what was asked for."""
        whole = plan.bytes(1, self.length)
        wanted = self.keep * whole if self.keep is not None else float(self.bytes or 0)
        if wanted >= whole:
            return [Fraction(1)] * len(plan)

        def reached(ratios: list[Fraction]) -> int:
            return self.with_ratios(plan, ratios).bytes(1, self.length)

        low, high = 0.0, 1.0
        while reached(self._shape(free, high)) > wanted and high < 1e6:
            low, high = high, 4 * high
        least = reached(self._shape(free, high))
        if least > wanted * (1 + SLACK):
            raise PlanError(
                f"a prompt of {self.length} tokens takes at least {least:,} bytes, {least / whole:.1%} of {whole:,}: "
                f"the first layer computes every token, and {self.min_context} tokens of context and the latest "
                f"{self._rule().window(self.length)} stay in all",
                where=where,
                fix="ask for more, solve for a longer prompt (length=), or lower min_context and max_recent",
            )
        for _ in range(STEPS):
            middle = (low + high) / 2
            if reached(self._shape(free, middle)) > wanted:
                low = middle
            else:
                high = middle
        best = min((low, high), key=lambda a: abs(reached(self._shape(free, a)) - wanted))
        return self._shape(free, best)

    def _shape(self, free: list[bool], power: float) -> list[Fraction]:
        """Ratios between layers whose products are (1 - l / L) ** power, at the layers that prune."""
        layers = len(free)
        reach = [max(1e-9, (1 - layer / layers) ** power) for layer in range(layers + 1)]
        ratios, carried = [], 1.0
        for layer in range(layers):
            if layer % self.interval or not free[layer]:
                ratios.append(Fraction(1))
                continue
            ratios.append(min(Fraction(1), fraction(max(1e-9, reach[layer + 1] / carried))))
            carried = reach[layer + 1]
        return ratios

    # ------------------------------------------------------------------ the graph

    def rewrite(self, program: Program, context: Context) -> Rewritten:
        from kvpass.ir.check import plan_of

        finder = SiteFinder(program)
        plan = self.plan(plan_of(program))
        details: list[dict[str, Any]] = []
        changed = 0
        reached, kept = plan.reached(self.length), plan.kept(self.length)
        before = plan_of(program)
        cuts = {c.layer: c.passes for c in plan if c.passes is not None and c.passes != before[c.layer].passes}
        mark(program, finder, cuts)
        for site in finder:
            cache = plan[site.layer]
            ruled = cache.passes is not None or cache.keeps is not None
            if cache.keeps is not None and self.thin:
                if site.optional("alibi_slopes") is not None:
                    raise UnsupportedError(
                        f"layer {site.layer} knows positions by ALiBi, which thinning generated text does not count",
                        where=f"layer {site.layer} of {program.facts.family}",
                        fix="leave out thin=True",
                    )
                site.node.kwargs = {**site.node.kwargs, "keeps": str(cache.keeps)}
            changed += ruled
            details.append(
                {
                    "layer": site.layer,
                    "tokens": reached[site.layer],
                    "stored": kept.get(site.layer, 0),
                    "of": self.length,
                }
            )
        return Rewritten(changed, len(finder), details)


def mark(program: Program, finder: SiteFinder, cuts: Mapping[int, Retention]) -> None:
    """Say in the graph that only survivors go on behind these layers, in everything that crosses to the layers above.

    Raises:
        UnsupportedError: tokens cannot be taken out there, with the reason.
    """
    crossings = {}
    for layer in cuts:
        try:
            crossings[layer] = finder.crossing(layer)
        except Refusal as refusal:
            raise UnsupportedError(
                f"tokens cannot leave the residual stream behind layer {layer}: {refusal}",
                where=f"layer {layer} of {program.facts.family}",
                fix="drop tokens from the cache alone (EvictKV), which leaves the layers as they are",
            ) from refusal
    for layer in sorted(cuts, reverse=True):  # from above, so that what crosses several cuts is cut in their order
        stream = place = crossings[layer][0]
        above = reached_from([stream]) - {stream}
        for node in crossings[layer]:
            users = [u for u in node.users if u in above or u.target is PRUNE]
            with program.forward.inserting_after(place):
                place = program.forward.call_function(PRUNE, (node,), {"layer": layer, "rule": str(cuts[layer])})
            for user in users:
                user.replace_input_with(node, place)
