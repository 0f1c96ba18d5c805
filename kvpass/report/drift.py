"""How far the result's layers are from the original's, on text whose beginning went through each one's own cache.

A forward pass would not do: it drops no token. So prompts are read into both caches, the same tokens follow in both,
and what each layer hands to the next (the residual stream) is compared for these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from kvpass.ir.execute import evaluate
from kvpass.ir.program import output_node, placeholder
from kvpass.ir.sites import Refusal, SiteFinder

if TYPE_CHECKING:
    from kvpass.runtime.executor import Executor
    from kvpass.runtime.transformed import Transformed

WINDOWS = 4
TOKENS = 32  # per window; those that need a step each take time


@dataclass(frozen=True)
class Drift:
    """Relative errors |result - original| / |original| over all compared tokens and channels.

    Attributes:
        layers: of the residual stream behind each layer but the last; None where it cannot be told.
        logits: of what comes behind the last layer.
        tokens: that were compared.
        context: that each row had in its cache before.
        reasons: per layer that has no figure, why.
    """

    layers: tuple[float | None, ...]
    logits: float
    tokens: int
    context: int
    reasons: tuple[str, ...] = ()


def drift(before: Transformed, after: Transformed, tokens: Tensor, context: int, continuation: int) -> Drift:
    """Compare two models over one text [N]."""
    from kvpass.quality.measures import text_windows

    following = min(continuation, TOKENS)
    rows = text_windows(tokens, context, following, WINDOWS)
    old, refused = _streams(before, rows, context)
    new, refused_too = _streams(after, rows, context)
    errors = [None if a is None or b is None else _error(a, b) for a, b in zip(old, new, strict=True)]
    logits = errors.pop()
    assert logits is not None
    reasons = tuple(dict.fromkeys([*refused, *refused_too]))
    return Drift(tuple(errors), logits, rows[:, context:].numel(), context, reasons)


def _error(old: Tensor, new: Tensor) -> float | None:
    if old.shape != new.shape:
        return None
    old, new = old.double(), new.double()
    return float((new - old).norm() / old.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _streams(model: Transformed, rows: Tensor, context: int) -> tuple[list[Tensor | None], list[str]]:
    """Residual streams [B, S, hidden] behind all layers but the last, then logits; and what was refused."""
    executor = model.executor
    graph = executor.program.entries["decode"]
    nodes, reasons = _stream_nodes(executor)
    asked = [n for n in nodes if n is not None]
    _, state = model.prefill(rows[:, :context], capacity=rows.shape[1])
    following = rows[:, context:].to(model.device)
    step = 1 if executor.limits is not None or executor.one_by_one else int(following.shape[1])
    targets = {**executor.targets, **executor.quick}
    held = executor.weights()
    parts: list[list[Tensor]] = []
    for ids in following.split(step, dim=1):
        arguments = executor.arguments(state, int(ids.shape[1]))
        given: dict[fx.Node, Any] = {
            n: arguments[str(n.target)] for n in graph.nodes if n.op == "placeholder" and n.target in arguments
        }
        given[placeholder(graph, "input_ids")] = ids
        with torch.no_grad():
            parts.append(evaluate([*asked, output_node(graph)], given, held.__getitem__, model.device, lowered=targets))
        state.advance(int(ids.shape[1]))
    *found, logits = [torch.cat(pieces, dim=1).cpu() for pieces in zip(*parts, strict=True)]
    values = iter(found)
    return [None if n is None else next(values) for n in nodes] + [logits], reasons


def _stream_nodes(executor: Executor) -> tuple[list[fx.Node | None], list[str]]:
    """In `decode`, the node of the residual stream behind each layer but the last; None where it is not known."""
    finder = SiteFinder(executor.program)
    named = {n.name: n for n in executor.program.entries["decode"].nodes}
    found: list[fx.Node | None] = []
    reasons = []
    for layer in range(len(finder) - 1):
        try:
            node: fx.Node | None = finder.crossing(layer)[0]
        except Refusal as refusal:
            found.append(None)
            reasons.append(f"layer {layer}: {refusal.reason}")
            continue
        # `decode` is a copy of `forward` in which nodes keep their names; what drops tokens of prompts is not in it
        while node is not None and node.name not in named:
            node = next(iter(node.all_input_nodes), None)
        found.append(None if node is None else named[node.name])
        if node is None:
            reasons.append(f"layer {layer}: its output is not computed step by step")
    return found, reasons
