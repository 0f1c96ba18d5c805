"""Smaller graphs: what `torch.onnx.export` makes of our graph becomes what an engineer would have written.

The exporter spells a norm as seven nodes and wraps attention in reshapes that undo each other; ONNX Runtime puts back
together little of it. Here norms, sums and projections become the operators that ONNX Runtime has for them, node for
node those that onnxruntime-genai's builder writes. The function stays the same up to the rounding of sums in another
order; inputs and outputs keep names, types and shapes. Matrices are never read: what is packed anew is a
`LazyTensor`, made when the file is written.

Public: `optimize`, and `PASSES` that it runs in this order for each target.

Shapes: B batch, S tokens, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import pattern

from kvpass.export.onnx.standard import Target

CONTRIB = "com.microsoft"
_SKIPS = {
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}
_NORMS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")
_SMALL = 64  # shapes, axes and scalars; anything larger is a weight and is not read


def optimize(model: ir.Model, target: Target = "ort", *, packed: bool = True) -> None:
    """Rewrite a model in place, into operators that a target has; `packed` joins matrices that one operator reads."""
    if target == "ort":
        model.opset_imports.setdefault(CONTRIB, 1)
    for step in PASSES[target]:
        if packed or step is not _pack_projections:
            step(model)


# --- what a value is -----------------------------------------------------------------------------------------------


def _small(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The numbers of a small constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor.numpy() if tensor is not None and tensor.size <= _SMALL else None


def _scalar(value: ir.Value | None) -> float | None:
    numbers = _small(value)
    return float(numbers.reshape(())) if numbers is not None and numbers.size == 1 else None


def _is_vector(value: ir.Value | None, along: ir.Value | None) -> bool:
    """Whether it is one constant number per channel of the other."""
    size = (_shape(along) or (None,))[-1]
    return value is not None and along is not None and _is_weight(value, 1) and _shape(value) == (size,)


def _is_weight(value: ir.Value | None, rank: int) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == rank


def _shape(value: ir.Value | None) -> tuple[Any, ...] | None:
    """Sizes, symbols included; None where one is not known."""
    if value is None or value.shape is None:
        return None
    known = all(isinstance(d, int) or d.value is not None for d in value.shape)
    return tuple(value.shape) if known else None


def _made_by(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in kinds else None


def _only_use(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


# --- edits ---------------------------------------------------------------------------------------------------------


def _insert(anchor: ir.Node, node: ir.Node, like: Sequence[ir.Value], *, after: bool = False) -> ir.Node:
    """Put a node beside the anchor; its first outputs have the types and shapes of `like`."""
    for output, known in zip(node.outputs, like, strict=False):
        output.type, output.shape = known.type, known.shape
    assert anchor.graph is not None
    (anchor.graph.insert_after if after else anchor.graph.insert_before)(anchor, node)
    return node


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A constant of the graph; equal names are equal constants."""
    if name not in graph.initializers:
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _integers(graph: ir.Graph, name: str, numbers: Sequence[int]) -> ir.Value:
    label = "_".join(str(n).replace("-", "m") for n in numbers)
    return _initializer(graph, f"{name}_{label}", ir.tensor(list(numbers), dtype=ir.DataType.INT64))


def _lazy(
    graph: ir.Graph, name: str, shape: Sequence[int], sources: Sequence[ir.Value], make: Callable[..., Any]
) -> ir.Value:
    """A weight that is computed from others when it is written, and not kept."""
    tensors = [s.const_value for s in sources if s.const_value is not None]
    kind = tensors[0].dtype
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(make(*(t.numpy() for t in tensors)), dtype=kind), dtype=kind, shape=ir.Shape(shape), name=name
    )
    return _initializer(graph, name, tensor)


# --- rules: a few nodes that are one operator ----------------------------------------------------------------------


class _Lookup(pattern.RewriteRuleClassBase):
    """Rows of a table, as `aten.index` has them, are a Gather."""

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)  # what other nodes read too stays

    def pattern(self, op: Any, table: Any, rows: Any) -> Any:
        return op.GatherND(table, op.Unsqueeze(rows, [-1]), batch_dims=0)

    def rewrite(self, op: Any, table: Any, rows: Any, **_: Any) -> Any:
        return op.Gather(table, rows, axis=0)


