"""What a pass finds at each layer of a model: matched by which evidence, or missed, where, and by how little.

`explain` asks the functions that passes ask themselves: the proofs of `kvpass.ir.sites`, the masks that capture fitted,
and each pass's own conditions. A layer is judged alone, also where a pass refuses a whole model because of one layer:
the others then say that it is not because of them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, fx

from kvpass.capture import Source, Survey, capture, survey
from kvpass.capture.probe import Mask, fit_mask_argument
from kvpass.errors import CaptureError, KvpassError, PlanError, RequestError
from kvpass.ir.check import plan_of
from kvpass.ir.fold import fold_weights
from kvpass.ir.plan import CachePlan, LayerCache
from kvpass.ir.program import Program, sweep
from kvpass.ir.sites import AttentionSite, Norm, Path, Refusal, Rotary, SiteFinder, source_of
from kvpass.output import holds_program
from kvpass.passes.evict_kv import EvictKV
from kvpass.passes.group_heads import GroupHeads, basis_of, rewire, weight_name
from kvpass.passes.page_kv import PageKV
from kvpass.passes.prune_pyramid import PrunePyramid
from kvpass.passes.quantize_kv import QuantizeKV
from kvpass.passes.raise_rotary import raise_rotary
from kvpass.passes.share_layers import ShareLayers, same_rotation
from kvpass.passes.slide_window import SlideWindow, check_rotation
from kvpass.passes.split_projections import split_site

if TYPE_CHECKING:
    from kvpass.passes.lower_attention import Lowered
    from kvpass.runtime.transformed import Transformed

PROBED = 24  # positions for which RoPE is raised here; how many makes no difference to whether it can be


@dataclass(frozen=True)
class Fact:
    """Something that was proved: its name ("mask", "k rows") and what was found."""

    name: str
    value: str


@dataclass(frozen=True)
class Explanation:
    """What a pass finds at one layer.

    Attributes:
        layer: its number in the model.
        matched: whether the pass can do its work there.
        evidence: what was proved, in the order in which it was asked.
        failed: for a miss, the first check that failed: the name of a fact that could not be shown; "capture" where
            the model's attention was not understood; "plan" for a wish that the cache cannot meet; "pass" for a
            condition of the pass itself.
        reason: what was expected and what was found.
        node: in the captured graph, by name; of a layer that torch.export refused, the module.
        source: `file.py:line function: code`, that node's line in the model's code.
        near_miss: what came nearest to a match, and by how much it missed.
        remedy: what to change.
    """

    layer: int
    matched: bool
    evidence: tuple[Fact, ...] = ()
    failed: str = ""
    reason: str = ""
    node: str = ""
    source: str = ""
    near_miss: str = ""
    remedy: str = ""


def explain(source: Source | Transformed, name: str, layer: int | None = None) -> list[Explanation]:
    """What a pass finds at each layer, or at one; no weight is read.

    A model that capture refuses because of some layers is explained, too, where these can be told. If torch.export
    gives up at a layer, that layer alone is.

    Args:
        source: a folder or hub id of a Hugging Face model, an `nn.Module`, a folder that kvpass saved, or a
            `Transformed`.
        name: of a pass as in recipes, or `lower-attention` (which kernels run) or `raise-rotary` (RoPE as one op).
        layer: one layer alone.

    Raises:
        RequestError: there is no such pass or layer.
        CaptureError: the model cannot be captured, for a reason that is no layer's.
    """
    check_name(name)
    try:
        # in float32, for proofs finer than bfloat16 resolves; which kernels run is a matter of the checkpoint's dtype
        seen = _seen(source, None if name == "lower-attention" else torch.float32)
    except CaptureError as error:
        if error.layer is None or layer not in (None, error.layer):
            raise
        return [_refused(error.layer, error, ())]
    if layer is not None and layer not in seen.numbers:
        raise RequestError(
            f"there is no layer {layer}", where="--layer", fix=f"the model has {len(seen.numbers)} layers"
        )
    found = {e.layer: e for e in _explained(seen, name, layer)}
    return [found[n] for n in seen.numbers if layer is None or n == layer]


def check_name(name: str) -> None:
    """Refuse a name that nothing explains, before a model is opened."""
    if name not in EXPLAINED:
        raise RequestError(f"there is no pass {name!r} to explain", where="--pass", fix=f"give {', '.join(EXPLAINED)}")


# ---------------------------------------------------------------------- what is asked


@dataclass
class _Seen:
    """A model to ask, with what several layers share."""

    program: Program
    refused: dict[int, CaptureError]
    layers: tuple[int, ...]  # the model's number of each of the program's layers
    finder: SiteFinder = field(init=False)
    plan: CachePlan = field(init=False)

    def __post_init__(self) -> None:
        self.finder = SiteFinder(self.program)
        self.plan = plan_of(self.program)

    @property
    def numbers(self) -> list[int]:
        """All layers of the model, those without attention included."""
        return sorted({*self.layers, *self.refused})

    def mask(self, site: AttentionSite) -> Mask | None:
        """The fitted mask; None where the op says all of it."""
        found = self.program.evidence.get(site.layer, {}).get("mask")
        node = site.optional("mask")
        if found is None and node is not None:  # a saved program: the proof is made again
            found = fit_mask_argument(self.finder, node, site.layer, self.program.facts.max_positions)
        return found if isinstance(found, Mask) else None


def _seen(source: Source | Transformed, dtype: torch.dtype | None) -> _Seen:
    program = getattr(source, "program", None)
    if isinstance(program, Program):
        return _whole(program)
    if not isinstance(source, torch.nn.Module) and holds_program(source):
        from kvpass.export.program_folder import load

        return _whole(load(source, device="cpu").program)
    try:
        return _whole(capture(source, dtype, weights=False))
    except CaptureError as error:
        if not error.captured:
            raise
        found: Survey = survey(source, dtype)
        if not found.refused:
            raise
        return _Seen(found.program, found.refused, found.layers)


def _whole(program: Program) -> _Seen:
    return _Seen(program, {}, tuple(range(program.facts.layers)))


Verdict = Callable[[AttentionSite], "dict[str, str] | None"]
"""Asks a pass about one site: raises Refusal or KvpassError, or returns facts to add."""


def _explained(seen: _Seen, name: str, only: int | None) -> Iterator[Explanation]:
    facts, prepare = EXPLAINED[name]
    verdict = prepare(seen)
    for site in seen.finder:
        number = seen.layers[site.layer]
        if only is None or number == only:
            yield _explanation(seen, site, number, facts, verdict)
    for number, error in seen.refused.items():
        if number not in seen.layers:
            yield _refused(number, error, ())


def _explanation(seen: _Seen, site: AttentionSite, number: int, facts: Iterable[str], verdict: Verdict) -> Explanation:
    shown: list[Fact] = []
    missed: dict[str, str] = {}  # what cannot be shown, and why
    error = seen.refused.get(number)
    for name in facts:
        if error is not None and name in ("mask", "scores"):  # what stands in for the refused attention says nothing
            continue
        try:
            shown.append(Fact(name, FACTS[name](seen, site)))
        except Refusal as refusal:
            missed[name] = refusal.reason
    if error is not None:
        return _refused(number, error, tuple(shown))
    try:
        more = verdict(site) or {}
    except (Refusal, KvpassError) as problem:
        told = _miss(seen, site, problem)
        failed = next((name for name, reason in missed.items() if reason == told.reason), told.failed)
        return replace(told, layer=number, evidence=tuple(shown), failed=failed)
    shown += [Fact(name, f"not shown, and not needed: {reason}") for name, reason in missed.items()]
    return Explanation(number, True, (*shown, *(Fact(*pair) for pair in more.items())))


def _refused(layer: int, error: CaptureError, facts: tuple[Fact, ...]) -> Explanation:
    return Explanation(
        layer, False, facts, "capture", error.what, error.node, error.source or error.where, error.near, error.fix
    )


def _miss(seen: _Seen, site: AttentionSite, problem: Exception) -> Explanation:
    """An error or a refusal as what it says of a layer."""
    refusal = problem if isinstance(problem, Refusal) else problem.__cause__
    if isinstance(refusal, Refusal):
        node = refusal.node if refusal.node is not None else site.node
        fix = refusal.fix or getattr(problem, "fix", "")
        return Explanation(-1, False, (), "pass", refusal.reason, node.name, source_of(node), refusal.near, fix)
    assert isinstance(problem, KvpassError)
    mask, node = site.optional("mask"), site.node
    near, reason = "", problem.what
    if mask is not None and seen.plan[site.layer].positions and "mask" in reason:
        fitted = seen.mask(site)
        node, near = mask, str(fitted.near) if fitted is not None else ""
        failed = "mask"
    else:
        failed = "plan" if isinstance(problem, PlanError) else "pass"
        near = str(getattr(problem, "near", ""))
    return Explanation(-1, False, (), failed, reason, node.name, source_of(node), near, problem.fix)


# ---------------------------------------------------------------------- facts


def _dims(seen: _Seen, site: AttentionSite) -> str:
    kind = str(site.kv_dtype).removeprefix("torch.")
    dims = f"{site.head_dim}" if site.head_dim == site.value_dim else f"{site.head_dim} (keys), {site.value_dim}"
    return f"{site.heads} query heads over {site.kv_heads} KV heads of {dims} channels, computed in {kind}"


def _mask(seen: _Seen, site: AttentionSite) -> str:
    fitted = seen.mask(site)
    if fitted is None:
        words = ["strict" if site.option("strict") else "causal"]
        words += [f"{name} {site.option(name)}" for name in ("window", "sinks") if site.option(name)]
        return " + ".join(words + ["ALiBi"] * (site.optional("alibi_slopes") is not None)) + ", as the op declares it"
    reach = f", tried at positions up to {fitted.tested - 1:,}" if fitted.tested else ""
    return str(fitted) + reach


def _scores(seen: _Seen, site: AttentionSite) -> str:
    words = [f"scale {float(site.option('scale')):.6g}"]
    if site.option("softcap"):
        words.append(f"soft-cap {float(site.option('softcap')):g}")
    if site.optional("sink_logits") is not None:
        words.append("a learned sink logit per head")
    if site.optional("alibi_slopes") is not None:
        words.append("ALiBi")
    return ", ".join(words)


def _rows(operand: Literal["q", "k", "v"]) -> Callable[[_Seen, AttentionSite], str]:
    def fact(seen: _Seen, site: AttentionSite) -> str:
        path = site.path(operand)
        stored = ", stored transposed" if path.projection.transposed else ""
        words = _row_words(path.rows)
        return f"{_weight_name(path.projection.weight)}: {words} of {path.row_count} rows{stored}"

    return fact


def _row_words(rows: Tensor) -> str:
    """Which rows feed heads [H, D], in words."""
    heads, dim = rows.shape
    repeat = next(r for r in range(heads, 0, -1) if heads % r == 0 and torch.equal(rows, _repeated(rows, r)))
    own = rows[::repeat]
    each = f", each for {repeat} heads" if repeat > 1 else ""
    first = int(own[0, 0])
    if torch.equal(own.flatten(), torch.arange(first, first + own.numel())):
        return f"{first}..{first + own.numel() - 1} in order of heads{each}"
    steps = own[:, 1:] - own[:, :-1]
    step = int(steps[0, 0]) if dim > 1 else 1
    strides = own[1:, 0] - own[:-1, 0]
    stride = int(strides[0]) if len(own) > 1 else 0
    if bool((steps == step).all()) and bool((strides == stride).all()):
        terms = "".join(
            f" {'-' if n < 0 else '+'} {f'{abs(n)} ' if abs(n) > 1 else ''}{index}"
            for n, index in ((stride, "h"), (step, "c"))
            if n
        )
        return f"{first}{terms} for channel c of head h{each}"
    return f"{_listed([int(r) for r in own[0]])} for head 0{each}"


def _listed(numbers: list[int], most: int = 6) -> str:
    """Numbers with runs drawn together: 0..7, 8, 10, …"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [f"{r[0]}..{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs]
    return ", ".join(shown[:most]) + (", …" if len(shown) > most else "")


