"""The tables of knobs on the passes' pages, from the dataclasses and their docstrings.

    python -m benchmarks.knobs [--check]

A page names its place with a line `<!-- knobs: GroupHeads -->`; the table follows it, up to the next empty line.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path

from kvpass.passes import Pass
from kvpass.recipe import PASSES

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "passes"
PLACE = re.compile(r"(<!-- knobs: (\w+) -->\n\n).*?(?=\n\n|\Z)", re.S)


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
    said = meanings(kind)
    rows = ["| knob | type | default | what it says |", "|---|---|---|---|"]
    for field in fields(kind):  # type: ignore[arg-type]
        default = "needed" if field.default is MISSING else f"`{field.default!r}`"
        kind_ = str(field.type).replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{kind_}` | {default} | {said[field.name].replace('|', chr(92) + '|')} |")
    return "\n".join(rows) if len(rows) > 2 else "It has none."


def filled(page: str) -> str:
    """A page with its tables as they are to be."""
    kinds = {kind.__name__: kind for kind in PASSES.values()}
    return PLACE.sub(lambda match: match[1] + table(kinds[match[2]]), page)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of knobs into the passes' pages.")
    parser.add_argument("--check", action="store_true", help="exit 1 where a page would change")
    arguments = parser.parse_args()
    stale = []
    for path in sorted(FOLDER.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if arguments.check:
            stale += [path.name] if before != after else []
        else:
            path.write_text(after, encoding="utf-8")
    for name in stale:
        print(f"{name} is out of date: python -m benchmarks.knobs")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
