"""Attention of packed query heads over keys that lie anywhere: one kernel for prompts and for decoding.

A row of a tile is one head of one query; the heads of a KV head's group stand beside each other, so each key is read
once for all of them (grouped-query packing, as in FlashAttention-3, Shah et al. 2024, arXiv 2407.08608). Scores live in
registers (FlashAttention, Dao et al. 2022, arXiv 2205.14135). Where queries are few, a sequence is split over programs
and the parts are merged (`merge`; Flash-Decoding, Dao et al. 2023); how often depends on shapes alone, so that one CUDA
graph serves every length.

The contract: scores in float32; `out` in the dtype of q; `lse` is the natural logarithm of the sum of exponentials, in
float32, with the sink logits in it. A row with nothing to read gives zeros and -inf. Nothing that is not visible to any
query of a tile and lies at or beyond the end of what was written is read, whatever it holds.

Shapes: B batch, S queries, T keys or slots, H query heads, Hkv KV heads, D and Dv channels, P parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpass.kernels.language import alignment, rows, tanh
from kvpass.kernels.merge import merge
from kvpass.kernels.store import Store
from kvpass.kernels.targets import Tile, decode_tile, prefill_tile, splits, target_of, wide

FULL_STORE = Store()
FEW = 64  # packed rows up to which a sequence is split over programs

# where the keys of a part stand
LINE, RING, TABLE, PAGED = 0, 1, 2, 3
# how keys and values are stored
FULL, SIGNED, UNSIGNED, FLOATS, NIBBLES = 0, 1, 2, 3, 4
# which queries read an entry
ALL, CLOSED, OPEN = 0, 1, 2


@dataclass(frozen=True)
class Keys:
    """Keys and values that queries may read, and where they stand in the text.

    Attributes:
        tensors: k [B, Hkv, T, D] and v [B, Hkv, T, Dv]; stored in codes, codes and parameters of each, as `Store` says.
            Paged: pools [pages, Hkv, page, ...].
        store: how they lie in memory.
        ends: [B] int64: entries at this position of the text or later are not there; None: all are.
        base: [B] int64: the position of slot 0, for entries in order; None: 0.
        positions: [B, 1 or Hkv, T]: where each entry stands, negative for nothing. None: in order, or in the ring or
            pages of the store.
        table: [B, blocks] the pages of each row, negative for none.
        reads: which queries read an entry of a KIVI store: those for which its group is "closed" or still "open".
    """

    tensors: tuple[Tensor, ...]
    store: Store = FULL_STORE
    ends: Tensor | None = None
    base: Tensor | None = None
    positions: Tensor | None = None
    table: Tensor | None = None
    reads: str = "all"

    @property
    def coded(self) -> bool:
        return self.store.bits > 0

    @property
    def values(self) -> Tensor:
        return self.tensors[2 if self.coded else 1]

    @property
    def slots(self) -> int:
        """Entries that a row has room for."""
        if self.table is not None:
            return int(self.table.shape[1]) * self.store.page
        return int(self.tensors[0].shape[2])

    def dims(self) -> tuple[int, int]:
        """D and Dv."""
        per_byte = 8 // self.store.bits if self.coded else 1
        return int(self.tensors[0].shape[3]) * per_byte, int(self.values.shape[3]) * per_byte


@triton.jit
def _decoded(codes: tl.tensor, CODES: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """Codes as numbers of `dtype`; 8-bit floats come back divided by 256, which their scale makes up for."""
    if CODES == 1:
        return codes.to(tl.int8, bitcast=True).to(dtype)
    if CODES == 3:
        wide = codes.to(tl.uint16)
        return (((wide & 0x7F) << 7) | ((wide & 0x80) << 8)).to(tl.float16, bitcast=True).to(dtype)
    return codes.to(dtype)


@triton.jit
def _fold(
    acc: tl.tensor, acc_high: tl.tensor, m: tl.tensor, den: tl.tensor, z: tl.tensor,  # sums so far
    q: tl.tensor, q_high: tl.tensor, sq: tl.tensor, sq_high: tl.tensor, q_sum: tl.tensor, sq_sum: tl.tensor,
     # queries (for sinks: sq), in halves where a byte holds two channels
    qpos: tl.tensor, row_slope: tl.tensor,
    K: tl.tensor, V: tl.tensor, KP: tl.tensor, VP: tl.tensor, POS: tl.tensor, TABLE: tl.tensor,  # of this row and head
    n0: tl.tensor, limit: tl.tensor, base: tl.tensor, end: tl.tensor, closed_before: tl.tensor,
    k_token: tl.tensor, v_token: tl.tensor, kp_token: tl.tensor, vp_token: tl.tensor, k_page: tl.tensor,
    v_page: tl.tensor, kp_page: tl.tensor, vp_page: tl.tensor,
    scale: tl.tensor, softcap: tl.tensor, window: tl.tensor, sinks: tl.tensor,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    KIND: tl.constexpr, CODES: tl.constexpr, MINIMUM: tl.constexpr, CHANNELS: tl.constexpr,
    PAGE: tl.constexpr, RING: tl.constexpr, RING_SINKS: tl.constexpr,
    READS: tl.constexpr, GROUP: tl.constexpr, RESIDUAL: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SLOPED: tl.constexpr,
    SINKING: tl.constexpr, MASKED: tl.constexpr, HALVES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The sums with one more tile of keys, those in slots n0 .. n0+BN-1."""
    n = n0 + tl.arange(0, BN)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    there = n < limit
    # where the entries stand
    if KIND == 1:
        newest = end - 1 - RING_SINKS
        place = newest - (newest - (n - RING_SINKS) + RING) % RING
        place = tl.where((newest >= 0) & (place >= 0), place + RING_SINKS, -1)
        kpos = tl.where(n < RING_SINKS, n, place)
        there = there & (kpos >= 0)
    elif KIND == 2:
        kpos = tl.load(POS + n, mask=there, other=-1).to(tl.int32)
        there = there & (kpos >= 0)
    else:
        kpos = n + base
    # and where they lie
    if KIND == 3:
        pages = tl.load(TABLE + n // PAGE, mask=there, other=-1).to(tl.int64)
        there = there & (pages >= 0)
        k_at = K + (pages * k_page + n % PAGE * k_token)[:, None] + d[None, :]
        v_at = V + (pages * v_page + n % PAGE * v_token)[:, None] + dv[None, :]
        kp_at = KP + pages * kp_page + n % PAGE * kp_token
        vp_at = VP + pages * vp_page + n % PAGE * vp_token
    else:
        ahead = tl.cast(n0, tl.int64)
        step = tl.arange(0, BN)
        k_at = K + ahead * k_token + step[:, None] * k_token + d[None, :]
        v_at = V + ahead * v_token + step[:, None] * v_token + dv[None, :]
        kp_at = KP + ahead * kp_token + step * kp_token
        vp_at = VP + ahead * vp_token + step * vp_token
    k_there = there[:, None] & (d < D)[None, :]
    v_there = there[:, None] & (dv < DV)[None, :]

    if MASKED or BD != D:
        raw = tl.load(k_at, mask=k_there, other=0)
    else:
        raw = tl.load(k_at)
    if HALVES == 2:
        k = (raw & 0xF).to(q.dtype)
        k_high = (raw >> 4).to(q.dtype)
    elif CODES == 0:
        k = raw
        k_high = raw
    else:
        k = _decoded(raw, CODES, q.dtype)
        k_high = k

    if CHANNELS:  # one scale and minimum per channel of the tile, which is one group: they go to the query
        at = KP + tl.cast(n0 // GROUP, tl.int64) * kp_token + d * 2
        fits = d < D
        k_scale = tl.load(at, mask=fits, other=0).to(tl.float32)
        k_low = tl.load(at + 1, mask=fits, other=0).to(tl.float32)
        lows = tl.sum(q.to(tl.float32) * k_low[None, :], 1)
        s = tl.dot((q.to(tl.float32) * k_scale[None, :]).to(q.dtype), tl.trans(k), input_precision="ieee")
        if HALVES == 2:
            k_scale = tl.load(at + 2 * D, mask=fits, other=0).to(tl.float32)
            k_low = tl.load(at + 2 * D + 1, mask=fits, other=0).to(tl.float32)
            lows += tl.sum(q_high.to(tl.float32) * k_low[None, :], 1)
            scaled = (q_high.to(tl.float32) * k_scale[None, :]).to(q.dtype)
            s += tl.dot(scaled, tl.trans(k_high), input_precision="ieee")
        s += lows[:, None]
    else:
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HALVES == 2:
            s += tl.dot(q_high, tl.trans(k_high), input_precision="ieee")
        if CODES != 0:
            k_scale = tl.load(kp_at, mask=there, other=0).to(tl.float32)
            if CODES == 3:
                k_scale = k_scale * 256
            s = s * k_scale[None, :]
        if MINIMUM:
            k_low = tl.load(kp_at + 1, mask=there, other=0).to(tl.float32)
            s += q_sum[:, None] * k_low[None, :]
        if SINKING:  # noqa: SIM102  (known when compiled, and not) sinks are scored by queries of their own
            if KIND == 2 or n0 < sinks:
                t = tl.dot(sq, tl.trans(k), input_precision="ieee")
                if HALVES == 2:
                    t += tl.dot(sq_high, tl.trans(k_high), input_precision="ieee")
                if CODES != 0:
                    t = t * k_scale[None, :]
                if MINIMUM:
                    t += sq_sum[:, None] * k_low[None, :]
                s = tl.where(((kpos >= 0) & (kpos < sinks))[None, :], t, s)

    if CAPPED:
        s = (softcap * 1.4426950408889634) * tanh(s * (scale / softcap))
    else:
        s = s * (scale * 1.4426950408889634)
    if SLOPED:
        s += (row_slope * 1.4426950408889634)[:, None] * (kpos[None, :] - qpos[:, None]).to(tl.float32)
    if MASKED:
        seen = there[None, :]
        if STRICT:
            seen = seen & (kpos[None, :] < qpos[:, None])
        elif CAUSAL:
            seen = seen & (kpos[None, :] <= qpos[:, None])
        if WINDOWED:
            seen = seen & ((kpos[None, :] > qpos[:, None] - window) | (kpos < sinks)[None, :])
        if READS == 1:
            seen = seen & (kpos[None, :] < closed_before[:, None])
        elif READS == 2:
            seen = seen & (kpos[None, :] >= closed_before[:, None])
        s = tl.where(seen, s, float("-inf"))

    m_new = tl.maximum(m, tl.max(s, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    den = den * alpha + tl.sum(p, 1)
    if MASKED or BDV != DV:
        raw = tl.load(v_at, mask=v_there, other=0)
    else:
        raw = tl.load(v_at)
    if CODES != 0:
        v_scale = tl.load(vp_at, mask=there, other=0).to(tl.float32)
        if CODES == 3:
            v_scale = v_scale * 256
        if MINIMUM:
            v_low = tl.load(vp_at + 1, mask=there, other=0).to(tl.float32)
            z = z * alpha + tl.sum(p * v_low[None, :], 1)
        p = p * v_scale[None, :]
    if HALVES == 2:
        v = (raw & 0xF).to(q.dtype)
        acc_high = acc_high * alpha[:, None] + tl.dot(p.to(q.dtype), (raw >> 4).to(q.dtype), input_precision="ieee")
    elif CODES == 0:
        v = raw
    else:
        v = _decoded(raw, CODES, q.dtype)
    acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return acc, acc_high, m_new, den, z


@triton.jit(
    do_not_specialize=[
        "queries", "slots", "first", "window", "sinks", "part", "q_batch", "q_head", "k_batch", "k_head",
        "v_batch", "v_head", "kp_batch", "kp_head", "vp_batch", "vp_head", "pos_batch", "pos_head", "table_batch",
        "scale", "softcap", "batch",
    ]
)  # fmt: skip
def _attention_kernel(
    Q: tl.tensor, SQ: tl.tensor, K: tl.tensor, V: tl.tensor, KP: tl.tensor, VP: tl.tensor, POS: tl.tensor,
    TABLE: tl.tensor, STARTS: tl.tensor, QPOS: tl.tensor, ENDS: tl.tensor, BASE: tl.tensor, SLOPES: tl.tensor,
    SINK_LOGITS: tl.tensor, OUT: tl.tensor, LSE: tl.tensor,
    batch: tl.tensor, queries: tl.tensor, slots: tl.tensor, first: tl.tensor, part: tl.tensor,
    q_batch: tl.tensor, q_head: tl.tensor, q_token: tl.tensor, k_batch: tl.tensor, k_head: tl.tensor,
    k_token: tl.tensor, v_batch: tl.tensor, v_head: tl.tensor, v_token: tl.tensor,
    kp_batch: tl.tensor, kp_head: tl.tensor, kp_token: tl.tensor, vp_batch: tl.tensor, vp_head: tl.tensor,
    vp_token: tl.tensor, pos_batch: tl.tensor, pos_head: tl.tensor, table_batch: tl.tensor,
    scale: tl.tensor, softcap: tl.tensor, window: tl.tensor, sinks: tl.tensor,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    KIND: tl.constexpr, CODES: tl.constexpr, MINIMUM: tl.constexpr, CHANNELS: tl.constexpr,
    PAGE: tl.constexpr, RING: tl.constexpr, RING_SINKS: tl.constexpr,
    READS: tl.constexpr, GROUP: tl.constexpr, RESIDUAL: tl.constexpr, HALVES: tl.constexpr,
    QUERIES_AT: tl.constexpr, ENDED: tl.constexpr, BASED: tl.constexpr,
    CAUSAL: tl.constexpr, STRICT: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SLOPED: tl.constexpr,
    SINKING: tl.constexpr, SUNK: tl.constexpr, MIDDLE: tl.constexpr, PARTIAL: tl.constexpr,
) -> None:  # fmt: skip
    # lengths are in these strides: they come divided, so that they are known to be even without being specialised on
    q_batch, q_head = tl.cast(q_batch, tl.int64) * ALIGN, tl.cast(q_head, tl.int64) * ALIGN
    k_batch, k_head = tl.cast(k_batch, tl.int64) * ALIGN, tl.cast(k_head, tl.int64) * ALIGN
    v_batch, v_head = tl.cast(v_batch, tl.int64) * ALIGN, tl.cast(v_head, tl.int64) * ALIGN
    G: tl.constexpr = H // HKV
    rows = queries * G
    blocks = tl.cdiv(rows, BM)
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks  # the longest rows of a causal mask first
    b = (program // blocks // HKV).to(tl.int64)
    head = program // blocks % HKV
    r = tl.minimum(block * BM + tl.arange(0, BM), rows - 1)
    live = block * BM + tl.arange(0, BM) < rows
    query = r // G
    h = head * G + r % G
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)

    if QUERIES_AT == 2:
        qpos = tl.load(QPOS + b * queries + query).to(tl.int32)
    elif QUERIES_AT == 1:
        qpos = tl.load(STARTS + b).to(tl.int32) + query
    else:
        qpos = first + query
    lowest = tl.min(qpos, 0)
    highest = tl.max(qpos, 0)

    at = b * q_batch + h * q_head + query.to(tl.int64) * q_token
    q = tl.load(Q + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0)
    q_high = q
    sq = q
    sq_high = q
    if HALVES == 2:
        q_high = tl.load(Q + at[:, None] + (d + D)[None, :], mask=(d < D)[None, :], other=0)
    if SINKING:
        sq = tl.load(SQ + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0)
        if HALVES == 2:
            sq_high = tl.load(SQ + at[:, None] + (d + D)[None, :], mask=(d < D)[None, :], other=0)
    q_sum = tl.zeros([BM], tl.float32)
    sq_sum = tl.zeros([BM], tl.float32)
    if MINIMUM and not CHANNELS:
        q_sum = tl.sum(q.to(tl.float32), 1)
        if HALVES == 2:
            q_sum += tl.sum(q_high.to(tl.float32), 1)
        if SINKING:
            sq_sum = tl.sum(sq.to(tl.float32), 1)
            if HALVES == 2:
                sq_sum += tl.sum(sq_high.to(tl.float32), 1)
    row_slope = tl.zeros([BM], tl.float32)
    if SLOPED:
        row_slope = tl.load(SLOPES + h).to(tl.float32)

    base = 0
    if BASED:
        base = tl.load(BASE + b).to(tl.int32)
    end = slots + base
    if ENDED:
        end = tl.load(ENDS + b).to(tl.int32)
    limit = tl.minimum(slots, end - base)
    closed_before = tl.zeros([BM], tl.int32)
    if READS != 0:
        closed_before = tl.maximum(qpos + 1 - RESIDUAL, 0) // GROUP * GROUP

    # the tiles that any of the queries reads: those of the sinks, then a run
    low = 0
    high = limit
    sink_tiles = 0
    if KIND == 0 or KIND == 3:
        if CAUSAL or STRICT:
            high = tl.minimum(high, highest + 1 - base)
        if WINDOWED:
            low = tl.maximum(lowest - window + 1 - base, 0)
            sink_tiles = tl.cdiv(tl.maximum(tl.minimum(sinks - base, high), 0), BN)
        if READS == 1:
            high = tl.minimum(high, tl.maximum(highest + 1 - RESIDUAL, 0) // GROUP * GROUP - base)
        elif READS == 2:
            low = tl.maximum(low, tl.maximum(lowest + 1 - RESIDUAL, 0) // GROUP * GROUP - base)
    high = tl.maximum(high, 0)
    tile_high = tl.cdiv(high, BN)
    tile_low = tl.minimum(tl.maximum(low // BN, sink_tiles), tile_high)
    # and among them the tiles that all of the queries read whole
    middle_low = tile_high
    middle_high = tile_high
    if MIDDLE:
        middle_low = tile_low
        if WINDOWED:
            middle_low = tl.cdiv(tl.maximum(highest - window + 1 - base, 0), BN)
        whole = limit
        if STRICT:
            whole = tl.minimum(whole, lowest - base)
        elif CAUSAL:
            whole = tl.minimum(whole, lowest + 1 - base)
        middle_low = tl.minimum(tl.maximum(middle_low, tile_low), tile_high)
        middle_high = tl.minimum(tl.maximum(tl.maximum(whole, 0) // BN, middle_low), tile_high)
    left = sink_tiles + middle_low - tile_low
    edges = left + tile_high - middle_high

    K += head * k_head
    V += head * v_head
    KP += head.to(tl.int64) * kp_head
    VP += head.to(tl.int64) * vp_head
    if KIND != 3:
        K += b * k_batch
        V += b * v_batch
        KP += b * kp_batch
        VP += b * vp_batch
    POS += b * pos_batch + head * pos_head
    TABLE += b * table_batch

    split = tl.program_id(1)
    run = tl.cdiv(edges, tl.num_programs(1))
    acc = tl.zeros([BM, BDV], tl.float32)
    acc_high = tl.zeros([BM, BDV if HALVES == 2 else 1], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    den = tl.zeros([BM], tl.float32)
    z = tl.zeros([BM], tl.float32)
    for edge in range(split * run, tl.minimum(edges, split * run + run)):
        tile = tl.where(edge < sink_tiles, edge, tile_low + edge - sink_tiles)
        tile = tl.where(edge < left, tile, middle_high + edge - left)
        acc, acc_high, m, den, z = _fold(
            acc, acc_high, m, den, z, q, q_high, sq, sq_high, q_sum, sq_sum, qpos, row_slope,
            K, V, KP, VP, POS, TABLE, tile * BN, limit, base, end, closed_before,
            k_token, v_token, kp_token, vp_token, k_batch, v_batch, kp_batch, vp_batch, scale, softcap, window, sinks,
            D, DV, BD, BDV, BN, KIND, CODES, MINIMUM, CHANNELS, PAGE, RING, RING_SINKS, READS, GROUP, RESIDUAL,
            CAUSAL, STRICT, WINDOWED, CAPPED, SLOPED, SINKING, True, HALVES,
        )  # fmt: skip
    if MIDDLE:
        for tile in range(middle_low, middle_high):
            acc, acc_high, m, den, z = _fold(
                acc, acc_high, m, den, z, q, q_high, sq, sq_high, q_sum, sq_sum, qpos, row_slope,
                K, V, KP, VP, POS, TABLE, tile * BN, limit, base, end, closed_before,
                k_token, v_token, kp_token, vp_token, k_batch, v_batch, kp_batch, vp_batch,
                scale, softcap, window, sinks,
                D, DV, BD, BDV, BN, KIND, CODES, MINIMUM, CHANNELS, PAGE, RING, RING_SINKS,
                READS, GROUP, RESIDUAL, CAUSAL, STRICT, WINDOWED, CAPPED, SLOPED, SINKING, False, HALVES,
            )  # fmt: skip

    if SUNK:
        sink = tl.load(SINK_LOGITS + h).to(tl.float32) * 1.4426950408889634
        m_new = tl.maximum(m, sink)
        alpha = tl.exp2(m - m_new)
        acc = acc * alpha[:, None]
        acc_high = acc_high * alpha[:, None]
        z = z * alpha
        den = den * alpha + tl.exp2(sink - m_new)
        m = m_new
    total = tl.where(den == 0, 1.0, den)
    sum_log = tl.where(den == 0, float("-inf"), (m + tl.log2(total)) * 0.6931471805599453)
    out_row = ((part + split) * batch + b) * H + h
    tl.store(LSE + out_row * queries + query, sum_log, mask=live)
    if PARTIAL:  # parts [P, B, H, S, Dv]; what an empty one holds is never read
        out_at = OUT + (out_row * queries + query) * (DV * HALVES)
        live = live & (den > 0)
    else:  # [B, S, H, Dv]
        out_at = OUT + ((b * queries + query) * H + h) * (DV * HALVES)
    fits = live[:, None] & (dv < DV)[None, :]
    tl.store(out_at[:, None] + dv[None, :], ((acc + z[:, None]) / total[:, None]).to(OUT.dtype.element_ty), mask=fits)
    if HALVES == 2:
        value = ((acc_high + z[:, None]) / total[:, None]).to(OUT.dtype.element_ty)
        tl.store(out_at[:, None] + (dv + DV)[None, :], value, mask=fits)


def attention(
    q: Tensor,
    keys: list[Keys],
    starts: Tensor | int,
    *,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink_q: Tensor | None = None,
    tile: Tile | None = None,
    cuts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, S, D] over parts of keys -> out [B, H, S, Dv] and its log-sum-exp [B, H, S].

    `starts` says where the queries stand: the position of each row's first [B], of every query [B, S] (negative: it
    reads nothing behind a causal mask), or of all rows' first as a number. Masks, soft cap, ALiBi, sink logits [H] and
    `sink_q` mean what they mean in `kvpass::attention`. `tile` and `cuts` replace the table's shapes and the number of
    runs that a sequence is split into.

    Raises:
        ValueError: what no kernel does, with the reason; `unsupported` tells beforehand.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, value_dim = int(keys[0].values.shape[1]), keys[0].dims()[1]
    for part in keys:
        reason = unsupported(part.store, q.dtype, *part.dims())
        if reason:
            raise ValueError(reason)
    group = heads // kv_heads
    q = rows(q)
    sink_q = None if sink_q is None else rows(sink_q)
    if sink_q is not None and sink_q.stride() != q.stride():
        q, sink_q = q.contiguous(), sink_q.contiguous()
    target = target_of(q.device)
    few = queries * group <= FEW
    choose = decode_tile if few else prefill_tile
    tiles: list[Tile] = []
    runs: list[int] = []
    for part in keys:
        chosen = tile or choose(
            target, q.dtype, wide(max(dim, value_dim)), part.store if part.coded else FULL_STORE, part.table is not None
        )
        chosen = replace(chosen, rows=min(chosen.rows, max(16, wide(queries * group))))
        programs = batch * kv_heads * -(-queries * group // chosen.rows)
        reach = min(part.slots, window + sinks + queries) if window else part.slots
        tiles.append(chosen)
        runs.append(cuts or (splits(target, programs, -(-reach // chosen.columns)) if few else 1))
    parts = sum(runs)
    partial = parts > 1
    if partial:
        out = q.new_empty((parts, batch, heads, queries, value_dim), dtype=torch.float32)
        lse = q.new_empty((parts, batch, heads, queries), dtype=torch.float32)
    else:
        out = q.new_empty((batch, queries, heads, value_dim))
        lse = q.new_empty((1, batch, heads, queries), dtype=torch.float32)
    if out.numel() == 0:
        return out.transpose(1, 2) if not partial else out[0].to(q.dtype), lse[0]
    where: Tensor | None = starts if isinstance(starts, Tensor) else None
    if where is not None and where.dim() == 2:
        where = where.contiguous()
    done = 0
    for part, chosen, run in zip(keys, tiles, runs, strict=True):
        store = part.store
        tensors = [rows(t) for t in part.tensors]
        k, v = (tensors[0], tensors[2]) if part.coded else (tensors[0], tensors[1])
        k_params, v_params = (tensors[1], tensors[3]) if part.coded else (k, v)
        halves = 2 if store.bits == 4 else 1
        d, dv = dim // halves, value_dim // halves
        positions = part.positions
        kind = TABLE if positions is not None else PAGED if store.page else RING if store.window else LINE
        held = positions.expand(batch, kv_heads, -1) if positions is not None else k
        table = part.table if part.table is not None else k
        channels = part.coded and store.group > 0
        align = alignment(q, k, v)
        masks = {"CAUSAL": causal, "STRICT": strict, "WINDOWED": window > 0, "CAPPED": softcap > 0}
        _attention_kernel[(batch * kv_heads * -(-queries * group // chosen.rows), run)](
            q, q if sink_q is None else sink_q, k, v, k_params, v_params, held, table,
            q if where is None else where, q if where is None else where,
            q if part.ends is None else part.ends, q if part.base is None else part.base,
            q if alibi_slopes is None else alibi_slopes, q if sink_logits is None else sink_logits, out, lse,
            batch, queries, part.slots, starts if isinstance(starts, int) else 0, done,
            *_outer(q, align), *_outer(k, align), *_outer(v, align), *k_params.stride()[:3], *v_params.stride()[:3],
            held.stride(0), held.stride(1), table.stride(0),
            float(scale), float(softcap), window, sinks,
            H=heads, HKV=kv_heads, D=d, DV=dv, BD=wide(d), BDV=wide(dv), BM=chosen.rows, BN=chosen.columns,
            ALIGN=align, KIND=kind, CODES=_codes(store) if part.coded else FULL,
            MINIMUM=part.coded and store.minimum, CHANNELS=channels,
            PAGE=store.page, RING=store.window if kind == RING else 0, RING_SINKS=store.sinks if kind == RING else 0,
            READS={"all": ALL, "closed": CLOSED, "open": OPEN}[part.reads], GROUP=max(1, store.group),
            RESIDUAL=store.residual, HALVES=halves if part.coded else 1,
            QUERIES_AT=0 if where is None else where.dim(), ENDED=part.ends is not None, BASED=part.base is not None,
            **masks, SLOPED=alibi_slopes is not None, SINKING=sink_q is not None,
            SUNK=sink_logits is not None and not partial,
            MIDDLE=not few and kind == LINE and part.reads == "all", PARTIAL=partial,
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
        done += run
    if not partial:
        return out.transpose(1, 2), lse[0]
    return merge(out, lse, sink_logits, q.dtype)


def unsupported(store: Store, dtype: torch.dtype, dim: int, value_dim: int) -> str:
    """Why no kernel attends over such a store, or nothing."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"kernels compute in float32, float16 and bfloat16, not in {dtype}"
    if max(dim, value_dim) > 256:
        return f"kernels hold heads of up to 256 channels, not {max(dim, value_dim)}"
    if store.bits not in (0, 4, 8):
        return f"kernels read codes of 8 and 4 bits, not {store.bits}"
    if store.group and store.bits == 8 and max(dim, value_dim) > 128:
        return "kernels read 8-bit codes under KIVI for heads of up to 128 channels"
    if store.group and not 16 <= store.group <= 128:
        return f"kernels read groups of 16 to 128 tokens under KIVI, not {store.group}"
    return ""


def _codes(store: Store) -> int:
    if store.bits == 4:
        return NIBBLES
    if store.floats:
        return FLOATS
    return UNSIGNED if store.group else SIGNED


def _outer(x: Tensor, align: int) -> tuple[int, int, int]:
    """The strides of rows and heads, divided by `align`, and that of tokens."""
    return x.stride(0) // align, x.stride(1) // align, x.stride(2)


def attention_reference(
    q: Tensor,
    keys: list[Keys],
    starts: Tensor | int,
    *,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch and in the precision of q, scores formed one and all."""
    batch, heads, queries, _ = q.shape
    kv_heads = int(keys[0].values.shape[1])
    place = torch.arange(queries, device=q.device)
    if isinstance(starts, int):
        qpos = (starts + place).expand(batch, -1)
    else:
        qpos = starts if starts.dim() == 2 else starts.view(-1, 1) + place
    qpos = qpos.view(batch, 1, queries, 1)
    scores, values = [], []
    for part in keys:
        k, v, kpos = _read(part, batch, q.dtype)
        k, v, kpos = (
            x.expand(-1, kv_heads, *x.shape[2:]).repeat_interleave(heads // kv_heads, 1) for x in (k, v, kpos)
        )
        kpos = kpos.unsqueeze(2)
        s = q @ k.transpose(2, 3)
        if sink_q is not None:
            s = torch.where((kpos >= 0) & (kpos < sinks), sink_q @ k.transpose(2, 3), s)
        s = s * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        if alibi_slopes is not None:
            s = s + alibi_slopes.to(q.dtype).view(1, -1, 1, 1) * (kpos - qpos)
        seen = kpos >= 0
        if part.ends is not None:
            seen = seen & (kpos < part.ends.view(-1, 1, 1, 1))
        if strict:
            seen = seen & (kpos < qpos)
        elif causal:
            seen = seen & (kpos <= qpos)
        if window:
            seen = seen & ((kpos > qpos - window) | (kpos < sinks))
        if part.reads != "all":
            boundary = (qpos + 1 - part.store.residual).clamp(min=0) // part.store.group * part.store.group
            seen = seen & ((kpos < boundary) if part.reads == "closed" else (kpos >= boundary))
        scores.append(s.masked_fill(~seen, float("-inf")))
        values.append(torch.where((kpos >= 0).transpose(2, 3), v, 0.0))
    s, v = torch.cat(scores, 3), torch.cat(values, 2)
    every = s
    if sink_logits is not None:
        every = torch.cat([s, sink_logits.to(q.dtype).view(1, -1, 1, 1).expand(batch, -1, queries, 1)], 3)
    lse = torch.logsumexp(every, 3)
    weights = torch.exp(s - torch.where(torch.isneginf(lse), 0.0, lse).unsqueeze(3))
    readable = torch.isfinite(s).any(2, keepdim=True).transpose(2, 3)
    return weights @ torch.where(readable, v, 0.0), lse


def _read(part: Keys, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [B, Hkv, T, ...] as numbers, and where they stand [B, 1 or Hkv, T]."""
    store, tensors = part.store, list(part.tensors)
    slot = torch.arange(part.slots, device=tensors[0].device)
    there = torch.ones((batch, part.slots), dtype=torch.bool, device=slot.device)
    if part.table is not None:
        pages = part.table[:, slot // store.page]
        there = pages >= 0
        tensors = [t[pages.clamp(min=0), :, slot % store.page].transpose(1, 2) for t in tensors]
    if part.positions is not None:
        kpos = part.positions
    elif store.ring:
        assert part.ends is not None
        newest = part.ends.view(-1, 1) - 1 - store.sinks
        latest = store.sinks + newest - (newest - (slot - store.sinks)) % store.window
        behind = torch.where((newest >= 0) & (latest >= store.sinks), latest, -1)
        kpos = torch.where(slot < store.sinks, slot.expand(batch, -1), behind).unsqueeze(1)
    else:
        kpos = slot.expand(batch, -1) if part.base is None else part.base.view(-1, 1) + slot
        kpos = torch.where(there, kpos, -1).unsqueeze(1)
    if not part.coded:
        return tensors[0].to(dtype), tensors[1].to(dtype), kpos

    def numbers(codes: Tensor) -> Tensor:
        if store.bits == 4:
            return torch.cat([codes & 15, codes >> 4], -1).to(dtype)
        if store.floats:
            return codes.view(torch.float8_e4m3fn).float().to(dtype)
        return (codes if store.group else codes.view(torch.int8)).to(dtype)

    k, v = numbers(tensors[0]), numbers(tensors[2])
    k_params, v_params = tensors[1].to(dtype), tensors[3].to(dtype)
    if store.group:
        k_params = k_params.repeat_interleave(store.group, 2)[:, :, : k.shape[2]]  # [B, Hkv, T, D, 2]
        k = k * k_params[..., 0] + k_params[..., 1]
    else:
        k = k * k_params[..., :1] + (k_params[..., 1:] if store.minimum else 0.0)
    v = v * v_params[..., :1] + (v_params[..., 1:] if store.minimum else 0.0)
    return k, v, kpos
