"""Keys and values of new tokens go into a cache, quantized on the way where it holds codes.

Readers may rely on the bits: codes and parameters are those of `kvpass.ir.kv_format`, whose docstring says what they
are (of several NaNs or zeros a minimum may be another one). Addresses are those of `kvpass.ir.kv_layout`. Of the cache
nothing but the places of the new tokens is touched, and no two programs write to one of them. Nothing here asks the
host for a value on the device: positions, lengths and tables are read by the kernels, and grids depend on shapes.

A token that has no place is not written: at or beyond its row's stop, behind the last slot, or in a page below 0.

`append` writes tokens, `close_groups` quantizes what KIVI no longer keeps in full precision (`append` calls it),
`encode` gives what `append` would write, as tensors of its own. The same in plain torch is `Layout.exchange` there.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpass.kernels.language import alignment
from kvpass.kernels.store import Store

_TILE = 4096  # elements of a tile: 32 registers per thread of 4 warps
_ROUND = tl.constexpr(1.5 * 2**23)  # added to |x| < 2^22 and taken off again, it leaves x rounded to even
_GRAIN = tl.constexpr(2.0**14)  # a sum with it has the step of fp8's denormals, 2^-9


# ---------------------------------------------------------------------- device: quantizing


@triton.jit
def _most(x: tl.tensor, CHANNELS: tl.constexpr) -> tl.tensor:
    """The largest of each group of x [T, parts, W]: of a channel's tokens, or of a token's channels; sizes 1 stay."""
    return tl.max(x, 0, keep_dims=True) if CHANNELS else tl.max(tl.max(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def _scale(span: tl.tensor, TOP: tl.constexpr) -> tl.tensor:
    """The smallest float16 with scale * TOP >= span; NaN where there is none."""
    nearest = tl.div_rn(span, TOP * 1.0).to(tl.float16)
    below = nearest.to(tl.float32) * TOP < span
    scale = (nearest.to(tl.int16, bitcast=True) + below.to(tl.int16)).to(tl.float16, bitcast=True)
    return tl.where(scale < float("inf"), scale, float("nan"))


@triton.jit
def _float16_below(x: tl.tensor) -> tl.tensor:
    """The largest float16 <= x."""
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True)
    previous = tl.where(nearest > 0, bits - 1, bits + 1)  # sign and magnitude
    return tl.where(nearest.to(tl.float32) > x, previous, bits).to(tl.float16, bitcast=True)


@triton.jit
def _e4m3(x: tl.tensor) -> tl.tensor:
    """The bits of |x| <= 448 as float8_e4m3fn, ties to even, by integers: not every device has the conversion."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # 120: float32's exponent bias less e4m3's
    grains = (tl.abs(x) + _GRAIN).to(tl.int32, bitcast=True) & 0xFF
    return tl.where(size < 121 << 23, grains, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _quantize(
    x: tl.tensor,  # [T, parts, W] float32
    inside: tl.tensor,  # [1, 1, W]: false for the padding of x, which is 0
    BITS: tl.constexpr,
    FLOATS: tl.constexpr,
    MINIMUM: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Codes [T, W] uint8, scale and (if there is one) minimum float16, [T, 1, 1] or for CHANNELS [1, parts, W]."""
    TOP: tl.constexpr = 2**BITS - 1 if MINIMUM else (448 if FLOATS else 127)
    nan = _most((x != x).to(tl.int32), CHANNELS) > 0  # a maximum may skip NaN
    if MINIMUM:
        low = -_most(tl.where(inside, -x, float("-inf")), CHANNELS)
        high = _most(tl.where(inside, x, float("-inf")), CHANNELS)
        minimum = _float16_below(tl.where(nan, float("nan"), low))
        x = x - minimum.to(tl.float32)
        scale = _scale(high - minimum.to(tl.float32), TOP)
    else:
        scale = _scale(tl.where(nan, float("nan"), _most(tl.abs(x), CHANNELS)), TOP)
        minimum = scale
    # false for a scale of 0 (a constant group) and of NaN; all other quotients are within the codes' range
    sound = scale > 0
    steps = tl.where(sound, tl.div_rn(x, tl.where(sound, scale.to(tl.float32), 1.0)), 0.0)
    if FLOATS:
        codes = _e4m3(steps)
    else:
        codes = ((steps + _ROUND) - _ROUND).to(tl.int32)
    if BITS == 4:
        codes = tl.sum(codes << (4 * tl.arange(0, 2))[None, :, None], 1)
    else:
        codes = tl.sum(codes, 1)  # over one part
    return (codes & 0xFF).to(tl.uint8), scale, minimum


# ---------------------------------------------------------------------- device: tokens


@triton.jit
def places(
    position: tl.tensor,  # [T] int64
    live: tl.tensor,  # [T]: which of them are to be written
    end: tl.tensor,  # positions from here on are not written by this launch
    row: tl.tensor,
    table: tl.tensor,  # [B, blocks] if PAGE
    table_row: tl.tensor,
    room: tl.tensor,  # blocks of the table if PAGE, else slots
    WINDOW: tl.constexpr,  # of a ring, else 0
    SINKS: tl.constexpr,
    PAGE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where tokens lie in a store: index of the first dimension, slot in it, and whether the token has a place."""
    if PAGE > 0:
        block = position // PAGE
        live = live & (block < room)
        first = tl.load(table + row * table_row + block, mask=live, other=-1).to(tl.int64)
        slot = position % PAGE
        live = live & (first >= 0)
    else:
        first = tl.zeros_like(position) + row
        slot = position
        if WINDOW > 0:
            slot = tl.where(position < SINKS, position, SINKS + (position - SINKS) % WINDOW)
            live = live & ((position < SINKS) | (position >= end - WINDOW))
        live = live & (slot < room)
    return first, slot, live


@triton.jit
def _write(
    x: tl.tensor,  # row and head chosen: [S, D]
    codes: tl.tensor,  # head chosen
    params: tl.tensor,
    token: tl.tensor,  # [T] int64: of x
    first: tl.tensor,  # [T] int64: first dimension and
    slot: tl.tensor,  # [T] int64: slot of what is written
    live: tl.tensor,  # [T]
    codes_row: tl.tensor,
    params_row: tl.tensor,
    x_token: tl.constexpr,
    codes_slot: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,  # a power of two that holds D or, at 4 bits, D / 2
    BITS: tl.constexpr,
    FLOATS: tl.constexpr,
    MINIMUM: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    """Tokens of one row and head are written, as codes or as they are."""
    PARTS: tl.constexpr = 2 if BITS == 4 else 1
    lane = tl.arange(0, W)
    inside = lane < D // PARTS
    channel = (D // PARTS) * tl.arange(0, PARTS)[:, None] + lane[None, :]
    both = live[:, None, None] & inside[None, None, :]
    tile = tl.load(x + (token * x_token)[:, None, None] + channel[None, :, :], mask=both, other=0.0)
    target = codes + tl.multiple_of(first * codes_row, ALIGN) + slot * codes_slot
    if BITS == 0:
        tl.store(target[:, None, None] + channel[None, :, :], tile, mask=both)
    else:
        packed, scale, minimum = _quantize(
            tile.to(tl.float32), inside[None, None, :], BITS, FLOATS, MINIMUM, CHANNELS=False
        )
        tl.store(target[:, None] + lane[None, :], packed, mask=live[:, None] & inside[None, :])
        target = params + first * params_row + slot * (1 + MINIMUM)
        tl.store(target, tl.reshape(scale, slot.shape), mask=live)
        if MINIMUM:
            tl.store(target + 1, tl.reshape(minimum, slot.shape), mask=live)


@triton.jit(
    do_not_specialize=[
        "length", "room", "table_row", "k_row", "k_head", "v_row", "v_head", "k_codes_row", "k_codes_head",
        "k_params_row", "k_params_head", "v_codes_row", "v_codes_head", "v_params_row", "v_params_head",
    ]
)  # fmt: skip
def _append_kernel(
    k: tl.tensor,
    v: tl.tensor,
    k_codes: tl.tensor,  # or k, v in full precision
    k_params: tl.tensor,  # or None
    v_codes: tl.tensor,
    v_params: tl.tensor,
    table: tl.tensor,  # None unless PAGE
    starts: tl.tensor,  # None for 0
    stops: tl.tensor,  # or None
    length: tl.tensor,
    room: tl.tensor,
    table_row: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    k_codes_row: tl.tensor,
    k_codes_head: tl.tensor,
    k_params_row: tl.tensor,
    k_params_head: tl.tensor,
    v_codes_row: tl.tensor,
    v_codes_head: tl.tensor,
    v_params_row: tl.tensor,
    v_params_head: tl.tensor,
    k_token: tl.constexpr,
    v_token: tl.constexpr,
    k_codes_slot: tl.constexpr,
    v_codes_slot: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    W: tl.constexpr,
    WV: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FLOATS: tl.constexpr,
    MINIMUM: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    position = token
    end = tl.zeros_like(row) + length
    if starts is not None:
        start = tl.load(starts + row).to(tl.int64)
        position += start
        end += start
    if stops is not None:
        end = tl.minimum(end, tl.load(stops + row).to(tl.int64))
    first, slot, live = places(position, position < end, end, row, table, table_row, room, WINDOW, SINKS, PAGE)
    _write(
        k + tl.multiple_of(row * k_row + head * k_head, ALIGN),
        k_codes + tl.multiple_of(head * k_codes_head, ALIGN),
        k_params + head * k_params_head if BITS > 0 else None,
        token, first, slot, live, k_codes_row, k_params_row, k_token, k_codes_slot, D, W, BITS, FLOATS, MINIMUM, ALIGN,
    )  # fmt: skip
    _write(
        v + tl.multiple_of(row * v_row + head * v_head, ALIGN),
        v_codes + tl.multiple_of(head * v_codes_head, ALIGN),
        v_params + head * v_params_head if BITS > 0 else None,
        token, first, slot, live, v_codes_row, v_params_row, v_token, v_codes_slot, DV, WV, BITS, FLOATS, MINIMUM,
        ALIGN,
    )  # fmt: skip


# ---------------------------------------------------------------------- device: KIVI's groups


@triton.jit
def _leaving(
    x: tl.tensor,  # row and head chosen: [S, D]
    recent: tl.tensor,  # row and head chosen: [ROOM, D]
    position: tl.tensor,  # [T, 1, 1] int64
    start: tl.tensor,
    channel: tl.tensor,  # [1, parts, W]
    inside: tl.tensor,  # [1, 1, W]
    x_token: tl.constexpr,
    recent_slot: tl.constexpr,
    ROOM: tl.constexpr,
) -> tl.tensor:
    """Tokens [T, parts, W] in float32, from the residual or, from `start` on, from the new ones."""
    old = position < start
    kept = tl.load(recent + position % ROOM * recent_slot + channel, mask=old & inside, other=0.0)
    new = tl.load(x + (position - start) * x_token + channel, mask=(position >= start) & inside, other=0.0)
    return tl.where(old, kept.to(tl.float32), new.to(tl.float32))


@triton.jit(
    do_not_specialize=[
        "length", "groups", "k_row", "k_head", "v_row", "v_head", "k_recent_row", "k_recent_head", "v_recent_row",
        "v_recent_head", "k_codes_row", "k_codes_head", "k_params_row", "k_params_head", "v_codes_row", "v_codes_head",
        "v_params_row", "v_params_head",
    ]
)  # fmt: skip
def _close_kernel(
    k: tl.tensor,
    v: tl.tensor,
    k_codes: tl.tensor,
    k_params: tl.tensor,
    v_codes: tl.tensor,
    v_params: tl.tensor,
    k_recent: tl.tensor,
    v_recent: tl.tensor,
    starts: tl.tensor,
    length: tl.tensor,
    groups: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    k_codes_row: tl.tensor,
    k_codes_head: tl.tensor,
    k_params_row: tl.tensor,
    k_params_head: tl.tensor,
    v_codes_row: tl.tensor,
    v_codes_head: tl.tensor,
    v_params_row: tl.tensor,
    v_params_head: tl.tensor,
    k_recent_row: tl.tensor,
    k_recent_head: tl.tensor,
    v_recent_row: tl.tensor,
    v_recent_head: tl.tensor,
    k_token: tl.constexpr,
    v_token: tl.constexpr,
    k_codes_slot: tl.constexpr,
    v_codes_slot: tl.constexpr,
    k_recent_slot: tl.constexpr,
    v_recent_slot: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    W: tl.constexpr,  # lanes of keys at a time
    WV: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens of values at a time
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    PARTS: tl.constexpr = 2 if BITS == 4 else 1
    ROOM: tl.constexpr = RESIDUAL + GROUP
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    start = tl.load(starts + row).to(tl.int64)
    group = tl.maximum(start - RESIDUAL, 0) // GROUP + tl.program_id(0)
    if ((group + 1) * GROUP <= start + length - RESIDUAL) & (group < groups):
        part = tl.arange(0, PARTS)[None, :, None]

        half: tl.constexpr = D // PARTS
        k += tl.multiple_of(row * k_row + head * k_head, ALIGN)
        k_recent += tl.multiple_of(row * k_recent_row + head * k_recent_head, ALIGN)
        k_codes += tl.multiple_of(row * k_codes_row + head * k_codes_head, ALIGN)
        k_params += row * k_params_row + head * k_params_head + group * (2 * D)
        position = group * GROUP + tl.arange(0, GROUP)
        for begin in range(0, half, W):
            lane = begin + tl.arange(0, W)
            inside = (lane < half)[None, None, :]
            channel = half * part + lane[None, None, :]
            tile = _leaving(k, k_recent, position[:, None, None], start, channel, inside, k_token, k_recent_slot, ROOM)
            codes, scale, minimum = _quantize(tile, inside, BITS, FLOATS=False, MINIMUM=True, CHANNELS=True)
            tl.store(k_codes + (position * k_codes_slot)[:, None] + lane[None, :], codes, mask=(lane < half)[None, :])
            tl.store(k_params + 2 * channel, scale, mask=inside)
            tl.store(k_params + 2 * channel + 1, minimum, mask=inside)

        half_v: tl.constexpr = DV // PARTS
        v += tl.multiple_of(row * v_row + head * v_head, ALIGN)
        v_recent += tl.multiple_of(row * v_recent_row + head * v_recent_head, ALIGN)
        v_codes += tl.multiple_of(row * v_codes_row + head * v_codes_head, ALIGN)
        v_params += row * v_params_row + head * v_params_head
        lane = tl.arange(0, WV)
        inside = (lane < half_v)[None, None, :]
        channel = half_v * part + lane[None, None, :]
        for begin in range(0, GROUP, BLOCK):
            token = group * GROUP + begin + tl.arange(0, BLOCK)
            tile = _leaving(v, v_recent, token[:, None, None], start, channel, inside, v_token, v_recent_slot, ROOM)
            codes, scale, minimum = _quantize(tile, inside, BITS, FLOATS=False, MINIMUM=True, CHANNELS=False)
            tl.store(v_codes + (token * v_codes_slot)[:, None] + lane[None, :], codes, mask=(lane < half_v)[None, :])
            tl.store(v_params + 2 * token, tl.reshape(scale, token.shape))
            tl.store(v_params + 2 * token + 1, tl.reshape(minimum, token.shape))


# ---------------------------------------------------------------------- host


def append(
    cache: list[Tensor],
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,  # [B, Hkv, S, Dv]
    starts: Tensor,  # [B]: position of a row's first token
    stops: Tensor | None,  # [B]: tokens at or beyond it are not written
    store: Store,
) -> None:
    """Write tokens at positions starts .. starts+S-1; of those that fall into one slot of a ring, the latest.

    Raises:
        ValueError: kernels do not write this store.
    """
    _check(store)
    if store.group:
        close_groups(cache, k, v, starts, store)
        _append(cache[4:], k, v, starts, stops, store.recent)
    else:
        _append(cache, k, v, starts, stops, store)


def encode(k: Tensor, v: Tensor, store: Store) -> list[Tensor]:
    """What a dense or paged cache holds for k [B, Hkv, S, D] and v [B, Hkv, S, Dv], in its order.

    Raises:
        ValueError: kernels do not write this store, or what it holds depends on the tokens before (KIVI).
    """
    _check(store)
    if store.group:
        raise ValueError("KIVI quantizes whole groups, which new tokens alone are not: use append")
    if not store.bits:
        return [k, v]
    pieces = []
    for x in (k, v):
        pieces.append(x.new_empty(*x.shape[:-1], x.shape[-1] * store.bits // 8, dtype=torch.uint8))
        pieces.append(x.new_empty(*x.shape[:-1], store.parameters, dtype=torch.float16))
    _append(pieces, k, v, None, None, replace(store, window=0, sinks=0, page=0))
    return pieces


def close_groups(
    cache: list[Tensor],
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,  # [B, Hkv, S, Dv]
    starts: Tensor,  # [B]: position of a row's first token
    store: Store,
) -> None:
    """Quantize the groups of a KIVI cache that are older than the residual once k and v are there, not before.

    Keys get one group per channel, values one per token. Tokens before `starts` are read from the residual, which must
    still hold them: this comes before k and v are written there.

    Raises:
        ValueError: kernels do not write this store.
    """
    _check(store)
    batch, heads, length, dim = k.shape
    value_dim = v.shape[-1]
    parts = 2 if store.bits == 4 else 1
    k_codes, k_params, v_codes, _, k_recent, v_recent = cache
    lanes = triton.next_power_of_2(value_dim // parts)
    data = [k, v, k_codes, v_codes, k_recent, v_recent]
    _close_kernel[(length // store.group + 1, heads, batch)](
        k, v, *cache, starts, length, k_params.shape[2],
        *[x.stride(i) for x in (k, v, *cache) for i in (0, 1)],
        *[x.stride(2) for x in data],
        D=dim,
        DV=value_dim,
        W=min(triton.next_power_of_2(dim // parts), max(1, _TILE // (store.group * parts))),
        WV=lanes,
        BLOCK=min(store.group, max(1, _TILE // (lanes * parts))),
        BITS=store.bits,
        GROUP=store.group,
        RESIDUAL=store.residual,
        ALIGN=alignment(*data),
        num_warps=8,
    )  # fmt: skip


def _append(
    cache: list[Tensor], k: Tensor, v: Tensor, starts: Tensor | None, stops: Tensor | None, store: Store
) -> None:
    batch, heads, length, dim = k.shape
    value_dim = v.shape[-1]
    parts = 2 if store.bits == 4 else 1
    table = cache[-1] if store.page else None
    k_codes, k_params, v_codes, v_params = cache[:4] if store.bits else (cache[0], None, cache[1], None)
    data = [k, v, k_codes, v_codes]
    lanes, value_lanes = (triton.next_power_of_2(d // parts) for d in (dim, value_dim))
    block = 1 if length == 1 else min(32, max(1, _TILE // (max(lanes, value_lanes) * parts)))
    _append_kernel[(triton.cdiv(length, block), heads, batch)](
        k, v, k_codes, k_params, v_codes, v_params, table, starts, stops, length,
        k_codes.shape[2] if table is None else table.shape[1],
        0 if table is None else table.stride(0),
        *[0 if x is None else x.stride(i) for x in (k, v, k_codes, k_params, v_codes, v_params) for i in (0, 1)],
        *[x.stride(2) for x in data],
        D=dim,
        DV=value_dim,
        W=lanes,
        WV=value_lanes,
        BLOCK=block,
        BITS=store.bits,
        FLOATS=store.floats,
        MINIMUM=store.minimum,
        WINDOW=store.window if store.ring else 0,
        SINKS=store.sinks,
        PAGE=store.page,
        ALIGN=alignment(*data),
        num_warps=1 if block == 1 else 4,
    )  # fmt: skip


def _check(store: Store) -> None:
    if store.bits not in (0, 4, 8):
        raise ValueError(f"kernels write codes of 4 or 8 bits, not {store.bits}: use another format for this layer")
