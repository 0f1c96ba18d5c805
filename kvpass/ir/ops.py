"""The dialect: `kvpass::attention` and its cached forms, each with an eager reference in plain torch.

Everything that attention means stands in the arguments of one op, so torch, Triton and ONNX are three lowerings of it.
The references never repeat KV heads: the query heads of a group are packed into the rows of one matrix product.

Shapes: B batch, S query length, T key length, H query heads, Hkv KV heads, D head_dim, C cache capacity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from kvpass.ir.kv_format import KVFormat, fake_channels, fake_tokens
from kvpass.ir.kv_layout import Layout, Part

NEG_INF = float("-inf")
_ROWS = 256  # query rows per block where the score matrix has to be formed; bounds memory at H * 256 * T
_FEW = 8  # rows up to which a CPU's product with a weight is bound by reading the weight
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def visible(
    query_pos: Tensor,  # [..., S, 1] absolute positions
    key_pos: Tensor,  # [T]
    *,
    causal: bool,
    strict: bool,
    window: int,
    sinks: int,
) -> Tensor | None:
    """Boolean mask of what each query may read, or None when it may read everything.

    `window` counts the query's own token (window 1 reads only itself); 0 means no window. `sinks` first keys stay
    visible behind the window. `strict` hides the query's own token too.
    """
    mask: Tensor | None = None
    if strict:
        mask = key_pos < query_pos
    elif causal:
        mask = key_pos <= query_pos
    if window > 0:
        inside = key_pos > query_pos - window
        if sinks > 0:
            inside = inside | (key_pos < sinks)
        mask = inside if mask is None else mask & inside
    return mask


@dataclass(frozen=True)
class Sinking:
    """Queries [B, H, S, D] of their own for the first `columns` keys, where `where` [B or 1, 1, 1, columns] says so."""

    q: Tensor
    columns: int
    where: Tensor | None = None


def _masked_attention(
    q: Tensor,  # [B, H, S, D]
    k: Tensor,  # [B, Hkv, T, D]
    v: Tensor,  # [B, Hkv, T, Dv]
    seen: Tensor | None,  # bool, broadcastable to [B, H, S, T]
    bias: Tensor | None,  # float, broadcastable to [B, H, S, T]
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,  # [H]
    may_be_empty: bool,
    sinking: Sinking | None = None,
) -> Tensor:
    """Explicit softmax attention on packed query heads; a row with nothing to read gives zeros."""
    batch, heads, length, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    packed = q.reshape(batch, kv_heads, group * length, q.shape[3])
    free = seen is None and bias is None and sink_logits is None and softcap == 0 and not may_be_empty
    if free and sinking is None and q.dtype == torch.float32:
        return _read_all(packed, k, v, scale).view(batch, heads, length, v.shape[3])
    scores = torch.matmul(packed, k.transpose(-1, -2)).view(batch, kv_heads, group, length, keys)
    if sinking is not None and sinking.columns:
        other = sinking.q.reshape(batch, kv_heads, group * length, q.shape[3])
        few = torch.matmul(other, k[:, :, : sinking.columns].transpose(-1, -2)).unflatten(2, (group, length))
        if sinking.where is not None:
            few = torch.where(sinking.where.unsqueeze(2), few, scores[..., : sinking.columns])
        scores = torch.cat([few, scores[..., sinking.columns :]], dim=-1)
    scores = scores * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores if scores.dtype == torch.float64 else scores.float()

    def by_group(table: Tensor) -> Tensor:
        if table.dim() == 4 and table.shape[1] != 1:
            return table.reshape(table.shape[0], kv_heads, group, table.shape[2], table.shape[3])
        return table.unsqueeze(1) if table.dim() == 4 else table

    if bias is not None:
        scores = scores + by_group(bias.to(scores.dtype))
    if seen is not None:
        scores = scores.masked_fill(~by_group(seen), NEG_INF)
    if sink_logits is not None:
        sink = sink_logits.to(scores.dtype).view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, length, 1)
        probabilities = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        if may_be_empty:  # filled before the softmax too: a NaN that is overwritten still has a NaN for a gradient
            empty = torch.isneginf(scores).all(dim=-1, keepdim=True)
            probabilities = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
        else:
            probabilities = torch.softmax(scores, dim=-1)
    probabilities = probabilities.to(v.dtype).view(batch, kv_heads, group * length, keys)
    return torch.matmul(probabilities, v).view(batch, heads, length, v.shape[3])


def _read_all(packed: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention of a few packed query rows [B, Hkv, R, D] that read every key.

    Keys stand on the left of the product, so that the matrix that is read from memory is read as it lies there.
    """
    scores = torch.matmul(k, (packed * scale).transpose(-1, -2)).transpose(-1, -2)  # [B, Hkv, R, T]
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by oneDNN where that computes float32 on a CPU.

    torch's own choice there reads a matrix for a single row with one thread, however many there are, and is slower for
    many rows too on CPUs that its BLAS was not written for.
    """
    wide = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    if not wide or _ONEDNN is None or torch.is_grad_enabled():
        return torch.nn.functional.linear(x, weight, bias)
    result: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
    return result


def _reads_all(first: Tensor | int, keys: int, causal: bool, strict: bool, window: int) -> bool:
    """Whether the one query at position `first` reads every key: the step of decoding that must be quick."""
    newest = not isinstance(first, Tensor) and first == keys - 1
    return newest and causal and not strict and not 0 < window < keys


def _attend_positions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | int,  # absolute position of the first query: [B] or one number
    *,
    scale: float,
    causal: bool,
    strict: bool,
    window: int,
    sinks: int,
    softcap: float,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    mask: Tensor | None,
    sink_q: Tensor | None = None,
) -> Tensor:
    """Attention of S queries at positions first .. first+S-1 over keys at positions 0 .. T-1."""
    length, keys = q.shape[2], k.shape[2]
    if length == 0:
        return q.new_zeros((*q.shape[:3], v.shape[3]))
    unbiased = mask is None and alibi_slopes is None and sink_q is None
    if length == 1 and unbiased and _reads_all(first, keys, causal, strict, window):
        return _masked_attention(q, k, v, None, None, scale, softcap, sink_logits, False)
    uniform = not isinstance(first, Tensor)
    plain = softcap == 0 and sink_logits is None and unbiased
    if plain and uniform and length > 1 and causal and not strict and window == 0:
        gqa = bool(q.shape[1] != k.shape[1])
        dot = torch.nn.functional.scaled_dot_product_attention
        if first == 0 and keys == length:
            return dot(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    before_all_keys = not isinstance(first, Tensor) and first < 0  # more queries than keys
    may_be_empty = strict or mask is not None or before_all_keys
    blocks = []
    for start in range(0, length, _ROWS):
        stop = min(start + _ROWS, length)
        rows = torch.arange(start, stop, device=q.device)
        low, high = 0, keys  # keys that any query of the block may read
        if isinstance(first, Tensor):
            query_pos = (first.view(-1, 1) + rows).view(-1, 1, stop - start, 1)
        else:
            query_pos = (rows + first).view(1, 1, -1, 1)
            high = max(0, min(keys, first + stop)) if causal or strict else keys
            if window > 0 and (sinks == 0 or mask is None):
                low = min(high, max(0, first + start - window + 1))
        lead = min(sinks, low)  # sinks that lie before the others
        one_new_token = uniform and stop - start == 1 and high == first + stop
        queries, block_k, block_v = q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high]
        key_pos = torch.arange(low, high, device=q.device)
        if lead:
            block_k, block_v = (torch.cat([t[:, :, :lead], t[:, :, low:high]], dim=2) for t in (k, v))
            key_pos = torch.cat([torch.arange(lead, device=q.device), key_pos])
        seen = visible(
            query_pos,
            key_pos,
            causal=causal and not one_new_token,
            strict=strict,
            window=window if window < high - low else 0,
            sinks=sinks,
        )
        if plain and not may_be_empty and seen is not None and q.device.type == "cpu" and stop - start > _FEW:
            dot, gqa = torch.nn.functional.scaled_dot_product_attention, bool(q.shape[1] != k.shape[1])
            blocks.append(dot(queries, block_k, block_v, attn_mask=seen, scale=scale, enable_gqa=gqa))
            continue
        bias = None
        if mask is not None:
            part = mask[..., start:stop, :] if mask.shape[-2] != 1 else mask
            part = part[..., low:high] if part.shape[-1] != 1 else part
            if part.dtype == torch.bool:
                seen = part if seen is None else seen & part
            else:
                bias = part
        if alibi_slopes is not None:
            distance = (key_pos - query_pos).float()
            slope_bias = alibi_slopes.float().view(1, -1, 1, 1) * distance
            bias = slope_bias if bias is None else bias + slope_bias
        sinking = None
        if sink_q is not None:
            sinking = Sinking(sink_q[:, :, start:stop], min(sinks, len(key_pos)))
        blocks.append(
            _masked_attention(queries, block_k, block_v, seen, bias, scale, softcap, sink_logits, may_be_empty, sinking)
        )
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _attend_parts(
    q: Tensor,  # [B, H, S, D]
    parts: list[Part],
    first: Tensor | int,  # absolute position of the first query: [B] or one number
    *,
    scale: float,
    causal: bool,
    strict: bool,
    window: int,
    sinks: int,
    softcap: float,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    mask: Tensor | None,
    sink_q: Tensor | None,
    kv_format: KVFormat,
    covered: bool,
) -> Tensor:
    """Attention over entries that stand anywhere; `covered` says that the layer reads all that its store keeps."""
    length = q.shape[2]
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    if len(parts) == 1 and parts[0].reads == "all":
        (part,) = parts
        if part.positions is None and part.base == 0 and not part.sure:
            return _attend_positions(
                q, part.k, part.v, first, causal=causal, strict=strict, window=window, sinks=sinks,
                alibi_slopes=alibi_slopes, mask=mask, sink_q=sink_q, **options,
            )  # fmt: skip
        if part.sure and covered and length == 1 and causal and not strict and alibi_slopes is None and mask is None:
            sinking = None if sink_q is None else Sinking(sink_q, min(sinks, part.k.shape[2]))
            return _masked_attention(q, part.k, part.v, None, None, may_be_empty=False, sinking=sinking, **options)
    if isinstance(first, Tensor):
        query_pos = (first.view(-1, 1) + torch.arange(length, device=q.device)).view(-1, 1, length, 1)
    else:
        query_pos = (first + torch.arange(length, device=q.device)).view(1, 1, -1, 1)
    plain = softcap == 0 and all(t is None for t in (sink_logits, alibi_slopes, mask, sink_q)) and causal and not strict
    all_parts, blocks = parts, []
    for start in range(0, length, _ROWS):
        stop = min(start + _ROWS, length)
        if not isinstance(first, Tensor) and causal:
            parts = [_reach(p, first + start, first + stop, kv_format) for p in all_parts]
        keys, values = (_joined([getattr(p, name) for p in parts], 2) for name in ("k", "v"))
        key_pos = _joined([_positions(p) for p in parts], 1).unsqueeze(1).unsqueeze(1)  # [B or 1, 1, 1, T]
        here = query_pos[:, :, start:stop]
        seen = visible(here, key_pos, causal=causal, strict=strict, window=window, sinks=sinks)
        seen = key_pos >= 0 if seen is None else seen & (key_pos >= 0)
        if any(p.reads != "all" for p in parts):
            seen = seen & _by_age(parts, here, key_pos, kv_format)
        if plain and q.device.type == "cpu" and stop - start > _FEW:
            dot, gqa = torch.nn.functional.scaled_dot_product_attention, bool(q.shape[1] != keys.shape[1])
            blocks.append(dot(q[:, :, start:stop], keys, values, attn_mask=seen, scale=scale, enable_gqa=gqa))
            continue
        bias = None
        if mask is not None:
            part_mask = mask[..., start:stop, :] if mask.shape[-2] != 1 else mask
            part_mask = _columns(part_mask, key_pos)
            if part_mask.dtype == torch.bool:
                seen = seen & part_mask
            else:
                bias = part_mask
        if alibi_slopes is not None:
            slope_bias = alibi_slopes.float().view(1, -1, 1, 1) * (key_pos - here).float()
            bias = slope_bias if bias is None else bias + slope_bias
        sinking = None
        if sink_q is not None:
            sinking = Sinking(sink_q[:, :, start:stop], keys.shape[2], (key_pos >= 0) & (key_pos < sinks))
        blocks.append(
            _masked_attention(
                q[:, :, start:stop], keys, values, seen, bias, may_be_empty=True, sinking=sinking, **options
            )
        )
    return _joined(blocks, 2)


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    if any(t.shape[0] != tensors[0].shape[0] for t in tensors):  # sizes may be symbols, which have no hash
        batch = max(t.shape[0] for t in tensors)
        tensors = [t.expand(batch, *t.shape[1:]) for t in tensors]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)


def _positions(part: Part) -> Tensor:
    """[B or 1, T]: where a part's entries stand."""
    if part.positions is None:
        return (part.base + torch.arange(part.k.shape[2], device=part.k.device)).unsqueeze(0)
    return part.positions if part.positions.dim() == 2 else part.positions.unsqueeze(0)


