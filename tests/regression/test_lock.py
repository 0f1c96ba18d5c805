"""`kvpass snapshot`, `kvpass diff` and `kvpass check`: what they print, write and end with."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from families import build
from kvpass import cli
from kvpass.errors import RequestError
from kvpass.passes import SlideWindow
from kvpass.regression.diff import Grade, compare
from kvpass.regression.golden import Kept, check
from kvpass.regression.lock import read_lock
from kvpass.regression.snapshot import parse, read
from small_models import quick

LOCK = """
format = 1

[[check]]
name = "plain"
model = "model"

[[check]]
name = "slim"
model = "model"
recipe = "slim.toml"
golden = "kept/slim.toml"

[[check]]
name = "windowed"
model = "model"
weights = "shapes"
logits = false
allow = "numerical"

[[check.pass]]
name = "slide-window"
window = 6
sinks = 2
"""
RECIPE = '[[pass]]\nname = "quantize-kv"\nbits = 8\n'


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(w) for w in words])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def project(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "slim.toml").write_text(RECIPE)
    (tmp_path / "kvpass-lock.toml").write_text(LOCK)
    return tmp_path


def test_a_lock_file_is_updated_checked_and_fails_with_reports(project):
    lock, junit, summary = (project / name for name in ("kvpass-lock.toml", "junit.xml", "summary.md"))
    missing = run("check", lock)
    assert missing.exit_code == 1
    assert "plain: failed" in missing.stdout
    assert "there is no golden" in missing.stdout
    assert "0 of 3 checks passed" in missing.stdout

    written = run("check", lock, "--update")
    assert written.exit_code == 0, written.output
    assert written.stdout.count(": written (") == 3
    assert sorted(p.name for p in project.rglob("*.toml")) == [
        "kvpass-lock.toml",
        "plain.toml",
        "slim.toml",
        "slim.toml",
        "windowed.toml",
    ]
    passed = run("check", lock, "--junit", junit, "--summary", summary)
    assert passed.exit_code == 0, passed.output
    assert ET.parse(junit).getroot().find("testsuite").attrib["failures"] == "0"
    assert "## kvpass-lock.toml: 3 of 3 checks passed" in summary.read_text()

    (project / "slim.toml").write_text(RECIPE.replace("8", "4"))
    lock.write_text(lock.read_text().replace('model = "model"\nweights', 'model = "gone"\nweights'))
    failed = run("check", lock, "--junit", junit, "--summary", summary, "--json")
    assert failed.exit_code == 1
    found = {c["name"]: c for c in json.loads(failed.stdout)["checks"]}
    assert {name: c["status"] for name, c in found.items()} == {
        "plain": "passed",
        "slim": "failed",
        "windowed": "error",
    }
    assert found["slim"]["grade"] == "plan"
    assert "gone" in found["windowed"]["error"]
    suite = ET.parse(junit).getroot().find("testsuite")
    assert (suite.attrib["tests"], suite.attrib["failures"], suite.attrib["errors"]) == ("3", "1", "1")
    failure = suite.find("testcase[@name='slim']/failure")
    assert "stored int8 -> " in failure.text
    page = summary.read_text()
    assert "1 of 3 checks passed" in page
    assert "| slim | failed | plan | plan: layers 0-1: " in page
    assert "```diff" in page
    assert run("check", lock, "--only", "plain").exit_code == 0


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "plain"', 'name = "plain"\nrecipie = "x"', "check 1, recipie: there is no such key"),
        ('name = "plain"', "", "check 1, name: the key is missing"),
        ('name = "plain"', 'name = "slim"', "two checks are called 'slim'"),
        ('name = "plain"', 'name = "../plain"', "check 1, name: "),
        ("logits = false", 'logits = "no"', "check 3, logits: "),
        ("logits = false", "tolerance = -1.0", "check 3, tolerance: "),
        ('allow = "numerical"', 'allow = "most"', "check 3, allow: "),
        ("logits = false", 'recipe = "slim.toml"', "windowed: recipe and pass exclude each other"),
        ("format = 1", "format = 2", "format: "),
        ("format = 1", "formt = 1\nformat = 1", "formt: there is no such key"),
        ("[[check.pass]]", "[[check.pas", "no valid TOML"),
    ],
)
def test_a_wrong_lock_file_is_refused_with_the_check_and_the_key(tmp_path, old, new, words):
    lock = tmp_path / "lock.toml"
    lock.write_text(LOCK.replace(old, new, 1))
    with pytest.raises(RequestError) as caught:
        read_lock(lock)
    assert words in caught.value.what
    assert caught.value.where == str(lock)


def test_a_wrong_request_ends_with_status_2(project):
    assert run("check", project / "none.toml").exit_code == 2
    unknown = run("check", project / "kvpass-lock.toml", "--only", "nothing")
    assert unknown.exit_code == 2
    assert "there is no check 'nothing'" in unknown.stderr
    assert run("diff", project / "none.toml", project / "slim.toml").exit_code == 2
    assert run("diff", project / "slim.toml", project / "slim.toml").exit_code == 2  # a recipe is no snapshot
    wrong = run("snapshot", project / "model", "--kv-heads", "3")
    assert wrong.exit_code == 2


def test_a_pass_that_does_not_exist_is_an_error_of_its_check(project):
    lock = project / "kvpass-lock.toml"
    lock.write_text(LOCK.replace("sinks = 2", "sink = 2"))
    failed = run("check", lock, "--only", "windowed")
    assert failed.exit_code == 2  # nothing was compared
    assert "slide-window has no key 'sink'" in failed.stdout


def test_snapshots_are_written_and_compared(model, tmp_path):
    plain, slim = tmp_path / "plain.toml", tmp_path / "slim.toml"
    assert run("snapshot", model, "-o", plain).exit_code == 0
    assert run("snapshot", model, "--window", "6", "-o", slim).exit_code == 0
    assert run("snapshot", model, "--window", "6").stdout == slim.read_text()
    assert read(slim).recipe == ("SlideWindow(window=6)",)

    same = run("diff", plain, model)
    assert same.exit_code == 0
    assert same.stdout == "change: none\n"

    other = run("diff", plain, slim)
    assert other.exit_code == 1
    assert "plan (plan): layers 0-1: sinks none -> 4, window none -> 6" in other.stdout
    assert run("diff", plain, slim, "--allow", "plan").exit_code == 0
    page = run("diff", plain, slim, "--markdown")
    assert page.stdout.startswith("### plain.toml to slim.toml: plan\n")
    document = json.loads(run("diff", plain, slim, "--json").stdout)
    assert document["grade"] == "plan"
    assert document["differences"][0]["where"] == "plan"
    assert run("diff", plain, slim, "--json", "--markdown").exit_code == 2

    shapes = json.loads(run("snapshot", model, "--weights", "shapes", "--no-logits", "--json").stdout)["snapshot"]
    assert shapes["logits"] is None
    assert {w["rms"] for w in shapes["program"]["weights"]} == {None}


def test_the_exported_graph_is_compared_where_it_was_asked_for(tmp_path):
    pytest.importorskip("onnxruntime")
    golden = tmp_path / "golden.toml"
    slim = quick(build("llama", head_dim=16), SlideWindow(8, 0))
    assert check(slim, golden, Kept(onnx="ort"), update=True).status == "written"
    kept = read(golden)
    assert "com.microsoft.GroupQueryAttention" in kept.onnx.graphs["ort"].ops
    text = golden.read_text()
    assert "local_window_size=8" in text
    before = text.replace("local_window_size=8", "local_window_size=9").replace(kept.onnx.graphs["ort"].meaning, "")
    found = compare(parse(before, "before"), kept)
    assert found.grade == Grade.STRUCTURAL
    assert "onnx ort (structural): layer 0: com.microsoft.GroupQueryAttention" in found.text()
    assert "local_window_size 9 -> 8" in found.text()

    unasked = check(slim, golden)
    assert unasked.status == "failed"
    assert "onnx (structural): is gone" in unasked.text()
