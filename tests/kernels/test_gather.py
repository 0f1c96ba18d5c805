"""Tokens and pages that change places keep every bit, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import triton
from torch import Tensor

import interpreter  # noqa: F401  (kernels are interpreted, and quicker with it)
from kvpass.kernels.gather import (
    compact,
    compact_into,
    compact_reference,
    copy_pages,
    copy_pages_reference,
    scatter_pages,
    scatter_pages_reference,
)
from sanitizer import sanitize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def checked():
    """Launches under the sanitizer where kernels are interpreted."""
    return sanitize() if triton.knobs.runtime.interpret else nullcontext()


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random bytes: as floats, NaNs of every kind are among them."""
    size = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=generator).view(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ---------------------------------------------------------------------- tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 8, 20, 80])
def test_survivors_keep_every_bit(dtype, dim):
    x = noise(2, 3, 50, dim, dtype=dtype)
    for heads in (1, 3):
        index = torch.randint(0, 50, (2, heads, 37), generator=torch.Generator(DEVICE).manual_seed(1))
        index[:, :, 30:] = -1
        index[0, 0, 3] = -1
        with checked():
            got = compact(x, index)
        assert same(got, compact_reference(x, index))
        assert (got.view(torch.uint8)[:, :, 30:] == 0).all()
        assert same(got[1, 2, :30], x[1, 2, index[1, -1, :30]])


def test_tokens_and_indices_may_lie_in_any_order_in_memory():
    x = noise(2, 40, 3, 16).transpose(1, 2)
    index = torch.arange(39, -1, -1).view(1, 40, 1).expand(2, 40, 3).transpose(1, 2)
    with checked():
        assert same(compact(x, index), x.flip(2))


def test_an_index_behind_the_end_names_nothing():
    x = noise(1, 1, 4, 8)
    with checked():
        got = compact(x, torch.tensor([[[3, 4, 2**40]]]))
    assert same(got, torch.cat([x[:, :, 3:], torch.zeros(1, 1, 2, 8)], dim=2))


def test_no_survivors_are_no_work():
    assert compact(noise(1, 1, 4, 8), torch.zeros(1, 1, 0, dtype=torch.int64)).shape == (1, 1, 0, 8)


def test_survivors_fill_the_first_slots_of_a_store_and_no_others():
    kinds = [(12, torch.uint8), (2, torch.float16), (20, torch.uint8), (2, torch.float16)]
    pieces = [noise(2, 3, 40, dim, dtype=dtype, seed=i) for i, (dim, dtype) in enumerate(kinds)]
    cache = [noise(2, 3, 64, dim, dtype=dtype, seed=9) for dim, dtype in kinds]
    expected = [x.clone() for x in cache]
    index = torch.stack([torch.arange(3, 38), torch.arange(5, 40)]).unsqueeze(1)
    with checked():
        compact_into(cache, pieces, index)
    for got, before, piece in zip(cache, expected, pieces, strict=True):
        before[:, :, :35] = torch.stack([piece[0, :, 3:38], piece[1, :, 5:40]])
        assert same(got, before)


# ---------------------------------------------------------------------- pages


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("page", [1, 3, 16])
def test_tokens_are_scattered_into_the_pages_of_their_rows(dtype, page):
    blocks = -(-45 // page)
    table = torch.randperm(2 * blocks, generator=torch.Generator(DEVICE).manual_seed(2)).view(2, blocks)
    table[1, 1] = -1
    x = noise(2, 3, 40, 20, dtype=dtype)
    for starts, stops, length in (([0, 5], None, 40), ([4, 0], [30, 9], 40), ([7, 44], None, 1), ([44, 44], None, 9)):
        got = noise(2 * blocks + 1, 3, page, 20, dtype=dtype, seed=3)
        expected = got.clone()
        begin, end = torch.tensor(starts), None if stops is None else torch.tensor(stops)
        with checked():
            scatter_pages(got, x[:, :, :length], table, begin, end)
        scatter_pages_reference(expected, x[:, :, :length], table, begin, end)
        assert same(got, expected)
        assert same(got[-1], noise(2 * blocks + 1, 3, page, 20, dtype=dtype, seed=3)[-1])


def test_whole_pages_are_copied_in_every_pool():
    pools = [noise(9, 3, 16, dim, dtype=dtype) for dim, dtype in ((64, torch.float16), (2, torch.float16))]
    pools += [noise(9, 3, 5, 20, dtype=torch.uint8), noise(18, 3, 16, 64)[::2]]
    expected = [x.clone() for x in pools]
    source, target = torch.tensor([3, 3, 0, -1, 5, 9]), torch.tensor([1, 8, 2, 4, -1, 6])
    with checked():
        copy_pages(pools, source, target)
    copy_pages_reference(expected, source, target)
    for got, reference in zip(pools, expected, strict=True):
        assert same(got, reference)
        assert same(got[8], got[3])


# ---------------------------------------------------------------------- large memories


def test_addresses_beyond_31_bits_are_right():
    stride = 2**30 + 64
    memory = torch.empty(4 * stride, dtype=torch.uint8)  # never touched but at the places of the tokens
    far = memory.as_strided((4, 1, 4, 8), (stride, 32, 8, 1))
    x = noise(4, 1, 4, 8, dtype=torch.uint8)
    far.copy_(x)
    index = torch.tensor([3, 1]).expand(4, 1, 2)
    assert same(compact(far, index), x[:, :, [3, 1]])
    compact_into([far], [x.flip(2)], index)
    assert same(far[:, :, :2], x.flip(2)[:, :, [3, 1]])
    scatter_pages(far, x[:, :, :2], torch.tensor([[3], [2], [1], [0]]), torch.tensor([2] * 4), None)
    assert same(far[:, :, 2:], x.flip(0)[:, :, :2])
    copy_pages([far], torch.tensor([3]), torch.tensor([2]))
    assert same(far[2], far[3])
    token = memory.as_strided((1, 1, 4, 8), (stride, stride, stride, 1))
    assert same(compact(token, torch.tensor([[[3, 2]]]))[0, 0], token[0, 0, [3, 2]])
