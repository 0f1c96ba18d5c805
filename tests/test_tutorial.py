"""The commands of docs/tutorial.md run as they stand, in order, and print what the page shows."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpass.cli import app

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(bash|text|python)\n(.*?)```", re.S)


def commands(block: str) -> list[tuple[str, str]]:
    """The commands of a block, each with the lines that it is given (<<'END')."""
    found, lines = [], iter(block.strip().splitlines())
    for line in lines:
        given = ""
        if line.endswith("<<'END'"):
            given = "".join(f"{text}\n" for text in iter(lines.__next__, "END"))
        found.append((line, given))
    return found


def run(line: str, given: str) -> str:
    """One command: kvpass itself in this process, and the two others that the page needs."""
    line, _, status = line.partition("  # status ")
    name, *words = shlex.split(line)
    if name == "mkdir":
        assert words[0] == "-p"
        Path(words[1]).mkdir(parents=True, exist_ok=True)
        return ""
    if name == "cat":
        assert words[0] == ">"
        Path(words[1]).write_text(given, encoding="utf-8")
        return ""
    assert name == "kvpass", line
    done = CliRunner().invoke(app, words)
    assert done.exit_code == int(status or 0), f"{line}\n{done.output}"
    return done.output


def test_the_tutorial_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    said, shown = "", 0
    for kind, block in BLOCK.findall(PAGE):
        if kind == "bash":
            said = "".join(run(line, given) for line, given in commands(block))
        elif kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block, "tutorial.md", "exec"), {})
            said = out.getvalue()
        else:
            for line in block.strip().splitlines():
                pattern = ".*".join(re.escape(part) for part in line.strip().split("…"))
                assert re.search(pattern, said), f"the page shows {line!r}, and this was printed:\n{said}"
                shown += 1
    assert shown >= 15


def test_the_tutorial_writes_nothing_outside_of_its_own_folder(tmp_path: Path) -> None:
    written = {word for line in re.findall(r"^kvpass .*$", PAGE, re.M) for word in shlex.split(line.split("  #")[0])}
    outputs = [word for word in written if word.startswith("build/")]
    assert outputs
    assert all(word.startswith("build/tutorial/") for word in outputs)
