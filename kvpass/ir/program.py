"""The program: one torch.fx graph per entry over one table of weights.

A graph holds a placeholder `input_ids`, `get_attr` nodes that name weights, and calls of ATen ops, the dialect of
`kvpass.ir.ops` and integer arithmetic on sizes. Weights stay where they are (a safetensors file, a module in memory)
until something folds an expression over them.
"""

from __future__ import annotations

import copy
import enum
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import kvpass.ir.ops  # noqa: F401  (registers the dialect)
from kvpass.ir.execute import ancestors, call_on_meta, evaluate, in_order

ATTENTION = torch.ops.kvpass.attention.default
ATTEND = torch.ops.kvpass.attend.default
ATTEND_SHARED = torch.ops.kvpass.attend_shared.default
FEEDBACK = torch.ops.kvpass.feedback.default
PRUNE = torch.ops.kvpass.prune.default
ROTARY = torch.ops.kvpass.rotary.default
COLUMN_MASS = torch.ops.kvpass.column_mass.default
SURVIVORS = torch.ops.kvpass.survivors.default
KEEP = torch.ops.kvpass.keep.default
OBSERVE = torch.ops.kvpass.observe.default
ATTEND_KEPT = torch.ops.kvpass.attend_kept.default
aten = torch.ops.aten

SHAPE_ONLY_READERS = {
    aten.sym_size.int,
    aten.sym_numel.default,
    aten.sym_stride.int,
}
LIKE_OPS = {
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.new_empty.default,
}
FILLS = LIKE_OPS | {
    aten.empty.memory_format,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
}
"""Tensors of one value: they take the sizes that they are given, and say nothing about positions."""


class Role(enum.IntEnum):
    """What a node's value depends on."""

    WEIGHT = 0  # weights and constants only
    SHAPE = 1  # a number made from the sizes of the input
    POSITION = 2  # a tensor made from the sizes of the input (and weights): positions, masks, rotary tables
    DATA = 3  # the tokens


@dataclass(frozen=True)
class Weight:
    """One tensor of a program: its shape and dtype, and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    constant: bool = False  # not a parameter of the model: a buffer or a number lifted from the code
    persistent: bool = False  # a buffer that the model's checkpoint holds

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    @staticmethod
    def of(tensor: Tensor, *, constant: bool = False, persistent: bool = False) -> Weight:
        held = tensor.detach()
        return Weight(tuple(held.shape), held.dtype, lambda: held, constant, persistent)


@dataclass
class ModelFacts:
    """What is known of the model besides its graph."""

    name: str
    family: str  # the model_type of a Hugging Face config, or the class name of a module
    vocab_size: int
    layers: int
    hidden_size: int | None = None
    max_positions: int | None = None  # longest sequence that the model supports, where it says so
    config: dict[str, Any] | None = None  # the Hugging Face config, as plain JSON
    folder: str | None = None  # where the tokenizer and the weights came from
    dtype: torch.dtype = torch.float32
    stored_dtype: torch.dtype | None = None
    expected_sites: int | None = None


@dataclass
class Program:
    """Graphs by entry name, their weights, and what is known of the model. Passes edit it in place on a copy."""

    entries: dict[str, fx.Graph]
    weights: dict[str, Weight]
    facts: ModelFacts
    ensured: set[str] = field(default_factory=set)
    evidence: dict[int, dict[str, Any]] = field(default_factory=dict)  # per layer, what capture proved
    page_size: int = 0  # tokens per page of the cache; 0 for one stretch of memory per row

    @property
    def forward(self) -> fx.Graph:
        return self.entries["forward"]

    def copy(self) -> Program:
        """A program that can be edited without touching this one; weights are shared."""
        entries = {}
        for name, graph in self.entries.items():
            fresh = fx.Graph()
            mapping: dict[fx.Node, fx.Node] = {}
            output = fresh.graph_copy(graph, mapping)
            fresh.output(output)
            entries[name] = fresh
        return Program(
            entries,
            dict(self.weights),
            copy.copy(self.facts),
            set(self.ensured),
            copy.deepcopy(self.evidence),
            self.page_size,
        )

    # ------------------------------------------------------------------ reading

    def read(self, name: str) -> Tensor:
        """The tensor behind a weight's name, in the dtype the program computes in."""
        weight = self.weights[name]
        tensor = weight.read()
        if tuple(tensor.shape) != weight.shape:
            raise AssertionError(f"{name}: read {tuple(tensor.shape)}, declared {weight.shape}")
        return tensor if tensor.dtype == weight.dtype else tensor.to(weight.dtype)

    def meta(self, name: str) -> Tensor:
        weight = self.weights[name]
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")

    def shapes(self, entry: str = "forward", batch: int = 2, length: int = 5) -> dict[fx.Node, Any]:
        """Every node's value on the meta device for one batch and length: shapes and dtypes, no arithmetic."""
        graph = self.entries[entry]
        nodes = [n for n in graph.nodes if n.op not in ("output", "placeholder")]
        ids = placeholder(graph, "input_ids")
        given: dict[fx.Node, Any] = {ids: torch.zeros((batch, length), dtype=torch.long, device="meta")}
        values = evaluate(nodes, given, self.meta, "meta", call=call_on_meta)
        return dict(zip(nodes, values, strict=True)) | given

    def parameter_bytes(self) -> int:
        """Bytes of all weights that are parameters, each counted once."""
        used = self.used_weights()
        return sum(w.nbytes for n, w in self.weights.items() if n in used and not w.constant)

    def used_weights(self) -> set[str]:
        return {str(n.target) for g in self.entries.values() for n in g.nodes if n.op == "get_attr"}

    # ------------------------------------------------------------------ writing

    def add_weight(self, name: str, tensor: Tensor, *, constant: bool = False) -> str:
        """A new parameter, or constant, held in memory, under a name that is made unique."""
        unique, count = name, 1
        while unique in self.weights:
            unique, count = f"{name}.{count}", count + 1
        self.weights[unique] = Weight.of(tensor, constant=constant)
        return unique

    def fold(self, node: fx.Node) -> Tensor:
        """The value of a weight expression."""
        return evaluate([node], {}, self.read)[0]


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """The input of a graph with that name."""
    for node in graph.nodes:
        if node.op == "placeholder" and node.target == name:
            return node
    raise AssertionError(f"the graph has no input {name}")


