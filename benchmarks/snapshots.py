"""What a snapshot of a deep model costs: seconds, and lines for the calls of its three entries (docs/regression.md).

python -m benchmarks.snapshots [--layers 12 48]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, keep, parser, show

ROOT = Path(__file__).resolve().parent.parent


def measure(families: list[str], depths: list[int]) -> list[dict[str, Any]]:
    """A row of figures per model and recipe."""
    sys.path.insert(0, str(ROOT / "tests"))
    import kvpass
    from families import build
    from kvpass.passes import Pass, PrunePyramid, ShareLayers, SlideWindow
    from kvpass.regression.diff import compare
    from kvpass.regression.snapshot import dump, take

    recipes: dict[str, list[Pass]] = {
        "as it is": [],
        "SlideWindow": [SlideWindow(6, 2)],
        "ShareLayers, yoco": [ShareLayers("yoco")],
        "PrunePyramid, pyramidinfer": [PrunePyramid(schedule="pyramidinfer", decay=0.9)],
    }
    rows = []
    for family in families:
        for layers in depths:
            module = build(family, num_hidden_layers=layers)
            base = kvpass.transform(module, verify="off", progress=False, device="cpu")
            plain = take(base, logits=False)
            for name, steps in recipes.items():
                model = kvpass.transform(base, steps, verify="off", progress=False, device="cpu")
                _ = model.executor  # lowering is what running the model costs anyway
                began = time.perf_counter()
                found = take(model, logits=False)
                taken = time.perf_counter()
                compare(plain, found)
                rows.append(
                    {
                        "model": f"{family}, {layers} layers",
                        "recipe": name,
                        "calls": sum(sum(g.ops.values()) for g in found.program.graphs.values()),
                        "graph_lines": sum(g.text.count("\n") for g in found.program.graphs.values()),
                        "lines": dump(found).count("\n"),
                        "snapshot_seconds": taken - began,
                        "diff_seconds": time.perf_counter() - taken,
                    }
                )
    return rows


def main() -> None:
    arguments = parser("Time snapshots of deep models.")
    arguments.add_argument("--layers", type=int, nargs="+", default=[12, 48], help="depths of the models")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    machine = describe(given.threads)
    rows = measure(["llama", "gemma2"], given.layers)
    columns = ["model", "recipe", "calls", "graph lines", "all lines", "snapshot s", "diff s"]
    cells = [
        [f"{v:.2f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in row.values()]
        for row in rows
    ]
    show("Snapshots without logits; the diff is with the model as it is", columns, cells, machine.line())
    keep("snapshots", machine, {"rows": rows}, given.json)


if __name__ == "__main__":
    main()
