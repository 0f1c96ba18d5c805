"""The dialect's ops against a softmax written out in float64, one query at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kvpass.ir import ops

attention, attend = torch.ops.kvpass.attention, torch.ops.kvpass.attend


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def qkv(batch=2, heads=4, kv_heads=2, queries=5, keys=5, dim=6, value_dim=7, dtype=torch.float64, seed=0):
    g = rng(seed)
    return tuple(
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, value_dim))
    )


def naive(q, k, v, sink_logits=None, slopes=None, mask=None, *, scale, causal=True, strict=False, window=0, sinks=0,
          softcap=0.0, first=None):  # fmt: skip
    """Attention by definition; query i of row b stands at first[b] + i."""
    batch, heads, queries, _ = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    first = [keys - queries] * batch if first is None else first
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(heads), range(queries)):
        here = first[b] + i
        weights, values = [], []
        for j in range(keys):
            if ((causal or strict) and j > here) or (strict and j == here):
                continue
            if window and j <= here - window and j >= sinks:
                continue
            score = float(q[b, h, i] @ k[b, h // group, j]) * scale
            if softcap:
                score = softcap * math.tanh(score / softcap)
            if slopes is not None:
                score += float(slopes[h]) * (j - here)
            if mask is not None:
                entry = mask.expand(batch, heads, queries, keys)[b, h, i, j]
                if mask.dtype == torch.bool:
                    if not entry:
                        continue
                else:
                    score += float(entry)
            if score == -math.inf:
                continue
            weights.append(math.exp(score))
            values.append(v[b, h // group, j])
        total = sum(weights) + (math.exp(float(sink_logits[h])) if sink_logits is not None else 0.0)
        for weight, value in zip(weights, values, strict=True):
            out[b, h, i] += weight / total * value
    return out


def assert_naive(q, k, v, *tensors, tolerance=2e-6, **options):
    """Scores and softmax are taken in float32, so that is how near the op can come."""
    found = attention(q, k, v, *tensors, **options)
    torch.testing.assert_close(
        found.double(), naive(q.double(), k.double(), v.double(), *tensors, **options), rtol=tolerance, atol=tolerance
    )


MASKS = {
    "causal": {},
    "strict": {"strict": True},
    "none": {"causal": False},
    "window 1": {"window": 1},
    "window 3": {"window": 3},
    "window 3, 2 sinks": {"window": 3, "sinks": 2},
    "strict window 3, 1 sink": {"window": 3, "sinks": 1, "strict": True},
    "window longer than the keys": {"window": 50, "sinks": 3},
}


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (1, 6), (1, 1), (9, 9), (12, 14), (5, 3)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_attention_is_a_softmax_over_what_a_query_may_read(name, kv_heads, shape):
    q, k, v = qkv(kv_heads=kv_heads, queries=shape[0], keys=shape[1])
    assert_naive(q, k, v, scale=0.4, **MASKS[name])
    assert_naive(q, k, v, scale=1.3, softcap=2.0, **MASKS[name])


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_slopes_and_sink_logits_join_in(name, kv_heads):
    q, k, v = qkv(kv_heads=kv_heads, queries=3, keys=7)
    assert_naive(q, k, v, SINKS, None, None, scale=0.4, **MASKS[name])
    assert_naive(q, k, v, None, SLOPES, None, scale=0.4, **MASKS[name])
    assert_naive(q, k, v, SINKS, SLOPES, None, scale=0.4, softcap=1.5, **MASKS[name])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("shape", [(1, 1, 3, 7), (2, 1, 3, 7), (1, 4, 3, 7), (2, 4, 3, 7), (1, 1, 1, 7)], ids=str)
def test_a_mask_as_a_tensor_means_the_same_whatever_it_is_broadcast_over(shape, kv_heads):
    q, k, v = qkv(kv_heads=kv_heads, queries=3, keys=7)
    seen = torch.rand(shape, generator=rng(3)) > 0.4
    assert_naive(q, k, v, None, None, seen, scale=0.4)
    assert_naive(q, k, v, None, None, seen, scale=0.4, causal=False)
    bias = torch.randn(shape, generator=rng(4), dtype=torch.float64)
    assert_naive(q, k, v, None, None, bias, scale=0.4)
    assert_naive(q, k, v, SINKS, SLOPES, bias.masked_fill(~seen, -torch.inf), scale=0.4, softcap=2.0)


def test_long_queries_are_the_same_in_blocks():
    q, k, v = qkv(batch=1, queries=300, keys=310, dtype=torch.float32)
    for options in ({}, {"window": 40, "sinks": 3}, {"softcap": 1.0}):
        whole = attention(q, k, v, scale=0.4, **options)
        parts = [
            attention(q[:, :, s : s + 1], k[:, :, : 11 + s], v[:, :, : 11 + s], scale=0.4, **options)
            for s in (0, 255, 256, 299)
        ]
        torch.testing.assert_close(whole[:, :, [0, 255, 256, 299]], torch.cat(parts, dim=2), rtol=1e-5, atol=1e-5)


def test_queries_before_the_first_key_are_zero_however_many_they_are():
    q, k, v = qkv(batch=1, queries=400, keys=100, dtype=torch.float32)
    for options in ({}, {"window": 7}, {"strict": True}):
        out = attention(q, k, v, scale=0.4, **options)
        assert not bool(out[:, :, :300].any()), options
        expected = attention(q[:, :, 300:], k, v, scale=0.4, **options)
        torch.testing.assert_close(out[:, :, 300:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"strict": True}, {"window": 2, "strict": True}], ids=str)
def test_a_row_with_nothing_to_read_is_zero_and_has_no_nan_in_its_gradient(options):
    q, k, v = (t.requires_grad_(True) for t in qkv(queries=4, keys=4))
    out = attention(q, k, v, scale=0.4, **options)
    assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
    assert bool(out[:, :, 1:].abs().sum() > 0)
    out.square().sum().backward()
    for tensor in (q, k, v):
        assert bool(torch.isfinite(tensor.grad).all())
    assert torch.equal(q.grad[:, :, 0], torch.zeros_like(q.grad[:, :, 0]))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_that_hides_a_whole_row_gives_zero(kind):
    q, k, v = (t.requires_grad_(True) for t in qkv(queries=4, keys=4))
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    seen[..., 2, :] = False
    mask = seen if kind == "bool" else torch.zeros(1, 1, 4, 4).masked_fill(~seen, -torch.inf)
    out = attention(q, k, v, None, None, mask, scale=0.4)
    assert torch.equal(out[:, :, 2], torch.zeros_like(out[:, :, 2]))
    out.sum().backward()
    assert all(bool(torch.isfinite(t.grad).all()) for t in (q, k, v))


def test_no_keys_at_all_give_zero():
    q, k, v = qkv(queries=2, keys=0)
    for options in ({}, {"strict": True}, {"causal": False}, {"softcap": 2.0}):
        out = attention(q, k, v, scale=0.4, **options)
        assert out.shape == (2, 4, 2, 7)
        assert not bool(out.any()), options


def test_no_queries_give_nothing():
    q, k, v = qkv(queries=0, keys=3)
    assert attention(q, k, v, scale=0.4).shape == (2, 4, 0, 7)


def test_half_precision_is_near_the_softmax_in_float64():
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        q, k, v = qkv(dtype=dtype)
        found = attention(q, k, v, scale=0.4, softcap=3.0)
        assert found.dtype == dtype
        expected = naive(q.double(), k.double(), v.double(), scale=0.4, softcap=3.0)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, ()),
        ({"causal": False}, ()),
        ({"window": 2, "sinks": 1}, ()),
        ({"softcap": 2.0}, ()),
        ({"strict": True}, ()),
        ({}, (SINKS, SLOPES, None)),
    ],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(options, extra):
    """Scores are rounded to float32 on the way, hence the step and the tolerance; the dtype is float64 all the same."""
    q, k, v = (t.requires_grad_(True) for t in qkv(batch=1, queries=3, keys=4, dim=3, value_dim=2))
    assert torch.autograd.gradcheck(
        lambda *t: attention(*t, *extra, scale=0.5, **options), (q, k, v), eps=1e-3, atol=2e-3, rtol=2e-3
    )


def test_gradients_of_sinks_slopes_and_biases_are_those_of_the_reference():
    q, k, v = qkv()
    tensors = [SINKS.double(), SLOPES.double(), torch.randn(1, 4, 5, 5, generator=rng(5), dtype=torch.float64)]
    tensors = [t.clone().requires_grad_(True) for t in tensors]
    found = torch.autograd.grad(attention(q, k, v, *tensors, scale=0.5).square().sum(), tensors)
    expected = torch.autograd.grad(ops.attention_reference(q, k, v, *tensors, scale=0.5).square().sum(), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert bool(a.abs().sum() > 0)


# ---------------------------------------------------------------------- as torch wants its ops


@pytest.mark.parametrize(
    ("options", "extra"),
    [({}, ()), ({"window": 2, "sinks": 1, "softcap": 2.0}, ()), ({"strict": True}, (SINKS, SLOPES, None))],
    ids=str,
)
def test_torch_accepts_attention(options, extra):
    for grad in (False, True):
        q, k, v = (t.requires_grad_(grad) for t in qkv(dtype=torch.float32))
        torch.library.opcheck(attention.default, (q, k, v, *extra), {"scale": 0.5, **options})


def cache(batch=2, kv_heads=2, capacity=12, dim=6, value_dim=7, dtype=torch.float32):
    """A cache of garbage: what is not written must not be read."""
    return (
        torch.full((batch, kv_heads, capacity, dim), torch.nan, dtype=dtype),
        torch.full((batch, kv_heads, capacity, value_dim), torch.nan, dtype=dtype),
    )


@pytest.mark.parametrize("ragged", [False, True])
def test_torch_accepts_attend(ragged):
    q, k, v = qkv(queries=3, keys=3, dtype=torch.float32)
    keys, values = (torch.zeros_like(t) for t in cache())
    starts = torch.tensor([2, 4]) if ragged else torch.tensor([4, 4])
    torch.library.opcheck(attend.default, (q, k, v, [keys, values], starts), {"scale": 0.5, "end": 7, "ragged": ragged})


# ---------------------------------------------------------------------- the cached form

CACHED = [
    {},
    {"window": 3},
    {"window": 3, "sinks": 2},
    {"strict": True},
    {"softcap": 2.0},
    {"alibi_slopes": SLOPES},
    {"sink_logits": SINKS},
]


@pytest.mark.parametrize("options", CACHED, ids=str)
@pytest.mark.parametrize("steps", [(4, 1, 1, 3), (1, 1, 1), (9,)], ids=str)
def test_attend_is_attention_on_what_was_written(steps, options):
    length = sum(steps)
    q, k, v = qkv(queries=length, keys=length, dtype=torch.float32)
    expected = attention(q, k, v, scale=0.4, **options)
    keys, values = cache(capacity=length + 2)
    found, place = [], 0
    for count in steps:
        part = slice(place, place + count)
        starts = torch.full((2,), place)
        place += count
        found.append(
            attend(
                q[:, :, part], k[:, :, part], v[:, :, part], [keys, values], starts,
                scale=0.4, end=place, ragged=False, **options,
            )
        )  # fmt: skip
    torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(keys[:, :, :length], k)
    assert torch.equal(values[:, :, :length], v)
    assert bool(keys[:, :, length:].isnan().all()), "something was written beyond the tokens"


@pytest.mark.parametrize("options", CACHED, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_rows_that_start_apart_attend_to_their_own_tokens(count, options):
    starts, total = torch.tensor([2, 6, 0]), 6 + count
    q, k, v = qkv(batch=3, queries=total, keys=total, dtype=torch.float32)
    keys, values = (torch.zeros_like(t) for t in cache(batch=3))
    keys[:], values[:] = 1e3, 1e3  # left by others: reading it shows
    for row, start in enumerate(starts.tolist()):
        keys[row, :, :start], values[row, :, :start] = k[row, :, :start], v[row, :, :start]
    index = starts.view(-1, 1) + torch.arange(count)
    new = [torch.stack([t[row][:, index[row]] for row in range(3)]) for t in (q, k, v)]
    found = attend(*new, [keys, values], starts, scale=0.4, end=total, ragged=True, **options)
    for row, start in enumerate(starts.tolist()):
        stop = start + count
        alone = attention(
            q[row : row + 1, :, start:stop], k[row : row + 1, :, :stop], v[row : row + 1, :, :stop],
            scale=0.4, **options,
        )  # fmt: skip
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-5, atol=1e-5)
        assert torch.equal(keys[row, :, start:stop], k[row, :, start:stop])


def test_entries_beyond_a_rows_length_are_never_read_even_when_they_are_nan():
    """NaN survives a product with a probability of zero, so hiding a score is not enough for values."""
    q, k, v = qkv(queries=1, keys=1, dtype=torch.float32)
    keys, values = (torch.nan_to_num(t, 1e4) for t in cache())
    keys[:, :, :2], values[:, :, :2] = 0.5, 0.5
    found = attend(q, k, v, [keys, values], torch.tensor([2, 8]), scale=0.4, end=9, ragged=True)
    assert bool(found[0].abs().max() < 100), "row 0 read what is beyond its three tokens"


# ---------------------------------------------------------------------- memory


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor, in bytes, that any ATen op made while this is on."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("options", [{"window": 64}, {"softcap": 2.0}, {}], ids=str)
def test_kv_heads_are_not_repeated_in_memory(options):
    q, k, v = qkv(batch=1, heads=32, kv_heads=1, queries=1, keys=4096, dim=64, value_dim=64, dtype=torch.float32)
    with LargestTensor() as seen:
        ops.attention_reference(q, k, v, scale=0.125, **options)
    repeated = 32 * k.numel() * 4
    assert seen.bytes <= 2 * k.numel() * 4, f"{seen.bytes / 1e6:.1f} MB; the repeated heads are {repeated / 1e6:.1f} MB"


def test_scores_are_formed_in_blocks_of_queries():
    q, k, v = qkv(batch=1, heads=4, kv_heads=1, queries=2048, keys=2048, dim=8, value_dim=8, dtype=torch.float32)
    with LargestTensor() as seen:
        ops.attention_reference(q, k, v, scale=0.3, window=100)
    assert seen.bytes <= 4 * 256 * 2048 * 4, f"{seen.bytes / 1e6:.1f} MB at once"