def output_node(graph: fx.Graph) -> fx.Node:
    """The node whose value the graph returns."""
    result = graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    return result


def roles(graph: fx.Graph) -> dict[fx.Node, Role]:
    """What each node's value depends on; see `Role`."""
    known: dict[fx.Node, Role] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = Role.DATA
        elif node.op == "get_attr":
            known[node] = Role.WEIGHT
        elif node.target in SHAPE_ONLY_READERS:
            known[node] = Role.SHAPE
        else:
            inputs = node.all_input_nodes
            if node.target in LIKE_OPS and inputs:
                first = node.args[0]
                rest = [known[n] for n in inputs if n is not first]
                known[node] = max([Role.POSITION, *rest])
            else:
                highest = max((known[n] for n in inputs), default=Role.WEIGHT)
                if highest == Role.SHAPE and isinstance(node.target, torch._ops.OpOverload):
                    highest = Role.POSITION
                known[node] = highest
    return known


def insert_call(graph: fx.Graph, before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A call placed before a node."""
    with graph.inserting_before(before):
        return graph.call_function(target, args, kwargs)


def clone_into(
    graph: fx.Graph, nodes: list[fx.Node], mapping: dict[fx.Node, Any], before: fx.Node
) -> dict[fx.Node, Any]:
    """Copies of `nodes` (in order) before `before`, with their inputs replaced by `mapping`; returns the mapping
    grown."""
    with graph.inserting_before(before):
        for node in nodes:
            if node not in mapping:
                mapping[node] = graph.node_copy(node, lambda n: mapping.get(n, n))
    return mapping


def writes(node: fx.Node) -> bool:
    """Whether a call changes what it is given."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def sweep(graph: fx.Graph) -> int:
    """Remove calls and weights that nothing reads; returns how many went. What writes a cache stays."""
    gone = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and not writes(node):
            graph.erase_node(node)
            gone += 1
    return gone


def to_module(
    program: Program,
    entry: str,
    tensors: Mapping[str, Tensor],
    device: torch.device | None = None,
    lowered: Mapping[fx.Node, Any] | None = None,
) -> fx.GraphModule:
    """A callable module for one entry, with dialect ops replaced by what `lowered` has for them or their references."""
    from kvpass.ir.ops import REFERENCES

    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(program.entries[entry], mapping)
    graph.output(result)
    for node, target in (lowered or {}).items():
        if node in mapping:
            mapping[node].target = target
    for node in graph.nodes:
        if node.op == "call_function" and node.target in REFERENCES:
            node.target = REFERENCES[node.target]
        if device is not None and node.op == "call_function":
            node.args = _on_device(node.args, device)
            node.kwargs = _on_device(node.kwargs, device)
        if node.op == "get_attr":
            node.target = attribute_name(str(node.target))
    used = {str(n.target) for n in program.entries[entry].nodes if n.op == "get_attr"}
    root = torch.nn.Module()
    for name in used:
        tensor = tensors[name]
        if isinstance(tensor, torch.nn.Parameter):
            root.register_parameter(attribute_name(name), tensor)
        else:
            root.register_buffer(attribute_name(name), tensor)
    return fx.GraphModule(root, graph)


def attribute_name(weight: str) -> str:
    """A weight's name as one attribute of a module."""
    return "w_" + weight.replace(".", "__")


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.device):
        return device
    if isinstance(value, tuple | list):
        return type(value)(_on_device(v, device) for v in value)
    if isinstance(value, Mapping):
        return {k: _on_device(v, device) for k, v in value.items()}
    return value


def is_arithmetic(target: Any) -> bool:
    """Whether a call target is integer arithmetic on sizes."""
    return getattr(target, "__module__", "") in ("_operator", "operator", "math", "builtins") or target in (
        operator.getitem,
        torch.sym_max,
        torch.sym_min,
        torch.sym_float,
        torch.sym_int,
        torch.sym_not,
    )


__all__ = [
    "ATTEND",
    "ATTEND_SHARED",
    "ATTENTION",
    "FEEDBACK",
    "ModelFacts",
    "Program",
    "Role",
    "Weight",
    "ancestors",
    "clone_into",
    "evaluate",
    "in_order",
    "insert_call",
    "output_node",
    "placeholder",
    "roles",
    "sweep",
    "to_module",
]


def merge_equal(graph: fx.Graph, *, data: bool = False) -> int:
    """Let equal calls be one call (position tables per layer, for one); with `data`, those over the tokens too."""
    role = roles(graph)
    seen: dict[object, fx.Node] = {}
    gone = 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if role[node] == Role.DATA and node.target not in SHAPE_ONLY_READERS and not (data and _is_pure(node)):
            continue
        try:
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
            first = seen.setdefault(key, node)
        except TypeError:
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            gone += 1
    return gone


def _is_pure(node: fx.Node) -> bool:
    """Whether a call gives the same for the same, and changes nothing."""
    tags = getattr(node.target, "tags", ())
    return hasattr(node.target, "_schema") and not writes(node) and torch.Tag.nondeterministic_seeded not in tags


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return (type(value), value)