class _RmsNorm(pattern.RewriteRuleClassBase):
    """w x / sqrt(mean(x^2) + epsilon), computed in float32 where the model is narrower."""

    def __init__(self, made: str, weight_first: bool) -> None:
        super().__init__(remove_nodes=False)
        self.made, self.weight_first = made, weight_first

    def pattern(self, op: Any, x: Any, weight: Any, epsilon: Any) -> Any:
        wide = pattern.OrValue([op.Cast(x, to=ir.DataType.FLOAT), x])
        mean = op.ReduceMean(op.Pow(wide, 2.0), [-1], keepdims=1, noop_with_empty_axes=0)
        scaled = op.Mul(wide, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))))
        narrow = pattern.OrValue([op.Cast(scaled, _allow_other_attributes=True), scaled])
        return op.Mul(*((weight, narrow) if self.weight_first else (narrow, weight)), _outputs=["norm"])

    def check(self, context: Any, x: ir.Value, weight: ir.Value, epsilon: ir.Value, norm: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        if _scalar(epsilon) is None or not _is_vector(weight, x):
            return result.fail("epsilon or the weight is no constant")
        casts = [n.op_type == "Cast" and n.outputs[0].dtype == x.dtype for n in norm.consumers()]
        return result if x.dtype == weight.dtype or casts == [True] else result.fail("no kernel has these types")

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, epsilon: ir.Value, **_: Any) -> Any:
        return getattr(op, self.made)(x, weight, axis=-1, epsilon=_scalar(epsilon), stash_type=1)


class _NarrowRmsNorm(pattern.RewriteRuleClassBase):
    """A norm with a float32 weight between casts has the weight in the type of the model."""

    def __init__(self, made: str) -> None:
        super().__init__()
        self.made = made

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        norm = getattr(op, self.made)(x, weight, _allow_other_attributes=True, _outputs=["norm"])
        return op.Cast(norm, _allow_other_attributes=True, _outputs=["narrow"])

    def check(self, context: Any, x: ir.Value, narrow: ir.Value, norm: ir.Value, **_: Any) -> Any:
        result = pattern.MatchResult()
        return result if x.dtype == narrow.dtype != norm.dtype else result.fail("the types are others")

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, norm: ir.Value, **_: Any) -> Any:
        assert x.dtype is not None
        assert weight.const_value is not None
        numbers = weight.const_value.numpy().astype(x.dtype.numpy())
        cast = op.initializer(ir.tensor(numbers, dtype=x.dtype), name=f"{weight.name}_{x.dtype.short_name()}")
        producer = norm.producer()
        assert producer is not None
        return getattr(op, self.made)(x, cast, **producer.attributes)


class _LayerNorm(_RmsNorm):
    """w (x - mean(x)) / sqrt(variance(x) + epsilon)"""

    def pattern(self, op: Any, x: Any, weight: Any, epsilon: Any) -> Any:
        centred = op.Sub(x, op.ReduceMean(x, [-1], keepdims=1, noop_with_empty_axes=0))
        variance = op.ReduceMean(op.Pow(centred, 2.0), [-1], keepdims=1, noop_with_empty_axes=0)
        scaled = op.Mul(centred, op.Reciprocal(op.Sqrt(op.Add(variance, epsilon))))
        return op.Mul(*((weight, scaled) if self.weight_first else (scaled, weight)), _outputs=["norm"])

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, epsilon: ir.Value, **_: Any) -> Any:
        return getattr(op, self.made)(x, weight, axis=-1, epsilon=_scalar(epsilon), stash_type=1)


class _Gelu(pattern.RewriteRuleClassBase):
    """GELU by tanh (Hendrycks & Gimpel, arXiv 1606.08415)."""

    def argument(self, op: Any, x: Any) -> Any:
        return op.Mul(op.Add(x, op.Mul(op.Pow(x, 3.0), 0.044715)), math.sqrt(2 / math.pi))

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(self.argument(op, x)), 1.0))

    def rewrite(self, op: Any, x: Any, **_: Any) -> Any:
        return op.Gelu(x, approximate="tanh")


class _GeluOfBloom(_Gelu):
    def argument(self, op: Any, x: Any) -> Any:
        return op.Mul(op.Mul(x, math.sqrt(2 / math.pi)), op.Add(op.Mul(op.Mul(x, 0.044715), x), 1.0))


