"""From an `nn.Module` that maps token ids to logits to a plain graph: torch.export, then a tidy copy.

The copy has one input, `input_ids` [B, S], and no guards, assertions, gradient scopes, dropout or casts that do
nothing. The weights are not touched: a module whose parameters are fake tensors is as good as one with numbers in it.
"""

from __future__ import annotations

import contextlib
import io
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, OutputKind

from kvpass.errors import CaptureError
from kvpass.ir.program import Weight, aten, sweep, writes

EXAMPLE_BATCH, EXAMPLE_LENGTH = 3, 19  # unlike any usual size, so that no dimension is confused with another

_DROPPED = ("_assert", "sym_constrain_range", "_guards_fn", "lift_fresh")
_SCOPES = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def trace(
    module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None
) -> tuple[fx.Graph, dict[str, Weight]]:
    """Capture `module` as a graph and the table of its weights, named as the module names them.

    Args:
        module: maps `input_ids` [B, S] (int64) to logits [B, S, V]; may live on any device, meta included.
        call: how to call it when `module(input_ids)` is not enough.

    Raises:
        CaptureError: torch.export refused it, or it fixed the batch or the length.
    """
    wrapped = _Wrapper(module, call)
    first = next(module.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    fake = first.fake_mode if isinstance(first, FakeTensor) else contextlib.nullcontext()
    with fake:
        ids = torch.zeros((EXAMPLE_BATCH, EXAMPLE_LENGTH), dtype=torch.long, device=device)
    auto = torch.export.Dim.AUTO
    training = [m for m in module.modules() if m.training]  # parts of a model may be frozen, so each on its own
    module.eval()
    try:
        # where it gives up, export prints the whole graph; the error that is raised below says what matters
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), _code_lines():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                wrapped,
                (ids,),
                strict=False,
                dynamic_shapes=({0: auto, 1: auto},),
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except CaptureError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        refused = CaptureError(
            f"torch.export could not capture {type(module).__name__}: {type(error).__name__}: "
            + " ".join(reason[:3])[:400],
            where=_source_line(error),
            fix="the model must map input_ids [batch, length] to logits [batch, length, vocabulary] without "
            "Python control flow on the values of tensors",
        )
        refused.node, refused.source = _module_of(error, module), refused.where
        refused.layer = layer_of(refused.node)
        raise refused from error
    finally:
        for part in training:
            part.training = True
    if any(writes(n) and _does_nothing(n) is None for n in exported.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = exported.run_decompositions({})  # the same ops, each writing a tensor of its own
    return _tidy(exported, module)


@contextlib.contextmanager
def _code_lines() -> Iterator[None]:
    """Nodes captured inside keep the lines of functions, too: left alone, export keeps those of methods `forward`, and
    a helper that turns queries and one that masks scores look like the line that calls them."""
    foreign = (str(Path(torch.__file__).parent), str(Path(__file__).parent))

    def kept(self: fx.proxy.TracerBase, frames: traceback.StackSummary) -> traceback.StackSummary:
        first = next((i for i, frame in enumerate(frames) if frame.name == "forward"), len(frames))
        own = [frame for frame in frames[first:] if not frame.filename.startswith(foreign)]
        return traceback.StackSummary.from_list(own)

    tracer: Any = fx.proxy.TracerBase
    original = getattr(tracer, "_filter_traceback_frames", None)
    if original is None:  # private to torch: without it, lines are coarser
        yield
        return
    tracer._filter_traceback_frames = kept
    try:
        yield
    finally:
        tracer._filter_traceback_frames = original


class _Wrapper(nn.Module):
    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.module = module
        self._call = call

    def forward(self, input_ids: Tensor) -> Tensor:
        result: Any = self.module(input_ids) if self._call is None else self._call(self.module, input_ids)
        if not isinstance(result, Tensor):
            result = getattr(result, "logits", None)
        if not isinstance(result, Tensor):
            raise CaptureError(
                f"{type(self.module).__name__} does not return logits (a tensor, or an output with `.logits`)",
                fix="pass a causal language model: input_ids [batch, length] -> logits [batch, length, vocabulary]",
            )
        return result


def _tidy(exported: torch.export.ExportedProgram, module: nn.Module) -> tuple[fx.Graph, dict[str, Weight]]:
    graph = fx.Graph()
    weights: dict[str, Weight] = {}
    env: dict[fx.Node, Any] = {}
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    parameters = {id(p) for p in module.parameters()}
    names_by_id: dict[int, str] = {}
    for name, tensor in tensors.items():
        names_by_id.setdefault(id(tensor), name)
    attributes: dict[str, fx.Node] = {}

    specs = {s.arg.name: s for s in exported.graph_signature.input_specs}
    for spec in exported.graph_signature.output_specs:
        if spec.kind != OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"the model changes its own state in forward ({spec.kind.name.lower()}: {spec.target})",
                where=str(spec.target),
                fix="kvpass captures models whose forward is a function of input_ids alone",
            )
    stored = set(module.state_dict().keys())
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            env[node] = graph.placeholder("input_ids")
            for axis, what in ((0, "batch"), (1, "length")):
                if isinstance(node.meta["val"].shape[axis], int):
                    raise CaptureError(
                        f"the model's code fixes the {what} to the example's ({node.meta['val'].shape[axis]})",
                        fix=f"look for Python code that uses the {what} as a constant number",
                    )
            continue
        assert spec.target is not None
        name = spec.target.removeprefix("module.")
        if name in tensors:
            name = names_by_id[id(tensors[name])]
            held, constant = tensors[name], id(tensors[name]) not in parameters
        else:
            held, constant = exported.constants[spec.target], True
        if name not in attributes:
            attributes[name] = graph.get_attr(name)
            weights[name] = Weight.of(held, constant=constant, persistent=constant and name in stored)
        env[node] = attributes[name]

    result = _copy(exported.graph_module, exported.graph, graph, env, weights)
    if not isinstance(result, list | tuple) or len(result) != 1:
        raise CaptureError("the model returns more than its logits", fix="return one tensor of logits")
    graph.output(result[0])
    sweep(graph)
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return graph, {name: w for name, w in weights.items() if name in used}


