"""How keys and values are stored: bounds on the error, what is exact, what is loud, and bytes counted on tensors."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from kvpass.errors import PlanError
from kvpass.ir.kv_format import (
    KVFormat,
    decode_channels,
    decode_tokens,
    encode_channels,
    encode_tokens,
    fake_channels,
    fake_tokens,
)

FULL, FP8 = KVFormat(), KVFormat("fp8", 8)
INT8, INT4, INT2 = (KVFormat("int", bits) for bits in (8, 4, 2))
STATIC8, STATIC4 = (KVFormat("int", bits, "static") for bits in (8, 4))
KIVI8, KIVI4, KIVI2 = (KVFormat("int", bits, "kivi", 8, 16) for bits in (8, 4, 2))
TOKENS = (INT8, INT4, INT2, FP8)
CHANNELS = (KIVI8, KIVI4, KIVI2)
STORED = (*TOKENS, *CHANNELS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HALF_MAX = 65504.0

per_format = pytest.mark.parametrize("fmt", STORED, ids=str)


def values(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def top_of(fmt):
    """The largest code: a group spans `scale * top`."""
    if fmt.kind == "fp8":
        return 448
    return 127 if fmt.parameters == 1 else 2**fmt.bits - 1


def bound(x, decoded, scale, fmt):
    """Half a step, and half a unit in the last place of the float32 sum and of the dtype that it is returned in.

    `scale` broadcasts to x; everything is float64.
    """
    step = scale
    if fmt.kind == "fp8":  # spacing of e4m3: 3 bits of mantissa, denormals below 2^-6
        magnitude = (x / scale.clamp_min(2.0**-24)).abs()
        step = scale * 2.0 ** (magnitude.clamp_min(2.0**-6).log2().floor() - 3)
    largest = torch.maximum(x.abs(), decoded.double().abs())
    rounding = largest * (torch.finfo(torch.float32).eps + torch.finfo(decoded.dtype).eps) / 2
    if decoded.dtype == torch.float16:
        rounding = rounding + 2.0**-25
    return step / 2 * (1 + 2.0**-12) + rounding + 1e-44


def check_tokens(x, fmt):
    codes, params = encode_tokens(x, fmt)
    decoded = decode_tokens(codes, params, fmt, x.shape[-1], x.dtype)
    wide = x.float().double()
    assert ((decoded.double() - wide).abs() <= bound(wide, decoded, params[..., :1].double(), fmt)).all()


def check_channels(x, fmt):
    codes, params = encode_channels(x, fmt)
    decoded = decode_channels(codes, params, fmt, x.shape[-1], x.dtype)
    scale = params[..., 0].unsqueeze(-2).double()
    wide = x.float().double()
    assert ((decoded.double() - wide).abs() <= bound(wide, decoded, scale, fmt)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@per_format
def test_the_error_is_at_most_half_a_step(fmt, dtype):
    x = values(2, 3, 8, 16, dtype=dtype) * torch.tensor([1e-6, 1.0, 300.0], dtype=dtype).view(1, 3, 1, 1)
    check_tokens(x, fmt)
    check_tokens(x + 50, fmt)
    if fmt.layout == "kivi":
        check_channels(x, fmt)
        check_channels(x + 50, fmt)


NASTY = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.floats(9999, 10000, width=32),  # a large offset and a small range: float16 steps by 8 here
    st.floats(-(2.0**-120), 2.0**-120, width=32),  # float32 denormals among them
    st.floats(-(2.0**-23), 2.0**-23, width=32),  # scales that are float16 denormals
    st.floats(-HALF_MAX, HALF_MAX, width=32),
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(STORED), st.data())
def test_rounded_parameters_never_clip(fmt, data):
    """The range that the codes reach, in exact arithmetic, holds the group: on it the error is half a step."""
    kind = data.draw(st.sampled_from([NASTY, *NASTY.original_strategies]))
    x = torch.tensor(data.draw(st.lists(kind, min_size=8, max_size=8)), dtype=torch.float32)
    check_tokens(x, fmt)
    _, params = encode_tokens(x, fmt)
    scale, *minimum = (float(p) for p in params)
    low, high = float(x.min()), float(x.max())
    if minimum:
        slack = (high - minimum[0]) * 2.0**-23  # the span is a float32
        assert minimum[0] <= low
        assert minimum[0] + top_of(fmt) * scale >= high - slack
    else:
        assert top_of(fmt) * scale >= max(-low, high)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(CHANNELS), st.data())
def test_channels_of_nasty_ranges_keep_the_bound(fmt, data):
    kinds = [data.draw(st.sampled_from([NASTY, *NASTY.original_strategies])) for _ in range(4)]
    columns = [data.draw(st.lists(kind, min_size=8, max_size=8)) for kind in kinds]
    check_channels(torch.tensor(columns, dtype=torch.float32).T, fmt)


@pytest.mark.parametrize("fmt", TOKENS, ids=str)
def test_a_scale_is_the_smallest_float16_that_does_not_clip(fmt):
    x = values(200, 16) * torch.logspace(-9, 4, 200).view(-1, 1)
    _, params = encode_tokens(x, fmt)
    scale = params[:, 0]
    previous = (scale.view(torch.int16) - 1).view(torch.float16).double()
    if fmt.parameters == 2:
        minimum = params[:, 1].double()
        upper = (params[:, 1].view(torch.int16) + torch.where(minimum < 0, -1, 1).short()).view(torch.float16)
        assert (minimum <= x.double().amin(-1)).all()
        assert (upper > x.amin(-1)).all()
        span = (x.amax(-1) - params[:, 1].float()).double()
    else:
        span = x.double().abs().amax(-1)
    assert (scale.double() * top_of(fmt) >= span).all()
    assert (previous * top_of(fmt) < span).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_representable_values_are_exact(dtype):
    ends = torch.tensor([-127.0, 127, 0, 1, -1, 64, 31, -100])
    x = (ends * 0.5).to(dtype)
    assert torch.equal(fake_tokens(x, INT8), x)
    for fmt in (INT4, INT2, KIVI4, KIVI2):
        codes = torch.arange(16) % (top_of(fmt) + 1)
        x = (codes * 0.25 - 1.5).to(dtype)
        assert torch.equal(fake_tokens(x, fmt), x)
    floats = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # all that are not negative
    assert floats.max() == 448
    x = torch.cat([floats, -floats]).mul(0.125).to(dtype)
    if dtype != torch.bfloat16 or torch.equal(x.float(), torch.cat([floats, -floats]) * 0.125):
        assert torch.equal(fake_tokens(x, FP8), x)
    for fmt in CHANNELS:
        column = torch.linspace(0, 1, 8).mul(top_of(fmt)).round() * 0.125 - 2
        x = (column.view(8, 1) * torch.tensor([1.0, -1.0, 4.0, 0.0])).to(dtype)
        assert torch.equal(fake_channels(x, fmt), x)


def test_the_packing_is_a_run_of_channels_per_bit_position():
    x = torch.arange(16.0)
    codes, params = encode_tokens(x, INT4)
    assert params.tolist() == [1.0, 0.0]
    assert codes.tolist() == [j | j + 8 << 4 for j in range(8)]
    x = torch.tensor([0.0, 1, 2, 3, 3, 2, 1, 0])
    codes, params = encode_tokens(x, INT2)
    assert params.tolist() == [1.0, 0.0]
    assert codes.tolist() == [0 | 2 << 2 | 3 << 4 | 1 << 6, 1 | 3 << 2 | 2 << 4 | 0 << 6]
    codes, params = encode_tokens(torch.tensor([-127.0, -1, 0, 1, 127]), INT8)
    assert params.tolist() == [1.0]
    assert codes.tolist() == [129, 255, 0, 1, 127]
    assert codes.view(torch.int8).tolist() == [-127, -1, 0, 1, 127]
    codes, params = encode_tokens(torch.tensor([-448.0, 0, 1, 448]), FP8)
    assert params.tolist() == [1.0]
    assert codes.tolist() == [0xFE, 0, 0x38, 0x7E]
    codes, params = encode_tokens(torch.tensor([-1.0, 0, 254, 9]), KIVI8)
    assert params.tolist() == [1.0, -1.0]
    assert codes.tolist() == [0, 1, 255, 10]


@pytest.mark.parametrize("fmt", [STATIC8, STATIC4], ids=str)
def test_whole_numbers_are_stored_as_they_are_and_others_rounded_to_even_and_clipped(fmt):
    low, high = fmt.range
    assert (low, high) == ((-128, 127) if fmt.bits == 8 else (-8, 7))
    x = torch.tensor([low, high, 0.0, -1.0, 0.5, 1.5, -0.5, -2.5, high + 0.4, high + 9.0, low - 9.0, torch.inf])
    x = torch.cat([x, torch.tensor([-torch.inf, torch.nan, 2.49, -3.0])])
    codes, params = encode_tokens(x, fmt)
    assert codes.shape == (16 * fmt.bits // 8,)
    assert params.shape == (0,)
    right = [low, high, 0, -1, 0, 2, 0, -2, high, high, low, high, low, 0, 2, -3]
    assert decode_tokens(codes, params, fmt, 16, torch.float32).tolist() == right
    if fmt.bits == 8:
        assert codes.view(torch.int8).tolist() == right
    assert fmt.value_bytes(16, torch.float32) == fmt.key_bytes(16, torch.float32) == 2 * fmt.bits


def test_keys_are_grouped_by_channel_and_packed_along_channels():
    x = torch.arange(8.0).view(8, 1) * torch.tensor([1.0, 2.0]) + torch.tensor([0.0, -8.0])
    x[7] = torch.tensor([15.0, 22.0])
    codes, params = encode_channels(x, KIVI4)
    assert params.tolist() == [[1.0, 0.0], [2.0, -8.0]]
    assert codes.tolist() == [[17 * code] for code in (0, 1, 2, 3, 4, 5, 6, 15)]
    assert torch.equal(decode_channels(codes, params, KIVI4, 2, torch.float32), x)


def test_ties_go_to_the_even_code_whatever_the_scale():
    """A product with the reciprocal of the scale would miss some of them."""
    scale = torch.linspace(1, 2, 1025).view(-1, 1)  # every float16 from 1 to 2
    halves = torch.arange(-126, 126) + 0.5
    codes, params = encode_tokens(torch.cat([halves, torch.tensor([127.0])]) * scale, INT8)
    assert torch.equal(params.float(), scale)
    assert (codes.view(torch.int8)[:, :-1] == halves.round()).all()
    halves = torch.arange(14) + 0.5
    codes, params = encode_tokens(torch.cat([halves, torch.tensor([0.0, 15])]) * scale, INT4)
    assert torch.equal(params[:, :1].float(), scale)
    assert (torch.cat([codes & 15, codes >> 4], 1)[:, :14] == halves.round()).all()


@per_format
def test_the_smallest_numbers_are_within_half_the_smallest_scale(fmt):
    """The quotient of a float32 denormal and the number of codes is 0, the scale that it needs is not."""
    for size in (2.0**-149, 2.0**-140, 2.0**-126, 2.0**-30):
        x = torch.tensor([0.0, size, 0, size])
        _, params = encode_tokens(x, fmt)
        assert params[0] == 2.0**-24
        check_tokens(x, fmt)
        check_tokens(-x, fmt)


@per_format
@pytest.mark.parametrize("constant", [0.0, -0.0, 1.0, -3.5, 0.1, -0.1, 1e-30, -1e-30, 1e4 + 3, -HALF_MAX, HALF_MAX])
def test_a_constant_group_comes_back(fmt, constant):
    x = torch.full((8, 8), constant)
    for fake in (fake_tokens, fake_channels) if fmt.layout == "kivi" else (fake_tokens,):
        assert (fake(x, fmt) - x).abs().max() <= max(abs(constant) * 2.0**-10, 2.0**-25)
    if constant == 0:
        _, params = encode_tokens(x, fmt)
        assert (params == 0).all()


@per_format
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 65504 * 448.5, -3e38])
def test_a_group_that_cannot_be_stored_is_nan_and_its_neighbours_are_not(fmt, bad):
    x = values(2, 3, 8, 16)
    broken = x.clone()
    broken[1, 2, 5, 7] = bad
    rest = torch.ones(x.shape, dtype=torch.bool)
    rest[1, 2, 5] = False
    result = fake_tokens(broken, fmt)
    assert result[1, 2, 5].isnan().all()
    assert torch.equal(result[rest], fake_tokens(x, fmt)[rest])
    codes, _ = encode_tokens(broken, fmt)
    assert (codes[1, 2, 5] == 0).all()
    if fmt.layout == "kivi":
        rest = torch.ones(x.shape, dtype=torch.bool)
        rest[1, 2, :, 7] = False
        result = fake_channels(broken, fmt)
        assert result[1, 2, :, 7].isnan().all()
        assert torch.equal(result[rest], fake_channels(x, fmt)[rest])


def test_what_float16_parameters_can_hold():
    """A scale reaches beyond float16; a minimum does not below, while above it the scale makes up for it."""
    assert fake_tokens(torch.tensor([HALF_MAX * 127, 0]), INT8).tolist() == [HALF_MAX * 127, 0]
    assert fake_tokens(torch.tensor([HALF_MAX * 127.1, 0]), INT8).isnan().all()
    assert fake_tokens(torch.tensor([-HALF_MAX, HALF_MAX * 14]), INT4).tolist() == [-HALF_MAX, HALF_MAX * 14]
    assert fake_tokens(torch.tensor([-65505.0, 0]), INT4).isnan().all()
    check_tokens(torch.tensor([1e5, 2e5]), INT4)
    assert fake_tokens(torch.tensor([1e300, 0], dtype=torch.float64), INT8).isnan().all()


@per_format
def test_a_finite_float16_group_does_not_become_infinite(fmt):
    """65504 / 127 is rounded up to 516, and 516 * 127 is no float16."""
    x = torch.tensor([HALF_MAX, -HALF_MAX, 1.0, 65000.0], dtype=torch.float16)
    result = fake_tokens(x, fmt)
    assert result.isfinite().all()
    assert result[0] == HALF_MAX or fmt.kind == "fp8" or fmt.parameters == 2
    check_tokens(x, fmt)


@per_format
def test_the_gradient_passes_straight_through(fmt):
    for fake in (fake_tokens, fake_channels) if fmt.layout == "kivi" else (fake_tokens,):
        x = values(2, 19, 8)
        leaf = x.clone().requires_grad_()
        result = fake(leaf, fmt)
        assert torch.equal(result.detach(), fake(x, fmt))
        weight = values(2, 19, 8, seed=1)
        (gradient,) = torch.autograd.grad((result * weight).sum(), leaf)
        assert torch.equal(gradient, weight)
    codes, params = encode_tokens(leaf, fmt)
    assert not codes.requires_grad
    assert not params.requires_grad


@pytest.mark.parametrize("fmt", CHANNELS, ids=str)
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 23])
def test_keys_behind_the_last_whole_group_are_untouched(fmt, length):
    x = values(2, 3, length, 8)
    result = fake_channels(x, fmt)
    whole = length // 8 * 8
    assert result.shape == x.shape
    assert torch.equal(result[:, :, whole:], x[:, :, whole:])
    for start in range(0, whole, 8):
        group = x[:, :, start : start + 8]
        decoded = decode_channels(*encode_channels(group, fmt), fmt, 8, x.dtype)
        assert torch.equal(result[:, :, start : start + 8], decoded)
        assert not torch.equal(decoded, group)


def test_full_precision_is_the_tensor_itself():
    x = values(2, 9, 8)
    assert fake_tokens(x, FULL) is x
    assert fake_channels(x, FULL) is x
    for encode in (encode_tokens, encode_channels):
        with pytest.raises(PlanError, match=r"no codes|no groups"):
            encode(x, FULL)


@per_format
def test_bytes_are_those_of_the_tensors(fmt):
    batch, heads, groups = 2, 3, 5
    group = fmt.group or 8
    for dim in (4, 20, 64):
        x = values(batch, heads, groups, group, dim, dtype=torch.bfloat16)
        tokens = batch * heads * groups * group
        codes, params = encode_tokens(x, fmt)
        assert codes.dtype == torch.uint8
        assert params.dtype == torch.float16
        assert codes.shape == (*x.shape[:-1], fmt.code_bytes(dim))
        assert params.shape == (*x.shape[:-1], fmt.parameters)
        assert tokens * fmt.value_bytes(dim, x.dtype) == codes.nbytes + params.nbytes
        if fmt.layout == "kivi":
            codes, params = encode_channels(x, fmt)
            assert codes.shape == (*x.shape[:-1], fmt.code_bytes(dim))
            assert params.shape == (*x.shape[:-2], dim, fmt.parameters)
        assert tokens * fmt.key_bytes(dim, x.dtype) == codes.nbytes + params.nbytes


def test_bytes_by_hand():
    assert FULL.key_bytes(64, torch.bfloat16) == FULL.value_bytes(64, torch.bfloat16) == 128
    assert INT8.key_bytes(64, torch.float32) == INT8.value_bytes(64, torch.float32) == 66
    assert FP8.value_bytes(64, torch.float32) == 66
    assert INT4.value_bytes(64, torch.float32) == 32 + 4
    assert INT2.value_bytes(64, torch.float32) == 16 + 4
    kivi = KVFormat.parse("kivi4:32:128")
    assert kivi.key_bytes(128, torch.float16) == 64 + 16
    assert kivi.value_bytes(128, torch.float16) == 64 + 4
    assert KVFormat.parse("kivi2:128:0").key_bytes(16, torch.float16) == Fraction(9, 2)


@per_format
def test_a_group_does_not_depend_on_its_batch(fmt):
    x = values(3, 5, 8, 64, seed=3) * 10
    codes, params = encode_tokens(x, fmt)
    for index in ((0, 0, 0), (2, 4, 7), (1, 2, 3)):
        alone, kept = encode_tokens(x[index].clone(), fmt)
        assert torch.equal(alone, codes[index])
        assert torch.equal(kept, params[index])
        decoded = decode_tokens(alone, kept, fmt, 64, torch.float32)
        assert torch.equal(decoded, decode_tokens(codes, params, fmt, 64, torch.float32)[index])
    if fmt.layout == "kivi":
        codes, params = encode_channels(x, fmt)
        alone, kept = encode_channels(x[1, 2].clone(), fmt)
        assert torch.equal(alone, codes[1, 2])
        assert torch.equal(kept, params[1, 2])
        few, kept = encode_channels(x[1, 2, :, :4].clone(), fmt)
        assert torch.equal(kept, params[1, 2, :4])
        decoded = decode_channels(few, kept, fmt, 4, torch.float32)
        assert torch.equal(decoded, fake_channels(x, fmt)[1, 2, :, :4])


@per_format
def test_strides_do_not_matter(fmt):
    x = values(16, 8, 3, 2).permute(3, 2, 1, 0)
    wide = values(2, 3, 8, 32)[..., ::2]
    for view in (x, wide):
        for encode, decode in ((encode_tokens, decode_tokens), (encode_channels, decode_channels)):
            if encode is encode_channels and fmt.layout != "kivi":
                continue
            codes, params = encode(view, fmt)
            straight = encode(view.contiguous(), fmt)
            assert torch.equal(codes, straight[0])
            assert torch.equal(params, straight[1])
            spread = torch.stack([codes, codes], -1)[..., 0]
            assert not spread.is_contiguous()
            decoded = decode(*straight, fmt, 16, view.dtype)
            assert torch.equal(decode(spread, params.mT.contiguous().mT, fmt, 16, view.dtype), decoded)


@per_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_encoded_as_its_float32_values(fmt, dtype):
    x = values(4, 8, 16, dtype=dtype)
    codes, params = encode_tokens(x, fmt)
    wide = encode_tokens(x.float(), fmt)
    assert torch.equal(codes, wide[0])
    assert torch.equal(params, wide[1])
    assert fake_tokens(x, fmt).dtype == dtype
    assert torch.equal(fake_tokens(x, fmt), fake_tokens(x.float(), fmt).to(dtype))


@per_format
def test_shapes_without_numbers(fmt):
    def shapes(x):
        yield from (t.shape for t in encode_tokens(x, fmt))
        yield fake_tokens(x, fmt).shape
        if fmt.layout == "kivi":
            yield from (t.shape for t in encode_channels(x[..., :8, :], fmt))
            yield fake_channels(x, fmt).shape

    real = values(2, 11, 16)
    expected = list(shapes(real))
    assert list(shapes(real.to("meta"))) == expected
    with FakeTensorMode():
        assert list(shapes(torch.empty(2, 11, 16))) == expected
    empty = values(2, 0, 16)
    codes, params = encode_tokens(empty, fmt)
    assert codes.shape == (2, 0, fmt.code_bytes(16))
    assert params.shape == (2, 0, fmt.parameters)
    assert fake_tokens(empty, fmt).shape == (2, 0, 16)
    if fmt.layout == "kivi":
        assert fake_channels(empty, fmt).shape == (2, 0, 16)
        assert encode_channels(values(0, 8, 16), fmt)[1].shape == (0, 16, 2)


ALL = [
    (FULL, ""),
    (INT8, "int8"),
    (INT4, "int4"),
    (INT2, "int2"),
    (FP8, "fp8"),
    (STATIC8, "static8"),
    (STATIC4, "static4"),
    *((KVFormat("int", b, "kivi", g, r), f"kivi{b}:{g}:{r}") for b in (8, 4, 2) for g in (8, 32) for r in (0, 128)),
]


@pytest.mark.parametrize(("fmt", "text"), ALL, ids=[text or "full" for _, text in ALL])
def test_a_format_reads_back_from_its_text(fmt, text):
    assert str(fmt) == text
    assert KVFormat.parse(text) == fmt
    assert hash(KVFormat.parse(text)) == hash(fmt)
    assert fmt.full == (text == "")


def test_a_format_does_not_change():
    with pytest.raises(FrozenInstanceError):
        INT8.bits = 4


NONSENSE = [
    "full",
    "int",
    "int08",
    "INT8",
    " int8",
    "int8\n",
    "int8:32:0",
    "int-8",
    "fp16",
    "kivi",
    "static",
    "static08",
    "kivi4",
    "kivi4:32",
]
NONSENSE += ["kivi4:32:128:0", "kivi4:32:-32", "kivi4:032:128", "kivi4:3e1:0", "int٨", "int" + "9" * 5000]


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_is_refused_with_the_text(text):
    with pytest.raises(PlanError) as caught:
        KVFormat.parse(text)
    assert repr(text) in caught.value.what
    assert "kivi4:32:128" in caught.value.fix


ILLEGAL = [
    (("half",), "'half'"),
    (("int", 8, "channel"), "'channel'"),
    (("full", 8), "not 8"),
    (("int",), "not 0"),
    (("int", 3), "8 or 4 or 2, not 3"),
    (("int", -8), "not -8"),
    (("fp8",), "8, not 0"),
    (("fp8", 4), "8, not 4"),
    (("int", 8.0), "bits must be a whole number, not 8.0"),
    (("int", True), "not True"),
    (("int", 4, "kivi", "32"), "group must be a whole number, not '32'"),
    (("int", 4, "kivi", 32, None), "residual must be a whole number, not None"),
    (("full", 0, "token", 32), "group is 32"),
    (("int", 4, "token", 32), "group is 32"),
    (("int", 4, "token", 0, 64), "residual is 64"),
    (("fp8", 8, "token", 0, 64), "residual is 64"),
    (("full", 0, "kivi", 32), "'full'"),
    (("fp8", 8, "kivi", 32), "'fp8'"),
    (("fp8", 8, "static"), "'fp8' of 8"),
    (("int", 2, "static"), "'int' of 2"),
    (("int", 8, "static", 32), "group is 32"),
    (("int", 4, "kivi"), "not 0"),
    (("int", 4, "kivi", 4), "not 4"),
    (("int", 4, "kivi", 24), "not 24"),
    (("int", 4, "kivi", -32), "not -32"),
    (("int", 4, "kivi", 32, 100), "32 tokens, not 100"),
    (("int", 4, "kivi", 32, 16), "not 16"),
    (("int", 4, "kivi", 32, -32), "not -32"),
]


@pytest.mark.parametrize(("arguments", "message"), ILLEGAL)
def test_an_illegal_combination_is_refused_with_its_value(arguments, message):
    with pytest.raises(PlanError) as caught:
        KVFormat(*arguments)
    assert message in caught.value.what
    assert "KVFormat(" in caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize(("fmt", "dim"), [(INT4, 15), (INT2, 14), (KIVI4, 1), (KIVI2, 6), (INT8, 0), (FULL, 0)])
def test_a_head_that_does_not_fill_bytes_is_refused(fmt, dim):
    with pytest.raises(PlanError, match=rf"\b{dim}\b"):
        fmt.check_dim(dim)
    if not fmt.full:
        for call in (fmt.key_bytes, fmt.value_bytes):
            with pytest.raises(PlanError):
                call(dim, torch.float16)
        with pytest.raises(PlanError):
            encode_tokens(values(2, dim), fmt)


@pytest.mark.parametrize(("fmt", "dim"), [(INT4, 2), (INT2, 4), (INT8, 1), (FP8, 3), (KIVI8, 5), (FULL, 7)])
def test_a_head_that_fills_bytes_is_not(fmt, dim):
    fmt.check_dim(dim)


def test_what_was_stored_otherwise_is_refused():
    codes, params = encode_tokens(values(3, 16), INT4)
    for fmt, dim in ((INT4, 18), (INT2, 16), (INT8, 16), (INT8, 8)):
        with pytest.raises(PlanError, match="not 8 and 2"):
            decode_tokens(codes, params, fmt, dim, torch.float32)
    with pytest.raises(PlanError, match="8 tokens, not 9"):
        encode_channels(values(9, 16), KIVI4)
    with pytest.raises(PlanError, match="'token'"):
        fake_channels(values(8, 16), INT4)
    with pytest.raises(PlanError, match="'token'"):
        decode_channels(codes, params, INT4, 16, torch.float32)