def _repeated(rows: Tensor, count: int) -> Tensor:
    return rows[::count].repeat_interleave(count, dim=0)


def _output(seen: _Seen, site: AttentionSite) -> str:
    found = site.output
    name = _weight_name(found.projection.weight)
    return f"{name}: {_row_words(found.columns)} of {found.columns.numel()} columns"


def _weight_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "get_attr" else weight_name(node)


def _rope(operand: Literal["q", "k"]) -> Callable[[_Seen, AttentionSite], str]:
    def fact(seen: _Seen, site: AttentionSite) -> str:
        if operand == "k" and site.upward:
            return f"that of layer {site.kv_source}"
        path = site.path(operand)
        return _rope_words(path, path.rotary)

    return fact


def _rope_words(path: Path, rotary: Rotary) -> str:
    if not rotary.pairs:
        return "none"
    count = len(rotary.pairs)
    part = "all" if 2 * count == path.head_dim else f"{2 * count} of"
    ends = f"{rotary.frequency[0]:.4g}" + (f" to {rotary.frequency[-1]:.4g}" if count > 1 else "")
    return f"{count} pairs, {rotary.layout}, in {part} {path.head_dim} channels, frequencies {ends} per position"


def _norms(seen: _Seen, site: AttentionSite) -> str:
    found = {o: site.path(o).norm for o in ("q", "k", "v")}
    return "; ".join(f"{operand} {_norm_words(norm)}" for operand, norm in found.items())


