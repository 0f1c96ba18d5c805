"""A new user's way, from a clone to a golden in git and to the check that fails once something changed, in seconds.

    python -m benchmarks.first_golden [--json]

The commands are those of the README and of docs/regression.md, in a clone of what is committed and an environment of
its own; the packages are downloaded. pip keeps what it downloaded before, so a first time ever takes longer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe, keep, parser, show

REPOSITORY = Path(__file__).resolve().parent.parent
TEST = """
from kvpass.passes import GroupHeads, QuantizeKV


def test_the_release_recipe(kv_regression):
    kv_regression.check("../kvpass/examples/bookworm", [GroupHeads(2), QuantizeKV({bits})])
"""


def main() -> None:
    arguments = parser("From a clone to a first golden, and to a failing check.").parse_args()
    machine = describe(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        seconds = walk(Path(folder))
    total = 0.0
    rows = []
    for step, took in seconds.items():
        total += took
        rows.append([step, f"{took:.0f}", f"{total:.0f}"])
    show("From a clone to a failing check", ["step", "seconds", "since the start"], rows, machine.line())
    keep("first_golden", machine, {"seconds": seconds}, arguments.json)


def walk(folder: Path) -> dict[str, float]:
    """Seconds of each step."""
    clone, project = folder / "kvpass", folder / "project"
    venv = folder / "venv"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = f"{venv / 'bin'}{os.pathsep}{environment['PATH']}"
    seconds: dict[str, float] = {}

    def run(step: str, *command: str, at: Path, status: int = 0) -> str:
        began = time.perf_counter()
        done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, check=False)
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - began
        if done.returncode != status:
            raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def write(bits: int) -> None:
        (project / "test_cache.py").write_text(TEST.format(bits=bits), encoding="utf-8")

    project.mkdir()
    run("clone", "git", "clone", "--quiet", str(REPOSITORY), str(clone), at=folder)
    run("install", sys.executable, "-m", "venv", str(venv), at=folder)
    pip = (str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "-c", "constraints.txt")
    run("install", *pip, ".[onnx,report]", "pytest", at=clone)
    write(bits=8)
    run("write the golden", "pytest", "-q", "--kvpass-update", at=project)
    identity = ("-c", "user.name=a new user", "-c", "user.email=user@example.com")
    for command in (("init", "--quiet"), ("add", "."), (*identity, "commit", "--quiet", "-m", "The cache as reviewed")):
        run("commit it", "git", *command, at=project)
    run("a check that passes", "pytest", "-q", at=project)
    write(bits=4)
    said = run("a check that fails", "pytest", "-q", at=project, status=1)
    if "change: plan" not in said:
        raise SystemExit(f"the check failed for another reason than the change:\n{said}")
    return seconds


if __name__ == "__main__":
    main()
