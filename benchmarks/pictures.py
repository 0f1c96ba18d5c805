"""The pictures of the passes' pages (docs/pictures), drawn from the plans, masks and rules that kvpass itself uses.

    python -m benchmarks.pictures [--check]

Lines and words take the colour of what surrounds them (`currentColor`); a picture that stands alone brings one for
light and one for dark. `--check` says, by its exit status, whether a file on disk would change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from benchmarks.generated import write_or_check
from kvpass.ir.attention import visible
from kvpass.ir.kv_layout import _ring_positions
from kvpass.ir.plan import CachePlan, LayerCache
from kvpass.passes import EvictKV, GroupHeads, Pass, PrunePyramid, QuantizeKV, ShareLayers, SlideWindow
from kvpass.runtime.pages import PagePool

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
STYLE = "<style>:root{color:#24292f}@media (prefers-color-scheme:dark){:root{color:#d0d7de}}</style>"
COLOURS = ("#3f6fd1", "#d1793f", "#3f9e6b", "#a356c4", "#b8a02a", "#c4566f", "#4aa3b5", "#7a7f87")
LAYERS, PROMPT = 8, 1024


def model(layers: int = LAYERS, kv_heads: int = 8) -> CachePlan:
    """The plan of a model with multi-head attention, in bfloat16."""
    return CachePlan(tuple(LayerCache(i, 8, kv_heads, 32, 32, torch.bfloat16) for i in range(layers)))


# ---------------------------------------------------------------------- drawing


class Canvas:
    """A few shapes, written as SVG in the order in which they are drawn."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, fill: str = "none", opacity: float = 1.0) -> None:
        line = 'stroke="currentColor" stroke-width="1"' if fill == "none" else 'stroke="none"'
        if fill == "none":
            line += f' stroke-opacity="{_n(opacity)}"'
        self.shapes.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(w)}" height="{_n(h)}" rx="2" fill="{fill}" {line}'
            + (f' fill-opacity="{_n(opacity)}"' if fill != "none" else "")
            + "/>"
        )

    def words(self, x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> None:
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        place = f'x="{_n(x)}" y="{_n(y)}" font-size="{size}" text-anchor="{anchor}"'
        self.shapes.append(f'<text {place} fill="currentColor">{escaped}</text>')

    def line(self, points: Iterable[tuple[float, float]], colour: str = "currentColor", width: float = 1.2) -> None:
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self.shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{_n(width)}"/>')

    def text(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'role="img" font-family="sans-serif" style="max-width:100%;height:auto">\n{STYLE}\n'
            f"<title>{self.title}</title>\n" + "\n".join(self.shapes) + "\n</svg>\n"
        )


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _bars(canvas: Canvas, left: float, top: float, title: str, counts: list[float], whole: float, unit: str) -> None:
    """A bar per layer, the last layer on top, beside the outline of the whole."""
    canvas.words(left, top, title)
    for row, count in enumerate(reversed(counts)):
        y = top + 10 + 18 * row
        canvas.words(left + 14, y + 11, str(len(counts) - 1 - row), "end", 10)
        canvas.box(left + 20, y, 120, 14, opacity=0.4)
        canvas.box(left + 20, y, 120 * count / whole, 14, COLOURS[0], 0.85)
        canvas.words(left + 146, y + 11, f"{count:,.0f}", size=10)
    canvas.words(left + 20, top + 24 + 18 * len(counts), unit, size=10)


# ---------------------------------------------------------------------- one picture a pass


def group_heads() -> str:
    """Which query heads read which KV heads."""
    canvas = Canvas(650, 210, "Query heads and the KV heads that they read, before and after GroupHeads")
    for column, step in enumerate((None, GroupHeads(4), GroupHeads(2))):
        plan = model() if step is None else step.plan(model())
        heads, kv_heads = plan[0].heads, plan[0].kv_heads
        left = 20 + 205 * column
        share = plan.bytes_per_token() / model().bytes_per_token()
        canvas.words(left, 18, "as it is" if step is None else step.describe())
        canvas.words(left, 198, f"{kv_heads} KV heads, {share:.0%} of the bytes", size=11)
        for head in range(heads):
            group = head * kv_heads // heads
            x, centre = left + 22 * head, left + (heads // kv_heads * (group + 0.5) - 0.5) * 22 + 8
            canvas.line([(x + 8, 60), (centre, 130)], COLOURS[group])
            canvas.box(x, 40, 16, 20, COLOURS[group], 0.45)
            canvas.box(centre - 8, 130, 16, 36, COLOURS[group])
    canvas.words(612, 54, "q")
    canvas.words(612, 152, "k, v")
    return canvas.text()


def share_layers() -> str:
    """Who keeps, and who reads whom."""
    canvas = Canvas(620, 250, "Layers that keep keys and values, and layers that read them")
    for column, words in enumerate(("cla:2", "yoco", "lckv:2", "lckv:4")):
        plan = ShareLayers(words).plan(model())
        left = 20 + 152 * column
        canvas.words(left, 18, f'ShareLayers("{words}")', size=11)
        for cache in plan:
            y = 30 + 24 * (LAYERS - 1 - cache.layer)
            source = cache.layer if cache.kv_source is None else cache.kv_source
            canvas.words(left + 8, y + 13, str(cache.layer), "end", 10)
            if cache.owner:
                canvas.box(left + 14, y, 46, 18, COLOURS[0])
            else:
                canvas.box(left + 14, y, 46, 18)
                to = 30 + 24 * (LAYERS - 1 - source) + 9
                bend = left + 66 + 5 * abs(source - cache.layer)
                canvas.line([(left + 60, y + 9), (bend, y + 9), (bend, to), (left + 60, to)], COLOURS[1])
        share = plan.bytes_per_token() / model().bytes_per_token()
        canvas.words(left, 240, f"{len(plan.owners())} keep, {share:.1%} of bytes", size=11)
    return canvas.text()


def slide_window() -> str:
    """The mask of a layer, and the slots of its ring."""
    tokens, window, sinks = 18, 6, 2
    plan = SlideWindow(window, sinks).plan(model())
    canvas = Canvas(620, 250, "What each token reads, and where the ring keeps it")
    places = torch.arange(tokens)
    for column, (cache, title) in enumerate(((model()[0], "as it is"), (plan[0], f"SlideWindow({window}, {sinks})"))):
        left = 20 + 230 * column
        canvas.words(left, 18, title)
        seen = visible(
            places.view(-1, 1), places, causal=True, strict=False, window=cache.window, sinks=cache.sinks
        )  # [S, T]
        assert seen is not None
        for query in range(tokens):
            for key in range(query + 1):
                if bool(seen[query, key]):
                    fill = COLOURS[1] if cache.window and key < cache.sinks else COLOURS[0]
                    canvas.box(left + 10 * key, 28 + 10 * query, 9, 9, fill, 0.85)
                else:
                    canvas.box(left + 10 * key, 28 + 10 * query, 9, 9, "currentColor", 0.12)
        canvas.words(left, 246, "key, left to right; query, top to bottom", size=10)
    slots = plan.layout(0).slots(tokens)
    canvas.words(480, 18, f"{slots} slots in memory")
    stored = _ring_positions(torch.tensor(tokens), slots, sinks, window).tolist()
    for slot in range(slots):
        y = 28 + 24 * slot
        canvas.box(480, y, 60, 20, COLOURS[1] if slot < sinks else COLOURS[0], 0.85)
        canvas.words(546, y + 14, f"token {stored[slot]}", size=11)
    return canvas.text()


def quantize_kv() -> str:
    """Bytes of the same cache in every format."""
    length = 2048
    steps: list[Pass | None] = [
        None,
        QuantizeKV(8),
        QuantizeKV(8, kind="fp8"),
        QuantizeKV(8, layout="static"),
        QuantizeKV(4, layout="token"),
        QuantizeKV(4, layout="kivi"),
        QuantizeKV(2, layout="kivi"),
    ]
    whole = model().bytes(1, length)
    canvas = Canvas(620, 34 + 26 * len(steps), "Bytes of a cache in each format")
    canvas.words(
        20, 18, f"bytes of a cache of {length:,} tokens, bfloat16 at first, scales and residuals counted", size=11
    )
    for row, step in enumerate(steps):
        size = (model() if step is None else step.plan(model())).bytes(1, length)
        y = 28 + 26 * row
        canvas.words(212, y + 14, "as it is" if step is None else step.describe(), "end", 11)
        canvas.box(220, y, 300, 18, opacity=0.4)
        canvas.box(220, y, 300 * size / whole, 18, COLOURS[0], 0.85)
        canvas.words(528, y + 14, f"{size / whole:.1%}", size=11)
    return canvas.text()


def evict_kv() -> str:
    """Entries per layer that stay of a prompt."""
    canvas = Canvas(620, 210, "Entries of a prompt that each layer keeps")
    steps = (EvictKV("snapkv", keep=0.25), EvictKV("pyramidkv", keep=0.25), EvictKV("h2o", budget=256))
    titles = ('"snapkv", keep=0.25', '"pyramidkv", keep=0.25', '"h2o", budget=256')
    for column, (step, title) in enumerate(zip(steps, titles, strict=True)):
        kept = step.plan(model()).kept(PROMPT)
        counts = [float(kept[layer]) for layer in range(LAYERS)]
        more = "replaced by later text" if step.plan(model()).rule(0).bounded else "all later text is kept"
        _bars(canvas, 10 + 205 * column, 18, title, counts, PROMPT, more)
    canvas.words(10, 206, f"entries per layer behind a prompt of {PROMPT:,} tokens", size=10)
    return canvas.text()


def prune_pyramid() -> str:
    """Tokens per layer that are computed."""
    canvas = Canvas(620, 210, "Tokens of a prompt that each layer computes")
    steps = (
        PrunePyramid(keep=0.45, length=PROMPT),
        PrunePyramid(schedule="pyramidinfer", decay=0.8),
        PrunePyramid(schedule="step", at=3, keep=0.2),
    )
    titles = ("keep=0.45", '"pyramidinfer", decay=0.8', '"step", at=3, keep=0.2')
    for column, (step, title) in enumerate(zip(steps, titles, strict=True)):
        plan = step.plan(model())
        counts = [float(count) for count in plan.reached(PROMPT)]
        _bars(canvas, 10 + 205 * column, 18, title, counts, PROMPT, f"{plan.fraction(PROMPT):.0%} of the bytes")
    canvas.words(10, 206, f"tokens that each layer computes of a prompt of {PROMPT:,}", size=10)
    return canvas.text()


def page_kv() -> str:
    """Two sequences that begin alike, and the pages that they hold."""
    page, pool = 4, PagePool(8, 4)
    one = list(range(14))
    first = pool.match_prefix(one)
    pool.append(first, len(one))
    pool.register(first, one)
    two = one[:8] + [90, 91, 92]
    second = pool.match_prefix(two)
    pool.append(second, len(two) - second.length)
    canvas = Canvas(620, 190, "Two sequences with tables of pages, some of them shared")
    canvas.words(20, 18, "two sequences that begin alike")
    for row, table in enumerate((first, second)):
        y = 30 + 34 * row
        canvas.words(20, y + 16, f"sequence {row + 1}, {table.length} tokens:", size=11)
        for block, number in enumerate(table.pages):
            shared = number in first.pages and number in second.pages
            canvas.box(160 + 64 * block, y, 58, 24, COLOURS[1] if shared else COLOURS[0], 0.85)
            canvas.words(189 + 64 * block, y + 16, f"page {number}", "middle", 11)
    canvas.words(20, 122, "the pool", size=11)
    for number in range(8):
        x, held = 20 + 72 * number, [t for t in (first, second) if number in t.pages]
        canvas.words(x + 32, 182, f"page {number}", "middle", 10)
        for slot in range(page):
            filled = any(t.pages.index(number) * page + slot < t.length for t in held)
            if filled:
                canvas.box(x + 16 * slot, 134, 15, 32, COLOURS[1] if len(held) > 1 else COLOURS[0], 0.85)
            else:
                canvas.box(x + 16 * slot, 134, 15, 32, opacity=0.5)
    return canvas.text()


def split_projections() -> str:
    """Whose rows a fused weight holds, as capture found them."""
    folder = str(Path(__file__).resolve().parent.parent / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import families
    from kvpass.capture import capture
    from kvpass.ir.sites import SiteFinder

    canvas = Canvas(620, 190, "Rows of fused weights before and after SplitProjections")
    for column, name in enumerate(("gpt_neox", "phi3")):
        site = SiteFinder(capture(families.build(name)))[0]
        rows = {operand: site.path(operand).rows for operand in ("q", "k", "v")}  # [heads, D] each
        left = 20 + 310 * column
        canvas.words(left, 18, f"{name}: rows of one weight, found by execution", size=11)
        total = sum(r.numel() for r in rows.values())
        for number, found in enumerate(rows.values()):
            for head in found.tolist():  # whose rows lie beside each other in both of these weights
                canvas.box(left + 270 * min(head) / total, 28, 270 * len(head) / total, 40, COLOURS[number], 0.85)
        canvas.words(left, 100, "after: a projection each, rows by head and channel", size=11)
        x = float(left)
        for number, (operand, found) in enumerate(rows.items()):
            wide = 250 * found.numel() / total
            canvas.box(x, 110, wide, 40, COLOURS[number], 0.85)
            canvas.words(x + wide / 2, 166, f"{operand}: {found.shape[0]} x {found.shape[1]}", "middle", 10)
            x += wide + 10
    return canvas.text()


PICTURES: dict[str, Callable[[], str]] = {
    "group-heads": group_heads,
    "share-layers": share_layers,
    "slide-window": slide_window,
    "quantize-kv": quantize_kv,
    "evict-kv": evict_kv,
    "prune-pyramid": prune_pyramid,
    "page-kv": page_kv,
    "split-projections": split_projections,
}


def pictures() -> Iterator[tuple[Path, str]]:
    """Every picture and its file."""
    for name, draw in PICTURES.items():
        yield FOLDER / f"{name}.svg", draw()


if __name__ == "__main__":
    sys.exit(write_or_check("Draw the pictures of the docs.", "benchmarks.pictures", pictures))