def _norm_words(norm: Norm) -> str:
    if norm.linear:
        return "none"
    turned = "commutes" if norm.phase else "does not commute"
    return f"{'per head' if norm.per_head else 'over all heads'}, {turned} with RoPE's phase"


def _kv_source(seen: _Seen, site: AttentionSite) -> str:
    if site.kv_source == site.layer:
        readers = [seen.layers[c.layer] for c in seen.plan.readers(site.layer) if c.layer != site.layer]
        return "its own" + (f", read by layers {', '.join(map(str, readers))} too" if readers else "")
    return f"those of layer {seen.layers[site.kv_source]}"


def _stream(seen: _Seen, site: AttentionSite) -> str:
    if site.layer == len(seen.finder) - 1:
        return "no layer above it"
    first, *others = seen.finder.crossing(site.layer)
    return first.name + (f", and {', '.join(n.name for n in others)}" if others else " alone")


def _format(seen: _Seen, site: AttentionSite) -> str:
    cache = seen.plan[site.layer]
    return str(cache.format) or str(cache.dtype).removeprefix("torch.")


FACTS: dict[str, Callable[[_Seen, AttentionSite], str]] = {
    "dims": _dims,
    "mask": _mask,
    "scores": _scores,
    "q rows": _rows("q"),
    "k rows": _rows("k"),
    "v rows": _rows("v"),
    "o columns": _output,
    "RoPE of q": _rope("q"),
    "RoPE of k": _rope("k"),
    "norms": _norms,
    "keys and values": _kv_source,
    "stream": _stream,
    "stored": _format,
}
"""What can be shown of a layer; each raises Refusal where it cannot."""


