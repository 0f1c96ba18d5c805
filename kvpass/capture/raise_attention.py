"""Raise whatever a graph does for attention to `kvpass::attention`, proved by running it.

Three spellings arrive: the dialect's op already (with the model's mask as a subgraph), `scaled_dot_product_attention`,
and a softmax between two matrix products. The softmax is located loosely; the score function between the first product
and the softmax is then executed to learn scale, soft-cap, mask, ALiBi slopes and sink logits, and the part between the
softmax and the second product to see that it changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvpass.capture.probe import MASKED, Mask, fit, fit_mask_argument, refuse_learned
from kvpass.errors import CaptureError
from kvpass.ir.execute import ancestors
from kvpass.ir.program import ATTENTION, Program, Role, Weight, aten, insert_call, sweep
from kvpass.ir.sites import AttentionSite, SiteFinder, source_of

SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}


def raise_attention(program: Program, refused: dict[int, CaptureError] | None = None) -> int:
    """Rewrite every attention of the `forward` entry to the canonical op, masks fitted. Returns the number of sites.

    Args:
        refused: where given, gets the error of each layer whose attention is refused, and a plain causal op stands in
            for it. The program then is not the model's: it serves to look at the layers one by one.

    Raises:
        CaptureError: an attention is not causal, not understood, or its mask cannot be proved.
    """
    graph = program.forward
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten.einsum.default:
            _expand_einsum(program, node)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is SDPA:
            with _at(sum(n.target in (ATTENTION, SDPA) for n in graph.nodes if n < node), node):
                _raise_sdpa(program, node)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _SOFTMAX:
            with _at(sum(n.target is ATTENTION for n in graph.nodes if n < node), node):
                _raise_softmax(program, node, refused)
    sweep(graph)
    finder = SiteFinder(program)
    fitted: dict[fx.Node, Mask] = {}
    for site in finder:
        mask = site.optional("mask")
        try:
            with _at(site.layer, mask if mask is not None else site.node):
                _fit_site(program, finder, site, fitted)
        except CaptureError as error:
            if refused is None:
                raise
            refused[site.layer] = error
            _apply(program, site.node, Mask(), keep=None)
        site.node.kwargs = {**site.node.kwargs, "layer": site.layer}
    _drop_repeats(program)
    sweep(graph)
    return len(finder)


@contextlib.contextmanager
def _at(layer: int, node: fx.Node) -> Iterator[None]:
    """Errors that arise inside are those of a layer, at a node."""
    try:
        yield
    except CaptureError as error:
        error.captured = True
        if error.layer is None:
            error.layer, error.node, error.source = layer, node.name, source_of(node)
        raise


def _fit_site(program: Program, finder: SiteFinder, site: AttentionSite, fitted: dict[fx.Node, Mask]) -> None:
    """Fit the mask that a site gets as a tensor, if it gets one; layers that share it share the fit."""
    mask = site.optional("mask")
    if mask is not None:
        if mask not in fitted:
            fitted[mask] = fit_mask_argument(finder, mask, site.layer, program.facts.max_positions)
        _apply(program, site.node, fitted[mask], keep=mask)
        program.evidence.setdefault(site.layer, {})["mask"] = fitted[mask]
    elif not (site.option("causal") or site.option("strict")):
        raise CaptureError(
            f"the attention of layer {site.layer} has no mask: every token reads every other",
            where=f"layer {site.layer}: {site.node.meta.get('source', site.node.name)}",
            fix="kvpass rewrites causal decoders; an encoder has no KV cache to shrink",
        )


def _apply(program: Program, node: fx.Node, mask: Mask, keep: fx.Node | None) -> None:
    """Write a fitted mask into the op's arguments."""
    arguments = [*node.args, None, None, None][:6]
    options = dict(node.kwargs)
    if mask.tabulated:
        options |= {"causal": True}
        arguments[5] = keep
    else:
        options |= {"causal": True, "strict": mask.strict, "window": mask.window, "sinks": mask.sinks}
        arguments[5] = None
        if mask.slopes:
            name = f"alibi_slopes.{node.name}"
            program.weights[name] = Weight.of(torch.tensor(mask.slopes, dtype=torch.float32), constant=True)
            graph = node.graph
            with graph.inserting_before(node):
                arguments[4] = graph.get_attr(name)
    node.args = tuple(arguments)
    node.kwargs = options


