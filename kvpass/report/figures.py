"""Everything that a report shows, as plain values: `measure` takes them, `kvpass.report.page` draws them.

A recipe is applied pass by pass, so that each of its prefixes can be measured on the same text.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvpass.calibration import Calibration, token_stream
from kvpass.errors import RequestError, UnsupportedError
from kvpass.ir.plan import CachePlan, LayerCache
from kvpass.manager import PassRecord, Verify, make_plan
from kvpass.recipe import Recipe
from kvpass.report.drift import Drift, drift
from kvpass.report.graphs import GraphChange, graph_changes
from kvpass.report.retained import Retained, retained

if TYPE_CHECKING:
    from kvpass.api import RecipeLike
    from kvpass.capture import Source
    from kvpass.runtime.transformed import Transformed

PROMPTS = (256, 4096)  # tokens of the prompt that is looked at: at least and at most, where nobody says


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        context: tokens of each window that go through the cache.
        continuation: tokens after it that are scored.
        windows: windows of text.
        prompt: tokens of the prompt that bytes per layer and retained tokens are shown for; None for twice what a
            window holds, within `PROMPTS`.
    """

    context: int = 192
    continuation: int = 64
    windows: int = 32
    prompt: int | None = None


@dataclass(frozen=True)
class Point:
    """The model after some of the recipe's passes, on held-out text.

    Attributes:
        name: the pass that was applied last.
        bytes_per_token: the plan's, while no window is full.
        used_bytes_per_token: of the entries that hold tokens after prefill, measured; per token of context.
        nll, nll_se: negative log-likelihood per token (nats); the error is that of the difference to the original.
        kl: KL(original || model) per token (nats).
        top1: share of tokens where both would pick the same next token.
        reason: why nothing was measured; "" where it was.
    """

    name: str
    bytes_per_token: int
    used_bytes_per_token: float | None = None
    nll: float | None = None
    nll_se: float | None = None
    kl: float | None = None
    top1: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Side:
    """One layer's cache, before or after.

    Attributes:
        kv_heads: KV heads that it reads.
        stored: dtype or format.
        window, sinks: latest and first tokens that it reads; 0 for all.
        reads: the layer whose keys and values it reads, its own number where these are its own.
        keeps, passes: rules of what stays and of what goes on to the next layer, "" for everything.
        bytes_per_token: while no window is full; 0 where it reads another layer's.
        bytes: of the prompt.
    """

    kv_heads: int
    stored: str
    window: int
    sinks: int
    reads: int
    keeps: str
    passes: str
    bytes_per_token: int
    bytes: int


@dataclass(frozen=True)
class Layer:
    """One layer's cache, before and after."""

    layer: int
    heads: int
    before: Side
    after: Side


