"""Rotary positions (RoPE; Su et al. 2021, arXiv 2104.09864) on queries and keys, and the write into the cache, at once.

Between the projections and attention, every step of decoding rotates q, rotates k and writes k and v: apart, these are
several launches that each read and write a few kilobytes. `rope_append` is one. Neighbours may rely on this: rotated
keys are computed in float32 and rounded once, to the dtype of the cache; of the cache nothing but the places of the new
tokens is touched, by the rules of `kvpass.kernels.append`; grids depend on shapes only, and no length is compiled in.

Shapes: B batch, H query heads, Hkv KV heads, S new tokens, D head_dim, P pairs of channels that rotate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpass.kernels.append import places
from kvpass.kernels.language import alignment
from kvpass.kernels.store import Store

_TILE = 2048  # elements of a tile: 16 registers per thread of 4 warps


@triton.jit
def _rotate(
    x: tl.tensor,
    x_row: tl.tensor,  # [BLOCK] int64: where rows of D channels begin
    y: tl.tensor,
    y_row: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    turn: tl.tensor,  # [BLOCK] int64: where the rows' angles begin
    live: tl.tensor,  # [BLOCK]
    turn_pair: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    W: tl.constexpr,  # a power of two that holds PAIRS
    D: tl.constexpr,
) -> None:
    """Rows of x, rotated, are written to y."""
    pair = tl.arange(0, W)
    inside = live[:, None] & (pair < PAIRS)[None, :]
    c = tl.load(cos + turn[:, None] + (pair * turn_pair)[None, :], mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + turn[:, None] + (pair * turn_pair)[None, :], mask=inside, other=0.0).to(tl.float32)
    x_at = x + x_row[:, None]
    y_at = y + y_row[:, None]
    if INTERLEAVED:
        channel = tl.arange(0, 2 * W)
        within = live[:, None] & (channel < 2 * PAIRS)[None, :]
        tile = tl.load(x_at + channel[None, :], mask=within, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(tile, (BLOCK, W, 2)))
        turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (BLOCK, 2 * W))
        tl.store(y_at + channel[None, :], turned.to(y.dtype.element_ty), mask=within)
    else:
        a = tl.load(x_at + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_at + (PAIRS + pair)[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(y_at + pair[None, :], (a * c - b * s).to(y.dtype.element_ty), mask=inside)
        tl.store(y_at + (PAIRS + pair)[None, :], (b * c + a * s).to(y.dtype.element_ty), mask=inside)
    if 2 * PAIRS < D:
        _copy(x, x_row, y, y_row, live, 2 * PAIRS, D)


@triton.jit
def _copy(
    x: tl.tensor,
    x_row: tl.tensor,
    y: tl.tensor,
    y_row: tl.tensor,
    live: tl.tensor,
    FIRST: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Channels FIRST .. D-1 of rows of x are written to y."""
    channel = FIRST + tl.arange(0, triton.next_power_of_2(D - FIRST))
    inside = live[:, None] & (channel < D)[None, :]
    tile = tl.load(x + x_row[:, None] + channel[None, :], mask=inside, other=0.0)
    tl.store(y + y_row[:, None] + channel[None, :], tile.to(y.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "length", "room", "table_row", "turn_batch", "q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head",
        "out_batch", "out_head", "keys_first", "keys_head", "values_first", "values_head",
    ]
)  # fmt: skip
def _rope_append_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,  # None unless PAGE
    starts: tl.tensor,
    stops: tl.tensor,  # or None
    length: tl.tensor,
    room: tl.tensor,
    table_row: tl.tensor,
    turn_batch: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    out_batch: tl.tensor,
    out_head: tl.tensor,
    keys_first: tl.tensor,
    keys_head: tl.tensor,
    values_first: tl.tensor,
    values_head: tl.tensor,
    q_token: tl.constexpr,
    k_token: tl.constexpr,
    v_token: tl.constexpr,
    out_token: tl.constexpr,
    keys_slot: tl.constexpr,
    values_slot: tl.constexpr,
    turn_token: tl.constexpr,
    turn_pair: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAIRS: tl.constexpr,
    W: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,  # (token, head) rows of q, of k or of v
    ALIGN: tl.constexpr,
    TURN_ALIGN: tl.constexpr,
) -> None:
    batch = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    q_blocks = tl.cdiv(length * HEADS, BLOCK)
    kv_blocks = tl.cdiv(length * KV_HEADS, BLOCK)
    if block < q_blocks:
        row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        token, head = row // HEADS, row % HEADS
        q_row = tl.multiple_of(batch * q_batch + head * q_head, ALIGN) + token * q_token
        out_row = tl.multiple_of(batch * out_batch + head * out_head, ALIGN) + token * out_token
        turn = tl.multiple_of(batch * turn_batch + token * turn_token, TURN_ALIGN)
        _rotate(
            q, q_row, out, out_row, cos, sin, turn, token < length, turn_pair, INTERLEAVED, BLOCK, PAIRS, W, D
        )  # fmt: skip
    else:
        row = ((block - q_blocks) % kv_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        token, head = row // KV_HEADS, row % KV_HEADS
        start = tl.load(starts + batch).to(tl.int64)
        end = start + length
        if stops is not None:
            end = tl.minimum(end, tl.load(stops + batch).to(tl.int64))
        position = start + token
        first, slot, live = places(position, position < end, end, batch, table, table_row, room, WINDOW, SINKS, PAGE)
        if block - q_blocks < kv_blocks:
            k_row = tl.multiple_of(batch * k_batch + head * k_head, ALIGN) + token * k_token
            keys_row = tl.multiple_of(first * keys_first + head * keys_head, ALIGN) + slot * keys_slot
            turn = tl.multiple_of(batch * turn_batch + token * turn_token, TURN_ALIGN)
            _rotate(k, k_row, keys, keys_row, cos, sin, turn, live, turn_pair, INTERLEAVED, BLOCK, PAIRS, W, D)
        else:
            v_row = tl.multiple_of(batch * v_batch + head * v_head, ALIGN) + token * v_token
            values_row = tl.multiple_of(first * values_first + head * values_head, ALIGN) + slot * values_slot
            _copy(v, v_row, values, values_row, live, 0, DV)


def rope_append(
    q: Tensor,  # [B, H, S, D]
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,  # [B, Hkv, S, Dv]
    cos: Tensor,  # [B or 1, S, P]
    sin: Tensor,  # [B or 1, S, P]
    cache: list[Tensor],
    starts: Tensor,  # [B]: position of a row's first token
    stops: Tensor | None,  # [B]: tokens at or beyond it are not written
    store: Store,
    *,
    interleaved: bool,
) -> Tensor:  # [B, H, S, D]
    """Rotated queries; rotated keys, and values as they are, are written at positions starts .. starts+S-1.

    Pair j turns by the angle with cosine cos[.., j] and sine sin[.., j]. It is made of channels 2j and 2j+1 if
    `interleaved` and else of j and j+P; channels from 2P on stay as they are. Of a table that repeats its angles for
    each of 2P channels one passes a view: `cos[..., ::2]` if interleaved and else `cos[..., :P]`.

    Raises:
        ValueError: the store holds codes, or the shapes do not fit.
    """
    _check(q, k, v, cos, sin, store)
    batch, heads, length, dim = q.shape
    kv_heads, value_dim, pairs = k.shape[1], v.shape[3], cos.shape[2]
    keys, values = cache[0], cache[1]
    table = cache[2] if store.page else None
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty_like(q)
    data = [q, k, v, out, keys, values]
    lanes = triton.next_power_of_2(pairs)
    block = max(1, _TILE // triton.next_power_of_2(max(dim, value_dim)))
    blocks = triton.cdiv(length * heads, block) + 2 * triton.cdiv(length * kv_heads, block)
    _rope_append_kernel[(blocks, batch)](
        q, k, v, cos, sin, out, keys, values, table, starts, stops, length,
        keys.shape[2] if table is None else table.shape[1],
        0 if table is None else table.stride(0),
        cos.stride(0),
        *[x.stride(i) for x in data for i in (0, 1)],
        *[x.stride(2) for x in data],
        turn_token=cos.stride(1),
        turn_pair=cos.stride(2),
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=dim,
        DV=value_dim,
        PAIRS=pairs,
        W=lanes,
        INTERLEAVED=interleaved,
        WINDOW=store.window if store.ring else 0,
        SINKS=store.sinks,
        PAGE=store.page,
        BLOCK=block,
        ALIGN=alignment(*data),
        TURN_ALIGN=alignment(cos),
    )  # fmt: skip
    return out


def rope_append_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: list[Tensor],
    starts: Tensor,
    stops: Tensor | None,
    store: Store,
    *,
    interleaved: bool,
) -> Tensor:
    """`rope_append` in plain torch, rotating in float32 or, for float64 tensors, in float64."""
    _check(q, k, v, cos, sin, store)
    length, pairs = q.shape[2], cos.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    c, s = cos.unsqueeze(1).to(wide), sin.unsqueeze(1).to(wide)
    one, other = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (
        slice(0, pairs), slice(pairs, 2 * pairs)
    )  # fmt: skip

    def rotated(x: Tensor) -> Tensor:
        a, b = x[..., one].to(wide), x[..., other].to(wide)
        turned = x.to(wide, copy=True)
        turned[..., one], turned[..., other] = a * c - b * s, b * c + a * s
        return turned

    end = starts + length if stops is None else torch.minimum(starts + length, stops)
    position = starts.view(-1, 1) + torch.arange(length, device=q.device)
    live = position < end.view(-1, 1)
    slot, first = position, torch.arange(len(starts), device=q.device).view(-1, 1).expand_as(position)
    if store.page:
        table, slot = cache[2], position % store.page
        block = position // store.page
        first = torch.where(block < table.shape[1], table.gather(1, block.clamp(max=table.shape[1] - 1)), -1)
        live = live & (first >= 0)
    elif store.ring:
        slot = torch.where(position < store.sinks, position, store.sinks + (position - store.sinks) % store.window)
        live = live & ((position < store.sinks) | (position >= end.view(-1, 1) - store.window))
    live = live & (slot < cache[0].shape[2])
    for held, new in zip(cache[:2], (rotated(k), v), strict=True):
        held[first[live], :, slot[live]] = new.transpose(1, 2)[live].to(held.dtype)
    return rotated(q).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, store: Store) -> None:
    if store.bits:
        raise ValueError("rope_append writes full precision, and this store holds codes: rotate first, then `append`")
    if cos.shape != sin.shape or cos.shape[1] != q.shape[2] or 2 * cos.shape[2] > q.shape[3]:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit queries {tuple(q.shape)}: they have one "
            "column for each pair of channels; of a table with one for each channel pass a view of every other column "
            "(interleaved) or of the first half"
        )
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        raise ValueError(
            f"channels must lie next to each other, and strides are {q.stride()}, {k.stride()} and {v.stride()}: call "
            ".contiguous()"
        )
