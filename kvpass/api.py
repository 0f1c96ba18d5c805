"""The Python interface: source -> capture -> passes -> lowering -> `Transformed`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvpass.calibration import WINDOW, Calibration, token_stream, windows
from kvpass.capture import Source, capture
from kvpass.errors import PlanError, RequestError, UnsupportedError
from kvpass.explanation import lowered
from kvpass.ir.check import plan_of
from kvpass.ir.check import verify as verify_program
from kvpass.ir.cost import PromptCost, prompt_cost
from kvpass.ir.fixpoint import limits
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import Program
from kvpass.ir.sites import Refusal, SiteFinder
from kvpass.manager import FAST_BYTES, Verify, make_plan, run
from kvpass.passes.base import Context, Pass
from kvpass.passes.evict_kv import EvictKV
from kvpass.passes.prune_pyramid import PrunePyramid
from kvpass.recipe import Recipe
from kvpass.runtime.executor import Backend, choose_backend
from kvpass.runtime.transformed import Transformed
from kvpass.verification import check_cache, check_finite, check_tokens_apart

if TYPE_CHECKING:
    from kvpass.passes.lower_attention import Lowered

RecipeLike = Recipe | str | Path | Pass | Iterable[Pass] | None


def transform(
    source: Source | Transformed,
    recipe: RecipeLike = None,
    *,
    calibration: Calibration | None = None,
    verify: Verify = "fast",
    backend: Backend = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Transformed:
    """Rewrite a model.

    Args:
        source: a folder or hub id of a Hugging Face model, an `nn.Module` that maps input_ids [B, S] to logits, or what
            an earlier `transform` gave.
        recipe: passes, a `Recipe`, or the path of a TOML file; nothing gives the model as it is, with kvpass's cache.
        calibration: a text file, strings, or token-id tensors; needed by what is fitted, used by what can be.
        verify: "off", "fast" (bounded: structure always, numbers for models under 1 GB) or "full".
        backend: "triton" computes attention with fused kernels, "reference" in plain torch; "auto" takes kernels on a
            GPU. `Transformed.lowering` tells what runs where.
        device: where to compute; a GPU when there is one.
        dtype: what to compute in; by default the checkpoint's on a GPU, float32 on a CPU.
        seed: for everything random.
        progress: a progress bar on stderr, when that is a terminal.

    Raises:
        KvpassError: with what went wrong, where, and what to do.
    """
    steps = Recipe.of(recipe).passes
    place = choose_device(device)
    choose_backend(backend, place)
    if isinstance(source, torch.nn.Module) and dtype is not None:
        own = {p.dtype for p in source.parameters() if p.is_floating_point()} - {dtype}
        if own and not isinstance(source, Transformed):
            name = str(dtype).removeprefix("torch.")
            raise RequestError(
                f"a module computes in the dtype that it has, {own.pop()}, not in {name}",
                fix=f"give module.to(torch.{name}); dtype is for folders and hub ids",
            )
    compute = dtype if dtype is not None else (torch.float32 if place.type == "cpu" else None)
    earlier = source.recipe.passes if isinstance(source, Transformed) else ()
    program = source.program if isinstance(source, Transformed) else capture(source, compute)
    make_plan(program, steps)
    batches = []
    if calibration is not None:
        stream = token_stream(calibration, program.facts.folder)
        batches = [b.to(place) for b in _windows(stream, program)]
    with _progress(progress) as show:
        context = Context(batches=batches, device=place, seed=seed, progress=show)
        if verify != "off":
            verify_program(program, "capture")
        numbers = verify == "full" or (verify == "fast" and program.parameter_bytes() <= FAST_BYTES)
        if numbers:
            check_finite(program)
            check_tokens_apart(program, place)
        rewritten, report = run(program, steps, context, verify)
        model = Transformed(rewritten, report, place, Recipe((*earlier, *steps)), original=program, backend=backend)
        if numbers:
            report.notes.append(_cache_note(model, seed))
        return model


def _windows(stream: torch.Tensor, program: Program) -> list[torch.Tensor]:
    longest = program.facts.max_positions or WINDOW
    return windows(stream, program.facts.vocab_size, length=min(WINDOW, longest))


def _cache_note(model: Transformed, seed: int) -> str:
    """What was shown of the cache; a model that cannot have one here may still be saved as a checkpoint."""
    try:
        _ = model.executor
    except UnsupportedError as error:
        return f"kvpass cannot run this model with a cache: {error.what}"
    stop = limits(model.program.forward)
    if stop is not None and stop.passes and not stop.fallback:
        return (
            f"the cache was not compared with one pass: prompts are read in at most {stop.passes} passes, settled or "
            "not, so what is read together and token by token may differ"
        )
    return check_cache(model, seed=seed)


def plan(source: Source, recipe: RecipeLike = None) -> CachePlan:
    """The dry run: what the cache would be. The model is captured without reading a weight.

    Raises:
        PlanError: a pass cannot be applied to this model, with the reason.
    """
    return make_plan(capture(source, weights=False), Recipe.of(recipe).passes)


def explain_lowering(source: Source | Transformed) -> list[Lowered]:
    """What computes attention at each layer and in each entry with backend "triton", and why the reference where it
    does. No weight is read.

    Raises:
        RequestError: Triton is not installed.
    """
    return lowered(source.program if isinstance(source, Transformed) else capture(source, weights=False))


@dataclass(frozen=True)
class LayerFacts:
    """What was proved about one layer's attention."""

    layer: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    mask: str
    softcap: float
    sink_logits: bool
    rotary: str
    norm: str
    layout: str
    output: str
    refusals: tuple[str, ...]


