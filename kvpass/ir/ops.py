"""The dialect: `kvpass::attention` and its cached forms, each with an eager reference in plain torch.

Everything that attention means stands in the arguments of one op, so torch, Triton and ONNX are three lowerings of it.
The references never repeat KV heads: the query heads of a group are packed into the rows of one matrix product.

Shapes: B batch, S query length, T key length, H query heads, Hkv KV heads, D head_dim, C cache capacity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from kvpass.ir.attention import attend_parts
from kvpass.ir.kv_format import KVFormat, fake_channels, fake_tokens
from kvpass.ir.kv_layout import Layout, Part
from kvpass.ir.retention import Retention
from kvpass.ir.selection import (
    attend_kept_reference,
    column_mass_reference,
    keep_reference,
    observe_reference,
    survivors_reference,
)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    sink_q: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
    kv_format: str = "",
    keeps: str = "",
) -> Tensor:
    """Attention of q [B,H,S,D] over k [B,Hkv,T,D], v [B,Hkv,T,Dv] -> [B,H,S,Dv], differentiable.

    Query i of S stands at key position T-S+i. Scores are `softcap * tanh(scale * q.k / softcap)` (no cap when 0), plus
    `alibi_slopes[h] * (key - query)`, plus `mask` where it is floating point. `sink_logits` [H] join the softmax's
    denominator. A row with nothing to read gives the zero vector. `sink_q`, shaped as q, scores the first `sinks` keys
    in q's place (StreamingLLM's cache positions). Keys and values are read as `kv_format` would store them, with a
    straight-through gradient. Where tokens were pruned, `q_positions` [B, S] and `k_positions` [B, T] say where those
    that are left stand. `keeps` (a `Retention`) is for what stores keys and values; it changes nothing here.
    """
    fmt = KVFormat.parse(kv_format)
    if fmt.layout == "kivi":
        parts = [Part(fake_channels(k, fmt), fake_tokens(v, fmt), reads="closed"), Part(k, v, reads="open")]
    elif fmt.full:
        parts = [Part(k, v, positions=k_positions)]
    else:
        parts = [Part(fake_tokens(k, fmt), fake_tokens(v, fmt), positions=k_positions)]
    return attend_parts(
        q,
        parts,
        k.shape[2] - q.shape[2] if q_positions is None else q_positions,
        scale=scale,
        causal=causal,
        strict=strict,
        window=window,
        sinks=sinks,
        softcap=softcap,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        mask=mask,
        sink_q=sink_q,
        kv_format=fmt,
        covered=False,
    )


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: list[Tensor],
    starts: Tensor,  # [B] int64: tokens that each row holds already
    stops: Tensor | None = None,  # [B] int64: tokens at or beyond it are padding
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    sink_q: Tensor | None = None,
    *,
    end: int,
    ragged: bool,
    layout: str = "",
    first: bool = True,
    last: bool = True,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
) -> Tensor:
    """Write k, v of S new tokens into a store at `starts`, then attend over what it keeps up to them.

    `cache` are the store's tensors, which change in place; `layout` says how they lie (`kv_layout.Layout`). `end` is
    max(starts) + S. `ragged` says that the rows of `starts` differ; without it every row starts at end - S. Entries of
    a row beyond its own length are never read. Layers that share a store are handed the same k and v: `first` and
    `last` say which reader, in order, this is. Returns [B, H, S, Dv].
    """
    store = Layout.parse(layout)
    parts = store.exchange(cache, k, v, starts, stops, end=end, ragged=ragged, first=first, last=last)
    return attend_parts(
        q,
        parts,
        starts if ragged else end - q.shape[2],
        scale=scale,
        causal=causal,
        strict=strict,
        window=window,
        sinks=sinks,
        softcap=softcap,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        mask=mask,
        sink_q=sink_q,
        kv_format=store.format,
        covered=(window, sinks) == (store.window, store.sinks),
    )


def attend_shared_reference(
    q: Tensor,
    cache: list[Tensor],
    starts: Tensor,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    value_dim: int,
    end: int,
    ragged: bool,
    layout: str = "",
    scale: float,
    causal: bool = True,
    strict: bool = True,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
) -> Tensor:
    """Attend over another layer's store, written by a layer above: strictly before each query's own position.

    For one new token that is exact. For several, the store holds the previous pass's keys and values of all but the
    first (Jacobi iteration; Wu and Tu 2024, arXiv 2405.10637). Dense and paged stores only.
    """
    store = Layout.parse(layout)
    parts = store.held(cache, starts, end=end, length=q.shape[2], dtype=q.dtype)
    return attend_parts(
        q,
        parts,
        starts if ragged else end - q.shape[2],
        scale=scale,
        causal=causal,
        strict=strict,
        window=window,
        sinks=sinks,
        softcap=softcap,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        mask=mask,
        sink_q=None,
        kv_format=store.format,
        covered=False,
    )


def feedback_reference(
    input_ids: Tensor,
    *,
    layer: int,
    part: str,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    passes: int = 0,
    tolerance: float = 0.0,
    fallback: bool = True,
) -> Tensor:
    """Keys or values [B, Hkv, S, D] of a layer above, as the pass before computed them: zeros in the first pass.

    What runs a program that holds it repeats the nodes between it and that layer until keys and values stand still
    (`ir.fixpoint`): at most `passes` times where that is not 0, and until nothing changes by more than
    `tolerance`.
    """
    batch, length = input_ids.shape
    return torch.zeros((batch, kv_heads, length, dim), dtype=dtype, device=input_ids.device)


def prune_reference(x: Tensor, *, layer: int, rule: str) -> Tensor:
    """Where tokens leave the residual stream behind `layer`, as `rule` (a `Retention`) says: x [B, S, ...] itself.

    A program without a cache has no prompt to prune. In the entry that reads prompts the cache pass turns this into a
    gather of the survivors, in the others into nothing.
    """
    return x


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """RoPE (Su et al., arXiv 2104.09864) of x [B, H, S, D] by angles whose cosines and sines, [.., S, P], broadcast.

    The first 2 P channels turn in pairs: (j, j + P), or (2 j, 2 j + 1) where `interleaved`. The rest stays.
    """
    pairs = cos.shape[-1]
    turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = turning[..., :pairs], turning[..., pairs:]
    turned = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat([joined, rest], dim=-1) if rest.shape[-1] else joined


def make_op(
    namespace: str,
    name: str,
    function: Callable[..., Tensor | None],
    fake: Callable[..., Tensor | None],
    changes: tuple[str, ...] = (),
) -> CustomOpDef:
    """The op `namespace::name`, which has the signature of a function and means the same; `fake` tells its shapes."""

    op = torch.library.custom_op(f"{namespace}::{name}", function, mutates_args=changes)
    op.register_fake(fake)
    return op


def _fresh(function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """A function whose result is a contiguous tensor of its own, as an op's must be."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Tensor | None:
        found = function(*arguments, **options)
        if found is None:
            return None
        return found.clone() if any(found is a for a in arguments) else found.contiguous()

    return call


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _attend_shared_fake(q: Tensor, *rest: Any, **options: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], options["value_dim"]))


