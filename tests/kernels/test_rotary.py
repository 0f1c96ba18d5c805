"""Rotation and the write into a cache in one launch, against complex numbers in float64 and the layouts of caches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import interpreter  # noqa: F401  (kernels are interpreted, and quicker with it)
from kvpass.ir.kv_layout import Layout
from kvpass.kernels.rotary import rope_append, rope_append_reference
from kvpass.kernels.store import Store
from sanitizer import sanitize

STORES = {
    "dense": Store(),
    "ring": Store(window=5),
    "ring with sinks": Store(window=4, sinks=3),
    "pages": Store(page=4),
    "pages of a window": Store(page=8, window=9, sinks=2),
}
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """Arguments of `rope_append`; the cache is all NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    starts: Tensor
    stops: Tensor | None
    store: Store
    interleaved: bool
    room: int
    cache_dtype: torch.dtype

    def cache(self) -> list[Tensor]:
        """Fresh tensors for `room` tokens per row; pages in no order, one missing and two that are nobody's."""
        rows, heads, _, dim = self.k.shape
        dims = (dim, self.v.shape[3])
        if self.store.page:
            blocks = -(-self.room // self.store.page)
            order = torch.randperm(rows * blocks, generator=torch.Generator().manual_seed(1)).view(rows, blocks)
            order[0, 1] = -1
            pools = [
                torch.full((rows * blocks + 2, heads, self.store.page, d), NAN, dtype=self.cache_dtype) for d in dims
            ]
            return [*pools, order.to(torch.int32)]
        slots = self.store.sinks + self.store.window if self.store.window else self.room
        return [torch.full((rows, heads, slots, d), NAN, dtype=self.cache_dtype) for d in dims]

    def run(self, function: Any = rope_append) -> tuple[Tensor, list[Tensor]]:
        cache = self.cache()
        with sanitize():
            out = function(
                self.q, self.k, self.v, self.cos, self.sin, cache, self.starts, self.stops, self.store,
                interleaved=self.interleaved,
            )  # fmt: skip
        return out, cache

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """The reference in float64."""
        tensors = {name: getattr(self, name).double() for name in ("q", "k", "v", "cos", "sin")}
        return replace(self, **tensors, cache_dtype=torch.float64).run(rope_append_reference)


def case(
    starts: tuple[int, ...] = (0, 7),
    length: int = 6,
    heads: tuple[int, int] = (6, 2),
    dim: int = 16,
    value_dim: int = 12,
    pairs: int | None = None,
    dtype: torch.dtype = torch.float32,
    stops: tuple[int, ...] | None = None,
    store: Store = STORES["dense"],
    interleaved: bool = False,
    room: int = 24,
    shared: bool = False,
) -> Case:
    """Random tokens at the positions they are at; `shared` takes the angles of the first row for all."""
    made = torch.Generator().manual_seed(dim + length)
    rows, pairs = len(starts), dim // 2 if pairs is None else pairs
    q, k, v = (
        torch.randn(rows, n, length, d, generator=made).to(dtype)
        for n, d in ((heads[0], dim), (heads[1], dim), (heads[1], value_dim))
    )
    first = torch.tensor(starts)
    where = (first[:1] if shared else first).view(-1, 1) + torch.arange(length)
    angle = where.unsqueeze(-1) * 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    cos, sin = angle.cos().float(), angle.sin().float()
    last = None if stops is None else torch.tensor(stops)
    return Case(q, k, v, cos, sin, first, last, store, interleaved, room, dtype)


def turned(x: Tensor, made: Case) -> Tensor:
    """x [B, H, S, D] rotated as complex numbers."""
    pairs = made.cos.shape[2]
    turn = torch.complex(made.cos.double(), made.sin.double()).unsqueeze(1)
    head, tail = x[..., : 2 * pairs].double(), x[..., 2 * pairs :].double()
    if made.interleaved:
        z = torch.view_as_complex(head.unflatten(-1, (pairs, 2)).contiguous()) * turn
        return torch.cat([torch.view_as_real(z).flatten(-2), tail], dim=-1)
    z = torch.complex(head[..., :pairs], head[..., pairs:]) * turn
    return torch.cat([z.real, z.imag, tail], dim=-1)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, of the largest value, where something was written; infinite where that is not the same."""
    if not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    size = expected.nan_to_num().abs().max().clamp(min=1e-30)
    return float((found - expected).nan_to_num().abs().max() / size)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [8, 5])
def test_the_reference_multiplies_by_complex_numbers(interleaved, pairs):
    made = case(pairs=pairs, interleaved=interleaved)
    out, (keys, values) = made.exact()
    assert error(out, turned(made.q, made)) < 1e-15
    for row, start in enumerate(made.starts.tolist()):
        assert error(keys[row, :, start : start + 6], turned(made.k, made)[row]) < 1e-15
        assert torch.equal(values[row, :, start : start + 6], made.v[row].double())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("dim", "value_dim", "pairs"), [(8, 8, 4), (20, 6, 10), (64, 64, 8), (80, 64, 20), (256, 40, 128)]
)
def test_heads_of_any_width_rotate_wholly_or_in_part(dim, value_dim, pairs, interleaved):
    made = case(dim=dim, value_dim=value_dim, pairs=pairs, interleaved=interleaved)
    (out, cache), (exact, exact_cache) = made.run(), made.exact()
    assert error(out, exact) < 2e-6
    assert error(cache[0], exact_cache[0]) < 2e-6
    assert error(cache[1], exact_cache[1]) == 0
    assert torch.equal(out[..., 2 * pairs :], made.q[..., 2 * pairs :])


@pytest.mark.parametrize("stops", [None, (3, 15)])
@pytest.mark.parametrize("length", [1, 2, 13])
@pytest.mark.parametrize("name", STORES)
def test_tokens_go_where_the_store_has_them_and_nowhere_else(name, length, stops):
    made = case(starts=(1, 9), length=length, store=STORES[name], stops=stops)
    (out, cache), (exact, exact_cache) = made.run(), made.exact()
    assert error(out, exact) < 2e-6
    assert error(cache[0], exact_cache[0]) < 2e-6
    assert error(cache[1], exact_cache[1]) == 0


@pytest.mark.parametrize("name", ["dense", "pages"])
def test_tokens_behind_the_last_slot_are_not_written(name):
    made = case(starts=(0, 9), length=6, store=STORES[name], room=12)
    (out, cache), (exact, exact_cache) = made.run(), made.exact()
    assert error(out, exact) < 2e-6
    assert error(cache[0], exact_cache[0]) < 2e-6
    assert error(cache[1], exact_cache[1]) == 0


@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize("name", STORES)
def test_addresses_are_those_of_the_layouts(name, length):
    made = case(starts=(1, 9), length=length, store=STORES[name])
    _, cache = made.run()
    store, expected = made.store, made.cache()
    layout = Layout(window=store.window, sinks=store.sinks, page=store.page)
    k = turned(made.k, made).float()
    layout.exchange(
        expected, k, made.v, made.starts, None, end=9 + length, ragged=True, first=True, last=True
    )  # fmt: skip
    for pool in (*cache[:2], *expected[:2]):
        if store.page:
            pool[-1] = 0.0  # where the layout puts what has no page
    assert error(cache[0], expected[0]) < 2e-6
    assert error(cache[1], expected[1]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_half_precision_is_rounded_once(dtype, interleaved):
    made = case(dim=80, pairs=16, dtype=dtype, interleaved=interleaved, store=STORES["pages"])
    (out, cache), (exact, exact_cache) = made.run(), made.exact()
    assert out.dtype == cache[0].dtype == dtype
    epsilon = torch.finfo(dtype).eps
    assert bool(((out - exact).abs() <= 0.5001 * epsilon * exact.abs().clamp(min=1e-4)).all())
    written, wanted = cache[0], exact_cache[0]
    assert torch.equal(written.isnan(), wanted.isnan())
    assert bool(((written - wanted).nan_to_num().abs() <= 0.5001 * epsilon * wanted.nan_to_num().abs() + 1e-7).all())
    assert error(cache[1], exact_cache[1]) == 0


@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_are_rounded_to_the_dtype_of_the_cache_and_not_to_their_own(interleaved):
    made = replace(case(dtype=torch.float16, interleaved=interleaved), cache_dtype=torch.float32)
    _, cache = made.run()
    assert error(cache[0], made.exact()[1][0]) < 2e-7


def test_one_row_of_angles_serves_all_rows():
    made = case(starts=(3, 3), shared=True)
    assert made.cos.shape[0] == 1
    assert error(made.run()[0], made.exact()[0]) < 2e-6
    assert error(case(starts=(3, 7), shared=True).run()[0], case(starts=(3, 7)).exact()[0]) > 1e-3


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_table_that_repeats_its_angles_is_passed_as_a_view(interleaved):
    made = case(interleaved=interleaved)
    if interleaved:
        cos, sin = made.cos.repeat_interleave(2, dim=2)[..., ::2], made.sin.repeat_interleave(2, dim=2)[..., ::2]
    else:
        cos, sin = torch.cat([made.cos] * 2, dim=2)[..., :8], torch.cat([made.sin] * 2, dim=2)[..., :8]
    assert torch.equal(replace(made, cos=cos, sin=sin).run()[0], made.run()[0])
    assert torch.equal(replace(made, cos=cos).run()[0], made.run()[0])  # of other strides than sin


def test_one_pairing_is_not_the_other():
    made = case()
    assert error(replace(made, interleaved=True).run()[0], made.exact()[0]) > 1e-3
    assert error(replace(made, sin=-made.sin).run()[0], made.exact()[0]) > 1e-3


def test_scores_depend_on_distance_alone():
    def at(position: int) -> Tensor:  # the same token
        return case(starts=(position,), length=1).run()[0][0, 0, 0]

    torch.testing.assert_close(at(12) @ at(7), at(5) @ at(0))
    assert abs(float(at(12) @ at(0) - at(5) @ at(0))) > 1e-3


def test_slices_of_one_projection_are_read_where_they_lie():
    made = case()
    joined = torch.full((2, 6, 10, 16), NAN)  # q, k and v of a token side by side, values narrower
    q, k, v = (joined[:, :, part].transpose(1, 2) for part in (slice(0, 6), slice(6, 8), slice(8, 10)))
    v = v[..., :12]
    for view, x in ((q, made.q), (k, made.k), (v, made.v)):
        view.copy_(x)
    (out, cache), (expected, expected_cache) = replace(made, q=q, k=k, v=v).run(), made.run()
    assert torch.equal(out, expected)
    assert all(error(a, b) == 0 for a, b in zip(cache, expected_cache, strict=True))


def test_many_tokens_take_several_programs():
    made = case(starts=(0, 3), length=200, heads=(3, 1), dim=64, value_dim=64, room=210)
    (out, cache), (exact, exact_cache) = made.run(), made.exact()
    assert error(out, exact) < 2e-6
    assert error(cache[0], exact_cache[0]) < 2e-6
    assert error(cache[1], exact_cache[1]) == 0


def test_pages_beyond_two_to_the_31_elements():
    made = case(starts=(5,), length=1, store=Store(page=4), dtype=torch.float16)
    stride = 2**29
    far = torch.empty(6 * stride, dtype=torch.float16)  # never touched but for one token
    pools = [far.as_strided((6, 2, 4, d), (stride, 64, 16, 1), 256 * n) for n, d in enumerate((16, 12))]
    table = torch.tensor([[-1, 5, -1]])
    rope_append(
        made.q, made.k, made.v, made.cos, made.sin, [*pools, table], made.starts, None, made.store, interleaved=False
    )
    torch.testing.assert_close(pools[0][5, :, 1], turned(made.k, made)[0, :, 0].half())
    assert torch.equal(pools[1][5, :, 1], made.v[0, :, 0])


def test_what_is_not_written_is_refused_with_a_way_out():
    made = case()
    with pytest.raises(ValueError, match="rotate first, then `append`"):
        replace(made, store=Store(bits=8)).run()
    with pytest.raises(ValueError, match=r"pass a view of every other column \(interleaved\) or of the first half"):
        replace(made, cos=torch.ones(2, 6, 16), sin=torch.ones(2, 6, 16)).run()
    with pytest.raises(ValueError, match="contiguous"):
        replace(made, k=made.k.transpose(2, 3).contiguous().transpose(2, 3)).run()
