"""Kernels of a few lines for `test_aot.py`, each but the first with one defect that shows only in compiled code."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvpass.kernels.aot import Case


@triton.jit(do_not_specialize=["n"])
def good(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def recompiles(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def bytewise(x, y, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The alignment of rows is not known."""
    at = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    tl.store(y + tl.arange(0, ROWS), tl.sum(tl.load(x + at).to(tl.int32), 1))


@triton.jit
def spills(x, y, N: tl.constexpr):
    """A tile that is larger than the registers it is given."""
    at = tl.arange(0, N)
    row, column = tl.load(x + at), tl.load(x + N + at)
    tile = row[:, None] * column[None, :]
    tl.store(y + at, tl.sum(tile / tl.sum(tl.exp2(tile), 0)[None, :], 1))


@triton.jit
def overfull(x, y, count, M: tl.constexpr, K: tl.constexpr):
    """A pipeline of more tiles than shared memory holds."""
    at = tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :]
    total = tl.zeros((M, M), tl.float32)
    for i in range(count):
        a, b = tl.load(x + i * M * K + at), tl.load(x + (i + 1) * M * K + at)
        total = tl.dot(a, tl.trans(b), total)
    tl.store(y + tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :], total)


@triton.jit
def refused(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), sum([1.0, 2.0]))


def _lengths(kernel: triton.JITFunction) -> None:
    x, y = torch.zeros(2, 128)
    for n in (1, 16, 17, 99, 100, 128):
        kernel[(1,)](x, y, n, BLOCK=128)


def cases(target: str) -> list[Case]:
    codes, sums = torch.zeros(64, 129, dtype=torch.uint8), torch.zeros(64, dtype=torch.int32)
    square, halves = torch.zeros(128, 128), torch.zeros(8, 128, 256, dtype=torch.float16)
    few = {"waves_per_eu": 8} if target.startswith("gfx") else {"maxnreg": 32}
    return [
        Case("any length", lambda: _lengths(good)),
        Case("length is looked at", lambda: _lengths(recompiles)),
        Case("rows of 129 bytes", lambda: bytewise[(1,)](codes, sums, 129, 64, 128)),
        Case("few registers", lambda: spills[(1,)](square, square, 64, num_warps=1, **few)),
        Case("three stages", lambda: overfull[(1,)](halves, square, 7, 128, 256, num_warps=8, num_stages=3)),
        Case("a sum of Python", lambda: refused[(1,)](square, 64)),
    ]
