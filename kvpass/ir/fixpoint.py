"""Running a graph that reads what it computes only later: layers that share the keys and values of a layer above.

Such a graph holds `kvpass::feedback` nodes (stateless entry) or `kvpass::attend_shared` (cached entries). Its meaning
is the fixed point: the nodes between the first reader and the layer it reads are repeated, each pass reading the keys
and values of the pass before, until these stand still (Jacobi iteration; Wu and Tu 2024, arXiv 2405.10637, section
3.3). After n passes the first n tokens are exact, so as many passes as tokens always suffice. What lies below or above
that block runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvpass.ir.execute import WeightReader, ancestors, evaluate, in_order
from kvpass.ir.program import ATTEND, ATTEND_SHARED, ATTENTION, FEEDBACK, output_node, placeholder

GRADIENT_PASSES = 2  # of the last passes a gradient flows through so many: with one, the layer read would get none
Run = Callable[[Sequence[fx.Node], dict[fx.Node, Any]], list[Any]]


@dataclass(frozen=True)
class Limits:
    """When to stop.

    Attributes:
        passes: at most so many; 0 for as many as there are tokens, which is exact.
        tolerance: stop when no key or value changes by more.
        fallback: where `passes` do not reach that, compute exactly instead of keeping what there is.
    """

    passes: int
    tolerance: float
    fallback: bool


@dataclass(frozen=True)
class Block:
    """The smallest closed part of a graph that is repeated.

    Attributes:
        feedback: what stands for the pass before: pairs of (feedback node, the node whose value it takes).
        targets: the keys and values that must stand still.
        written: nodes of the block that write a cache.
        entering: values from below the block.
        leaving: values of the block that are read above it.
    """

    feedback: tuple[tuple[fx.Node, fx.Node], ...]
    targets: tuple[fx.Node, ...]
    written: tuple[fx.Node, ...]
    entering: tuple[fx.Node, ...]
    leaving: tuple[fx.Node, ...]


def limits(forward: fx.Graph) -> Limits | None:
    """What a program's feedback nodes say of stopping; None where there are none."""
    for node in forward.nodes:
        if node.target is FEEDBACK:
            said: dict[str, Any] = dict(node.kwargs)
            return Limits(said["passes"], said["tolerance"], said["fallback"])
    return None


def find_block(graph: fx.Graph) -> Block:
    """The block of a graph with feedback, stateless or cached."""
    readers = [n for n in graph.nodes if n.target in (FEEDBACK, ATTEND_SHARED)]
    attentions = {int(n.kwargs["layer"]): n for n in graph.nodes if n.target in (ATTENTION, ATTEND, ATTEND_SHARED)}
    feedback, written = [], []
    if readers[0].target is FEEDBACK:
        for node in readers:
            owner = attentions[int(node.kwargs["layer"])]
            source = owner.args[1 if node.kwargs["part"] == "k" else 2]
            assert isinstance(source, fx.Node)
            feedback.append((node, source))
        targets = list(dict.fromkeys(source for _, source in feedback))
        ends = targets
    else:
        stores = {_first_tensor(n, 1) for n in readers}
        written = [n for n in attentions.values() if n.target is ATTEND and _first_tensor(n, 3) in stores]
        targets = [a for n in written for a in n.args[1:3] if isinstance(a, fx.Node)]
        ends = written
    reached: set[fx.Node] = set(readers)
    for node in graph.nodes:
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    inside = (ancestors(ends) & reached) | set(ends)
    for node in [n for n in graph.nodes if n.target is ATTEND and n in inside and n not in written]:
        written.append(node)
    entering = {s for n in inside for s in n.all_input_nodes if s not in inside and s.target is not FEEDBACK}
    entering -= {s for s in entering if s.op in ("placeholder", "get_attr")}
    leaving = {n for n in inside if any(u not in inside for u in n.users)}
    return Block(
        tuple(feedback),
        tuple(dict.fromkeys(targets)),
        tuple(in_order(written)),
        tuple(in_order(entering)),
        tuple(in_order(leaving)),
    )


@dataclass(frozen=True)
class Solved:
    """What `solve` reached: the graph's output, passes made, and whether keys and values stood still."""

    value: Any
    passes: int
    converged: bool


def solve(
    graph: fx.Graph, block: Block, given: dict[fx.Node, Any], run: Run, limits: Limits, length: int, exact: bool
) -> Solved:
    """Repeat the block until it stands still, then run what lies above it.

    Args:
        given: values of the graph's inputs.
        run: computes nodes from given values.
        length: tokens S: after as many passes everything is exact.
        exact: go on to the fixed point where `limits` are not reached and ask for a fallback (the stateless entry; with
            a cache the caller has a cheaper way).
    """
    given = dict(given)
    given |= dict(zip(block.entering, run(block.entering, given), strict=True))
    most = min(limits.passes or length, length)
    if exact and limits.fallback:
        most = length
    learning = torch.is_grad_enabled()
    plain = max(0, most - GRADIENT_PASSES) if learning else most
    feed = {node: None for node, _ in block.feedback}
    outputs = list(dict.fromkeys([*block.targets, *block.leaving, *block.written]))
    before: list[Tensor] | None = None
    values: dict[fx.Node, Any] = {}
    passes, converged = 0, False

    def once() -> None:
        nonlocal before, values, passes, converged
        fed = {n: v for n, v in feed.items() if v is not None}
        values = dict(zip(outputs, run(outputs, {**given, **fed}), strict=True))
        passes += 1
        now = [values[n] for n in block.targets]
        old = before if before is not None else [torch.zeros_like(v) for v in now]
        change = max(float((a - b).detach().abs().max()) for a, b in zip(now, old, strict=True))
        before, converged = now, change <= limits.tolerance or passes >= length

    with torch.no_grad():
        while passes < plain and not converged:
            once()
            if passes < most and not converged:
                feed = {node: values[source] for node, source in block.feedback}
    if learning:
        reached = converged
        for _ in range(min(GRADIENT_PASSES, most)):
            if passes:
                feed = {node: values[source] for node, source in block.feedback}
            once()
        converged = converged or reached
    fed = {n: v for n, v in feed.items() if v is not None}
    known = {n: values[n] for n in (*block.leaving, *block.written)}
    (value,) = run([output_node(graph)], {**given, **fed, **known})
    return Solved(value, passes, converged)


def logits_of(
    graph: fx.Graph, given: dict[fx.Node, Any], weight: WeightReader, device: str | torch.device = "cpu"
) -> Tensor:
    """What a stateless entry returns, with or without feedback."""

    def run(nodes: Sequence[fx.Node], values: dict[fx.Node, Any]) -> list[Any]:
        return evaluate(nodes, values, weight, device)

    stop = limits(graph)
    if stop is None:
        (result,) = run([output_node(graph)], given)
    else:
        length = int(given[placeholder(graph, "input_ids")].shape[1])
        result = solve(graph, find_block(graph), given, run, stop, length, exact=True).value
    logits: Tensor = result
    return logits


def _first_tensor(node: fx.Node, index: int) -> Any:
    tensors = node.args[index]
    assert isinstance(tensors, list | tuple)
    return tensors[0]
