"""The page: `Figures` through one template, which escapes everything it is given.

Plots are SVG in the page itself and take their colours from its style sheet, so they follow dark mode and print. The
content security policy of the page forbids scripts and every request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpass.errors import RequestError
from kvpass.report.figures import Figures, measure
from kvpass.report.retained import Kept

WIDTH, HEIGHT = 380, 250  # of a plot, in units that are pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 12, 40
STRIPS = 512  # pieces into which the picture of a prompt is cut at most
WORDS = {
    "exact": "computes the same",
    "layout": "computes the same, ordered otherwise",
    "lossy": "changes what is computed",
}


def render(figures: Figures) -> str:
    """One HTML document that loads nothing.

    Raises:
        RequestError: Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise RequestError(
            "the report needs Jinja2, which is not installed", fix="pip install 'kvpass[report]'"
        ) from error
    environment = Environment(
        loader=PackageLoader("kvpass.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": size,
        "number": number,
        "percent": percent,
        "nats": nats,
        "change": change,
        "seconds": seconds,
    }
    plots = [
        scatter(figures, "nll", "negative log-likelihood, nats per token"),
        scatter(figures, "kl", "KL from the original, nats per token"),
    ]
    return environment.get_template("template.html").render(
        f=figures,
        data=figures.to_dict(),
        plots=[plot for plot in plots if plot is not None],
        timeline=timeline(figures.passes),
        strips=[strip(kept, figures.retained.prompt) for kept in figures.retained.layers],
        headline=headline(figures),
        words=WORDS,
        most_bytes=max(1, *(side.bytes for layer in figures.layers for side in (layer.before, layer.after))),
        most_drift=max(1e-12, figures.drift.logits, *(d or 0.0 for d in figures.drift.layers)),
    )


def write(path: str | Path, source: Any, recipe: Any = None, **options: Any) -> Figures:
    """Measure, and write the page; see `measure` for the arguments. Gives back the figures.

    Raises:
        KvpassError: what `measure` raises, or the file cannot be written.
    """
    from kvpass.output import output_file

    figures = measure(source, recipe, **options)
    with output_file(path) as handle:
        handle.write(render(figures))
    return figures


# ---------------------------------------------------------------------- numbers


def size(count: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:,.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def number(value: float | None, digits: int = 4) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent; small ones with two digits that say something."""
    if value is None:
        return "–"
    if 0 < abs(value) < 0.001:
        return f"{100 * value:.1g} %"
    return f"{100 * value:.{digits}f} %"


def change(sizes: tuple[int, int]) -> str:
    """What a size was, and by how much it shrank or grew."""
    before, after = sizes
    if before == after or not before or not after:
        return f"was {size(before)}"
    word = "smaller" if after < before else "larger"
    return f"was {size(before)}; {max(before, after) / min(before, after):.2f}× {word}"


def seconds(value: float) -> str:
    """A time that took milliseconds or minutes."""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def nats(value: float) -> str:
    """A difference, with its sign."""
    return f"{value:+.4f}".replace("-", "−")


@dataclass(frozen=True)
class Headline:
    """What the result costs, as a reader sees it first; None where it was not measured."""

    nll: float | None
    nll_relative: float | None
    kl: float | None
    top1: float | None


def headline(figures: Figures) -> Headline:
    """What it came to."""
    first, last = figures.quality[0], figures.quality[-1]
    moved = last.nll - first.nll if first.nll is not None and last.nll is not None else None
    return Headline(
        nll=moved,
        nll_relative=moved / first.nll if moved is not None and first.nll else None,
        kl=last.kl,
        top1=last.top1,
    )


# ---------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Bar:
    """One pass in time: where it begins and how long it is, in percent of all of them, and its record."""

    begin: float
    length: float
    record: Mapping[str, Any]


def timeline(records: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Passes one behind the other."""
    total = sum(r["seconds"] for r in records) or 1.0
    bars, begin = [], 0.0
    for record in records:
        bars.append(Bar(100 * begin / total, 100 * record["seconds"] / total, record))
        begin += record["seconds"]
    return bars


@dataclass(frozen=True)
class Dot:
    """A point of a plot: its place, the reach of its error bar (0 for none), its number and what it says."""

    x: float
    y: float
    error: float
    number: int
    words: str


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Plot:
    """A plot of quality against bytes, laid out."""

    title: str
    dots: tuple[Dot, ...]
    line: str
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM
    top: int = TOP


def scatter(figures: Figures, key: str, title: str) -> Plot | None:
    """A measure against the bytes that the cache takes; None where nothing was measured."""
    points = [
        (index, p, p.used_bytes_per_token, getattr(p, key))
        for index, p in enumerate(figures.quality)
        if p.used_bytes_per_token is not None and getattr(p, key) is not None
    ]
    if not points:
        return None
    errors = [(p.nll_se or 0.0) if key == "nll" else 0.0 for _, p, _, _ in points]
    values = [v for *_, v in points]
    low = min(v - e for v, e in zip(values, errors, strict=True))
    high = max(v + e for v, e in zip(values, errors, strict=True))
    low = 0.0 if key == "kl" else low
    margin = 0.08 * (high - low) or 0.02 * abs(high) or 0.01
    xs = ticks(0.0, 1.05 * max(b for *_, b, _ in points), 4)
    ys = ticks(low - (margin if low else 0.0), high + margin, 5)

    def across(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * value / xs[-1], 1)

    def up(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - ys[0]) / (ys[-1] - ys[0]), 1)

    dots = []
    for (index, point, used, value), error in zip(points, errors, strict=True):
        reach = round(up(value) - up(value + error), 1)
        words = f"{point.name}: {used:,.0f} bytes per token, {value:.4f}"
        dots.append(Dot(across(used), up(value), reach, index, words))
    digits = max(0, min(6, 1 - math.floor(math.log10(ys[1] - ys[0]))))
    digits -= all(abs(v * 10 ** (digits - 1) - round(v * 10 ** (digits - 1))) < 1e-6 for v in ys) and digits > 0
    return Plot(
        title=title,
        dots=tuple(dots),
        line=" ".join(f"{d.x},{d.y}" for d in dots),
        across=tuple(Tick(across(v), f"{v:,.0f}") for v in xs),
        up=tuple(Tick(up(v), f"{v:.{digits}f}") for v in ys),
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that span a range, some `count` of them."""
    raw = (high - low) / count or 1.0
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(f * unit for f in (1, 2, 2.5, 5, 10) if f * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class Strip:
    """One layer of the picture of a prompt: pieces (start, length, share that is held) in tokens."""

    kept: Kept
    pieces: tuple[tuple[float, float, float], ...]


def strip(kept: Kept, prompt: int) -> Strip:
    """Runs as pieces; of a prompt longer than `STRIPS`, cells of several tokens with their mean."""
    if prompt <= STRIPS:
        return Strip(kept, tuple((r.start, r.stop - r.start, r.share) for r in kept.runs))
    cell = prompt / STRIPS
    held = [0.0] * STRIPS
    for run in kept.runs:
        for index in range(int(run.start / cell), min(STRIPS, math.ceil(run.stop / cell))):
            overlap = min(run.stop, (index + 1) * cell) - max(run.start, index * cell)
            held[index] += run.share * max(0.0, overlap) / cell
    return Strip(kept, tuple(_merged(held, cell)))


def _merged(held: Iterable[float], cell: float) -> list[tuple[float, float, float]]:
    """Cells that are alike as one piece."""
    found: list[tuple[float, float, float]] = []
    for index, share in enumerate(held):
        share = round(min(1.0, share), 3)
        if not share:
            continue
        if found and found[-1][2] == share and math.isclose(sum(found[-1][:2]), index * cell):
            start, length, _ = found[-1]
            found[-1] = (start, length + cell, share)
        else:
            found.append((index * cell, cell, share))
    return found
