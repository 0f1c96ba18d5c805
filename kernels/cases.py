"""Every configuration of the kernels that a plan can ask for, to be compiled ahead of time by `kvpass.kernels.aot`.

`cases` runs the host functions on tensors that nobody fills, with the arguments that `kvpass.passes.lower_attention`
gives them: 32 query heads that share 8 KV heads unless a label says otherwise, in bfloat16. A label is unique. Where it
says "any length", the case goes through lengths, capacities and batches, and none of them may compile a kernel again.

Two kinds of queries go through a cache: those of a prompt, and a few that decode (one, or eight that verify a draft).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpass.kernels.aot import Case
from kvpass.kernels.append import append, close_groups, encode
from kvpass.kernels.attention import Keys, attention
from kvpass.kernels.column_mass import column_mass
from kvpass.kernels.gather import compact, copy_pages, scatter_pages
from kvpass.kernels.merge import merge
from kvpass.kernels.rotary import rope_append
from kvpass.kernels.store import Store

KV_HEADS, GROUP = 8, 4
DIMS = (64, 128, 256)
PROMPT = (256,)  # queries, of prompts
DECODE = (1, 8)  # and in decoding
LENGTHS = (1, 2, 3, 8, 15, 16, 17, 100, 4096)
SLOTS = 2048
BF16 = torch.bfloat16

_CODES = {"bf16": Store(), "int8": Store(8), "fp8": Store(8, floats=True), "int4": Store(4)}
STORES = {
    **_CODES,
    **{f"{name}, pages of 16": replace(store, page=16) for name, store in _CODES.items()},
    **{f"{name}, ring": replace(store, window=1024, sinks=4) for name, store in _CODES.items()},
}
"""The stores whose tokens are written one by one, by label."""
KIVI = {
    f"KIVI int{bits}, groups of {group}": Store(bits, group=group, residual=128)
    for bits in (8, 4)
    for group in (32, 64, 128)
}
"""The stores whose keys are quantized a group at a time."""


def cases(target: str) -> list[Case]:
    """All cases; they are the same for each target, and `target` is what `kvpass.kernels.aot` calls this with."""
    return [*_attention_cases(), *_append_cases(), *_column_mass_cases(), *_other_cases()]


def _attention_cases() -> list[Case]:
    masks: dict[str, dict[str, Any]] = {
        "window": {"window": 1024, "sinks": 4},
        "soft cap": {"softcap": 50.0},
        "ALiBi": {"alibi_slopes": _empty(KV_HEADS * GROUP, dtype=torch.float32)},
        "sink logits": {"sink_logits": _empty(KV_HEADS * GROUP)},
        "window, sinks scored apart": {"window": 1024, "sinks": 4, "apart": True},
        "strict": {"strict": True},
        "positions": {"placed": True},
    }
    apart = masks["window, sinks scored apart"]
    about = partial(Case, kernel="_attention_kernel")
    found = []
    for phase, queries in (("prefill", PROMPT), ("decode", DECODE)):

        def case(label: str, dim: int, queries: tuple[int, ...] = queries, phase: str = phase, **options: Any) -> None:
            store = options.get("store", Store())
            parts = 3 if store.group else 2 if store.ring and phase == "prefill" else 1
            launch = partial(_attend, dim, queries, **options)
            found.append(about(f"attention, {phase}, D {dim}, {label}", launch, parts))

        for dim in DIMS:
            case("fp32", dim, dtype=torch.float32)
            for label, store in {**STORES, **KIVI}.items():
                if store.group == 0 or store.bits == 4 or dim <= 128:
                    case(label, dim, store=store)
        case("bf16", 80)
        case("fp32", 80, dtype=torch.float32)
        case("fp16", 128, dtype=torch.float16)
        for dim in DIMS:
            case("bf16, a KV head per query head", dim, group=1)
        for label, options in masks.items():
            case(f"bf16, {label}", 128, **options)
        case("bf16, window, sinks scored apart, soft cap", 128, **apart, **masks["soft cap"])
        for label in ("bf16, pages of 16", "int8", "fp8, pages of 16", "int4", "int4, pages of 16"):
            case(f"{label}, window, sinks scored apart", 128, store=STORES[label], **apart)
        found.append(about(f"attention, {phase}, D 128, bf16, no cache", partial(_forward, queries)))
    sweep = partial(_sweep, lambda n, batch: _attend(128, (n,), batch=batch, slots=max(n, 128)))
    found.append(about("attention, prefill, D 128, bf16, any length", partial(sweep, (17, 33, 100, 128, 4096), (1, 3))))
    # of few rows with few keys one program does it all, and of others there are parts to merge
    sweep = partial(_sweep, lambda n, batch: _attend(128, DECODE, batch=batch, slots=n))
    found.append(about("attention, decode, D 128, bf16, any length", partial(sweep, LENGTHS, (1, 2, 3, 100)), 2))
    sweep = partial(_sweep, lambda n, batch: _attend(128, DECODE, STORES["int4, pages of 16"], batch=batch, slots=n))
    label = "attention, decode, D 128, int4, pages of 16, any length"
    found.append(about(label, partial(sweep, (16, 32, 48, 112, 4096), (1, 2, 3, 100)), 2))
    return found


def _append_cases() -> list[Case]:
    found = []
    for dim in DIMS:
        for label, store in STORES.items():
            if dim == 128 or store in _CODES.values():
                launch = partial(_append, dim, store, (1, 100))  # one token, and blocks of them
                found.append(Case(f"append, D {dim}, {label}", launch, 2))
        for label, store in KIVI.items():
            if dim > 128 and store.bits == 8:  # attention does not read them
                continue
            found.append(Case(f"close groups, D {dim}, {label}", partial(_append, dim, store, (1,), close_groups)))
    found.append(Case("append, D 128, bf16, ragged", partial(_append, 128, Store(), (1, 100), ragged=True), 2))
    for label, store in _CODES.items():
        if store.bits:
            k = _empty(2, KV_HEADS, 100, 128)
            found.append(Case(f"encode, D 128, {label}", partial(encode, k, k, store)))
    for label in ("bf16", "int8, ring", "int4, pages of 16"):
        launch = partial(_append_length, STORES[label])
        found.append(Case(f"append, D 128, {label}, any length", partial(_sweep, launch, LENGTHS, (1, 2, 3, 8)), 2))
    return found


def _column_mass_cases() -> list[Case]:
    masks: dict[str, Any] = {
        "window": 1024, "sinks": 4, "softcap": 50.0, "alibi_slopes": _empty(KV_HEADS * GROUP, dtype=torch.float32),
    }  # fmt: skip
    found = []
    for dim in DIMS:
        for name, dtype in (("bf16", BF16), ("fp32", torch.float32)):
            found.append(Case(f"column mass, D {dim}, {name}", partial(_column_mass, 2, dim, 64, SLOTS, dtype)))
        launch = partial(_column_mass, 2, dim, 64, SLOTS, placed=True, **masks)
        found.append(Case(f"column mass, D {dim}, bf16, positions, all of the masks", launch))
    sweep = partial(_sweep, lambda n, batch: _column_mass(batch, 128, min(n, 64), n))
    found.append(Case("column mass, D 128, bf16, any length", partial(sweep, LENGTHS, (1, 2, 3))))
    return found


def _other_cases() -> list[Case]:
    found = []
    index = torch.zeros(2, KV_HEADS, 64, dtype=torch.int64)
    for dim in DIMS:
        launch = partial(_sweep, partial(_merge, dim), (2, 3, 4, 5, 8, 16, 17, 40, 64), (1, 2, 3))
        found.append(Case(f"merge, D {dim}, any number of parts", launch, 4))  # 2, 4, 8 or 16 at a time
        found.append(Case(f"merge, D {dim}, sink logits", partial(_merge, dim, 16, 2, _empty(KV_HEADS * GROUP))))
        for label in ("bf16", "bf16, pages of 16", "bf16, ring"):
            launch = partial(_rope_append, dim, STORES[label])
            found.append(Case(f"rope and append, D {dim}, {label}, any length", partial(_sweep, launch, LENGTHS, (2,))))
        launch = partial(_rope_append, dim, Store(), interleaved=True)
        found.append(Case(f"rope and append, D {dim}, bf16, interleaved", partial(launch, 16, 2)))
    for label, width, dtype in (
        ("bf16", 128, BF16), ("fp32", 128, torch.float32), ("codes", 128, torch.uint8), ("codes", 64, torch.uint8),
        ("parameters", 2, torch.float16), ("parameters", 1, torch.float16),
    ):  # fmt: skip
        x, pool = _empty(2, KV_HEADS, 512, width, dtype=dtype), _empty(64, KV_HEADS, 16, width, dtype=dtype)
        table, starts = torch.zeros(2, 32, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
        found.append(Case(f"compact, {width} {label}", partial(compact, x, index)))
        found.append(Case(f"scatter pages, {width} {label}", partial(scatter_pages, pool, x, table, starts, None)))
        found.append(Case(f"copy pages, {width} {label}", partial(copy_pages, [pool], starts, starts)))
    return found


# ---------------------------------------------------------------------- launches


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _sweep(launch: Callable[[int, int], object], lengths: tuple[int, ...], batches: tuple[int, ...]) -> None:
    for length in lengths:
        for batch in batches:
            launch(length, batch)


def _cache(store: Store, dim: int, dtype: torch.dtype, batch: int, slots: int) -> list[Tensor]:
    """The tensors of one layer's cache, in the order of `kvpass.kernels.store`."""
    outer = (batch * slots // store.page, KV_HEADS, store.page) if store.page else (batch, KV_HEADS, slots)
    pieces = [_empty(*outer, dim, dtype=dtype) for _ in "kv"]
    if store.bits:
        codes = [_empty(*outer, dim * store.bits // 8, dtype=torch.uint8) for _ in "kv"]
        params = [_empty(*outer, store.parameters, dtype=torch.float16) for _ in "kv"]
        pieces = [codes[0], params[0], codes[1], params[1]]
    if store.group:
        pieces[1] = _empty(batch, KV_HEADS, slots // store.group, dim, 2, dtype=torch.float16)
        pieces += [_empty(batch, KV_HEADS, store.residual + store.group, dim, dtype=dtype) for _ in "kv"]
    if store.page:
        pieces.append(_empty(batch, slots // store.page, dtype=torch.int32))
    return pieces


def _parts(store: Store, cache: list[Tensor], k: Tensor, starts: Tensor) -> list[Keys]:
    """What queries read once their own keys k, which serve as values too, are part of the text."""
    ends = starts + k.shape[2]
    if store.group:
        exact = Store(group=store.group, residual=store.residual)
        ring = replace(exact, window=store.residual + store.group)
        return [
            Keys(tuple(cache[:4]), store, ends, reads="closed"),
            Keys(tuple(cache[4:]), ring, starts, reads="open"),
            Keys((k, k), exact, ends, starts, reads="open"),
        ]
    if store.ring and k.shape[2] > DECODE[-1]:
        fresh = Store(store.bits, store.floats)
        new = _cache(fresh, k.shape[3], k.dtype, k.shape[0], k.shape[2]) if store.bits else [k, k]
        return [Keys(tuple(cache), store, starts), Keys(tuple(new), fresh, ends, starts)]
    if store.page:
        return [Keys(tuple(cache[:-1]), store, ends, table=cache[-1])]
    return [Keys(tuple(cache), store, ends)]


def _attend(
    dim: int,
    queries: tuple[int, ...],
    store: Store = STORES["bf16"],
    *,
    dtype: torch.dtype = BF16,
    group: int = GROUP,
    batch: int = 2,
    slots: int = SLOTS,
    apart: bool = False,
    placed: bool = False,
    **masks: Any,
) -> None:
    """Queries of several numbers read a cache."""
    starts = torch.zeros(batch, dtype=torch.int64)
    if store.ring:
        slots, masks = store.sinks + store.window, {"window": store.window, "sinks": store.sinks, **masks}
    cache = _cache(store, dim, dtype, batch, slots)
    for count in queries:
        q = _empty(batch, count, KV_HEADS * group, dim, dtype=dtype).transpose(1, 2)
        k = _empty(batch, count, KV_HEADS, dim, dtype=dtype).transpose(1, 2)
        parts = _parts(store, cache, k, starts)
        if placed:
            parts = [Keys(tuple(cache), positions=torch.zeros(batch, KV_HEADS, slots, dtype=torch.int64))]
        attention(q, parts, starts, scale=dim**-0.5, sink_q=torch.empty_like(q) if apart else None, **masks)


def _forward(queries: tuple[int, ...]) -> None:
    """Queries read the keys beside them, and no cache."""
    for count in queries:
        q = _empty(1, count, KV_HEADS * GROUP, 128).transpose(1, 2)
        k = _empty(1, SLOTS, KV_HEADS, 128).transpose(1, 2)
        attention(q, [Keys((k, k))], SLOTS - count, scale=1.0)


def _append(
    dim: int,
    store: Store,
    lengths: tuple[int, ...],
    write: Callable[..., None] = append,
    *,
    batch: int = 2,
    slots: int = SLOTS,
    ragged: bool = False,
) -> None:
    starts = torch.zeros(batch, dtype=torch.int64)
    cache = _cache(store, dim, BF16, batch, store.sinks + store.window if store.ring else slots)
    for length in lengths:
        k = _empty(batch, length, KV_HEADS, dim).transpose(1, 2)
        if write is close_groups:
            close_groups(cache, k, k, starts, store)
        else:
            append(cache, k, k, starts, starts if ragged else None, store)


def _append_length(store: Store, length: int, batch: int) -> None:
    _append(128, store, (length,), batch=batch, slots=-(-length // 16) * 16)


def _column_mass(
    batch: int, dim: int, queries: int, keys: int, dtype: torch.dtype = BF16, placed: bool = False, **masks: Any
) -> None:
    q = _empty(batch, queries, KV_HEADS * GROUP, dim, dtype=dtype).transpose(1, 2)
    k = _empty(batch, KV_HEADS, keys, dim, dtype=dtype)
    none: dict[str, Any] = {"window": 0, "sinks": 0, "softcap": 0.0, "alibi_slopes": None}
    column_mass(
        q, k, _empty(*q.shape[:3], dtype=torch.float32), _empty(batch, queries, dtype=torch.float32),
        torch.zeros(batch, queries, dtype=torch.int64),
        torch.zeros(batch, KV_HEADS, keys, dtype=torch.int64) if placed else None,
        scale=dim**-0.5, causal=True, strict=False, **{**none, **masks},
    )  # fmt: skip


def _merge(dim: int, parts: int, batch: int, sink_logits: Tensor | None = None) -> None:
    values = _empty(parts, batch, KV_HEADS * GROUP, 1, dim, dtype=torch.float32)
    merge(values, torch.empty_like(values[..., 0]), sink_logits, BF16)


def _rope_append(dim: int, store: Store, length: int, batch: int, *, interleaved: bool = False) -> None:
    q = _empty(batch, length, KV_HEADS * GROUP, dim).transpose(1, 2)
    k = _empty(batch, length, KV_HEADS, dim).transpose(1, 2)
    turn = _empty(1, length, dim)[..., ::2] if interleaved else _empty(1, length, dim)[..., : dim // 2]
    cache = _cache(store, dim, BF16, batch, store.sinks + store.window if store.ring else SLOTS)
    starts = torch.zeros(batch, dtype=torch.int64)
    rope_append(q, k, k, turn, turn, cache, starts, None, store, interleaved=interleaved)
