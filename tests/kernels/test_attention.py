"""The attention kernel against attention in float64, over every way in which keys lie and are masked."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
import triton
from torch import Tensor

import interpreter  # noqa: F401  (kernels are interpreted, and quicker with it)
from kvpass.ir.kv_format import KVFormat, encode_channels, encode_tokens
from kvpass.kernels import attention as module
from kvpass.kernels.attention import Keys, attention, attention_reference, unsupported
from kvpass.kernels.merge import merge, merge_reference
from kvpass.kernels.store import Store
from kvpass.kernels.targets import Target, Tile, forced, splits
from sanitizer import sanitize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 2e-6  # float32, of the largest output
SMALL = Tile(64, 16, 4, 1)  # several tiles of anything
FORMATS = {
    "": Store(),
    "int8": Store(bits=8),
    "int4": Store(bits=4),
    "fp8": Store(bits=8, floats=True),
    "kivi4:16:16": Store(bits=4, group=16, residual=16),
    "kivi8:32:0": Store(bits=8, group=32),
}


def checked():
    """Launches under the sanitizer where kernels are interpreted."""
    return sanitize() if triton.knobs.runtime.interpret else nullcontext()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def counts(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def coded(k: Tensor, v: Tensor, text: str) -> tuple[Tensor, ...]:
    """Keys and values as a store of that format holds them."""
    fmt = KVFormat.parse(text)
    if fmt.full:
        return k, v
    if fmt.layout == "kivi":
        keys = encode_channels(k.unflatten(2, (-1, fmt.group)), fmt)
        return (keys[0].flatten(2, 3), keys[1], *encode_tokens(v, fmt))
    return (*encode_tokens(k, fmt), *encode_tokens(v, fmt))


def in_pages(tensors: tuple[Tensor, ...], page: int, spare: int = 2) -> tuple[tuple[Tensor, ...], Tensor]:
    """Tensors [B, Hkv, T, X] in pools of permuted pages, those that nobody has poisoned, and the table."""
    batch, heads, slots = tensors[0].shape[:3]
    blocks = slots // page
    order = torch.randperm(batch * blocks + spare, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    table = order[: batch * blocks].view(batch, blocks)
    pools = []
    for x in tensors:
        pool = torch.full((len(order), heads, page, x.shape[3]), 255 if x.dtype == torch.uint8 else float("nan"))
        pool = pool.to(DEVICE, x.dtype)
        pool[table] = x.unflatten(2, (blocks, page)).transpose(1, 2)
        pools.append(pool)
    return tuple(pools), torch.cat([table, torch.full_like(table[:, :1], -1)], 1)


def doubled(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def wide(part: Keys) -> Keys:
    """A part for the reference in float64."""
    return part if part.coded else replace(part, tensors=tuple(t.double() for t in part.tensors))


def worst(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The largest error of outputs relative to the largest output, and of log-sum-exps to 1."""
    (out, lse), (right, right_lse) = found, expected
    assert torch.equal(torch.isneginf(lse), torch.isneginf(right_lse))
    assert torch.isfinite(out).all()
    empty = torch.isneginf(right_lse)
    assert not out[empty].any(), "a row with nothing to read gives zeros"
    error = (out.double() - right).abs().max() / right.abs().max().clamp(min=1e-3)
    logs = (lse.double() - right_lse)[~empty].abs()
    return max(float(error), float(logs.max()) / 4 if logs.numel() else 0.0)


def check(q: Tensor, keys: list[Keys], starts: Tensor | int, bound: float = BOUND, **options) -> tuple[Tensor, Tensor]:
    shapes = {n: options.pop(n) for n in ("tile", "cuts") if n in options}
    options.setdefault("scale", q.shape[3] ** -0.5)
    with checked():
        found = attention(q, keys, starts, **options, **shapes)
    exact = {name: doubled(value) for name, value in options.items()}
    expected = attention_reference(q.double(), [wide(p) for p in keys], starts, **exact)
    assert worst(found, expected) < bound
    return found


# ---------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Mask:
    causal: bool = True
    strict: bool = False
    window: int = 0
    sinks: int = 0
    softcap: float = 0.0

    def __str__(self) -> str:
        words = [f"{n}={v}" for n, v in vars(self).items() if v != type(self).__dataclass_fields__[n].default]
        return ",".join(words) or "causal"

    @property
    def options(self) -> dict[str, object]:
        return dict(vars(self))


