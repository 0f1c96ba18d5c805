"""The pytest plugin: what it writes, what it says when something changed, and that it stays out of the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvpass.regression.diff import compare
from kvpass.regression.snapshot import dump, parse, take
from small_models import plain

HERE = Path(__file__).parent
CONFTEST = f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
import pytest
from kvpass.passes import QuantizeKV, SlideWindow
from small_models import plain

@pytest.fixture
def model():
    return plain()
"""
ONE = """
from kvpass.passes import SlideWindow

def test_the_window(kv_regression, model):
    kv_regression.check(model, [SlideWindow({window}, 2)]{options})
"""


@pytest.fixture(scope="module")
def imported() -> None:
    """Everything that a check imports: pytester forgets what was first imported in its runs, and torch cannot be
    imported twice."""
    found = take(plain())
    compare(found, parse(dump(found), ""))


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, imported: None) -> pytest.Pytester:
    """A project with a model; what this process is for its own run of pytest is no business of that one."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    pytester.makeconftest(CONFTEST)
    return pytester


def one(project: pytest.Pytester, window: int = 6, options: str = "") -> None:
    project.makepyfile(test_one=ONE.format(window=window, options=options))


def golden(project: pytest.Pytester) -> Path:
    return project.path / "goldens" / "test_one" / "test_the_window.toml"


def run(project: pytest.Pytester, *options: str) -> pytest.RunResult:
    return project.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist", *options)


def test_a_golden_is_missing_written_kept_and_then_what_changed_is_printed(project):
    one(project)
    result = run(project)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*test_the_window.toml", "there is no golden*--kvpass-update*"])
    assert not golden(project).exists()

    result = run(project, "--kvpass-update")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*kvpass goldens*", "1 written", "  written goldens/test_one/test_the_window.toml"])
    written = golden(project).read_text()
    assert 'recipe = ["SlideWindow(window=6, sinks=2)"]' in written

    run(project).assert_outcomes(passed=1)
    result = run(project, "--kvpass-update")
    result.stdout.fnmatch_lines(["1 unchanged"])
    assert golden(project).read_text() == written

    one(project, window=7)
    result = run(project)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "change: plan",
            "  plan (plan): layers 0-1: window 6 -> 7; *",
            "  forward (structural): layer 0: kvpass.attention (b*): window 6 -> 7",
            "*+ f32*kvpass.attention(*window=7, sinks=2, layer=0)",
            "if this is what you meant: pytest --kvpass-update, and commit the golden",
        ]
    )
    assert "Traceback" not in result.stdout.str()
    assert golden(project).read_text() == written

    one(project, window=7, options=', allow="plan"')
    run(project).assert_outcomes(passed=1)


def test_a_damaged_golden_is_refused_and_can_be_written_again(project):
    one(project)
    golden(project).parent.mkdir(parents=True)
    golden(project).write_text("format = 1\nrecipe = 3\n")
    result = run(project)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*RequestError: *", "*where: *test_the_window.toml", "*what to do: write it again*"])
    run(project, "--kvpass-update").assert_outcomes(passed=1)
    run(project).assert_outcomes(passed=1)


def test_a_place_that_cannot_be_written_is_said_and_leaves_nothing(project):
    one(project)
    (project.path / "goldens").write_text("in the way")
    result = run(project, "--kvpass-update")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*OutputError: cannot write: *", "*where: *test_the_window.toml*"])
    assert (project.path / "goldens").read_text() == "in the way"


def test_several_checks_of_a_test_need_names_and_parameters_have_goldens_of_their_own(project):
    project.makepyfile(
        test_many="""
        import pytest
        from kvpass.passes import SlideWindow

        def test_twice(kv_regression, model):
            kv_regression.check(model, logits=False)
            kv_regression.check(model, [SlideWindow(6)])

        class TestWindows:
            @pytest.mark.parametrize("window", [5, 6])
            def test_each(self, kv_regression, model, window):
                kv_regression.check(model, [SlideWindow(window)], logits=False)
                kv_regression.check(model, name="whole", logits=False, weights="shapes")
        """
    )
    project.makeini("[pytest]\nkvpass_goldens = kept/here\n")
    result = run(project, "--kvpass-update")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*two checks of one test have the same golden", "*what to do: give each a name="])
    folder = project.path / "kept" / "here" / "test_many"
    assert sorted(f.name for f in folder.iterdir()) == [
        "TestWindows.test_each-5--whole.toml",
        "TestWindows.test_each-5.toml",
        "TestWindows.test_each-6--whole.toml",
        "TestWindows.test_each-6.toml",
        "test_twice.toml",
    ]
    whole = (folder / "TestWindows.test_each-5--whole.toml").read_text()
    assert "rms" not in whole
    assert "[logits]" not in whole


def test_logits_have_a_tolerance_and_weights_may_be_left_out(project):
    project.makepyfile(
        test_one="""
        import torch
        from kvpass.ir.program import Weight
        from kvpass.runtime.transformed import Transformed
        from small_models import plain

        def test_the_window(kv_regression, request):
            base = plain()
            program, moved = base.program.copy(), request.config.rootpath / "moved"
            if moved.exists():
                value = program.read("head.weight") * (1 + float(moved.read_text()))
                program.weights["head.weight"] = Weight.of(value)
            model = Transformed(program, base.report, base.device, base.recipe)
            kv_regression.check(model, weights="shapes", tolerance=1e-2)
        """
    )
    run(project, "--kvpass-update").assert_outcomes(passed=1)
    (project.path / "moved").write_text("5e-3")
    run(project).assert_outcomes(passed=1)
    (project.path / "moved").write_text("5e-2")
    result = run(project)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["change: numerical", "  logits (numerical): off by 5.?e-02 of the spread at *"])


def test_workers_write_and_check_their_goldens_side_by_side(project):
    for name in ("test_a", "test_b"):
        project.makepyfile(**{name: ONE.format(window=6, options="")})
    result = project.runpytest_subprocess("-n", "2", "--kvpass-update")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["2 written", "  written goldens/test_a/*", "  written goldens/test_b/*"])
    result = run(project, f"--junitxml={project.path / 'report.xml'}")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["2 passed"])
    assert 'value="passed goldens/test_a/test_the_window.toml"' in (project.path / "report.xml").read_text()


def test_loading_the_plugin_imports_nothing_slow():
    script = "import kvpass.regression.plugin, sys; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
