"""Every layout of a cache against attention written out, however the text is cut into pieces.

A store starts as garbage (`POISON`), so that reading what was never written shows: as NaN where rows have one length,
which nothing survives, and as large finite numbers where rows differ and a mask has to hide them.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpass.errors import PlanError
from kvpass.ir import ops
from kvpass.ir.kv_format import KVFormat, decode_channels, decode_tokens, encode_channels, encode_tokens
from kvpass.ir.kv_layout import Layout
from kvpass.ir.plan import CachePlan, LayerCache
from kvpass.runtime.state import State

attention, attend, attend_shared, feedback = (
    getattr(torch.ops.kvpass, name).default for name in ("attention", "attend", "attend_shared", "feedback")
)

DIM, VALUE_DIM, HEADS, KV_HEADS, SCALE = 8, 12, 4, 2, 0.6
LENGTH = 41
TOLERANCE = 1e-10  # everything is float64 here; codes are computed from the same numbers on both sides

TOKEN_FORMATS = ["", "int8", "int4", "int2", "fp8"]
KIVI_FORMATS = ["kivi4:8:16", "kivi2:8:0", "kivi8:16:16"]
ADDRESSES = ["", "window=5;sinks=2", "window=4", "window=1", "window=3;sinks=7", "page=4", "page=3;window=5;sinks=2"]
PAIRS = [*itertools.product(["", "int4"], ADDRESSES), *itertools.product(["int8", "int2", "fp8"], ADDRESSES[:6:5])]
TOKEN_LAYOUTS = [";".join(filter(None, pair)) for pair in [*PAIRS, ("fp8", "window=5;sinks=2")]]
LAYOUTS = TOKEN_LAYOUTS + KIVI_FORMATS
SPLITS = [(41,), (1,) * 41, (17, 1, 1, 9, 2, 11), (1, 40), (6, 7, 8, 20), (3, 1, 1, 1, 30, 5)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def qkv(batch=2, length=LENGTH, dtype=torch.float64, seed=0):
    shapes = [(batch, HEADS, length, DIM), (batch, KV_HEADS, length, DIM), (batch, KV_HEADS, length, VALUE_DIM)]
    g = rng(seed)
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)


# ---------------------------------------------------------------------- attention, written out


def stored(k, v, fmt):
    """Keys and values as they come back from the store: quantized copies [.., T, D], as far as groups are whole."""
    if fmt.full:
        return k, v
    if fmt.layout == "token":
        return tuple(decode_tokens(*encode_tokens(x, fmt), fmt, x.shape[-1], x.dtype) for x in (k, v))
    keys = k.clone()
    for low in range(0, k.shape[2] // fmt.group * fmt.group, fmt.group):
        part = slice(low, low + fmt.group)
        keys[:, :, part] = decode_channels(*encode_channels(k[:, :, part], fmt), fmt, k.shape[-1], k.dtype)
    return keys, decode_tokens(*encode_tokens(v, fmt), fmt, v.shape[-1], v.dtype)


def by_definition(q, k, v, layout="", *, at=None, window=0, sinks=0, strict=False, causal=True, softcap=0.0,
                  sink_logits=None, slopes=None, mask=None, sink_q=None):  # fmt: skip
    """Softmax attention, one query at a time; query i of a row stands at position at[i] (T - S + i where not given)."""
    fmt = Layout.parse(layout).format
    batch, heads, count, _ = q.shape
    keys = k.shape[2]
    group = heads // k.shape[1]
    at = list(range(keys - count, keys)) if at is None else at
    kq, vq = stored(k, v, fmt)
    out = torch.zeros(batch, heads, count, v.shape[3], dtype=torch.float64)
    for i, t in enumerate(at):
        closed = fmt.group * (max(0, t + 1 - fmt.residual) // fmt.group) if fmt.layout == "kivi" else keys
        seen = []
        for j in range(keys):
            before = j < t if strict else j <= t or not causal
            if before and (window == 0 or j > t - window or j < sinks):
                seen.append(j)
        if not seen:
            continue
        where = torch.tensor(seen)
        old = (where < closed).view(-1, 1)
        k_read = torch.where(old, kq[:, :, where], k[:, :, where]).repeat_interleave(group, 1)
        v_read = torch.where(old, vq[:, :, where], v[:, :, where]).repeat_interleave(group, 1)
        scores = (k_read @ q[:, :, i].unsqueeze(-1)).squeeze(-1)
        if sink_q is not None:
            other = (k_read @ sink_q[:, :, i].unsqueeze(-1)).squeeze(-1)
            scores = torch.where(where < sinks, other, scores)
        scores = scores * SCALE
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores + slopes.double().view(1, -1, 1) * (where - t)
        if mask is not None:
            column = mask.expand(batch, heads, *mask.shape[2:])[:, :, i, where]
            scores = scores.masked_fill(~column, -math.inf) if column.dtype == torch.bool else scores + column
        weights = (scores - scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
        total = weights.sum(-1, keepdim=True)
        if sink_logits is not None:
            shift = scores.amax(-1, keepdim=True)
            total = total + (sink_logits.double().view(1, -1, 1) - shift).exp()
        out[:, :, i] = ((weights / total.clamp_min(1e-300)).unsqueeze(2) @ v_read).squeeze(2)
    return out


def close(found, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------- stores of garbage


def poison(tensor, nan):
    if tensor.dtype == torch.uint8:  # codes: as fp8, 0x7F is a NaN and 0x6F is 120
        return tensor.fill_(0x7F if nan else 0x6F)
    return tensor.fill_(math.nan if nan else (100.0 if tensor.dtype == torch.float16 else 1e4))


class Store:
    """A store as the runtime would hold it, filled with garbage: NaN, or large numbers."""

    def __init__(self, text, batch, capacity, nan=True, dtype=torch.float64, seed=0):
        self.layout, self.nan = Layout.parse(text), nan
        self.paged = self.layout.page > 0
        if self.paged:
            blocks = -(-capacity // self.layout.page)
            count = batch * blocks + 3  # three pages nobody has, and the spare one
            order = torch.randperm(count, generator=rng(seed))[: batch * blocks].view(batch, blocks)
            self.pages = order
            rows, slots = count + 1, self.layout.page
            self.table = torch.full((batch, blocks + 1), -1)
        else:
            rows, slots = batch, self.layout.slots(capacity)
        self.specs = self.layout.specs(DIM, VALUE_DIM, dtype, slots)
        self.tensors = [poison(torch.empty((rows, KV_HEADS, s.slots, *s.tail), dtype=s.dtype), nan) for s in self.specs]

    def cache(self, starts, ends):
        """What `attend` takes, once pages are there for tokens up to `ends` and those behind the window are not."""
        if not self.paged:
            return self.tensors
        page, window, sinks = self.layout.page, self.layout.window, self.layout.sinks
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            for block in range(-(-end // page)):
                held = not window or (block + 1) * page > start + 1 - window or block * page < sinks
                if held:
                    self.table[row, block] = self.pages[row, block]
                elif int(self.table[row, block]) >= 0:
                    for tensor in self.tensors:
                        poison(tensor[self.table[row, block]], False)  # another sequence writes there now
                    self.table[row, block] = -1
        return [*self.tensors, self.table]


def masks_of(text):
    layout = Layout.parse(text)
    return {"window": layout.window, "sinks": layout.sinks}


def nan_is_safe(text):
    """Where rows have one length, what was not written is not even multiplied by zero; but pages are read whole where a
    window reads some of them."""
    layout = Layout.parse(text)
    return not (layout.page and layout.window)


def run_uniform(text, steps, q, k, v, store=None, **options):
    store = store or Store(text, q.shape[0], sum(steps), nan=nan_is_safe(text))
    found, place = [], 0
    for count in steps:
        part = slice(place, place + count)
        rows = q.shape[0]
        cache = store.cache([place] * rows, [place + count] * rows)
        new = {n: t[:, :, part] for n, t in options.items() if n in ("sink_q", "mask")}
        found.append(
            attend(
                q[:, :, part], k[:, :, part], v[:, :, part], cache, torch.full((rows,), place),
                scale=SCALE, end=place + count, ragged=False, layout=text,
                **{**masks_of(text), **options, **new},
            )
        )  # fmt: skip
        place += count
    return torch.cat(found, dim=2)


# ---------------------------------------------------------------------- the stateless op


@pytest.mark.parametrize("fmt", TOKEN_FORMATS + KIVI_FORMATS)
@pytest.mark.parametrize("options", [{}, {"window": 5, "sinks": 2}, {"strict": True}, {"window": 9}], ids=str)
def test_attention_reads_keys_and_values_as_they_are_stored(fmt, options):
    q, k, v = qkv()
    found = attention(q, k, v, scale=SCALE, kv_format=fmt, **options)
    close(found, by_definition(q, k, v, fmt, **options))
    few = attention(q[:, :, -3:], k, v, scale=SCALE, kv_format=fmt, **options)
    close(few, found[:, :, -3:])
    if fmt and options != {"window": 9}:  # a window within what KIVI keeps exact
        exact = attention(q, k, v, scale=SCALE, **options)
        assert float((found - exact).abs().max()) > 1e-4, f"{fmt} changed nothing"


@pytest.mark.parametrize("fmt", ["", "int8", "kivi4:8:16"])
def test_attention_asks_the_sinks_with_a_query_of_their_own(fmt):
    q, k, v = qkv()
    other = qkv(seed=5)[0]
    options = {"window": 5, "sinks": 3}
    found = attention(q, k, v, None, None, None, other, scale=SCALE, kv_format=fmt, **options)
    close(found, by_definition(q, k, v, fmt, sink_q=other, **options))
    same = attention(q, k, v, None, None, None, q, scale=SCALE, kv_format=fmt, **options)
    close(same, by_definition(q, k, v, fmt, **options))
    assert float((found - same).abs().max()) > 0.01


@pytest.mark.parametrize("fmt", ["int8", "int4", "fp8", "kivi4:8:16"])
def test_gradients_pass_straight_through_rounding(fmt):
    q, k, v = (t.requires_grad_(True) for t in qkv(length=20))
    parsed = KVFormat.parse(fmt)
    out = attention(q, k, v, scale=SCALE, kv_format=fmt)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))

    leaves = [x.detach().clone().requires_grad_(True) for x in (q, k, v)]
    rounded = stored(k.detach(), v.detach(), parsed)
    read = [r + (leaf - leaf.detach()) for r, leaf in zip(rounded, leaves[1:], strict=True)]
    t, j = torch.arange(20).view(-1, 1), torch.arange(20)
    mask = j <= t
    if parsed.layout == "kivi":  # both versions of each token, of which a query reads one
        closed = j < (t + 1 - parsed.residual).clamp(min=0) // parsed.group * parsed.group
        mask = torch.cat([mask & closed, mask & ~closed], dim=1)
        read = [torch.cat(both, dim=2) for both in zip(read, leaves[1:], strict=True)]
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in read)
    scores = (leaves[0] @ keys.transpose(-1, -2) * SCALE).masked_fill(~mask, -math.inf)
    expected = torch.autograd.grad((scores.softmax(-1) @ values).square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
        assert float(a.abs().max()) > 1e-3


# ---------------------------------------------------------------------- rows of one length


@lru_cache
def expected_of(text, rows=2, length=LENGTH):
    return by_definition(*qkv(rows, length), text, **masks_of(text))


@pytest.mark.parametrize("steps", SPLITS, ids=lambda s: "+".join(map(str, s)) if len(s) < 9 else "1 by 1")
@pytest.mark.parametrize("text", LAYOUTS)
def test_the_cache_changes_nothing_however_the_text_is_cut(text, steps):
    close(run_uniform(text, steps, *qkv()), expected_of(text))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(LAYOUTS), st.lists(st.integers(1, 13), min_size=1, max_size=9), st.integers(0, 3))
def test_any_split_gives_the_same(text, steps, seed):
    q, k, v = qkv(batch=1, length=sum(steps), seed=seed)
    expected = attention(q, k, v, scale=SCALE, kv_format=str(Layout.parse(text).format), **masks_of(text))
    close(run_uniform(text, steps, q, k, v), expected)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINK_LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0])
EXTRAS = {
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": SLOPES},
    "sink logits": {"sink_logits": SINK_LOGITS},
    "strict": {"strict": True},
}


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize(
    "text", ["int4", "window=5;sinks=2", "int8;window=4", "page=4", "page=3;window=5", "kivi4:8:8"]
)
def test_what_else_attention_does_is_the_same_in_every_layout(text, name):
    q, k, v = qkv()
    options = EXTRAS[name]
    found = run_uniform(text, (9, 1, 1, 12, 1, 17), q, k, v, **options)
    named = {{"alibi_slopes": "slopes"}.get(n, n): o for n, o in options.items()}
    close(found, by_definition(q, k, v, text, **masks_of(text), **named))
    if name == "strict":
        assert not bool(found[:, :, 0].any())


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, HEADS)], ids=str)
@pytest.mark.parametrize("text", ["", "int8", "page=4", "kivi4:8:8"])
def test_a_mask_as_a_table_is_read_at_the_entries_positions(text, shape):
    q, k, v = qkv()
    seen = torch.rand((*shape, LENGTH, LENGTH + 6), generator=rng(3)) > 0.3  # tables are longer than the text
    bias = torch.randn((*shape, LENGTH, LENGTH + 6), generator=rng(4), dtype=torch.float64)
    for mask in (seen, bias):
        found = run_uniform(text, (9, 1, 1, 13, 17), q, k, v, mask=mask)
        close(found, by_definition(q, k, v, text, mask=mask))


@pytest.mark.parametrize(
    "text", ["window=5;sinks=3", "int8;window=5;sinks=3", "fp8;window=2;sinks=1", "page=4;window=5;sinks=3"]
)
def test_the_sinks_query_is_asked_of_the_sinks_alone(text):
    q, k, v = qkv()
    other = qkv(seed=5)[0]
    found = run_uniform(text, (4, 1, 1, 20, 1, 1, 13), q, k, v, sink_q=other)
    close(found, by_definition(q, k, v, text, sink_q=other, **masks_of(text)))


@pytest.mark.parametrize("steps", [(41,), (1,) * 41, (6, 7, 8, 20), (1, 1, 30, 1, 8)], ids=str)
@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (4, 0), (1, 0), (3, 7), (1, 1)])
def test_a_ring_keeps_each_slots_latest_token_and_nothing_else(window, sinks, steps):
    text = f"window={window};sinks={sinks}" if sinks else f"window={window}"
    q, k, v = qkv()
    store = Store(text, 2, 1000)
    place = 0
    for count in steps:
        part = slice(place, place + count)
        place += count
        attend(
            q[:, :, part], k[:, :, part], v[:, :, part], store.tensors, torch.full((2,), place - count),
            scale=SCALE, end=place, ragged=False, layout=text, window=window, sinks=sinks,
        )  # fmt: skip
        latest = {}
        for p in range(place):
            latest[p if p < sinks else sinks + (p - sinks) % window] = p
        for tensor, new in zip(store.tensors, (k, v), strict=True):
            assert tensor.shape[2] == sinks + window
            for slot in range(sinks + window):
                if slot in latest:
                    assert torch.equal(tensor[:, :, slot], new[:, :, latest[slot]]), f"slot {slot} at {place}"
                else:
                    assert bool(tensor[:, :, slot].isnan().all()), f"slot {slot} was written before its time"


def test_a_ring_is_no_longer_than_what_it_is_to_hold():
    layout = Layout.parse("window=8;sinks=2")
    assert [layout.slots(n) for n in (1, 9, 10, 11, 10**6)] == [1, 9, 10, 10, 10]
    q, k, v = qkv(length=9)  # a short ring, as a short text gets one
    found = run_uniform("window=8;sinks=2", (4, 1, 4), q, k, v)
    close(found, by_definition(q, k, v, window=8, sinks=2))


# ---------------------------------------------------------------------- rows of different lengths

LENGTHS = (9, 2, 14, 1)


def run_ragged(text, lengths, later, q, k, v, chunk=None, store=None, **options):
    """A right-padded prefill with `stops`, whole or in chunks, then pieces at each row's own place."""
    rows, longest = len(lengths), max(lengths)
    store = store or Store(text, rows, longest + sum(later), nan=False)
    stops = torch.tensor(lengths)
    beside = {n: t for n, t in options.items() if n == "sink_q"}
    options = {**masks_of(text), **{n: o for n, o in options.items() if n not in beside}}
    garbage = torch.arange(longest).view(1, 1, -1, 1) >= stops.view(-1, 1, 1, 1)
    padded = [t[:, :, :longest].masked_fill(garbage, 55.0) for t in (q, k, v)]
    found = [[] for _ in range(rows)]
    for start in range(0, longest, chunk or longest):
        stop = min(start + (chunk or longest), longest)
        cache = store.cache([min(start, n) for n in lengths], [min(stop, n) for n in lengths])
        out = attend(
            *(t[:, :, start:stop] for t in padded), cache, torch.full((rows,), start), stops,
            scale=SCALE, end=stop, ragged=False, layout=text,
            **{n: t[:, :, start:stop] for n, t in beside.items()}, **options,
        )  # fmt: skip
        for row, n in enumerate(lengths):
            found[row].append(out[row, :, : max(0, n - start)])
    starts = stops.clone()
    for count in later:
        where = starts.view(-1, 1) + torch.arange(count)
        new = [torch.stack([t[row][:, where[row]] for row in range(rows)]) for t in (q, k, v, *beside.values())]
        cache = store.cache(starts.tolist(), (starts + count).tolist())
        out = attend(
            *new[:3], cache, starts, scale=SCALE, end=int(starts.max()) + count, ragged=True, layout=text,
            **dict(zip(beside, new[3:], strict=True)), **options,
        )  # fmt: skip
        for row in range(rows):
            found[row].append(out[row])
        starts = starts + count
    return [torch.cat(parts, dim=1) for parts in found], starts.tolist()


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("text", LAYOUTS)
def test_rows_of_different_lengths_are_as_if_alone(text, chunk):
    q, k, v = qkv(batch=4, length=30)
    found, ends = run_ragged(text, LENGTHS, (1, 1, 5, 1, 8), q, k, v, chunk)
    for row, end in enumerate(ends):
        close(found[row], expected_of(text, 4, 30)[row, :, :end])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(LAYOUTS),
    st.lists(st.integers(1, 17), min_size=2, max_size=3),
    st.lists(st.integers(1, 9), min_size=0, max_size=5),
    st.sampled_from([None, 1, 2, 5]),
)
def test_any_lengths_and_any_split_give_the_same(text, lengths, later, chunk):
    if len(set(lengths)) == 1:
        lengths = [*lengths, lengths[0] + 1]
    total = max(lengths) + sum(later)
    q, k, v = qkv(batch=len(lengths), length=total)
    found, ends = run_ragged(text, lengths, later, q, k, v, chunk)
    fmt = str(Layout.parse(text).format)
    for row, end in enumerate(ends):
        alone = [t[row : row + 1, :, :end] for t in (q, k, v)]
        close(found[row].unsqueeze(0), attention(*alone, scale=SCALE, kv_format=fmt, **masks_of(text)))