@dataclass(frozen=True)
class Figures:
    """What a report shows.

    Attributes:
        model, family: what was rewritten.
        recipe: the passes, in words.
        bytes_per_token: before and after, while no window is full.
        prompt: tokens of the prompt that `prompt_bytes`, the layers' bytes and `retained` are of.
        prompt_bytes: the cache of that prompt, before and after.
        passes: the record of each pass; see `kvpass.manager.PassRecord`.
        notes: what verification says of the result.
        text: what quality was measured on.
        quality: the original, then the model after each pass.
        layers: every layer's cache.
        drift: how far layers moved.
        retained: what stays of the prompt.
        graphs: what changed in the graph.
        environment: where and how it was made.
    """

    model: str
    family: str
    recipe: tuple[str, ...]
    bytes_per_token: tuple[int, int]
    prompt: int
    prompt_bytes: tuple[int, int]
    passes: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    text: str
    quality: tuple[Point, ...]
    layers: tuple[Layer, ...]
    drift: Drift
    retained: Retained
    graphs: GraphChange
    environment: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; what is not a finite number becomes None."""
        found: dict[str, Any] = _plain(asdict(self))
        return found


def measure(
    source: Source | Transformed,
    recipe: RecipeLike = None,
    *,
    text: Calibration,
    original: Source | Transformed | None = None,
    calibration: Calibration | None = None,
    sizes: Sizes | None = None,
    verify: Verify = "fast",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    command: str = "",
    tell: Callable[[str], None] = lambda words: None,
) -> Figures:
    """Transform a model pass by pass, and measure what became of it.

    Args:
        source: what `kvpass.transform` takes.
        recipe: passes; they may be left out where `original` is given.
        text: held-out text: a file, strings, or token-id tensors.
        original: what it is compared with, where `source` was rewritten already; `source` itself where None.
        calibration: as `kvpass.transform` takes it.
        sizes: how much is measured.
        verify, device, dtype, seed: as `kvpass.transform` takes them.
        command: what was typed, for the record.
        tell: is told what is being done.

    Raises:
        RequestError: there is nothing to compare, or too little text.
        KvpassError: what `kvpass.transform` raises.
    """
    import kvpass
    from kvpass.runtime.transformed import Transformed

    steps = Recipe.of(recipe).passes
    sizes = sizes or Sizes()
    if not steps and original is None:
        raise RequestError(
            "there is nothing to compare: no pass is asked for",
            fix="give a recipe, or the original of a rewritten model",
        )
    options: dict[str, Any] = {"device": device, "seed": seed, "verify": verify, "progress": False}

    def made(of: Source | Transformed) -> Transformed:
        return of if isinstance(of, Transformed) else kvpass.transform(of, dtype=dtype, **options)

    tell("capturing")
    model = made(source)
    planned = make_plan(model.program, steps)
    for step in steps:
        if step.needs_calibration and calibration is None:
            raise RequestError(
                f"{step.describe()} needs calibration text", fix="give calibration=, or leave out the fit"
            )
    before = model if original is None else made(original)
    if len(before.plan) != len(model.plan):
        raise RequestError(
            f"the original has {len(before.plan)} layers, and the model {len(model.plan)}",
            fix="give the model that it was made of",
        )
    folder = model.program.facts.folder or before.program.facts.folder
    tokens = token_stream(text, folder)
    length = _prompt_length(before.plan, planned, model.program.facts.max_positions, sizes.prompt)
    if len(tokens) < length:
        if sizes.prompt is not None:
            what = f"the text has {len(tokens)} tokens, and the prompt is to have {length}"
            raise RequestError(what, fix="give a longer text, or a shorter prompt")
        length = len(tokens)
    score = _Scores(before, tokens, sizes)
    quality = [score.point("original", before)]
    records: list[PassRecord] = []
    if original is not None:
        tell("scoring the model as it is")
        records += model.report.passes
        quality.append(score.point(", ".join(s.describe() for s in model.recipe.passes) or "as it is", model))
    for number, step in enumerate(steps, 1):
        tell(f"pass {number} of {len(steps)}: {step.describe()}")
        if model is not before:
            model.release()
        model = kvpass.transform(model, [step], calibration=calibration, **options)
        records += model.report.passes
        tell(f"scoring after {step.describe()}")
        quality.append(score.point(step.describe(), model))
    tell("looking at layers")
    after_bytes, before_bytes = _layer_bytes(model.plan, length), _layer_bytes(before.plan, length)
    layers = tuple(
        Layer(a.layer, a.heads, _side(b, before_bytes[b.layer]), _side(a, after_bytes[a.layer]))
        for b, a in zip(before.plan, model.plan, strict=True)
    )
    facts = model.program.facts
    return Figures(
        model=before.program.facts.name,
        family=facts.family,
        recipe=tuple(s.describe() for s in (model.recipe.passes if original is not None else steps)),
        bytes_per_token=(before.plan.bytes_per_token(), model.plan.bytes_per_token()),
        prompt=length,
        prompt_bytes=(before.plan.bytes(1, length), model.plan.bytes(1, length)),
        passes=tuple(asdict(r) for r in records),
        notes=tuple(model.report.notes),
        text=_text_words(text, len(tokens), sizes),
        quality=tuple(quality),
        layers=layers,
        drift=drift(before, model, tokens, sizes.context, sizes.continuation),
        retained=retained(model, tokens[:length]),
        graphs=graph_changes(before, model),
        environment=_environment(model, seed, command),
    )


class _Scores:
    """Scores of models beside the original, one at a time: the weights of two are in memory at once."""

    def __init__(self, original: Transformed, tokens: torch.Tensor, sizes: Sizes) -> None:
        self.original, self.tokens, self.sizes = original, tokens, sizes

    def point(self, name: str, model: Transformed) -> Point:
        from kvpass.quality import continuation

        per_token = model.plan.bytes_per_token()
        models = {"original": self.original}
        if model is not self.original:
            try:
                _ = model.executor
            except UnsupportedError as error:  # a pass may need the next one to be run with a cache
                return Point(name, per_token, reason=error.what)
            models["model"] = model
        sizes = self.sizes
        found = continuation(
            models, self.tokens, context=sizes.context, continuation=sizes.continuation, windows=sizes.windows
        )
        score = found[next(reversed(models))]
        paired = None if model is self.original or not math.isfinite(score.nll_delta_se) else score.nll_delta_se
        return Point(name, per_token, score.used_bytes_per_token, score.nll, paired, score.kl, score.top1)


def _prompt_length(before: CachePlan, after: CachePlan, longest: int | None, wanted: int | None) -> int:
    """Tokens of the prompt that is looked at: enough to fill windows, and no more than there are positions for."""
    if wanted is not None:
        return min(wanted, longest or wanted)
    windows = [c.window + c.sinks for plan in (before, after) for c in plan if c.window]
    least, most = PROMPTS
    return min(max(least, 2 * max(windows, default=0)), most, longest or most)


def _layer_bytes(plan: CachePlan, length: int) -> dict[int, int]:
    """Bytes of a prompt per layer; 0 where a layer reads another's. They add up to `plan.bytes(1, length)`."""
    held = plan.kept(length) if plan.selective else dict.fromkeys(plan.owners(), length)
    return {c.layer: plan.held_bytes({c.layer: held[c.layer]}, length) if c.layer in held else 0 for c in plan}