def _raise_sdpa(program: Program, node: fx.Node) -> None:
    """`scaled_dot_product_attention` -> the canonical op, its mask still a tensor."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    finder = SiteFinder(program)
    q, k, v = given["query"], given["key"], given["value"]
    for operand in (q, k, v):
        if not isinstance(operand, fx.Node) or finder.shapes[operand].dim() != 4:
            raise CaptureError(
                "scaled_dot_product_attention is called on tensors that are not [batch, heads, length, head_dim]",
                where=node.meta.get("source", node.name),
            )
    scale = given.get("scale")
    if scale is None:
        scale = float(finder.shapes[q].shape[-1]) ** -0.5
    graph = node.graph
    with graph.inserting_before(node):
        fresh = graph.call_function(
            ATTENTION,
            (q, k, v, None, None, given.get("attn_mask")),
            {"scale": float(scale), "causal": bool(given.get("is_causal", False)), "layer": -1},
        )
    fresh.meta.update(node.meta)
    node.replace_all_uses_with(fresh)
    graph.erase_node(node)


def _expand_einsum(program: Program, node: fx.Node) -> None:
    """An einsum of two 4-D operands over one shared axis, as a plain matrix product."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list | tuple) or len(operands) != 2:
        return
    left, _, result = equation.replace(" ", "").partition("->")
    a, _, b = left.partition(",")
    if len(a) != 4 or len(b) != 4 or len(result) != 4 or "." in equation:
        return
    batch = [c for c in a if c in b and c in result]
    summed = [c for c in a if c in b and c not in result]
    rows = [c for c in a if c not in b]
    columns = [c for c in b if c not in a]
    if len(batch) != 2 or (len(summed), len(rows), len(columns)) != (1, 1, 1):
        return
    graph = node.graph
    left_order = [a.index(c) for c in (*batch, *rows, *summed)]
    right_order = [b.index(c) for c in (*batch, *summed, *columns)]
    out_order = [[*batch, *rows, *columns].index(c) for c in result]
    x, y = operands
    assert isinstance(x, fx.Node)
    assert isinstance(y, fx.Node)
    if left_order != [0, 1, 2, 3]:
        x = insert_call(graph, node, aten.permute.default, x, left_order)
    if right_order != [0, 1, 2, 3]:
        y = insert_call(graph, node, aten.permute.default, y, right_order)
    product = insert_call(graph, node, aten.matmul.default, x, y)
    product.meta.update(node.meta)
    if out_order != [0, 1, 2, 3]:
        product = insert_call(graph, node, aten.permute.default, product, out_order)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _raise_softmax(program: Program, softmax: fx.Node, refused: dict[int, CaptureError] | None) -> None:
    """A softmax between two products -> the canonical op; anything else with a softmax (a router) stays."""
    finder = SiteFinder(program)
    roles, shapes = finder.roles, finder.shapes
    if roles[softmax] != Role.DATA or shapes[softmax].dim() not in (3, 4):
        return
    score = _product_behind(finder, softmax)
    out = _product_after(finder, softmax)
    if score is None or out is None:
        return
    where = softmax.meta.get("source", softmax.name)
    operands = [a for a in score.args if isinstance(a, fx.Node)]
    base = operands[0] if score.target is aten.baddbmm.default else None
    a, b = operands[-2], operands[-1]
    batch, length = 2, 3
    four = shapes[a].dim() == 4
    if shapes[a].dim() not in (3, 4) or shapes[a].shape[-2] != length or shapes[b].shape[-1] != length:
        raise CaptureError(
            f"an attention product has operands of shape {tuple(shapes[a].shape)} and {tuple(shapes[b].shape)}; "
            "kvpass understands [batch, heads, length, head_dim] and [batch*heads, length, head_dim]",
            where=where,
        )
    heads = int(shapes[a].shape[1]) if four else int(shapes[a].shape[0]) // batch
    dim = int(shapes[a].shape[-1])
    probabilities, values = out.args[0], out.args[1]
    assert isinstance(probabilities, fx.Node)
    assert isinstance(values, fx.Node)
    scored = softmax.args[0]
    assert isinstance(scored, fx.Node)
    layer = sum(n.target is ATTENTION for n in program.forward.nodes if n < softmax)

    def scores(q: Tensor, k: Tensor, replaced: dict[fx.Node, Tensor]) -> Tensor:
        """The softmax's input [B, H, S, T] for q [B, H, S, D] and k [B, H, S, D]."""
        size = q.shape[2]
        left, right = q, k.transpose(-1, -2)
        if not four:
            left, right = left.flatten(0, 1), right.flatten(0, 1)
        dtype = shapes[a].dtype
        given = {a: left.to(dtype), b: right.to(dtype), **replaced}
        value: Tensor = finder.run([scored], given, batch, size)[0]
        return value.double().view(batch, heads, size, -1)

    generator = torch.Generator().manual_seed(3)

    def draw(size: int) -> Tensor:
        return torch.randn((batch, heads, size, dim), generator=generator, dtype=torch.float64)

    def proved() -> _Scored:
        sources = _bias_sources(finder, scored, score, base)
        q, k = draw(7), draw(7)
        zero = torch.zeros((batch, heads, 7, dim), dtype=torch.float64)
        resting = scores(zero, zero, {})
        extra = resting.shape[-1] - 7
        sink: fx.Node | None = None
        if extra == 1:
            sink = _sink_logits(finder, scored, heads, where)
        elif extra != 0:
            raise CaptureError(f"the softmax covers {extra} more columns than there are keys", where=where)
        else:
            refuse_learned(program, finder, sources, layer)

        def bias_at(size: int, replaced: dict[fx.Node, Tensor]) -> Tensor:
            blank = torch.zeros((batch, heads, size, dim), dtype=torch.float64)
            return scores(blank, blank, replaced)[..., :size]

        if sink is not None:
            refuse_learned(program, finder, [s for s in sources if not _same_source(s, sink)], layer)
        place = max((s for s in sources if finder.roles[s] == Role.POSITION), default=softmax)
        with _at(layer, place):
            mask = fit(finder, sources, bias_at, layer, program.facts.max_positions)
            table = _mask_node(finder, scored, score, mask, where) if mask.tabulated else None
        scale, softcap = _score_function(scores, q, k, resting[..., :7], where)
        _prove_tail(finder, softmax, probabilities, extra, where)
        return _Scored(mask, table, scale, softcap, sink)

    try:
        with _at(layer, softmax):
            found = proved()
    except CaptureError as error:
        if refused is None:
            raise
        refused[layer] = error
        found = _Scored(Mask(), None, dim**-0.5, 0.0, None)

    graph = program.forward
    if not four:
        a4 = insert_call(graph, out, aten.unflatten.int, a, 0, [-1, heads])
        k3 = insert_call(graph, out, aten.transpose.int, b, -1, -2)
        k4 = insert_call(graph, out, aten.unflatten.int, k3, 0, [-1, heads])
        v4 = insert_call(graph, out, aten.unflatten.int, values, 0, [-1, heads])
    else:
        a4, v4 = a, values
        k4 = insert_call(graph, out, aten.transpose.int, b, -1, -2)
    options = {"scale": found.scale, "causal": True, "softcap": found.softcap, "layer": -1}
    fresh = insert_call(graph, out, ATTENTION, a4, k4, v4, found.sink, None, found.table, **options)
    fresh.meta.update(softmax.meta)
    if not found.mask.tabulated:
        _apply(program, fresh, found.mask, keep=None)
    if refused is None or layer not in refused:
        program.evidence.setdefault(layer, {})["mask"] = found.mask
    result = fresh
    value_dtype, got = shapes[out].dtype, torch.promote_types(shapes[a].dtype, shapes[a].dtype)
    if got != value_dtype:
        result = insert_call(graph, out, aten.to.dtype, fresh, value_dtype)
    if shapes[values].dtype != shapes[a].dtype:
        v_cast = insert_call(graph, fresh, aten.to.dtype, v4, shapes[a].dtype)
        fresh.args = (*fresh.args[:2], v_cast, *fresh.args[3:])
    if not four:
        result = insert_call(graph, out, aten.flatten.using_ints, result, 0, 1)
    out.replace_all_uses_with(result)
    sweep(graph)


