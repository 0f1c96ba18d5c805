"""SlideWindow: read the first `sinks` tokens and a window of the latest ones, and forget the rest.

StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): the first tokens soak up attention that has nowhere to go, so keeping
a few of them lets a model with a window go on without end. The cache is a ring of sinks + window slots, however long
the text. What is kept: everything within the window. What is lost: what was said before it.

Positions count in one of two ways. `text`: as in the text, as the model was trained, up to as many positions as it has.
`cache`: as in the cache, so that a token is never further away than the cache is long; keys stay as they were written,
for a rotation only sees distances, and only the sinks need another query: the one rotated to position
sinks + window - 1 instead of its own. That is exact where RoPE is a rotation by an angle that grows evenly with the
position, which capture proves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from kvpass.errors import PlanError, UnsupportedError
from kvpass.ir.execute import ancestors, in_order
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import Program, Role, aten, clone_into, insert_call, merge_equal, placeholder, sweep
from kvpass.ir.sites import AttentionSite, Refusal, SiteFinder
from kvpass.passes.base import Context, Effect, Pass, Rewritten


@dataclass(frozen=True)
class SlideWindow(Pass):
    """Attend to the first tokens and the latest.

    Attributes:
        window: tokens that a layer reads besides the sinks, its own included; one number, or one per layer, where 0
            leaves a layer as it is. A window that a layer has already stays where it is narrower.
        sinks: first tokens that every windowed layer reads; one number, or one per layer.
        positions: `text` keeps the positions of the text; `cache` counts them in the cache (StreamingLLM), for text
            without end.
    """

    window: int | tuple[int, ...]
    sinks: int | tuple[int, ...] = 4
    positions: Literal["text", "cache"] = "text"

    effect: ClassVar[Effect] = Effect.LOSSY

    def __post_init__(self) -> None:
        for name in ("window", "sinks"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def plan(self, plan: CachePlan) -> CachePlan:
        where = self.describe()
        for layer, (window, sinks) in enumerate(self._per_layer(len(plan))):
            cache = plan[layer]
            if window == 0:
                continue
            if window < 0 or sinks < 0:
                raise PlanError(f"layer {layer}: window {window} and sinks {sinks} must not be negative", where=where)
            if cache.positions:
                raise PlanError(
                    f"the mask of layer {layer} is a table ({cache.positions}), which a window cannot be added to",
                    where=where,
                    fix="leave that layer as it is: window=(…, 0, …)",
                )
            if cache.cache_positions:
                raise PlanError(f"layer {layer} already counts positions in its cache", where=where, fix="slide once")
            if cache.window and cache.window <= window:
                window = cache.window
            plan = plan.with_layer(
                layer, window=window, sinks=sinks, cache_positions=self.positions == "cache" and sinks > 0
            )
        for owner in plan.owners():
            ways = {c.cache_positions for c in plan.readers(owner)}
            if len(ways) > 1:
                raise PlanError(
                    f"layers that read layer {owner} would count positions differently",
                    where=where,
                    fix="give all layers that share a window, or use positions='text'",
                )
        return plan.checked(where)

    def _per_layer(self, layers: int) -> list[tuple[int, int]]:
        lists = []
        for name in ("window", "sinks"):
            value = getattr(self, name)
            if isinstance(value, int):
                lists.append([value] * layers)
            elif len(value) == layers:
                lists.append(list(value))
            else:
                raise PlanError(
                    f"{name} lists {len(value)} layers, the model has {layers}", fix="give one number per layer"
                )
        if not any(lists[0]):
            raise PlanError("no layer gets a window", where=self.describe(), fix="give a window of at least 1")
        return list(zip(*lists, strict=True))

    def rewrite(self, program: Program, context: Context) -> Rewritten:
        finder = SiteFinder(program)
        details: list[dict[str, Any]] = []
        changed = 0
        per_layer = self._per_layer(len(finder))
        if self.positions == "cache":
            for site in finder:
                if all(per_layer[site.layer]):
                    check_rotation(site)
        for site in finder:
            window, sinks = per_layer[site.layer]
            if window:
                before = int(site.option("window"))
                window = before if 0 < before <= window else window
                site.node.kwargs = {**site.node.kwargs, "window": window, "sinks": sinks}
                if self.positions == "cache" and sinks:
                    site.set_optional("sink_q", _query_at(program, site, sinks + window - 1))
                changed += 1
            details.append({"layer": site.layer, "window": window, "sinks": sinks})
        sweep(program.forward)
        merge_equal(program.forward)
        return Rewritten(changed, len(per_layer), details)


def check_rotation(site: AttentionSite) -> None:
    """Queries and keys must know positions by rotation alone: then a distance is all that counts.

    Raises:
        UnsupportedError: they know them otherwise, or it cannot be shown.
    """
    try:
        query, key = site.path("q").rotary, site.path("k").rotary
    except Refusal as refusal:
        raise UnsupportedError(
            f"how layer {site.layer} knows positions cannot be shown: {refusal}",
            where=f"layer {site.layer}",
            fix="use positions='text'",
        ) from refusal
    if site.optional("alibi_slopes") is not None or not key.pairs or query.pairs != key.pairs:
        raise UnsupportedError(
            f"layer {site.layer} does not know positions by RoPE, so they cannot be counted in the cache",
            where=f"layer {site.layer} of {site.finder.program.facts.family}",
            fix="use positions='text'",
        )


def _between(starts: list[fx.Node], end: fx.Node) -> list[fx.Node]:
    """What depends on `starts` and `end` is made from, in order."""
    reached = set(starts)
    found = []
    for node in in_order(ancestors([end], starts)):
        if node not in reached and any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            found.append(node)
    return found


def _query_at(program: Program, site: AttentionSite, most: int) -> fx.Node:
    """The queries as they are at position min(t, most): a copy of their path that reads its tables there."""
    graph = program.forward
    path = site.path("q")
    finder = site.finder
    small, large = program.shapes("forward", 2, 5), program.shapes("forward", 3, 7)
    ids = placeholder(graph, "input_ids")
    mapping: dict[fx.Node, fx.Node] = {}
    inside = set(path.nodes)
    for node in path.nodes:
        for source in node.all_input_nodes:
            if source in inside or source in mapping or finder.roles[source] != Role.POSITION:
                continue
            axes = [i for i, p in enumerate(zip(small[source].shape, large[source].shape, strict=True)) if p == (5, 7)]
            counts = finder.position_sources([source])
            if len(axes) == 1 and counts:  # what numbers the tokens stops counting
                held = {n: insert_call(graph, site.node, aten.clamp.default, n, None, most) for n in counts}
                reached = _between(counts, source)
                mapping[source] = clone_into(graph, reached, dict(held), site.node)[source]
            elif len(axes) == 1:  # rows of a table by position
                length = insert_call(graph, site.node, aten.sym_size.int, ids, 1)
                steps = insert_call(graph, site.node, aten.arange.default, length, device=torch.device("cpu"))
                place = insert_call(graph, site.node, aten.clamp.default, steps, None, most)
                mapping[source] = insert_call(graph, site.node, aten.index_select.default, source, axes[0], place)
            elif axes:
                raise UnsupportedError(
                    "queries read a table with two token axes, so their positions cannot be counted in the cache",
                    where=f"layer {site.layer}: {source.name}",
                    fix="use positions='text'",
                )
    with graph.inserting_before(site.node):
        for node in in_order(path.nodes):
            mapping[node] = graph.node_copy(node, lambda n: mapping.get(n, n))
    return mapping[path.target]
