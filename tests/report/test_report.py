"""The report's figures are those of the plan, of the cache and of the measures; its page keeps to itself."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import kvpass
from kvpass.cli import app
from kvpass.errors import RequestError
from kvpass.passes import EvictKV, GroupHeads, Pass, QuantizeKV, ShareLayers, SlideWindow, SplitProjections
from kvpass.quality import continuation
from kvpass.quality.measures import text_windows
from kvpass.report import Figures, measure, render, write
from kvpass.report.page import change, percent, scatter, seconds, size, strip, ticks, timeline
from kvpass.report.retained import Kept, Run
from kvpass.runtime.selective import SelectiveState
from small_report import HOSTILE, SIZES, Decoder

BOOKWORM = Path(__file__).parents[2] / "examples" / "bookworm"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and the text outside of style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.style = ""
        self.data = ""
        self.feed(html)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute stands twice in {tag}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes something else"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "style":
            self.style += data
        elif inside == "script":
            self.data += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(figures: Figures) -> Page:
    return Page(render(figures))


def report(model: Decoder, text: Tensor, *steps: Pass) -> Figures:
    return measure(model, steps, text=[text], sizes=SIZES, device="cpu", verify="off")


# ---------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    "steps",
    [
        [GroupHeads(2, method="mean")],
        [ShareLayers((0, 0, 2)), SlideWindow((8, 16, 0), sinks=2)],
        [EvictKV("pyramidkv", keep=0.5), QuantizeKV(8, layout="token")],
    ],
    ids=["heads", "shared-and-windows", "chosen-in-8-bits"],
)
def test_bytes_are_those_of_the_plan(decoder: Decoder, text: Tensor, steps: list[Pass]) -> None:
    found = report(decoder, text, *steps)
    before, after = kvpass.plan(decoder), kvpass.plan(decoder, steps)
    assert found.bytes_per_token == (before.bytes_per_token(), after.bytes_per_token())
    assert found.prompt_bytes == (before.bytes(1, 48), after.bytes(1, 48))
    assert sum(layer.before.bytes for layer in found.layers) == before.bytes(1, 48)
    assert sum(layer.after.bytes for layer in found.layers) == after.bytes(1, 48)
    for layer, cache in zip(found.layers, after, strict=True):
        said = layer.after
        assert (said.kv_heads, said.window, said.sinks) == (cache.kv_heads, cache.window, cache.sinks)
        assert said.reads == (cache.layer if cache.kv_source is None else cache.kv_source)
    assert found.quality[-1].bytes_per_token == after.bytes_per_token()


def test_every_prefix_of_the_recipe_is_scored_as_eval_scores_it(decoder: Decoder, text: Tensor) -> None:
    steps = [GroupHeads(2, refit="o_proj"), SlideWindow(8, sinks=2)]
    options = {"device": "cpu", "verify": "off", "calibration": [text.roll(1), text.flip(0)]}
    found = measure(decoder, steps, text=[text], sizes=SIZES, **options)
    models = {str(n): kvpass.transform(decoder, steps[:n], **options) for n in range(3)}
    scores = continuation(models, text, context=SIZES.context, continuation=SIZES.continuation, windows=SIZES.windows)
    assert [p.name for p in found.quality] == ["original", *(s.describe() for s in steps)]
    for point, score in zip(found.quality, scores.values(), strict=True):
        assert point.nll == pytest.approx(score.nll, rel=1e-5)
        assert point.kl == pytest.approx(score.kl, rel=1e-4, abs=1e-7)
        assert point.used_bytes_per_token == score.used_bytes_per_token
    assert found.quality[0].kl == 0
    assert found.quality[2].kl != found.quality[1].kl > 0


def test_every_pass_is_on_record_with_the_one_that_it_required(figures: Figures) -> None:
    assert [r["name"] for r in figures.passes] == ["SplitProjections", "GroupHeads", "SlideWindow", "EvictKV"]
    ends = [(r["bytes_per_token_before"], r["bytes_per_token_after"]) for r in figures.passes]
    assert all(mine[1] == its[0] for mine, its in pairwise(ends))


def test_layers_that_compute_the_same_do_not_drift(decoder: Decoder, text: Tensor) -> None:
    found = report(decoder, text, SplitProjections())
    assert max(found.drift.layers + (found.drift.logits,)) < 1e-6
    assert found.graphs.words == ()


def test_drift_begins_at_the_layer_that_was_changed(decoder: Decoder, text: Tensor) -> None:
    found = report(decoder, text, SlideWindow((0, 8, 0), sinks=0)).drift
    assert found.layers[0] == 0
    assert found.layers[1] > 1e-3
    assert found.logits > 1e-3
    assert found.tokens == 4 * SIZES.continuation


def test_drift_is_that_of_the_residual_stream(decoder: Decoder, text: Tensor) -> None:
    found = report(decoder, text, SlideWindow((8, 0, 4), sinks=2)).drift
    rows = text_windows(text, SIZES.context, SIZES.continuation, 4)
    distance = torch.arange(rows.shape[1]).unsqueeze(1) - torch.arange(rows.shape[1])
    causal = distance >= 0
    streams: list[Tensor] = []
    for windows in ((0, 0, 0), (8, 0, 4)):
        x = decoder.words(rows)
        for block, window in zip(decoder.blocks, windows, strict=True):
            read = causal & ((distance < window) | (torch.arange(rows.shape[1]) < 2)) if window else causal
            x = block(x, read)
            streams.append(x[:, SIZES.context :])
        streams.append(decoder.head(x)[:, SIZES.context :])
    errors = [(b - a).norm().item() / a.norm().item() for a, b in zip(streams[:4], streams[4:], strict=True)]
    assert [*found.layers, found.logits] == pytest.approx([*errors[:2], errors[3]], rel=1e-4)


def test_drift_is_that_of_the_cache_where_a_forward_pass_drops_nothing(decoder: Decoder, text: Tensor) -> None:
    found = report(decoder, text, EvictKV("snapkv", keep=0.8))
    assert all(value is not None and value > 1e-4 for value in (*found.drift.layers, found.drift.logits))


def test_drift_is_told_of_layers_that_read_one_above_them(decoder: Decoder, text: Tensor) -> None:
    found = report(decoder, text, ShareLayers((2, 1, 2), upward=True)).drift
    assert len(found.layers) == 2
    assert found.logits > 1e-3


def test_windows_and_sinks_are_what_the_picture_shows(decoder: Decoder, text: Tensor) -> None:
    found = report(decoder, text, SlideWindow((0, 8, 16), sinks=2)).retained
    assert not found.measured
    runs = [[(r.start, r.stop) for r in layer.runs] for layer in found.layers]
    assert runs == [[(0, 48)], [(0, 2), (40, 48)], [(0, 2), (32, 48)]]
    assert [layer.tokens for layer in found.layers] == [48, 10, 18]


def test_ranked_tokens_are_those_that_the_cache_holds(decoder: Decoder, text: Tensor) -> None:
    steps = [EvictKV("snapkv", keep=0.8)]
    found = report(decoder, text, *steps).retained
    model = kvpass.transform(decoder, steps, device="cpu", verify="off")
    _, state = model.prefill(text[:48].unsqueeze(0))
    assert isinstance(state, SelectiveState)
    assert found.measured
    for layer in found.layers:
        held = Counter(state.positions(layer.layer)[0].flatten().tolist())
        drawn = {t: run.share for run in layer.runs for t in range(run.start, run.stop)}
        assert drawn == {token: pytest.approx(count / 4) for token, count in held.items()}
        assert layer.tokens == model.plan.kept(48)[layer.layer] < 48


def test_a_layer_that_reads_another_shows_what_that_one_holds(decoder: Decoder, text: Tensor) -> None:
    layers = report(decoder, text, ShareLayers((0, 0, 2)), SlideWindow((8, 16, 0), sinks=2)).retained.layers
    assert [layer.owner for layer in layers] == [0, 0, 2]
    assert layers[0].runs == layers[1].runs == (Run(0, 2, 1.0), Run(32, 48, 1.0))


def test_the_diff_is_of_the_layer_that_was_changed(decoder: Decoder, text: Tensor) -> None:
    found = report(decoder, text, SlideWindow((0, 8, 0), sinks=2)).graphs
    assert found.grade == "plan"
    (section,) = found.sections
    assert (section.name, section.removed, section.added) == ("layer 1", 1, 1)
    assert "window=8" in "\n".join(section.lines)
    assert {"layer 0", "layer 2"} <= set(found.same)


def test_what_was_rewritten_already_is_compared_with_its_original(decoder: Decoder, text: Tensor) -> None:
    options = {"device": "cpu", "verify": "off"}
    slim = kvpass.transform(decoder, [GroupHeads(2, method="mean")], **options)
    found = measure(slim, text=[text], original=decoder, sizes=SIZES, **options)
    same = report(decoder, text, GroupHeads(2, method="mean"))
    assert [r["name"] for r in found.passes] == ["SplitProjections", "GroupHeads"]
    assert found.quality[1].nll == pytest.approx(same.quality[1].nll, rel=1e-6)
    assert found.layers == same.layers


def test_a_request_that_compares_nothing_is_refused(decoder: Decoder, text: Tensor) -> None:
    with pytest.raises(RequestError, match="nothing to compare"):
        measure(decoder, text=[text])
    with pytest.raises(RequestError, match="needs calibration text"):
        measure(decoder, [GroupHeads(2, refit="o_proj")], text=[text], device="cpu", verify="off")
    with pytest.raises(RequestError, match="one window"):
        measure(decoder, [SlideWindow(8)], text=[text[:20]], sizes=replace(SIZES, prompt=None), device="cpu")
    with pytest.raises(RequestError, match="the text has 400 tokens, and the prompt is to have 401"):
        measure(decoder, [SlideWindow(8)], text=[text], sizes=replace(SIZES, prompt=401), device="cpu", verify="off")
    with pytest.raises(RequestError, match="has 2 layers, and the model 3"):
        measure(decoder, text=[text], original=Decoder(2), sizes=SIZES, device="cpu", verify="off")


# ---------------------------------------------------------------------- the page


def test_no_address_in_the_page_leaves_it(page: Page) -> None:
    loading = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href", "ping", "cite"}
    found = [(tag, value) for tag, attributes in page.elements for name, value in attributes.items() if name in loading]
    assert found == [("link", "data:,")]
    styles = page.style + " ".join(attributes.get("style", "") for _, attributes in page.elements)
    assert not re.search(r"url\(|@import|//", styles)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy


def test_nothing_in_the_page_runs(page: Page) -> None:
    assert [s["type"] for s in page.all("script")] == ["application/json"]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not {tag for tag, _ in page.elements} & {"iframe", "object", "embed", "form", "img", "base"}


def test_the_figures_are_in_the_page_as_json(page: Page, figures: Figures) -> None:
    assert json.loads(page.data) == json.loads(json.dumps(figures.to_dict()))


def test_the_page_shows_the_figures(page: Page, figures: Figures) -> None:
    for layer in figures.layers:
        assert f"{layer.before.bytes:,}" in page.text
        assert f"{layer.after.bytes:,}" in page.text
    for point in figures.quality:
        assert f"{point.nll:.4f}" in page.text
    for name in ("SplitProjections", "GroupHeads", "SlideWindow", "EvictKV", torch.__version__, "kvpass report MODEL"):
        assert name in page.text
    labels = [a.get("aria-label", "") for a in page.all("svg")]
    assert [f"layer {k.layer} holds {k.tokens} of 48 tokens" in labels for k in figures.retained.layers] == [True] * 3
    assert len(page.all("details")) == len(figures.graphs.sections) > 0


def test_the_page_can_be_read_without_eyes(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(ids)
    assert all("scope" in a for a in page.all("th"))
    assert all(a.get("aria-label") for a in page.all("svg"))
    assert [tag for tag, _ in page.elements if re.fullmatch(r"h\d", tag)] == ["h1", *["h2"] * 7]
    assert page.all("html") == [{"lang": "en"}]


def test_hostile_names_stay_text(hostile: Figures) -> None:
    page = Page(render(hostile))
    assert [s["type"] for s in page.all("script")] == ["application/json"]
    assert page.all("img") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(HOSTILE) >= 12
    assert "49" not in page.text.split("kvpass report")[0]
    assert json.loads(page.data)["model"] == HOSTILE


def test_a_pass_that_was_not_measured_says_why(figures: Figures) -> None:
    first, *rest, last = figures.quality
    missing = replace(last, nll=None, nll_se=None, kl=None, top1=None, used_bytes_per_token=None, reason="cannot run")
    found = replace(figures, quality=(first, *rest, missing))
    assert "not measured: cannot run" in Page(render(found)).text
    plot = scatter(found, "nll", "")
    assert plot is not None
    assert [dot.number for dot in plot.dots] == [0, 1, 2]


def test_points_lie_where_the_axes_say(figures: Figures) -> None:
    for key in ("nll", "kl"):
        plot = scatter(figures, key, "")
        assert plot is not None
        low, high = (float(t.label) for t in (plot.up[0], plot.up[-1]))
        right = float(plot.across[-1].label.replace(",", ""))
        for dot, point in zip(plot.dots, figures.quality, strict=True):
            value = low + (high - low) * (plot.bottom - dot.y) / (plot.bottom - plot.top)
            used = right * (dot.x - plot.left) / (plot.right - plot.left)
            assert value == pytest.approx(getattr(point, key), abs=0.01 * (high - low))
            assert used == pytest.approx(point.used_bytes_per_token, abs=0.01 * right)
            assert plot.top <= dot.y - dot.error <= dot.y + dot.error <= plot.bottom


def test_axes_have_round_numbers() -> None:
    assert ticks(0, 17000, 4) == [0, 5000, 10000, 15000, 20000]
    assert ticks(3.61, 3.77, 4) == pytest.approx([3.6, 3.65, 3.7, 3.75, 3.8])
    assert ticks(1, 1, 4) == [1]


def test_a_long_prompt_is_drawn_in_cells() -> None:
    kept = Kept(0, 0, 1536, (Run(0, 4, 1.0), Run(2564, 4096, 1.0)))
    pieces = strip(kept, 4096).pieces
    assert pieces[0] == (0, 8, 0.5)
    assert pieces[1] == (2560, 8, 0.5)
    assert pieces[2] == (2568, 4096 - 2568, 1.0)
    assert sum(length * share for _, length, share in pieces) == 1536


def test_passes_follow_one_another_in_the_timeline() -> None:
    bars = timeline([{"seconds": 1.0}, {"seconds": 0.0}, {"seconds": 3.0}])
    assert [(bar.begin, bar.length) for bar in bars] == [(0, 25), (25, 0), (25, 75)]
    assert [bar.length for bar in timeline([{"seconds": 0.0}])] == [0]


def test_numbers_are_written_for_people() -> None:
    assert [size(n) for n in (999, 16384, 4_325_376, 5e12)] == ["999 B", "16.4 kB", "4.3 MB", "5,000.0 GB"]
    assert change((16384, 4096)) == "was 16.4 kB; 4.00× smaller"
    assert change((4096, 8192)) == "was 4.1 kB; 2.00× larger"
    assert change((4096, 4096)) == "was 4.1 kB"
    assert [percent(v) for v in (0.741, 0.0, 3.2e-7, None)] == ["74.1 %", "0.0 %", "3e-05 %", "–"]
    assert [seconds(v) for v in (0.0124, 61.0)] == ["12 ms", "61.0 s"]


def test_the_page_is_written_whole(decoder: Decoder, text: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "made" / "report.html"
    found = write(path, decoder, [SlideWindow(8)], text=[text], sizes=SIZES, device="cpu", verify="off")
    assert path.read_text(encoding="utf-8") == render(found)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_without_jinja_the_remedy_is_said(figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RequestError, match="Jinja2") as refused:
        render(figures)
    assert "kvpass[report]" in refused.value.fix


# ---------------------------------------------------------------------- the command


def test_the_command_reports_on_a_model_and_on_what_was_made_of_it(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((BOOKWORM / "heldout.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    small = ["--text", str(text), "--context", "48", "--continuation", "8", "--windows", "2", "--verify", "off"]
    out, slim = tmp_path / "a.html", tmp_path / "slim"
    run = CliRunner()
    done = run.invoke(app, ["report", str(BOOKWORM), "--window", "16", *small, "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["bytes"] == out.stat().st_size
    assert json.loads(Page(out.read_text(encoding="utf-8")).data) == document["figures"]
    assert [len(layer["runs"]) for layer in document["figures"]["retained"]["layers"]] == [2] * 8

    kvpass.transform(str(BOOKWORM), [SlideWindow(16)], device="cpu", verify="off").save(slim)
    words = ["report", str(slim), "--original", str(BOOKWORM), *small, "-o", str(out), "--json"]
    again = run.invoke(app, words)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["figures"]["layers"] == document["figures"]["layers"]


def test_the_command_refuses_before_it_reads_a_weight(tmp_path: Path) -> None:
    held = str(BOOKWORM / "heldout.txt")
    run = CliRunner()
    nothing = run.invoke(app, ["report", str(BOOKWORM), "--text", held])
    assert nothing.exit_code == 2
    assert "--original" in nothing.output
    folder = run.invoke(app, ["report", str(BOOKWORM), "--text", held, "--window", "8", "-o", str(tmp_path)])
    assert folder.exit_code == 2
    assert "a folder stands there" in folder.output