# ---------------------------------------------------------------------- what each pass asks


def _split(seen: _Seen) -> tuple[Program, dict[int, Exception]]:
    """The program after SplitProjections, and the layers where that is refused."""
    program = seen.program.copy()
    refused: dict[int, Exception] = {}
    finder = SiteFinder(program)
    for layer in range(len(finder)):
        try:
            changed = bool(split_site(program, finder[layer]))
        except (Refusal, KvpassError) as problem:
            refused[layer] = problem
            changed = True  # by what was built before it was refused
        if changed:
            sweep(program.forward)
            finder = SiteFinder(program)
    return program, refused


def _ask_split(seen: _Seen) -> Verdict:
    _, refused = _split(seen)

    def verdict(site: AttentionSite) -> None:
        if site.layer in refused:
            raise refused[site.layer]

    return verdict


def _alone(cache: LayerCache) -> CachePlan:
    """A layer's cache as the plan of a model of one layer; whether it reads another one's is kept."""
    return CachePlan((replace(cache, layer=0, kv_source=None if cache.owner else 1),))


def _ask_group(seen: _Seen) -> Verdict:
    program, refused = _split(seen)
    sites = list(SiteFinder(program))

    def verdict(site: AttentionSite) -> dict[str, str]:
        GroupHeads(kv_heads=1).targets(_alone(seen.plan[site.layer]))
        if site.layer in refused:
            raise refused[site.layer]
        basis = basis_of(sites[site.layer])
        if site.kv_heads > 1:
            rewire(program, sites[site.layer], 1)
        counts = [str(n) for n in range(1, site.kv_heads + 1) if site.kv_heads % n == 0]
        freedom = [word for word, free in (("scale", basis.magnitude), ("phase", basis.phase)) if free]
        keys = f"each RoPE pair in {' and '.join(freedom)}" if freedom else "no pair: the norm stands against it"
        return {"may become": f"{', '.join(counts)} KV heads", "keys may turn": keys}

    return verdict