def _rules(rms_norm: str) -> list[pattern.RewriteRuleSet]:
    norms = [rule.rule(made, first) for rule, made in ((_LayerNorm, "LayerNormalization"), (_RmsNorm, rms_norm))
             for first in (False, True)]  # fmt: skip
    return [
        pattern.RewriteRuleSet(rules)
        for rules in ([_Lookup.rule()], [_Gelu.rule(), _GeluOfBloom.rule()], norms, [_NarrowRmsNorm.rule(rms_norm)])
    ]


_RULES, _STANDARD_RULES = _rules("SimplifiedLayerNormalization"), _rules("RMSNormalization")


def _fuse(model: ir.Model) -> None:
    for rules in _RULES:
        rules.apply_to_model(model)


def _fuse_standard(model: ir.Model) -> None:
    for rules in _STANDARD_RULES:
        rules.apply_to_model(model)


# --- views ---------------------------------------------------------------------------------------------------------


def _tidy_views(model: ir.Model) -> None:
    """Reshapes and transposes in a row become one or none, and shapes become constants where they can."""
    empty: dict[Any, ir.Value] = {}
    for node in list(model.graph):
        if 0 in (_shape(node.outputs[0]) or ()):
            _tidy_empty(model.graph, node, empty)
        elif node.op_type == "Reshape":
            _tidy_reshape(model.graph, node)
        elif node.op_type == "Transpose":
            _tidy_transpose(node)
        elif node.op_type in _NORMS:
            _norm_first(node)
    common.RemoveUnusedNodesPass()(model)


def _tidy_reshape(graph: ir.Graph, node: ir.Node) -> None:
    x, wanted = node.inputs[0], _shape(node.outputs[0])
    while before := _made_by(x, "Reshape"):
        x = before.inputs[0]
    target = _target(_shape(x), wanted)
    if x is None or wanted is None or target is None:
        return
    if _shape(x) == wanted and not node.outputs[0].is_graph_output():
        ir.convenience.replace_all_uses_with(node.outputs[0], x)
        return
    node.replace_input_with(0, x)
    node.replace_input_with(1, _integers(graph, "shape", target))
    node.attributes.pop("allowzero", None)


def _target(given: tuple[Any, ...] | None, wanted: tuple[Any, ...] | None) -> list[int] | None:
    """The shape as Reshape takes it: 0 keeps a size, one -1 is what remains; None where more are unknown."""
    if given is None or wanted is None or 0 in wanted:
        return None
    same = [i < len(given) and not isinstance(d, int) and given[i] == d for i, d in enumerate(wanted)]
    target = [d if isinstance(d, int) else 0 if kept else -1 for d, kept in zip(wanted, same, strict=True)]
    return target if target.count(-1) <= 1 else None


def _tidy_empty(graph: ir.Graph, node: ir.Node, known: dict[Any, ir.Value]) -> None:
    """All tensors without elements are equal, if their shapes are: readers of another layer's cache bring such keys."""
    output, x = node.outputs[0], node.inputs[0]
    made = _shape(output) or ()
    if (made, output.dtype) in known:
        ir.convenience.replace_all_uses_with(output, known[made, output.dtype])
        return
    known[made, output.dtype] = output
    while before := _made_by(x, "Slice"):
        x = before.inputs[0]
    given = _shape(x) or ()
    axes = [i for i, (old, new) in enumerate(zip(given, made, strict=False)) if old != new]
    ends = [made[i] for i in axes]
    if node.op_type == "Slice" and len(given) == len(made) and all(isinstance(d, int) for d in ends):
        bounds = (("starts", [0] * len(axes)), ("ends", ends), ("axes", axes))
        for index, operand in enumerate((x, *(_integers(graph, name, numbers) for name, numbers in bounds))):
            node.replace_input_with(index, operand)
        node.resize_inputs(4)


def _tidy_transpose(node: ir.Node) -> None:
    before = _made_by(node.inputs[0], "Transpose")
    if before is None or not ("perm" in node.attributes and "perm" in before.attributes):
        return
    first, second = (n.attributes["perm"].as_ints() for n in (before, node))
    both = [first[i] for i in second]
    x = before.inputs[0]
    assert x is not None
    if both == sorted(both) and not node.outputs[0].is_graph_output():
        ir.convenience.replace_all_uses_with(node.outputs[0], x)
    else:
        node.replace_input_with(0, x)
        node.attributes["perm"] = ir.AttrInt64s("perm", both)