MASKS = [
    Mask(),
    Mask(causal=False),
    Mask(strict=True),
    Mask(window=23),
    Mask(window=1),
    Mask(window=23, sinks=5),
    Mask(strict=True, window=9, sinks=20),
    Mask(softcap=3.0),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_prompts_of_every_mask_match_float64(mask: Mask) -> None:
    q, k, v = normal(1, 6, 75, 20), normal(1, 2, 75, 20, seed=1), normal(1, 2, 75, 12, seed=2)
    check(q, [Keys((k, v))], 0, tile=Tile(64, 16, 4, 1), **mask.options)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_steps_of_every_mask_match_float64(mask: Mask) -> None:
    q, k, v = normal(3, 6, 2, 16), normal(3, 2, 80, 16, seed=1), normal(3, 2, 80, 16, seed=2)
    starts = counts(0, 40, 77)
    check(q, [Keys((k, v), ends=starts + 2)], starts, tile=SMALL, cuts=3, **mask.options)


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 33])
def test_heads_of_every_width_match_float64(dim: int, queries: int) -> None:
    q, k, v = normal(1, 4, queries, dim), normal(1, 1, 70, dim, seed=1), normal(1, 1, 70, dim, seed=2)
    check(q, [Keys((k, v))], 70 - queries)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (9, 3), (8, 8), (71, 1)])
def test_groups_of_every_size_match_float64(heads: int, kv_heads: int) -> None:
    q, k, v = normal(1, heads, 3, 16), normal(1, kv_heads, 20, 16, seed=1), normal(1, kv_heads, 20, 16, seed=2)
    check(q, [Keys((k, v))], 17)


@pytest.mark.parametrize("queries", [2, 40])
def test_alibi_sink_logits_and_queries_of_their_own_for_sinks(queries: int) -> None:
    q, k, v = normal(2, 6, queries, 16), normal(2, 3, 60, 16, seed=1), normal(2, 3, 60, 16, seed=2)
    for options in (
        {"alibi_slopes": torch.linspace(0.05, 0.4, 6, device=DEVICE)},
        {"sink_logits": normal(6, seed=3)},
        {"sink_q": normal(2, 6, queries, 16, seed=4), "sinks": 5, "window": 12},
        {"sink_logits": normal(6, seed=3), "strict": True, "window": 1},
    ):
        check(q, [Keys((k, v))], 60 - queries, tile=SMALL, **options)


def test_strided_keys_and_queries_are_read_where_they_lie() -> None:
    q, k, v = (normal(2, 30, 4, 16, seed=i).transpose(1, 2) for i in range(3))
    check(q, [Keys((k[:, :2], v[:, 2:]))], 0)


def test_queries_that_stand_anywhere() -> None:
    q, k, v = normal(2, 2, 5, 16), normal(2, 2, 40, 16, seed=1), normal(2, 2, 40, 16, seed=2)
    starts = counts(3, 0, 39, -1, 17, 8, 8, 8, 30, -1).view(2, 5)
    places = torch.stack([torch.randperm(50, generator=torch.Generator().manual_seed(s))[:40] for s in range(2)])
    places[0, 7] = -1
    for positions in (None, places.unsqueeze(1).to(DEVICE, torch.int32)):
        for mask in (Mask(), Mask(window=9, sinks=3), Mask(strict=True)):
            check(q, [Keys((k, v), positions=positions)], starts, tile=SMALL, **mask.options)


def test_heads_whose_entries_stand_at_different_places() -> None:
    q, k, v = normal(1, 6, 1, 16), normal(1, 3, 33, 16, seed=1), normal(1, 3, 33, 16, seed=2)
    places = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(s))[:33] for s in range(3)])
    for mask in (Mask(), Mask(window=20, sinks=4)):
        check(q, [Keys((k, v), positions=places.unsqueeze(0).to(DEVICE))], counts(41), tile=SMALL, **mask.options)


# ---------------------------------------------------------------------- nothing to read


