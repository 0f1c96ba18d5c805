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


def _op(name: str, reference: Callable[..., Tensor | None], changes: tuple[str, ...] = ()) -> CustomOpDef:
    """The op `kvpass::name`, which has the signature of its reference and means the same."""

    @functools.wraps(reference)
    def call(*arguments: Any, **options: Any) -> Tensor | None:
        found = reference(*arguments, **options)
        if found is None:
            return None
        return found.clone() if any(found is a for a in arguments) else found.contiguous()

    return torch.library.custom_op(f"kvpass::{name}", call, mutates_args=changes)


feedback = _op("feedback", feedback_reference)


@feedback.register_fake
def _feedback_fake(input_ids: Tensor, **options: Any) -> Tensor:
    shape = (input_ids.shape[0], options["kv_heads"], input_ids.shape[1], options["dim"])
    return input_ids.new_empty(shape, dtype=options["dtype"])


attention = _op("attention", attention_reference)


@attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.needed = [t is not None and t.is_floating_point() and t.requires_grad for t in inputs]
    ctx.options = keyword_only_inputs


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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


attention.register_autograd(_attention_backward, setup_context=_save_for_backward)


attend = _op("attend", attend_reference, changes=("cache",))


@attend.register_fake
def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


attend_shared = _op("attend_shared", attend_shared_reference)


@attend_shared.register_fake
def _attend_shared_fake(q: Tensor, *rest: Any, **options: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], options["value_dim"]))


prune = _op("prune", prune_reference)


@prune.register_fake
def _prune_fake(x: Tensor, **options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


prune.register_autograd(lambda ctx, grad: grad)

column_mass = _op("column_mass", column_mass_reference)


@column_mass.register_fake
def _column_mass_fake(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
    rule = Retention.parse(options["rule"])
    dtype = torch.float64 if q.dtype == torch.float64 and rule.by in ("mass", "persistence") else torch.float32
    return q.new_empty((q.shape[0], k.shape[1] if rule.apart else 1, k.shape[2]), dtype=dtype)


survivors = _op("survivors", survivors_reference)


@survivors.register_fake
def _survivors_fake(ranks: Tensor, *rest: Any, **options: Any) -> Tensor:
    return ranks.new_empty((*ranks.shape[:2], options["width"]), dtype=torch.long)


keep = _op("keep", keep_reference, changes=("cache",))
observe = _op("observe", observe_reference, changes=("cache",))


@keep.register_fake
def _keep_fake(*arguments: Any, **options: Any) -> None:
    return None


@observe.register_fake
def _observe_fake(*arguments: Any, **options: Any) -> None:
    return None


attend_kept = _op("attend_kept", attend_kept_reference, changes=("cache",))


@attend_kept.register_fake
def _attend_kept_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


REFERENCES: dict[Any, Any] = {
    torch.ops.kvpass.prune.default: prune_reference,
    torch.ops.kvpass.column_mass.default: column_mass_reference,
    torch.ops.kvpass.survivors.default: survivors_reference,
    torch.ops.kvpass.keep.default: keep_reference,
    torch.ops.kvpass.observe.default: observe_reference,
    torch.ops.kvpass.attend_kept.default: attend_kept_reference,
    torch.ops.kvpass.attention.default: attention_reference,
    torch.ops.kvpass.attend.default: attend_reference,
    torch.ops.kvpass.attend_shared.default: attend_shared_reference,
    torch.ops.kvpass.feedback.default: feedback_reference,
}
"""What the torch lowering calls in place of each op: the same meaning without the dispatcher's cost per call."""
