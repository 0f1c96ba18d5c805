"""The sanitizer catches, in kernels of a few lines, what Triton's interpreter lets pass."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import interpreter  # noqa: F401  (kernels are interpreted, and quicker with it)
from sanitizer import Defect, bfloat16, sanitize

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="checks of interpreted kernels")


@triton.jit
def _copy(x, y, n, shift, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Program p copies elements p * STEP .. p * STEP + BLOCK - 1, below n, to places `shift` further."""
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y + at + shift, tl.load(x + at, mask=at < n), mask=at < n)


def test_a_right_kernel_passes_launch_after_launch() -> None:
    x, y = torch.arange(100.0), torch.zeros(100)
    with sanitize():
        for _ in range(2):  # what one launch wrote, another may write or read
            _copy[(4,)](x, y, 100, 0, STEP=32, BLOCK=32)
            _copy[(2,)](y, x, 100, 0, STEP=64, BLOCK=64)
    assert torch.equal(x, y)


def test_a_load_behind_the_last_element_is_caught() -> None:
    with (
        pytest.raises(
            Defect, match=r"_copy: load of 4 bytes in program \(3, 0, 0\): out of bounds with 1 of 5 elements"
        ),
        sanitize(),
    ):
        _copy[(4,)](torch.zeros(100), torch.zeros(200), 101, 0, STEP=32, BLOCK=32)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_store_before_the_first_and_behind_the_last_element_is_caught(shift: int) -> None:
    with pytest.raises(Defect, match=r"store of 4 bytes .* out of bounds with 1 of 32"), sanitize():
        _copy[(1,)](torch.zeros(32), torch.zeros(32), 32, shift, STEP=32, BLOCK=32)


def test_a_view_ends_where_its_last_element_does() -> None:
    storage = torch.zeros(200)
    with (
        pytest.raises(Defect, match=r"load .* out of bounds with 28 of 128 elements, the first 400 bytes into"),
        sanitize(),
    ):
        _copy[(1,)](storage[:100], torch.zeros(128), 128, 0, STEP=128, BLOCK=128)


def test_no_element_of_an_empty_tensor_may_be_touched() -> None:
    with pytest.raises(Defect, match="out of bounds"), sanitize():
        _copy[(1,)](torch.zeros(0), torch.zeros(4), 4, 0, STEP=4, BLOCK=4)


def test_programs_that_write_one_address_are_caught() -> None:
    message = r"store .* in program \(1, 0, 0\): a race, the address is written by program \(0, 0, 0\)"
    with pytest.raises(Defect, match=message), sanitize():
        _copy[(2,)](torch.zeros(64), torch.zeros(64), 48, 0, STEP=31, BLOCK=32)


def test_a_program_that_reads_what_another_writes_is_caught_in_either_order() -> None:
    x = torch.zeros(96)
    with pytest.raises(Defect, match=r"load .* race, the address is written by program \(0, 0, 0\)"), sanitize():
        _copy[(2,)](x, x, 64, 32, STEP=32, BLOCK=32)
    with pytest.raises(Defect, match=r"store .* race, the address is read by program \(0, 0, 0\)"), sanitize():
        _copy[(2,)](x[32:], x, 64, 0, STEP=32, BLOCK=32)


def test_a_program_may_write_what_it_read_itself() -> None:
    x = torch.arange(64.0)
    with sanitize():
        _copy[(2,)](x, x, 64, 0, STEP=32, BLOCK=32)


