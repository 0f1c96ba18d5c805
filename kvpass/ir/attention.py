"""The arithmetic of attention in plain torch: what every reference of the dialect (`kvpass.ir.ops`) is made of.

KV heads are never repeated: the query heads of a group are packed into the rows of one matrix product.

Shapes: B batch, S query length, T key length, H query heads, Hkv KV heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpass.ir.kv_format import KVFormat
from kvpass.ir.kv_layout import Part

NEG_INF = float("-inf")
ROWS = 256  # query rows per block where the score matrix has to be formed; bounds memory at H * 256 * T
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
    free = seen is None and bias is None and sink_logits is None and softcap == 0 and not may_be_empty
    if free and sinking is None and q.dtype == torch.float32:
        packed = q.reshape(batch, kv_heads, heads // kv_heads * length, q.shape[3])
        return _read_all(packed, k, v, scale).view(batch, heads, length, v.shape[3])
    weights = shared_out(scored(q, k, seen, bias, scale, softcap, sinking), sink_logits, may_be_empty)
    weights = weights.to(v.dtype).view(batch, kv_heads, heads // kv_heads * length, keys)
    return torch.matmul(weights, v).view(batch, heads, length, v.shape[3])


def scored(
    q: Tensor,  # [B, H, S, D]
    k: Tensor,  # [B, Hkv, T, D]
    seen: Tensor | None,  # bool, broadcastable to [B, H, S, T] or, with five axes, to [B, Hkv, H / Hkv, S, T]
    bias: Tensor | None,  # float, likewise
    scale: float,
    softcap: float,
    sinking: Sinking | None = None,
) -> Tensor:
    """Scores [B, Hkv, H / Hkv, S, T], at least in float32; -inf where nothing may be read."""
    batch, heads, length, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    packed = q.reshape(batch, kv_heads, group * length, q.shape[3])
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
    return scores if seen is None else scores.masked_fill(~by_group(seen), NEG_INF)


def shared_out(scores: Tensor, sink_logits: Tensor | None, may_be_empty: bool) -> Tensor:
    """Attention weights of scores [B, Hkv, H / Hkv, S, T]; a row with nothing to read gives zeros."""
    if sink_logits is not None:
        sink = sink_logits.to(scores.dtype).view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:4], 1)
        return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    if may_be_empty:  # filled before the softmax too: a NaN that is overwritten still has a NaN for a gradient
        empty = torch.isneginf(scores).all(dim=-1, keepdim=True)
        return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return torch.softmax(scores, dim=-1)


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
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
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
        part = None
        if mask is not None:
            part = mask[..., start:stop, :] if mask.shape[-2] != 1 else mask
            part = part[..., low:high] if part.shape[-1] != 1 else part
        seen, bias = with_tables(seen, part, alibi_slopes, key_pos - query_pos)
        sinking = None
        if sink_q is not None:
            sinking = Sinking(sink_q[:, :, start:stop], min(sinks, len(key_pos)))
        blocks.append(
            _masked_attention(queries, block_k, block_v, seen, bias, scale, softcap, sink_logits, may_be_empty, sinking)
        )
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def attend_parts(
    q: Tensor,  # [B, H, S, D]
    parts: list[Part],
    first: Tensor | int,  # absolute position of the first query: [B] or one number; or of every query: [B, S]
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
    if isinstance(first, Tensor) and first.dim() == 2:
        query_pos = first.view(-1, 1, length, 1)
    elif isinstance(first, Tensor):
        query_pos = (first.view(-1, 1) + torch.arange(length, device=q.device)).view(-1, 1, length, 1)
    else:
        query_pos = (first + torch.arange(length, device=q.device)).view(1, 1, -1, 1)
    plain = softcap == 0 and all(t is None for t in (sink_logits, alibi_slopes, mask, sink_q)) and causal and not strict
    all_parts, blocks = parts, []
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
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
        part_mask = None
        if mask is not None:
            part_mask = columns(mask[..., start:stop, :] if mask.shape[-2] != 1 else mask, key_pos)
        seen, bias = with_tables(seen, part_mask, alibi_slopes, key_pos - here)
        sinking = None
        if sink_q is not None:
            sinking = Sinking(sink_q[:, :, start:stop], keys.shape[2], (key_pos >= 0) & (key_pos < sinks))
        blocks.append(
            _masked_attention(
                q[:, :, start:stop], keys, values, seen, bias, may_be_empty=True, sinking=sinking, **options
            )
        )
    return _joined(blocks, 2)


def with_tables(
    seen: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    distance: Tensor,  # of keys from queries, [.., S, T]
) -> tuple[Tensor | None, Tensor | None]:
    """What queries see and what is added to scores, with a table of either and ALiBi's slopes."""
    bias = None
    if mask is not None and mask.dtype == torch.bool:
        seen = mask if seen is None else seen & mask
    elif mask is not None:
        bias = mask
    if alibi_slopes is not None:
        slope_bias = alibi_slopes.float().view(1, -1, 1, 1) * distance.float()
        bias = slope_bias if bias is None else bias + slope_bias
    return seen, bias


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


def columns(mask: Tensor, key_pos: Tensor) -> Tensor:
    """Columns of a mask [.., S, T'] over positions, at the positions [B or 1, 1, 1, T] of the entries."""
    if mask.shape[-1] == 1:
        return mask
    batch = max(mask.shape[0], key_pos.shape[0])
    index = key_pos.clamp(0, mask.shape[-1] - 1).expand(batch, mask.shape[1], mask.shape[2], -1)
    return mask.expand(batch, -1, -1, -1).gather(-1, index)
