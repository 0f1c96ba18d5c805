"""PageKV: keep the cache in pages of a few tokens, with a table per sequence.

PagedAttention (Kwon et al. 2023, arXiv 2309.06180): memory is taken page by page as sequences grow, so almost none is
held for nothing; sequences that begin alike share pages until they part (copy on write); and sequences join and leave a
running batch (`Transformed.engine`). A layout pass: what is computed stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvpass.errors import PlanError
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import Program
from kvpass.passes.base import Context, Effect, Pass, Rewritten


@dataclass(frozen=True)
class PageKV(Pass):
    """Page the cache.

    Attributes:
        page: tokens per page.
    """

    page: int = 16

    effect: ClassVar[Effect] = Effect.LAYOUT

    def plan(self, plan: CachePlan) -> CachePlan:
        where = self.describe()
        if not 1 <= self.page <= 1024:
            raise PlanError(f"a page of {self.page} tokens", where=where, fix="choose from 1 to 1024; 16 is usual")
        if any(c.page for c in plan):
            raise PlanError("the cache is paged already", where=where, fix="page once")
        for layer in plan:
            plan = plan.with_layer(layer.layer, page=self.page)
        return plan.checked(where)

    def rewrite(self, program: Program, context: Context) -> Rewritten:
        program.page_size = self.page
        return Rewritten(program.facts.layers, program.facts.layers)
