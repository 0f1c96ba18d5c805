"""Weights that are read when they are written: an export never holds more of them than are packed into one.

torch's exporters want a module with parameters, and need no number of them. So matrices are fake tensors while a graph
is made: they have a shape and a dtype, and whoever asks for their numbers gets an error, not zeros. Once the graph is
there, each becomes a `LazyTensor` that reads the program's weight. What the passes of `optimize` pack is lazy too.

Public: `stand_in` and `halve` before a graph is made, `attached` after it, `write` and `write_beside` at the end.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from kvpass.ir.program import Weight

Reader = Callable[[], Tensor]


def is_matrix(weight: Weight) -> bool:
    """Whether a weight is large enough to wait: exporters read vectors and scalars, to fold and to compare them."""
    return not weight.constant and len(weight.shape) > 1


def fake_mode() -> FakeTensorMode:
    """What all stand-ins of one module are made in."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def stand_in(weight: Weight, mode: FakeTensorMode) -> nn.Parameter:
    """A parameter of a weight's shape and dtype that has no numbers."""
    with mode:
        return nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=False)


def halve(module: nn.Module) -> None:
    """Make the floats of a module with flat names float16; `module.half()` takes no stand-ins."""
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter.half(), requires_grad=False))
    for name, buffer in list(module.named_buffers()):
        if buffer.is_floating_point():
            setattr(module, name, buffer.half())


@contextlib.contextmanager
def attached(model: Any, readers: Mapping[str, Reader]) -> Iterator[None]:
    """Give the initializers of an `onnx_ir.Model` that stand for weights what reads them, in the type they have.

    Within the block they have no value at all, so that optimizers leave them alone, tiny ones too. A transpose of a
    weight that nothing else reads becomes part of reading it.

    Args:
        model: changed in place.
        readers: by the name of the initializer; those that the graph does not have are left out.
    """
    import onnx_ir

    graph = model.graph
    waiting = []
    for name in [n for n in readers if n in graph.initializers]:
        value, read = graph.initializers[name], readers[name]
        uses = value.uses()
        node = uses[0].node if len(uses) == 1 else None
        if node is not None and node.op_type == "Transpose" and not value.is_graph_output():
            order = node.attributes["perm"].as_ints()
            read = functools.partial(_permuted, read, order)
            shape = onnx_ir.Shape([value.shape[axis] for axis in order])
            value = onnx_ir.Value(name=f"{name}_t", shape=shape, type=onnx_ir.TensorType(value.dtype))
            graph.initializers.add(value)
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)
            graph.initializers.pop(name)
        value.const_value = None
        waiting.append((value, read))
    yield
    for value, read in waiting:
        value.const_value = _lazy(value, read)


def _permuted(read: Reader, order: Sequence[int]) -> Tensor:
    return read().permute(*order)


def _lazy(value: Any, read: Reader) -> Any:
    """An `onnx_ir.LazyTensor` that reads a weight every time it is asked, in the value's type."""
    import onnx_ir

    kind = value.dtype
    dtype = getattr(torch, str(kind.numpy()))

    def numbers() -> Any:
        return onnx_ir.Tensor(read().detach().cpu().to(dtype).contiguous().numpy(), dtype=kind)

    return onnx_ir.LazyTensor(numbers, dtype=kind, shape=value.shape, name=value.name)


def write(model: Any, path: Path, data: str) -> None:
    """Write a model with its weights in a file beside it, one at a time in the order of the graph."""
    import onnx_ir

    onnx_ir.save(model, path, external_data=data, max_workers=1)


def write_beside(model: Any, path: Path, first: Path) -> None:
    """Write a second graph over the weights that the first one has written: equal numbers are on disk once."""
    import onnx_ir

    def key(tensor: Any) -> tuple[Any, ...]:
        return tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()

    tensors = [v.const_value for v in onnx_ir.load(first).graph.initializers.values()]
    written = {key(t): t for t in tensors if isinstance(t, onnx_ir.ExternalTensor)}
    for value in model.graph.initializers.values():
        value.const_value = written.get(key(value.const_value), value.const_value)
    onnx_ir.save(model, path)
