"""The table of families, passes and targets (docs/matrix.md): which rewritten model can leave in which form.

    python -m benchmarks.targets [--write docs/matrix.md] [--workers 2] [--only llama gpt2]

One row a decoder of the tests, one column a pass. Every pass is applied to the tiny model. The checkpoint is written
and read back, for a pass that `kvpass transform --save hf` takes, and the kvpass folder is written; of ONNX the plan
and the program are checked, which is where an export refuses, and no package is made.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "docs" / "matrix.md"
TARGETS = {
    "h": "a Hugging Face checkpoint",
    "k": "a kvpass folder",
    "r": "ONNX for onnxruntime (`ort`)",
    "o": "ONNX of the standard (`onnx`)",
    "s": "ONNX of the standard, caches in place (`onnx-static`)",
}
PASSES = {
    "as it is": "no pass",
    "GroupHeads": "to half the KV heads",
    "ShareLayers": '`"cla:2"`',
    "SlideWindow": "window 8, 2 sinks, positions of the text",
    "SlideWindow, cache": "the same, positions of the cache",
    "QuantizeKV": "8 bits per token",
    "QuantizeKV, static": "8 bits, fixed scales",
    "EvictKV": '`"snapkv"`, half of a prompt',
    "PrunePyramid": "half of a prompt goes on behind the first layer",
    "PageKV": "pages of 16",
}


@dataclass(frozen=True)
class Cell:
    """One pass on one decoder: the targets that take it and why the others do not, or why the pass is refused."""

    takes: str = ""
    refused: tuple[tuple[str, str], ...] = ()  # (target, reason)
    reason: str = ""
    applies: bool = True


Row = dict[str, Cell]


def main() -> None:
    parser = argparse.ArgumentParser(description="Which family can take which pass to which target.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the page there")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], help="names of decoders")
    arguments = parser.parse_args()
    jobs = [job for job in names() if not arguments.only or job[0] in arguments.only]
    rows = run(jobs, arguments.workers)
    text = document(jobs, rows)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


# ---------------------------------------------------------------------- asking


def names() -> list[tuple[str, bool]]:
    """Every decoder of the tests, and whether transformers has it."""
    _prepare()
    import decoders
    import families

    return [(n, True) for n in sorted(families.FAMILIES)] + [(n, False) for n in sorted(decoders.DECODERS)]


def _prepare() -> None:
    """Make the tests' modules importable."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)