def _reach(part: Part, low: int, high: int, fmt: KVFormat) -> Part:
    """The entries of a part that queries at positions low .. high-1 may read, where it lies in the text's order."""
    if part.positions is not None or part.sure:
        return part
    start, stop = 0, high - part.base
    if part.reads == "closed":
        stop = min(stop, fmt.closed(high) - part.base)
    elif part.reads == "open":
        start = max(0, fmt.closed(low + 1) - part.base)
    stop = max(0, min(stop, part.k.shape[2]))
    start = min(start, stop)
    return replace(part, k=part.k[:, :, start:stop], v=part.v[:, :, start:stop], base=part.base + start)


def _by_age(parts: list[Part], query_pos: Tensor, key_pos: Tensor, fmt: KVFormat) -> Tensor:
    """Which query reads which version of an entry: quantized below the query's last complete group, exact above."""
    boundary = (query_pos + 1 - fmt.residual).clamp(min=0) // fmt.group * fmt.group
    closed = torch.cat([torch.full((p.k.shape[2],), p.reads == "closed", device=key_pos.device) for p in parts])
    return torch.where(closed, key_pos < boundary, key_pos >= boundary)


def _columns(mask: Tensor, key_pos: Tensor) -> Tensor:
    """Columns of a mask [.., S, T'] over positions, at the positions [B or 1, 1, 1, T] of the entries."""
    if mask.shape[-1] == 1:
        return mask
    batch = max(mask.shape[0], key_pos.shape[0])
    index = key_pos.clamp(0, mask.shape[-1] - 1).expand(batch, mask.shape[1], mask.shape[2], -1)
    return mask.expand(batch, -1, -1, -1).gather(-1, index)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    sink_q: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
    kv_format: str = "",
) -> Tensor:
    """Attention of q [B,H,S,D] over k [B,Hkv,T,D], v [B,Hkv,T,Dv] -> [B,H,S,Dv], differentiable.

    Query i of S stands at key position T-S+i. Scores are `softcap * tanh(scale * q.k / softcap)` (no cap when 0), plus
    `alibi_slopes[h] * (key - query)`, plus `mask` where it is floating point. `sink_logits` [H] join the softmax's
    denominator. A row with nothing to read gives the zero vector. `sink_q`, shaped as q, scores the first `sinks` keys
    in q's place (StreamingLLM's cache positions). Keys and values are read as `kv_format` would store them, with a
    straight-through gradient.
    """
    fmt = KVFormat.parse(kv_format)
    if fmt.layout == "kivi":
        parts = [Part(fake_channels(k, fmt), fake_tokens(v, fmt), reads="closed"), Part(k, v, reads="open")]
    elif fmt.full:
        parts = [Part(k, v)]
    else:
        parts = [Part(fake_tokens(k, fmt), fake_tokens(v, fmt))]
    return _attend_parts(
        q,
        parts,
        k.shape[2] - q.shape[2],
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
    return _attend_parts(
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
    return _attend_parts(
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


def _op(name: str, reference: Callable[..., Tensor], changes: tuple[str, ...] = ()) -> CustomOpDef:
    """The op `kvpass::name`, which has the signature of its reference and means the same."""

    @functools.wraps(reference)
    def call(*arguments: Any, **options: Any) -> Tensor:
        return reference(*arguments, **options).contiguous()

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


REFERENCES: dict[Any, Any] = {
    torch.ops.kvpass.attention.default: attention_reference,
    torch.ops.kvpass.attend.default: attend_reference,
    torch.ops.kvpass.attend_shared.default: attend_shared_reference,
    torch.ops.kvpass.feedback.default: feedback_reference,
}
"""What the torch lowering calls in place of each op: the same meaning without the dispatcher's cost per call."""
