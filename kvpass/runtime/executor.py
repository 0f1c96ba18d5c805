"""A program lowered for one machine: weights folded and placed, entries compiled to modules, tables by position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from kvpass.errors import RequestError
from kvpass.ir.execute import evaluate
from kvpass.ir.fold import fold_weights
from kvpass.ir.ops import linear
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import Program, aten, placeholder, to_module
from kvpass.ir.sites import SiteFinder
from kvpass.passes.insert_cache import Inserted, insert_cache, prove_tables
from kvpass.runtime.state import State


def _quicken_products(module: fx.GraphModule) -> None:
    """Compute products with weights in the quickest way (cached entries only: `forward` stays what was captured)."""
    for node in module.graph.nodes:
        if node.target is aten.linear.default:
            node.target = linear
    module.recompile()


class Executor(nn.Module):
    """Runs a program: `forward` without a cache, `prefill` and `decode` with one."""

    def __init__(self, program: Program, plan: CachePlan, device: torch.device) -> None:
        super().__init__()
        folded = fold_weights(program)
        self.plan = plan
        self.device = device
        self.inserted: Inserted = insert_cache(folded, plan)
        self.program = folded
        prove_tables(SiteFinder(folded), self.inserted)
        self._tensors: dict[str, Tensor] = {}
        for name in sorted(folded.used_weights()):
            weight = folded.weights[name]
            tensor = folded.read(name).to(device)
            self._tensors[name] = tensor if weight.constant else nn.Parameter(tensor, requires_grad=False)
        self.entries = {entry: to_module(folded, entry, self._tensors, device) for entry in folded.entries}
        if device.type == "cpu":
            for entry in ("prefill", "decode"):
                _quicken_products(self.entries[entry])
        for entry, module in self.entries.items():
            self.add_module(f"entry_{entry}", module)
        self._tables: dict[str, Tensor] = {}
        self._table_length = 0

    def weights(self) -> dict[str, Tensor]:
        """The folded weights by name, on the device."""
        return self._tensors

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [B, S, V] of token ids [B, S], every token seen at once."""
        self.check_length(int(input_ids.shape[1]))
        result: Tensor = self.entries["forward"](input_ids.to(self.device))
        return result

    # ------------------------------------------------------------------ with a cache

    def step(self, input_ids: Tensor, state: State, last: Tensor | None) -> Tensor:
        """Run S tokens per row through the cache without advancing the lengths; logits [B, S, V], or [B, 1, V] of
        `last`."""
        count = int(input_ids.shape[1])
        end = state.max_length + count
        state.reserve(end)
        self.check_length(end)
        arguments: dict[str, Any] = {"starts": state.lengths, "end": end, "ragged": state.ragged}
        for index in range(len(self.plan)):
            arguments[f"cache_k_{index}"] = state.keys[index]
            arguments[f"cache_v_{index}"] = state.values[index]
        arguments |= self._position_tables(end)
        entry = "decode"
        if last is not None:
            entry, arguments["last"] = "prefill", last
        with torch.no_grad():
            result: Tensor = self.entries[entry](input_ids.to(self.device), **arguments)
        return result

    def check_length(self, length: int) -> None:
        longest = self.program.facts.max_positions
        if longest is not None and length > longest and self._learned_positions():
            raise RequestError(
                f"the sequence would reach {length} tokens; the model has learned positions for {longest}",
                fix="use shorter prompts or generate fewer tokens",
            )

    def _learned_positions(self) -> bool:
        """Whether a table is read from a parameter, which ends where the parameter does."""
        from kvpass.ir.execute import ancestors

        return any(
            n.op == "get_attr" and not self.program.weights[str(n.target)].constant
            for table in self.inserted.tables
            for n in ancestors([table.node])
        )

    def _position_tables(self, length: int) -> dict[str, Tensor]:
        if length > self._table_length:
            wanted = max(length, min(2 * self._table_length, length + 4096), 64)
            longest = self.program.facts.max_positions
            if longest is not None and length <= longest:
                wanted = min(wanted, longest)
            graph = self.program.forward
            ids = placeholder(graph, "input_ids")
            nodes = [t.node for t in self.inserted.tables]
            try:
                values = self._evaluate(nodes, ids, wanted)
            except (IndexError, RuntimeError) as error:
                if wanted == length:
                    raise RequestError(
                        f"the model has no positions for {length} tokens: {error}",
                        fix="use shorter prompts or generate fewer tokens",
                    ) from error
                wanted = length
                values = self._evaluate(nodes, ids, wanted)
            self._tables = {
                f"table_{t.node.name}": t.rows(v) for t, v in zip(self.inserted.tables, values, strict=True)
            }
            self._table_length = wanted
        return self._tables

    def _evaluate(self, nodes: list[fx.Node], ids: fx.Node, length: int) -> list[Tensor]:
        given = {ids: torch.zeros((1, length), dtype=torch.long, device=self.device)}
        with torch.no_grad():
            return evaluate(nodes, given, lambda name: self._tensors[name], self.device)
