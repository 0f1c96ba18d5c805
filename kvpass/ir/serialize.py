"""Graphs as JSON and back. Only ops of ATen, the dialect and named integer functions are ever resolved: no code is
read."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kvpass.errors import SourceError
from kvpass.ir.check import NAMESPACES

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(operator, name)
        for name in (
            "add",
            "sub",
            "mul",
            "floordiv",
            "mod",
            "neg",
            "pow",
            "truediv",
            "getitem",
            "lt",
            "le",
            "gt",
            "ge",
            "eq",
            "ne",
        )
    },
    **{name: getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not")},
    "ceil": math.ceil,
    "floor": math.floor,
    "trunc": math.trunc,
}
_NAMES = {function: name for name, function in FUNCTIONS.items()}
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_LAYOUTS = {"strided": torch.strided}
_FORMATS = {
    str(f).removeprefix("torch."): f for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last)
}


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes of a graph in order, as plain values."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    nodes = []
    for node in graph.nodes:
        entry: dict[str, Any] = {"op": node.op}
        if node.op == "call_function":
            entry["target"] = _target_name(node.target)
            entry["args"] = [_encode(a, index) for a in node.args]
            if node.kwargs:
                entry["kwargs"] = {k: _encode(v, index) for k, v in node.kwargs.items()}
        elif node.op == "output":
            entry["args"] = [_encode(a, index) for a in node.args]
        else:
            entry["target"] = str(node.target)
        if "source" in node.meta:
            entry["source"] = node.meta["source"]
        nodes.append(entry)
    return nodes


def graph_from_json(nodes: list[dict[str, Any]], where: str) -> fx.Graph:
    """The graph that `graph_to_json` wrote.

    Raises:
        SourceError: an op that programs do not use, or a malformed entry.
    """
    graph = fx.Graph()
    made: list[fx.Node] = []
    try:
        for entry in nodes:
            kind = entry["op"]
            if kind == "placeholder":
                node = graph.placeholder(str(entry["target"]))
            elif kind == "get_attr":
                node = graph.create_node("get_attr", str(entry["target"]))
            elif kind == "output":
                node = graph.output(_decode(entry["args"][0], made))
            elif kind == "call_function":
                args = tuple(_decode(a, made) for a in entry["args"])
                kwargs = {str(k): _decode(v, made) for k, v in entry.get("kwargs", {}).items()}
                node = graph.call_function(_resolve(str(entry["target"]), where), args, kwargs)
            else:
                raise SourceError(f"a saved program holds a node of kind {kind!r}", where=where)
            if "source" in entry:
                node.meta["source"] = str(entry["source"])
            made.append(node)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            f"the saved program is damaged: {type(error).__name__}: {error}", where=where, fix="save it again"
        ) from error
    return graph


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target in _NAMES:
        return f"function.{_NAMES[target]}"
    raise AssertionError(f"{target} cannot be saved")


def _resolve(name: str, where: str) -> Callable[..., Any]:
    namespace, _, rest = name.partition(".")
    if namespace == "function" and rest in FUNCTIONS:
        return FUNCTIONS[rest]
    packet, _, overload = rest.partition(".")
    if namespace in NAMESPACES and packet.isidentifier() and overload.isidentifier():
        if namespace == "transformers":
            import transformers.integrations.moe  # noqa: F401  (registers its ops)
        found: Callable[..., Any] | None = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
        if found is not None:
            return found
    raise SourceError(
        f"the saved program calls {name!r}, which is no op that programs use",
        where=where,
        fix="load it with the version of kvpass that saved it",
    )


def _encode(value: Any, index: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"node": index[value]}
    if isinstance(value, list | tuple):
        items = [_encode(v, index) for v in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"format": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, slice):
        return {"slice": [_encode(v, index) for v in (value.start, value.stop, value.step)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise AssertionError(f"{type(value).__name__} cannot be saved")


def _decode(value: Any, made: list[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, made) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return made[content]
    if kind == "tuple":
        return tuple(_decode(v, made) for v in content)
    if kind == "slice":
        return slice(*(_decode(v, made) for v in content))
    if kind == "float":
        return float(content)
    tables: dict[str, dict[str, Any]] = {"dtype": _DTYPES, "layout": _LAYOUTS, "format": _FORMATS}
    if kind == "device":
        return torch.device("cpu")
    return tables[kind][content]
