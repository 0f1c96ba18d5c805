"""What a figure was measured on, and how it is shown and kept: shared by all benchmarks."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
THREADS = 2


@dataclass(frozen=True)
class Machine:
    """The hardware and the libraries; no host name and no path."""

    cpu: str
    cores: int
    memory_gb: float
    threads: int
    python: str
    torch: str
    transformers: str
    date: str

    def line(self) -> str:
        """One line for the head of a table."""
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_gb:.0f} GB; {self.threads} threads; Python {self.python}, "
            f"torch {self.torch}, transformers {self.transformers}; {self.date}"
        )


def describe(threads: int = THREADS) -> Machine:
    """This machine, for a benchmark that computes with so many threads."""
    from importlib.metadata import version

    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=pages * size / 2**30,
        threads=threads,
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        date=datetime.date.today().isoformat(),
    )


def _cpu() -> str:
    """The CPU's model name; its family and model number too where the name says little."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name", platform.machine())
    numbers = f"family {fields.get('cpu family')}, model {fields.get('model')}"
    return name if any(c.isdigit() for c in name) else f"{name} ({numbers})"


def parser(description: str, *, shows: bool = False) -> argparse.ArgumentParser:
    """Arguments that every benchmark has; `--show` those whose figures can be printed again."""
    found = argparse.ArgumentParser(description=description)
    if shows:
        words = "print figures as Markdown; measure nothing"
        found.add_argument("--show", nargs="?", const="", metavar="FILE", help=words)
    found.add_argument("--json", nargs="?", const="", metavar="FILE", help="write figures (to results/NAME.json)")
    found.add_argument("--threads", type=int, default=THREADS, help="threads to compute with")
    return found


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print a table; the first column is words, the others are figures."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=note or None, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=118, highlight=False).print(table)


def keep(name: str, machine: Machine, figures: dict[str, Any], target: str | None) -> None:
    """Write the figures as JSON where that was asked for."""
    if target is None:
        return
    path = _place(name, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": name, "machine": asdict(machine), **figures}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def kept(name: str, target: str) -> dict[str, Any]:
    """What `keep` wrote: to a file, or to results/NAME.json where none is named."""
    found: dict[str, Any] = json.loads(_place(name, target).read_text(encoding="utf-8"))
    return found


def _place(name: str, target: str) -> Path:
    return Path(target) if target else RESULTS / f"{name}.json"


def median(values: Sequence[float]) -> float:
    """The median of some timings."""
    return float(statistics.median(values))
