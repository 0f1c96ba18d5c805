"""ShareLayers: let layers read the keys and values of another layer, and keep none of their own.

One list says everything: `kv_source[i]` is the layer whose keys and values layer i reads. CLA (Brandon et al. 2024,
arXiv 2405.12981), YOCO (Sun et al. 2024, arXiv 2405.05254) and the bottom configurations point downward: a rewire of
the graph. LCKV (Wu and Tu 2024, arXiv 2405.10637) and its relatives (Wu et al. 2025, arXiv 2410.14442) also point
upward: layer i then reads what a layer above it computes, strictly before its own token, and a prompt is read in
several passes (`kvpass.ir.fixpoint`). What is kept: query heads, every other weight, one token per step of decoding.
What is lost: the readers' own keys and values, their projections and their cache. Without healing that costs much,
upward edges most; `kvpass eval --scan-sharing` measures it edge by edge.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from kvpass.errors import PlanError, UnsupportedError
from kvpass.ir.execute import ancestors
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import FEEDBACK, Program, aten, insert_call, placeholder, sweep
from kvpass.ir.sites import AttentionSite, Refusal, SiteFinder
from kvpass.passes.align_heads import align
from kvpass.passes.base import Context, Effect, Pass, Rewritten
from kvpass.passes.group_heads import weight_name
from kvpass.passes.split_projections import FACT

Target = Literal["bottom", "middle", "top"]
SPELLINGS = "cla:N, yoco, lckv:W, pizza-bottom:L, sandwich-middle:L, lasagna-top:L (L owners), or 0_1_1_3"


@dataclass(frozen=True)
class Sources:
    """A reading of `kv_source`: the list, which layers were marked as sliding, and whether upward edges were asked for
    by name."""

    layers: tuple[int, ...]
    sliding: tuple[int, ...] = ()
    upward: bool = False


@dataclass(frozen=True)
class ShareLayers(Pass):
    """Share keys and values between layers.

    Attributes:
        kv_source: per layer the layer it reads; or words: `cla:N` (groups of N read their lowest layer), `yoco` (the
            upper half reads one layer), `lckv:W` (W warm-up layers, the rest reads the top of the middle),
            `pizza|sandwich|lasagna[-bottom|-middle|-top]:L` (L owners; bottom by default); or the list as `0_1_1_3`,
            where a number followed by s marks a layer with a sliding window.
        init: an owner keeps its own projections (`copy`), or takes the mean over all layers that read it (`mean`).
        align: adapt each reader's query heads and W_O to the keys and values that it gets, fitted to calibration text
            (`kvpass.passes.align_heads`).
        upward: allow edges to a layer above. Names that say so (`lckv`, `-middle`, `-top`) need no permission.
        strict: which layers do not read their own token: `readers` of a layer above, or `all` (the models of the LCKV
            paper).
        window: the sliding window of layers marked with s, their own token included.
        passes: at most so many passes over a prompt where there are upward edges; 0 for as many as it takes, which is
            never more than it has tokens.
        tolerance: keys and values stand still when none changes by more.
        fallback: where `passes` are not enough, read the prompt token by token, which is exact, instead of keeping what
            the last pass gave.
    """

    kv_source: tuple[int, ...] | str
    init: Literal["copy", "mean"] = "copy"
    align: bool = False
    upward: bool = False
    strict: Literal["readers", "all"] = "readers"
    window: int = 0
    passes: int = 0
    tolerance: float = 1e-5
    fallback: bool = True

    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[frozenset[str]] = frozenset({FACT})

    def __post_init__(self) -> None:
        if isinstance(self.kv_source, list):
            object.__setattr__(self, "kv_source", tuple(self.kv_source))

    @property
    def needs_calibration(self) -> bool:
        return self.align

    def plan(self, plan: CachePlan) -> CachePlan:
        sources = read_sources(self.kv_source, len(plan))
        where = self.describe()
        if self.passes < 0 or self.tolerance < 0:
            raise PlanError("passes and tolerance must not be negative", where=where)
        shared = [c.layer for c in plan if not c.owner]
        if shared:
            raise PlanError(
                f"layers {shared} already read another layer's keys and values", where=where, fix="share layers once"
            )
        if sources.sliding and self.window < 1:
            raise PlanError(
                "the list marks layers with s, a sliding window, and no window is given", where=where, fix="window=1024"
            )
        if self.window and not sources.sliding:
            raise PlanError("a window is given and the list marks no layer with s", where=where, fix="write 0_1s_1s_3")
        if any(c.format.layout == "static" for c in plan):
            raise PlanError(
                "keys and values are scaled per layer already, for a quantized cache",
                where=where,
                fix="share layers before QuantizeKV",
            )
        for layer, source in enumerate(sources.layers):
            if sources.layers[source] != source:
                raise PlanError(
                    f"layer {layer} is to read layer {source}, which reads layer {sources.layers[source]} and keeps "
                    "nothing",
                    where=where,
                    fix=f"let layer {layer} read layer {sources.layers[source]}",
                )
            if source > layer and not (self.upward or sources.upward):
                raise PlanError(
                    f"layer {layer} is to read layer {source} above it: a prompt then takes several passes",
                    where=where,
                    fix="choose a layer below it, or upward=True",
                )
            _same_shape(plan, layer, source, where)
        for layer, source in enumerate(sources.layers):
            if layer in sources.sliding:
                plan = plan.with_layer(layer, window=self._window(plan[layer].window))
            if source != layer:
                plan = plan.with_layer(layer, kv_source=source, format=plan[source].format)
        return plan.checked(where)

    def _window(self, before: int) -> int:
        """The window of a layer marked with s: a narrower one stays."""
        return min(before, self.window) if before else self.window

    def rewrite(self, program: Program, context: Context) -> Rewritten:
        finder = SiteFinder(program)
        sources = read_sources(self.kv_source, len(finder))
        sites = list(finder)
        for site in sites:
            same_rotation(site, sites[sources.layers[site.layer]])
        aligned: dict[int, dict[str, Any]] = {}
        if self.align:
            records = align(program, sources.layers, context, turning=self.init == "mean")
            aligned = {record["layer"]: record for record in records}
            sites = list(SiteFinder(program))
        if self.init == "mean":
            for owner in sorted(set(sources.layers)):
                readers = [sites[i] for i, source in enumerate(sources.layers) if source == owner]
                if len(readers) > 1:
                    _average(program, sites[owner], readers)
        sites = list(SiteFinder(program))
        feedback: dict[tuple[int, str], fx.Node] = {}
        details: list[dict[str, Any]] = []
        for site in sites:
            source = sources.layers[site.layer]
            owning = sites[source]
            options: dict[str, Any] = {}
            if source > site.layer:
                operands = [self._feedback(program, owning, part, feedback) for part in ("k", "v")]
            else:
                operands = [owning.k, owning.v]
            if source > site.layer or self.strict == "all":
                options["strict"] = True
            if site.layer in sources.sliding:
                options["window"] = self._window(int(site.option("window")))
            site.node.args = (site.node.args[0], *operands, *site.node.args[3:])
            site.node.kwargs = {**site.node.kwargs, **options, "kv_format": owning.option("kv_format")}
            details.append(
                {"layer": site.layer, "kv_source": source, "window": int(site.option("window"))}
                | aligned.get(site.layer, {})
            )
        sweep(program.forward)
        changed = sum(i != s or i in sources.sliding or self.strict == "all" for i, s in enumerate(sources.layers))
        return Rewritten(changed, len(sites), details)

    def _feedback(
        self, program: Program, owner: AttentionSite, part: str, made: dict[tuple[int, str], fx.Node]
    ) -> fx.Node:
        key = (owner.layer, part)
        if key not in made:
            ids = placeholder(program.forward, "input_ids")
            with program.forward.inserting_after(ids):
                made[key] = program.forward.call_function(
                    FEEDBACK,
                    (ids,),
                    {
                        "layer": owner.layer,
                        "part": part,
                        "kv_heads": owner.kv_heads,
                        "dim": owner.head_dim if part == "k" else owner.value_dim,
                        "dtype": owner.kv_dtype,
                        "passes": self.passes,
                        "tolerance": self.tolerance,
                        "fallback": self.fallback,
                    },
                )
        return made[key]


# ---------------------------------------------------------------------- what kv_source says


def read_sources(kv_source: Sequence[int] | str, layers: int) -> Sources:
    """Which layer each of `layers` layers reads.

    Raises:
        PlanError: the list has another length, names a layer that does not exist, or the words are none.
    """
    if not isinstance(kv_source, str):
        return Sources(_checked(list(kv_source), layers))
    text = kv_source.strip().lower()
    if re.fullmatch(r"\d+s?(_\d+s?)*", text):
        words = text.split("_")
        found = _checked([int(w.rstrip("s")) for w in words], layers)
        return Sources(found, tuple(i for i, w in enumerate(words) if w.endswith("s")))
    match = re.fullmatch(r"(cla|lckv):(\d+)|(yoco)|(pizza|sandwich|lasagna)(?:-(bottom|middle|top))?:(\d+)", text)
    if match is None:
        raise PlanError(f"kv_source {kv_source!r} is no list of layers and no known word", fix=f"write {SPELLINGS}")
    short, count, yoco, partition, target, owners = match.groups()
    if short == "cla":
        size = _between(int(count), 1, layers, kv_source)
        return Sources(tuple(i - i % size for i in range(layers)))
    if short == "lckv":
        return Sources(_shared(layers, _between(int(count) + 1, 1, layers, kv_source), "sandwich", "top"), upward=True)
    if yoco:
        return Sources(_shared(layers, layers // 2 + 1, "pizza", "bottom"))
    count = _between(int(owners), 1, layers, kv_source)
    return Sources(_shared(layers, count, partition, target or "bottom"), upward=target in ("middle", "top"))


def _shared(layers: int, owners: int, partition: str, target: str) -> tuple[int, ...]:
    """A partition into owners and the one group (pizza, sandwich) or the groups (lasagna) that share."""
    if partition == "lasagna":
        size = layers // owners
        edges = [g * size for g in range(owners)] + [layers]
    else:
        below = owners - 1 if partition == "pizza" else math.ceil((owners - 1) / 2)
        above = 0 if partition == "pizza" else owners - 1 - below
        edges = [*range(below + 1), *range(layers - above, layers + 1)]
    found = []
    for low, high in itertools.pairwise(edges):
        place = {"bottom": low, "middle": (low + high - 1) // 2, "top": high - 1}[target]
        found += [place] * (high - low)
    return tuple(found)


def _between(value: int, low: int, high: int, text: str) -> int:
    if not low <= value <= high:
        raise PlanError(f"kv_source {text!r} does not fit a model of {high} layers", fix=f"write {SPELLINGS}")
    return value


def _checked(found: list[int], layers: int) -> tuple[int, ...]:
    if len(found) != layers:
        raise PlanError(
            f"kv_source lists {len(found)} layers, the model has {layers}",
            fix="give one source per layer, counted from 0",
        )
    for layer, source in enumerate(found):
        if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source < layers:
            raise PlanError(f"kv_source of layer {layer} is {source!r}", fix=f"choose from 0 .. {layers - 1}")
    return tuple(found)


# ---------------------------------------------------------------------- what may share


def _same_shape(plan: CachePlan, layer: int, source: int, where: str) -> None:
    reader, owner = plan[layer], plan[source]
    for name in ("heads", "kv_heads", "key_dim", "value_dim", "dtype"):
        if name != "heads" and getattr(reader, name) != getattr(owner, name):
            raise PlanError(
                f"layer {layer} has {name} {getattr(reader, name)}, layer {source} has {getattr(owner, name)}",
                where=where,
                fix="share between layers of one shape",
            )
    if reader.cache_positions != owner.cache_positions:
        raise PlanError(
            f"layers {layer} and {source} count positions differently", where=where, fix="slide all layers in one way"
        )


def same_rotation(reader: AttentionSite, owner: AttentionSite) -> None:
    """The reader's queries must be turned as the owner's keys are.

    Raises:
        UnsupportedError: they are turned otherwise, or it cannot be shown.
    """
    if reader.layer == owner.layer:
        return
    try:
        mine, theirs = (s.path("k").rotary for s in (reader, owner))
    except Refusal as refusal:
        raise UnsupportedError(
            f"whether layers {reader.layer} and {owner.layer} rotate keys alike cannot be shown: {refusal}",
            where=f"layer {reader.layer}",
            fix="`kvpass inspect` shows what was found",
        ) from refusal
    near = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(mine.frequency, theirs.frequency, strict=False))
    if (mine.pairs, mine.free) != (theirs.pairs, theirs.free) or not near:
        raise UnsupportedError(
            f"layers {reader.layer} and {owner.layer} rotate keys differently (RoPE)",
            where=f"layer {reader.layer} of {reader.finder.program.facts.family}",
            fix="share between layers with the same RoPE",
        )


# ---------------------------------------------------------------------- init


def _average(program: Program, owner: AttentionSite, readers: Sequence[AttentionSite]) -> None:
    """Give an owner the mean of its readers' key and value projections (MLKV, Zuhri et al. 2024, arXiv 2406.09297)."""
    graph = program.forward
    for operand in ("k", "v"):
        paths = [r.path(operand) for r in readers]
        mine = owner.path(operand)
        if any(p.row_count != mine.row_count or not torch.equal(p.rows, mine.rows) for p in paths):
            raise UnsupportedError(
                f"the {operand} projections of the layers that read layer {owner.layer} are laid out differently",
                where=f"layer {owner.layer}",
                fix='use init="copy"',
            )
        for part in ("weight", "bias"):
            nodes = [getattr(p.projection, part) for p in paths]
            own = getattr(mine.projection, part)
            if all(n is None for n in nodes):
                continue
            if any(n is None for n in nodes):
                raise UnsupportedError(
                    f"some of the layers that read layer {owner.layer} have a {operand} {part} and some have none",
                    where=f"layer {owner.layer}",
                    fix='use init="copy"',
                )
            inside = ancestors([mine.projection.node], [mine.projection.x])
            users = [u for u in own.users if u in inside]
            before = min(users)
            copies = [_before(graph, n, before) for n in nodes]
            total = copies[0]
            for node in copies[1:]:
                total = insert_call(graph, before, aten.add.Tensor, total, node)
            mean = insert_call(graph, before, aten.div.Tensor, total, len(copies))
            mean.meta["weight_name"] = weight_name(own)
            for user in users:
                user.replace_input_with(own, mean)


def _before(graph: fx.Graph, node: fx.Node, before: fx.Node) -> fx.Node:
    """A copy of a weight expression, which may stand later in the graph, before a node."""
    made: dict[fx.Node, fx.Node] = {}

    def copy(current: fx.Node) -> fx.Node:
        if current not in made:
            inputs = {n: copy(n) for n in current.all_input_nodes}
            with graph.inserting_before(before):
                made[current] = graph.node_copy(current, lambda n: inputs[n])
        return made[current]

    return copy(node)
