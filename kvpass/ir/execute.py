"""Running parts of a graph: the workhorse behind every proof, fold and check.

`evaluate` computes chosen nodes of a graph from given values, touching nothing else. Probes use it to ask a subgraph
what it does; folding uses it to turn a weight expression into a tensor; shape analysis runs it on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kvpass.errors import KvpassError

WeightReader = Callable[[str], Tensor]
Caller = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def ancestors(outputs: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """All nodes that `outputs` depend on, themselves included, not looking behind the nodes in `stop`."""
    seen: set[fx.Node] = set()
    barrier = set(stop)
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in barrier:
            stack.extend(node.all_input_nodes)
    return seen


def to_double(dtype: torch.dtype) -> torch.dtype:
    """float64 for every float."""
    return torch.float64 if dtype.is_floating_point else dtype


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype that proofs compute in: float32 for half precision, which resolves too little."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def in_order(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes sorted as their graph orders them."""
    return sorted(nodes)


def _call(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return target(*args, **kwargs)


def call_on_meta(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an op of which only shapes are asked. Layers repeat each other: what was asked before is remembered."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return target(*args, **kwargs)
    key = (target, torch.get_default_dtype(), _described(args), _described(kwargs))
    if key not in _known:
        if len(_known) >= _REMEMBERED:
            _known.clear()
        _known[key] = target(*args, **kwargs)
    return _known[key]


_REMEMBERED = 1 << 14
_known: dict[Any, Any] = {}


def _described(value: Any) -> Any:
    """What an op on the meta device can know of an argument."""
    if isinstance(value, Tensor) and value.is_meta:
        return value.dtype, value.shape, value.stride()
    if isinstance(value, list | tuple):
        return tuple(_described(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((k, _described(v)) for k, v in value.items())
    return type(value), value  # 1, 1.0 and True are equal


def evaluate(
    outputs: Sequence[fx.Node],
    given: Mapping[fx.Node, Any],
    weight: WeightReader,
    device: str | torch.device = "cpu",
    widen: Callable[[torch.dtype], torch.dtype] | None = None,
    lowered: Mapping[Any, Any] | None = None,
    call: Caller = _call,
) -> list[Any]:
    """Values of `outputs`, computed from the values in `given`; weights are read through `weight` by name.

    Every device that the graph names is replaced by `device`; every dtype by what `widen` makes of it; every target by
    what `lowered` has for its node or for it, and called by `call`. Errors raised inside an op are passed on with the
    node.
    """
    target_device = torch.device(device)
    needed = in_order(ancestors(outputs, given))
    users_left: dict[fx.Node, int] = {}
    for node in needed:
        if node not in given:
            for source in node.all_input_nodes:
                users_left[source] = users_left.get(source, 0) + 1
    keep = set(outputs)
    env: dict[fx.Node, Any] = {}

    def value_of(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return env[argument]
        if isinstance(argument, list | tuple):
            return type(argument)(value_of(a) for a in argument)
        if isinstance(argument, slice):
            return slice(value_of(argument.start), value_of(argument.stop), value_of(argument.step))
        if isinstance(argument, torch.device):
            return target_device
        if widen is not None and isinstance(argument, torch.dtype):
            return widen(argument)
        return argument

    for node in needed:
        if node in given:
            env[node] = given[node]
            continue
        if node.op == "get_attr":
            env[node] = weight(str(node.target))
        elif node.op == "call_function":
            target = node.target
            if lowered is not None:
                target = lowered.get(node, lowered.get(target, target))
            assert callable(target)
            try:
                arguments = tuple(value_of(a) for a in node.args)
                env[node] = call(target, arguments, {k: value_of(v) for k, v in node.kwargs.items()})
            except KvpassError:
                raise
            except Exception as error:
                error.add_note(f"while running {node.format_node()}")
                raise
        elif node.op == "output":
            env[node] = value_of(node.args[0])
        else:
            raise AssertionError(f"no value given for {node.op} {node.name}")
        for source in node.all_input_nodes:
            users_left[source] -= 1
            if users_left[source] == 0 and source not in keep:
                env.pop(source, None)
    results = [env[node] for node in outputs]
    env.clear()  # `value_of` calls itself, so what it holds would live on until Python looks for cycles
    return results