def _copy(
    owner: nn.Module, source: fx.Graph, graph: fx.Graph, env: dict[fx.Node, Any], weights: dict[str, Weight]
) -> Any:
    """Copy the calls of `source` into `graph`, inlining scopes and dropping what does nothing; returns its output."""

    def mapped(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda n: env[n])

    for node in source.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return mapped(node.args[0])
        if node.op == "get_attr":
            value = _attribute(owner, str(node.target))
            if isinstance(value, fx.GraphModule):
                env[node] = value  # the body of a scope, inlined where it is called
            else:
                name = f"constant.{node.target}"
                weights[name] = Weight.of(value, constant=True)
                env[node] = graph.get_attr(name)
            continue
        target_name = getattr(node.target, "__name__", str(node.target))
        if any(target_name.startswith(d) or f".{d}" in str(node.target) for d in _DROPPED) and not node.users:
            continue
        if target_name in _SCOPES or any(s in str(node.target) for s in _SCOPES):
            bodies = [a for a in node.args if isinstance(a, fx.Node) and isinstance(env.get(a), fx.GraphModule)]
            body: fx.GraphModule = env[bodies[0]]
            operands = node.args[list(node.args).index(bodies[0]) + 1 :]
            inner: dict[fx.Node, Any] = {}
            places = [n for n in body.graph.nodes if n.op == "placeholder"]
            for place, operand in zip(places, operands, strict=True):
                inner[place] = mapped(operand)
            env[node] = _copy(body, body.graph, graph, inner, weights)
            continue
        if node.op != "call_function":
            raise AssertionError(f"unexpected {node.op} in an exported graph")
        if target_name == "getitem" and not isinstance(env[node.args[0]], fx.Node):
            env[node] = env[node.args[0]][node.args[1]]
            continue
        same = _does_nothing(node)
        if same is not None:
            env[node] = env[same]
            continue
        # a view needs the strides of the traced attention; a reshape takes what it gets
        views = (aten.view.default, aten._unsafe_view.default)
        target = aten.reshape.default if node.target in views else node.target
        env[node] = graph.call_function(target, mapped(node.args), mapped(dict(node.kwargs)))
        trace_text = node.meta.get("stack_trace")
        if trace_text:
            env[node].meta["source"] = _last_frame(trace_text)
        modules = node.meta.get("nn_module_stack")
        if modules:
            env[node].meta["module"] = str(list(modules.values())[-1][0]).removeprefix("module.")
    raise AssertionError("the graph has no output")


def _does_nothing(node: fx.Node) -> fx.Node | None:
    """The input that a call returns unchanged, if that is all it does in inference."""
    target, args = node.target, node.args
    first = args[0] if args and isinstance(args[0], fx.Node) else None
    if first is None:
        return None
    if target is aten.dropout.default and not args[2]:
        return first
    if target in (
        aten.lift_fresh_copy.default,
        aten.lift_fresh.default,
        aten.alias.default,
        aten.detach.default,
        aten.detach_.default,
    ):
        return first
    if target is aten.slice.Tensor:
        start, stop, step = (list(args[2:5]) + [None, None, 1])[:3] if len(args) > 2 else (None, None, 1)
        step = args[4] if len(args) > 4 else 1
        if start in (None, 0) and (stop is None or (isinstance(stop, int) and stop >= 2**62)) and step == 1:
            return first
    if target in (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.type_as.default):
        before, after = first.meta.get("val"), node.meta.get("val")
        if (
            isinstance(before, Tensor)
            and isinstance(after, Tensor)
            and before.dtype == after.dtype
            and before.device == after.device
        ):
            return first
    return None


def _attribute(owner: nn.Module, path: str) -> Any:
    value: Any = owner
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _last_frame(text: str) -> str:
    """`file:line function: code` of the innermost frame of a stack trace."""
    lines = [line.strip() for line in text.strip().splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith("File ")]
    for index in frames[-1:]:
        file, line, function = (lines[index].split(", ") + ["", ""])[:3]
        name = file.removeprefix('File "').rstrip('"').rsplit("/", 1)[-1]
        code = lines[index + 1] if index + 1 < len(lines) else ""
        return f"{name}:{line.removeprefix('line ')} {function.removeprefix('in ')}: {code}"
    return ""


def layer_of(path: str) -> int | None:
    """The number of the layer in a module's path: `model.layers.3.mixer` -> 3."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _module_of(error: BaseException, module: nn.Module) -> str:
    """The path of the innermost part of `module` in whose code an error arose."""
    names = {id(part): name for name, part in module.named_modules()}
    found, frame = "", error.__traceback__
    while frame is not None:
        found = names.get(id(frame.tb_frame.f_locals.get("self")), "") or found
        frame = frame.tb_next
    return found


def _source_line(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
