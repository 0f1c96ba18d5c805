"""ONNX packages as canonical graphs: the file that was exported, free of its names.

Names of inputs and outputs stay, since runtimes bind by them; names of nodes, values and initializers do not. Integers
that tell a layer apart stand in the names of caches alone.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpass.errors import RequestError
from kvpass.regression.canonical import Index, Node
from kvpass.regression.programs import dtype_text, float_text
from kvpass.regression.snapshot import Target

if TYPE_CHECKING:
    from kvpass.runtime.transformed import Transformed

COMMUTATIVE = ("Add", "Mul", "And", "Or", "Max", "Min", "Equal")
POSITIONAL = ("attention_mask", "position_ids")  # what says where tokens are, and not what they are
_LAYERED = re.compile(r"(.*\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Package:
    """The graphs of a package by the names of their files, each as its outputs by name, and the weights of all."""

    graphs: dict[str, list[tuple[str, Node]]]
    weights: dict[Node, Tensor]


def exported(model: Transformed, target: Target) -> Package:
    """The graphs of the package that a model is exported as for a target; the package itself is not kept.

    Raises:
        RequestError: onnx is not installed, or the target cannot express the plan.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        model.export_onnx(package, target=target)
        return read_package(package)


def read_package(folder: Path) -> Package:
    """The graphs of the ONNX files in a folder, with their external data. A weight of one name and content in several
    files is one.

    Raises:
        RequestError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise RequestError("reading ONNX needs a package: onnx", fix="pip install 'kvpass[onnx]'") from error
    weights: dict[Node, Tensor] = {}
    graphs = {}
    for path in sorted(folder.glob("*.onnx")):
        graph = onnx.load(str(path)).graph
        made: dict[str, Node] = {}
        for given in graph.input:
            made[given.name] = Node("", [_pieces(given.name)], data=given.name not in POSITIONAL)
        _read(graph, made, weights)
        graphs[path.stem] = [(v.name, made[v.name]) for v in graph.output]
    return Package(graphs, weights)


def _weight(name: str, value: Tensor, weights: dict[Node, Tensor]) -> Node:
    for node, known in weights.items():
        if node.args[0][0] == name and known.dtype == value.dtype and torch.equal(known, value):
            return node
    node = Node("weight", [[name]], note=f"{dtype_text(value.dtype)}{list(value.shape)}")
    weights[node] = value
    return node


def _read(graph: Any, made: dict[str, Node], weights: dict[Node, Tensor]) -> None:
    """Add the values of a graph to `made`, by their names.

    The branches of an `If` read values of the graph around them, and only by name. So their calls stand among the
    others, and the `If` reads what each branch gives.
    """
    import onnx

    for tensor in graph.initializer:
        value = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        made[tensor.name] = _weight(tensor.name, value, weights)
    for call in graph.node:
        op = call.op_type if call.domain in ("", "ai.onnx") else f"{call.domain}.{call.op_type}"
        arguments: list[list[str | Index | Node]] = [[made[n]] if n else ["none"] for n in call.input]
        for attribute in sorted(call.attribute, key=lambda a: str(a.name)):
            value = onnx.helper.get_attribute_value(attribute)
            if isinstance(value, onnx.GraphProto):
                inside = made | {v.name: Node("", [[f"{attribute.name} {i}"]]) for i, v in enumerate(value.input)}
                _read(value, inside, weights)
                arguments += [[f"{attribute.name}=", inside[v.name]] for v in value.output]
            else:
                arguments.append([f"{attribute.name}={_attribute(value)}"])
        node = Node(op, arguments, commutes=op in COMMUTATIVE and len(call.input) == 2)
        for i, name in enumerate(call.output):
            if name:
                made[name] = node if len(call.output) == 1 else Node("output", [[node], [str(i)]])


def _pieces(name: str) -> list[str | Index | Node]:
    found = _LAYERED.fullmatch(name)
    return [name] if found is None else [found[1], Index("layer", int(found[2])), found[3]]


def _attribute(value: Any) -> str:
    if isinstance(value, float):
        return float_text(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_attribute(v) for v in value) + "]"
    if hasattr(value, "raw_data"):  # a tensor
        from onnx import numpy_helper

        return str(numpy_helper.to_array(value).tolist())
    return str(value)