@dataclass(frozen=True)
class _Scored:
    """What was proved of the way from the scores to the probabilities."""

    mask: Mask
    table: fx.Node | None  # the tensor of a tabulated mask
    scale: float
    softcap: float
    sink: fx.Node | None


def _product_behind(finder: SiteFinder, softmax: fx.Node) -> fx.Node | None:
    """The score product that a softmax reads, through anything but another product."""
    stack, seen = [softmax.args[0]], set()
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen or finder.roles[node] != Role.DATA:
            continue
        seen.add(node)
        if node.target in _PRODUCTS:
            operands = [a for a in node.args if isinstance(a, fx.Node)]
            if len(operands) >= 2 and all(finder.roles[o] == Role.DATA for o in operands[-2:]):
                return node
            continue
        if finder.projection(node) is not None:
            continue
        stack.extend(node.all_input_nodes)
    return None


def _product_after(finder: SiteFinder, softmax: fx.Node) -> fx.Node | None:
    """The product with the values that reads a softmax."""
    node = softmax
    for _ in range(12):
        users = [u for u in node.users if isinstance(finder.shapes.get(u), Tensor) and u.op != "output"]
        if len(users) != 1:
            return None
        node = users[0]
        if node.target in _PRODUCTS:
            first, second = node.args[0], node.args[1]
            return node if isinstance(second, fx.Node) and isinstance(first, fx.Node) else None
    return None


