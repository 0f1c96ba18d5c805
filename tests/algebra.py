"""Which passes compose: every pair, every triple and all of them, planned and run."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvpass
from kvpass.errors import PlanError
from kvpass.ir.plan import CachePlan
from kvpass.passes import EvictKV, GroupHeads, PageKV, Pass, PrunePyramid, QuantizeKV, ShareLayers, SlideWindow
from kvpass.runtime.transformed import Transformed

LAYER = re.compile(r"[Ll]ayer \d+")
STEPS: dict[str, Pass] = {
    "GroupHeads": GroupHeads(2),
    "ShareLayers, downward": ShareLayers("cla:2"),
    "ShareLayers, upward": ShareLayers("lckv:2"),
    "SlideWindow, text": SlideWindow(8, 2),
    "SlideWindow, cache": SlideWindow(8, 2, positions="cache"),
    "QuantizeKV, token": QuantizeKV(8),
    "QuantizeKV, KIVI": QuantizeKV(4, layout="kivi", group=8, residual=8),
    "EvictKV, prompt": EvictKV("snapkv", budget=200),
    "EvictKV, replacing": EvictKV("h2o", budget=200),
    "PrunePyramid": PrunePyramid(schedule="pyramidinfer", decay=0.8),
    "PageKV": PageKV(4),
}


@dataclass(frozen=True)
class Outcome:
    """What planning a combination gave: a plan, or the reason why not."""

    names: tuple[str, ...]
    plan: CachePlan | None
    reason: str = ""


def model() -> Transformed:
    """A small decoder of four layers with four KV heads, in float64, where a rounding never flips a code."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(config).eval().double()
    return kvpass.transform(decoder, progress=False, verify="off")


def combinations(size: int) -> list[tuple[str, ...]]:
    """All ways to choose that many different passes, in the order in which they stand here."""
    found = itertools.combinations(STEPS, size)
    return [names for names in found if len({n.split(",")[0] for n in names}) == size]


def outcome(plan: CachePlan, names: tuple[str, ...]) -> Outcome:
    """Plan a combination."""
    try:
        for name in names:
            plan = STEPS[name].plan(plan)
    except PlanError as error:
        return Outcome(names, None, error.what)
    return Outcome(names, plan)


def document(plan: CachePlan) -> str:
    """The page of the docs."""
    names = list(STEPS)
    reasons: list[str] = []
    rows = []
    for row in names:
        cells = []
        for column in names:
            pair = (row, column) if names.index(row) < names.index(column) else (column, row)
            if row.split(",")[0] == column.split(",")[0]:
                cells.append("")
                continue
            found = outcome(plan, pair)
            if found.plan is None and found.reason not in reasons:
                reasons.append(found.reason)
            cells.append("yes" if found.plan is not None else f"no ({reasons.index(found.reason) + 1})")
        rows.append(f"| {row} | " + " | ".join(cells) + " |")
    counts = {size: [outcome(plan, c) for c in combinations(size)] for size in (2, 3, 4, 5, 6, 7)}
    lines = [
        "# Which passes compose",
        "",
        "Written by `make docs`; the tests plan every combination, run those of up to three passes on a small decoder",
        "(`tests/algebra.py`), and compare what the cache gives with one pass without it. Passes stand in the order of",
        "the table.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
        *rows,
        "",
        *[f"{i}. {LAYER.sub('a layer', reason)}" for i, reason in enumerate(reasons, 1)],
        "",
        "A combination of three or more composes where all its pairs do; otherwise planning refuses it for the pair's",
        "reason.",
        "",
        "| passes | combinations | compose |",
        "|---|---|---|",
    ]
    for size, found in counts.items():
        lines.append(f"| {size} | {len(found)} | {sum(o.plan is not None for o in found)} |")
    return "\n".join(lines) + "\n"
