"""The README's second example is run as it is written, and its text is the torch program's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpass.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_exported_bookworm_writes_the_text_that_the_readme_shows(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.split("## A second example")[1].split("\n## ")[0]
    commands, shown = re.findall(r"```(?:text)?\n(.*?)```", section, re.S)
    export, generate = (shlex.split(line)[1:] for line in commands.strip().splitlines())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    said = run(*export)
    assert [line.split(":")[0] for line in said.splitlines()[:-1]] == re.findall(r"^(.*?): off by", shown, re.M)
    text = run(*generate)
    assert text.strip() in shown
    transform = [{"export": "transform", "build/package": "build/slim"}.get(word, word) for word in export]
    run(*transform, "--kv-format", "static")
    assert run(*["build/slim" if word == "build/package" else word for word in generate]) == text
