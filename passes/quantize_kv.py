"""QuantizeKV: store keys and values in 8, 4 or 2 bits.

`token` layout: one scale (and minimum, below 8 bits) per token and head, as serving engines do it. `kivi` (Liu et al.
2024, arXiv 2402.02750): keys per channel in groups of tokens, for their outliers stay in the same channels; values per
token; the latest tokens in full precision. `static`: one scale per head and channel, fixed on calibration text, as
runtimes want it that have no room for scales in their caches (ONNX Runtime); keys and values are divided by their
scales before they are stored, and queries and outputs multiplied by them, so that what is stored is whole numbers.
`fp8` stores e4m3 with a scale per token and head. What is kept: everything else, weights included. What is lost is
measured: queries of every entry, `forward` too, read keys and values as the cache would give them back.
`kvpass.ir.kv_format` has the formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from kvpass.errors import PlanError
from kvpass.ir.kv_format import KVFormat
from kvpass.ir.plan import CachePlan, LayerCache
from kvpass.ir.program import Program, aten, insert_call
from kvpass.ir.sites import AttentionSite, SiteFinder
from kvpass.ir.staged import Staged
from kvpass.passes.base import Context, Effect, Pass, Rewritten

CLIPS = tuple(round(0.3 + 0.05 * i, 2) for i in range(15))  # of a channel's largest magnitude: where codes may end


@dataclass(frozen=True)
class QuantizeKV(Pass):
    """Quantize the cache.

    Attributes:
        bits: 8, 4 or 2.
        kind: integer codes, or `fp8` (e4m3, 8 bits).
        layout: `token`, `kivi`, `static` (8 or 4 bits; needs calibration text), or `auto`: kivi below 8 bits where the
            plan allows it, else token.
        group: tokens per group of keys (kivi).
        residual: latest tokens in full precision (kivi); a multiple of `group`.
    """

    bits: int = 8
    kind: Literal["int", "fp8"] = "int"
    layout: Literal["auto", "token", "kivi", "static"] = "auto"
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
        return KVFormat(self.kind, self.bits, layout)

    @property
    def needs_calibration(self) -> bool:
        return self.layout == "static"

    def plan(self, plan: CachePlan) -> CachePlan:
        where = self.describe()
        fmt = self.format(plan)
        for layer in plan:
            self.check_layer(layer, fmt)
            plan = plan.with_layer(layer.layer, format=fmt)
        return plan.checked(where)

    def check_layer(self, layer: LayerCache, fmt: KVFormat) -> None:
        """What one layer's cache must be for a format.

        Raises:
            PlanError: it is not, with the reason.
        """
        where = self.describe()
        if not layer.format.full:
            raise PlanError(f"layer {layer.layer} is quantized already ({layer.format})", where=where, fix="once")
        fmt.check_dim(layer.key_dim)
        fmt.check_dim(layer.value_dim)
        if fmt.layout == "static" and layer.upward:
            raise PlanError(
                f"layer {layer.layer} reads a layer above it in several passes, and scales are calibrated in one",
                where=where,
                fix='quantize per token: layout="token"',
            )

    def rewrite(self, program: Program, context: Context) -> Rewritten:
        from kvpass.ir.check import plan_of

        fmt = self.format(plan_of(program))
        details: list[dict[str, Any]] = [{"layer": s.layer, "stored": str(fmt)} for s in SiteFinder(program)]
        if fmt.layout == "static":
            for detail, found in zip(details, _fix_scales(program, fmt, context), strict=True):
                detail |= found
        sites = list(SiteFinder(program))
        for site in sites:
            site.node.kwargs = {**site.node.kwargs, "kv_format": str(fmt)}
        return Rewritten(len(sites), len(sites), details)


def _fix_scales(program: Program, fmt: KVFormat, context: Context) -> list[dict[str, Any]]:
    """Divide keys and values by the scales that fit calibration text, multiply queries and outputs by them.

    Returns:
        per layer that has keys and values of its own, the relative error (root mean square) of what is stored.
    """
    original = program.copy()
    staged = Staged(original, context.batches, context.device)
    scales: dict[int, tuple[Tensor, Tensor]] = {}
    details: list[dict[str, Any]] = []
    divided: dict[fx.Node, fx.Node] = {}
    for seen, site in zip(list(SiteFinder(original)), list(SiteFinder(program)), strict=True):
        details.append({})
        owner = seen.kv_source
        if owner == seen.layer:
            context.progress(seen.layer, program.facts.layers, f"calibrating layer {seen.layer}")
            staged.advance([seen.k, seen.v])
            fitted = [fit_scale(staged.values(operand), fmt) for operand in (seen.k, seen.v)]
            for operand in (seen.k, seen.v):
                staged.forget(operand)
            scales[owner] = (fitted[0][0], fitted[1][0])
            details[-1] = {"keys_error": fitted[0][1], "values_error": fitted[1][1]}
        _divide(program, site, owner, scales[owner], divided)
    return details


def fit_scale(batches: list[Tensor], fmt: KVFormat) -> tuple[Tensor, float]:
    """The scale [Hkv, 1, D] per head and channel that loses least of keys or values [b, Hkv, T, D], and what it loses.

    Codes end at some part of a channel's largest magnitude (`CLIPS`): clipping outliers may cost less than steps that
    are wide enough for them.
    """
    top = fmt.range[1]
    most = torch.stack([b.abs().amax(dim=(0, 2)) for b in batches]).amax(0).float().unsqueeze(1)  # [Hkv, 1, D]
    most = torch.where(most > 0, most, 1.0)
    energy = sum(float(b.double().square().sum()) for b in batches)
    errors = []
    for clip in CLIPS:
        scale = most * (clip / top)
        errors.append(sum(_error(b.float(), scale, fmt).double().sum(dim=(0, 2)) for b in batches))  # [Hkv, D]
    least, which = torch.stack([torch.as_tensor(e) for e in errors]).min(0)
    scale = most * torch.tensor(CLIPS, device=most.device)[which].unsqueeze(1) / top
    return scale.cpu(), (float(least.sum()) / max(energy, 1e-300)) ** 0.5


def _error(x: Tensor, scale: Tensor, fmt: KVFormat) -> Tensor:
    return ((x / scale).round().clamp(*fmt.range) * scale - x).square()


def _divide(
    program: Program, site: AttentionSite, owner: int, scales: tuple[Tensor, Tensor], divided: dict[fx.Node, fx.Node]
) -> None:
    graph, node = program.forward, site.node
    group, dtype = site.heads // site.kv_heads, site.kv_dtype

    def weight(name: str, tensor: Tensor) -> fx.Node:
        full = program.add_weight(f"layers.{site.layer}.{name}", tensor.to(dtype), constant=True)
        with graph.inserting_before(node):
            return graph.get_attr(full)

    q, k, v, twin = site.q, site.k, site.v, site.optional("sink_q")
    for name, operand, scale in (("k_scale", k, scales[0]), ("v_scale", v, scales[1])):
        if operand not in divided:
            divided[operand] = insert_call(graph, node, aten.div.Tensor, operand, weight(name, scale))
    key, value = (scale.repeat_interleave(group, dim=0) for scale in scales)
    queries = weight("q_scale", key)
    arguments = [insert_call(graph, node, aten.mul.Tensor, q, queries), divided[k], divided[v]]
    node.args = (*arguments, *node.args[3:])
    if twin is not None:
        site.set_optional("sink_q", insert_call(graph, node, aten.mul.Tensor, twin, queries))
    outputs = weight("o_scale", value)
    with graph.inserting_after(node):
        scaled = graph.call_function(aten.mul.Tensor, (node, outputs))
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