@pytest.mark.parametrize("text", ["window=5;sinks=3", "int8;window=2;sinks=1", "page=4;window=5;sinks=3"])
def test_rows_of_different_lengths_have_queries_of_their_own_for_the_sinks(text):
    q, k, v = qkv(batch=4, length=30)
    other = qkv(batch=4, length=30, seed=6)[0]
    found, ends = run_ragged(text, LENGTHS, (1, 5, 1, 8), q, k, v, 4, sink_q=other)
    for row, end in enumerate(ends):
        alone = [t[row : row + 1, :, :end] for t in (q, k, v)]
        expected = by_definition(*alone, text, sink_q=other[row : row + 1, :, :end], **masks_of(text))
        close(found[row].unsqueeze(0), expected)


@pytest.mark.parametrize("fmt", TOKEN_FORMATS)
def test_padding_is_written_to_the_spare_page_and_no_other(fmt):
    text = ";".join(filter(None, (fmt, "page=4")))
    q, k, v = qkv(batch=4, length=30)
    store = Store(text, 4, 30, nan=True)
    before = [t.clone() for t in store.tensors]
    run_ragged(text, LENGTHS, (), q, k, v, store=store)
    taken = {int(p) for p in store.table.flatten() if p >= 0}
    assert len(taken) == sum(-(-n // 4) for n in LENGTHS)
    for tensor, old in zip(store.tensors, before, strict=True):
        for page in range(len(tensor) - 1):
            same = torch.equal(tensor[page].nan_to_num(7.0), old[page].nan_to_num(7.0))
            assert same == (page not in taken)
        for row, length in enumerate(LENGTHS):
            page, place = store.table[row, (length - 1) // 4], length % 4
            if place:
                left, was = tensor[page, :, place:], old[page, :, place:]
                assert torch.equal(left.nan_to_num(7.0), was.nan_to_num(7.0)), f"row {row}: padding was kept"


# ---------------------------------------------------------------------- several readers of one store


READERS = {
    "": [{}, {"window": 4}, {"window": 3, "sinks": 2}],
    "int8": [{}, {"window": 4}, {"window": 3, "sinks": 2}],
    "page=4": [{"window": 4}, {}, {"window": 30}],
    "kivi4:8:8": [{"window": 5}, {}, {"window": 20, "sinks": 1}],
    "window=6;sinks=2": [{"window": 4, "sinks": 2}, {"window": 6, "sinks": 2}, {"window": 1}],
    "int4;window=6;sinks=2": [{"window": 6}, {"window": 2, "sinks": 1}, {"window": 6, "sinks": 2}],
    "page=4;window=6;sinks=2": [{"window": 6}, {"window": 2, "sinks": 1}, {"window": 6, "sinks": 2}],
}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("text", READERS)
def test_layers_that_share_a_store_each_read_it_through_their_own_window(text, ragged):
    readers, total, rows = READERS[text], 38, 3
    texts = [qkv(batch=rows, length=total, seed=s) for s in range(len(readers))]
    _, k, v = texts[0]
    store = Store(text, rows, total, nan=not ragged and nan_is_safe(text))
    starts = torch.tensor([0, 0, 0])
    lengths = torch.tensor([6, 1, 9]) if ragged else torch.tensor([9, 9, 9])
    found = [[[] for _ in range(rows)] for _ in readers]
    for count in (9, 1, 1, 14, 1, 3):
        first_piece = count == 9
        where = starts.view(-1, 1) + torch.arange(count)
        new_k, new_v = (torch.stack([t[row][:, where[row]] for row in range(rows)]) for t in (k, v))
        stops = lengths if first_piece and ragged else None
        ends = (starts + count) if stops is None else stops
        cache = store.cache(starts.tolist(), ends.tolist())
        taken = len({*starts.tolist()}) > 1
        for index, options in enumerate(readers):
            new_q = torch.stack([texts[index][0][row][:, where[row]] for row in range(rows)])
            before = [t.clone() for t in store.tensors]
            out = attend(
                new_q, new_k, new_v, cache, starts, stops, scale=SCALE, end=int(starts.max()) + count, ragged=taken,
                layout=text, first=index == 0, last=index == len(readers) - 1, **options,
            )  # fmt: skip
            if 0 < index < len(readers) - 1:
                for old, new in zip(before, store.tensors, strict=True):
                    assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0)), "a reader between wrote the store"
            for row in range(rows):
                kept = count if stops is None else int(stops[row])
                found[index][row].append(out[row, :, :kept])
        starts = ends.clone()
    for index, options in enumerate(readers):
        for row in range(rows):
            end = int(starts[row])
            q = texts[index][0][row : row + 1, :, :end]
            expected = by_definition(q, k[row : row + 1, :, :end], v[row : row + 1, :, :end], text, **options)
            close(torch.cat(found[index][row], dim=1).unsqueeze(0), expected)


# ---------------------------------------------------------------------- stores written from above

SHARED = [";".join(filter(None, pair)) for pair in itertools.product(TOKEN_FORMATS, ["", "page=4"])]


def write(store, k, v, starts, stops=None, ragged=False):
    layout, count = store.layout, k.shape[2]
    ends = starts + count if stops is None else torch.minimum(starts + count, stops)
    cache = store.cache(starts.tolist(), ends.tolist())
    layout.write(cache, k, v, starts, stops, end=int(starts.max()) + count, ragged=ragged)


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 4, "sinks": 2}, {"softcap": 1.5}], ids=str)
@pytest.mark.parametrize("text", SHARED)
def test_a_layer_reads_the_store_above_it_strictly_before_its_own_token(text, options):
    q, k, v = qkv(length=12)
    store = Store(text, 2, 20)
    write(store, k[:, :, :9], v[:, :, :9], torch.tensor([0, 0]))
    common = {"scale": SCALE, "value_dim": VALUE_DIM, "layout": text, "ragged": False, **options}
    cache = store.cache([0, 0], [9, 9])
    expected = by_definition(q[:, :, :9], k[:, :, :9], v[:, :, :9], text, strict=True, **options)
    close(attend_shared(q[:, :, :9], cache, torch.tensor([0, 0]), end=9, **common), expected)
    close(ops.attend_shared_reference(q[:, :, :9], cache, torch.tensor([0, 0]), end=9, **common), expected)
    assert not bool(expected[:, :, 0].any())
    # the next token: its own slot is not written yet, and must not matter
    cache = store.cache([9, 9], [10, 10])
    for tensor, piece in zip(store.tensors, store.layout._encode(1e4 * k[:, :, :1].sign(), v[:, :, :1]), strict=True):
        if store.paged:
            tensor[store.table[:, 2], :, 1] = piece[:, :, 0]
        else:
            tensor[:, :, 9] = piece[:, :, 0]
    keys, values = (torch.cat([t[:, :, :9], t[:, :, :1]], dim=2) for t in (k, v))
    expected = by_definition(q[:, :, 9:10], keys, values, text, strict=True, **options)
    close(attend_shared(q[:, :, 9:10], cache, torch.tensor([9, 9]), end=10, **common), expected)


