"""Ranking the tokens of a prompt and keeping the best: the arithmetic behind `kvpass.ir.retention`.

A rank is made of column mass: the attention that a key gets from chosen queries. The matrix of all queries and keys is
never formed: rows are taken in blocks, and of each only its share of the sums is kept.

Shapes: B batch, S queries, T keys, H query heads, Hkv KV heads, G rows of ranks (Hkv where heads choose apart, else 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpass.ir.attention import NEG_INF, ROWS, scored, shared_out, visible
from kvpass.ir.kv_format import KVFormat, fake_tokens
from kvpass.ir.kv_layout import Layout
from kvpass.ir.retention import Retention


def column_mass_reference(
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
    """What the observed queries of q [B, H, S, D] make of keys k [B, Hkv, T, D]: ranks [B, G, T].

    Rows hold `lengths` [B] tokens each, padding after them, of prompts of `prompt` [B] tokens, `longest` at most.
    `q_positions` [B, S] and `k_positions` [B, T] say where the tokens stand; without them in the order in which they
    lie. `rule` is a `Retention`; the other options are those of `kvpass::attention`.
    """
    said = Retention.parse(rule)
    batch, heads, length = q.shape[:3]
    kv_heads, keys = k.shape[1], k.shape[2]
    order = torch.arange(keys, device=k.device).unsqueeze(0)
    key_pos = order if k_positions is None else k_positions
    if not said.attends:
        return unattended(said, key_pos.expand(batch, -1), kv_heads, layer)
    fmt = KVFormat.parse(kv_format)
    k = k if fmt.full else fake_tokens(k, fmt)
    most = min(said.observed(longest), length)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    total = torch.zeros((batch, kv_heads if said.apart else 1, keys), dtype=dtype, device=q.device)
    seen_key = key_pos.view(-1, 1, 1, 1, keys)
    for start in range(0, most, ROWS):
        rows = range(start, min(start + ROWS, most))
        chosen, where, weight = observed(said, q, lengths, prompt, q_positions, most, rows)
        query_pos = where.view(batch, 1, 1, -1, 1)
        seen = visible(query_pos, seen_key, causal=causal, strict=strict, window=window, sinks=sinks)
        present = seen_key >= 0
        seen = present if seen is None else seen & present
        bias = None
        if alibi_slopes is not None:
            slopes = alibi_slopes.float().view(1, kv_heads, heads // kv_heads, 1, 1)
            bias = slopes * (seen_key - query_pos).float()
        scores = scored(chosen, k, seen, bias, scale, softcap)
        shares = shared_out(scores, sink_logits, may_be_empty=True)
        if said.by == "persistence":
            shares = shares.mean(dim=2, keepdim=True)
            shares = shares if said.apart else shares.mean(dim=1, keepdim=True)
            even = 1 / seen.sum(dim=-1, keepdim=True).clamp(min=1)
            shares = (shares >= even).to(dtype)
        mass = torch.einsum("bngrt,br->bnt", shares.to(dtype), weight) / shares.shape[2]
        total += mass if said.apart else mass.mean(dim=1, keepdim=True)
    return total


def unattended(said: Retention, key_pos: Tensor, kv_heads: int, layer: int) -> Tensor:
    """Ranks [B, G, T] of keys at positions [B, T] by a rule that looks at no attention."""
    groups, spread = kv_heads if said.apart else 1, key_pos.unsqueeze(1)
    value = noise(spread, groups, layer) if said.by == "random" else spread.float()
    return value.expand(len(key_pos), groups, -1)


def observed(
    said: Retention,
    q: Tensor,
    lengths: Tensor,
    prompt: Tensor,
    q_positions: Tensor | None,
    most: int,
    rows: range,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those numbered `rows` of each row's `most` latest queries of q [B, H, S, D]: [B, H, R, D], their positions
    [B, R], and what each of them weighs in a rank [B, R], which is 0 for one that the rule does not ask."""
    asked = lengths if said.rows == 0 else said.window(prompt) if said.rows < 0 else torch.full_like(lengths, said.rows)
    asked = torch.minimum(asked.clamp(min=1), lengths)
    step = torch.arange(rows.start, rows.stop, device=q.device)
    place = lengths.unsqueeze(1) - most + step  # [B, R]
    nth = place - (lengths - asked).unsqueeze(1)  # of the observed queries, from 0
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    weight = 1 + (said.slope - 1) * nth.to(dtype) / (asked - 1).clamp(min=1).unsqueeze(1)
    weight = torch.where(nth >= 0, weight, 0.0)
    if said.rows:  # a mean over the latest queries, but a sum over all
        weight = weight / asked.unsqueeze(1)
    place = place.clamp(min=0)
    where = place if q_positions is None else q_positions.gather(1, place)
    return q[torch.arange(len(q), device=q.device).unsqueeze(1), :, place].transpose(1, 2), where, weight


