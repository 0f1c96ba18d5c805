"""Column sums of attention by the kernel, against the matrix in float64 that it never forms."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

import interpreter  # noqa: F401  (kernels are interpreted, and quicker with it)
from kvpass.ir.attention import scored, shared_out, visible
from kvpass.kernels.column_mass import column_mass, column_mass_reference, tanh
from sanitizer import sanitize

PLAIN: dict[str, Any] = {
    "causal": True, "strict": False, "window": 0, "sinks": 0, "softcap": 0.0, "alibi_slopes": None,
}  # fmt: skip
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.05, 0.02, 0.01])
MASKS: dict[str, dict[str, Any]] = {
    "everything": {"causal": False},
    "causal": {},
    "strict": {"strict": True},
    "window": {"window": 40},
    "sinks": {"window": 40, "sinks": 4},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": SLOPES},
    "window without causal": {"causal": False, "window": 150},
    "all at once": {"strict": True, "window": 60, "sinks": 3, "softcap": 2.0, "alibi_slopes": SLOPES},
}
DROPPED = {"causal": {"causal": False}, "softcap": {"softcap": 0.0}, "alibi": {"alibi_slopes": None}} | {
    "strict": {"strict": False}, "window": {"window": 0}, "sinks": {"sinks": 0},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Arguments of `column_mass`, with the log-sum-exp in float64."""

    q: Tensor
    k: Tensor
    lse: Tensor
    weights: Tensor
    q_positions: Tensor
    k_positions: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def kernel(self) -> Tensor:
        with sanitize():
            tensors = (self.q, self.k, self.lse.float(), self.weights, self.q_positions, self.k_positions)
            return column_mass(*tensors, **self.options)

    def reference(self, dtype: torch.dtype = torch.float64, **other: Any) -> Tensor:
        q, k = self.q.to(dtype), self.k.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        tensors = (q, k, self.lse.to(wide), self.weights.to(wide), self.q_positions, self.k_positions)
        return column_mass_reference(*tensors, **(self.options | other))


def case(
    rows: int = 2,
    heads: tuple[int, int] = (6, 2),
    queries: int = 50,
    keys: int = 300,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    lengths: Tensor | None = None,
    **masks: Any,
) -> Case:
    """Random queries, the last ones of each row unless said otherwise, with the log-sum-exps that attention has."""
    made = torch.Generator().manual_seed(dim + keys)
    q = torch.randn(rows, heads[0], queries, dim, generator=made).to(dtype)
    k = torch.randn(rows, heads[1], keys, dim, generator=made).to(dtype)
    if q_positions is None:
        q_positions = torch.arange(keys - queries, keys).expand(rows, -1)
    options = PLAIN | masks | {"scale": 2 * dim**-0.5, "lengths": lengths}
    weights = torch.rand(rows, queries, generator=made) + 0.1
    scores = scores_of(q, k, q_positions, k_positions, options)
    lse = torch.logsumexp(scores, dim=-1).flatten(1, 2)
    return Case(q, k, lse, weights, q_positions, k_positions, options)


def scores_of(q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor | None, options: dict[str, Any]) -> Tensor:
    """[B, Hkv, G, R, T] in float64, by the dialect's own arithmetic."""
    query_pos = q_positions[:, None, None, :, None]
    order = torch.arange(k.shape[2])
    key_pos = (order.view(1, 1, -1) if k_positions is None else k_positions.long())[:, :, None, None]
    seen = (key_pos >= 0) & (query_pos >= 0)
    if options["lengths"] is not None:
        seen = seen & (order < options["lengths"].view(-1, 1, 1, 1, 1))
    inside = visible(query_pos, key_pos, **{name: options[name] for name in ("causal", "strict", "window", "sinks")})
    seen = seen if inside is None else seen & inside
    slopes, bias = options["alibi_slopes"], None
    if slopes is not None:
        bias = slopes.double().view(1, k.shape[1], -1, 1, 1) * (key_pos - query_pos)
        bias = bias.expand(len(q), *bias.shape[1:])
    shape = (len(q), k.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2])
    return scored(q.double(), k.double(), seen.expand(shape), bias, options["scale"], options["softcap"])


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("mask", MASKS)
def test_the_reference_sums_the_columns_of_the_softmax(mask):
    made = case(rows=2, queries=30, keys=70, **MASKS[mask])
    scores = scores_of(made.q, made.k, made.q_positions, None, made.options)
    shares = shared_out(scores, None, may_be_empty=True)
    expected = torch.einsum("bngrt,br->bnt", shares, made.weights.double()) / 3
    assert error(made.reference(), expected) < 1e-13


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_is_counted_as_the_reference_counts_it(mask):
    made = case(**MASKS[mask])
    assert error(made.kernel(), made.reference()) < 2e-6