@triton.jit
def _fold(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at // 2, tl.load(x + at))


def test_two_lanes_that_write_one_address_are_caught() -> None:
    with pytest.raises(Defect, match=r"_fold: store .* one address is written twice"), sanitize():
        _fold[(1,)](torch.zeros(8), torch.zeros(8), BLOCK=8)


@triton.jit
def _words(x, y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y.to(tl.pointer_type(tl.int32)) + at, tl.load(x.to(tl.pointer_type(tl.int32)) + at))


def test_bytes_may_be_copied_as_words_where_they_are_aligned() -> None:
    x, y = torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    with sanitize():
        _words[(2,)](x, y, BLOCK=8)
    assert torch.equal(x, y)
    with pytest.raises(Defect, match=r"load of 4 bytes .* misaligned"), sanitize():
        _words[(1,)](x[1:], y, BLOCK=8)


@triton.jit
def _count(x, y, BLOCK: tl.constexpr):
    tl.atomic_add(y, tl.sum(tl.load(x + tl.arange(0, BLOCK))))


def test_atomics_may_meet_but_not_leave_their_tensor() -> None:
    y = torch.zeros(1)
    with sanitize():
        _count[(3,)](torch.ones(8), y, BLOCK=8)
    assert y.item() == 24
    with pytest.raises(Defect, match=r"atomic .* out of bounds"), sanitize():
        _count[(3,)](torch.ones(8), y[:0], BLOCK=8)


def test_what_a_kernel_raises_itself_is_left_alone() -> None:
    with pytest.raises(Exception, match="missing 1 required positional argument"), sanitize():
        _fold[(1,)](torch.zeros(8), BLOCK=8)


def test_huge_tensors_cost_nothing_where_they_are_not_touched() -> None:
    x = torch.empty(2**31 + 64, dtype=torch.uint8)
    x[:32] = 7
    with sanitize():
        _copy[(1,)](x, x, 32, 2**31, STEP=32, BLOCK=32)
    assert x[2**31 : 2**31 + 32].eq(7).all()


# ---------------------------------------------------------------------- bfloat16


@triton.jit
def _bfloat16(x, y, dot, total, peak, rest, N: tl.constexpr):
    """dot = x y, total and peak over the rows of x, and rest = where(x > y, x - 2 y, -x); all in bfloat16 but dot."""
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(dot + at, tl.dot(a, b, input_precision="ieee"))
    tl.store(total + tl.arange(0, N), tl.sum(a, 1))
    tl.store(peak + tl.arange(0, N), tl.max(a, 1))
    tl.store(rest + at, tl.where(a > b, a - b * 2, -a))


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    torch.manual_seed(0)
    n = 32
    x, y = torch.randn(2, n, n).bfloat16()
    dot, total, peak, rest = torch.zeros(n, n), torch.zeros(n), torch.zeros(n), torch.zeros(n, n)
    outputs = [dot, total.bfloat16(), peak.bfloat16(), rest.bfloat16()]
    with bfloat16():
        _bfloat16[(1,)](x, y, *outputs, N=n)
    dot, total, peak, rest = outputs
    assert torch.allclose(dot, x.float() @ y.float(), atol=1e-5)
    assert torch.allclose(total.float(), x.float().sum(1), rtol=2**-8)
    assert torch.equal(peak, x.amax(1))
    assert torch.equal(rest, torch.where(x > y, x - y * 2, -x))


@triton.jit
def _cast(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32])
def test_casts_to_bfloat16_round_to_nearest_even(source: torch.dtype) -> None:
    ties = (torch.arange(512, dtype=torch.int32) * 2**15 + 0x3F800000).view(torch.float32)
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, -1e-45], dtype=torch.float32)
    x = torch.cat([ties, torch.randn(504) * 100, odd])
    x = x.nan_to_num().clamp(-1e6, 1e6).to(source) if source == torch.int32 else x.to(source)
    y = torch.zeros(1024, dtype=torch.bfloat16)
    with bfloat16():
        _cast[(1,)](x, y, BLOCK=1024)
    assert torch.equal(y.view(torch.int16)[:-4], x.bfloat16().view(torch.int16)[:-4]) or source == torch.float32
    assert torch.equal(y.isnan(), x.bfloat16().isnan())
    assert torch.equal(y.nan_to_num(), x.bfloat16().nan_to_num())


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.int32])
def test_casts_from_bfloat16_keep_its_value(target: torch.dtype) -> None:
    x = torch.cat([torch.randn(1020) * 100, torch.tensor([0.0, -0.0, 1e-39, -1e-40])]).bfloat16()
    y = torch.zeros(1024, dtype=target)
    with bfloat16():
        _cast[(1,)](x, y, BLOCK=1024)
    assert torch.equal(y, x.to(target))
