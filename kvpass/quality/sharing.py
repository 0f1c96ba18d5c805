"""What it costs that one layer reads another's keys and values, edge by edge.

Which layers can share is a property of the model: late neighbours often can, the first layers seldom. So each edge
(reader, owner) is tried by itself, without healing, and measured on held-out text as everything else is
(`quality.continuation`). The losses rank edges; they do not add up, and healing may change their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvpass.errors import PlanError, RequestError, UnsupportedError
from kvpass.quality.measures import continuation as measure
from kvpass.quality.measures import plain
from kvpass.quality.models import Scored

if TYPE_CHECKING:
    from kvpass.runtime.transformed import Transformed

MAX_DISTANCE = 2


@dataclass(frozen=True)
class EdgeLoss:
    """A model in which one layer reads another's keys and values, everything else as it was.

    Attributes:
        reader: the layer that keeps none of its own.
        owner: the layer whose keys and values it reads.
        nll, nll_original: negative log-likelihood per token (nats), with the edge and without.
        loss_se: standard error of their difference over windows; NaN when there is one window only.
        kl: KL(original || model) per token (nats).
        top1: share of tokens where both would pick the same next token.
    """

    reader: int
    owner: int
    nll: float
    nll_original: float
    loss_se: float
    kl: float
    top1: float

    @property
    def loss(self) -> float:
        """What the edge costs: nats per token."""
        return self.nll - self.nll_original

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not a finite number becomes None."""
        return {**plain(self), "loss": self.loss if math.isfinite(self.loss) else None}


def scan_sharing(
    model: Transformed,
    tokens: Tensor,
    *,
    context: int = 192,
    continuation: int = 64,
    windows: int = 32,
    batch: int = 8,
    max_distance: int = MAX_DISTANCE,
    upward: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[EdgeLoss, ...]:
    """Measure every edge between two layers.

    The model is captured once and its weights are held once, whatever the number of edges; its own logits on the
    windows are kept as well, [windows * continuation, V] of them.

    Args:
        model: the original.
        tokens: [N] token ids of held-out text.
        context, continuation, windows, batch: as `quality.continuation` takes them.
        max_distance: only pairs with |reader - owner| up to this.
        upward: edges to a layer above, too; a prompt then takes several passes, and so does its measurement.
        progress: called with (done, total) before each pair.

    Returns:
        The edges, the cheapest first. Pairs that cannot share are left out.

    Raises:
        PlanError, UnsupportedError: no pair can share, with the reason of the first.
        RequestError: too few tokens, a size below 1, a model of one layer.
    """
    from kvpass.api import transform
    from kvpass.passes.share_layers import ShareLayers

    todo = pairs(len(model.plan), max_distance, upward)
    if not todo:
        raise RequestError("a model of one layer has no two that could share")
    held = _held(model)
    original = _Replayed(held)
    edges: list[EdgeLoss] = []
    refused: list[RequestError] = []
    for done, (reader, owner) in enumerate(todo):
        progress(done, len(todo))
        sources = [owner if layer == reader else layer for layer in range(len(model.plan))]
        try:
            shared = transform(
                held,
                [ShareLayers(tuple(sources), upward=upward)],
                verify="off",
                device=model.device,
                progress=False,
            )
        except (PlanError, UnsupportedError) as refusal:
            refused.append(refusal)
            continue
        original.rewind()
        found = measure(
            {"original": original, "shared": shared},
            tokens,
            context=context,
            continuation=continuation,
            windows=windows,
            batch=batch,
        )
        before, after = found["original"], found["shared"]
        edges.append(EdgeLoss(reader, owner, after.nll, before.nll, after.nll_delta_se, after.kl, after.top1))
    if not edges:
        raise refused[0]
    return tuple(sorted(edges, key=lambda e: (math.isnan(e.loss), e.loss, e.kl)))


def pairs(layers: int, max_distance: int = MAX_DISTANCE, upward: bool = False) -> list[tuple[int, int]]:
    """(reader, owner) of the edges up to a distance.

    Raises:
        RequestError: a distance below 1.
    """
    if max_distance < 1:
        raise RequestError(f"max_distance must be at least 1, not {max_distance}")
    found = []
    for reader in range(layers):
        for owner in range(max(0, reader - max_distance), min(layers, reader + max_distance + 1)):
            if owner < reader or (upward and owner > reader):
                found.append((reader, owner))
    return found


def _held(model: Transformed) -> Transformed:
    """The same model with its weights in memory, which all that is made of it then shares."""
    from kvpass.runtime.transformed import Transformed

    program = model.program.copy()
    for name in program.used_weights():
        tensor = program.read(name).to(model.device)
        program.weights[name] = replace(program.weights[name], read=partial(_same, tensor))
    return Transformed(program, model.report, model.device, model.recipe, backend=model.backend)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Replayed:
    """A model that computes once: the logits of its calls are kept, and given again when the calls are made again."""

    def __init__(self, model: Scored) -> None:
        self.model = model
        self.kept: list[Tensor] = []
        self.next = 0

    def rewind(self) -> None:
        """The calls start over."""
        self.next = 0

    def prefill(self, input_ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        state: Any = None
        if self.next == len(self.kept):
            logits, state = self.model.prefill(input_ids, lengths)
            self.kept.append(logits)
        return self._again(), state

    def decode(self, input_ids: Tensor, state: Any) -> Tensor:
        if self.next == len(self.kept):
            self.kept.append(self.model.decode(input_ids, state))
        return self._again()

    def _again(self) -> Tensor:
        self.next += 1
        return self.kept[self.next - 1]