def _side(cache: LayerCache, held: int) -> Side:
    return Side(
        kv_heads=cache.kv_heads,
        stored=str(cache.format) or str(cache.dtype).removeprefix("torch."),
        window=cache.window,
        sinks=cache.sinks,
        reads=cache.layer if cache.kv_source is None else cache.kv_source,
        keeps="" if cache.keeps is None else str(cache.keeps),
        passes="" if cache.passes is None else str(cache.passes),
        bytes_per_token=cache.bytes_per_token(),
        bytes=held,
    )


def _text_words(text: Calibration, tokens: int, sizes: Sizes) -> str:
    source = Path(text).name if isinstance(text, str | Path) else "the given text"
    windows = min(sizes.windows, tokens // (sizes.context + sizes.continuation))
    return f"{source}: {windows} windows, {sizes.context} tokens in the cache and {sizes.continuation} scored in each"


def _environment(model: Transformed, seed: int, command: str) -> dict[str, str]:
    import transformers

    from kvpass import __version__

    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else ""
    found = {
        "kvpass": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}{os.cpu_count()} CPUs, "
        f"{torch.get_num_threads()} threads",
        "device": f"{model.device}" + (f" ({gpu})" if gpu else ""),
        "dtype": str(model.program.facts.dtype).removeprefix("torch."),
        "attention": model.executor.backend,
        "seed": str(seed),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return found | ({"command": command} if command else {})


def _processor() -> str:
    """What the machine calls its processor, where it says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    name = name or platform.processor()
    return f"{name}, " if name not in ("", "unknown", platform.machine()) else ""


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | bool | None) else str(value)
