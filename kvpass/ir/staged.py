"""Running a graph over many batches stage by stage, holding only what later stages read.

Layer-by-layer methods (calibration, refits, distillation) need the inner values of one layer for all batches, then
those of the next. A `Staged` keeps one environment per batch, frees each value after its last reader, and reads each
weight when a stage needs it, so neither all activations nor all weights are ever in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kvpass.ir.execute import ancestors, evaluate, in_order
from kvpass.ir.ops import REFERENCES
from kvpass.ir.program import Program, Role, placeholder, roles


class Staged:
    """One graph over batches of token ids [b, T], all of one shape."""

    def __init__(
        self,
        program: Program,
        batches: Sequence[Tensor],
        device: torch.device,
        read: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.program = program
        self.graph = program.forward
        self.device = device
        self.read = read or program.read
        self.roles = roles(self.graph)
        ids = placeholder(self.graph, "input_ids")
        self.environments: list[dict[fx.Node, Any]] = [{ids: b.to(device)} for b in batches]
        self.done: set[fx.Node] = {ids}
        self._shape = tuple(batches[0].shape)
        self.overrides: dict[fx.Node, Tensor] = {}  # values to use for weight expressions, instead of running them

    def constants(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, Any]:
        """Values of nodes that do not depend on the tokens, for this batch shape."""
        if not nodes:
            return {}
        ids = placeholder(self.graph, "input_ids")
        given = {ids: torch.zeros(self._shape, dtype=torch.long, device=self.device)} | self.overrides

        def weight(name: str) -> Tensor:
            return self.read(name).to(self.device)

        with torch.no_grad():
            return dict(zip(nodes, evaluate(list(nodes), given, weight, self.device), strict=True))

    def advance(self, targets: Sequence[fx.Node]) -> None:
        """Compute `targets` for every batch; what nothing later reads is freed."""
        needed = in_order(ancestors(targets, self.done))
        todo = [n for n in needed if n not in self.done and self.roles[n] == Role.DATA]
        members = set(todo)
        border = {s for n in todo for s in n.all_input_nodes if self.roles[s] != Role.DATA}
        shared = self.constants(in_order(border))
        keep = set(targets)
        last: dict[fx.Node, list[fx.Node]] = {}  # what can go once a node was computed
        order = {n: i for i, n in enumerate(todo)}
        for source in {s for n in todo for s in n.all_input_nodes} - keep:
            if all(u in self.done or u in members for u in source.users):
                reader = max((u for u in source.users if u in members), key=order.__getitem__)
                last.setdefault(reader, []).append(source)
        with torch.no_grad():
            for environment in self.environments:
                for node in todo:
                    environment[node] = call(node, environment, shared, self.device)
                    for source in last.get(node, ()):
                        environment.pop(source, None)
        self.done |= members

    def values(self, node: fx.Node) -> list[Any]:
        """A node's value per batch, after `advance` reached it and while something still reads it."""
        return [environment[node] for environment in self.environments]

    def forget(self, node: fx.Node) -> None:
        """Free a target that nothing later reads."""
        if all(u in self.done for u in node.users):
            for environment in self.environments:
                environment.pop(node, None)


def call(node: fx.Node, environment: dict[fx.Node, Any], shared: dict[fx.Node, Any], device: torch.device) -> Any:
    """The value of one call, its inputs looked up in two tables; dialect ops run as their references."""
    target = REFERENCES.get(node.target, node.target)
    assert callable(target)
    tables = (environment, shared)
    arguments = [_value_of(a, tables, device) for a in node.args]
    return target(*arguments, **{k: _value_of(v, tables, device) for k, v in node.kwargs.items()})


def _value_of(argument: Any, tables: tuple[dict[fx.Node, Any], ...], device: torch.device) -> Any:
    """An argument with its nodes looked up; not a closure, whose cycle would hold the tables' tensors."""
    if isinstance(argument, fx.Node):
        return next(table[argument] for table in tables if argument in table)
    if isinstance(argument, list | tuple):
        return type(argument)(_value_of(a, tables, device) for a in argument)
    if isinstance(argument, torch.device):
        return device
    return argument


def block(
    nodes: Sequence[fx.Node], shared: dict[fx.Node, Any], output: fx.Node, device: torch.device
) -> Callable[[dict[fx.Node, Any]], Tensor]:
    """A differentiable function of some nodes' values that runs `nodes` in order and returns `output`."""
    ordered = in_order(nodes)

    def run(inputs: dict[fx.Node, Any]) -> Tensor:
        environment = dict(inputs)
        for node in ordered:
            if node not in environment:
                environment[node] = call(node, environment, shared, device)
        result: Tensor = environment[output]
        return result

    return run
