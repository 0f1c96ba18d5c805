"""The table of kernels: what each takes on each GPU, compiled ahead of time, none of them present.

    python -m benchmarks.kernel_table [--write docs/kernels.md] [--targets sm_90 gfx942] [--workers 4]

One row a case of `kvpass.kernels.cases`, one column a target. `--write` puts the table between the two markers of a
page and leaves the rest of it as it is; a page that is not there yet is begun. The exit status is 1 where a case fails
to compile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from kvpass.kernels.aot import TARGETS, Resources, measure_all

BEGIN, END = "<!-- kernel table: begin -->", "<!-- kernel table: end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile all kernels for all targets, and tabulate what they take.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the table there")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--module", default="kvpass.kernels.cases", help="has cases(target) -> list[Case]")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    arguments = parser.parse_args()
    resources, failures = measure_all(arguments.module, arguments.targets, arguments.workers)
    text = table(resources, arguments.targets)
    print(text, end="")
    for failure in failures:
        print(f"{failure.target} {failure.label}: {failure.message}", file=sys.stderr)
    if failures:
        return 1
    if arguments.write:
        path: Path = arguments.write
        path.parent.mkdir(parents=True, exist_ok=True)
        page = path.read_text(encoding="utf-8") if path.is_file() else f"# Kernels\n\n{BEGIN}\n{END}\n"
        path.write_text(insert(page, text), encoding="utf-8")
    return 0


def table(resources: Sequence[Resources], targets: Sequence[str]) -> str:
    """Markdown: what is wrong, then a row a case and a column a target."""
    rows: dict[str, dict[str, list[Resources]]] = {}
    for r in resources:
        rows.setdefault(r.label, {}).setdefault(r.target, []).append(r)
    lines = [
        f"Compiled by Triton {version('triton')}; made by `python -m benchmarks.kernel_table --write docs/kernels.md`.",
        f"{len(rows)} configurations. {problems(resources)}",
        "",
        "Cells say how many registers a thread takes and how many KB of shared memory a program takes, of the kernels",
        "and variants that a case launches the most; variants, how often one of its kernels is compiled.",
        "",
        "| case | " + " | ".join(targets) + " | variants |",
        "|---|" + "---:|" * (len(targets) + 1),
    ]
    for label, row in rows.items():
        cells = [cell(row.get(target, [])) for target in targets]
        variants = max(r.variants for found in row.values() for r in found)
        lines.append("| " + " | ".join([label, *cells, str(variants)]) + " |")
    return "\n".join(lines) + "\n"


def problems(resources: Sequence[Resources]) -> str:
    """What should not be, in a sentence."""
    found = [f"{r.label} on {r.target}: `{r.kernel}` {', '.join(r.problems)}." for r in resources if r.problems]
    return " ".join(found) or (
        "None spills registers, takes more shared memory than a program may, loads codes byte by byte, or is compiled "
        "again for another length."
    )


def cell(found: Sequence[Resources]) -> str:
    """What the kernels of a case take on one target."""
    if not found:
        return ""
    return f"{max(r.registers for r in found)} / {max(r.shared for r in found) / 1024:.1f}"


def insert(page: str, text: str) -> str:
    """A page with its table replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page has no place for the table: put the lines {BEGIN} and {END} where it should stand")
    return f"{before}{BEGIN}\n{text}{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
