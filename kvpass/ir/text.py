"""Canonical text of a graph: stable across runs and processes, free of the names that torch.export invents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kvpass.ir.program import Program


def graph_text(program: Program, entry: str = "forward") -> str:
    """One line per node, values numbered in order, weights by name, shapes written with B and S where they vary."""
    graph = program.entries[entry]
    shapes: dict[fx.Node, str] = {}
    if entry == "forward":
        small, large = program.shapes(entry, 2, 5), program.shapes(entry, 3, 7)
        shapes = {n: _shape(small[n], large[n]) for n in graph.nodes if n in small}
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"%{node.target}"
            lines.append(f"input {names[node]}")
        elif node.op == "get_attr":
            names[node] = f"@{node.target}"
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0], names)}")
        else:
            names[node] = f"%{len(names)}"
            arguments = [_argument(a, names) for a in node.args]
            arguments += [f"{k}={_argument(v, names)}" for k, v in sorted(node.kwargs.items())]
            shape = shapes.get(node, "")
            lines.append(f"{names[node]}{shape} = {target_name(node.target)}({', '.join(arguments)})")
    return "\n".join(lines) + "\n"


def target_name(target: Any) -> str:
    """The name of an op or a function, without where it lives."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_argument(v, names) for v in value) + "]"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return "device"
    return repr(value)


def _shape(small: Any, large: Any) -> str:
    if not isinstance(small, Tensor):
        return ""
    words = []
    for a, b in zip(small.shape, large.shape, strict=True):
        if a == b:
            words.append(str(a))
        else:
            words.append({(2, 3): "B", (5, 7): "S"}.get((a, b), "B*S" if (a, b) == (10, 21) else _factor(a, b)))
    return f":{str(small.dtype).removeprefix('torch.')}[{', '.join(words)}]"


def _factor(a: int, b: int) -> str:
    for name, x, y in (("B", 2, 3), ("S", 5, 7), ("B*S", 10, 21)):
        if a % x == 0 and b % y == 0 and a // x == b // y:
            return f"{a // x}*{name}"
    return "?"
