"""What is made from the code on the passes' pages: knobs, and what a pass composes with.

    python -m benchmarks.knobs [--check]

A page names the place with a line `<!-- knobs: GroupHeads -->` or `<!-- composes: GroupHeads -->`; what follows it, up
to the next empty line, is written here: from the dataclass and its docstring, and by planning every pair
(`tests/algebra.py`).
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from benchmarks.generated import write_or_check
from kvpass.ir.plan import CachePlan
from kvpass.passes import Pass
from kvpass.recipe import PASSES

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "passes"
PLACE = re.compile(r"(<!-- (knobs|composes): (\w+) -->\n\n).*?(?=\n\n|\n?\Z)", re.S)


def meanings(kind: type[Pass]) -> dict[str, str]:
    """What the docstring's `Attributes:` says of each field."""
    text = inspect.getdoc(kind) or ""
    block = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", text, re.M | re.S)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in block[1].splitlines() if block else []:
        entry = re.match(r"    ([a-z_][a-z_, ]*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
        words = entry[2] if entry else line.strip()
        for name in names:
            found[name] = f"{found.get(name, '')} {words}".strip()
    return found


def table(kind: type[Pass]) -> str:
    """The knobs of a pass: a row per field."""
    said, hints = meanings(kind), get_type_hints(kind)
    rows = ["| knob | type | default | what it says |", "|---|---|---|---|"]
    for field in fields(kind):  # type: ignore[arg-type]
        default = "needed" if field.default is MISSING else f"`{field.default!r}`"
        words = hints[field.name].__name__ if isinstance(hints[field.name], type) else str(hints[field.name])
        words = re.sub(r"Optional\[(.*)\]", r"\1 | None", words.replace("typing.", "")).replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{words}` | {default} | {said[field.name].replace('|', chr(92) + '|')} |")
    return "\n".join(rows) if len(rows) > 2 else "It has none."


def filled(page: str) -> str:
    """A page with its tables as they are to be."""
    kinds = {kind.__name__: kind for kind in PASSES.values()}
    makers = {"knobs": lambda name: table(kinds[name]), "composes": pairs}
    return PLACE.sub(lambda match: match[1] + makers[match[2]](match[3]), page)


@functools.cache
def _plan() -> CachePlan:
    return algebra().model().plan


def algebra() -> Any:
    """The tests' module of combinations."""
    folder = str(FOLDER.parent.parent / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import algebra

    return algebra


def pairs(name: str) -> str:
    """A line per way to use a pass: with which others it composes, and why not with the rest."""
    found, lines = algebra(), []
    steps = list(found.STEPS)
    for mine in (step for step in steps if step.split(",")[0] == name):
        yes, no = [], {}
        for other in (step for step in steps if step.split(",")[0] != name):
            outcome = found.outcome(_plan(), tuple(sorted((mine, other), key=steps.index)))
            if outcome.plan is not None:
                yes.append(other)
            else:
                no.setdefault(found.LAYER.sub("a layer", outcome.reason), []).append(other)
        lines.append(f"- **{mine}** goes with {'; '.join(yes)}" + ("." if no else ", which is all."))
        lines += [f"- **{mine}** is refused with {'; '.join(others)}: {reason}." for reason, others in no.items()]
    return "\n".join(lines)


def pages() -> Iterator[tuple[Path, str]]:
    """Every page of a pass as it is to be."""
    for path in sorted(FOLDER.glob("*.md")):
        yield path, filled(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(write_or_check("Write knobs and compositions into the passes' pages.", "benchmarks.knobs", pages))
