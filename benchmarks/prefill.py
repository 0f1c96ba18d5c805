"""Reading a prompt whose tokens are pruned on the way: time, counted operations and cache bytes.

    python -m benchmarks.prefill [--length 4096] [--repeat 5] [--json]

The 100M Llama of `benchmarks.decode` (random weights: which tokens survive says nothing, how many is what counts) reads
one prompt under each plan, in one process, in turn; medians. "predicted" is `kvpass.ir.cost`'s count, "counted" what
`torch.utils.flop_counter` sees while the prompt is read.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.decode import build
from benchmarks.machine import describe, keep, median, parser, show

AIM = 1.25  # times as fast as the unpruned program, at half the cache


def recipes(length: int) -> dict[str, Sequence[Any]]:
    """The plans that are measured."""
    from kvpass.passes import EvictKV, PrunePyramid

    found: dict[str, Sequence[Any]] = {
        f"PrunePyramid {fraction}": [PrunePyramid(keep=fraction, length=length)] for fraction in (0.75, 0.5, 0.35)
    }
    found["PyramidInfer's published 7B config"] = [PrunePyramid(schedule="pyramidinfer", max_recent=0, min_context=64)]
    found["FastKV-style: 20 % go on behind layer 5"] = [PrunePyramid(schedule="step", at=5, keep=0.2, length=length)]
    found["EvictKV snapkv 0.5"] = [EvictKV("snapkv", keep=0.5)]
    found["EvictKV h2o 0.5"] = [EvictKV("h2o", keep=0.5)]
    return found


def count(slim: Any, tokens: Any) -> int:
    """Operations that torch counts while a prompt is read."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def linear(x: Any, weight: Any, *rest: Any, **options: Any) -> int:
        return 2 * math.prod(x) * int(weight[0])

    def attention(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
        return 2 * math.prod(q[:3]) * int(k[2]) * int(q[3] + v[3])

    missing = {  # in torch's own table
        torch.ops.mkldnn._linear_pointwise: linear,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        slim.prefill(tokens)
    return int(counter.get_total_flops())


def main() -> int:
    found = parser("Reading a prompt whose tokens are pruned on the way.")
    found.add_argument("--length", type=int, default=4096)
    found.add_argument("--repeat", type=int, default=5)
    arguments = found.parse_args()
    import torch
    from transformers import logging

    import kvpass
    from kvpass.ir.cost import prompt_cost
    from kvpass.quality import cache_bytes

    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    machine = describe(arguments.threads)
    print(machine.line())
    model, length = build(), arguments.length
    base = kvpass.transform(model, progress=False, verify="off")
    runs = {"as it is": base}
    for name, steps in recipes(length).items():
        runs[name] = kvpass.transform(base, steps, progress=False, verify="off")
    tokens = torch.randint(0, base.program.facts.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))

    def by_transformers() -> None:
        with torch.no_grad():
            model(tokens, use_cache=True, logits_to_keep=1)  # type: ignore[operator]

    calls = {name: (lambda slim=slim: slim.prefill(tokens)) for name, slim in runs.items()}
    calls["transformers"] = by_transformers
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.repeat):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    whole = median(seconds["as it is"])
    rows, figures = [], []
    for name, taken in seconds.items():
        time_ = median(taken)
        figure: dict[str, Any] = {"plan": name, "seconds": time_, "times_as_fast": whole / time_}
        cells = ["", "", "", ""]
        if name in runs:
            slim = runs[name]
            figure["predicted_flops"] = prompt_cost(slim.program).total(slim.plan, length)
            figure["counted_flops"] = count(slim, tokens)
            figure["cache_bytes"] = cache_bytes(slim.prefill(tokens)[1]).allocated
            figure["planned_bytes"] = slim.plan.bytes(1, length)
            off = figure["counted_flops"] / figure["predicted_flops"] - 1
            share = figure["planned_bytes"] / base.plan.bytes(1, length)
            cells = [
                f"{share:.1%}",
                f"{figure['predicted_flops'] / 1e9:,.1f}",
                f"{figure['counted_flops'] / 1e9:,.1f}",
                f"{off:+.2%}",
            ]
        figures.append(figure)
        rows.append([name, *cells, f"{time_:.2f}", f"{whole / time_:.2f}"])
    show(
        f"a prompt of {length:,} tokens, 100M Llama, float32; medians of {arguments.repeat}",
        ["plan", "cache bytes", "GFLOPs predicted", "counted", "off", "seconds", "times as fast"],
        rows,
        f"aim: {AIM} times as fast at half the cache",
    )
    keep("prefill", machine, {"length": length, "rows": figures}, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
