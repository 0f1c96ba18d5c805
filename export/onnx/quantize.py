"""Weights of 4 bits: products with a matrix become MatMulNBits, in the layout and with the numbers of ONNX Runtime.

Blocks of 32 inputs share a scale and are symmetric, and activations may be rounded to 8 bits (accuracy level 4): what
onnxruntime-genai's builder writes for a CPU. The codes come from onnxruntime's own quantizer, one matrix at a time when
the file is written. A table of embeddings that is the output's matrix too is kept once: GatherBlockQuantized looks rows
up in the codes. A table of its own stays as it is.

Public: `quantize`, after `optimize`; `rounded`, what a program's weights are afterwards, for a check against torch.

Shapes: K inputs, N outputs, G blocks of inputs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common
from torch import Tensor, fx

from kvpass.errors import UnsupportedError
from kvpass.ir.fold import fold_weights
from kvpass.ir.program import Program, aten

BLOCK = 32
ACCURACY = 4
CONTRIB = "com.microsoft"
# of aten's products: which operand may be a matrix, and which of its axes the inputs are on
_PRODUCTS = {
    aten.linear.default: (1, 1),
    aten.addmm.default: (2, 0),
    aten.mm.default: (1, 0),
    aten.matmul.default: (1, 0),
}


def codes_of(matrix: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Codes [N, G, BLOCK / 2], two to a byte with the lower first, and scales [N, G] of a matrix [K, N]."""
    codes, scales, _ = _quantizer().qbits_block_quant(np.ascontiguousarray(matrix))
    return codes, scales