def _norm_first(norm: ir.Node) -> None:
    """A norm of the last axis does not mind where the others are: transposes on both sides of it meet."""
    before = _made_by(norm.inputs[0], "Transpose")
    output = norm.outputs[0]
    if before is None or "perm" not in before.attributes or not _only_use(before.outputs[0]):
        return
    order, axes = before.attributes["perm"].as_ints(), len(_shape(output) or ())
    if order[-1] != axes - 1 or _integer(norm, "axis", -1) not in (-1, axes - 1):
        return
    x = before.inputs[0]
    if x is None or output.is_graph_output():
        return
    norm.replace_input_with(0, x)
    after = ir.node("Transpose", [output], {"perm": order})
    ir.convenience.replace_all_uses_with(output, after.outputs[0])
    after.replace_input_with(0, output)
    _insert(norm, after, [output], after=True)
    output.shape = x.shape


_PER_ELEMENT = ("Relu", "Gelu", "Sigmoid", "Tanh", "Erf", "Softplus", "Cast", "Pow", "Add", "Sub", "Mul", "Div")
_PER_TOKEN = (*_NORMS, "MatMul", "Gemm")


def _keep_batches(model: ir.Model) -> None:
    """What is computed token by token on [B*S, D] is computed on [B, S, D], where norms and attention already are."""
    origins: dict[ir.Value, ir.Value] = {}
    sizes = (_shape(model.graph.inputs[0]) or ())[:2]
    for node in model.graph:
        if node.op_type == "Reshape" and (x := _rows_of(node, sizes)) is not None:
            origins[node.outputs[0]] = x
    flat, members = set(origins), []
    for node in model.graph:
        if _per_token(node, flat):
            members.append(node)
            flat.update(node.outputs)
    kept = dict.fromkeys(members)
    while lost := [n for n in kept if not _stays(n, kept, origins)]:
        for node in lost:
            del kept[node]
    for node in kept:
        _lift(model.graph, node, origins)


def _rows_of(node: ir.Node, sizes: tuple[Any, ...]) -> ir.Value | None:
    """x, where the node makes [B*S, D] of x [B, S, D]."""
    x = node.inputs[0]
    given, made = _shape(x) or (), _shape(node.outputs[0]) or ()
    plain = len(given) == 3 and len(made) == 2 and given[2] == made[1] and isinstance(made[1], int)
    return x if plain and given[:2] == sizes else None


def _per_token(node: ir.Node, flat: set[ir.Value]) -> bool:
    if not any(x in flat for x in node.inputs) or _shape(node.outputs[0]) is None or len(node.outputs) > 1:
        return False
    if node.op_type in _PER_ELEMENT:
        sizes = {_shape(x) for x in node.inputs if x in flat}
        return len(sizes) == 1 and all(x in flat or _is_weight(x, 0) or _is_weight(x, 1) for x in node.inputs)
    if node.op_type not in _PER_TOKEN or node.inputs[0] not in flat or any(x in flat for x in node.inputs[1:]):
        return False
    if node.op_type == "MatMul":
        return _is_weight(node.inputs[1], 2)
    if node.op_type == "Gemm":
        plain = all(n not in node.attributes or node.attributes[n].as_float() == 1 for n in ("alpha", "beta"))
        bias = len(node.inputs) < 3 or node.inputs[2] is None or _is_weight(node.inputs[2], 1)
        return plain and bias and not _integer(node, "transA", 0) and _is_weight(node.inputs[1], 2)
    return _integer(node, "axis", -1) == -1


def _stays(node: ir.Node, kept: dict[ir.Node, None], origins: dict[ir.Value, ir.Value]) -> bool:
    """Whether all that it reads and all that reads it goes along."""
    output = node.outputs[0]
    fed = all(_is_weight(x, 0) or _is_weight(x, 1) or _is_weight(x, 2) or x in origins or x.producer() in kept
              for x in node.inputs if x is not None)  # fmt: skip
    return fed and not output.is_graph_output() and all(u in kept or _says_sizes(u) for u in output.consumers())


def _says_sizes(node: ir.Node) -> bool:
    """Whether it makes the same of what it reads, whatever that one's shape."""
    sizes = _small(node.inputs[1]) if node.op_type == "Reshape" else None
    return node.op_type == "Reshape" and (sizes is None or 0 not in sizes)


def _lift(graph: ir.Graph, node: ir.Node, origins: dict[ir.Value, ir.Value]) -> None:
    batched = ()
    for index, x in enumerate(node.inputs):
        if x in origins:
            node.replace_input_with(index, origins[x])
        if x is not None and not x.is_initializer():
            batched = (_shape(node.inputs[index]) or ())[:2]
    output = node.outputs[0]
    output.shape = ir.Shape((*batched, *(_shape(output) or ())[1:]))
    if node.op_type == "Gemm":
        _spell_out(graph, node)


