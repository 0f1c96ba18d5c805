"""The table of families: every property of `tests/properties.py`, measured on every family and hand-written decoder.

    python -m benchmarks.matrix [--write docs/families.md] [--check] [--workers 2]

One row a model, one column a property: `ok` with the error, or `refused` with a footnote that gives the reason.
`--check` says, by its exit status, whether the file on disk would change in anything but the errors' digits.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, keep, parser, show

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "docs" / "families.md"


@dataclass(frozen=True)
class Result:
    """One row: the decoder, whether transformers has it, and per property (holds, error, reason of a refusal)."""

    name: str
    family: bool
    cells: dict[str, tuple[bool, float, str]]
    seconds: float
    failure: str = ""


def main() -> int:
    found = parser("Measure every property on every family, and write the table of the docs.")
    found.add_argument("--write", metavar="FILE", help="write the table there")
    found.add_argument("--check", action="store_true", help="exit 1 where the file on disk says something else")
    found.add_argument("--workers", type=int, default=2)
    found.add_argument("--only", nargs="+", default=[], help="names of decoders")
    arguments = found.parse_args()
    jobs = [(n, f) for n, f in _names() if not arguments.only or n in arguments.only]
    results = run(jobs, arguments.workers)
    properties = _properties()
    machine = describe(arguments.workers)
    print(machine.line())
    rows = [[r.name, *(_short(r, p) for p in properties), f"{r.seconds:.0f} s"] for r in results]
    show("What holds of which decoder", ["decoder", *properties, "took"], rows)
    broken = [r.name for r in results if r.failure or any(not ok and not reason for ok, _, reason in r.cells.values())]
    if broken:
        print("neither holding nor refused: " + ", ".join(broken))
    text = document(results, properties)
    path = Path(arguments.write) if arguments.write else DEFAULT
    status = 1 if broken else 0
    if arguments.check:
        same = path.is_file() and status_of(path.read_text(encoding="utf-8")) == status_of(text)
        print(f"{path.name} {'is up to date' if same else 'is out of date: write it again with --write'}")
        status = status or int(not same)
    elif arguments.write:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    keep("matrix", machine, {"rows": [_plain(r) for r in results]}, arguments.json)
    return status


# ---------------------------------------------------------------------- measuring


def _prepare() -> None:
    """Make the tests' modules importable."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _names() -> list[tuple[str, bool]]:
    _prepare()
    import decoders
    import families

    return [(n, True) for n in sorted(families.FAMILIES)] + [(n, False) for n in sorted(decoders.DECODERS)]


def _properties() -> dict[str, str]:
    _prepare()
    import properties

    return dict(properties.PROPERTIES)


def examine(job: tuple[str, bool]) -> Result:
    """One decoder, in a worker process."""
    _prepare()
    import torch

    import decoders
    import families
    import properties

    name, family = job
    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        model = families.build(name) if family else decoders.DECODERS[name]()
        found = properties.examine(model, family=family)
    except Exception as error:
        return Result(name, family, {}, time.perf_counter() - began, f"{type(error).__name__}: {error}")
    cells = {k: (c.holds, c.error, c.refused) for k, c in found.cells.items()}
    return Result(name, family, cells, found.seconds)


def run(jobs: Sequence[tuple[str, bool]], workers: int) -> list[Result]:
    """All decoders, in the order given, in worker processes of one thread each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = []
        for result in pool.map(examine, jobs):
            results.append(result)
            print(f"{len(results)}/{len(jobs)} {result.name} {result.failure}".rstrip(), file=sys.stderr)
    return results


# ---------------------------------------------------------------------- writing


def document(results: Sequence[Result], properties: dict[str, str]) -> str:
    """The page of the docs."""
    families = [r for r in results if r.family]
    others = [r for r in results if not r.family]
    machine = describe(1)
    tolerance = _tolerance()
    lines = [
        "# Families",
        "",
        f"{len(families)} configurations of decoder families of transformers and {len(others)} decoders that no",
        "library has, each a tiny model with random weights. Every cell was measured by execution, none declared.",
        "Made by `python -m benchmarks.matrix --write docs/families.md` "
        f"(torch {machine.torch}, transformers {machine.transformers}, {machine.date}).",
        "",
        f"`ok` holds, with the largest error relative to the spread of the logits (allowed: {tolerance:.0e}).",
        "`refused` is an error that names its reason, given below; a model is never rewritten wrongly in silence.",
        "Where the checkpoint of the rewritten model is refused, that of the model itself was written and compared.",
        "`-` does not apply.",
        "",
    ]
    lines += [f"- **{name}**: {meaning}" for name, meaning in properties.items()]
    reasons: dict[str, int] = {}
    for title, rows in (("Families of transformers", families), ("Decoders that no library has", others)):
        lines += ["", f"## {title}", "", "| decoder | " + " | ".join(properties) + " |"]
        lines.append("|---" * (len(properties) + 1) + "|")
        for result in rows:
            cells = [_cell(result, p, reasons) for p in properties]
            lines.append(f"| {result.name} | " + " | ".join(cells) + " |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()] or ["None was refused."]
    return "\n".join(lines) + "\n"


def _cell(result: Result, name: str, reasons: dict[str, int]) -> str:
    if result.failure:
        return "FAILED"
    if name not in result.cells:
        return "-"
    holds, error, reason = result.cells[name]
    if reason:
        number = reasons.setdefault(_plain_words(reason), len(reasons) + 1)
        return f"refused [{number}](#reasons)"
    return f"ok ({_digits(error)})" if holds else f"FAILED ({_digits(error)})"


def _plain_words(reason: str) -> str:
    """A reason without what differs from layer to layer and from node to node."""
    reason = re.sub(r"\bs\d+\b", "s", " ".join(reason.split()).split(" (at ")[0])
    return re.sub(r"^layer \d+: ", "", reason).replace("|", "\\|")


def _digits(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}"


def _short(result: Result, name: str) -> str:
    if result.failure:
        return "FAILED"
    if name not in result.cells:
        return "-"
    holds, error, reason = result.cells[name]
    return "refused" if reason else (_digits(error) if holds else f"FAILED {_digits(error)}")


def _tolerance() -> float:
    _prepare()
    import properties

    return float(properties.TOLERANCE)


def status_of(text: str) -> list[str]:
    """The rows of a page, each cell without its error's digits and its footnote's number."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [re.sub(r"ok \([^)]*\)", "ok", re.sub(r"refused \[[^|]*", "refused ", row)) for row in rows]


def _plain(result: Result) -> dict[str, Any]:
    cells = {n: {"holds": ok, "error": error, "refused": reason} for n, (ok, error, reason) in result.cells.items()}
    return {"name": result.name, "family": result.family, "seconds": result.seconds, "cells": cells} | (
        {"failure": result.failure} if result.failure else {}
    )


if __name__ == "__main__":
    sys.exit(main())
