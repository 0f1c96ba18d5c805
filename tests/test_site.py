"""The documentation builds without a warning, and what it shows is what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import kvpass
from benchmarks import knobs, pictures, targets
from kvpass import errors, passes
from kvpass.recipe import PASSES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "passes").glob("*.md"))
MEASURED = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/quality.md"))
MEASURED += (DOCS / "performance.md").read_text(encoding="utf-8")
# a percentage, a difference with its sign, or the speed of something
FIGURE = re.compile(r"[+-]\d+\.\d+|\d+\.\d+(?= %)|\d\.\d+(?= times)|\d\.\d+(?= of transformers)")


def test_the_site_builds_without_a_warning_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in DOCS.rglob("*.md"):
        built = tmp_path / page.relative_to(DOCS).with_suffix(".html")
        assert built.is_file(), f"{page.name} is not in the site"
        html = built.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]*src="(https?:[^"]*)|<link[^>]*href="(https?:[^"]*)', html)
        assert not fetched, f"{page.name} fetches {fetched}"
    for page in PAGES:
        html = (tmp_path / "passes" / f"{page.stem}.html").read_text(encoding="utf-8")
        assert "<svg" in html.split("<h1", 1)[1], f"the picture of {page.stem} is not in its page"
        assert ":root{color" not in html, "a picture in a page brings its own colours"


@pytest.mark.parametrize("name", sorted(pictures.PICTURES))
def test_a_picture_is_what_the_code_draws(name: str) -> None:
    text = (pictures.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert pictures.PICTURES[name]() == text, "python -m benchmarks.pictures"
    assert "currentColor" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pass_has_the_knobs_and_the_company_that_its_page_lists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    kind = PASSES[page.stem]
    assert f"<!-- knobs: {kind.__name__} -->" in text
    assert f"<!-- composes: {kind.__name__} -->" in text or kind is passes.SplitProjections  # which goes with anything
    assert knobs.filled(text) == text, "python -m benchmarks.knobs"
    assert set(knobs.meanings(kind)) == {field.name for field in fields(kind)}  # type: ignore[arg-type]


def test_every_pass_has_a_page_that_says_what_when_cost_and_paper() -> None:
    assert {page.stem for page in PAGES} == set(PASSES) == set(pictures.PICTURES)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for part in (
            "**What.**",
            "**When.**",
            "**Paper.**",
            "## What it costs",
            "## Composes with",
            f"({page.stem}.svg)".replace("(", "(../pictures/"),
        ):
            assert part in text, f"{page.name} has no {part}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_figure_on_a_page_stands_in_a_measured_table(page: Path) -> None:
    cost = page.read_text(encoding="utf-8").split("## What it costs")[1].split("\n## ")[0]
    for figure in FIGURE.findall(cost):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", MEASURED), f"{figure} was not measured"


def test_the_api_lists_every_public_name() -> None:
    listed = set(re.findall(r"^::: kvpass\S*?\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M))
    wanted = {*kvpass.__all__, *passes.__all__} - {"KvpassError"}  # all errors stand there as one module
    assert wanted <= listed, f"docs/api.md lacks {sorted(wanted - listed)}"
    assert "errors" in listed
    assert errors.KvpassError.__doc__


def test_the_matrix_has_every_family_and_says_of_a_sample_what_is_found_now() -> None:
    written = targets.read(targets.DEFAULT.read_text(encoding="utf-8"))
    jobs = targets.names()
    assert list(written) == [name for name, _ in jobs], "python -m benchmarks.targets --write docs/matrix.md"
    sample = [job for job in jobs if job[0] in ("alibi", "gemma2", "gpt2")]
    found = targets.read(targets.document(sample, [targets.ask(job) for job in sample]))
    for name, cells in found.items():
        assert written[name] == cells, f"{name}: python -m benchmarks.targets --write docs/matrix.md"