@pytest.mark.parametrize("text", SHARED)
def test_rows_of_different_lengths_read_the_store_above_them(text):
    q, k, v = qkv(batch=3, length=20)
    starts = torch.tensor([6, 0, 11])
    store = Store(text, 3, 30, nan=False)
    stops = starts.clone()
    write(store, k[:, :, :11], v[:, :, :11], torch.zeros(3, dtype=torch.long), stops)
    where = starts.view(-1, 1) + torch.arange(4)
    new = [torch.stack([t[row][:, where[row]] for row in range(3)]) for t in (q, k, v)]
    write(store, new[1], new[2], starts, ragged=True)
    cache = store.cache(starts.tolist(), (starts + 4).tolist())
    found = attend_shared(new[0], cache, starts, scale=SCALE, value_dim=VALUE_DIM, end=15, ragged=True, layout=text)
    for row, start in enumerate(starts.tolist()):
        end = start + 4
        alone = (q[row : row + 1, :, start:end], *(t[row : row + 1, :, :end] for t in (k, v)))
        close(found[row : row + 1], by_definition(*alone, text, strict=True))
    assert not bool(found[1, :, 0].any()), "the first token of a row has nothing to read"


# ---------------------------------------------------------------------- sizes and names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 8, 24, 31])
def test_bytes_are_those_of_the_tensors(length, dtype):
    wide = dtype.itemsize * (DIM + VALUE_DIM)
    per_token = {
        "": wide,
        "int8": DIM + 2 + VALUE_DIM + 2,
        "int4": DIM // 2 + 4 + VALUE_DIM // 2 + 4,
        "fp8": DIM + 2 + VALUE_DIM + 2,
    }
    for fmt, each in per_token.items():
        for address, kept in (("", length), ("page=4", length), ("window=5;sinks=2", min(length, 7))):
            layout = Layout.parse(";".join(filter(None, (fmt, address))))
            assert layout.bytes(DIM, VALUE_DIM, dtype, length) == kept * each, str(layout)
            assert layout.bytes_per_token(DIM, VALUE_DIM, dtype) == each
            if not layout.page:
                specs = layout.specs(DIM, VALUE_DIM, dtype, layout.slots(length))
                made = [torch.empty((1, 1, s.slots, *s.tail), dtype=s.dtype) for s in specs]
                assert sum(t.nbytes for t in made) == kept * each
    kivi = Layout.parse("kivi4:8:16")
    closed = max(0, length - 16) // 8 * 8
    assert kivi.format.closed(length) == closed
    quantized = closed * (DIM // 2 + VALUE_DIM // 2 + 4) + closed // 8 * DIM * 4
    assert kivi.bytes(DIM, VALUE_DIM, dtype, length) == quantized + min(24, length) * wide
    assert kivi.bytes_per_token(DIM, VALUE_DIM, dtype) == DIM // 2 + VALUE_DIM // 2 + 4 + DIM * 4 / 8


@pytest.mark.parametrize("text", [t for t in LAYOUTS if "page" not in t])
def test_a_state_allocates_what_its_layouts_say(text):
    layout = Layout.parse(text)
    cache = LayerCache(
        0, HEADS, KV_HEADS, DIM, VALUE_DIM, torch.float32, window=layout.window, sinks=layout.sinks,
        format=layout.format,
    )  # fmt: skip
    plan = CachePlan((cache,))
    assert str(plan.layout(0)) == str(layout)
    state = State.empty(plan, 3, 40, torch.device("cpu"))
    specs = layout.specs(DIM, VALUE_DIM, torch.float32, layout.slots(40))
    assert [tuple(t.shape) for t in state.stores[0]] == [(3, KV_HEADS, s.slots, *s.tail) for s in specs]
    held = sum(t.nbytes for t in state.stores[0])
    assert state.allocated_bytes() == held + 3 * 8
    if not layout.kivi:
        assert held == plan.bytes(3, 40)
    state.lengths = torch.tensor([3, 0, 40])
    assert state.used_bytes() == sum(plan.bytes(1, n) for n in (3, 0, 40))


formats = st.sampled_from(["", "int8", "int4", "int2", "fp8", "kivi4:32:128", "kivi2:8:0"]).map(KVFormat.parse)


@given(formats, st.integers(0, 5000), st.integers(0, 64), st.integers(0, 1024))
def test_a_layout_is_what_its_text_says(fmt, window, sinks, page):
    layout = Layout(fmt, window, sinks, page)
    assert Layout.parse(str(layout)) == layout
    assert layout.ring == (window > 0 and page == 0)


def test_the_text_of_a_layout():
    assert str(Layout()) == ""
    assert str(Layout(KVFormat.parse("int4"), 5, 2, 16)) == "int4;window=5;sinks=2;page=16"
    assert Layout.parse("page=16;sinks=2;int4;window=5") == Layout(KVFormat.parse("int4"), 5, 2, 16)


@pytest.mark.parametrize(
    "text", ["window=x", "window=-1", "pages=3", "page=", "int3", "int8=4", "window", "int8;;size=1"]
)
def test_what_is_no_layout_is_refused(text):
    with pytest.raises(PlanError):
        Layout.parse(text)


# ---------------------------------------------------------------------- as torch wants its ops


@pytest.mark.parametrize(
    ("text", "ragged"),
    [
        ("int8", True),
        ("int4;window=5;sinks=2", True),
        ("window=5;sinks=2", False),
        ("fp8;page=4", True),
        ("kivi4:8:8", False),
    ],
)
def test_torch_accepts_attend_in_every_layout(text, ragged):
    q, k, v = (t[:, :, :3] for t in qkv(dtype=torch.float32))
    store = Store(text, 2, 40, nan=False, dtype=torch.float32)
    starts = torch.tensor([11, 14]) if ragged else torch.tensor([14, 14])
    cache = store.cache(starts.tolist(), (starts + 3).tolist())
    options = {"scale": SCALE, "end": 17, "ragged": ragged, "layout": text, **masks_of(text)}
    torch.library.opcheck(torch.ops.kvpass.attend.default, (q, k, v, cache, starts), options)
    one = (q[:, :, :1], k[:, :, :1], v[:, :, :1], cache, starts)
    torch.library.opcheck(torch.ops.kvpass.attend.default, one, {**options, "end": 15, "last": False})


@pytest.mark.parametrize("text", ["", "int8", "page=4"])
def test_torch_accepts_attend_shared(text):
    q, k, v = (t[:, :, :7] for t in qkv(dtype=torch.float32))
    store = Store(text, 2, 20, nan=False, dtype=torch.float32)
    write(store, k, v, torch.tensor([0, 0]))
    cache = store.cache([0, 0], [7, 7])
    options = {"scale": SCALE, "value_dim": VALUE_DIM, "end": 7, "ragged": False, "layout": text, "window": 3}
    torch.library.opcheck(torch.ops.kvpass.attend_shared.default, (q, cache, torch.tensor([0, 0])), options)


def test_torch_accepts_feedback():
    ids = torch.zeros((2, 5), dtype=torch.long)
    options = {"layer": 3, "part": "k", "kv_heads": 2, "dim": 8, "dtype": torch.float64, "passes": 4}
    torch.library.opcheck(torch.ops.kvpass.feedback.default, (ids,), options)
    found = feedback(ids, **options)
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.zeros((2, 2, 5, 8), dtype=torch.float64))


@pytest.mark.parametrize(("fmt", "grad"), [("", False), ("int8", False), ("kivi4:8:0", True)])
def test_torch_accepts_attention_with_queries_for_sinks_and_formats(fmt, grad):
    q, k, v = (t[:, :, :11].requires_grad_(grad) for t in qkv(dtype=torch.float32))
    other = qkv(dtype=torch.float32, seed=4)[0][:, :, :11].requires_grad_(grad)
    options = {"scale": SCALE, "window": 4, "sinks": 2, "kv_format": fmt}
    torch.library.opcheck(torch.ops.kvpass.attention.default, (q, k, v, None, None, None, other), options)
    if grad:
        (wanted,) = torch.autograd.grad(attention(q, k, v, None, None, None, other, **options).sum(), other)
        assert bool(wanted[:, :, 2:].any())
