"""Dropping tokens by rank: quality at equal cache bytes, every method beside every other, and beside kvpress.

    python -m benchmarks.quality [--kvpress PYTHON] [--plot docs/quality_at_equal_bytes.svg] [--json]
    python -m benchmarks.quality --show benchmarks/results/quality.json

Two small trained models, float32. bookworm (7.5M parameters, trained on contexts of 1024 tokens) reads held-out books
and goes on from there: likelihood of the tokens after the context. A recall model (4 layers, trained here in a minute;
`kvpass.quality.recall_model`) is asked for facts in its context: with the question unknown while the context is
compressed, and known: then the prompt ends with the question and one more token, and is asked again behind it.

Every plan gets the largest budget whose cache, side buffers included, is not larger than a fraction of the original's
right after the prompt. What H2O, TOVA, Scissorhands and StreamingLLM do to generated text (they replace entries, and
their cache stays as large as it is) is part of the methods here; kvpress's presses compress the prompt and keep what
follows. PYTHON is an interpreter of another environment with kvpress (`pip install kvpress`; it pins transformers below
5.3); without it, its rows are not measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cache_plans import BOOKWORM
from benchmarks.machine import Machine, describe, keep, parser, show

if TYPE_CHECKING:
    from torch import Tensor

    from kvpass.ir.plan import CachePlan
    from kvpass.quality import RecallBatch
    from kvpass.runtime.transformed import Transformed

FRACTIONS = (0.75, 0.5, 0.35, 0.25, 0.125, 0.0625)
RUNNER = Path(__file__).resolve().parent / "kvpress_runner.py"
PRESSES = {  # the library's names of what is measured here too
    "random": "random",
    "StreamingLLM": "streaming_llm",
    "SnapKV": "snapkv",
    "H2O": "observed_attention",
    "TOVA": "tova",
    "PyramidKV": "pyramidkv",
}


@dataclass(frozen=True)
class Setting:
    """One model and one task.

    Attributes:
        name: what tables call it.
        folder: the model.
        tokens: [N, L] rows; the first `context` tokens are the prompt.
        window: latest tokens that the methods protect and ask.
        task: the questions, where it is recall and not likelihood.
    """

    name: str
    folder: str
    tokens: Tensor
    context: int
    window: int
    task: RecallBatch | None = None


def main() -> int:
    arguments = _arguments()
    if arguments.show:
        document = json.loads(Path(arguments.show).read_text(encoding="utf-8"))
        print(Machine(**document["machine"]).line())
        figures, library = document["rows"], document["kvpress"]
    else:
        machine = describe(arguments.threads)
        print(machine.line())
        figures, library = measure(arguments)
        keep("quality", machine, {"kvpress": library, "rows": figures}, arguments.json)
    for by in ("kvpass", "kvpress"):
        for setting in dict.fromkeys(f["setting"] for f in figures):
            rows = [f for f in figures if (f["setting"], f["by"]) == (setting, by)]
            if rows:
                report(setting, rows, library if by == "kvpress" else "")
    if arguments.plot:
        plot(figures, Path(arguments.plot))
    return 0


def measure(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """All figures, and the version of the library whose figures are among them."""
    import torch
    from transformers import logging

    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    figures: list[dict[str, Any]] = []
    library = ""
    with tempfile.TemporaryDirectory() as scratch:
        settings = make_settings(Path(scratch), arguments)
        for setting in settings:
            figures += ours(setting)
        if arguments.kvpress:
            library, rows = theirs(settings, figures, arguments.kvpress, Path(scratch), arguments.threads)
            figures += rows
    return figures, library


def _arguments() -> argparse.Namespace:
    found = parser("Quality at equal cache bytes.")
    found.add_argument("--kvpress", metavar="PYTHON", help="an interpreter that can import kvpress")
    found.add_argument("--plot", metavar="FILE", help="draw the tables (needs matplotlib)")
    found.add_argument("--show", metavar="FILE", help="measure nothing; show the figures of a JSON file")
    found.add_argument("--windows", type=int, default=32, help="windows of text")
    found.add_argument("--rows", type=int, default=64, help="sequences of facts")
    return found.parse_args()


# ---------------------------------------------------------------------- what is asked


def make_settings(scratch: Path, arguments: argparse.Namespace) -> list[Setting]:
    """The models and their tasks."""
    from kvpass.calibration import encode, load_tokenizer, read_text
    from kvpass.quality import recall_task, train_recall_model
    from kvpass.quality.measures import text_windows

    text = encode(load_tokenizer(str(BOOKWORM)), read_text(BOOKWORM / "heldout.txt"))
    settings = [
        Setting(
            f"bookworm, {context} tokens",
            str(BOOKWORM),
            text_windows(text, context, 64, arguments.windows),
            context,
            16,
        )
        for context in (512, 896)
    ]
    folder = scratch / "recall"
    train_recall_model(layers=4).save_pretrained(folder)
    task = recall_task(seed=5, count=arguments.rows)
    settings.append(Setting("recall, question unknown", str(folder), task.tokens, task.context, 8, task))
    task = known(task)
    settings.append(Setting("recall, question known", str(folder), task.tokens, task.context, 8, task))
    return settings


def known(task: RecallBatch) -> RecallBatch:
    """One row per question: the context, the question and a token of filler go through prefill; then it is asked."""
    import torch

    from kvpass.quality import RecallBatch

    rows, answers, depths = [], [], []
    for row in range(len(task.tokens)):
        for index in range(task.answers.shape[1]):
            question = task.tokens[row, task.context + 2 * index : task.context + 2 * index + 1]
            answer = task.answers[row, index : index + 1]
            filler = task.tokens[row, :1] * 0 + (row + index) % 16
            rows.append(torch.cat([task.tokens[row, : task.context], question, filler, question, answer]))
            answers.append(answer)
            depths.append(task.depths[row, task.facts[row, index]].view(1))
    count, context = len(rows), task.context + 2
    return RecallBatch(
        tokens=torch.stack(rows),
        context=context,
        query_positions=torch.full((count, 1), context),
        answers=torch.stack(answers),
        facts=torch.zeros((count, 1), dtype=torch.long),
        depths=torch.stack(depths),
    )


# ---------------------------------------------------------------------- what is measured


def largest(plan: CachePlan, make: Callable[[int], Any], context: int, allowed: float) -> Any | None:
    """The pass with the largest budget whose cache of a prompt is not above so many bytes; None where there is none."""
    from kvpass.errors import PlanError

    low, high = 0, context
    best = None
    while low < high:
        middle = (low + high + 1) // 2
        step = make(middle)
        try:
            fits = step.plan(plan).bytes(1, context) <= allowed
        except PlanError:  # a budget below what is protected
            fits, step = True, None
        if fits:
            low, best = middle, step
        else:
            high = middle - 1
    return best


def methods(base: Transformed, setting: Setting, fraction: float) -> dict[str, Sequence[Any]]:
    """The plans whose cache is that fraction of the original's; those that cannot be are left out."""
    from kvpass.errors import PlanError
    from kvpass.passes import EvictKV, GroupHeads, PrunePyramid, QuantizeKV

    whole, context, window = base.plan.bytes(1, setting.context), setting.context, setting.window
    allowed = fraction * whole
    small = {"max_recent": window, "min_context": window}
    kinds: dict[str, Callable[[int], Any]] = {
        "random": lambda n: EvictKV("random", budget=n),
        "StreamingLLM": lambda n: EvictKV("recent", budget=n - 1),  # one more slot takes the newest token
        "SnapKV": lambda n: EvictKV("snapkv", budget=n, window=window),
        "H2O": lambda n: EvictKV("h2o", budget=n - 1),
        "TOVA": lambda n: EvictKV("tova", budget=n - 1),
        "Scissorhands": lambda n: EvictKV("scissorhands", budget=n - 1, window=window),
        "PyramidKV": lambda n: EvictKV("pyramidkv", budget=n, window=window),
    }
    found: dict[str, Sequence[Any]] = {}
    for name, make in kinds.items():
        step = largest(base.plan, make, context, allowed)
        if step is not None:
            found[name] = [step]

    def add(name: str, *steps: Any) -> None:
        plan = base.plan
        try:
            for step in steps:
                plan = step.plan(plan)
        except PlanError:  # the schedule has no such fraction
            return
        if plan.bytes(1, context) <= allowed * 1.01:
            found[name] = steps

    add("PyramidInfer", PrunePyramid(keep=fraction, length=context, **small))
    step = PrunePyramid(schedule="step", at=len(base.plan) // 2 - 1, keep=0.3, **small)
    snap = largest(step.plan(base.plan), kinds["SnapKV"], context, allowed)
    if snap is not None:
        add("FastKV-style", step, snap)
    int8 = QuantizeKV(8)
    if fraction <= 0.25:
        snap = largest(int8.plan(base.plan), kinds["SnapKV"], context, allowed)
        if snap is not None:
            add("int8 + SnapKV", int8, snap)
        heads = GroupHeads(base.plan[0].kv_heads // 2, refit="distill", steps=40)
        if "bookworm" in setting.name:
            less = int8.plan(heads.plan(base.plan))
            if less.bytes(1, context) <= allowed:
                add("half the heads + int8", heads, int8)
            else:
                snap = largest(less, kinds["SnapKV"], context, allowed)
                add("half the heads + int8 + SnapKV", heads, int8, *([snap] if snap is not None else []))
                pruning = PrunePyramid(bytes=int(allowed), length=context, **small)
                add("half the heads + int8 + PyramidInfer", heads, int8, pruning)
    return found


def ours(setting: Setting) -> list[dict[str, Any]]:
    """All plans of one setting."""
    import kvpass
    from kvpass import quality

    base = kvpass.transform(setting.folder, progress=False, verify="off")
    whole = base.plan.bytes(1, setting.context)
    runs: dict[tuple[str, float], Transformed] = {("as it is", 1.0): base}
    grouped: dict[str, Transformed] = {}
    for fraction in FRACTIONS:
        for name, steps in methods(base, setting, fraction).items():
            source, rest = base, list(steps)
            if type(rest[0]).__name__ == "GroupHeads":  # distilled once
                key = rest[0].describe()
                if key not in grouped:
                    text = str(BOOKWORM / "calibration.txt")
                    grouped[key] = kvpass.transform(base, rest[:1], calibration=text, progress=False, verify="off")
                source, rest = grouped[key], rest[1:]
            runs[name, fraction] = kvpass.transform(source, rest, progress=False, verify="off")
    found = []
    for (name, fraction), slim in runs.items():
        line: dict[str, Any] = {"setting": setting.name, "by": "kvpass", "method": name, "fraction": fraction}
        if setting.task is None:
            flat = setting.tokens.flatten()
            options = {"context": setting.context, "continuation": setting.tokens.shape[1] - setting.context}
            scores = quality.continuation({"original": base, name: slim}, flat, windows=len(setting.tokens), **options)
            line |= {"nll": scores[name].nll, "delta": scores[name].nll_delta, "delta_se": scores[name].nll_delta_se}
            line |= {"kl": scores[name].kl, "bytes": scores[name].bytes_per_sequence}
        else:
            recalled = quality.recall({name: slim}, setting.task)[name]
            line |= {"recalled": recalled.accuracy, "bytes": recalled.bytes_per_sequence}
        found.append(line | {"share": line["bytes"] / whole})
    return found


def theirs(
    settings: Sequence[Setting], figures: Sequence[dict[str, Any]], python: str, scratch: Path, threads: int
) -> tuple[str, list[dict[str, Any]]]:
    """kvpress on the same rows, in an environment of its own: the library's version, and a row per press."""
    import torch

    runs = []
    for setting in settings:
        for fraction in (1.0, *FRACTIONS):
            for name, press in PRESSES.items() if fraction < 1 else [("as it is", "none")]:
                options = {"window_size": setting.window} if press in ("snapkv", "pyramidkv") else {}
                runs.append(
                    {
                        "name": name,
                        "task": setting.name,
                        "model": setting.folder,
                        "tokens": setting.tokens.tolist(),
                        "context": setting.context,
                        "press": press,
                        "compression_ratio": 1 - fraction,
                        "options": options,
                    }
                )
    asked, answered = scratch / "tasks.json", scratch / "answers.json"
    asked.write_text(json.dumps({"runs": runs}), encoding="utf-8")
    subprocess.run([python, str(RUNNER), str(asked), str(answered), "--threads", str(threads)], check=True)
    document = json.loads(answered.read_text(encoding="utf-8"))
    by_name = {setting.name: setting for setting in settings}
    found = []
    for run, sent in zip(document["runs"], runs, strict=True):
        setting = by_name[run["task"]]
        fraction = round(1 - run["compression_ratio"], 6)
        line: dict[str, Any] = {"setting": setting.name, "by": "kvpress", "method": run["name"], "fraction": fraction}
        whole = next(f["bytes"] / f["share"] for f in figures if f["setting"] == setting.name)
        if "error" in run:
            found.append(line | {"error": run["error"]})
            continue
        line |= {"bytes": run["bytes"], "share": run["bytes"] / whole}
        if setting.task is None:
            line["nll"] = float(torch.tensor(run["nll"], dtype=torch.float64).mean())
            base = next(r for r in document["runs"] if r["task"] == run["task"] and r["press"] == "none")
            gap = torch.tensor(run["nll"], dtype=torch.float64) - torch.tensor(base["nll"], dtype=torch.float64)
            line["delta"] = float(gap.mean())
            line["delta_se"] = float(gap.mean(dim=1).std() / len(gap) ** 0.5)
        else:
            places = setting.task.query_positions - (sent["context"] - 1)
            right = torch.tensor(run["choice"]).gather(1, places) == setting.task.answers
            line["recalled"] = float(right.double().mean())
        found.append(line)
    versions = document["machine"]
    return f"kvpress {versions['kvpress']}, transformers {versions['transformers']}", found


# ---------------------------------------------------------------------- what is shown


def report(setting: str, rows: Sequence[dict[str, Any]], library: str = "") -> None:
    """One table per setting: a method per line, a fraction of the bytes per column."""
    kept = {(r["method"], r["fraction"]): r for r in rows}
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        cells = [method]
        for fraction in (1.0, *FRACTIONS):
            row = kept.get((method, fraction))
            cells.append("" if row is None else "refused" if "error" in row else _cell(row))
        lines.append(cells)
    likelihood = "nll" in rows[0]
    what = "NLL beyond the original's, 0.001 nats per token ± standard error" if likelihood else "facts recalled"
    columns = ["of the bytes:", *(f"{fraction:.2%}".replace(".00%", "%") for fraction in (1.0, *FRACTIONS))]
    show(f"{setting}{', ' + library if library else ''}: {what}", columns, lines)


def _cell(row: dict[str, Any]) -> str:
    if "recalled" in row:
        return f"{row['recalled']:.1%}"
    return (
        f"{row['delta'] * 1e3:+.1f} ± {row['delta_se'] * 1e3:.1f}" if row["fraction"] < 1 else f"NLL {row['nll']:.4f}"
    )


def plot(figures: Sequence[dict[str, Any]], path: Path) -> None:
    """Quality over measured bytes, a panel per setting."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "kvpass"
    names = list(dict.fromkeys(f["method"] for f in figures if f["method"] != "as it is"))
    palette = pyplot.get_cmap("tab20").colors  # in pairs of one hue, which are told apart worst
    colors = dict(zip(names, [*palette[::2], *palette[1::2]], strict=False))
    settings = list(dict.fromkeys(f["setting"] for f in figures))
    figure, panels = pyplot.subplots(2, 2, figsize=(12, 11))
    for panel, setting in zip(panels.flat, settings, strict=True):
        here = [f for f in figures if f["setting"] == setting and "error" not in f]
        what, label = ("delta", "NLL beyond the original's") if "nll" in here[0] else ("recalled", "facts recalled")
        for by, style in (("kvpass", "o-"), ("kvpress", "x:")):
            for name in names:
                points = sorted((f["share"], f[what]) for f in here if (f["by"], f["method"]) == (by, name))
                if points:
                    xs, ys = zip(*points, strict=True)
                    panel.plot(xs, ys, style, color=colors[name], label=f"{name} ({by})", lw=1, ms=4)
        panel.set_title(setting, fontsize=10)
        panel.set_xlabel("cache bytes after the prompt, of the original's")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