@pytest.mark.parametrize("name", DROPPED)
def test_a_mask_that_is_dropped_would_be_noticed(name):
    made = case(**MASKS[name])
    assert error(made.kernel(), made.reference(**DROPPED[name])) > 1e-3


@pytest.mark.parametrize("dim", [5, 8, 64, 80, 256])
@pytest.mark.parametrize("heads", [(2, 2), (7, 1), (6, 2)])
def test_heads_of_any_width_and_groups_of_any_size(dim, heads):
    made = case(rows=1, heads=heads, queries=43, keys=150, dim=dim)
    assert error(made.kernel(), made.reference()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", ["causal", "all at once"])
def test_half_precision_is_as_near_as_torch_in_that_precision(dtype, mask):
    made = case(dim=64, dtype=dtype, **MASKS[mask])
    expected = made.reference()
    # scores stay in float32, so it should be far nearer
    assert error(made.kernel(), expected) <= min(2 * error(made.reference(dtype), expected), 1e-5)


def test_no_mass_is_lost():
    made = case(rows=2, queries=300, keys=300, **MASKS["softcap"])
    found = made.kernel().sum(dim=2)
    assert error(found, made.weights.double().sum(dim=1, keepdim=True).expand_as(found)) < 1e-6


def test_the_position_of_each_entry_counts_and_not_its_place():
    made = case(**MASKS["sinks"])
    order = torch.stack([torch.randperm(300, generator=torch.Generator().manual_seed(n)) for n in range(4)])
    order = order.view(2, 2, 300)
    for index in (order[:, :1], order):  # all heads alike, and each its own
        k = made.k.gather(2, index.expand(-1, 2, -1).unsqueeze(-1).expand_as(made.k))
        shuffled = replace(made, k=k, k_positions=index.int())
        assert error(shuffled.kernel(), made.reference().gather(2, index.expand(-1, 2, -1))) < 2e-6
        assert error(shuffled.kernel(), replace(shuffled, k_positions=None).reference()) > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_absent_queries_and_keys_weigh_nothing_whatever_they_hold(causal):
    q_positions = torch.arange(250, 300).repeat(2, 1)
    q_positions[0, :7] = -1
    q_positions[1, 20:] = -1
    places = torch.arange(300).repeat(2, 1, 1)
    places[0, :, 100:260] = -1
    places[1, :, ::3] = -1
    made = case(q_positions=q_positions, k_positions=places, causal=causal)
    made = replace(made, lse=made.lse.nan_to_num(neginf=5.0))  # that of a query that is there
    clean = made.kernel()
    assert error(clean, made.reference()) < 2e-6
    assert not clean.masked_select(places < 0).any()
    assert error(clean, replace(made, q_positions=q_positions.abs()).reference()) > 1e-3
    nowhere = torch.tensor(float("nan"))
    q = torch.where((q_positions < 0)[:, None, :, None], nowhere, made.q)
    k = torch.where((places < 0).unsqueeze(-1), nowhere, made.k)
    lse = made.lse.masked_fill((q_positions < 0).unsqueeze(1), float("nan"))
    weights = made.weights.masked_fill(q_positions < 0, float("nan"))
    assert torch.equal(replace(made, q=q, k=k, lse=lse, weights=weights).kernel(), clean)


def test_keys_from_a_rows_length_on_are_not_there():
    lengths = torch.tensor([300, 120])
    made = case(lengths=lengths, causal=False)
    found = made.kernel()
    assert error(found, made.reference()) < 2e-6
    assert not found[1, :, 120:].any()
    assert error(found, made.reference(lengths=None)) > 1e-3
    beyond = (torch.arange(300) >= lengths.view(-1, 1)).view(2, 1, 300, 1)
    assert torch.equal(replace(made, k=made.k.masked_fill(beyond, float("nan"))).kernel(), found)


def test_queries_with_nothing_to_read_add_nothing():
    made = case(queries=40, keys=40, strict=True)
    assert bool(made.lse[:, :, 0].isneginf().all())
    found = made.kernel()
    assert error(found, made.reference()) < 2e-6
    assert torch.equal(replace(made, weights=made.weights.index_fill(1, torch.tensor([0]), 1e9)).kernel(), found)
    nobody = replace(made, lse=torch.full_like(made.lse, float("-inf")), options=made.options | {"causal": False})
    assert not nobody.kernel().any()


def test_strided_views_are_read_where_they_lie_and_the_rest_is_poison():
    made = case(queries=30, keys=140)
    around_q, around_k = torch.full((2, 37, 6, 48), float("nan")), torch.full((3, 2, 150, 40), float("nan"))
    q, k = around_q[:, 3:33, :, 8:40].transpose(1, 2), around_k[:2, :, 5:145, 4:36]
    q.copy_(made.q)
    k.copy_(made.k)
    old = Tensor.new_empty

    def poisoned(*arguments: Any, **keywords: Any) -> Tensor:
        made = old(*arguments, **keywords)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    with mock.patch.object(Tensor, "new_empty", poisoned):
        assert torch.equal(replace(made, q=q, k=k).kernel(), made.kernel())


def test_a_row_does_not_depend_on_the_others():
    made = case(rows=3)
    whole = made.kernel()
    for row in range(3):
        part = {name: getattr(made, name)[row : row + 1] for name in ("q", "k", "lse", "weights", "q_positions")}
        assert torch.equal(replace(made, **part).kernel(), whole[row : row + 1])


@pytest.mark.parametrize(("masks", "tiles"), [({"causal": False}, 16), ({}, 10), ({"window": 100}, 7)])
def test_tiles_in_which_nothing_is_read_are_skipped(masks, tiles):
    made = case(rows=1, heads=(1, 1), queries=512, keys=512, dim=8, **masks)
    with mock.patch.object(
        InterpreterBuilder, "create_dot", autospec=True, side_effect=InterpreterBuilder.create_dot
    ) as dots:
        found = column_mass(
            made.q, made.k, made.lse.float(), made.weights, made.q_positions, None, **made.options
        )  # fmt: skip
    assert dots.call_count == tiles
    assert error(found, made.reference()) < 2e-6


@pytest.mark.parametrize("heads", [(4, 2), (4, 1)])
def test_offsets_beyond_two_to_the_31(heads):
    made = case(rows=1, heads=heads, queries=20, keys=70, dim=16, dtype=torch.float16)
    stride = 2**26
    far = torch.empty(70 * stride, dtype=torch.float16)  # never touched but for the rows of k
    k = far.as_strided((1, heads[1], 70, 16), (0, 16, stride, 1))
    k.copy_(made.k)
    assert torch.equal(replace(made, k=k).kernel(), made.kernel())
    q = far.as_strided((1, 4, 20, 16), (0, 2**30 + 64, 64, 1), 1024)
    q.copy_(made.q)
    assert torch.equal(replace(made, q=q).kernel(), made.kernel())


def test_the_last_query_is_read_when_it_is_alone_in_its_tile():
    made = case(rows=1, heads=(2, 2), queries=129, keys=140)
    assert error(made.kernel(), made.reference()) < 2e-6


def test_no_queries_give_no_mass():
    made = case(queries=0, q_positions=torch.empty(2, 0, dtype=torch.int64))
    assert not made.kernel().any()


def test_what_the_kernel_does_not_take_is_refused_with_a_way_out():
    made = case(queries=4, keys=20)
    with pytest.raises(ValueError, match=r"torch.float64 .* use column_mass_reference"):
        replace(made, q=made.q.double(), k=made.k.double()).kernel()
    with pytest.raises(ValueError, match="contiguous"):
        replace(made, k=made.k.transpose(2, 3).contiguous().transpose(2, 3)).kernel()


def test_tanh_is_exact_to_float32_near_zero_and_far_from_it():
    @triton.jit
    def apply(x, y):
        at = tl.arange(0, 4096)
        tl.store(y + at, tanh(tl.load(x + at)))

    size = torch.logspace(-8, 2, 2048)
    x = torch.cat([size, -size])
    y = torch.empty_like(x)
    apply[(1,)](x, y)
    exact = torch.tanh(x.double())
    assert float(((y - exact) / exact).abs().max()) < 4e-7