@functools.cache
def _quantizer() -> Any:
    """onnxruntime's quantizer; importing it sets the root logger to tell everything, which is undone."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    root.setLevel(level)
    root.handlers[:] = handlers
    return DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True))


def numbers_of(codes: NDArray[np.uint8], scales: NDArray[Any], inputs: int) -> NDArray[np.float32]:
    """The matrix [K, N] that codes and scales stand for."""
    apart = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1, BLOCK).astype(np.float32)
    blocks = (apart - 8) * scales.reshape(len(codes), -1, 1).astype(np.float32)
    return blocks.reshape(len(codes), -1)[:, :inputs].T


def rounded(program: Program, dtype: str) -> Program:
    """The program with its weights as 4 bits leave them, rounded when they are read, to check a package against.

    Args:
        program: not changed.
        dtype: "fp32" or "fp16", what matrices are before they are rounded, and scales are kept in.
    """
    folded = fold_weights(program)
    kind = torch.float16 if dtype == "fp16" else torch.float32
    result = folded.copy()
    for node in folded.forward.nodes:
        operand, axis = _PRODUCTS.get(node.target, (0, 0))
        matrix = node.args[operand] if operand else None
        if isinstance(matrix, fx.Node) and matrix.op == "get_attr":
            name = str(matrix.target)
            weight = folded.weights[name]
            if len(weight.shape) == 2:
                read = functools.partial(_rounded, folded, name, kind, turned=axis == 1)
                result.weights[name] = replace(weight, read=read)
    return result


def _rounded(program: Program, name: str, kind: torch.dtype, *, turned: bool) -> Tensor:
    tensor = program.read(name)
    matrix = tensor.detach().cpu().to(kind).numpy()
    matrix = matrix.T if turned else matrix
    numbers = numbers_of(*codes_of(matrix), len(matrix))
    return torch.from_numpy(numbers.T if turned else numbers).contiguous().to(tensor.dtype)


def quantize(model: ir.Model) -> None:
    """Rewrite an optimized model in place.

    Raises:
        UnsupportedError: nothing in it is a product with a matrix.
    """
    graph = model.graph
    known: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    heads: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # tables that are the matrix of a product, transposed
    for node in [n for n in graph if n.op_type == "MatMul"]:
        matrix = node.inputs[1]
        assert matrix is not None
        turn = matrix.producer()
        table = None if turn is None or turn.op_type != "Transpose" else turn.inputs[0]
        source = matrix if table is None else table
        if source is None or not source.is_initializer() or len(source.shape or ()) != 2:
            continue
        if matrix not in known:
            known[matrix] = _coded(graph, source, turned=table is not None)
        if table is not None:
            heads[table] = known[matrix]
        _replace(node, *known[matrix], turned=table is not None, source=source)
    if not known:
        raise UnsupportedError("the graph has no product with a matrix", where="weights of 4 bits")
    common.RemoveUnusedNodesPass()(model)
    for table, (codes, scales) in heads.items():
        for lookup in [u.node for u in table.uses() if u.node.op_type == "Gather"]:
            _look_up(graph, lookup, table, codes, scales)
    common.RemoveUnusedNodesPass()(model)


def _coded(graph: ir.Graph, source: ir.Value, *, turned: bool) -> tuple[ir.Value, ir.Value]:
    """The initializers of codes [N, G, BLOCK / 2] and scales [N, G]; the matrix is read once for both."""
    tensor = source.const_value
    assert tensor is not None
    sizes = [int(d) for d in source.shape or ()]
    inputs, outputs = reversed(sizes) if turned else sizes
    blocks = -(-inputs // BLOCK)
    waiting: list[NDArray[Any]] = []

    def codes() -> ir.Tensor:
        matrix = tensor.numpy()
        made, scales = codes_of(matrix.T if turned else matrix)
        waiting[:] = [scales]
        return ir.Tensor(made, dtype=ir.DataType.UINT8)

    def scales() -> ir.Tensor:
        if not waiting:
            codes()
        return ir.Tensor(waiting.pop(), dtype=tensor.dtype)

    def initializer(suffix: str, make: Callable[[], ir.Tensor], kind: ir.DataType, *shape: int) -> ir.Value:
        name = f"{source.name}_{suffix}"
        lazy = ir.LazyTensor(make, dtype=kind, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=lazy)
        graph.register_initializer(value)
        return value

    return (
        initializer("Q4", codes, ir.DataType.UINT8, outputs, blocks, BLOCK // 2),
        initializer("scales", scales, tensor.dtype, outputs, blocks),
    )


def _replace(node: ir.Node, codes: ir.Value, scales: ir.Value, *, turned: bool, source: ir.Value) -> None:
    sizes = [int(d) for d in source.shape or ()]
    inputs, outputs = reversed(sizes) if turned else sizes
    attributes = {"K": inputs, "N": outputs, "bits": 4, "block_size": BLOCK, "accuracy_level": ACCURACY}
    made = ir.node("MatMulNBits", [node.inputs[0], codes, scales], attributes, domain=CONTRIB, name=f"{node.name}_Q4")
    _take_place(node, made)


def _look_up(graph: ir.Graph, lookup: ir.Node, table: ir.Value, codes: ir.Value, scales: ir.Value) -> None:
    """Rows of a table from the codes of the output's matrix; what fills the last block is cut off."""
    rows, width = (int(d) for d in table.shape or ())
    assert scales.shape is not None
    padded = int(scales.shape[1]) * BLOCK
    flat = ir.node("Reshape", [codes, _integers(graph, "table", [rows, padded // 2])])
    flat.outputs[0].type, flat.outputs[0].shape = codes.type, ir.Shape((rows, padded // 2))
    attributes = {"bits": 4, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    made = ir.node(
        "GatherBlockQuantized", [flat.outputs[0], lookup.inputs[1], scales], attributes, domain=CONTRIB,
        name=f"{lookup.name}_Q4",
    )  # fmt: skip
    graph.insert_before(lookup, flat)
    if padded == width:
        _take_place(lookup, made)
        return
    graph.insert_before(lookup, made)
    made.outputs[0].type = lookup.outputs[0].type
    bounds = [_integers(graph, name, [number]) for name, number in (("from", 0), ("to", width), ("axis", -1))]
    _take_place(lookup, ir.node("Slice", [made.outputs[0], *bounds]))


def _integers(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    tensor = ir.tensor(numbers, dtype=ir.DataType.INT64, name=f"q4_{name}")
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    if value.name not in graph.initializers:
        graph.register_initializer(value)
    return graph.initializers[value.name]


def _take_place(old: ir.Node, new: ir.Node) -> None:
    output, kept = new.outputs[0], old.outputs[0]
    output.type, output.shape = kept.type, kept.shape
    graph = old.graph
    assert graph is not None
    graph.insert_before(old, new)
    name = kept.name
    ir.convenience.replace_all_uses_with(kept, output, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    output.name = name
