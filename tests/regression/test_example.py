"""The worked example in `examples/ci` passes, and its workflow does what its page says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the example in a repository of its own, beside the model that it names."""
    (tmp_path / "bookworm").symlink_to(EXAMPLES / "bookworm")
    folder = tmp_path / "ci"
    shutil.copytree(EXAMPLES / "ci", folder, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "reviewed"]):
        git(folder, *words)
    return folder


def git(folder: Path, *words: str) -> None:
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *author, *words], cwd=folder, check=True, timeout=60)


def steps(project: Path) -> list[dict[str, str]]:
    workflow = yaml.safe_load((project / ".github" / "workflows" / "cache.yml").read_text())
    return [step for step in workflow["jobs"]["cache"]["steps"] if "run" in step]


def run(project: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A step as GitHub runs it: bash -e, with the commands of this environment."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    kept |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", "-e", "-o", "pipefail", "-c", script]
    return subprocess.run(command, cwd=project, env=kept, timeout=300, capture_output=True, text=True, check=False)


def test_the_workflow_passes_and_shows_a_changed_golden_graded(project):
    install, check, compare = steps(project)
    assert install["run"].startswith("pip install 'kvpass[onnx]'")
    summary = project / "summary.md"

    done = run(project, check["run"].replace("-n 2", "-p no:xdist"), GITHUB_STEP_SUMMARY=str(summary))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    assert "kvpass-lock.toml: 2 of 2 checks passed" in done.stdout
    assert "2 of 2 checks passed" in summary.read_text()
    assert (project / "kvpass.xml").is_file()

    golden = next((project / "tests" / "goldens").rglob("test_the_release_recipe.toml"))
    golden.write_text(golden.read_text().replace("window = 16", "window = 12"))
    git(project, "commit", "-q", "-a", "-m", "shorter")
    done = run(project, compare["run"], GITHUB_STEP_SUMMARY=str(summary), BASE="HEAD~1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_the_release_recipe.toml: plan" in summary.read_text()
    assert "layers 0-1: window 16 -> 12" in summary.read_text()
