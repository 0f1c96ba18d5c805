"""Which tokens of a prompt each layer's cache holds once it was read.

Where tokens are dropped by rank, the prompt is read and the cache is asked; elsewhere windows and sinks say it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvpass.ir.plan import CachePlan
    from kvpass.runtime.transformed import Transformed


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are held alike.

    Attributes:
        start, stop: the first token, and the one behind the last.
        share: of the KV heads that hold them.
    """

    start: int
    stop: int
    share: float


@dataclass(frozen=True)
class Kept:
    """What one layer's cache holds.

    Attributes:
        layer: its number.
        owner: the layer in whose cache it reads.
        tokens: entries per KV head.
        runs: where they stand; what is in none is held by no head.
    """

    layer: int
    owner: int
    tokens: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Retained:
    """What stays of a prompt.

    Attributes:
        prompt: its tokens.
        measured: whether the prompt was read to find out, since tokens are ranked.
        layers: per layer.
    """

    prompt: int
    measured: bool
    layers: tuple[Kept, ...]


def retained(model: Transformed, prompt: Tensor) -> Retained:
    """What each layer holds of a prompt [N]."""
    plan, length = model.plan, int(prompt.numel())
    held = _ranked(model, prompt) if plan.selective else {o: _ruled(plan, o, length) for o in plan.owners()}
    layers = []
    for cache in plan:
        owner = cache.layer if cache.kv_source is None else cache.kv_source
        shares = held[owner]
        layers.append(Kept(cache.layer, owner, round(float(shares.sum())), _runs(shares)))
    return Retained(length, plan.selective, tuple(layers))


def _ranked(model: Transformed, prompt: Tensor) -> dict[int, Tensor]:
    """Per owner, the share of its KV heads that hold each token: [N]."""
    from kvpass.runtime.selective import SelectiveState

    _, state = model.prefill(prompt.unsqueeze(0))
    assert isinstance(state, SelectiveState)
    found = {}
    for owner in model.plan.owners():
        positions = state.positions(owner)[0].long().cpu()  # [G, fill]
        counts = torch.zeros(prompt.numel()).index_add_(0, positions.flatten(), torch.ones(positions.numel()))
        found[owner] = counts / len(positions)
    return found


def _ruled(plan: CachePlan, owner: int, length: int) -> Tensor:
    """The same of a layer that keeps a window, or everything: [N]."""
    layout = plan.layout(owner)
    shares = torch.ones(length)
    if layout.window and length > layout.window + layout.sinks:
        shares[layout.sinks : length - layout.window] = 0
    return shares


def _runs(shares: Tensor) -> tuple[Run, ...]:
    values, counts = torch.unique_consecutive(shares, return_counts=True)
    found, start = [], 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value:
            found.append(Run(start, start + count, value))
        start += count
    return tuple(found)