def run(jobs: Sequence[tuple[str, bool]], workers: int) -> list[Row]:
    """All decoders, in worker processes of one thread each."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_alone) as pool:
        rows = []
        for (name, _), row in zip(jobs, pool.map(ask, jobs), strict=True):
            rows.append(row)
            print(f"{len(rows)}/{len(jobs)} {name}", file=sys.stderr)
        return rows


def _alone() -> None:
    import torch

    torch.set_num_threads(1)


def ask(job: tuple[str, bool]) -> Row:
    """One decoder under every pass."""
    _prepare()
    import decoders
    import families
    import kvpass
    import properties

    properties.quiet()
    name, family = job
    base = kvpass.transform(families.build(name) if family else decoders.DECODERS[name](), progress=False, verify="off")
    if base.program.facts.max_positions is None:  # a bare module does not say how long its tables are
        base.program.facts.max_positions = decoders.MAX_LEN
    return {title: _cell(base, title, family) for title in PASSES}


def _steps(base: Any, title: str) -> list[Any] | None:
    """The pass of a column, or None where there is nothing for it to do."""
    from kvpass.passes import EvictKV, GroupHeads, PageKV, PrunePyramid, QuantizeKV, ShareLayers, SlideWindow

    if title == "GroupHeads" and all(cache.kv_heads == 1 for cache in base.plan):
        return None
    makers: dict[str, Callable[[], list[Any]]] = {
        "as it is": list,
        "GroupHeads": lambda: [GroupHeads(tuple(max(1, c.kv_heads // 2) for c in base.plan), method="mean")],
        "ShareLayers": lambda: [ShareLayers("cla:2")],
        "SlideWindow": lambda: [SlideWindow(8, 2)],
        "SlideWindow, cache": lambda: [SlideWindow(8, 2, positions="cache")],
        "QuantizeKV": lambda: [QuantizeKV(8)],
        "QuantizeKV, static": lambda: [QuantizeKV(8, layout="static")],
        "EvictKV": lambda: [EvictKV("snapkv", keep=0.5)],
        "PrunePyramid": lambda: [PrunePyramid(schedule="step", at=0, keep=0.5)],
        "PageKV": lambda: [PageKV(16)],
    }
    return makers[title]()


def _cell(base: Any, title: str, family: bool) -> Cell:
    import torch

    import kvpass
    from kvpass.cli import EXPRESSIBLE
    from kvpass.errors import KvpassError
    from kvpass.export.onnx.lower import check_plan, check_program

    steps = _steps(base, title)
    if steps is None:
        return Cell(applies=False)
    text = None
    if any(step.needs_calibration for step in steps):
        text = torch.randint(0, base.program.facts.vocab_size, (8, 80), generator=torch.Generator().manual_seed(0))
    try:
        slim = kvpass.transform(base, steps, calibration=text, progress=False, verify="off") if steps else base
    except KvpassError as error:
        return Cell(reason=_plain_words(error.what))

    def checkpoint() -> None:
        if any(step.key() not in EXPRESSIBLE for step in steps):
            raise KvpassError("a plain checkpoint cannot say what this pass does")
        slim.save_pretrained(Path(folder) / "checkpoint")

    def package(target: Any) -> None:
        check_plan(slim.plan, target)
        check_program(slim.program, target)

    ways: dict[str, Callable[[], Any]] = {
        "h": checkpoint,
        "k": lambda: slim.save(Path(folder) / "program"),
        "r": lambda: package("ort"),
        "o": lambda: package("onnx"),
        "s": lambda: package("onnx-static"),
    }
    if not family:
        del ways["h"]
    takes, refused = "", []
    with tempfile.TemporaryDirectory() as folder:
        for target, way in ways.items():
            try:
                way()
                takes += target
            except KvpassError as error:
                refused.append((target, _plain_words(error.what)))
    return Cell(takes, tuple(refused))


def _plain_words(reason: str) -> str:
    """A reason without what differs from layer to layer, target to target and node to node."""
    reason = " ".join(reason.split()).split(" (at ")[0].replace("|", "\\|")
    reason = re.sub(r"^layer \d+ cannot be exported for .*?: ", "", reason)
    reason = re.sub(r"cannot be exported for .*? yet", "cannot be exported yet", reason)
    reason = re.sub(r"\bs\d+\b", "s", re.sub(r"^layer \d+: ", "", reason))
    reason = re.sub(r"\blayers \d+ and \d+\b", "two layers", re.sub(r"\blayer \d+\b", "a layer", reason))
    return re.sub(r"^the \w+ config cannot express (\d+) .*", r"the family's config cannot express \1 KV heads", reason)


# ---------------------------------------------------------------------- writing


def document(jobs: Sequence[tuple[str, bool]], rows: Sequence[Row]) -> str:
    """The page of the docs."""
    reasons: dict[str, int] = {}
    lines = [
        "# Families, passes and targets",
        "",
        "Which rewritten model leaves in which form. Made by `python -m benchmarks.targets --write docs/matrix.md` on",
        "the tiny models of the tests: every pass is applied; checkpoints and kvpass folders are written; for ONNX",
        "the plan and the program are checked, and no package is made. What was run and measured of each family is in",
        "[its own table](families.md), which passes go together in [another](plans.md).",
        "",
        *[f"- **{letter}**: {meaning}" for letter, meaning in TARGETS.items()],
        "",
        "A letter is missing where the target refuses, for the reason under the number. `refused`: the pass is. `-`:",
        "nothing to do. Decoders that no library has have no checkpoint to be written to.",
        "",
        *[f"- **{title}**: {meaning}" for title, meaning in PASSES.items()],
    ]
    for heading, wanted in (("Families of transformers", True), ("Decoders that no library has", False)):
        chosen = [(name, row) for (name, family), row in zip(jobs, rows, strict=True) if family == wanted]
        lines += ["", f"## {heading}", "", "| decoder | " + " | ".join(PASSES) + " |"]
        lines.append("|---" * (len(PASSES) + 1) + "|")
        for name, row in chosen:
            lines.append(f"| {name} | " + " | ".join(_words(row[title], reasons) for title in PASSES) + " |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()] or ["None was refused."]
    return "\n".join(lines) + "\n"


def _words(cell: Cell, reasons: dict[str, int]) -> str:
    if not cell.applies:
        return "-"
    why = [cell.reason] if cell.reason else list(dict.fromkeys(reason for _, reason in cell.refused))
    numbers = [str(reasons.setdefault(reason, len(reasons) + 1)) for reason in why]
    note = f" [{', '.join(numbers)}](#reasons)" if numbers else ""
    return ("refused" if cell.reason else " ".join(cell.takes)) + note


def read(text: str) -> dict[str, list[str]]:
    """The cells of a page by decoder, each with its reasons in words instead of numbers."""
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.M))
    rows = {}
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| decoder"):
            name, *cells = (cell.strip() for cell in line.strip("| ").split(" | "))
            rows[name] = [re.sub(r"\[([\d, ]+)\]\(#reasons\)", lambda m: _spelled(m[1], reasons), c) for c in cells]
    return rows


def _spelled(numbers: str, reasons: dict[str, str]) -> str:
    return "; ".join(reasons[number] for number in numbers.split(", "))


if __name__ == "__main__":
    main()