def _ask_share(seen: _Seen) -> Verdict:
    _, refused = _split(seen)
    sites = list(seen.finder)
    total = len(sites)

    def objection(a: int, b: int) -> Refusal | KvpassError | None:
        """Why the upper of two layers may not read the lower."""
        low, high = min(a, b), max(a, b)
        sources = list(range(total))
        sources[high] = low
        try:
            ShareLayers(tuple(sources)).plan(seen.plan)
            same_rotation(sites[high], sites[low])
        except (Refusal, KvpassError) as problem:
            return problem
        return None

    kinds: list[list[int]] = []
    for layer in range(total):
        if layer not in refused:
            kind = next((k for k in kinds if objection(k[0], layer) is None), None)
            if kind is None:
                kinds.append([layer])
            else:
                kind.append(layer)

    def verdict(site: AttentionSite) -> dict[str, str]:
        if site.layer in refused:
            raise refused[site.layer]
        _ = site.path("k").rotary
        alike = next(k for k in kinds if site.layer in k)
        if len(alike) == 1:
            others = [n for n in range(total) if n != site.layer and n not in refused]
            others.sort(key=lambda n: abs(n - site.layer))
            problem = objection(others[0], site.layer) if others else None
            if problem is None:
                raise PlanError("there is no other layer to share keys and values with", fix="nothing can be shared")
            raise problem
        return {"may read one another": f"layers {_listed([seen.layers[n] for n in alike], total)}"}

    return verdict


def _ask_slide(seen: _Seen) -> Verdict:
    def verdict(site: AttentionSite) -> dict[str, str]:
        cache = seen.plan[site.layer]
        windows = tuple(16 if n == site.layer else 0 for n in range(len(seen.plan)))
        SlideWindow(window=windows).plan(seen.plan)
        facts = {"window": f"has {cache.window}, which stays where it is narrower"} if cache.window else {}
        try:
            check_rotation(site)
        except KvpassError as error:
            return facts | {"positions in the cache": f"no: {error.what}"}
        return facts | {"positions in the cache": "can be counted: RoPE of queries and keys turns the same pairs"}

    return verdict


