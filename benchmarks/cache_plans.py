"""Every cache plan beside transformers' own caches: measured bytes, decode and prefill speed, on a CPU.

    python -m benchmarks.cache_plans [--models bookworm llama-100m] [--contexts 512 4096 16384] [--json]

All run in one process. Each prompt is read once per context (prefill); then the runners decode in turn, a few tokens
each per round, and the medians over rounds are shown. Bytes are those of the tensors that a state holds after the
prompt, scales, tables and residuals included. transformers decodes by its forward pass with its dynamic, static and
(where optimum-quanto or hqq is installed) quantized cache. Speeds of plans with random weights say nothing of quality;
`kvpass eval` and docs/quality.md do.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.decode import build
from benchmarks.machine import describe, keep, median, parser, show

if TYPE_CHECKING:
    from torch import Tensor

BOOKWORM = Path(__file__).resolve().parent.parent / "examples" / "bookworm"
SLOW_BEYOND = 4096  # tokens beyond which a prompt that takes nine passes is not measured


@dataclass
class Runner:
    """One way to keep keys and values.

    Attributes:
        name: the passes, or transformers' cache.
        prefill: reads a prompt [1, S]; returns the first new token [1, 1] and a state.
        decode: one token further: (token, state) -> token.
        held: bytes that a state holds.
        longest: contexts beyond are not measured.
    """

    name: str
    prefill: Callable[[Tensor, int], tuple[Tensor, Any]]
    decode: Callable[[Tensor, Any], Tensor]
    held: Callable[[Any], int]
    longest: int = sys.maxsize


def main() -> int:
    found = parser("Every cache plan beside transformers' caches, on a CPU.")
    found.add_argument("--models", nargs="+", default=["bookworm", "llama-100m"], choices=["bookworm", "llama-100m"])
    found.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 16384])
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--tokens", type=int, default=8, help="tokens per round")
    arguments = found.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, logging

    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    machine = describe(arguments.threads)
    print(machine.line())
    figures: list[dict[str, Any]] = []
    for name in arguments.models:
        model = build() if name == "llama-100m" else AutoModelForCausalLM.from_pretrained(BOOKWORM, dtype=torch.float32)
        for context in arguments.contexts:
            rows = measure(model.eval(), name, context, arguments.rounds, arguments.tokens)
            figures += rows
            report(name, context, rows, arguments.rounds, arguments.tokens)
    keep("cache_plans", machine, {"rows": figures}, arguments.json)
    return 0


def recipes(kv_heads: int) -> dict[str, Sequence[Any]]:
    """The plans that are measured."""
    from kvpass.passes import GroupHeads, PageKV, QuantizeKV, ShareLayers, SlideWindow

    group, share = GroupHeads(kv_heads // 2), ShareLayers("cla:2")
    return {
        "as it is": [],
        f"GroupHeads({kv_heads // 2})": [group],
        "ShareLayers(cla:2)": [share],
        "ShareLayers(lckv:2), 9 passes": [ShareLayers("lckv:2", passes=9, tolerance=0.0, fallback=False)],
        "SlideWindow(256, 4 sinks)": [SlideWindow(256, 4)],
        "SlideWindow(256, 4), cache positions": [SlideWindow(256, 4, positions="cache")],
        "QuantizeKV(8)": [QuantizeKV(8)],
        "QuantizeKV(8, fp8)": [QuantizeKV(8, "fp8")],
        "QuantizeKV(4), per token": [QuantizeKV(4, layout="token")],
        "QuantizeKV(4), KIVI": [QuantizeKV(4)],
        "PageKV(16)": [PageKV(16)],
        "GroupHeads, cla:2, int8": [group, share, QuantizeKV(8)],
        "GroupHeads, cla:2, window 256, int8, paged": [group, share, SlideWindow(256, 4), QuantizeKV(8), PageKV(16)],
    }


def runners(model: Any) -> list[Runner]:
    """kvpass's plans and transformers' caches for one model."""
    import kvpass

    base = kvpass.transform(model, progress=False, verify="off", device="cpu")
    made = []
    for name, steps in recipes(base.plan[0].kv_heads).items():
        slim = kvpass.transform(base, steps, progress=False, verify="off", device="cpu")
        made.append(
            Runner(
                f"kvpass: {name}",
                lambda ids, room, s=slim: _own_prefill(s, ids, room),  # type: ignore[misc]
                lambda token, state, s=slim: s.decode(token, state)[:, -1].argmax(-1, keepdim=True),  # type: ignore[misc]
                lambda state: int(state.allocated_bytes()),
                SLOW_BEYOND if slim.plan.upward else sys.maxsize,
            )
        )
    return made + [_transformers(model, kind) for kind in _caches()]


def _own_prefill(slim: Any, ids: Tensor, room: int) -> tuple[Tensor, Any]:
    logits, state = slim.prefill(ids, capacity=room)
    return logits.argmax(-1, keepdim=True), state


def _caches() -> list[str]:
    quantized = [f"quantized, {b}" for b, m in (("quanto", "optimum.quanto"), ("hqq", "hqq")) if _installed(m)]
    if not quantized:
        print("transformers' quantized cache: not measured, neither optimum-quanto nor hqq is installed")
    return ["dynamic", "static", *quantized]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _transformers(model: Any, kind: str) -> Runner:
    import torch
    from transformers import DynamicCache, QuantizedCache, StaticCache

    def prefill(ids: Tensor, room: int) -> tuple[Tensor, Any]:
        if kind == "dynamic":
            cache = DynamicCache(config=model.config)
        elif kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=room)
        else:
            cache = QuantizedCache(backend=kind.split(", ")[1], config=model.config)
        with torch.no_grad():
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True), cache

    def decode(token: Tensor, cache: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(token, past_key_values=cache).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def held(cache: Any) -> int:
        found = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
        return sum(_bytes(t) for t in found)

    return Runner(f"transformers: {kind} cache", prefill, decode, held)


def _bytes(tensor: Any) -> int:
    """Bytes of a tensor, or of the tensors that one of a quantized kind is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return int(tensor.numel() * tensor.element_size()) if tensor.numel() > 1 else 0


