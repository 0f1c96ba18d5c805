"""Entries of a cache change places, bit by bit: survivors of a selection move together, tokens and pages into pages.

Nothing is computed: every dtype is moved as integers of its size, NaNs and codes included. Nothing here asks the host
for a value on the device, grids depend on shapes, and an index that names nothing (below 0, or behind the end) does no
harm: a token that it names is zeros, a page that it names is neither read nor written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpass.kernels.append import places
from kvpass.kernels.language import alignment

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TILE = 4096  # elements that a program moves at a time


@triton.jit(do_not_specialize=["count", "length", "x_row", "x_head", "out_row", "out_head", "index_row", "index_head"])
def _compact_kernel(
    x: tl.tensor,
    index: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    length: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    index_row: tl.tensor,
    index_head: tl.tensor,
    x_token: tl.constexpr,
    out_token: tl.constexpr,
    index_token: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, W)
    live = token < count
    source = tl.load(index + row * index_row + head * index_head + token * index_token, mask=live, other=-1)
    source = source.to(tl.int64)
    there = (source >= 0) & (source < length)
    x += tl.multiple_of(row * x_row + head * x_head, ALIGN)
    out += tl.multiple_of(row * out_row + head * out_head, ALIGN)
    inside = (lane < D)[None, :]
    tile = tl.load(x + (source * x_token)[:, None] + lane[None, :], mask=there[:, None] & inside, other=0)
    tl.store(out + (token * out_token)[:, None] + lane[None, :], tile, mask=live[:, None] & inside)


@triton.jit(do_not_specialize=["length", "blocks", "table_row", "x_row", "x_head", "pool_row", "pool_head"])
def _scatter_kernel(
    x: tl.tensor,
    pool: tl.tensor,
    table: tl.tensor,
    starts: tl.tensor,
    stops: tl.tensor,  # or None
    length: tl.tensor,
    blocks: tl.tensor,
    table_row: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    pool_row: tl.tensor,
    pool_head: tl.tensor,
    x_token: tl.constexpr,
    pool_slot: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, W)
    start = tl.load(starts + row).to(tl.int64)
    end = start + length
    if stops is not None:
        end = tl.minimum(end, tl.load(stops + row).to(tl.int64))
    position = start + token
    first, slot, live = places(position, position < end, end, row, table, table_row, blocks, 0, 0, PAGE)
    both = live[:, None] & (lane < D)[None, :]
    x += tl.multiple_of(row * x_row + head * x_head, ALIGN)
    pool += tl.multiple_of(head * pool_head, ALIGN)
    tile = tl.load(x + (token * x_token)[:, None] + lane[None, :], mask=both, other=0)
    target = tl.multiple_of(first * pool_row, ALIGN) + slot * pool_slot
    tl.store(pool + target[:, None] + lane[None, :], tile, mask=both)


@triton.jit(do_not_specialize=["pages"])
def _copy_kernel(
    pool: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    pages: tl.tensor,
    stride: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    pair = tl.program_id(1).to(tl.int64)
    begin = tl.load(source + pair).to(tl.int64)
    end = tl.load(target + pair).to(tl.int64)
    there = (begin >= 0) & (begin < pages) & (end >= 0) & (end < pages)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < tl.where(there, SIZE, 0)  # the interpreter spreads a number wrongly if it is a truth value
    tl.store(pool + end * stride + element, tl.load(pool + begin * stride + element, mask=inside), mask=inside)


def compact(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of x [B, Hkv, T, X] that `index` [B, 1 or Hkv, W] names -> [B, Hkv, W, X]; zeros below 0."""
    out = x.new_empty(*x.shape[:2], index.shape[2], x.shape[3])
    _compact(out, x, index)
    return out


def compact_reference(x: Tensor, index: Tensor) -> Tensor:
    """`compact` in plain torch."""
    index = index.expand(*x.shape[:2], -1).unsqueeze(-1)
    found = _integers(x).gather(2, index.clamp(0, x.shape[2] - 1).expand(-1, -1, -1, x.shape[3]))
    return torch.where((index >= 0) & (index < x.shape[2]), found, 0).view(x.dtype)