def noise(positions: Tensor, groups: int, layer: int) -> Tensor:
    """Random ranks [B, G, T] from 0 to 1 that depend on position [B, 1 or G, T], head and layer alone."""
    head = torch.arange(groups, device=positions.device).view(1, -1, 1)
    mixed = (positions.long() + 1) * 2654435761 + head * 40503 + (layer + 1) * 7919
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        mixed = (mixed ^ (mixed >> shift)) * factor & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)).float() / 2**32


def survivors_reference(
    ranks: Tensor, lengths: Tensor, counts: Tensor, prompt: Tensor, *, width: int, rule: str
) -> Tensor:
    """Which of T tokens with ranks [B, G, T] stay: indices [B, G, width], ascending; -1 behind a row's own number.

    Of each row's `lengths` [B] tokens the `counts` [B] best stay, the later of two equal ones, and among them its
    sinks and its recent tokens.
    """
    said = Retention.parse(rule)
    keys = ranks.shape[2]
    order = torch.arange(keys, device=ranks.device)
    recent = order >= (lengths - said.window(prompt)).view(-1, 1, 1)
    if said.pool > 1:
        ranks = torch.nn.functional.avg_pool1d(
            ranks.masked_fill(recent, 0.0), said.pool, stride=1, padding=said.pool // 2
        )
    ranks = ranks.masked_fill(recent | (order < said.sinks), float("inf"))
    ranks = ranks.masked_fill(order >= lengths.view(-1, 1, 1), NEG_INF)
    best = keys - 1 - ranks.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :width]
    taken = torch.arange(width, device=ranks.device) < counts.view(-1, 1, 1)
    found = torch.where(taken, best, keys).sort(dim=-1).values
    return torch.where(found < keys, found, -1)