def _spell_out(graph: ir.Graph, node: ir.Node) -> None:
    """Gemm has two axes only."""
    x, weight, *bias = node.inputs
    assert weight is not None
    if _integer(node, "transB", 0):
        weight = _transposed(graph, node, weight)
    made = _insert(node, ir.node("MatMul", [x, weight]), node.outputs)
    if bias and bias[0] is not None:
        made = _insert(node, ir.node("Add", [made.outputs[0], bias[0]]), node.outputs)
    ir.convenience.replace_all_uses_with(node.outputs[0], made.outputs[0])


def _transposed(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> ir.Value:
    rows, columns = (int(d) for d in weight.shape or ())
    if _only_use(weight):
        return _lazy(graph, f"{weight.name}_t", (columns, rows), [weight], np.transpose)
    made = _insert(node, ir.node("Transpose", [weight], {"perm": [1, 0]}), ())
    made.outputs[0].type, made.outputs[0].shape = weight.type, ir.Shape((columns, rows))
    return made.outputs[0]


# --- projections of attention --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Projection:
    """Columns of x W + b, times a factor; `nodes` are all that computes them."""

    product: ir.Node
    bias: ir.Value | None
    columns: np.ndarray[Any, Any]
    factor: float
    nodes: tuple[ir.Node, ...]

    @property
    def weight(self) -> ir.Value:
        value = self.product.inputs[1]
        assert value is not None
        return value


def _pack_projections(model: ir.Model) -> None:
    """Queries, keys and values of one layer come from one product; as one operand where nothing lies between."""
    for layer, node in enumerate(n for n in list(model.graph) if n.op_type in ("GroupQueryAttention", "Attention")):
        operands = node.inputs[:3]
        if None in operands:
            continue
        if node.op_type == "Attention":  # has no operand that is all three
            _pack_products(model.graph, layer, [_product(x) for x in operands])
            continue
        found = [p for x in operands if x is not None and (p := _projection(x)) is not None]
        if len(found) == 3 and _same_source(found) and (_is_whole(found) or _is_alone(node, found)):
            _pack_operands(model.graph, node, layer, found)
        else:
            _pack_products(model.graph, layer, [_product(x) for x in operands])
    common.RemoveUnusedNodesPass()(model)


def _projection(value: ir.Value) -> _Projection | None:
    """What an operand is of the product behind it: its columns are found by sending their numbers through the views."""
    views: list[tuple[ir.Node, int]] = []
    nodes: list[ir.Node] = []
    factor, bias = 1.0, None
    while node := _made_by(value, "Mul", *_VIEWS):
        x, constant = _parts(node) if node.op_type == "Mul" else (node.inputs[0], None)
        scale = _scalar(constant)
        if node.op_type in _VIEWS:
            views.append((node, value.index() or 0))
        elif scale is not None:
            factor *= scale
        if x is None or (node.op_type == "Mul" and scale is None):
            return None
        nodes.append(node)
        value = x
    if (node := _made_by(value, "Add")) and _is_vector(_parts(node)[1], value):
        nodes.append(node)
        x, bias = _parts(node)
        assert x is not None
        value = x
    node = _made_by(value, "MatMul")
    if node is None or not _is_weight(node.inputs[1], 2):
        return None
    columns = _columns(node.outputs[0], views)
    return None if columns is None else _Projection(node, bias, columns, factor, (*nodes, node))


def _parts(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """What a node computes on, and its first constant."""
    found = [next((x for x in node.inputs if x is not None and x.is_initializer() == c), None) for c in (False, True)]
    return found[0], found[1]


def _columns(product: ir.Value, views: Iterable[tuple[ir.Node, int]]) -> np.ndarray[Any, Any] | None:
    """The columns of a product [B, S, N] that the last view holds, if it holds the same ones of every token."""
    width = (_shape(product) or (None,))[-1]
    if not isinstance(width, int):
        return None
    tokens = width * np.arange(6).reshape(2, 3, 1)
    numbers = tokens + np.arange(width)
    for node, output in reversed(list(views)):
        constants = [_small(x) for x in node.inputs[1:]]
        if any(c is None for c in constants):
            return None
        numbers = _VIEWS[node.op_type](node, numbers, output, *constants)
    columns = numbers.reshape(-1)[: numbers.size // 6]
    regular = numbers.shape == (2, 3, columns.size) and bool((numbers == tokens + columns).all())
    return columns if regular else None


def _reshape(node: ir.Node, x: Any, output: int, shape: Any) -> Any:
    keeps = not _integer(node, "allowzero", 0)
    return x.reshape([x.shape[i] if d == 0 and keeps else int(d) for i, d in enumerate(shape)])


def _split(node: ir.Node, x: Any, output: int, sizes: Any = None) -> Any:
    axis = _integer(node, "axis", 0)
    parts = len(node.outputs) if sizes is None else np.cumsum(sizes)[:-1]
    return (np.array_split if sizes is None else np.split)(x, parts, axis=axis)[output]


def _slice(node: ir.Node, x: Any, output: int, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    parts = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        parts[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(parts)]


_VIEWS: dict[str, Callable[..., Any]] = {
    "Reshape": _reshape,
    "Transpose": lambda node, x, output: np.transpose(x, list(node.attributes["perm"].as_ints())),
    "Split": _split,
    "Slice": _slice,
    "Gather": lambda node, x, output, index: np.take(x, index, axis=_integer(node, "axis", 0)),
    "Squeeze": lambda node, x, output, axes: np.squeeze(x, tuple(axes)),
    "Unsqueeze": lambda node, x, output, axes: np.expand_dims(x, tuple(axes)),
}


def _same_source(found: Sequence[_Projection]) -> bool:
    return (
        all(p.product.inputs[0] is found[0].product.inputs[0] for p in found)
        and found[1].factor == found[2].factor == 1
    )


def _is_whole(found: Sequence[_Projection]) -> bool:
    """Whether they are all columns of one product in order."""
    columns = np.concatenate([p.columns for p in found])
    one = all(p.product is found[0].product and p.bias is found[0].bias for p in found)
    return one and np.array_equal(columns, np.arange((_shape(found[0].weight) or ())[1]))


def _is_alone(attention: ir.Node, found: Sequence[_Projection]) -> bool:
    """Whether nothing else reads what they are made of, so that packing them copies no weight."""
    inside = {attention, *(n for p in found for n in p.nodes)}
    alone = all(c in inside for p in found for n in p.nodes for o in n.outputs for c in o.consumers())
    return alone and all(len(p.weight.uses()) == 1 for p in found)


def _pack_operands(graph: ir.Graph, attention: ir.Node, layer: int, found: Sequence[_Projection]) -> None:
    if _is_whole(found):
        packed = found[0].nodes[-1 if found[0].bias is None else -2].outputs[0]
    else:
        x, weight = found[0].product.inputs
        assert x is not None
        assert weight is not None
        rows, columns = (_shape(weight) or ())[0], sum(p.columns.size for p in found)
        taken = [p.columns for p in found]
        weights = _lazy(graph, f"qkv_weight_{layer}", (rows, columns), [p.weight for p in found], _take(taken))
        product = ir.node("MatMul", [x, weights])
        packed = _insert(attention, product, ()).outputs[0]
        packed.type, packed.shape = x.type, ir.Shape((*(_shape(x) or ())[:2], columns))
        if any(p.bias is not None for p in found):
            biases = [p.bias or _zeros(graph, p.weight) for p in found]
            bias = _lazy(graph, f"qkv_bias_{layer}", (columns,), biases, _take(taken))
            packed = _insert(attention, ir.node("Add", [packed, bias]), [packed]).outputs[0]
    scale = attention.attributes["scale"].as_float() * found[0].factor
    attention.attributes["scale"] = ir.AttrFloat32("scale", scale)
    for index, operand in enumerate((packed, None, None)):
        attention.replace_input_with(index, operand)


def _take(columns: Sequence[np.ndarray[Any, Any]]) -> Callable[..., np.ndarray[Any, Any]]:
    """Makes one array of those columns of several."""
    return lambda *arrays: np.concatenate([a[..., c] for a, c in zip(arrays, columns, strict=True)], axis=-1)


def _zeros(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    width = int((_shape(weight) or ())[1])
    return _lazy(graph, f"zeros_{width}", (width,), [weight], lambda w: np.zeros(width, w.dtype))


_THROUGH = {"RotaryEmbedding": 0, "Slice": 0, "TensorScatter": 1}  # operators of several inputs, of which one goes on


def _product(value: ir.Value | None) -> ir.Node | None:
    """The product with a weight that an operand is made of, norms and views between."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "MatMul" and _is_weight(node.inputs[1], 2):
            return node
        if node.op_type in _THROUGH:
            value = node.inputs[_THROUGH[node.op_type]]
            continue
        if sum(x is not None and not x.is_initializer() for x in node.inputs) > 1:
            return None
        value = _parts(node)[0]
    return None


def _pack_products(graph: ir.Graph, layer: int, products: Sequence[ir.Node | None]) -> None:
    nodes = [n for n in products if n is not None]
    weights = [n.inputs[1] for n in nodes if n.inputs[1] is not None and len(n.inputs[1].uses()) == 1]
    inside = not any(n.outputs[0].is_graph_output() for n in nodes)
    if len(set(nodes)) < 3 or len(weights) < 3 or len({n.inputs[0] for n in nodes}) > 1 or not inside:
        return
    rows, sizes = (_shape(weights[0]) or ())[0], [(_shape(w) or ())[1] for w in weights]
    x = nodes[0].inputs[0]
    assert x is not None
    packed = _lazy(graph, f"qkv_weight_{layer}", (rows, sum(sizes)), weights, lambda *w: np.concatenate(w, axis=1))
    first = next(n for n in graph if n in nodes)
    product = _insert(first, ir.node("MatMul", [x, packed]), ())
    product.outputs[0].type, product.outputs[0].shape = x.type, ir.Shape((*(_shape(x) or ())[:2], sum(sizes)))
    inputs = [product.outputs[0], _integers(graph, "sizes", sizes)]
    split = ir.node("Split", inputs, {"axis": -1}, num_outputs=3)
    _insert(first, split, [n.outputs[0] for n in nodes])
    for node, part in zip(nodes, split.outputs, strict=True):
        ir.convenience.replace_all_uses_with(node.outputs[0], part)


# --- sums before norms ---------------------------------------------------------------------------------------------


def _join_sums(model: ir.Model) -> None:
    """A sum and the norm of it are one operator, biases of the terms included."""
    for node in list(model.graph):
        rank = len(_shape(node.outputs[0]) or ())
        if node.op_type in _SKIPS and rank == 3 and _integer(node, "axis", -1) in (-1, 2):
            _join_sum(model.graph, node)
    common.RemoveUnusedNodesPass()(model)


def _join_sum(graph: ir.Graph, norm: ir.Node) -> None:
    total, *gains = norm.inputs
    add = _made_by(total, "Add")
    if add is None or total is None or not all(_is_vector(x, total) and x.dtype == total.dtype for x in gains if x):
        return
    found = list(_terms(add, _shape(total)))
    terms, biases = ([x for x in found if _is_vector(x, total) == constant] for constant in (False, True))
    outside = total.is_graph_output() or norm.outputs[0].is_graph_output()
    if len(terms) < 2 or outside or any(_shape(x) != _shape(total) for x in terms):
        return
    while len(terms) > 2:
        made = _insert(add, ir.node("Add", terms[:2]), [total])
        terms[:2] = made.outputs
    inputs: list[ir.Value | None] = [*terms, *gains]
    if biases:
        place = 4 if norm.op_type == "LayerNormalization" else 3
        inputs += [None] * (place - len(inputs)) + [_summed(graph, biases)]
    attributes = {"epsilon": norm.attributes.get_float("epsilon", 1e-5)}
    needed = len(total.uses()) > 1
    joined = ir.node(_SKIPS[norm.op_type], inputs, attributes, domain=CONTRIB, num_outputs=4 if needed else 1)
    _insert(add, joined, [norm.outputs[0]])
    ir.convenience.replace_all_uses_with(norm.outputs[0], joined.outputs[0])
    if needed:
        joined.outputs[3].type, joined.outputs[3].shape = total.type, total.shape
        ir.convenience.replace_all_uses_with(total, joined.outputs[3])
        for unused in joined.outputs[1:3]:
            unused.name = ""  # an output without a name is not computed
    graph.remove(norm, safe=True)


def _terms(add: ir.Node, shape: tuple[Any, ...] | None) -> Iterator[ir.Value]:
    """The terms of a sum, those of sums that only it reads included."""
    for x in add.inputs:
        assert x is not None
        inner = _made_by(x, "Add")
        if inner is not None and _only_use(x) and _shape(x) == shape:
            yield from _terms(inner, shape)
        else:
            yield x


def _summed(graph: ir.Graph, biases: Sequence[ir.Value]) -> ir.Value:
    if len(biases) == 1:
        return biases[0]
    shape = [int(d) for d in _shape(biases[0]) or ()]
    return _lazy(graph, "_and_".join(str(b.name) for b in biases), shape, biases, lambda *b: sum(b))


# --- buffers -------------------------------------------------------------------------------------------------------


def _read_in_place(model: ir.Model) -> None:
    """A step reads a buffer as it lies once more than half of it is in use, and a copy of the rows in use before.

    Attention computes to the end of what it is given, so a prompt always reads the rows in use: they are few beside
    the products that it takes.
    """
    graph = model.graph
    whole: ir.Value | None = None
    for node in list(graph):
        cuts = [cut for x in node.inputs[1:3] if (cut := _made_by(x, "Slice")) is not None]
        if node.op_type != "Attention" or len(cuts) < 2 or len(node.inputs) < 7:
            continue
        whole = whole or _mostly_full(graph, node, cuts[0].inputs[0])
        own = [ir.node("Slice", list(cut.inputs)) for cut in cuts]
        branches = {
            "then_branch": _branch(node, [], [cut.inputs[0] for cut in cuts], "whole"),
            "else_branch": _branch(node, own, [cut.outputs[0] for cut in own], "part"),
        }
        chosen = ir.node("If", [whole], {name: ir.AttrGraph(name, body) for name, body in branches.items()})
        _insert(node, chosen, node.outputs)
        ir.convenience.replace_all_uses_with(node.outputs[0], chosen.outputs[0])
        graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)


def _mostly_full(graph: ir.Graph, before: ir.Node, buffer: ir.Value | None) -> ir.Value:
    """Whether one token is read, into a buffer [B, H, C, D] of which more than half is in use."""
    ids, mask = graph.inputs[:2]
    shapes = [
        _insert(before, ir.node("Shape", [x], {"start": axis, "end": axis + 1}), ()).outputs[0]
        for x, axis in ((ids, 1), (mask, 1), (buffer, 2))
    ]
    made: dict[str, ir.Value] = {}
    for name, kind, operands in (
        ("one", "Equal", lambda: [shapes[0], _integers(graph, "shape", [1])]),
        ("twice", "Add", lambda: [shapes[1], shapes[1]]),
        ("full", "Less", lambda: [shapes[2], made["twice"]]),
        ("whole", "And", lambda: [made["one"], made["full"]]),
    ):
        made[name] = _insert(before, ir.node(kind, operands()), ()).outputs[0]
    return made["whole"]


def _branch(attention: ir.Node, before: list[ir.Node], operands: Sequence[ir.Value | None], name: str) -> ir.Graph:
    """The attention over other keys and values, as the body of a choice."""
    query, _, _, *others = attention.inputs
    made = ir.node("Attention", [query, *operands, *others], dict(attention.attributes))
    old, new = attention.outputs[0], made.outputs[0]
    new.name, new.type, new.shape = f"{old.name}_{name}", old.type, old.shape
    for index, node in enumerate(before):
        node.outputs[0].name = f"{old.name}_{name}_{index}"
    return ir.Graph([], [new], nodes=[*before, made], name=f"{name}_of_{old.name}")


# --- what remains --------------------------------------------------------------------------------------------------


def _merge_constants(graph: ir.Graph) -> None:
    """Equal constants once; weights that are read when they are written are left alone."""
    known: dict[Any, ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.LazyTensor) or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        if key in known:
            ir.convenience.replace_all_uses_with(value, known[key])
        known.setdefault(key, value)


def _clean(model: ir.Model) -> None:
    """Equal nodes once, and no traces of how the graph was captured."""
    _merge_constants(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    for value in (
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(o for n in model.graph for o in n.outputs),
    ):
        value.metadata_props.clear()


_VIEWS_AND_PRODUCTS = (_tidy_views, _keep_batches, _tidy_views, _pack_projections)
PASSES: dict[Target, tuple[Callable[[ir.Model], None], ...]] = {
    "ort": (_fuse, *_VIEWS_AND_PRODUCTS, _join_sums, _clean),
    "onnx": (_fuse_standard, *_VIEWS_AND_PRODUCTS, _clean),
    "onnx-static": (_fuse_standard, *_VIEWS_AND_PRODUCTS, _clean, _read_in_place),
}
