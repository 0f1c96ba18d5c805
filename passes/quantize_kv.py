"""QuantizeKV: store keys and values in 8, 4 or 2 bits.

`token` layout: one scale (and minimum, below 8 bits) per token and head, as serving engines do it. `kivi` (Liu et al.
2024, arXiv 2402.02750): keys per channel in groups of tokens, for their outliers stay in the same channels; values per
token; the latest tokens in full precision. `fp8` stores e4m3 with a scale per token and head. What is kept: everything
else, weights included. What is lost is measured: queries of every entry, `forward` too, read keys and values as the
cache would give them back. `kvpass.ir.kv_format` has the formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvpass.errors import PlanError
from kvpass.ir.kv_format import KVFormat
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import Program
from kvpass.ir.sites import SiteFinder
from kvpass.passes.base import Context, Effect, Pass, Rewritten


@dataclass(frozen=True)
class QuantizeKV(Pass):
    """Quantize the cache.

    Attributes:
        bits: 8, 4 or 2.
        kind: integer codes, or `fp8` (e4m3, 8 bits).
        layout: `token`, `kivi`, or `auto`: kivi below 8 bits where the plan allows it, else token.
        group: tokens per group of keys (kivi).
        residual: latest tokens in full precision (kivi); a multiple of `group`.
    """

    bits: int = 8
    kind: Literal["int", "fp8"] = "int"
    layout: Literal["auto", "token", "kivi"] = "auto"
    group: int = 32
    residual: int = 32

    effect: ClassVar[Effect] = Effect.LOSSY

    def format(self, plan: CachePlan) -> KVFormat:
        """The format that the stores of a plan get.

        Raises:
            PlanError: there is no such format.
        """
        layout = self.layout
        if layout == "auto":
            plain = not any(c.page or plan.layout(owner).window for owner in plan.owners() for c in [plan[owner]])
            layout = (
                "kivi"
                if self.kind == "int" and self.bits < 8 and plain and not plan.upward and not plan.selective
                else "token"
            )
        if layout == "kivi":
            return KVFormat(self.kind, self.bits, "kivi", self.group, self.residual)
        return KVFormat(self.kind, self.bits)

    def plan(self, plan: CachePlan) -> CachePlan:
        where = self.describe()
        fmt = self.format(plan)
        for layer in plan:
            if not layer.format.full:
                raise PlanError(f"layer {layer.layer} is quantized already ({layer.format})", where=where, fix="once")
            fmt.check_dim(layer.key_dim)
            fmt.check_dim(layer.value_dim)
            plan = plan.with_layer(layer.layer, format=fmt)
        return plan.checked(where)

    def rewrite(self, program: Program, context: Context) -> Rewritten:
        from kvpass.ir.check import plan_of

        fmt = str(self.format(plan_of(program)))
        sites = list(SiteFinder(program))
        for site in sites:
            site.node.kwargs = {**site.node.kwargs, "kv_format": fmt}
        return Rewritten(len(sites), len(sites), [{"layer": s.layer, "stored": fmt} for s in sites])
