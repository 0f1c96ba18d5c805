"""How much attention keys get: the column sums of the attention matrix, which is never formed.

Whoever ranks tokens by the attention that they receive (SnapKV, Li et al. 2024, arXiv 2404.14469; PyramidInfer, Yang et
al. 2024, arXiv 2405.12532; H2O, Zhang et al. 2023, arXiv 2306.14048) needs, per key, a weighted sum over queries. With
the log-sum-exp of each query's row known from the attention itself, each column can be summed alone: one program takes
one block of keys and walks over the queries. Neighbours may rely on this: the result is deterministic (no atomics), the
grid depends on shapes only, a query without anything to read adds nothing, and what stands in q at absent queries or in
k at absent keys, NaN included, reaches no other key.

Shapes: B batch, H query heads, Hkv KV heads, G = H / Hkv, R observed queries, T keys, D head_dim.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpass.kernels.language import alignment, tanh
from kvpass.kernels.targets import Target, Tile, target_of, wide

_LOG2E = tl.constexpr(math.log2(math.e))
_NOWHERE = tl.constexpr(2**31 - 1)  # the position of an absent key: behind whatever a query reaches
_SCAN = tl.constexpr(1024)


@triton.jit
def _reach(position: tl.tensor, CAUSAL: tl.constexpr, STRICT: tl.constexpr) -> tl.tensor:
    """The last position that queries at `position` read; -1, which is before all, for absent ones."""
    if STRICT:
        last = position - 1
    elif CAUSAL:
        last = position
    else:
        last = tl.full(position.shape, _NOWHERE - 1, tl.int32)
    return tl.where(position < 0, -1, last)


@triton.jit(
    do_not_specialize=[
        "scale", "softcap", "window", "sinks", "queries", "keys", "q_batch", "q_head", "k_batch", "k_head",
    ]
)  # fmt: skip
def _column_mass(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    lse_ptr: tl.tensor,  # [B, H, R]
    weights_ptr: tl.tensor,  # [B, R]
    q_positions_ptr: tl.tensor,  # [B, R]
    k_positions_ptr: tl.tensor,  # [B, KEY_ROWS, T]
    lengths_ptr: tl.tensor,  # [B]
    slopes_ptr: tl.tensor,  # [H]
    out_ptr: tl.tensor,  # [B, Hkv, T]
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    sinks: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    q_token: tl.constexpr,
    k_token: tl.constexpr,
    ALIGNED: tl.constexpr,  # all strides are multiples of it
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEY_ROWS: tl.constexpr,  # 0: key j stands at j
    RAGGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    STRICT: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SLOPED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # (query, head of the group) pairs
) -> None:
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % KV_HEADS
    key = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    end = keys
    if RAGGED:
        end = tl.minimum(tl.load(lengths_ptr + batch), keys).to(tl.int32)
    position = key
    if KEY_ROWS:
        placed = batch * KEY_ROWS + kv_head % KEY_ROWS
        position = tl.load(k_positions_ptr + placed * keys + key, key < keys, -1).to(tl.int32)
    position = tl.where((key < end) & (position >= 0), position, _NOWHERE)
    first = tl.min(position, 0)
    last = tl.max(tl.where(position == _NOWHERE, -1, position), 0)

    # the queries between which all lie that read a key of this block: to read positions costs next to nothing
    low, high = queries, queries * 0
    for start in range(0, queries, _SCAN):
        query = start + tl.arange(0, _SCAN)
        asked = tl.load(q_positions_ptr + batch * queries + query, query < queries, -1).to(tl.int32)
        reads = (_reach(asked, CAUSAL, STRICT) >= first) & (last >= 0)
        if WINDOWED:
            reads = reads & ((asked - window < last) | (first < sinks))
        low = tl.minimum(low, tl.min(tl.where(reads, query, queries), 0))
        high = tl.maximum(high, tl.max(tl.where(reads, query + 1, 0), 0))

    channel = tl.arange(0, BLOCK_D)
    k_base = tl.multiple_of(batch * k_batch + kv_head.to(tl.int64) * k_head, ALIGNED)
    q_base = tl.multiple_of(batch * q_batch + (kv_head * GROUP).to(tl.int64) * q_head, ALIGNED)
    k_at = k_ptr + k_base + (key.to(tl.int64) * k_token)[:, None] + channel[None, :]
    k = tl.load(k_at, (key < keys)[:, None] & (channel < HEAD_DIM)[None, :], 0.0)
    mass = tl.zeros([BLOCK_K], tl.float32)
    for start in range(low * GROUP // BLOCK_Q * BLOCK_Q, high * GROUP, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        query = row // GROUP
        head = row % GROUP
        there = query < queries
        q_line = tl.multiple_of(head.to(tl.int64) * q_head, ALIGNED) + query.to(tl.int64) * q_token
        q_at = q_ptr + q_base + q_line[:, None] + channel[None, :]
        q = tl.load(q_at, there[:, None] & (channel < HEAD_DIM)[None, :], 0.0)
        asked = tl.load(q_positions_ptr + batch * queries + query, there, -1).to(tl.int32)
        weight = tl.load(weights_ptr + batch * queries + query, there, 0.0)
        lse_line = (batch * KV_HEADS + kv_head) * GROUP + head
        lse = tl.load(lse_ptr + lse_line * queries + query, there, float("-inf"))
        reach = tl.where(lse == float("-inf"), -1, _reach(asked, CAUSAL, STRICT))

        # keys stand on the left, so that a column of the matrix is summed within a thread and its neighbours
        score = tl.dot(k, tl.trans(q), input_precision="ieee")
        if CAPPED:
            score = softcap * _LOG2E * tanh(score * (scale / softcap))
        else:
            score = score * (scale * _LOG2E)
        if SLOPED:
            slope = tl.load(slopes_ptr + kv_head * GROUP + head).to(tl.float32) * _LOG2E
            score += slope[None, :] * (position[:, None] - asked[None, :]).to(tl.float32)
        seen = position[:, None] <= reach[None, :]
        if WINDOWED:
            seen = seen & ((position[:, None] > (asked - window)[None, :]) | (position < sinks)[:, None])
        share = tl.exp2(tl.where(seen, score - (lse * _LOG2E)[None, :], float("-inf")))
        mass += tl.sum(share * tl.where(asked < 0, 0.0, weight)[None, :], 1)
    out_line = (batch * KV_HEADS + kv_head) * keys
    tl.store(out_ptr + out_line + key, mass / GROUP, key < keys)


def column_mass(
    q: Tensor,  # [B, H, R, D] float32, float16 or bfloat16
    k: Tensor,  # [B, Hkv, T, D] of the same dtype
    lse: Tensor,  # [B, H, R] float32, natural log
    weights: Tensor,  # [B, R] float32
    q_positions: Tensor,  # [B, R] int64
    k_positions: Tensor | None,  # [B, 1 or Hkv, T] integer
    *,
    scale: float,
    causal: bool,
    strict: bool,
    window: int,
    sinks: int,
    softcap: float,
    alibi_slopes: Tensor | None,  # [H]
    lengths: Tensor | None = None,  # [B] integer
) -> Tensor:  # [B, Hkv, T] float32
    """What queries at `q_positions` give to each key: their shares, averaged over a group's heads, times `weights`.

    The share of key j in query i of head g is exp(s - lse[g, i]) with the score s = scale * q.k, or softcap *
    tanh(scale * q.k / softcap), plus ALiBi's slope times how far the key stands from the query. It is 0 where `causal`,
    `strict`, `window` and `sinks` (as in `kvpass.ir.attention.visible`) hide the key, and where lse is -inf.

    Negative positions say that there is no query or no key; with `k_positions` None, key j stands at j. Keys from
    `lengths` on are not there either.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if q.dtype != k.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"column_mass takes queries and keys of one dtype, float32, float16 or bfloat16; got {q.dtype} and "
            f"{k.dtype}: cast one to the other, or use column_mass_reference"
        )
    if q.stride(3) != 1 or k.stride(3) != 1 or dim > 256 or heads % kv_heads:
        raise ValueError(
            f"column_mass takes at most 256 channels, next to each other in memory, and whole groups of heads; got "
            f"queries {tuple(q.shape)} with strides {q.stride()} and keys {tuple(k.shape)} with strides {k.stride()}: "
            "call .contiguous(), or use column_mass_reference"
        )
    out = q.new_empty((batch, kv_heads, keys), dtype=torch.float32)
    tile = _tile(target_of(q.device), q.dtype, wide(dim))
    _column_mass[(triton.cdiv(keys, tile.columns), batch * kv_heads)](
        q, k, lse.contiguous(), weights.contiguous(), q_positions.contiguous(),
        None if k_positions is None else k_positions.contiguous(), lengths, alibi_slopes, out,
        float(scale), float(softcap), window, sinks, queries, keys,
        *[x.stride(i) for x in (q, k) for i in (0, 1)], *[x.stride(2) for x in (q, k)],
        ALIGNED=alignment(q, k), KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEAD_DIM=dim,
        KEY_ROWS=0 if k_positions is None else k_positions.shape[1], RAGGED=lengths is not None,
        CAUSAL=causal, STRICT=strict, WINDOWED=window > 0, CAPPED=softcap > 0, SLOPED=alibi_slopes is not None,
        BLOCK_D=wide(dim), BLOCK_K=tile.columns, BLOCK_Q=tile.rows, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _tile(target: Target, dtype: torch.dtype, dim: int) -> Tile:
    """Rows are (query, head of a group) pairs, columns keys."""
    if target.arch == "interpreter":
        return Tile(128, 128, 4, 1)
    if dtype == torch.float32:
        return Tile(16 if dim > 128 else 32, 32, 8, 1)
    return Tile(64, 128, 8, 2) if dim <= 128 else Tile(64, 64, 4, 2)


def column_mass_reference(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weights: Tensor,
    q_positions: Tensor,
    k_positions: Tensor | None,
    *,
    scale: float,
    causal: bool,
    strict: bool,
    window: int,
    sinks: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    lengths: Tensor | None = None,
) -> Tensor:
    """`column_mass` in plain torch, in the dtype of its tensors, with the whole matrix in memory."""
    heads, kv_heads, keys = q.shape[1], k.shape[1], k.shape[2]
    order = torch.arange(keys, device=k.device)
    placed = order.view(1, 1, -1) if k_positions is None else k_positions
    there = placed >= 0
    if lengths is not None:
        there = there & (order < lengths.view(-1, 1, 1))
    key_pos, query_pos = placed[:, :, None, None, :], q_positions[:, None, None, :, None]
    seen = there[:, :, None, None, :] & (query_pos >= 0)
    if strict:
        seen = seen & (key_pos < query_pos)
    elif causal:
        seen = seen & (key_pos <= query_pos)
    if window:
        seen = seen & ((key_pos > query_pos - window) | (key_pos < sinks))
    grouped = q.unflatten(1, (kv_heads, heads // kv_heads))  # [B, Hkv, G, R, D]
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype).view(1, kv_heads, heads // kv_heads, 1, 1)
        scores = scores + slopes * (key_pos - query_pos)
    level = lse.unflatten(1, (kv_heads, heads // kv_heads)).unsqueeze(-1)
    shares = torch.where(seen & ~torch.isneginf(level), torch.exp(scores - level), 0.0)
    shares = shares * torch.where(q_positions >= 0, weights, 0.0)[:, None, None, :, None]
    return shares.sum(dim=3).mean(dim=2)
