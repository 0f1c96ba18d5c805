"""A program lowered for one machine: weights folded and placed, entries compiled to modules, tables by position."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from kvpass.errors import RequestError
from kvpass.ir.attention import linear
from kvpass.ir.execute import evaluate, to_double
from kvpass.ir.fixpoint import Block, Run, find_block, limits, solve
from kvpass.ir.fold import fold_weights
from kvpass.ir.ops import REFERENCES
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import ATTEND_KEPT, Program, aten, placeholder, to_module
from kvpass.ir.sites import SiteFinder
from kvpass.passes.insert_cache import Inserted, insert_cache, movable, prove_tables, store_names
from kvpass.runtime.decode_graph import DecodeGraphs
from kvpass.runtime.selective import SelectiveState
from kvpass.runtime.state import State

if TYPE_CHECKING:
    from kvpass.passes.lower_attention import Lowered

Backend = Literal["auto", "reference", "triton"]

QUICK = {aten.linear.default: linear}
"""What computes products with weights on a CPU (cached entries only: `forward` stays what was captured)."""


RECORDED = 8  # tokens per row up to which a step is recorded as a CUDA graph
STRETCH = 4096  # positions up to which the tables of a bounded cache are kept from the first one on


def _quicken(module: fx.GraphModule, quick: Mapping[Any, Any]) -> None:
    for node in module.graph.nodes:
        node.target = quick.get(node.target, node.target) if node.op == "call_function" else node.target
    module.recompile()


def choose_backend(backend: Backend, device: torch.device) -> Literal["reference", "triton"]:
    """What computes attention on a device: "auto" takes Triton on a GPU where it is installed.

    Raises:
        RequestError: Triton is asked for where it is not installed, or where it has nothing to run on.
    """
    if backend not in ("auto", "reference", "triton"):
        raise RequestError(f"there is no backend {backend!r}", fix="choose 'auto', 'reference' or 'triton'")
    if backend == "auto":
        return "triton" if device.type == "cuda" and _has_triton() else "reference"
    if backend == "triton":
        require_triton()
        from kvpass.kernels.targets import interpreted

        if device.type != "cuda" and not interpreted():
            raise RequestError(
                f"backend 'triton' has no code for a {device.type} device",
                fix="use a GPU, or set TRITON_INTERPRET=1 before Python starts to have kernels interpreted (slow)",
            )
    return backend


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def require_triton() -> None:
    """Refuse to go on without Triton.

    Raises:
        RequestError: it is not installed.
    """
    if not _has_triton():
        raise RequestError("kernels need Triton, which is not installed", fix="pip install 'kvpass[gpu]'")


class Executor(nn.Module):
    """Runs a program: `forward` without a cache, `prefill` and `decode` with one."""

    def __init__(self, program: Program, plan: CachePlan, device: torch.device, backend: Backend = "auto") -> None:
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
        self.backend = choose_backend(backend, device)
        targets: dict[fx.Node, Any] = {}
        self.lowering: list[Lowered] = []
        if self.backend == "triton":
            from kvpass.passes.lower_attention import lower_attention

            targets, self.lowering = lower_attention(folded, plan)
        self.targets: Mapping[Any, Any] = {**REFERENCES, **targets}
        self.entries = {entry: to_module(folded, entry, self._tensors, device, targets) for entry in folded.entries}
        self.quick: Mapping[Any, Any] = QUICK if device.type == "cpu" else {}
        for entry in ("prefill", "decode"):
            _quicken(self.entries[entry], self.quick)
        self.limits = limits(folded.forward)
        self.passes = 1  # that the last `forward` took
        self._blocks: dict[str, Block] = {}
        for entry, module in self.entries.items():
            self.add_module(f"entry_{entry}", module)
        self._names = {owner: store_names(plan, owner) for owner in plan.owners()}
        self._inputs = {
            entry: [str(n.target) for n in graph.nodes if n.op == "placeholder" and n.target != "input_ids"]
            for entry, graph in folded.entries.items()
        }
        self.one_by_one = any(n.target is ATTEND_KEPT for n in folded.entries["decode"].nodes)
        self.scales = {
            site.layer: (float(site.option("scale")), float(site.option("softcap"))) for site in SiteFinder(folded)
        }
        self._counts = movable(SiteFinder(folded), self.inserted) if plan.bounded else []
        shapes = folded.shapes()
        self._table_dtypes = {t.node: shapes[t.node].dtype for t in self.inserted.tables}
        self._tables: dict[str, Tensor] = {}
        self._table_base = self._table_length = 0
        self.graphs = DecodeGraphs(self)

    def weights(self) -> dict[str, Tensor]:
        """The folded weights by name, on the device."""
        return self._tensors

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [B, S, V] of token ids [B, S], every token seen at once."""
        self.check_length(int(input_ids.shape[1]))
        ids = input_ids.to(self.device)
        if self.limits is None:
            result: Tensor = self.entries["forward"](ids)
            return result
        graph = self.program.forward
        given = {placeholder(graph, "input_ids"): ids}
        length = int(ids.shape[1])
        solved = solve(graph, self._block("forward"), given, self._run(self.targets), self.limits, length, exact=True)
        self.passes = solved.passes
        return torch.as_tensor(solved.value)

    # ------------------------------------------------------------------ with a cache

    def read_prompts(self, input_ids: Tensor, state: SelectiveState, counts: list[int], capacity: int) -> Tensor:
        """Run whole prompts [B, S], of `counts` tokens each, whose tokens are dropped by rank; logits [B, 1, V]."""
        ids = input_ids.to(self.device)
        arguments = state.begin(counts, capacity, self.scales)
        arguments |= {"starts": state.lengths, "stops": None, "end": int(ids.shape[1]), "ragged": False}
        for owner in state.stores:
            arguments |= zip(self._names[owner], state.tensors(owner), strict=True)
        arguments |= self._position_tables(0, int(ids.shape[1]))
        arguments["base"] = self._table_base
        return self.call("prefill", ids, arguments)

    def call(self, entry: str, ids: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Run an entry with those of the arguments that it takes."""
        taken = {name: arguments[name] for name in self._inputs[entry]}
        with torch.no_grad():
            result: Tensor = self.entries[entry](ids, **taken)
        return result

    def decode(self, ids: Tensor, state: State) -> Tensor:
        """Run S more tokens [B, S] per row without advancing the lengths; logits [B, S, V].

        On a GPU a step of a few tokens is recorded and replayed, where kernels run all of its attention.
        """
        count = int(ids.shape[1])
        few = count <= RECORDED and (count == 1 or self.limits is None)
        if self.device.type == "cuda" and few and self.steady:
            return self.graphs.step(ids.to(self.device), state)
        return self.step(ids, state, None)

    def arguments(self, state: State, count: int, stops: Tensor | None = None) -> dict[str, Any]:
        """What entries take besides token ids to run `count` tokens per row, for which the state makes room."""
        end = state.max_length + count
        self.check_length(end)
        state.prepare(count, stops)
        found: dict[str, Any] = {"starts": state.lengths, "stops": stops, "end": end, "ragged": state.ragged}
        found |= state.told(count)
        for owner in state.stores:
            found |= zip(self._names[owner], state.tensors(owner), strict=True)
        found |= self._position_tables(state.min_length, end)
        found["base"] = self._table_base
        return found

    def step(self, input_ids: Tensor, state: State, last: Tensor | None, stops: Tensor | None = None) -> Tensor:
        """Run S tokens per row through the cache without advancing the lengths; logits [B, S, V], or [B, 1, V] of
        `last`. Tokens at or beyond `stops` [B] are padding."""
        ids = input_ids.to(self.device)
        arguments = self.arguments(state, int(ids.shape[1]), stops)
        entry = "decode"
        if last is not None:
            entry, arguments["last"] = "prefill", last
        if self.limits is not None and ids.shape[1] > 1:
            with torch.no_grad():
                return self._repeat(entry, ids, arguments, state)
        return self.call(entry, ids, arguments)

    @property
    def steady(self) -> bool:
        """Whether a step of decoding is the same program at every length: all of its attention runs in kernels."""
        steps = [entry for entry in self.lowering if entry.entry == "decode"]
        return bool(steps) and not any(entry.reason for entry in steps)

    def tables_of(self, state: State) -> set[str]:
        """The names of the tables of pages among what entries take."""
        return {self._names[owner][-1] for owner in state.stores if self.plan.layout(owner).page}

    def _repeat(self, entry: str, ids: Tensor, arguments: dict[str, Any], state: State) -> Tensor:
        """Several tokens at once where layers read a layer above them: passes over the block between, or one by one."""
        assert self.limits is not None
        graph, block = self.program.entries[entry], self._block(entry)
        options = {"end": arguments["end"], "ragged": arguments["ragged"]}
        for owner in {c.kv_source for c in self.plan if c.upward and c.kv_source is not None}:
            cache = self.plan[owner]
            shape = (ids.shape[0], cache.kv_heads, ids.shape[1])
            k, v = (
                torch.zeros((*shape, dim), dtype=cache.dtype, device=self.device)
                for dim in (cache.key_dim, cache.value_dim)
            )
            layout, starts, stops = self.plan.layout(owner), arguments["starts"], arguments["stops"]
            layout.write(state.stores[owner], k, v, starts, stops, **options)
        given = {n: arguments[str(n.target)] for n in graph.nodes if n.op == "placeholder" and n.target in arguments}
        given[placeholder(graph, "input_ids")] = ids
        owners = [self.plan[int(str(n.kwargs["layer"]))] for n in block.written]
        again = {c.layer if c.kv_source is None else c.kv_source for c in owners}
        rings = {  # a ring that is written forgets what the next pass would read
            owner: [tensor.clone() for tensor in tensors]
            for owner, tensors in state.stores.items()
            if self.plan.layout(owner).ring
        }

        def restore(owners: set[int]) -> None:
            for owner in owners & rings.keys():
                for tensor, kept in zip(state.stores[owner], rings[owner], strict=True):
                    tensor.copy_(kept)

        lowered = self._run({**self.targets, **self.quick})

        def run(nodes: Sequence[fx.Node], values: dict[fx.Node, Any]) -> list[Any]:
            if any(n in block.written for n in nodes):
                restore(again)
            return lowered(nodes, values)

        length = int(ids.shape[1])
        solved = solve(graph, block, given, run, self.limits, length, exact=False)
        if solved.converged or not self.limits.fallback:
            state.passes.append((solved.passes, solved.converged))
            result: Tensor = solved.value
            return result
        state.passes.append((solved.passes + length, True))
        restore(set(rings))
        parts = []
        starts, first = arguments["starts"], int(arguments["end"]) - length
        for index in range(length):
            single = {k: v for k, v in arguments.items() if k != "last"}
            single |= {"starts": starts + index, "end": first + index + 1}
            parts.append(self.entries["decode"](ids[:, index : index + 1], **single))
        logits = torch.cat(parts, dim=1)
        if entry == "decode":
            return logits
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, arguments["last"]].unsqueeze(1)

    def _block(self, entry: str) -> Block:
        if entry not in self._blocks:
            self._blocks[entry] = find_block(self.program.entries[entry])
        return self._blocks[entry]

    def _run(self, lowered: Mapping[Any, Any]) -> Run:
        def run(nodes: Sequence[fx.Node], given: dict[fx.Node, Any]) -> list[Any]:
            return evaluate(nodes, given, lambda name: self._tensors[name], self.device, lowered=lowered)

        return run

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

    def _position_tables(self, start: int, length: int) -> dict[str, Tensor]:
        """Rows of the tables for positions from `start` (or before) up to `length`."""
        if self._counts and length > STRETCH:
            return self._stretch(start, length)
        if self._table_base:
            self._table_base = self._table_length = 0
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

    def _stretch(self, start: int, end: int) -> dict[str, Tensor]:
        """Rows for a stretch of positions alone, with angles in double precision: text without end."""
        if not self._table_base <= start <= end <= self._table_base + self._table_length:
            count = end - start + STRETCH
            ids = placeholder(self.program.forward, "input_ids")
            given: dict[fx.Node, Any] = {ids: torch.zeros((1, count), dtype=torch.long, device=self.device)}
            given |= {n: torch.arange(start, start + count, device=self.device) for n in self._counts}

            def weight(name: str) -> Tensor:
                held = self._tensors[name].detach()
                return held.to(to_double(held.dtype))

            with torch.no_grad():
                values = evaluate([t.node for t in self.inserted.tables], given, weight, self.device, widen=to_double)
            self._tables = {
                f"table_{t.node.name}": t.rows(v.to(self._table_dtypes[t.node]))
                for t, v in zip(self.inserted.tables, values, strict=True)
            }
            self._table_base, self._table_length = start, count
        return self._tables

    def _evaluate(self, nodes: list[fx.Node], ids: fx.Node, length: int) -> list[Tensor]:
        given = {ids: torch.zeros((1, length), dtype=torch.long, device=self.device)}
        with torch.no_grad():
            return evaluate(nodes, given, lambda name: self._tensors[name], self.device)
