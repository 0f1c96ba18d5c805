"""What a model answers to a few fixed tokens, small enough to be read: likeliest tokens, spread, projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpass.errors import UnsupportedError
from kvpass.regression.sketch import project, tokens
from kvpass.regression.snapshot import Logits, Row

if TYPE_CHECKING:
    from kvpass.runtime.transformed import Transformed

BATCH, PROMPT, STEPS, TOP = 2, 45, 3, 4
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far logits of two machines may lie apart, relative to their spread, by compute dtype."""
FLIPPED = 1 / 16  # rounding may turn a code into its neighbour, which moves one number of one key by a step


@torch.no_grad()
def read_logits(model: Transformed, tolerance: float | None = None) -> Logits:
    """Ask a model: the last positions of a pass without a cache, then a prompt and some steps with one.

    Args:
        model: what `kvpass.transform` gave.
        tolerance: relative to the spread; by dtype, and at least `FLIPPED` of a quantized cache's step, where None.
    """
    facts = model.program.facts
    length = min(PROMPT + STEPS, facts.max_positions or PROMPT + STEPS)
    ids = tokens(facts.vocab_size, BATCH, length)
    prompt = max(length - STEPS, 1)
    rows: list[Row] = []
    try:
        _ = model.executor
    except UnsupportedError:  # of a model that kvpass cannot cache, the graphs are compared and no numbers
        return Logits(tolerance or TOLERANCE.get(facts.dtype, 1e-4), ())
    whole = model(ids)
    for position in (length // 2, length - 1):
        rows += [_row(f"forward {b}.{position}", whole[b, position]) for b in range(BATCH)]
    found, state = model.prefill(ids[:, :prompt])
    rows += [_row(f"prefill {b}.{prompt - 1}", found[b]) for b in range(BATCH)]
    for position in range(prompt, length):
        step = model.decode(ids[:, position : position + 1], state)
        rows += [_row(f"decode {b}.{position}", step[b, 0]) for b in range(BATCH)]
    if tolerance is None:
        tolerance = max(TOLERANCE.get(facts.dtype, 1e-4), *(FLIPPED * c.format.step for c in model.plan))
    return Logits(tolerance, tuple(rows))


def _row(at: str, values: Tensor) -> Row:
    top = values.double().topk(min(TOP, values.shape[0]))
    return Row(
        at=at,
        tokens=tuple(int(t) for t in top.indices),
        values=tuple(float(f"{v:.7g}") for v in top.values.tolist()),
        spread=float(f"{float(values.double().abs().max()):.7g}"),
        projections=project(values),
    )