def _bias_sources(finder: SiteFinder, scored: fx.Node, score: fx.Node, base: fx.Node | None) -> list[fx.Node]:
    """What enters between the score product and the softmax besides the scores."""
    inside: set[fx.Node] = {score}
    found = [] if base is None else [base]
    for node in sorted(ancestors([scored], [score])):
        if any(n in inside for n in node.all_input_nodes):
            inside.add(node)
    for node in inside - {score}:
        found += [n for n in node.all_input_nodes if n not in inside and finder.roles[n] != Role.SHAPE]
    return sorted(set(found))


def _same_source(source: fx.Node, sink: fx.Node) -> bool:
    return bool(
        {n for n in ancestors([source]) if n.op == "get_attr"} & {n for n in ancestors([sink]) if n.op == "get_attr"}
    )


def _score_function(scores, q: Tensor, k: Tensor, resting: Tensor, where: str) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """(scale, softcap) of the score function, from its answers to small, middling and huge products."""
    raw = q @ k.transpose(-1, -2)
    seen = (resting >= MASKED) & (raw.abs() > 0.1)
    answer = {f: (scores(q * f, k, {})[..., :7] - resting)[seen] for f in (1e-2, 1.0, 1e5)}
    products = raw[seen]
    slope = float((answer[1e-2] / (1e-2 * products)).median())
    ceiling = float(answer[1e5].abs().max())
    linear = 1e5 * abs(slope) * float(products.abs().max())
    softcap = 0.0 if ceiling > 0.5 * linear else ceiling
    expected = slope * products
    if softcap:
        slope = _refine(slope, softcap, products, answer[1.0])
        expected = softcap * torch.tanh(slope * products / softcap)
    if not bool(((answer[1.0] - expected).abs() <= 2e-3 * (expected.abs().max() + 1e-6)).all()):
        raise CaptureError(
            "the function between the attention scores and their softmax is neither a scale nor a soft-cap",
            where=where,
            fix="kvpass understands softmax(scale * q.k), softmax(cap * tanh(scale * q.k / cap)), masks and ALiBi",
        )
    return _round(slope), _round(softcap)


def _refine(slope: float, cap: float, products: Tensor, answer: Tensor) -> float:
    inner = torch.atanh((answer / cap).clamp(-0.999999, 0.999999)) * cap / products
    usable = (answer / cap).abs() < 0.9
    return float(inner[usable].median()) if bool(usable.any()) else slope


def _round(value: float) -> float:
    """The double that a measured float32 constant most likely was: an exact root or a short decimal when that close."""
    if value == 0:
        return 0.0
    for candidate in (round(value), 1 / round(1 / value) if round(1 / value) else 0.0):
        if candidate and abs(candidate - value) < 2e-6 * abs(value):
            return float(candidate)
    square = 1 / value**2
    if round(square) and abs(round(square) - square) < 1e-5 * square:
        return float((1.0 if value > 0 else -1.0) * round(square) ** -0.5)
    for digits in range(1, 5):
        if abs(round(value, digits) - value) < 2e-6 * abs(value):
            return round(value, digits)
    return value


