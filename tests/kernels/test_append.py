"""What the kernels write into a cache, bit by bit, against `kv_format` and `kv_layout`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import triton
from torch import Tensor

import interpreter  # noqa: F401  (kernels are interpreted, and quicker with it)
from kvpass.ir.kv_format import KVFormat, decode_tokens, encode_tokens
from kvpass.ir.kv_layout import Layout
from kvpass.kernels.append import append, close_groups, encode
from kvpass.kernels.store import Store
from sanitizer import sanitize

FORMATS = {"": Store(), "int8": Store(bits=8), "int4": Store(bits=4), "fp8": Store(bits=8, floats=True)}
KIVI = ["kivi4:8:16", "kivi8:16:16", "kivi4:8:0", "kivi4:32:32"]
ADDRESSES = ["", "window=5;sinks=2", "window=4", "window=1", "window=3;sinks=7", "page=4", "page=3", "page=16"]
PLACES = [("", address) for address in ADDRESSES]
PLACES += [(name, address) for name in ("int8", "int4", "fp8") for address in ("", "window=5;sinks=2", "page=4")]
HEADS = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy notes what is meant to be NaN or infinite


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def checked():
    """Launches under the sanitizer where kernels are interpreted."""
    return sanitize() if triton.knobs.runtime.interpret else nullcontext()


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def store_of(text: str) -> Store:
    """What a kernel is told of a layout."""
    layout = Layout.parse(text)
    fmt = layout.format
    return Store(fmt.bits, fmt.kind == "fp8", fmt.group, fmt.residual, layout.window, layout.sinks, layout.page)


def poisoned(layout: Layout, rows: int, dims: tuple[int, int], capacity: int, dtype: torch.dtype) -> list[Tensor]:
    """A cache of bytes that are no sensible code and, as floats, huge numbers; its pages are in no order."""
    slots = layout.slots(capacity)
    blocks = -(-capacity // layout.page) if layout.page else 0
    cache = []
    for spec in layout.specs(*dims, dtype, layout.page or slots):
        first = rows * blocks + 2 if layout.page else rows
        made = torch.empty(first, HEADS, spec.slots, *spec.tail, dtype=spec.dtype)
        made.view(torch.uint8).fill_(0x7B)
        cache.append(made)
    if layout.page:
        order = torch.randperm(rows * blocks, generator=generator(1))
        cache.append(order.view(rows, blocks).to(torch.int32))
    return cache


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def assert_same(got: list[Tensor], expected: list[Tensor], message: str = "") -> None:
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(bits(a), bits(b)), (
            f"{message}: piece {index}, {int((bits(a) != bits(b)).sum())} bytes differ"
        )


def settled(pieces: list[Tensor]) -> list[Tensor]:
    """Parameters with one NaN and one zero: which of several a minimum is, no device promises."""
    return [x if x.dtype == torch.uint8 else torch.where(x.isnan(), float("nan"), x + 0) for x in pieces]


# ---------------------------------------------------------------------- codes


def delicate(dim: int) -> Tensor:
    """Vectors [1, 1, T, D] where rounding, denormals, overflow or NaN decide."""
    x = normal(24, dim)
    inf, nan = float("inf"), float("nan")
    x[0] = 0
    x[1] = -3.3  # a constant group
    x[2, 1] = nan
    x[3, 2], x[4, 3] = inf, -inf
    x[5, 0], x[5, 1] = inf, -inf
    x[6] *= 1e-6  # scales among float16's denormals
    x[7] *= 1e-9  # below its smallest
    x[8] *= 1e-42  # below float32's smallest
    x[9] *= 60000  # at the end of float16
    x[10] *= 1e7  # codes times a scale are beyond float16, or the scale itself
    x[11] *= 1e38
    x[12, 0] = -70000.0  # no float16 is a minimum
    x[13] = x[13].abs() + 70000.0
    x[14] = torch.arange(dim) / 2 - 63.5 * 2  # halves of a step: ties
    x[15] = torch.arange(dim) % 16 / 2 * (15 / 7.5)
    x[16] = torch.arange(dim) % 31 * 0.5
    x[17] = -x[16]
    x[18] = nan
    x[19, 0] = 1e-10 if dim > 1 else 0
    x[20] = x[20].abs()  # the minimum is above 0
    x[21] = -x[21].abs()
    x[22] = 65504.0
    x[23] *= torch.logspace(-30, 30, dim)
    return x[None, None]


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("dims", [(8, 20), (64, 80)])
def test_codes_and_parameters_are_those_of_the_format(name, dims):
    fmt = KVFormat.parse(name)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        k, v = (delicate(dim).to(dtype) for dim in dims)
        with checked():
            pieces = encode(k, v, FORMATS[name])
        expected = [*encode_tokens(k, fmt), *encode_tokens(v, fmt)]
        assert_same(settled(pieces), settled(expected), f"{name} of {dtype}")


def test_a_group_with_a_nan_decodes_to_nan_as_a_whole_and_no_other():
    k = delicate(8)
    broken = ~k.isfinite().all(-1)
    for name in ("int8", "int4", "fp8"):
        codes, params, *_ = encode(k, k, FORMATS[name])
        decoded = decode_tokens(codes, params, KVFormat.parse(name), 8, torch.float32)
        assert decoded[broken].isnan().all()
        assert decoded[:, :, 20:22].isfinite().all()


def test_every_8_bit_float_and_every_tie_between_two_is_rounded_as_torch_does():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    some = torch.cat([codes, ties, ties.nextafter(ties * 2), ties.nextafter(ties * 0)])
    some = torch.cat([some, -some])
    x = torch.cat([some, torch.zeros(-len(some) % 63)]).view(-1, 63)
    x = torch.cat([torch.full((len(x), 1), 448.0), x], dim=1)[None, None]  # the scale is 1
    got, params, *_ = encode(x, x, FORMATS["fp8"])
    assert (params == 1).all()
    assert torch.equal(got, x.to(torch.float8_e4m3fn).view(torch.uint8))


# ---------------------------------------------------------------------- places


def write(cache: list[Tensor], pieces: list[Tensor], starts: Tensor, stops: Tensor | None, layout: Layout) -> None:
    """What `append` does, one token after the other, so that the latest of a slot stays."""
    for row, start in enumerate(starts.tolist()):
        end = start + pieces[0].shape[2]
        for position in range(start, end if stops is None else min(end, int(stops[row]))):
            if layout.page:
                first, slot = int(cache[-1][row, position // layout.page]), position % layout.page
                if first < 0:
                    continue
            elif layout.ring and position >= layout.sinks:
                first, slot = row, layout.sinks + (position - layout.sinks) % layout.window
            else:
                first, slot = row, position
            for tensor, piece in zip(cache[: len(pieces)], pieces, strict=True):
                tensor[first, :, slot] = piece[row, :, position - start]


def check_append(text: str, k: Tensor, v: Tensor, starts: list[int], stops: list[int] | None, lost: int = 0) -> None:
    layout, store = Layout.parse(text), store_of(text)
    cache = poisoned(layout, len(k), (k.shape[3], v.shape[3]), max(starts) + k.shape[2], k.dtype)
    if layout.page and lost:
        cache[-1].view(-1)[:: cache[-1].numel() // lost] = -1
    expected = [x.clone() for x in cache]
    begin, end = torch.tensor(starts), None if stops is None else torch.tensor(stops)
    with checked():
        append(cache, k, v, begin, end, store)
    pieces = [k, v]
    if store.bits:
        pieces = [*encode_tokens(k, layout.format), *encode_tokens(v, layout.format)]
    write(expected, pieces, begin, end, layout)
    assert_same(cache, expected, f"{text} {starts} {stops}")


@pytest.mark.parametrize(("name", "address"), PLACES)
def test_tokens_go_to_their_places_and_nothing_else_is_touched(name, address):
    text = ";".join(filter(None, (name, address)))
    k, v = normal(2, HEADS, 40, 8), normal(2, HEADS, 40, 20, seed=1)
    check_append(text, k[:, :, :1], v[:, :, :1], [0, 17], None)
    check_append(text, k[:, :, :5], v[:, :, :5], [3, 11], [6, 0])
    check_append(text, k, v, [1, 9], [30, 49])
    check_append(text, k, v, [9, 0], None, lost=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(64, 64), (80, 20), (8, 80)])
def test_full_precision_is_copied_whatever_its_bits(dtype, dims):
    size = torch.empty((), dtype=dtype).element_size()
    g = generator(0)
    k, v = (
        torch.randint(0, 256, (2, HEADS, 7, d * size), dtype=torch.uint8, generator=g).view(dtype) for d in dims
    )  # NaNs of every kind among them
    check_append("window=4;sinks=1", k, v, [0, 8], None)


def test_keys_may_lie_in_any_order_in_memory():
    fused = normal(2, 9, 3 * HEADS, 64, dtype=torch.float16).transpose(1, 2)  # [B, 3 * Hkv, S, D] of [B, S, 3 * Hkv, D]
    k, v = fused[:, HEADS : 2 * HEADS], fused[:, 2 * HEADS :]
    check_append("int4;page=4", k, v, [0, 3], None)
    check_append("", k, v, [2, 0], [9, 9])


def test_a_table_and_positions_may_be_of_either_size():
    k = normal(2, HEADS, 3, 8)
    for dtype in (torch.int32, torch.int64):
        pools = [torch.zeros(4, HEADS, 4, 8) for _ in "kv"]
        table = torch.tensor([[2, 0], [1, -1]]).to(dtype)
        append([*pools, table], k, k, torch.tensor([3, 2]).to(dtype), torch.tensor([6, 9]).to(dtype), Store(page=4))
        assert torch.equal(pools[0][2, :, 3], k[0, :, 0])
        assert torch.equal(pools[0][0, :, :2], k[0, :, 1:])
        assert torch.equal(pools[0][1, :, 2:], k[1, :, :2])
        assert pools[0].ne(0).sum() == 5 * HEADS * 8


def test_what_does_not_fit_is_not_written():
    k = normal(1, HEADS, 6, 8)
    for store, text in ((Store(), ""), (Store(page=2), "page=2")):
        cache = poisoned(Layout.parse(text), 1, (8, 8), 4, torch.float32)
        with checked():
            append(cache, k, k, torch.tensor([1]), None, store)
        kept = cache[0] if not store.page else cache[0][cache[2][0].long()].transpose(0, 1).flatten(1, 2)[None]
        assert torch.equal(kept[:, :, 1:4], k[:, :, :3])
    k = normal(1, HEADS, 24, 8)
    cache, larger = (poisoned(Layout.parse("kivi4:8:0"), 1, (8, 8), capacity, torch.float32) for capacity in (16, 24))
    for some in (cache, larger):
        with checked():
            append(some, k, k, torch.tensor([0]), None, Store(bits=4, group=8))
    assert_same(cache, [x[:, :, : y.shape[2]] for x, y in zip(larger, cache, strict=True)])


def test_addresses_beyond_31_bits_are_right():
    stride = 2**30 + 64
    memory = torch.empty(4 * stride, dtype=torch.uint8)  # never touched but at the places of the tokens
    codes = memory.as_strided((4, 1, 8, 8), (stride, 64, 8, 1))
    k = normal(4, 1, 8, 8)
    one = k[:, :, :1]
    expected = encode_tokens(k, KVFormat.parse("int8"))[0]

    def rest(store: Store) -> list[Tensor]:
        params = torch.zeros(4, 1, 1 if store.group else 8, *([8, 2] if store.group else [1]), dtype=torch.float16)
        values = [torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, 1, 8, store.parameters).half()]
        return [params, *values, *(torch.zeros(4, 1, 8, 8) for _ in range(store.pieces - 4))]

    append([codes, *rest(Store(bits=8))], one, one, torch.full((4,), 5), None, Store(bits=8))
    assert torch.equal(codes[:, :, 5:6], expected[:, :, :1])
    table = torch.tensor([[3], [2], [1], [0]])
    append([codes, *rest(Store(bits=8)), table], one, one, torch.full((4,), 2), None, Store(bits=8, page=8))
    assert torch.equal(codes.flip(0)[:, :, 2:3], expected[:, :, :1])

    copies = [torch.zeros(4, 1, 8, 8, dtype=torch.uint8) for _ in "kv"]
    append(copies, codes, codes, torch.zeros(4, dtype=torch.int64), None, Store())
    assert torch.equal(copies[0], codes)

    kivi = Store(bits=8, group=8)
    cache, near = ([x, *rest(kivi)] for x in (codes, torch.zeros(4, 1, 8, 8, dtype=torch.uint8)))
    for some in (cache, near):
        append(some, k, k, torch.zeros(4, dtype=torch.int64), None, kivi)
    assert_same(cache, near)


# ---------------------------------------------------------------------- sequences of appends


def follow(text: str, dims: tuple[int, int], pieces: list[tuple[list[int], int, list[int] | None]]) -> None:
    """Appends one after the other; after each the cache is that of `Layout.exchange`, bit by bit."""
    layout, store = Layout.parse(text), store_of(text)
    rows = len(pieces[0][0])
    capacity = max(max(starts) + length for starts, length, _ in pieces)
    cache = poisoned(layout, rows, dims, capacity, torch.float32)
    expected = [x.clone() for x in cache]
    for number, (starts, length, stops) in enumerate(pieces):
        k, v = (normal(rows, HEADS, length, d, seed=10 * number + i) for i, d in enumerate(dims))
        begin, end = torch.tensor(starts), None if stops is None else torch.tensor(stops)
        with checked():
            append(cache, k, v, begin, end, store)
        most = max(starts) + length
        layout.exchange(expected, k, v, begin, end, end=most, ragged=True, first=True, last=True)
        pools = store.pieces
        spare = -1 if layout.page else None  # the reference throws padding there
        assert_same(
            [x[:spare] for x in cache[:pools]], [x[:spare] for x in expected[:pools]], f"{text} after piece {number}"
        )


@pytest.mark.parametrize("text", [*KIVI, "", "int4;window=5;sinks=2", "int8;page=4"])
def test_a_prompt_and_steps_leave_the_cache_that_the_layout_leaves(text):
    steps = [([41 + i, 41 + i], 1, None) for i in range(8)]
    follow(text, (8, 20), [([0, 0], 41, None), *steps, ([49, 49], 17, None)])


@pytest.mark.parametrize("text", KIVI)
def test_rows_of_different_lengths_close_their_own_groups(text):
    after = [([13 + i, 30 + i, i], 1, None) for i in range(4)]
    stops = [13, 30, 0]
    follow(text, (8, 12), [([0, 0, 0], 30, stops), *after, ([17, 34, 4], 23, None), ([40, 57, 27], 1, None)])


@pytest.mark.parametrize("dims", [(64, 80), (80, 64), (20, 8)])
def test_groups_of_any_head_size_are_quantized(dims):
    follow("kivi4:32:32", dims, [([0, 5], 70, None), ([70, 75], 40, None)])


def test_large_groups_are_quantized_piece_by_piece():
    follow("kivi4:128:0", (64, 64), [([0], 140, None), ([140], 117, None)])
    follow("kivi8:128:128", (80, 64), [([0], 260, None)])


def test_a_group_of_keys_with_a_nan_loses_that_channel_alone():
    store, layout = store_of("kivi4:8:0"), Layout.parse("kivi4:8:0")
    k = delicate(8)
    cache = poisoned(layout, 1, (8, 8), 24, torch.float32)[:6]
    cache = [x[:, :1].contiguous() for x in cache]
    expected = [x.clone() for x in cache]
    append(cache, k, k, torch.tensor([0]), None, store)
    layout.exchange(expected, k, k, torch.tensor([0]), None, end=24, ragged=True, first=True, last=True)
    assert_same(settled(cache), settled(expected))


def test_groups_are_closed_from_the_residual_before_it_is_overwritten():
    store, layout = store_of("kivi8:8:8"), Layout.parse("kivi8:8:8")
    cache = poisoned(layout, 1, (8, 8), 48, torch.float32)
    k = normal(1, HEADS, 32, 8)
    append(cache, k[:, :, :15], k[:, :, :15], torch.tensor([0]), None, store)
    before = [x.clone() for x in cache]
    close_groups(cache, k[:, :, 15:17], k[:, :, 15:17], torch.tensor([15]), store)
    assert_same(cache[4:], before[4:])
    assert torch.equal(cache[0][:, :, 8:], before[0][:, :, 8:])
    decoded = decode_tokens(cache[2], cache[3], layout.format, 8, torch.float32)[:, :, :8]
    assert (decoded - k[:, :, :8]).abs().max() < 0.02


# ---------------------------------------------------------------------- refusals


def test_formats_that_kernels_do_not_write_are_refused():
    k = normal(1, HEADS, 1, 8)
    with pytest.raises(ValueError, match="4 or 8 bits, not 2"):
        append([], k, k, torch.tensor([0]), None, Store(bits=2))
    with pytest.raises(ValueError, match="use append"):
        encode(k, k, Store(bits=4, group=8))