def compact_into(cache: list[Tensor], pieces: list[Tensor], index: Tensor) -> None:
    """Write the tokens of each piece [B, Hkv, T, X] that `index` [B, 1 or Hkv, W] names into slots 0..W-1 of its store.

    Stores [B, Hkv, slots, X] have the dtypes of the pieces and memory of their own; slots from W on stay as they are.
    """
    for tensor, piece in zip(cache, pieces, strict=True):
        _compact(tensor[:, :, : index.shape[2]], piece, index)


def scatter_pages(
    pool: Tensor,  # [pages, Hkv, page, X]
    x: Tensor,  # [B, Hkv, S, X]
    table: Tensor,  # [B, blocks]
    starts: Tensor,  # [B]: position of a row's first token
    stops: Tensor | None,  # [B]: tokens at or beyond it are not written
) -> None:
    """Write tokens, as they are, at positions starts .. starts+S-1 of the pages that the table names."""
    pool, x = _integers(pool), _integers(x)
    batch, heads, length, dim = x.shape
    lanes = triton.next_power_of_2(dim)
    block = 1 if length == 1 else min(32, max(1, _TILE // lanes))
    _scatter_kernel[(triton.cdiv(length, block), heads, batch)](
        x, pool, table, starts, stops, length, table.shape[1], table.stride(0),
        *x.stride()[:2], *pool.stride()[:2], x.stride(2), pool.stride(2),
        D=dim, W=lanes, BLOCK=block, PAGE=pool.shape[2], ALIGN=alignment(x, pool),
        num_warps=1 if block == 1 else 4,
    )  # fmt: skip


def scatter_pages_reference(pool: Tensor, x: Tensor, table: Tensor, starts: Tensor, stops: Tensor | None) -> None:
    """`scatter_pages` in plain torch."""
    page, length = pool.shape[2], x.shape[2]
    for row, start in enumerate(starts.tolist()):
        end = start + length if stops is None else min(start + length, int(stops[row]))
        for position in range(start, min(end, page * table.shape[1])):
            if (number := int(table[row, position // page])) >= 0:
                pool[number, :, position % page] = x[row, :, position - start]


def copy_pages(pools: list[Tensor], source: Tensor, target: Tensor) -> None:
    """Copy page source[i] to page target[i] of each pool [pages, Hkv, page, X], for all i [N] at once.

    Targets are distinct, and none of them is a source: the copies have no order. A pool's pages are contiguous.
    """
    for pool in map(_integers, pools):
        size = pool[0].numel()
        block = min(triton.next_power_of_2(size), _TILE)
        _copy_kernel[(triton.cdiv(size, block), len(source))](
            pool, source, target, len(pool), stride=pool.stride(0), SIZE=size, BLOCK=block
        )


def copy_pages_reference(pools: list[Tensor], source: Tensor, target: Tensor) -> None:
    """`copy_pages` in plain torch."""
    for pool in pools:
        there = (source >= 0) & (source < len(pool)) & (target >= 0) & (target < len(pool))
        pool[target[there]] = pool[source[there]]


def _compact(out: Tensor, x: Tensor, index: Tensor) -> None:
    out, x = _integers(out), _integers(x)
    batch, heads, length, dim = x.shape
    index = index.expand(batch, heads, -1)
    count = index.shape[2]
    lanes = triton.next_power_of_2(dim)
    block = 1 if count == 1 else min(32, max(1, _TILE // lanes))
    _compact_kernel[(triton.cdiv(count, block), heads, batch)](
        x, index, out, count, length, *x.stride()[:2], *out.stride()[:2], *index.stride()[:2],
        x.stride(2), out.stride(2), index.stride(2), D=dim, W=lanes, BLOCK=block, ALIGN=alignment(x, out),
        num_warps=1 if block == 1 else 4,
    )  # fmt: skip


def _integers(x: Tensor) -> Tensor:
    """x as integers of its size."""
    return x.view(_INTEGERS[x.element_size()])