def keep_reference(
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
    """Write a prompt's k [B, Hkv, T, D] and v, or what `index` [B, G, W] chose of them, into a fresh store.

    `cache` are the tensors of the layout and one more, int32 [B, G, slots], for where each entry stands: what
    `positions` [B, T] says; with `ranks` [B, G, T], another one of that shape for these. Rows hold `lengths` [B]
    tokens; an index below 0 is none.
    """
    *store, _ = note_kept(cache, lengths, positions, k.shape[2], index, ranks)
    if index is not None:
        k, v = (take(x, index.clamp(min=0)) for x in (k, v))
    Layout.parse(layout).fill(store, k, v)


def note_kept(
    cache: list[Tensor], lengths: Tensor, positions: Tensor, keys: int, index: Tensor | None, ranks: Tensor | None
) -> list[Tensor]:
    """Write down where the entries of a fresh store stand, and their ranks; the tensors of its layout, and where."""
    if ranks is not None:
        *cache, held = cache
        held.zero_()
        chosen = ranks if index is None else ranks.gather(2, index.clamp(min=0))
        held[:, :, : chosen.shape[2]] = chosen
    where = cache[-1]
    groups = where.shape[1]
    if index is None:
        stays = torch.arange(keys, device=where.device) < lengths.view(-1, 1, 1)
        places = positions.unsqueeze(1)
    else:
        stays = index >= 0
        places = positions.unsqueeze(1).expand(-1, index.shape[1], -1).gather(2, index.clamp(min=0))
    where.fill_(-1)
    where[:, :, : stays.shape[2]] = torch.where(stays, places, -1).expand(-1, groups, -1).to(where.dtype)
    return cache


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` [B, 1 or Hkv, W] of x [B, Hkv, T, D]."""
    wide = index.unsqueeze(-1).expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, wide)


EXTRAS = {"append": (), "replace": ("ranks",), "thin": ("queries", "lse", "asked")}
"""What a store holds besides its layout and the positions of its entries."""


def observe_reference(
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
    """Remember a prompt's latest queries and their log-sum-exps, for ranking tokens later without stored attention.

    `cache` are queries [B, H, W, D], lse [B, H, W] and asked, int32 [B, W]: the positions of the queries, -1 for none.
    The query at position p lies in slot p mod W. q [B, H, S, D] and k [B, Hkv, S, D] are causal, in order.
    """
    fmt = KVFormat.parse(kv_format)
    k = k if fmt.full else fake_tokens(k, fmt)
    order = torch.arange(k.shape[2], device=q.device)

    def sums(chosen: Tensor, place: Tensor) -> Tensor:
        seen = order <= place.view(len(q), 1, 1, -1, 1)
        return _log_sum(scored(chosen, k, seen, None, scale, softcap), sink_logits)

    note_observed(sums, q, cache, lengths, positions)


def note_observed(
    sums: Callable[[Tensor, Tensor], Tensor], q: Tensor, cache: list[Tensor], lengths: Tensor, positions: Tensor
) -> None:
    """Write each row's latest queries into their store; `sums` gives the log-sum-exps [B, H, W] of queries
    [B, H, W, D] at [B, W] of the prompt."""
    queries, lse, asked = cache
    most = min(queries.shape[2], q.shape[2])
    rows = torch.arange(len(q), device=q.device).unsqueeze(1)
    place = lengths.unsqueeze(1) - most + torch.arange(most, device=q.device)  # [B, W]
    there = place >= 0
    place = place.clamp(min=0)
    where = torch.where(there, positions.gather(1, place), -1)
    slot = torch.where(there, where % queries.shape[2], torch.arange(most, device=q.device))
    asked.fill_(-1)
    for start in range(0, most, ROWS):
        part = slice(start, start + ROWS)
        chosen = q[rows, :, place[:, part]].transpose(1, 2)
        queries[rows, :, slot[:, part]] = chosen.transpose(1, 2)
        lse[rows, :, slot[:, part]] = sums(chosen, place[:, part]).transpose(1, 2).to(lse.dtype)
        asked[rows, slot[:, part]] = where[:, part].to(asked.dtype)


def _log_sum(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """[B, H, S]: the log of what scores [B, Hkv, H / Hkv, S, T] are normalised by."""
    sums = torch.logsumexp(scores, dim=-1)
    if sink_logits is not None:
        sums = torch.logaddexp(sums, sink_logits.to(sums.dtype).view(1, *sums.shape[1:3], 1))
    return sums.flatten(1, 2)


def attend_kept_reference(
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
    """Write one token per row, attend over what the store keeps, rank again, and drop what exceeds the budget.

    `cache` are the tensors of the layout, then positions [B, G, slots] (int32, -1 where there is nothing), then what
    `EXTRAS` lists. The token stands at `starts` [B] of the text; a store that grows takes it in slot `fills` [B], at
    most in slot `end` - 1; one that replaces in whichever slot is free, keeps `budgets` [B] entries, and never drops
    the latest `recents` [B]. Nothing here waits for the device: which entry goes is not known to the host.
    """
    store = Layout.parse(layout)
    heads, kv_heads = q.shape[1], k.shape[1]

    def read(tensors: list[Tensor], where: Tensor) -> Read:
        batch, groups, used = where.shape
        keys, values = store.entries(tensors, used, k.dtype)
        places = where.view(batch, groups, 1, 1, used)
        query_pos = starts.view(-1, 1, 1, 1, 1)
        seen = places >= 0
        inside = visible(query_pos, places, causal=causal, strict=strict, window=window, sinks=sinks)
        seen = seen if inside is None else seen & inside
        bias = None
        if alibi_slopes is not None:
            slopes = alibi_slopes.float().view(1, kv_heads, heads // kv_heads, 1, 1)
            bias = slopes * (places - query_pos).float()
        scores = scored(q, keys, seen, bias, scale, softcap)
        shares = shared_out(scores, sink_logits, may_be_empty=True)
        out = torch.matmul(shares.to(values.dtype).flatten(2, 3), values).view(batch, heads, 1, values.shape[3])
        return Read(out, lambda: shares[:, :, :, 0].mean(dim=2), lambda: _log_sum(scores, sink_logits)[:, :, 0])

    return step_kept(
        read, q, k, v, cache, starts, fills, budgets, recents,
        end=end, layout=layout, rule=rule, first=first, last=last, layer=layer,
    )  # fmt: skip


@dataclass(frozen=True)
class Read:
    """What one query per row read: [B, H, 1, Dv]; the share of each entry [B, Hkv, T], averaged over the heads of a
    group; and the log-sum-exps [B, H]."""

    out: Tensor
    shares: Callable[[], Tensor]
    sums: Callable[[], Tensor]


def step_kept(
    read: Callable[[list[Tensor], Tensor], Read],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: list[Tensor],
    starts: Tensor,
    fills: Tensor,
    budgets: Tensor,
    recents: Tensor,
    *,
    end: int,
    layout: str,
    rule: str,
    first: bool,
    last: bool,
    layer: int,
) -> Tensor:
    """Write, read and rank as `attend_kept` says; `read` attends over tensors whose entries stand at [B, G, T]."""
    said, store = Retention.parse(rule), Layout.parse(layout)
    split = len(cache) - len(EXTRAS[said.then])
    *tensors, where = cache[:split]
    replaces = said.then == "replace"
    groups, slots = where.shape[1:]
    now = starts.view(-1, 1, 1)
    if first:
        slot = (where < 0).int().argmax(dim=2) if replaces else fills.view(-1, 1).expand(-1, groups)
        slot = slot.unsqueeze(-1)  # [B, G, 1]
        where.scatter_(2, slot, now.expand(-1, groups, -1).to(where.dtype))
        store.put(tensors, k, v, slot)
    found = read(tensors, where[:, :, : slots if replaces else end])
    if last and replaces:
        _replace(said, found.shares, where, cache[split], now, budgets, recents, layer)
    if last and said.then == "thin":
        queries, lse, asked = cache[split:]
        rows, place = torch.arange(len(q), device=q.device), starts % queries.shape[2]
        queries[rows, :, place] = q[:, :, 0]
        lse[rows, :, place] = found.sums().to(lse.dtype)
        asked[rows, place] = starts.to(asked.dtype)
    return found.out


def _replace(
    said: Retention,
    shares: Callable[[], Tensor],  # [B, Hkv, T]
    where: Tensor,
    ranks: Tensor,
    now: Tensor,
    budgets: Tensor,
    recents: Tensor,
    layer: int,
) -> None:
    """Rank the entries by the newest query too, and drop the worst where there are more than the budget."""
    live = where >= 0
    if said.by == "random":
        ranks.copy_(noise(where, where.shape[1], layer))
    elif said.by == "recent":
        ranks.copy_(where)
    else:
        value = shares()
        value = value if said.apart else value.mean(dim=1, keepdim=True)
        if said.by == "persistence":
            value = (value >= 1 / live.sum(dim=2, keepdim=True).clamp(min=1)).to(ranks.dtype)
        ranks.add_((value - ranks) / said.rows if said.rows else value).mul_(live)
    safe = ~live | (where > now - recents.view(-1, 1, 1)) | (where < said.sinks)
    order = ranks.masked_fill(safe, float("inf"))
    lowest = order == order.amin(dim=2, keepdim=True)
    worst = torch.where(lowest, where, torch.iinfo(where.dtype).max).argmin(dim=2, keepdim=True)  # the oldest of them
    over = live.sum(dim=2, keepdim=True) > budgets.view(-1, 1, 1)
    where.scatter_(2, worst, torch.where(over, -1, where.gather(2, worst)))
    ranks.scatter_(2, worst, torch.where(over, 0.0, ranks.gather(2, worst)))


def thin(
    said: Retention,
    layout: Layout,
    cache: list[Tensor],
    row: int,
    begin: int,
    fill: int,
    window: int,
    scale: float,
    softcap: float,
    newest: int,
) -> int:
    """Thin one row's generated tokens begin .. begin+block-1 (slots) by the queries at the `window` positions up to
    `newest`; new fill.

    PyramidInfer's generation phase: what stays is the weighted mean, over queries and heads, of the attention that the
    latest queries gave to the block. What lies behind the block moves up.
    """
    split = len(cache) - len(EXTRAS["thin"])
    *tensors, where = cache[:split]
    queries, lse, asked = (t[row : row + 1] for t in cache[split:])
    at = torch.arange(newest - window + 1, newest + 1, device=where.device)
    slot = at % queries.shape[2]
    keys = layout.entries([t[row : row + 1, :, begin : begin + said.block] for t in tensors], said.block, queries.dtype)
    scores = scored(queries[:, :, slot], keys[0], None, None, scale, softcap)
    shares = torch.exp(scores - lse[:, :, slot].view(*scores.shape[:4], 1))
    weight = torch.linspace(1, said.slope, window, device=where.device, dtype=shares.dtype)
    weight = weight * (asked[0, slot] == at)
    rank = (shares.mean(dim=(1, 2)) * weight.view(1, -1, 1)).mean(dim=1)
    kept = rank.topk(said.thinned, dim=-1).indices.sort(dim=-1).values[0] + begin
    end = fill - said.block + said.thinned
    for tensor in [*tensors, where]:
        line = tensor[row]
        line[:, begin:end] = torch.cat([line[:, kept], line[:, begin + said.block : fill]], dim=1)
    where[row, :, end:fill] = -1
    return end