def _prove_tail(finder: SiteFinder, softmax: fx.Node, probabilities: fx.Node, extra: int, where: str) -> None:
    """What stands between the softmax and the values must pass the probabilities on as they are."""
    shape = list(finder.shapes[softmax].shape)
    generator = torch.Generator().manual_seed(4)
    value = torch.rand(shape, generator=generator).to(finder.shapes[softmax].dtype)
    result = finder.run([probabilities], {softmax: value}, 2, 3)[0].double()
    expected = (value[..., :3] if extra else value).double().reshape(result.shape)
    if not torch.allclose(result, expected, atol=1e-2 if result.dtype == torch.bfloat16 else 1e-3):
        raise CaptureError("something changes the attention probabilities after the softmax", where=where)


def _sink_logits(finder: SiteFinder, scored: fx.Node, heads: int, where: str) -> fx.Node:
    """The per-head logits [H] of a sink column that is appended to the scores."""
    node = scored
    while node.target is not aten.cat.default:
        inputs = [n for n in node.all_input_nodes if finder.roles[n] == Role.DATA]
        if len(inputs) != 1:
            raise CaptureError("the extra column of the softmax is not understood", where=where)
        node = inputs[0]
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    column = parts[-1]
    while isinstance(column, fx.Node):
        if finder.roles[column] == Role.WEIGHT and finder.shapes[column].numel() == heads:
            shape = finder.shapes[column].shape
            if len(shape) == 1:
                return column
            return _after(column, aten.reshape.default, column, [heads])
        inputs = [n for n in column.all_input_nodes if finder.roles[n] != Role.SHAPE]
        if len(inputs) != 1:
            break
        column = inputs[0]
    raise CaptureError("the extra column of the softmax is not one learned logit per head", where=where)


def _after(node: fx.Node, target: object, *args: object) -> fx.Node:
    graph = node.graph
    with graph.inserting_after(node):
        return graph.call_function(target, args)  # type: ignore[arg-type]


def _mask_node(finder: SiteFinder, scored: fx.Node, score: fx.Node, mask: Mask, where: str) -> fx.Node:
    """The one tensor that carries a tabulated mask into the scores."""
    sources = [
        s
        for s in _bias_sources(finder, scored, score, None)
        if finder.roles[s] == Role.POSITION and finder.shapes[s].dim() >= 2
    ]
    if len(sources) == 1 and finder.shapes[sources[0]].dtype.is_floating_point:
        return sources[0]
    raise CaptureError(
        f"the attention mask is not understood ({mask.tabulated})",
        where=where,
        near=str(mask.near),
        fix="use a mask of {causal, window, sinks, ALiBi}, or add one tensor of numbers to the scores, for masks that "
        "kvpass keeps as a table",
    )


def _drop_repeats(program: Program) -> None:
    """Where K and V are repeated for their query heads, let the op read the heads before the repeat."""
    finder = SiteFinder(program)
    for site in finder:
        operands = [_before_repeat(finder, node) for node in (site.k, site.v)]
        if all(o is not None for o in operands):
            counts = {int(finder.shapes[o].shape[1]) for o in operands if o is not None}
            if len(counts) == 1:
                site.node.args = (site.node.args[0], *operands, *site.node.args[3:])


def _before_repeat(finder: SiteFinder, node: fx.Node) -> fx.Node | None:
    """The node whose heads `node` repeats, each for a run of neighbours; None when it repeats nothing."""
    shape = finder.shapes[node].shape
    best = None
    current = node
    while True:
        inputs = [n for n in current.all_input_nodes if finder.roles[n] == Role.DATA]
        if len(inputs) != 1:
            break
        current = inputs[0]
        inner = finder.shapes[current]
        if not isinstance(inner, Tensor) or inner.numel() > finder.shapes[node].numel():
            break
        same = inner.dim() == 4 and (inner.shape[0], *inner.shape[2:]) == (shape[0], *shape[2:])
        if not same or shape[1] % inner.shape[1] or inner.shape[1] == shape[1]:
            if finder.projection(current) is not None:
                break
            continue
        sample = torch.randn(inner.shape, generator=torch.Generator().manual_seed(5)).to(inner.dtype)
        value = finder.run([node], {current: sample}, 2, 3)[0]
        if value.shape == shape and torch.equal(value, sample.repeat_interleave(shape[1] // inner.shape[1], dim=1)):
            best = current
            break
    return best