@pytest.mark.parametrize("queries", [1, 70])
def test_rows_with_nothing_to_read_give_zeros(queries: int) -> None:
    q, k, v = normal(2, 2, queries, 16), normal(2, 2, 80, 16, seed=1), normal(2, 2, 80, 16, seed=2)
    starts = counts(0, 5)
    check(q, [Keys((k, v), ends=torch.zeros_like(starts))], starts, tile=SMALL)  # no text
    check(q, [Keys((k, v))], starts, strict=True, window=1, tile=SMALL)  # all masked
    out, lse = check(q, [Keys((k, v))], counts(0, 5), strict=True, tile=SMALL)
    assert not out[0, :, 0].any()
    assert torch.isneginf(lse[0, :, 0]).all()
    out, lse = check(q, [Keys((k, v), ends=torch.zeros_like(starts))], starts, sink_logits=normal(2), tile=SMALL)
    assert torch.equal(lse[0, :, 0], normal(2))


def test_no_queries_and_no_keys() -> None:
    q, k, v = normal(1, 2, 0, 16), normal(1, 2, 4, 16, seed=1), normal(1, 2, 4, 16, seed=2)
    out, lse = attention(q, [Keys((k, v))], 0, scale=1.0)
    assert out.shape == (1, 2, 0, 16)
    assert lse.shape == (1, 2, 0)
    check(normal(1, 2, 3, 16), [Keys((k[:, :, :0], v[:, :, :0]))], 0)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33])
def test_lengths_around_the_edges_of_tiles(length: int) -> None:
    q, k, v = normal(1, 2, 1, 16), normal(1, 2, 40, 16, seed=1), normal(1, 2, 40, 16, seed=2)
    for cuts in (1, 2, 5):
        check(q, [Keys((k, v), ends=counts(length))], counts(length - 1), tile=SMALL, cuts=cuts)


# ---------------------------------------------------------------------- stores


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("text", FORMATS)
def test_every_format_matches_its_numbers_in_float64(text: str, queries: int) -> None:
    store = FORMATS[text]
    k, v = normal(2, 2, 96, 20, seed=1) + 0.5, normal(2, 2, 96, 24, seed=2)
    starts = counts(70, 96 - queries)
    part = Keys(coded(k, v, text), store, ends=starts + queries, reads="closed" if store.group else "all")
    check(normal(2, 6, queries, 20), [part], starts)
    if not store.group:
        check(normal(2, 6, queries, 20), [part], starts, window=30, sinks=3, softcap=5.0, tile=SMALL)
        sink_q = normal(2, 6, queries, 20, seed=9)
        check(normal(2, 6, queries, 20), [part], starts, window=30, sinks=3, sink_q=sink_q, tile=SMALL)


