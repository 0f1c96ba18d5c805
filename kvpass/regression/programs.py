"""Programs of kvpass as canonical graphs.

What is settled here, so that versions of torch and of transformers that spell the same thing differently agree:
defaults of an operator's schema are left out wherever they stand; `view`, `_unsafe_view` and `reshape` are one;
calls that change nothing (alias, detach, contiguous, dropout at inference, adding the integer 0) are passed over;
sizes of the input are B and S however they were asked for; devices, layouts and pinned memory are not part of a
program.
What is not settled: another decomposition of the same function. That is a structural change, and should be seen.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kvpass.ir.program import SHAPE_ONLY_READERS, Program, Role, aten, roles, writes
from kvpass.ir.text import target_name
from kvpass.regression.canonical import Index, Node

SAME = {"view": "reshape", "_unsafe_view": "reshape", "concat": "cat", "concatenate": "cat"}
COMMUTATIVE = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.logical_and.default,
    aten.logical_or.default,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.bitwise_xor.Tensor,
    aten.eq.Tensor,
    aten.ne.Tensor,
}
IDENTITIES = {
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
}
UNSAID = ("device", "layout", "pin_memory", "memory_format", "non_blocking")
LINEAR = {
    *SHAPE_ONLY_READERS,
    operator.add,
    operator.sub,
    operator.mul,
}  # a minimum or a quotient is told by no two sizes
END = 1 << 62  # a slice up to here goes to the end
SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
_KEYED = re.compile(r"(cache|keep_width|keep|width|count|fill|end|ragged|budget|recent)_(\d+)(.*)")


def float_text(value: float) -> str:
    """Six digits: a change of 1e-3 shows, noise in the last bit does not."""
    return repr(float(f"{value:.6g}"))


def dtype_text(dtype: torch.dtype) -> str:
    """f32, bf16, i64, bool."""
    found = re.fullmatch(r"([a-z]+)(\d+)(.*)", str(dtype).removeprefix("torch."))
    return SHORT.get(found[1], found[1]) + found[2] + found[3] if found else str(dtype).removeprefix("torch.")


def weight_nodes(program: Program, orders: Mapping[str, tuple[float, ...]]) -> dict[str, Node]:
    """A node per weight that any entry reads, for `program_graph` of all entries; `orders` tells contents apart."""
    found = {}
    for name in sorted(program.used_weights()):
        weight = program.weights[name]
        note = f"{dtype_text(weight.dtype)}{list(weight.shape)}"
        found[name] = Node("weight", [[name]], note=note, order=orders.get(name, ()))
    return found


def program_graph(program: Program, entry: str, weights: Mapping[str, Node]) -> tuple[Node, list[Node]]:
    """What an entry returns, and the calls that it makes for what they write."""
    graph = program.entries[entry]
    sizes = _Sizes(program, entry)
    made: dict[fx.Node, Node] = {}
    effects: list[Node] = []
    touched: dict[fx.Node, Node] = {}  # per cache, who read or wrote it last
    result: Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            made[node] = _input(str(node.target))
        elif node.op == "get_attr":
            made[node] = weights[str(node.target)]
        elif node.op == "output":
            result = made[node.args[0]]
        elif sizes.word(node) is None:
            same = _passed_over(node)
            if same is not None:
                made[node] = made[same]
                continue
            call = made[node] = _call(node, made, sizes)
            caches = [n for n in node.all_input_nodes if str(n.target).startswith("cache_")]
            call.after = [touched[n] for n in caches if n in touched]
            touched.update(dict.fromkeys(caches, call))
            if writes(node):
                effects.append(call)
    assert result is not None
    return result, effects


class _Sizes:
    """Which nodes are numbers made of the input's sizes, and in what words; shapes where they are known."""

    def __init__(self, program: Program, entry: str) -> None:
        graph = program.entries[entry]
        self.role = roles(graph)
        self.small: dict[fx.Node, Any] = {}
        self.large: dict[fx.Node, Any] = {}
        if entry == "forward":  # what the cached entries are given is known to who runs them only
            self.small, self.large = program.shapes(entry, 2, 5), program.shapes(entry, 3, 7)

    def word(self, node: fx.Node) -> str | None:
        """B, S, 2*S or a plain number; None for what is no size, or another function of them."""
        if self.role.get(node) != Role.SHAPE or node.target not in LINEAR:
            return None
        if node in self.small:
            return _scaled(self.small[node], self.large[node])
        source = node.args[0] if node.args else None
        if node.target in SHAPE_ONLY_READERS and isinstance(source, fx.Node) and source.target == "input_ids":
            return {0: "B", 1: "S"}.get(node.args[1])  # type: ignore[arg-type]
        return None

    def note(self, node: fx.Node) -> str:
        """A tensor's dtype and shape, where they are known."""
        small, large = self.small.get(node), self.large.get(node)
        if not isinstance(small, Tensor) or not isinstance(large, Tensor):
            return ""
        words = [_scaled(a, b) or "?" for a, b in zip(small.shape, large.shape, strict=True)]
        return f"{dtype_text(small.dtype)}[{', '.join(words)}]"


