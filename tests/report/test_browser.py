"""The report in a real browser: on a desk and on a phone, light and dark, with scripts and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, chromium
from kvpass.report import Figures, render
from small_report import HOSTILE

PROGRAM = chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs a Chromium: `apt-get install chromium`")
WIDTHS = (1280, 390)
CONTRAST = """(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } };
  let worst = [21, ""];
  for (const e of document.querySelectorAll("body *")) {
    if (e.closest("svg, script") || ![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 80)];
  }
  return worst;
})()"""
DRAWN = """[...document.querySelectorAll(".strips svg")].map(s => {
  const whole = s.getBoundingClientRect().width;
  const share = r => r.getBoundingClientRect().width / whole * +(r.getAttribute("fill-opacity") ?? 1);
  return [...s.querySelectorAll("rect")].map(share).reduce((a, b) => a + b, 0);
})"""
OVERFLOWING = """[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, .diff, svg") &&
  e.getBoundingClientRect().right > WIDTH + 1).map(e => e.outerHTML.slice(0, 80))"""


def overflowing(browser: Browser, width: int) -> list[str]:
    """What reaches beyond the screen and cannot be scrolled by itself."""
    found: list[str] = browser.value(OVERFLOWING.replace("WIDTH", str(width)))
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(figures: Figures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(figures), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_opens_without_a_complaint_or_a_request(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    shot = browser.screenshot(whole=True)
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
    assert browser.value("document.title") == "Decoder: kvpass report"
    assert shot.startswith(b"\x89PNG")
    assert len(shot) > 40_000, "a page that is drawn takes more"


@pytest.mark.parametrize("width", [*WIDTHS, 360])
def test_nothing_is_wider_than_the_screen_but_tables_that_scroll(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    browser.value("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert browser.value("document.documentElement.scrollWidth") == width
    assert overflowing(browser, width) == []


@pytest.mark.parametrize("width", [*WIDTHS, 360])
def test_no_bar_of_the_drift_is_cut_off(browser: Browser, page: Path, figures: Figures, width: int) -> None:
    browser.open(page, width=width)
    assert browser.value("(e => e.scrollWidth - e.clientWidth)(document.querySelector('#drift-table'))") == 0
    bars = browser.value("[...document.querySelectorAll('#drift-table i')].map(b => b.getBoundingClientRect().width)")
    said = [*(d for d in figures.drift.layers if d is not None), figures.drift.logits]
    assert [b / max(bars) for b in bars] == pytest.approx([d / max(said) for d in said], abs=0.02)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, width=1280, dark=dark)
    browser.value("document.querySelectorAll('details').forEach(d => { d.open = true })")
    ratio, where = browser.value(CONTRAST)
    assert ratio >= 4.5, where
    colour = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(c) for c in colour[4:-1].split(",")) < 200) == dark


def test_paper_is_light_whatever_the_screen_is(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280, dark=True)
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.call("Emulation.setEmulatedMedia", media="print", features=[scheme])
    ratio, where = browser.value(CONTRAST)
    assert ratio >= 4.5, where
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.call("Page.printToPDF")["data"].startswith("JVBERi")  # %PDF


def test_layers_unfold_without_scripts(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280, scripts=False)
    assert browser.complaints() == []
    before = browser.call("Page.getLayoutMetrics")["cssContentSize"]["height"]
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    summary = browser.call("DOM.querySelector", nodeId=root, selector="summary")["nodeId"]
    browser.call("DOM.focus", nodeId=summary)
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
    assert browser.call("Page.getLayoutMetrics")["cssContentSize"]["height"] > before


def test_pictures_have_the_size_that_their_figures_say(browser: Browser, page: Path, figures: Figures) -> None:
    browser.open(page, width=1280)
    drawn = browser.value(DRAWN)
    assert drawn == pytest.approx([k.tokens / figures.prompt for k in figures.retained.layers], abs=0.01)
    bars = browser.value("[...document.querySelectorAll('.bars .before')].map(b => b.getBoundingClientRect().width)")
    most = max(layer.before.bytes for layer in figures.layers)
    assert [b / max(bars) for b in bars] == pytest.approx(
        [layer.before.bytes / most for layer in figures.layers], abs=0.02
    )


def test_hostile_names_do_nothing_in_a_browser(browser: Browser, hostile: Figures, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(render(hostile), encoding="utf-8")
    browser.open(path, width=390)
    assert browser.requests() == [path.as_uri()]
    assert browser.complaints() == []
    assert browser.value("document.querySelector('h1').textContent") == HOSTILE
    assert overflowing(browser, 390) == []
    assert browser.value("document.documentElement.scrollWidth") == 390


def test_a_page_that_misbehaves_is_noticed(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(
        "<meta name=viewport content='width=device-width'><script>console.error('oh'); nowhere()</script>"
        "<img src='http://example.org/a.png'><p style='width:900px'>x",
        encoding="utf-8",
    )
    browser.open(path, width=390)
    assert browser.requests() == [path.as_uri(), "http://example.org/a.png"]
    words = " ".join(browser.complaints())
    assert "oh" in words
    assert "nowhere is not defined" in words
    assert "ERR_NAME_NOT_RESOLVED" in words
    assert len(overflowing(browser, 390)) == 1
