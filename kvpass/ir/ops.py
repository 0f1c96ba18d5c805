"""The dialect: `kvpass::attention` and its cached forms, each with an eager reference in plain torch.

Everything that attention means stands in the arguments of one op, so torch, Triton and ONNX are three lowerings of it.
The references never repeat KV heads: the query heads of a group are packed into the rows of one matrix product.

Shapes: B batch, S query length, T key length, H query heads, Hkv KV heads, D head_dim, C cache capacity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
) -> Tensor:
    """Explicit softmax attention on packed query heads; a row with nothing to read gives zeros."""
    batch, heads, length, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    packed = q.reshape(batch, kv_heads, group * length, q.shape[3])
    free = seen is None and bias is None and sink_logits is None and softcap == 0 and not may_be_empty
    if free and q.dtype == torch.float32:
        return _read_all(packed, k, v, scale).view(batch, heads, length, v.shape[3])
    scores = torch.matmul(packed, k.transpose(-1, -2)).view(batch, kv_heads, group, length, keys)
    scores = scores * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float()

    def by_group(table: Tensor) -> Tensor:
        if table.dim() == 4 and table.shape[1] != 1:
            return table.reshape(table.shape[0], kv_heads, group, table.shape[2], table.shape[3])
        return table.unsqueeze(1) if table.dim() == 4 else table

    if bias is not None:
        scores = scores + by_group(bias.float())
    if seen is not None:
        scores = scores.masked_fill(~by_group(seen), NEG_INF)
    if sink_logits is not None:
        sink = sink_logits.float().view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, length, 1)
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
) -> Tensor:
    """Attention of S queries at positions first .. first+S-1 over keys at positions 0 .. T-1."""
    length, keys = q.shape[2], k.shape[2]
    if length == 0:
        return q.new_zeros((*q.shape[:3], v.shape[3]))
    unbiased = mask is None and alibi_slopes is None
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
            low = max(0, first + start - window + 1) if window > 0 and sinks == 0 else 0
        one_new_token = uniform and stop - start == 1 and high == first + stop
        queries, block_k, block_v = q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high]
        key_pos = torch.arange(low, high, device=q.device)
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
        blocks.append(
            _masked_attention(queries, block_k, block_v, seen, bias, scale, softcap, sink_logits, may_be_empty)
        )
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
) -> Tensor:
    """Attention of q [B,H,S,D] over k [B,Hkv,T,D], v [B,Hkv,T,Dv] -> [B,H,S,Dv], differentiable.

    Query i of S stands at key position T-S+i. Scores are `softcap * tanh(scale * q.k / softcap)` (no cap when 0), plus
    `alibi_slopes[h] * (key - query)`, plus `mask` where it is floating point. `sink_logits` [H] join the softmax's
    denominator. A row with nothing to read gives the zero vector.
    """
    return _attend_positions(
        q,
        k,
        v,
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
    )


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,  # [B, Hkv, C, D]
    cache_v: Tensor,  # [B, Hkv, C, Dv]
    starts: Tensor,  # [B] int64: tokens that each row holds already
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    end: int,
    ragged: bool,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
) -> Tensor:
    """Write k, v of S new tokens into the layer's cache at `starts`, then attend over everything up to them.

    `end` is max(starts) + S. `ragged` says that the rows of `starts` differ; without it every row starts at end - S.
    Entries of a row beyond its own length are never read. Returns [B, H, S, Dv]; the caches change in place.
    """
    batch, _, length, _ = q.shape
    if not ragged:
        first = end - length
        cache_k[:, :, first:end] = k
        cache_v[:, :, first:end] = v
        if first == 0:
            keys, values = k, v
        else:
            keys, values = cache_k[:, :, :end], cache_v[:, :, :end]
        where: Tensor | int = first
    else:
        slots = starts.view(-1, 1) + torch.arange(length, device=starts.device)
        rows = torch.arange(batch, device=starts.device).view(-1, 1)
        cache_k[rows, :, slots] = k.transpose(1, 2)
        cache_v[rows, :, slots] = v.transpose(1, 2)
        keys, values = cache_k[:, :, :end], cache_v[:, :, :end]
        where = starts
    return _attend_positions(
        q,
        keys,
        values,
        where,
        scale=scale,
        causal=causal,
        strict=strict,
        window=window,
        sinks=sinks,
        softcap=softcap,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        mask=mask,
    )


@torch.library.custom_op("kvpass::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
) -> Tensor:
    """Stateless attention; see `attention_reference`, which is its meaning."""
    return attention_reference(
        q,
        k,
        v,
        sink_logits,
        alibi_slopes,
        mask,
        scale=scale,
        causal=causal,
        strict=strict,
        window=window,
        sinks=sinks,
        softcap=softcap,
        layer=layer,
    ).contiguous()


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


@torch.library.custom_op("kvpass::attend", mutates_args=("cache_k", "cache_v"))
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    starts: Tensor,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    end: int,
    ragged: bool,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
) -> Tensor:
    """Cached attention; made only by the cache pass. See `attend_reference`, which is its meaning."""
    return attend_reference(
        q,
        k,
        v,
        cache_k,
        cache_v,
        starts,
        sink_logits,
        alibi_slopes,
        mask,
        end=end,
        ragged=ragged,
        scale=scale,
        causal=causal,
        strict=strict,
        window=window,
        sinks=sinks,
        softcap=softcap,
        layer=layer,
    ).contiguous()


@attend.register_fake
def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


REFERENCES: dict[Any, Any] = {
    torch.ops.kvpass.attention.default: attention_reference,
    torch.ops.kvpass.attend.default: attend_reference,
}
"""What the torch lowering calls in place of each op: the same meaning without the dispatcher's cost per call."""
