"""LocalGlobal: most layers read a window, and every n-th one everything (Gemma 3, 2025, arXiv 2503.19786)."""

from dataclasses import dataclass
from typing import ClassVar

from kvpass.errors import PlanError
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import Program
from kvpass.ir.sites import SiteFinder
from kvpass.passes import Context, Effect, Pass, Rewritten


@dataclass(frozen=True)
class LocalGlobal(Pass):
    """Give all layers but every n-th a window of the latest tokens; a narrower one that a layer has stays."""

    window: int
    every: int = 6
    effect: ClassVar[Effect] = Effect.LOSSY

    def plan(self, plan: CachePlan) -> CachePlan:
        where = self.describe()
        if self.window < 1 or self.every < 2:
            raise PlanError("a window and a step of at least 2 are needed", where=where, fix="window=1024, every=6")
        for cache in plan:
            if self._local(cache.layer, cache.window):
                if cache.positions:
                    raise PlanError(f"the mask of layer {cache.layer} is a table", where=where, fix="leave it out")
                plan = plan.with_layer(cache.layer, window=self.window)
        return plan.checked(where)

    def rewrite(self, program: Program, context: Context) -> Rewritten:
        sites = list(SiteFinder(program))
        local = [site for site in sites if self._local(site.layer, int(site.option("window")))]
        for site in local:
            site.node.kwargs = {**site.node.kwargs, "window": self.window}
        return Rewritten(len(local), len(sites), [{"layer": site.layer, "window": self.window} for site in local])

    def _local(self, layer: int, window: int) -> bool:
        return (layer + 1) % self.every != 0 and not 0 < window <= self.window