def measure(model: Any, name: str, context: int, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """All runners at one context: prompts one after the other, then rounds of decoding in turn."""
    import torch

    vocabulary = int(model.config.vocab_size)
    ids = torch.randint(3, vocabulary, (1, context), generator=torch.Generator().manual_seed(context))
    room = context + (rounds + 1) * tokens + 1
    state: dict[str, list[Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    made = runners(model)
    for runner in made:
        runner.prefill(ids[:, :64], 64)  # weights are folded and code is warm
    for runner in made:
        rows[runner.name] = {"model": name, "context": context, "runner": runner.name}
        if context > runner.longest:
            continue
        gc.collect()
        began = time.perf_counter()
        token, held = runner.prefill(ids, room)
        rows[runner.name]["prefill_tokens_per_second"] = context / (time.perf_counter() - began)
        rows[runner.name]["cache_bytes"] = runner.held(held)
        state[runner.name] = [token, held]
    seconds: dict[str, list[float]] = {n: [] for n in state}
    for turn in range(rounds + 1):  # the first turn warms up
        for runner in made:
            if runner.name not in state:
                continue
            token, held = state[runner.name]
            began = time.perf_counter()
            for _ in range(tokens):
                token = runner.decode(token, held)
            if turn:
                seconds[runner.name].append((time.perf_counter() - began) / tokens)
            state[runner.name][0] = token
    for key, times in seconds.items():
        rows[key]["decode_tokens_per_second"] = 1 / median(times)
        rows[key]["all_decode_seconds"] = times
    return list(rows.values())


def report(name: str, context: int, rows: list[dict[str, Any]], rounds: int, tokens: int) -> None:
    """Print one table."""
    baseline = next(r for r in rows if r["runner"] == "transformers: dynamic cache")
    printed = []
    for r in rows:
        if "cache_bytes" not in r:
            printed.append([r["runner"], *["not measured"] * 5])
            continue
        printed.append(
            [
                r["runner"],
                f"{r['cache_bytes'] / 1e6:.2f} MB",
                f"{baseline['cache_bytes'] / r['cache_bytes']:.1f}",
                f"{r['prefill_tokens_per_second']:,.0f}",
                f"{r['decode_tokens_per_second']:.1f}",
                f"{r['decode_tokens_per_second'] / baseline['decode_tokens_per_second']:.2f}",
            ]
        )
    show(
        f"{name}, context {context}, float32, one sequence",
        ["runner", "cache", "x smaller", "prefill tok/s", "decode tok/s", "x faster"],
        printed,
        f"decode: medians of {rounds} rounds of {tokens} tokens, in turn; x against transformers' dynamic cache",
    )


if __name__ == "__main__":
    sys.exit(main())
