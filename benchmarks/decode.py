"""Decoding on a CPU: the unmodified 100M Llama through kvpass's runtime, beside transformers' own.

    python -m benchmarks.decode [--contexts 512 4096] [--batches 1] [--json]

Both run the same float32 weights (random; 12 layers, 768 wide, 12/4 heads) greedily, in one process, in turn.
transformers runs as it comes: `generate`, SDPA attention, its default cache; and once more with a static cache.
Prefill is timed apart: a decode figure is a run of N new tokens less a run of one, over N - 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.machine import describe, keep, median, parser, show

if TYPE_CHECKING:
    from torch import Tensor, nn

SPEED_AIM = {512: 1.0, 4096: 2.0}  # times as fast as transformers


def main() -> int:
    arguments = _arguments()
    import torch

    torch.set_num_threads(arguments.threads)
    machine = describe(arguments.threads)
    print(machine.line())
    from transformers import logging

    logging.set_verbosity_error()
    model = build()
    bandwidth = read_bandwidth()
    print(f"read bandwidth: {bandwidth / 1e9:.1f} GB/s (a sum over 1 GB, median)")
    figures: list[dict[str, Any]] = []
    for context in arguments.contexts:
        for batch in arguments.batches:
            figures += measure(model, context, batch, bandwidth, arguments)
    report(figures, arguments)
    keep("decode", machine, {"read_bandwidth": bandwidth, "rows": figures}, arguments.json)
    return 0


def _arguments() -> argparse.Namespace:
    found = parser("Decoding on a CPU beside transformers.")
    found.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    found.add_argument("--batches", type=int, nargs="+", default=[1])
    found.add_argument("--new", type=int, default=32, help="tokens to generate")
    found.add_argument("--repeat", type=int, default=5)
    found.add_argument("--no-static", action="store_true", help="leave transformers' static cache out")
    return found.parse_args()


def build() -> nn.Module:
    """A 100M Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=32000,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def read_bandwidth() -> float:
    """Bytes per second that this process reads from memory with its threads: the best of a few sums over 1 GB."""
    import torch

    data = torch.ones(1 << 28)
    times = [_timed(data.sum)[0] for _ in range(7)]
    return data.numel() * data.element_size() / min(times[1:])


@dataclass
class Runner:
    """One way to decode: seconds of prefill, seconds per token of decode, and the tokens."""

    name: str
    run: Callable[[Tensor, int], tuple[float, float, Tensor]]


def measure(
    model: Any, context: int, batch: int, bandwidth: float, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """All runners at one context length and batch, in turn; one dictionary of figures for each."""
    import torch

    import kvpass

    slim = kvpass.transform(model, [], progress=False, device="cpu")
    ids = torch.randint(3, 32000, (batch, context), generator=torch.Generator().manual_seed(context))
    runners = [
        Runner("kvpass, prefill and decode", lambda i, n: _own_loop(slim, i, n)),
        Runner("kvpass, generate", lambda i, n: _by_generate(slim.generate, i, n)),
        Runner("transformers, generate", lambda i, n: _by_generate(model.generate, i, n)),
    ]
    if not arguments.no_static:
        static = _StaticGenerate(model)
        runners.append(Runner("transformers, generate, static cache", lambda i, n: _by_generate(static, i, n)))
    found: dict[str, list[tuple[float, float]]] = {}
    tokens: dict[str, Tensor] = {}
    for turn in range(arguments.repeat + 1):  # the first turn warms up
        for runner in runners:
            gc.collect()
            with torch.no_grad():
                prefill, decode, tokens[runner.name] = runner.run(ids, arguments.new)
            if turn:
                found.setdefault(runner.name, []).append((prefill, decode))
    reference = tokens["transformers, generate"]
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed_tokens" not in n)
    cache = slim.plan.bytes(batch, context + arguments.new // 2)
    floor = (weights + cache) / bandwidth
    baseline = median([d for _, d in found["transformers, generate"]])
    rows = []
    for name, times in found.items():
        decode = median([d for _, d in times])
        rows.append(
            {
                "context": context,
                "batch": batch,
                "runner": name,
                "prefill_seconds": median([p for p, _ in times]),
                "decode_seconds_per_token": decode,
                "all_decode_seconds": [d for _, d in times],
                "times_as_fast": baseline / decode,
                "bytes_per_token_read": weights + cache,
                "share_of_read_floor": floor / decode,
                "same_tokens": bool(torch.equal(tokens[name], reference)),
            }
        )
    return rows


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def _own_loop(slim: Any, ids: Tensor, new: int) -> tuple[float, float, Tensor]:
    """Greedy decoding by `prefill` and `decode`."""
    import torch

    prefill, (logits, state) = _timed(lambda: slim.prefill(ids, capacity=ids.shape[1] + new))
    tokens = [logits.argmax(-1, keepdim=True)]
    began = time.perf_counter()
    for _ in range(new - 1):
        tokens.append(slim.decode(tokens[-1], state)[:, -1].argmax(-1, keepdim=True))
    seconds = (time.perf_counter() - began) / (new - 1)
    return prefill, seconds, torch.cat([ids, *tokens], dim=1)


class _Clock:
    """A streamer that notes when each token was there: what `generate` took for the prompt, and for each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _by_generate(generate: Callable[..., Any], ids: Tensor, new: int) -> tuple[float, float, Tensor]:
    """Greedy decoding by `generate`; where streaming works (one row) the clock reads each token."""
    import torch

    options: dict[str, Any] = {
        "do_sample": False,
        "min_new_tokens": new,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    if ids.shape[0] == 1:
        clock = _Clock()
        tokens = generate(ids, max_new_tokens=new, streamer=clock, **options)
        first, *rest = clock.times[1:]  # the prompt comes first
        return first - clock.times[0], (rest[-1] - first) / len(rest), tokens
    one, _ = _timed(lambda: generate(ids, max_new_tokens=1, **(options | {"min_new_tokens": 1})))
    whole, tokens = _timed(lambda: generate(ids, max_new_tokens=new, **options))
    return one, (whole - one) / (new - 1), tokens


class _StaticGenerate:
    """transformers' `generate` with its static cache, not compiled."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: Tensor, **options: Any) -> Tensor:
        result: Tensor = self.model.generate(ids, cache_implementation="static", disable_compile=True, **options)
        return result


def report(figures: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print one table."""
    rows = []
    for f in figures:
        aim = SPEED_AIM.get(f["context"])
        verdict = ""
        if aim is not None and f["runner"].startswith("kvpass"):
            verdict = "reached" if f["times_as_fast"] >= aim else "missed"
        rows.append(
            [
                f["runner"],
                f"{f['context']}",
                f"{f['batch']}",
                f"{f['prefill_seconds']:.2f} s",
                f"{1e3 * f['decode_seconds_per_token']:.1f} ms",
                f"{f['times_as_fast']:.2f}",
                "" if not verdict else f"{aim:.0f}: {verdict}",
                f"{100 * f['share_of_read_floor']:.0f} %",
                "yes" if f["same_tokens"] else "no",
            ]
        )
    show(
        "Decode of a 100M Llama (12 layers, 768 wide, 12/4 heads, float32) on a CPU",
        ["runner", "context", "batch", "prefill", "per token", "x faster", "aim", "of read floor", "same tokens"],
        rows,
        f"medians of {arguments.repeat} runs of {arguments.new} tokens, in turn; x faster than transformers' generate; "
        "of read floor: time to read weights and cache once at the measured bandwidth, over the time per token",
    )


if __name__ == "__main__":
    sys.exit(main())
