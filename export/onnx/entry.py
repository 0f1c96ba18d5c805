"""An entry of a program on its way to ONNX: what every lowering of one begins and ends with."""

from __future__ import annotations

from typing import Any

from torch import fx

from kvpass.ir.plan import CachePlan
from kvpass.ir.program import insert_call, merge_equal, sweep


class Entry:
    """A graph that the cache pass made, with its tables of positions in place of the inputs that held them.

    Attributes:
        inputs: by name, those that the cache pass gave it.
        ids: the tokens.
        body: its first call; what is computed from inputs stands before it.
        presents: per owner, the keys and values that are to be returned.
    """

    def __init__(self, plan: CachePlan, graph: fx.Graph, tables: dict[str, fx.Node]) -> None:
        self.plan, self.graph = plan, graph
        self.inputs = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
        self.ids = self.inputs["input_ids"]
        self.body = next(n for n in graph.nodes if n.op == "call_function")
        self.presents: dict[int, tuple[fx.Node, fx.Node]] = {}
        for name, node in tables.items():
            self.inputs[name].replace_all_uses_with(node)

    def call(self, before: fx.Node, target: Any, *arguments: Any, **options: Any) -> fx.Node:
        return insert_call(self.graph, before, target, *arguments, **options)

    def start_at_zero(self) -> None:
        """Tables begin with position 0."""
        base = self.inputs["base"]
        for user in list(base.users):
            user.args = tuple(0 if a is base else a for a in user.args)

    def finish(self) -> None:
        """Return the logits and all presents; nothing stays that is not read."""
        graph = self.graph
        logits = graph.output_node().args[0]
        graph.output_node().args = ((logits, *(n for owner in self.plan.owners() for n in self.presents[owner])),)
        sweep(graph)
        for node in self.inputs.values():
            if node is not self.ids and not node.users:
                graph.erase_node(node)
        merge_equal(graph, data=True)
