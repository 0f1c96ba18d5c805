"""What the kernels share: a function that Triton lacks everywhere, and how tensors are handed to them."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """tanh of float32 values to some 2e-7 of each, without libdevice."""
    size = tl.abs(x)
    t = tl.exp2(size * (-2 * _LOG2E))
    far = (1 - t) / (1 + t)
    far = tl.where(x < 0, -far, far)
    # 1 - t cancels near zero, where most scores are; the series to x^9 is exact to float32 up to 0.3
    z = x * x
    near = x * (1 + z * (-1 / 3 + z * (2 / 15 + z * (-17 / 315 + z * (62 / 2835)))))
    return tl.where(size < 0.3, near, far)


def alignment(*tensors: Tensor) -> int:
    """The largest power of two up to 16 that divides all strides in elements, but for the last ones, which are 1.

    A compiler that knows it reads and writes vectors; lengths are multiplied by it, so it does not change with them.
    """
    return math.gcd(16, *(stride for x in tensors for stride in x.stride()[:-1]))


def rows(x: Tensor) -> Tensor:
    """x with its channels one after another."""
    return x if x.stride(-1) == 1 else x.contiguous()
