"""Fingerprints of tensors that compare as numbers: stable over machines, yet changed by what matters.

A hash of a computed weight changes with the order in which a machine adds. So a tensor is kept as its root mean square
and a few projections on fixed vectors of signs, divided by its norm: each is about N(0, 1), and when part of the tensor
changes by a fraction e of its norm, each moves by about e. Swapped heads move them by about 1, a scale that is off by
1e-3 moves the root mean square by that, and rounding moves both by 1e-7.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PROJECTIONS = 3
CHUNK = 1 << 20  # numbers at a time; a multiple of 64
LARGE = 1e30  # stands for an infinity, NaN for its half: a mask's table holds the former
DIGITS = 6


def sketch(tensor: Tensor) -> tuple[float, tuple[float, ...]]:
    """The fingerprint of a tensor of any dtype and shape: its root mean square, its projections divided by its norm."""
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = flat.detach().reshape(-1).cpu()
    squares, sums = 0.0, np.zeros(PROJECTIONS)
    generators = [np.random.Philox(key=k) for k in range(PROJECTIONS)]
    for start in range(0, flat.numel(), CHUNK):
        part = torch.nan_to_num(flat[start : start + CHUNK].double(), nan=LARGE / 2, posinf=LARGE, neginf=-LARGE)
        values = part.numpy()
        squares += float(values @ values)
        sums += [values @ _signs(g, len(values)) for g in generators]
    norm = math.sqrt(squares)
    rms = _rounded(math.sqrt(squares / max(flat.numel(), 1)))
    return rms, tuple(_rounded(float(s) / norm) if norm else 0.0 for s in sums)


def project(values: Tensor) -> tuple[float, ...]:
    """Projections of one row [N], divided by the root of its length."""
    held: NDArray[np.float64] = values.detach().double().cpu().numpy()
    signs = [_signs(np.random.Philox(key=k), len(held)) for k in range(PROJECTIONS)]
    return tuple(_rounded(float(held @ s) / math.sqrt(len(held)), DIGITS + 1) for s in signs)


def tokens(vocabulary: int, batch: int, length: int) -> Tensor:
    """Token ids [batch, length], the same ones everywhere."""
    drawn = np.random.Philox(key=PROJECTIONS).random_raw(batch * length) % np.uint64(vocabulary)
    return torch.from_numpy(drawn.astype(np.int64)).reshape(batch, length)


def _signs(generator: np.random.Philox, count: int) -> NDArray[np.float64]:
    """+1 and -1, from the raw stream of a bit generator, which numpy promises to keep; what it draws may change."""
    words = np.asarray(generator.random_raw(-(-count // 64)), dtype="<u8")
    return np.unpackbits(words.view(np.uint8))[:count].astype(np.float64) * 2 - 1


def _rounded(value: float, digits: int = DIGITS) -> float:
    return float(f"{value:.{digits}g}")