def _ask_quantize(seen: _Seen) -> Verdict:
    def verdict(site: AttentionSite) -> dict[str, str]:
        cache = seen.plan[site.layer]
        facts = {}
        for bits in (8, 4, 2):
            step = QuantizeKV(bits)
            try:
                step.check_layer(cache, step.format(seen.plan))
            except PlanError as error:
                if bits == 8:
                    raise
                facts[f"{bits} bits"] = f"no: {error.what}"
                continue
            facts[f"{bits} bits"] = f"stored as {step.format(seen.plan)}"
        QuantizeKV().plan(seen.plan)
        return facts

    return verdict


def _ask_evict(seen: _Seen) -> Verdict:
    step = EvictKV("snapkv", keep=0.5)
    where = step.describe()

    def verdict(site: AttentionSite) -> dict[str, str]:
        cache = step.placed(seen.plan)[site.layer]
        after = step.placed(seen.plan)
        after.check_selected(site.layer, where)
        if cache.keeps is None:
            return {"entries": "left as they are: " + ("a window bounds them" if cache.window else "another layer's")}
        return {"entries": "can be dropped by rank"}

    return verdict


def _ask_prune(seen: _Seen) -> Verdict:
    total = len(seen.plan)

    def verdict(site: AttentionSite) -> dict[str, str]:
        layer = site.layer
        step = PrunePyramid(schedule="step", keep=0.5, at=min(layer, max(0, total - 2)))
        ratios = [Fraction(1, 2) if n == layer and n < total - 1 else Fraction(1) for n in range(total)]
        if layer < total - 1 and not step.open_layers(seen.plan, step.describe())[layer]:
            raise PlanError(
                f"layers above read what layer {seen.layers[layer]} or one below it keeps, tokens included that would "
                "leave",
                fix="prune behind the last layer that reads it",
            )
        if seen.plan[layer].passes is not None:
            raise PlanError(f"tokens leave behind layer {seen.layers[layer]} already", fix="prune once")
        step.with_ratios(seen.plan, ratios).check_selected(layer, step.describe())
        if layer == total - 1:
            return {"tokens": "leave behind layers below it; this is the last one"}
        seen.finder.crossing(layer)
        return {"tokens": "can leave behind it"}

    return verdict


def _ask_page(seen: _Seen) -> Verdict:
    def verdict(site: AttentionSite) -> dict[str, str]:
        PageKV().plan(seen.plan)
        return {"pages": "any number of tokens from 1 to 1024; 16 is usual"}

    return verdict


def _ask_rotary(seen: _Seen) -> Verdict:
    program = fold_weights(seen.program)
    left = raise_rotary(program, PROBED)

    def verdict(site: AttentionSite) -> dict[str, str]:
        if site.layer in left:
            raise left[site.layer]
        if not site.path("q").rotary.pairs:
            reason = "positions do not turn its queries and keys: there is no RoPE"
            raise Refusal(reason, site.q, fix="nothing: there is nothing to raise")
        return {"becomes": "kvpass::rotary on queries and keys, with the model's own cosines and sines"}

    return verdict


def _ask_lowering(seen: _Seen) -> Verdict:
    chosen = lowered(seen.program)

    def verdict(site: AttentionSite) -> dict[str, str]:
        mine = [c for c in chosen if c.layer == site.layer]
        plain = [c for c in mine if not c.kernels]
        if plain:
            node, near, fitted = site.node, _kernel_words(mine), seen.mask(site)
            if fitted is not None and fitted.tabulated:
                node, near = site.optional("mask") or node, str(fitted.near)
            raise Refusal(plain[0].reason, node, near=near, fix="docs/kernels.md says what kernels do")
        return {f"{c.entry}: {c.op}": c.kernels for c in mine}

    return verdict


def _kernel_words(chosen: list[Lowered]) -> str:
    found = [f"{c.op} in {c.entry}" for c in chosen if c.kernels]
    return f"kernels compute {', '.join(found)}" if found else "no op of this layer is computed by kernels"