@dataclass(frozen=True)
class ModelSummary:
    """What a model is, as capture found it."""

    name: str
    family: str
    layers: tuple[LayerFacts, ...]
    vocab_size: int
    max_positions: int | None
    parameters: int
    parameter_bytes: int
    plan: CachePlan
    passes: dict[str, str]  # pass -> "ok" or the reason why it would be refused
    cost: PromptCost


def inspect(source: Source) -> ModelSummary:
    """What is this model: layers, heads, masks, RoPE, layout, what is supported and why not. No weight is read.

    Raises:
        CaptureError: it is not a causal decoder that kvpass understands.
    """
    if isinstance(source, torch.nn.Module):
        return summarize(capture(source))
    # in float32, for proofs finer than bfloat16 resolves; the figures are those of the checkpoint's own dtype
    program = capture(source, torch.float32, weights=False)
    found = summarize(program)
    stored = program.facts.stored_dtype or torch.float32
    cache = tuple(replace(c, dtype=stored if c.dtype == torch.float32 else c.dtype) for c in found.plan)
    return replace(found, plan=CachePlan(cache), parameter_bytes=found.parameters * stored.itemsize)


def summarize(program: Program) -> ModelSummary:
    """The summary of a captured program."""
    finder = SiteFinder(program)
    layers = tuple(_layer_facts(program, site) for site in finder)
    used = program.used_weights()
    parameters = [w for n, w in program.weights.items() if n in used and not w.constant]
    refused = [r for layer in layers for r in layer.refusals]
    plan = plan_of(program)
    return ModelSummary(
        name=program.facts.name,
        family=program.facts.family,
        layers=layers,
        vocab_size=program.facts.vocab_size,
        max_positions=program.facts.max_positions,
        parameters=sum(int(torch.Size(w.shape).numel()) for w in parameters),
        parameter_bytes=program.parameter_bytes(),
        plan=plan,
        passes={
            "group-heads": refused[0] if refused else "ok",
            "evict-kv": _evictable(plan),
            "prune-pyramid": _prunable(plan, finder),
        },
        cost=prompt_cost(program),
    )


def _evictable(plan: CachePlan) -> str:
    try:
        EvictKV("snapkv", keep=0.5).plan(plan)
    except PlanError as error:
        return error.what
    return "ok"


def _prunable(plan: CachePlan, finder: SiteFinder) -> str:
    """Asked of one layer behind which tokens may leave; the pass asks all of them."""
    whole = CachePlan(tuple(replace(cache, passes=None) for cache in plan))
    try:
        pruned = PrunePyramid(schedule="pyramidinfer", strategy="constant").plan(whole)
        finder.crossing(next(cache.layer for cache in pruned if cache.passes is not None))
    except PlanError as error:
        return error.what
    except Refusal as refusal:
        return str(refusal)
    return "ok"


def _layer_facts(program: Program, site: Any) -> LayerFacts:
    refusals: list[str] = []
    rotary = norm = layout = output = "unknown"
    try:
        path = site.path("k")
        rope = path.rotary
        rotary = "none" if not rope.pairs else f"{rope.layout}, {2 * len(rope.pairs)} of {site.head_dim} channels"
        kind = path.norm
        norm = "none" if kind.linear else ("per head" if kind.per_head else "over all heads")
        if not kind.linear and not kind.per_head:
            refusals.append(f"layer {site.layer}: keys are normalised over all heads together")
        roots = {o: site.path(o).projection for o in ("q", "k", "v")}
        layout = "fused" if len({p.node for p in roots.values()}) < 3 else "separate"
        for operand in ("q", "v"):
            _ = site.path(operand).rows
    except Refusal as refusal:
        refusals.append(f"layer {site.layer}: {refusal}")
    try:
        _ = site.output
        output = "direct"
    except Refusal as refusal:
        output = "indirect"
        refusals.append(f"layer {site.layer}: {refusal}")
    mask = program.evidence.get(site.layer, {}).get("mask")
    return LayerFacts(
        layer=site.layer,
        heads=site.heads,
        kv_heads=site.kv_heads,
        key_dim=site.head_dim,
        value_dim=site.value_dim,
        scale=float(site.option("scale")),
        mask=str(mask) if mask is not None else _mask_words(site),
        softcap=float(site.option("softcap")),
        sink_logits=site.optional("sink_logits") is not None,
        rotary=rotary,
        norm=norm,
        layout=layout,
        output=output,
        refusals=tuple(refusals),
    )


def _mask_words(site: Any) -> str:
    """The mask that an attention op declares, where the proof of it is not at hand (a loaded program)."""
    if site.optional("mask") is not None:
        return "tabulated"
    words = ["strict" if site.option("strict") else "causal"]
    words += [f"{name} {site.option(name)}" for name in ("window", "sinks") if site.option(name)]
    return " + ".join(words + ["ALiBi"] * (site.optional("alibi_slopes") is not None))


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise NotImplementedError("it computes nothing")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RequestError(
            f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}",
            fix="choose 'cpu', or a GPU that torch.cuda sees",
        ) from error
    return place


class _progress:
    """A progress bar on stderr, shown only on a terminal."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted and sys.stderr.isatty()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Any:
        if self.wanted:
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=1)
        return self.show

    def show(self, done: int, total: int, what: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, description=what)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
