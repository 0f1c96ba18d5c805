"""Every kernel as it is compiled and run by a GPU: numbers, bits, variants, and CUDA graphs.

    pytest -m gpu

What an interpreter cannot show is shown here: products on tensor cores, tiles of the tables, long texts, races, graphs.
Attention may err twice as much as torch in the same dtype, plus 1e-5, against float64 (the rule of FlashAttention's own
tests). What is written into caches is compared bit by bit with `kvpass.ir`, computed on the same GPU.

KVPASS_REHEARSE=1 runs the same functions at small sizes by Triton's interpreter, on a machine without a GPU: that shows
that the tests are right, and nothing about a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpass.ir.kv_format import KVFormat, encode_channels, encode_tokens
from kvpass.ir.kv_layout import Layout
from kvpass.kernels import append as append_module
from kvpass.kernels import attention as attention_module
from kvpass.kernels.append import append, encode
from kvpass.kernels.attention import Keys, attention, attention_reference
from kvpass.kernels.column_mass import column_mass, column_mass_reference
from kvpass.kernels.gather import (
    compact,
    compact_reference,
    copy_pages,
    copy_pages_reference,
    scatter_pages,
    scatter_pages_reference,
)
from kvpass.kernels.merge import merge, merge_reference
from kvpass.kernels.rotary import rope_append, rope_append_reference
from kvpass.kernels.store import Store
from kvpass.kernels.targets import interpreted

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LONG = 16384 if GPU else 256
TEXT = 1000 if GPU else 150
MANY = 300 if GPU else 40  # queries of a prompt
FORMATS = ["", "int8", "int4", "fp8", "kivi4:32:32", "kivi8:32:0"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=DEVICE)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def store_of(text: str) -> Store:
    """What a kernel is told of a layout."""
    layout = Layout.parse(text)
    fmt = layout.format
    return Store(fmt.bits, fmt.kind == "fp8", fmt.group, fmt.residual, layout.window, layout.sinks, layout.page)


def coded(k: Tensor, v: Tensor, text: str) -> tuple[Tensor, ...]:
    """Keys and values as a store of that format holds them."""
    fmt = KVFormat.parse(text)
    if fmt.full:
        return k, v
    if fmt.layout == "kivi":
        keys = encode_channels(k.unflatten(2, (-1, fmt.group)), fmt)
        return (keys[0].flatten(2, 3), keys[1], *encode_tokens(v, fmt))
    return (*encode_tokens(k, fmt), *encode_tokens(v, fmt))


def keys_and_values(rows: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return normal(rows, heads, length, dim, seed=1, dtype=dtype), normal(rows, heads, length, dim, seed=2, dtype=dtype)


# ---------------------------------------------------------------------- the rule


def doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max()) if exact.numel() else 0.0


def judge(q: Tensor, keys: list[Keys], starts: Tensor | int, found: tuple[Tensor, Tensor], **options: Any) -> None:
    """Outputs and log-sum-exps err at most twice as much as those of torch in the dtype of q, plus 1e-5."""
    wide = [p if p.coded else replace(p, tensors=tuple(t.double() for t in p.tensors)) for p in keys]
    exact = attention_reference(q.double(), wide, starts, **{n: doubled(x) for n, x in options.items()})
    plain = attention_reference(q, keys, starts, **options)
    out, lse = found
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    empty = torch.isneginf(exact[1])
    assert torch.equal(torch.isneginf(lse), empty)
    assert not out[empty].any(), "a row with nothing to read gives zeros"
    assert torch.isfinite(out).all()
    allowed = 2 * error(plain[0], exact[0]) + 1e-5
    assert error(out, exact[0]) <= allowed
    assert error(lse[~empty], exact[1][~empty]) <= 2 * error(plain[1][~empty].float(), exact[1][~empty]) + 1e-5


def check(q: Tensor, keys: list[Keys], starts: Tensor | int, cuts: int | None = None, **options: Any) -> Tensor:
    options.setdefault("scale", q.shape[3] ** -0.5)
    found = attention(q, keys, starts, cuts=cuts, **options)
    judge(q, keys, starts, found, **options)
    return found[0]


# ---------------------------------------------------------------------- attention


@pytest.mark.parametrize("queries", [1, MANY])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_every_width_in_every_dtype(dtype: torch.dtype, dim: int, queries: int) -> None:
    q = normal(2, 8, queries, dim, dtype=dtype)
    check(q, [Keys(keys_and_values(2, 2, TEXT, dim, dtype))], TEXT - queries)


@pytest.mark.parametrize("queries", [1, MANY])
@pytest.mark.parametrize("heads", [(8, 8), (8, 1), (7, 1), (24, 3), (32, 2)])
def test_groups_of_every_size(heads: tuple[int, int], queries: int) -> None:
    q = normal(1, heads[0], queries, 128, dtype=torch.bfloat16)
    check(q, [Keys(keys_and_values(1, heads[1], TEXT, 128, torch.bfloat16))], TEXT - queries)


@pytest.mark.parametrize("queries", [1, MANY])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"strict": True},
        {"window": 70},
        {"window": 1},
        {"window": 70, "sinks": 5},
        {"strict": True, "window": 9, "sinks": 80},
        {"softcap": 3.0},
    ],
    ids=str,
)
def test_every_mask(options: dict[str, Any], queries: int) -> None:
    q = normal(2, 8, queries, 64, dtype=torch.bfloat16)
    check(q, [Keys(keys_and_values(2, 2, TEXT, 64, torch.bfloat16))], TEXT - queries, **options)


@pytest.mark.parametrize("queries", [1, MANY])
@pytest.mark.parametrize("name", ["alibi_slopes", "sink_logits", "sink_q"])
def test_alibi_sink_logits_and_queries_of_their_own_for_sinks(name: str, queries: int) -> None:
    q = normal(2, 8, queries, 64, dtype=torch.bfloat16)
    options: dict[str, Any] = {
        "alibi_slopes": {"alibi_slopes": torch.linspace(0.01, 0.1, 8, device=DEVICE)},
        "sink_logits": {"sink_logits": normal(8, seed=3)},
        "sink_q": {"sink_q": normal(2, 8, queries, 64, seed=4, dtype=torch.bfloat16), "sinks": 5, "window": 70},
    }[name]
    check(q, [Keys(keys_and_values(2, 2, TEXT, 64, torch.bfloat16))], TEXT - queries, **options)


@pytest.mark.parametrize("queries", [1, MANY])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("text", FORMATS[1:])
def test_every_format(text: str, dim: int, queries: int) -> None:
    length, store = TEXT // 32 * 32, store_of(text)
    k, v = keys_and_values(2, 2, length, dim, torch.bfloat16)
    starts = numbers(length - queries, length // 2 - 1)
    part = Keys(coded(k, v, text), store, ends=starts + queries, reads="closed" if store.group else "all")
    check(normal(2, 8, queries, dim, dtype=torch.bfloat16), [part], starts)


@pytest.mark.parametrize("queries", [1, MANY])
def test_kivi_reads_codes_and_exact_keys_together(queries: int) -> None:
    text, length = "kivi4:32:32", TEXT // 32 * 32
    store = store_of(text)
    k, v = keys_and_values(2, 2, length, 128, torch.bfloat16)
    q, starts = normal(2, 8, queries, 128, dtype=torch.bfloat16), numbers(length - queries, length // 3)
    closed = Keys(coded(k, v, text), store, ends=starts + queries, reads="closed")
    exact = Keys((k, v), replace(store, bits=0), ends=starts + queries, reads="open")
    check(q, [closed, exact], starts)


def in_pages(tensors: tuple[Tensor, ...], page: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Tensors [B, Hkv, T, X] in pools of permuted pages, NaN (255) where nobody's, and the table."""
    rows, heads, slots = tensors[0].shape[:3]
    blocks = slots // page
    order = torch.randperm(rows * blocks + 2, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    table = order[: rows * blocks].view(rows, blocks)
    pools = []
    for x in tensors:
        pool = torch.full((len(order), heads, page, x.shape[3]), 255 if x.dtype == torch.uint8 else float("nan"))
        pool = pool.to(DEVICE, x.dtype)
        pool[table] = x.unflatten(2, (blocks, page)).transpose(1, 2)
        pools.append(pool)
    return tuple(pools), torch.cat([table, torch.full_like(table[:, :1], -1)], 1).int()


@pytest.mark.parametrize("queries", [1, MANY])
@pytest.mark.parametrize(("text", "page"), [("", 16), ("", 64), ("int8", 16), ("int4", 16), ("fp8", 16)])
def test_pages_in_any_order(text: str, page: int, queries: int) -> None:
    length, store = TEXT // page * page, store_of(text)
    tensors = coded(*keys_and_values(2, 2, length, 128, torch.bfloat16), text)
    pools, table = in_pages(tensors, page)
    starts, q = numbers(length - queries, length // 2), normal(2, 8, queries, 128, dtype=torch.bfloat16)
    ends = (starts + queries).clamp(max=length)
    for options in ({}, {"window": 100, "sinks": 3}):
        check(q, [Keys(pools, replace(store, page=page), ends, table=table)], starts, **options)


def in_rings(tensors: tuple[Tensor, ...], ends: list[int], window: int, sinks: int) -> tuple[Tensor, ...]:
    """The last `window` and the first `sinks` tokens of each row, where a ring has them; NaN (255) elsewhere."""
    rings = []
    for x in tensors:
        ring = torch.full((*x.shape[:2], sinks + window, x.shape[3]), 255 if x.dtype == torch.uint8 else float("nan"))
        ring = ring.to(DEVICE, x.dtype)
        for row, end in enumerate(ends):
            held = torch.arange(sinks, end)[-window:].to(DEVICE) if end > sinks else numbers()
            ring[row, :, sinks + (held - sinks) % window] = x[row, :, held]
            ring[row, :, : min(sinks, end)] = x[row, :, : min(sinks, end)]
        rings.append(ring)
    return tuple(rings)


@pytest.mark.parametrize("text", ["", "int8", "int4"])
def test_rings(text: str) -> None:
    window, sinks, ends = 2 * TEXT // 5, 4, [3, TEXT // 3, TEXT]
    tensors = coded(*keys_and_values(3, 2, TEXT, 128, torch.bfloat16), text)
    q, last = normal(3, 8, 1, 128, dtype=torch.bfloat16), numbers(*ends)
    ring = Keys(
        in_rings(tensors, ends, window, sinks), replace(store_of(text), window=window, sinks=sinks), ends=last
    )  # fmt: skip
    options = {"scale": 128**-0.5, "window": window, "sinks": sinks}
    found = attention(q, [ring], last - 1, **options)
    judge(q, [Keys(tensors, store_of(text), ends=last)], last - 1, found, **options)


@pytest.mark.parametrize("text", ["", "int8", "kivi4:32:32"])
def test_rows_of_any_length_together(text: str) -> None:
    capacity, store = LONG + 32, store_of(text)
    ends = numbers(LONG + 1, 1, 0, 63, 64, 65, LONG // 2, LONG - 1)
    tensors = coded(*keys_and_values(8, 2, capacity, 128, torch.bfloat16), text)
    part = Keys(tensors, store, ends=ends, reads="closed" if store.group else "all")
    check(normal(8, 8, 1, 128, dtype=torch.bfloat16), [part], ends - 1, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_around_the_edges_of_tiles(dtype: torch.dtype) -> None:
    tensors, q = keys_and_values(1, 2, LONG + 64, 128, dtype), normal(1, 8, 1, 128, dtype=dtype)
    for length in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, LONG - 1, LONG, LONG + 1):
        check(q, [Keys(tensors, ends=numbers(length))], numbers(length - 1))


def test_prompts_around_the_edges_of_tiles() -> None:
    for length in (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, *((1023, 1024, 1025, 2049) if GPU else ())):
        q = normal(1, 8, length, 128, dtype=torch.bfloat16)
        check(q, [Keys(keys_and_values(1, 2, length, 128, torch.bfloat16))], 0)


def test_a_long_prompt_goes_on_from_a_cache() -> None:
    q = normal(1, 8, MANY, 128, dtype=torch.bfloat16)
    check(q, [Keys(keys_and_values(1, 2, LONG + 1, 128, torch.bfloat16))], LONG + 1 - MANY)


@pytest.mark.parametrize("cuts", [1, 2, 3, 7, 16, 64])
def test_however_often_a_sequence_is_split(cuts: int) -> None:
    q = normal(2, 8, 1, 128, dtype=torch.bfloat16)
    ends = numbers(LONG + 1, 5)
    check(q, [Keys(keys_and_values(2, 2, LONG + 1, 128, torch.bfloat16), ends=ends)], ends - 1, cuts=cuts)


@pytest.mark.parametrize("queries", [1, MANY])
def test_what_lies_beyond_the_end_is_never_read(queries: int) -> None:
    for text in ("", "int4"):
        tensors = coded(*keys_and_values(2, 2, TEXT, 128, torch.bfloat16), text)
        starts = numbers(0, TEXT - queries - 10)
        behind = torch.arange(TEXT, device=DEVICE) >= (starts + queries).view(-1, 1)
        poison = [
            x.masked_fill(behind[:, None, :, None], 255 if x.dtype == torch.uint8 else float("nan")) for x in tensors
        ]
        q = normal(2, 8, queries, 128, dtype=torch.bfloat16)
        clean, dirty = (
            attention(q, [Keys(tuple(t), store_of(text), ends=starts + queries)], starts, scale=0.1)
            for t in (tensors, poison)
        )
        assert same(clean[0], dirty[0])
        assert same(clean[1], dirty[1])


def test_addresses_beyond_the_range_of_32_bits() -> None:
    far, dim = (1 << 31) + 4096, 64
    memory = torch.empty(far + 2 * 64 * dim, dtype=torch.float16, device=DEVICE)
    q = normal(2, 1, 1, dim, dtype=torch.float16)
    k = memory.as_strided((2, 1, 32, dim), (far, 32 * dim, dim, 1))
    v = memory.as_strided((2, 1, 32, dim), (far, 32 * dim, dim, 1), storage_offset=32 * dim)
    k[:], v[:] = normal(2, 1, 32, dim, seed=1), normal(2, 1, 32, dim, seed=2)
    near = attention(q, [Keys((k.contiguous(), v.contiguous()))], 31, scale=0.25)[0]
    paged = Keys((k, v), Store(page=32), table=numbers(0, 1).view(2, 1), ends=numbers(32, 32))
    for part in (Keys((k, v)), paged):
        assert same(attention(q, [part], 31, scale=0.25)[0], near)


# ---------------------------------------------------------------------- what serving needs


def steps_of(text: str, ends: Tensor, capacity: int, queries: int = 1) -> Callable[[], tuple[Tensor, Tensor]]:
    """A step of decoding (or a chunk of a prompt) over a cache of that format, whose lengths are in `ends`."""
    store = store_of(text)
    tensors = coded(*keys_and_values(len(ends), 2, capacity, 128, torch.bfloat16), text)
    q = normal(len(ends), 8, queries, 128, dtype=torch.bfloat16)
    part = Keys(tensors, store, ends=ends, reads="closed" if store.group else "all")
    return lambda: attention(q, [part], ends - queries, scale=128**-0.5)


def compiled(kernel: Any) -> int:
    """How many variants of a kernel there are on all devices."""
    return sum(len(caches[0]) for caches in kernel.device_caches.values())


def variants_over_lengths() -> dict[str, int]:
    """Kernels that texts of many lengths compile, beyond those of one that is split over programs and a short one."""
    kernels = {"attention": attention_module._attention_kernel, "append": append_module._append_kernel}
    one = numbers(1)
    first: dict[str, int] = {}
    for length in (64, 5001, 65, 100, 128, 1000, 1024, 4096, 16384):
        if length == 65:
            first = {name: compiled(kernel) for name, kernel in kernels.items()}
        k, v = keys_and_values(1, 2, length, 128, torch.bfloat16)
        for queries in (1, 64):
            q = normal(1, 8, queries, 128, dtype=torch.bfloat16)
            for text in ("", "int8", "int4"):
                store = store_of(text)
                cache = tuple(encode(k, v, store))
                for options in ({}, {"window": length // 2, "sinks": 4}):
                    attention(q, [Keys(cache, store, ends=one)], one - 1, scale=0.1, **options)
                append(list(cache), k[:, :, :queries], v[:, :, :queries], one, None, store)
    return {name: compiled(kernel) - first[name] for name, kernel in kernels.items()}


@pytest.mark.skipif(interpreted(), reason="interpreted kernels are not compiled")
def test_no_length_compiles_anything_anew() -> None:
    assert variants_over_lengths() == {"attention": 0, "append": 0}


@pytest.mark.parametrize("queries", [1, MANY])
@pytest.mark.parametrize("text", ["", "int8", "int4", "kivi4:32:32"])
def test_the_same_call_gives_the_same_bits(text: str, queries: int) -> None:
    step = steps_of(text, numbers(LONG, LONG // 3, MANY), LONG, queries)
    (out, lse), *others = [step() for _ in range(3)]
    assert all(same(out, other) and same(lse, again) for other, again in others)


def recorded(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """A CUDA graph's replay, and the tensors that it fills; without a GPU the call itself plays the graph."""
    if not GPU:
        outs = tuple(torch.empty_like(x) for x in call())

        def play() -> None:
            for out, x in zip(outs, call(), strict=True):
                out.copy_(x)

        return play, outs
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = call()
    return graph.replay, outs


@pytest.mark.parametrize("text", ["", "int8", "int4", "kivi4:32:32"])
def test_one_cuda_graph_serves_every_length(text: str) -> None:
    ends = numbers(7, 1)
    step = steps_of(text, ends, LONG)
    replay, (out, lse) = recorded(step)
    for lengths in ((7, 1), (64, 65), (LONG, 2), (33, LONG - 1), (LONG // 2, LONG)):
        ends.copy_(numbers(*lengths))
        replay()
        eager = step()
        assert same(out, eager[0])
        assert same(lse, eager[1])


def test_a_cuda_graph_appends_where_lengths_say() -> None:
    for text in ("", "int8", "int4;page=16", "window=24;sinks=4", "kivi4:32:32"):
        layout, store = Layout.parse(text), store_of(text)
        k, v = keys_and_values(2, 2, 1, 64, torch.bfloat16)
        starts = numbers(0, 0)
        cache = fresh(layout, 2, (64, 64), 128, torch.bfloat16)
        expected = [x.clone() for x in cache]

        def write(cache=cache, k=k, v=v, starts=starts, store=store) -> tuple[Tensor, ...]:
            append(cache, k, v, starts, None, store)
            return ()

        replay, _ = recorded(write)
        for tensor, before in zip(cache, expected, strict=True):
            tensor.copy_(before)
        for step in range(0 if GPU else 50, 100 if GPU else 70):
            k.copy_(normal(2, 2, 1, 64, seed=step))
            v.copy_(normal(2, 2, 1, 64, seed=1000 + step))
            starts.copy_(numbers(step, step + 7))
            replay()
            append(expected, k, v, starts, None, store)
        assert all(same(a, b) for a, b in zip(cache, expected, strict=True)), text


# ---------------------------------------------------------------------- writing


def fresh(layout: Layout, rows: int, dims: tuple[int, int], capacity: int, dtype: torch.dtype) -> list[Tensor]:
    """A cache of bytes that are no sensible code; its pages are in no order."""
    blocks = -(-capacity // layout.page) if layout.page else 0
    cache = []
    for spec in layout.specs(*dims, dtype, layout.page or layout.slots(capacity)):
        made = torch.empty(rows * blocks + 2 if blocks else rows, 2, spec.slots, *spec.tail, dtype=spec.dtype)
        made.view(torch.uint8).fill_(0x7B)
        cache.append(made.to(DEVICE))
    if blocks:
        order = torch.randperm(rows * blocks, generator=torch.Generator().manual_seed(1))
        cache.append(order.view(rows, blocks).to(DEVICE, torch.int32))
    return cache


def delicate(dim: int) -> Tensor:
    """Vectors [1, 1, T, D] where rounding, denormals, overflow or NaN decide."""
    x = torch.randn(20, dim, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x[1] = -3.3  # a constant group
    x[2, 1] = float("nan")
    x[3, 2], x[4, 3] = float("inf"), -float("inf")
    for row, factor in enumerate((1e-6, 1e-9, 1e-42, 60000.0, 1e7, 1e38), start=5):
        x[row] *= factor
    x[11, 0] = -70000.0  # no float16 is a minimum
    x[12] = x[12].abs() + 70000.0
    x[13] = torch.arange(dim) / 2 - 63.5 * 2  # halves of a step: ties
    x[14] = torch.arange(dim) % 31 * 0.5
    x[15] = -x[14]
    x[16] = x[16].abs()  # the minimum is above 0
    x[17] = 65504.0
    x[18] *= torch.logspace(-30, 30, dim)
    return x[None, None].to(DEVICE)


def settled(x: Tensor) -> Tensor:
    """Parameters with one NaN and one zero: which of several a minimum is, no device promises."""
    return x if x.dtype == torch.uint8 else torch.where(x.isnan(), float("nan"), x + 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", ["int8", "int4", "fp8"])
def test_codes_and_parameters_are_those_of_the_format(text: str, dtype: torch.dtype) -> None:
    fmt = KVFormat.parse(text)
    many = (1 << 16) if GPU else 64
    for k in (delicate(64), delicate(80), normal(1, 2, many, 128) * 3):
        x = k.to(dtype)
        expected = [*encode_tokens(x, fmt), *encode_tokens(x, fmt)]
        found = encode(x, x, store_of(text))
        assert all(same(settled(a), settled(b)) for a, b in zip(found, expected, strict=True))


LAYOUTS = ["", "int8", "int4", "fp8", "kivi4:32:32", "kivi8:32:0", "kivi4:128:0"]
LAYOUTS += [f"{name}{place}" for name in ("", "int8;", "int4;") for place in ("window=100;sinks=4", "page=16")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("text", LAYOUTS)
def test_a_prompt_and_steps_leave_the_cache_that_the_layout_leaves(text: str, dtype: torch.dtype) -> None:
    layout, store = Layout.parse(text), store_of(text)
    first = 777 if GPU else 140
    pieces = [([0, 0], first, None), ([first, first - 300 if GPU else 99], 1, None), ([first + 1, first], 1, None)]
    pieces.append(([first + 2, 130], 200 if GPU else 60, [first + 50, 140]))
    cache = fresh(layout, 2, (128, 80), first + 210, dtype)
    expected = [x.clone() for x in cache]
    for number, (starts, length, stops) in enumerate(pieces):
        k, v = (normal(2, 2, length, d, seed=10 * number + i, dtype=dtype) for i, d in enumerate((128, 80)))
        begin, end = numbers(*starts), None if stops is None else numbers(*stops)
        append(cache, k, v, begin, end, store)
        layout.exchange(expected, k, v, begin, end, end=max(starts) + length, ragged=True, first=True, last=True)
        for index in range(store.pieces):
            got, wanted = cache[index], expected[index]
            if layout.page:
                got, wanted = got[:-1], wanted[:-1]  # the layout throws padding there
            elif stops and str(layout) == str(layout.format) and not store.group:  # and writes it into a dense store
                read = torch.arange(got.shape[2], device=DEVICE) < numbers(*stops).view(-1, 1)
                got, wanted = (x.transpose(1, 2)[read] for x in (got, wanted))
            assert same(got, wanted), f"piece {number}, tensor {index}"


# ---------------------------------------------------------------------- the others


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_parts(dtype: torch.dtype) -> None:
    parts, lses = normal(9, 2, 8, 5, 128, dtype=dtype), normal(9, 2, 8, 5, seed=1) * 10
    lses[1] = float("-inf")
    lses[:, 0, 0, 0] = float("-inf")
    parts[torch.isneginf(lses)] = float("nan")
    for sink_logits in (None, normal(8, seed=2)):
        out, lse = merge(parts, lses, sink_logits)
        wide = merge_reference(parts.double(), lses.double(), None if sink_logits is None else sink_logits.double())
        plain = merge_reference(parts, lses, sink_logits)
        empty = torch.isneginf(wide[1])
        assert torch.equal(torch.isneginf(lse), empty)
        assert error(out, wide[0]) <= 2 * error(plain[0], wide[0]) + 1e-5
        assert error(lse[~empty], wide[1][~empty]) <= 2 * error(plain[1][~empty], wide[1][~empty]) + 1e-5


def test_a_cache_and_what_is_not_yet_in_it_give_attention_over_both() -> None:
    k, v = keys_and_values(2, 2, TEXT, 128, torch.bfloat16)
    q, starts = normal(2, 8, 30, 128, dtype=torch.bfloat16), numbers(TEXT - 30, TEXT // 2)
    rows = starts.view(-1, 1, 1, 1) + torch.arange(30, device=DEVICE).view(1, 1, -1, 1)
    new = Keys(tuple(x.gather(2, rows.expand(-1, 2, -1, 128)) for x in (k, v)), base=starts)
    found = attention(q, [Keys((k, v), ends=starts), new], starts, scale=128**-0.5)
    judge(q, [Keys((k, v), ends=starts + 30)], starts, found, scale=128**-0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"strict": True}, {"window": 70, "sinks": 5}, {"softcap": 3.0}, {"alibi": True}],
    ids=str,
)
def test_sums_of_columns(options: dict[str, Any], dtype: torch.dtype) -> None:
    queries, keys, dim = MANY, TEXT, 128
    q, k = normal(2, 8, queries, dim, dtype=dtype), normal(2, 2, keys, dim, seed=1, dtype=dtype)
    options = {"scale": dim**-0.5, "causal": True, "strict": False, "window": 0, "sinks": 0, "softcap": 0.0} | options
    options["alibi_slopes"] = torch.linspace(0.01, 0.1, 8, device=DEVICE) if options.pop("alibi", False) else None
    places = torch.arange(keys - queries, keys, device=DEVICE).expand(2, -1)
    weights = normal(2, queries, seed=3).abs()
    masks = dict(options)
    exact_keys = Keys((k.double(), k.double()))
    _, lse = attention_reference(q.double(), [exact_keys], keys - queries, **{n: doubled(x) for n, x in masks.items()})
    exact = column_mass_reference(
        q.double(), k.double(), lse, weights.double(), places, None, **{n: doubled(x) for n, x in options.items()}
    )
    plain = column_mass_reference(q, k, lse.float(), weights, places, None, **options)
    found = column_mass(q, k, lse.float(), weights, places, None, **options)
    assert error(found, exact) <= 2 * error(plain, exact) + 1e-5
    assert same(found, column_mass(q, k, lse.float(), weights, places, None, **options))


@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES], ids=str)
def test_survivors_and_pages_keep_every_bit(dtype: torch.dtype) -> None:
    size = torch.empty((), dtype=dtype).element_size()

    def noise(*shape: int, seed: int) -> Tensor:
        made = torch.Generator().manual_seed(seed)
        some = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=made)
        return some.to(DEVICE).view(dtype)

    x = noise(2, 3, TEXT, 80, seed=0)
    index = torch.randint(-1, TEXT, (2, 3, TEXT // 2), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert same(compact(x, index), compact_reference(x, index))
    pool, table = noise(40, 3, 16, 80, seed=2), torch.randperm(40, generator=torch.Generator().manual_seed(3))
    table = table[:20].view(2, 10).to(DEVICE)
    expected = pool.clone()
    for starts, stops in ((numbers(0, 37), numbers(100, 90)), (numbers(101, 90), None)):
        for function, target in ((scatter_pages, pool), (scatter_pages_reference, expected)):
            function(target, x[:, :, :60], table, starts, stops)
        assert same(pool, expected)
    source, target = numbers(0, 3, -1, 7), numbers(20, 21, 22, 99)
    copy_pages([pool], source, target)
    copy_pages_reference([expected], source, target)
    assert same(pool, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "pairs"), [(64, 32), (128, 64), (80, 16), (256, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_and_the_write_into_the_cache(dtype: torch.dtype, dim: int, pairs: int, interleaved: bool) -> None:
    length, starts = 33, numbers(0, 61)
    where = starts.view(-1, 1) + torch.arange(length, device=DEVICE)
    angle = where.unsqueeze(-1) * 10000.0 ** (-torch.arange(pairs, device=DEVICE, dtype=torch.float64) / pairs)
    cos, sin = angle.cos().float(), angle.sin().float()
    q, k, v = (normal(2, heads, length, dim, seed=i, dtype=dtype) for i, heads in enumerate((8, 2, 2)))
    for text in ("", "window=24;sinks=4", "page=16"):
        layout, store = Layout.parse(text), store_of(text)
        cache = fresh(layout, 2, (dim, dim), 100, dtype)
        wide = [x.double() if x.is_floating_point() else x for x in cache]
        before, plain = [x.clone() for x in cache], [x.clone() for x in cache]
        out = rope_append(q, k, v, cos, sin, cache, starts, None, store, interleaved=interleaved)
        exact = rope_append_reference(
            *(x.double() for x in (q, k, v, cos, sin)), wide, starts, None, store, interleaved=interleaved
        )
        torches = rope_append_reference(q, k, v, cos, sin, plain, starts, None, store, interleaved=interleaved)
        assert error(out, exact) <= 2 * error(torches, exact) + 1e-5
        written = wide[0] != before[0].double()
        assert error(cache[0][written], wide[0][written]) <= 2 * error(plain[0][written], wide[0][written]) + 1e-5
        assert same(cache[0][~written], before[0][~written]), "only the places of new tokens are touched"
        assert same(cache[1], plain[1])
