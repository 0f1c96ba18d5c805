"""What each cache plan costs the embedded model: held-out likelihood beside cache bytes.

    python -m benchmarks.plan_quality [--json]

bookworm (7.5M parameters, trained; 8 layers, 8 KV heads of 32) reads windows of held-out books into its cache under
each plan and goes on from there; nothing is healed. A small model: measure yours with `kvpass eval`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.cache_plans import BOOKWORM
from benchmarks.machine import describe, keep, parser, show


def recipes() -> dict[str, Sequence[Any]]:
    """The plans that are measured."""
    from kvpass.passes import GroupHeads, PageKV, QuantizeKV, ShareLayers, SlideWindow

    found: dict[str, Sequence[Any]] = {
        "int8, per token": [QuantizeKV(8)],
        "fp8 (e4m3), per token": [QuantizeKV(8, "fp8")],
        "int4, per token": [QuantizeKV(4, layout="token")],
        "int4, KIVI 32:32": [QuantizeKV(4)],
        "int4, KIVI 32:128": [QuantizeKV(4, residual=128)],
        "int2, KIVI 32:32": [QuantizeKV(2)],
        "pages of 16": [PageKV()],
        "window 64, 4 sinks": [SlideWindow(64, 4)],
        "window 64, 4 sinks, cache positions": [SlideWindow(64, 4, positions="cache")],
        "window 64, no sinks": [SlideWindow(64, 0)],
        "window 128, 4 sinks": [SlideWindow(128, 4)],
    }
    for source in ("0_1_2_3_4_5_6_6", "cla:2", "pizza:5", "lckv:2", "lckv:4"):
        for init in ("copy", "mean"):
            found[f"{source}, {init}"] = [ShareLayers(source, init=init)]  # type: ignore[arg-type]
            found[f"{source}, {init}, aligned"] = [ShareLayers(source, init=init, align=True)]  # type: ignore[arg-type]
    group = GroupHeads(4, refit="distill", steps=40)
    found["4 KV heads (pca, distill)"] = [group]
    found["4 KV heads, int8"] = [group, QuantizeKV(8)]
    found["4 KV heads, int4 KIVI"] = [group, QuantizeKV(4)]
    found["4 KV heads, 0_1_2_3_4_5_6_6 mean aligned, int4 KIVI"] = [
        group,
        ShareLayers("0_1_2_3_4_5_6_6", init="mean", align=True),
        QuantizeKV(4),
    ]
    return found


def main() -> int:
    arguments = parser("What each cache plan costs the embedded model.").parse_args()
    import torch
    from transformers import logging

    import kvpass
    from kvpass import quality
    from kvpass.calibration import encode, load_tokenizer, read_text

    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    machine = describe(arguments.threads)
    print(machine.line())
    folder = str(BOOKWORM)
    text = encode(load_tokenizer(folder), read_text(BOOKWORM / "heldout.txt"))
    base = kvpass.transform(folder, progress=False, verify="off")
    runs = {"as it is": base}
    for name, steps in recipes().items():
        calibration = str(BOOKWORM / "calibration.txt")
        runs[name] = kvpass.transform(base, steps, calibration=calibration, progress=False, verify="off")
    scores = quality.continuation(runs, text, context=192, continuation=64, windows=32)
    original = scores["as it is"].nll
    length = 192 + 64
    rows, figures = [], []
    for name, score in scores.items():
        plan = runs[name].plan
        held, loss = plan.bytes(1, length), score.nll / original - 1
        figures.append(
            {"plan": name, "cache_bytes": held, "nll": score.nll, "loss": loss, "kl": score.kl, "top1": score.top1}
        )
        rows.append(
            [
                name,
                f"{held:,}",
                f"{base.plan.bytes(1, length) / held:.1f}",
                f"{score.nll:.4f}",
                f"{100 * loss:+.2f} %",
                f"{score.kl:.4f}",
                f"{100 * score.top1:.1f} %",
            ]
        )
    show(
        f"bookworm, held-out text, 32 windows of 192 + 64 tokens; cache of {length} tokens in float32",
        ["plan", "cache bytes", "x smaller", "NLL", "NLL vs original", "KL", "top-1"],
        rows,
    )
    keep("plan_quality", machine, {"rows": figures}, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