@pytest.mark.parametrize(
    ("text", "page", "queries"), [("", 16, 1), ("", 4, 20), ("int8", 16, 20), ("int4", 4, 1), ("fp8", 8, 1)]
)
def test_pages_in_any_order_give_what_one_stretch_gives(text: str, page: int, queries: int) -> None:
    store = FORMATS[text]
    tensors = coded(normal(2, 2, 64, 16, seed=1), normal(2, 2, 64, 16, seed=2), text)
    pools, table = in_pages(tensors, page)
    starts, q = counts(3, 64 - queries), normal(2, 4, queries, 16)
    for options in ({}, {"window": 10, "sinks": 3}):
        options |= {"scale": 0.25, "tile": SMALL}
        whole = attention(q, [Keys(tensors, store, ends=starts + queries)], starts, **options)
        paged = check(q, [Keys(pools, replace(store, page=page), starts + queries, table=table)], starts, **options)
        assert torch.equal(paged[0], whole[0])
        freed = torch.where(
            torch.arange(table.shape[1], device=DEVICE) * page + page <= starts.view(-1, 1) - 10, -1, table
        )
        freed[:, : -(-3 // page)] = table[:, : -(-3 // page)]
        if "window" in options:  # pages behind the window may be gone
            part = Keys(pools, replace(store, page=page), starts + queries, table=freed)
            with checked():
                assert torch.equal(attention(q, [part], starts, **options)[0], whole[0])


@pytest.mark.parametrize("text", ["", "int8"])
@pytest.mark.parametrize("ends", [(1, 4), (5, 12), (13, 14), (100, 1001)])
def test_rings_give_what_a_window_over_all_keys_gives(text: str, ends: tuple[int, int]) -> None:
    window, sinks, most = 9, 3, max(ends)
    k, v, q = normal(2, 2, most, 16, seed=1), normal(2, 2, most, 16, seed=2), normal(2, 4, 1, 16)
    tensors = coded(k, v, text)
    rings = []
    for x in tensors:
        ring = torch.full((2, 2, window + sinks, x.shape[3]), 77.0 if x.dtype == torch.uint8 else float("nan"))
        ring = ring.to(DEVICE, x.dtype)
        for row, end in enumerate(ends):
            for p in range(end):
                ring[row, :, p if p < sinks else sinks + (p - sinks) % window] = x[row, :, p]
        rings.append(ring)
    part = Keys(tuple(rings), replace(FORMATS[text], window=window, sinks=sinks), ends=counts(*ends))
    options = {"window": window, "sinks": sinks, "scale": 0.25}
    found = check(q, [part], counts(*ends) - 1, **options)
    whole = attention(q, [Keys(tensors, FORMATS[text], ends=counts(*ends))], counts(*ends) - 1, **options)
    assert worst(found, (whole[0].double(), whole[1].double())) < BOUND


def test_parts_together_give_attention_over_all_of_them() -> None:
    k, v, q = normal(2, 2, 90, 16, seed=1), normal(2, 2, 90, 16, seed=2), normal(2, 6, 30, 16)
    starts = counts(60, 50)
    whole = attention(q, [Keys((k, v), ends=starts + 30)], starts, scale=0.25, sink_logits=normal(6))
    held = Keys((k, v), ends=starts)
    rows = starts.view(-1, 1, 1, 1) + torch.arange(30, device=DEVICE).view(1, 1, -1, 1)
    fresh = Keys(tuple(x.gather(2, rows.expand(-1, 2, -1, 16)) for x in (k, v)), base=starts)
    found = check(q, [held, fresh], starts, scale=0.25, sink_logits=normal(6))
    assert worst(found, (whole[0].double(), whole[1].double())) < BOUND


def test_kivi_reads_each_entry_once_as_its_query_may() -> None:
    store, text = FORMATS["kivi4:16:16"], "kivi4:16:16"
    k, v, q = normal(1, 2, 80, 16, seed=1), normal(1, 2, 80, 16, seed=2), normal(1, 4, 40, 16)
    closed = Keys(coded(k, v, text), store, ends=counts(80), reads="closed")
    exact = Keys((k, v), replace(store, bits=0), ends=counts(80), reads="open")
    check(q, [closed, exact], counts(40), tile=SMALL)
    # every query reads all of its past: with exact keys in both places that is plain attention
    both = [Keys((k, v), replace(store, bits=0), ends=counts(80), reads=r) for r in ("closed", "open")]
    found = attention(q, both, counts(40), scale=0.25)
    assert worst(found, attention_reference(q.double(), [wide(Keys((k, v)))], 40, scale=0.25)) < BOUND


# ---------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("text", ["", "int4"])
def test_what_lies_beyond_the_end_is_never_read(text: str, queries: int) -> None:
    tensors = coded(normal(2, 2, 96, 16, seed=1), normal(2, 2, 96, 16, seed=2), text)
    starts, q = counts(0, 50), normal(2, 4, queries, 16)
    ends = starts + queries
    poisoned = [t.clone() for t in tensors]
    for t in poisoned:
        for row, end in enumerate(ends.tolist()):
            t[row, :, end:] = 255 if t.dtype == torch.uint8 else float("nan")
    for options in ({}, {"window": 10, "sinks": 2}, {"causal": False}):
        clean, dirty = (
            attention(q, [Keys(tuple(t), FORMATS[text], ends=ends)], starts, scale=0.25, tile=SMALL, **options)
            for t in (tensors, poisoned)
        )
        assert torch.equal(clean[0], dirty[0])
        assert torch.equal(clean[1], dirty[1])


def test_outputs_do_not_depend_on_what_was_in_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = normal(2, 2, 2, 16), normal(2, 2, 40, 16, seed=1), normal(2, 2, 40, 16, seed=2)
    starts = counts(0, 30)
    parts = [Keys((k, v), ends=starts + 2)]
    expected = attention(q, parts, starts, scale=0.25, strict=True, tile=SMALL, cuts=4)
    fresh = Tensor.new_empty

    def poisoned(self: Tensor, *shape, **options) -> Tensor:
        made = fresh(self, *shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    found = attention(q, parts, starts, scale=0.25, strict=True, tile=SMALL, cuts=4)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_rows_do_not_depend_on_what_they_are_batched_with() -> None:
    q, k, v = normal(3, 4, 1, 16), normal(3, 2, 64, 16, seed=1), normal(3, 2, 64, 16, seed=2)
    ends = counts(64, 10, 33)
    together, _ = attention(q, [Keys((k, v), ends=ends)], ends - 1, scale=0.25, cuts=2, tile=SMALL)
    for row in range(3):
        one = slice(row, row + 1)
        part = Keys((k[one], v[one]), ends=ends[one])
        alone, _ = attention(q[one], [part], ends[one] - 1, scale=0.25, cuts=2, tile=SMALL)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("cuts", [1, 2, 3, 8, 64])
def test_how_often_a_sequence_is_split_changes_nothing_but_rounding(cuts: int) -> None:
    q, k, v = normal(2, 4, 3, 16), normal(2, 2, 130, 16, seed=1), normal(2, 2, 130, 16, seed=2)
    check(q, [Keys((k, v), ends=counts(130, 1))], counts(127, 0), tile=SMALL, cuts=cuts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["", "int8", "int4", "fp8"])
def test_half_precision_errs_at_most_twice_as_much_as_torch(dtype: torch.dtype, text: str) -> None:
    q = normal(1, 4, 33, 32, dtype=dtype)
    k, v = normal(1, 2, 64, 32, seed=1, dtype=dtype), normal(1, 2, 64, 32, seed=2, dtype=dtype)
    part = Keys(coded(k, v, text), FORMATS[text])
    with checked():
        out, _ = attention(q, [part], 31, scale=0.2)
    exact, _ = attention_reference(q.double(), [wide(part)], 31, scale=0.2)
    plain, _ = attention_reference(q, [part], 31, scale=0.2)
    error, allowed = ((x.double() - exact).abs().max() for x in (out, plain))
    assert error <= 2 * allowed + 1e-5


def test_addresses_beyond_the_range_of_32_bits() -> None:
    far, dim = (1 << 31) + 4096, 16
    base = torch.empty(
        far + 2 * 64 * dim, dtype=torch.float16, device=DEVICE
    )  # memory that is not touched costs nothing
    q = normal(2, 1, 1, dim, dtype=torch.float16)
    k = base.as_strided((2, 1, 32, dim), (far, 32 * dim, dim, 1))
    v = base.as_strided((2, 1, 32, dim), (far, 32 * dim, dim, 1), storage_offset=32 * dim)
    k[:], v[:] = normal(2, 1, 32, dim, seed=1), normal(2, 1, 32, dim, seed=2)
    near = [x.contiguous() for x in (k, v)]
    for part in (Keys((k, v)), Keys((k, v), Store(page=32), table=counts(0, 1).view(2, 1), ends=counts(32, 32))):
        with checked():
            found, _ = attention(q, [part], 31, scale=0.25)
        assert torch.equal(found, attention(q, [Keys(tuple(near))], 31, scale=0.25)[0])
    tokens = base.as_strided((1, 1, 3, dim), (0, 0, far // 2, 1))  # rows of keys far apart
    tokens[:] = normal(1, 1, 3, dim, seed=3)
    with checked():
        found, _ = attention(q[:1], [Keys((tokens, tokens))], 2, scale=0.25, tile=Tile(16, 1, 4, 1))
    tokens = tokens.contiguous()
    expected, _ = attention(q[:1], [Keys((tokens, tokens))], 2, scale=0.25)
    assert (found - expected).abs().max() < 1e-3


# ---------------------------------------------------------------------- each mask is needed


@pytest.mark.parametrize("queries", [2, 70])
@pytest.mark.parametrize("dropped", ["CAUSAL", "STRICT", "WINDOWED", "CAPPED", "SLOPED", "SUNK", "SINKING", "READS"])
def test_a_kernel_without_one_of_its_masks_is_noticed(
    dropped: str, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = normal(1, 2, queries, 16), normal(1, 2, 72, 16, seed=1), normal(1, 2, 72, 16, seed=2)
    options = {
        "CAUSAL": {"scale": 0.25},
        "STRICT": {"strict": True},
        "WINDOWED": {"window": 5, "sinks": 2},
        "CAPPED": {"softcap": 1.0},
        "SLOPED": {"alibi_slopes": torch.tensor([0.1, 0.4], device=DEVICE)},
        "SUNK": {"sink_logits": normal(2)},
        "SINKING": {"window": 9, "sinks": 3, "sink_q": normal(1, 2, queries, 16, seed=4)},
        "READS": {},
    }[dropped]
    parts = [Keys((k, v))]
    if dropped == "READS":
        store = Store(group=16, residual=16)
        parts = [Keys((k, v), store, reads=r) for r in ("closed", "open")]
    check(q, parts, 72 - queries - (dropped == "CAUSAL"), tile=SMALL, cuts=1, **options)
    kernel = module._attention_kernel

    class Without:
        def __getitem__(self, grid):
            return lambda *a, **o: kernel[grid](*a, **{**o, dropped: 0})

    monkeypatch.setattr(module, "_attention_kernel", Without())
    with pytest.raises(AssertionError):
        check(q, parts, 72 - queries - (dropped == "CAUSAL"), tile=SMALL, cuts=1, **options)


# ---------------------------------------------------------------------- merging


def test_merging_parts_matches_float64() -> None:
    parts, lses = normal(5, 2, 3, 4, 20), normal(5, 2, 3, 4, seed=1) * 10
    lses[1] = float("-inf")
    lses[:, 0, 0, 0] = float("-inf")
    parts[torch.isneginf(lses)] = float("nan")
    for sink_logits in (None, normal(3, seed=2)):
        with checked():
            out, lse = merge(parts, lses, sink_logits)
        expected = merge_reference(parts.double(), lses.double(), None if sink_logits is None else sink_logits.double())
        assert torch.equal(torch.isneginf(lse), torch.isneginf(expected[1]))
        assert (out - expected[0]).abs().max() < BOUND * expected[0].abs().max()
        assert torch.allclose(lse.double(), expected[1], rtol=1e-6)


def test_a_merge_that_reads_empty_parts_is_noticed() -> None:
    parts = torch.full((2, 1, 1, 1, 16), float("nan"), device=DEVICE)
    parts[0] = 1.0
    lses = torch.tensor([0.0, float("-inf")], device=DEVICE).view(2, 1, 1, 1)
    assert torch.equal(merge(parts, lses)[0], torch.ones((1, 1, 1, 16), device=DEVICE))
    assert merge(parts, torch.zeros_like(lses))[0].isnan().all()


# ---------------------------------------------------------------------- shapes and refusals


def test_splits_depend_on_shapes_and_fill_the_machine() -> None:
    big = Target("sm_90", 132)
    assert splits(big, programs=8, tiles=1024) == 64  # at most
    assert splits(big, programs=8, tiles=40) == 20  # two tiles each
    assert splits(big, programs=512, tiles=1024) == 1
    for programs, tiles in product((1, 3, 64, 300), (1, 7, 100)):
        assert 1 <= splits(big, programs, tiles) <= max(1, tiles)


def test_what_no_kernel_does_is_said() -> None:
    assert "float64" in unsupported(Store(), torch.float64, 64, 64)
    assert "256 channels" in unsupported(Store(), torch.float32, 320, 64)
    assert "not 2" in unsupported(Store(bits=2), torch.float32, 64, 64)
    assert "16 to 128 tokens" in unsupported(Store(bits=4, group=8), torch.float32, 64, 64)
    assert unsupported(Store(bits=4, group=32), torch.bfloat16, 128, 128) == ""
    q = normal(1, 1, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        attention(q, [Keys((q, q))], 0, scale=1.0)


def test_a_target_is_forced_for_a_while() -> None:
    from kvpass.kernels.targets import target_of

    before = target_of(torch.device(DEVICE))
    with forced(Target("sm_80", 108)):
        assert target_of(torch.device(DEVICE)).arch == "sm_80"
    assert target_of(torch.device(DEVICE)) == before