def _scaled(a: Any, b: Any) -> str | None:
    """A size at 2 x 5 and at 3 x 7 tokens, in words."""
    if isinstance(a, bool) or not isinstance(a, int):
        return None
    if a == b:
        return str(a)
    for word, x, y in (("B", 2, 3), ("S", 5, 7), ("B*S", 10, 21)):
        if a % x == 0 and b % y == 0 and a // x == b // y:
            return word if a == x else f"{a // x}*{word}"
    return f"S+{a - 5}" if b - a == 2 else None


def _input(name: str) -> Node:
    if name.startswith("table_"):  # called after a node of the capture
        return Node("", [["table"]])
    found = _KEYED.fullmatch(name)
    pieces: list[str | Index | Node] = [name]
    if found is not None:
        pieces = [f"{found[1]}[", Index("layer", int(found[2])), "]" + found[3].replace("_", ".", 1)]
    return Node("", [pieces], data=name == "input_ids" or name.startswith("cache_"))


def _passed_over(node: fx.Node) -> fx.Node | None:
    """The value that a call hands on as it is."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if node.target in IDENTITIES:
        return None if node.target is aten.dropout.default and node.args[2] else first
    zero = len(node.args) == 2 and isinstance(node.args[1], int) and node.args[1] == 0
    return first if node.target is aten.add.Tensor and zero else None


def _call(node: fx.Node, made: Mapping[fx.Node, Node], sizes: _Sizes) -> Node:
    name = _op_name(node.target)
    arguments: list[list[str | Index | Node]] = []
    for label, value in _arguments(node):
        pieces = list(_pieces(value, made, sizes))
        if label == "layer":
            pieces = [Index("layer", int(value))]
        arguments.append([f"{label}=", *pieces] if label else pieces)
    commutes = node.target in COMMUTATIVE and len(node.args) == 2 and not node.kwargs
    return Node(name, arguments, commutes=commutes, note=sizes.note(node))


def _op_name(target: Any) -> str:
    name = target_name(target)
    if not isinstance(target, torch._ops.OpOverload):
        return f"int.{name}"
    short = name.removeprefix("aten.").removesuffix(".Tensor").removesuffix(".int").removesuffix(".dim")
    return SAME.get(short, short)


def _arguments(node: fx.Node) -> list[tuple[str, Any]]:
    """Arguments in the order of the schema, those that are defaults left out; names from the first gap on."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [("", a) for a in node.args] + sorted(node.kwargs.items())
    found: list[tuple[str, Any]] = []
    gap = False
    for i, argument in enumerate(schema.arguments):
        said = i < len(node.args) or argument.name in node.kwargs
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        default = argument.default_value if argument.has_default_value() else None
        unsaid = argument.name in UNSAID or not said or (argument.has_default_value() and _equal(value, default))
        if unsaid or (argument.name == "end" and isinstance(value, int) and value >= END):
            gap = True
            continue
        found.append((argument.name if gap or argument.kwarg_only else "", value))
    return found


def _equal(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default


def _pieces(value: Any, made: Mapping[fx.Node, Node], sizes: _Sizes) -> list[str | Index | Node]:
    if isinstance(value, fx.Node):
        word = sizes.word(value)
        return [made[value]] if word is None else [word]
    if isinstance(value, list | tuple):
        found: list[str | Index | Node] = ["["]
        for i, item in enumerate(value):
            found += [", "] if i else []
            found += _pieces(item, made, sizes)
        return [*found, "]"]
    if isinstance(value, slice):
        return _pieces([value.start, value.stop, value.step], made, sizes)
    if isinstance(value, torch.dtype):
        return [dtype_text(value)]
    if isinstance(value, float):
        return [float_text(value)]
    return [str(value)]
