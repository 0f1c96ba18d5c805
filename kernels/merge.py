"""Merging attention over parts of a sequence into attention over all of it.

Softmax attention over a set of keys follows from that over its parts, where the logarithm of each part's sum of
exponentials is at hand (Flash-Decoding, Dao et al. 2023; FlashInfer, Ye et al. 2025, arXiv 2501.01005). A sequence that
several programs share is merged this way, and so are a cache and what is not yet in it, or a common prefix and its
continuations.

Shapes: P parts, B batch, H query heads, S queries, D channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpass.kernels.targets import interpreted, wide


@triton.jit(do_not_specialize=["parts", "rows", "queries"])
def _merge_kernel(
    PARTS: tl.tensor, LSES: tl.tensor, SINK_LOGITS: tl.tensor, OUT: tl.tensor, LSE: tl.tensor,
    parts: tl.tensor, rows: tl.tensor, queries: tl.tensor,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, SUNK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # (b, h, s)
    live = row < rows
    h = row // queries % H
    d = tl.arange(0, BD)
    acc = tl.zeros([BR, BD], tl.float32)
    m = tl.full([BR], float("-inf"), tl.float32)
    den = tl.zeros([BR], tl.float32)
    if SUNK:
        m = tl.load(SINK_LOGITS + h, mask=live, other=0).to(tl.float32)
        den = tl.full([BR], 1.0, tl.float32)
    for p0 in range(0, parts, BP):
        p = p0 + tl.arange(0, BP)
        at = p.to(tl.int64)[None, :] * rows + row[:, None]  # [BR, BP]
        one = tl.load(LSES + at, mask=live[:, None] & (p < parts)[None, :], other=float("-inf"))
        m_new = tl.maximum(m, tl.max(one, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2((one - m_safe[:, None]) * 1.4426950408889634)
        alpha = tl.exp2((m - m_safe) * 1.4426950408889634)
        fits = (one != float("-inf"))[:, :, None] & (d < D)[None, None, :]  # an empty part was never written
        value = tl.load(PARTS + at[:, :, None] * D + d[None, None, :], mask=fits, other=0)
        acc = acc * alpha[:, None] + tl.sum(value.to(tl.float32) * weight[:, :, None], 1)
        den = den * alpha + tl.sum(weight, 1)
        m = m_new
    total = tl.where(den == 0, 1.0, den)
    out_at = OUT + ((row // queries // H * queries + row % queries) * H + h) * D  # [B, S, H, D]
    fits = live[:, None] & (d < D)[None, :]
    tl.store(out_at[:, None] + d[None, :], (acc / total[:, None]).to(OUT.dtype.element_ty), mask=fits)
    sum_log = tl.where(den == 0, float("-inf"), m + tl.log2(total) * 0.6931471805599453)
    tl.store(LSE + row, sum_log, mask=live)


def merge(
    parts: Tensor, lses: Tensor, sink_logits: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attention outputs [P, B, H, S, D] over disjoint keys and their log-sum-exps [P, B, H, S] -> those over all.

    Gives out [B, H, S, D] in `dtype` (that of the parts) and the log-sum-exp [B, H, S], natural and in float32. A part
    whose log-sum-exp is -inf read nothing, and what stands in its place is not read; rows that nothing was read for
    give zeros and -inf. `sink_logits` [H] join every row's sum.
    """
    parts, lses = parts.contiguous(), lses.float().contiguous()
    count, batch, heads, queries, dim = parts.shape
    out = parts.new_empty((batch, queries, heads, dim), dtype=dtype or parts.dtype)
    lse = lses.new_empty((batch, heads, queries))
    rows = batch * heads * queries
    if rows:
        together = min(16, 1 << (count - 1).bit_length())
        block = 256 if interpreted() else max(1, 8 // together)
        _merge_kernel[(-(-rows // block),)](
            parts, lses, lses if sink_logits is None else sink_logits, out, lse, count, rows, queries,
            H=heads, D=dim, BD=wide(dim), BP=together, BR=block, SUNK=sink_logits is not None, num_warps=4,
        )  # fmt: skip
    return out.transpose(1, 2), lse


def merge_reference(
    parts: Tensor, lses: Tensor, sink_logits: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, in the precision of `lses`."""
    empty = torch.isneginf(lses)
    values = torch.where(empty.unsqueeze(-1), 0.0, parts.to(lses.dtype))
    every = lses
    if sink_logits is not None:
        sink = sink_logits.to(lses.dtype).view(1, 1, -1, 1).expand(1, *lses.shape[1:])
        every = torch.cat([lses, sink])
    total = torch.logsumexp(every, dim=0)
    safe = torch.where(torch.isneginf(total), 0.0, total)
    out = (torch.exp(lses - safe).unsqueeze(-1) * values).sum(dim=0)
    return out.to(dtype or parts.dtype), total