def _feedback_fake(input_ids: Tensor, **options: Any) -> Tensor:
    shape = (input_ids.shape[0], options["kv_heads"], input_ids.shape[1], options["dim"])
    return input_ids.new_empty(shape, dtype=options["dtype"])


def _prune_fake(x: Tensor, **options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rotary_fake(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _column_mass_fake(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
    rule = Retention.parse(options["rule"])
    dtype = torch.float64 if q.dtype == torch.float64 and rule.by in ("mass", "persistence") else torch.float32
    return q.new_empty((q.shape[0], k.shape[1] if rule.apart else 1, k.shape[2]), dtype=dtype)


def _survivors_fake(ranks: Tensor, *rest: Any, **options: Any) -> Tensor:
    return ranks.new_empty((*ranks.shape[:2], options["width"]), dtype=torch.long)


def _nothing_fake(*arguments: Any, **options: Any) -> None:
    return None


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    """Keep what the gradient of attention is computed from again."""
    ctx.save_for_backward(*inputs)
    ctx.needed = [t is not None and t.is_floating_point() and t.requires_grad for t in inputs]
    ctx.options = keyword_only_inputs


def attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of attention: that of its reference."""
    saved = ctx.saved_tensors
    with torch.enable_grad():
        inputs: list[Any] = [
            t.detach().requires_grad_(need) if t is not None else None
            for t, need in zip(saved, ctx.needed, strict=True)
        ]
        out = attention_reference(*inputs, **ctx.options)
    wanted = [t for t, need in zip(inputs, ctx.needed, strict=True) if need]
    grads = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
    return tuple(next(grads) if need else None for need in ctx.needed)


_OPS: dict[str, tuple[Callable[..., Tensor | None], Callable[..., Tensor | None], tuple[str, ...]]] = {
    "attention": (attention_reference, _attention_fake, ()),
    "attend": (attend_reference, _attention_fake, ("cache",)),
    "attend_shared": (attend_shared_reference, _attend_shared_fake, ()),
    "feedback": (feedback_reference, _feedback_fake, ()),
    "rotary": (rotary_reference, _rotary_fake, ()),
    "prune": (prune_reference, _prune_fake, ()),
    "column_mass": (column_mass_reference, _column_mass_fake, ()),
    "survivors": (survivors_reference, _survivors_fake, ()),
    "keep": (keep_reference, _nothing_fake, ("cache",)),
    "observe": (observe_reference, _nothing_fake, ("cache",)),
    "attend_kept": (attend_kept_reference, _attention_fake, ("cache",)),
}
_made = {
    name: make_op("kvpass", name, _fresh(reference), fake, changes) for name, (reference, fake, changes) in _OPS.items()
}
_made["attention"].register_autograd(attention_backward, setup_context=save_for_backward)
_made["prune"].register_autograd(lambda ctx, grad: grad)

REFERENCES: dict[Any, Any] = {getattr(torch.ops.kvpass, name).default: parts[0] for name, parts in _OPS.items()}
"""What the torch lowering calls in place of each op: the same meaning without the dispatcher's cost per call."""

FAKES: dict[Any, Any] = {getattr(torch.ops.kvpass, name).default: parts[1] for name, parts in _OPS.items()}
"""What tells the shapes of each op's result."""
