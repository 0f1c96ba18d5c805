"""Lowering: attention, in a program that is about to run, becomes calls of fused kernels, site by site.

Each op of the dialect has a twin in `kvpass_fused` with the same arguments and meaning, made of the kernels in
`kvpass.kernels`: nothing that attention need not form is formed, and a cache is read where and as it lies. A site that
the kernels cannot do keeps the torch reference, and `Lowered` says why. Twins have fake implementations, so programs
made of them can be compiled whole, exported, and recorded in a CUDA graph: nothing in a step of decoding depends on how
long sequences are now, only on what there is room for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from kvpass.ir.kv_format import KVFormat, encode_channels, encode_tokens, fake_tokens
from kvpass.ir.kv_layout import Layout
from kvpass.ir.ops import FAKES, attention_backward, make_op, save_for_backward
from kvpass.ir.plan import CachePlan, LayerCache
from kvpass.ir.program import ATTEND, ATTEND_KEPT, ATTEND_SHARED, ATTENTION, COLUMN_MASS, KEEP, OBSERVE, Program
from kvpass.ir.retention import Retention
from kvpass.ir.selection import Read, note_kept, note_observed, observed, step_kept, unattended
from kvpass.kernels.append import append, close_groups, encode
from kvpass.kernels.attention import Keys, rows, unsupported
from kvpass.kernels.attention import attention as fused
from kvpass.kernels.column_mass import column_mass as fused_mass
from kvpass.kernels.gather import compact_into
from kvpass.kernels.store import Store


@dataclass(frozen=True)
class Lowered:
    """What became of one op.

    Attributes:
        entry: "forward", "prefill" or "decode".
        layer: whose attention it belongs to.
        op: of the dialect.
        kernels: what runs instead, or nothing where the reference does.
        reason: why the reference does.
    """

    entry: str
    layer: int
    op: str
    kernels: str
    reason: str


@lru_cache(maxsize=256)
def store_of(layout: str) -> Store:
    """A layout as kernels know it."""
    said = Layout.parse(layout)
    return _store(said.format, said)


def _store(fmt: KVFormat, layout: Layout | None = None) -> Store:
    place = layout or Layout()
    return Store(fmt.bits, fmt.kind == "fp8", fmt.group, fmt.residual, place.window, place.sinks, place.page)


# ---------------------------------------------------------------------- the dialect, made of kernels


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    sink_q: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
    kv_format: str = "",
    keeps: str = "",
) -> Tensor:
    fmt = KVFormat.parse(kv_format)
    places = None if k_positions is None else k_positions.unsqueeze(1)
    parts = [Keys((k, v), positions=places)]
    if fmt.layout == "kivi":
        whole = k.shape[2] // fmt.group * fmt.group
        keys = encode_channels(k[:, :, :whole].unflatten(2, (-1, fmt.group)), fmt)
        codes = (keys[0].flatten(2, 3), keys[1], *encode_tokens(v[:, :, :whole], fmt))
        store = _store(fmt)
        parts = [Keys(codes, store, reads="closed")] if whole else []
        parts.append(Keys((k, v), Store(group=fmt.group, residual=fmt.residual), reads="open"))
    elif not fmt.full:
        parts = [Keys(tuple(encode(rows(k), rows(v), _store(fmt))), _store(fmt), positions=places)]
    out, _ = fused(
        q, parts, k.shape[2] - q.shape[2] if q_positions is None else q_positions,
        scale=scale, causal=causal, strict=strict, window=window, sinks=sinks, softcap=softcap,
        sink_logits=sink_logits, alibi_slopes=alibi_slopes, sink_q=sink_q,
    )  # fmt: skip
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: list[Tensor],
    starts: Tensor,
    stops: Tensor | None = None,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    sink_q: Tensor | None = None,
    *,
    end: int,
    ragged: bool,
    layout: str = "",
    first: bool = True,
    last: bool = True,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
) -> Tensor:
    store = store_of(layout)
    k, v = rows(k), rows(v)
    length = k.shape[2]
    ends = starts + length if stops is None else torch.minimum(starts + length, stops)
    if store.group:
        exact = Store(group=store.group, residual=store.residual)
        if first:
            close_groups(cache, k, v, starts, store)
        parts = [
            Keys(tuple(cache[:4]), store, starts + length, reads="closed"),
            Keys(tuple(cache[4:]), replace(exact, window=store.recent.window), starts, reads="open"),
            Keys((k, v), exact, ends, starts, reads="open"),
        ]
    elif store.ring and (length > 1 or stops is not None):  # what is written takes the place of what is read
        fresh = Store(store.bits, store.floats)
        parts = [Keys(tuple(cache), store, starts), Keys(tuple(encode(k, v, fresh)), fresh, ends, starts)]
    else:
        if first:
            append(cache, k, v, starts, stops, store)
        pools, table = (cache[:-1], cache[-1]) if store.page else (cache, None)
        parts = [Keys(tuple(pools), store, ends, table=table)]
    out, _ = fused(
        q, parts, starts,
        scale=scale, causal=causal, strict=strict, window=window, sinks=sinks, softcap=softcap,
        sink_logits=sink_logits, alibi_slopes=alibi_slopes, sink_q=sink_q,
    )  # fmt: skip
    if last and store.group:
        append(cache[4:], k, v, starts, stops, store.recent)
    elif last and len(parts) > 1:
        append(cache, k, v, starts, stops, store)
    return out


def _attend_shared(
    q: Tensor,
    cache: list[Tensor],
    starts: Tensor,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    value_dim: int,
    end: int,
    ragged: bool,
    layout: str = "",
    scale: float,
    causal: bool = True,
    strict: bool = True,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
) -> Tensor:
    store = store_of(layout)
    pools, table = (cache[:-1], cache[-1]) if store.page else (cache, None)
    out, _ = fused(
        q, [Keys(tuple(pools), store, starts + q.shape[2], table=table)], starts,
        scale=scale, causal=causal, strict=strict, window=window, sinks=sinks, softcap=softcap,
        sink_logits=sink_logits, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    return out


def _column_mass(
    q: Tensor,
    k: Tensor,
    lengths: Tensor,
    prompt: Tensor,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    *,
    rule: str,
    longest: int,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
    kv_format: str = "",
) -> Tensor:
    said = Retention.parse(rule)
    if not said.attends:
        order = torch.arange(k.shape[2], device=k.device).unsqueeze(0)
        key_pos = order if k_positions is None else k_positions
        return unattended(said, key_pos.expand(len(q), -1), k.shape[1], layer)
    k = rows(fake_tokens(k, KVFormat.parse(kv_format)))
    most = min(said.observed(longest), q.shape[2])
    chosen, where, weight = observed(said, q, lengths, prompt, q_positions, most, range(most))
    places = None if k_positions is None else k_positions.unsqueeze(1)
    options: dict[str, Any] = {
        "scale": scale, "causal": causal, "strict": strict, "window": window, "sinks": sinks, "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    _, sums = fused(chosen, [Keys((k, k), positions=places)], where, sink_logits=sink_logits, **options)
    mass = fused_mass(chosen, k, sums, weight, where, places, **options)
    return mass if said.apart else mass.mean(dim=1, keepdim=True)


def _keep(
    k: Tensor,
    v: Tensor,
    cache: list[Tensor],
    lengths: Tensor,
    positions: Tensor,
    index: Tensor | None = None,
    ranks: Tensor | None = None,
    *,
    layout: str,
    layer: int = -1,
) -> None:
    k, v = rows(k), rows(v)
    *tensors, _ = note_kept(cache, lengths, positions, k.shape[2], index, ranks)
    if index is None:
        append(tensors, k, v, torch.zeros_like(lengths), lengths, store_of(layout))
    else:
        compact_into(tensors, encode(k, v, store_of(layout)), index)


def _observe(
    q: Tensor,
    k: Tensor,
    cache: list[Tensor],
    lengths: Tensor,
    positions: Tensor,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    kv_format: str = "",
    layer: int = -1,
) -> None:
    k = rows(fake_tokens(k, KVFormat.parse(kv_format)))

    def sums(chosen: Tensor, place: Tensor) -> Tensor:
        return fused(chosen, [Keys((k, k))], place, scale=scale, softcap=softcap, sink_logits=sink_logits)[1]

    note_observed(sums, q, cache, lengths, positions)


def _attend_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: list[Tensor],
    starts: Tensor,
    fills: Tensor,
    budgets: Tensor,
    recents: Tensor,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    end: int,
    layout: str,
    rule: str,
    first: bool = True,
    last: bool = True,
    scale: float,
    causal: bool = True,
    strict: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    layer: int = -1,
) -> Tensor:
    store = store_of(layout)
    options: dict[str, Any] = {
        "scale": scale, "causal": causal, "strict": strict, "window": window, "sinks": sinks, "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }  # fmt: skip

    def read(tensors: list[Tensor], where: Tensor) -> Read:
        held = [t[:, :, : where.shape[2]] for t in tensors]
        out, sums = fused(q, [Keys(tuple(held), store, positions=where)], starts, sink_logits=sink_logits, **options)
        one = starts.view(-1, 1)

        def shares() -> Tensor:
            keys, _ = Layout.parse(layout).entries(tensors, where.shape[2], k.dtype)
            return fused_mass(q, keys, sums, torch.ones_like(one, dtype=torch.float32), one, where, **options)

        return Read(out, shares, lambda: sums[:, :, 0])

    return step_kept(
        read, q, k, v, cache, starts, fills, budgets, recents,
        end=end, layout=layout, rule=rule, first=first, last=last, layer=layer,
    )  # fmt: skip


def _ours(q: Tensor, *rest: Any, **options: Any) -> Tensor:
    """What attention gives: [B, H, S, Dv], the heads of a token side by side, as the output projection reads them."""
    value_dim = options["value_dim"] if "value_dim" in options else rest[1].shape[3]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], value_dim)).transpose(1, 2)


_MADE: dict[Any, tuple[Any, tuple[str, ...], str]] = {
    ATTENTION: (_attention, (), "attention"),
    ATTEND: (_attend, ("cache",), "append, attention"),
    ATTEND_SHARED: (_attend_shared, (), "attention"),
    COLUMN_MASS: (_column_mass, (), "attention, column_mass"),
    KEEP: (_keep, ("cache",), "compact"),
    OBSERVE: (_observe, ("cache",), "attention"),
    ATTEND_KEPT: (_attend_kept, ("cache",), "attention, column_mass"),
}


def _name(op: Any) -> str:
    return str(op).split(".")[1]


for _op, (_function, _changes, _) in _MADE.items():
    _shapes = _ours if _function in (_attention, _attend, _attend_shared, _attend_kept) else FAKES[_op]
    _twin = make_op("kvpass_fused", _name(_op), _function, _shapes, _changes)
    if _op is ATTENTION:
        _twin.register_autograd(attention_backward, setup_context=save_for_backward)

TWINS = {op: getattr(torch.ops.kvpass_fused, _name(op)).default for op in _MADE}
"""What computes each op with kernels."""


# ---------------------------------------------------------------------- the choice


def lower_attention(program: Program, plan: CachePlan) -> tuple[dict[fx.Node, Any], list[Lowered]]:
    """For each op of the dialect, in every entry, what is to run it where that is a kernel; and what was chosen why."""
    targets: dict[fx.Node, Any] = {}
    table: list[Lowered] = []
    for entry, graph in program.entries.items():
        for node in graph.nodes:
            if node.op != "call_function" or node.target not in TWINS:
                continue
            names = [argument.name for argument in node.target._schema.arguments]
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            layer = int(given["layer"])
            reason = why_not(given, plan[layer])
            if not reason:
                targets[node] = TWINS[node.target]
            table.append(Lowered(entry, layer, _name(node.target), "" if reason else _MADE[node.target][2], reason))
    return targets, table


def why_not(given: Mapping[str, Any], cache: LayerCache) -> str:
    """Why kernels do not run an op with these arguments, or nothing."""
    if given.get("mask") is not None:
        return "its mask is a table, not one that is made of positions"
    layout = Layout.parse(given["layout"]) if "layout" in given else Layout(KVFormat.parse(given.get("kv_format", "")))
    if layout.format.layout == "static":
        return "kernels read codes with a scale per token, and these have fixed ones"
    store = _store(layout.format, layout)
    if store.group and given.get("sink_q") is not None:
        return "kernels do not score sinks apart under KIVI"
    if "rule" in given and "longest" in given and Retention.parse(given["rule"]).by == "persistence":
        return "counting how often a key got its share needs every query's weights"
    return unsupported(store, cache.dtype, cache.key_dim, cache.value_dim)


def table(lowered: list[Lowered]) -> str:
    """What runs every layer's attention, as text."""
    lines = [("entry", "layer", "op", "runs as")]
    lines += [(e.entry, str(e.layer), e.op, e.kernels or f"reference: {e.reason}") for e in lowered]
    widths = [max(len(row[i]) for row in lines) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in lines)