def lowered(program: Program) -> list[Lowered]:
    """What computes attention at each layer and in each entry with backend "triton".

    Raises:
        RequestError: Triton is not installed.
    """
    from kvpass.passes.insert_cache import insert_cache
    from kvpass.passes.lower_attention import lower_attention
    from kvpass.runtime.executor import require_triton

    require_triton()
    folded, layers = fold_weights(program), plan_of(program)
    insert_cache(folded, layers)
    return lower_attention(folded, layers)[1]


_LAYOUT = ("q rows", "k rows", "v rows")
_ROPE = ("RoPE of q", "RoPE of k")

EXPLAINED: dict[str, tuple[tuple[str, ...], Callable[[_Seen], Verdict]]] = {
    "group-heads": (("dims", "mask", *_LAYOUT, *_ROPE, "norms", "o columns"), _ask_group),
    "share-layers": (("dims", "keys and values", *_LAYOUT, "RoPE of k"), _ask_share),
    "slide-window": (("mask", "scores", *_ROPE), _ask_slide),
    "quantize-kv": (("dims", "keys and values", "stored"), _ask_quantize),
    "evict-kv": (("mask", "keys and values", "stored"), _ask_evict),
    "prune-pyramid": (("mask", "keys and values", "stream"), _ask_prune),
    "page-kv": (("dims", "keys and values", "stored"), _ask_page),
    "split-projections": (_LAYOUT, _ask_split),
    "lower-attention": (("dims", "mask", "scores", "stored"), _ask_lowering),
    "raise-rotary": (_ROPE, _ask_rotary),
}
"""Per pass: the facts that it rests on, and how it is asked."""


def table(found: list[Explanation], width: int = 120) -> str:
    """Explanations for people: layers that say the same together, misses with where and what to change."""
    lines = []
    for numbers, said in _runs(found):
        head = "matched" if said.matched else f"NOT matched ({said.failed}): {said.reason}"
        lines += _filled(f"{numbers}: ", head, width)
        told = {"node": said.node, "source": said.source, "near miss": said.near_miss, "to change": said.remedy}
        rows = [("  ! ", name, value) for name, value in told.items() if value]
        rows += [("    ", fact.name, fact.value) for fact in said.evidence]
        column = max((len(name) for _, name, _ in rows), default=0)
        for mark, name, value in rows:
            lines += _filled(f"{mark}{name:<{column}}  ", value, width)
    return "\n".join([*lines, f"{sum(e.matched for e in found)} of {len(found)} layers match"])


def _filled(label: str, text: str, width: int) -> list[str]:
    """A label and a text beside it, in lines."""
    indent = " " * (len(label) if len(label) < width // 3 else 4)
    return textwrap.wrap(text, width, initial_indent=label, subsequent_indent=indent, break_long_words=False)


def _runs(found: list[Explanation]) -> Iterator[tuple[str, Explanation]]:
    """Neighbouring layers with equal explanations, but for names that hold the layer's number and those of nodes. Of a
    miss, the first layer's words stand for all."""
    runs: list[tuple[Explanation, list[Explanation]]] = []
    for each in found:
        key = _numberless(each)
        if runs and runs[-1][0] == key:
            runs[-1][1].append(each)
        else:
            runs.append((key, [each]))
    for key, members in runs:
        first, last = members[0], members[-1]
        if first is last:
            yield f"layer {first.layer}", first
            continue
        said = replace(first, evidence=key.evidence)
        if not said.matched:
            said = replace(said, node=f"{first.node}, of layer {first.layer}")
        yield f"layers {first.layer}-{last.layer}", said


def _numberless(each: Explanation) -> Explanation:
    def plain(text: str) -> str:
        return re.sub(rf"\blayer {each.layer}\b", "this layer", re.sub(rf"\.{each.layer}\.", ".*.", text))

    facts = tuple(Fact(f.name, plain(f.value)) for f in each.evidence)
    return replace(each, layer=0, evidence=facts, reason=plain(each.reason), node="", near_miss="")


__all__ = ["EXPLAINED", "Explanation", "Fact", "check_name", "explain", "lowered", "table"]
