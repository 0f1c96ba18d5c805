"""How one layer's keys and values lie in memory, as a value, with the two things one does there: write and read.

A `Layout` is a number format (`kv_format`) and an addressing:

- dense: position p lies in slot p;
- ring (a window without pages): the first `sinks` positions keep their slots, position p >= sinks lies in slot
  sinks + (p - sinks) mod window, so capacity stays sinks + window however long the sequence gets (StreamingLLM, Xiao et
  al. 2023, arXiv 2309.17453);
- paged: position p lies in page `table[row, p // page]`, at place p mod page (PagedAttention, Kwon et al. 2023, arXiv
  2309.06180);
- KIVI: complete groups are quantized, the latest tokens stay in full precision beside them (arXiv 2402.02750).

The tensors belong to the caller (`runtime.state`), which makes them from `specs`. `exchange` takes the new tokens' keys
and values and gives what their queries may read, as `Part`s that say at which positions their entries stand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from kvpass.errors import PlanError
from kvpass.ir.kv_format import FULL, KVFormat, decode_channels, decode_tokens, encode_channels, encode_tokens


@dataclass(frozen=True)
class Part:
    """Keys and values that queries may read.

    Attributes:
        k, v: [B, Hkv, T, D] and [B, Hkv, T, Dv].
        positions: [T] or [B, T] int64 where the entries stand, negative for nothing; None for base .. base+T-1.
        base: see there.
        reads: who reads it: "all" queries, or (KIVI) those for which the entry is in a "closed" group or still "open".
        sure: a single query reads every entry, whatever the mask of its layer's own window says.
    """

    k: Tensor
    v: Tensor
    positions: Tensor | None = None
    reads: Literal["all", "closed", "open"] = "all"
    sure: bool = False
    base: int = 0


@dataclass(frozen=True)
class Spec:
    """One tensor of a store: [B, Hkv, slots, *tail], or [pages, Hkv, page, *tail]."""

    name: str
    slots: int
    tail: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """How a store lies in memory.

    Attributes:
        format: how numbers are stored.
        window: tokens kept besides the sinks; 0 keeps all.
        sinks: first tokens that are always kept where there is a window.
        page: tokens per page; 0 for one stretch of memory per row.
    """

    format: KVFormat = FULL
    window: int = 0
    sinks: int = 0
    page: int = 0

    @property
    def ring(self) -> bool:
        return self.window > 0 and self.page == 0

    @property
    def kivi(self) -> bool:
        return self.format.layout == "kivi"

    def __str__(self) -> str:
        words = [str(self.format)] if not self.format.full else []
        words += [f"window={self.window}"] if self.window else []
        words += [f"sinks={self.sinks}"] if self.sinks else []
        words += [f"page={self.page}"] if self.page else []
        return ";".join(words)

    @staticmethod
    def parse(text: str) -> Layout:
        """The layout that `str` wrote."""
        return _parse(text)

    # ------------------------------------------------------------------ sizes

    def slots(self, capacity: int) -> int:
        """Slots per row that a sequence of `capacity` tokens takes (paged: but for the ends of its pages)."""
        if self.kivi:
            return -(-capacity // self.format.group) * self.format.group
        return min(capacity, self.sinks + self.window) if self.window else capacity

    def specs(self, key_dim: int, value_dim: int, dtype: torch.dtype, slots: int) -> list[Spec]:
        """The tensors of a store with that many slots, in the order in which `exchange` takes them."""
        fmt = self.format
        if fmt.full:
            return [Spec("k", slots, (key_dim,), dtype), Spec("v", slots, (value_dim,), dtype)]
        keys, values = (torch.empty((1, fmt.group or 1, d), dtype=dtype, device="meta") for d in (key_dim, value_dim))
        key_parts = encode_channels(keys, fmt) if self.kivi else encode_tokens(keys, fmt)
        value_parts = encode_tokens(values, fmt)
        groups = slots // fmt.group if self.kivi else slots
        key_params = tuple(key_parts[1].shape[1:] if self.kivi else key_parts[1].shape[2:])
        made = [
            Spec("k_codes", slots, (key_parts[0].shape[-1],), key_parts[0].dtype),
            Spec("k_params", groups, key_params, key_parts[1].dtype),
            Spec("v_codes", slots, (value_parts[0].shape[-1],), value_parts[0].dtype),
            Spec("v_params", slots, (value_parts[1].shape[-1],), value_parts[1].dtype),
        ]
        if self.kivi:
            room = fmt.residual + fmt.group
            made += [Spec("k_recent", room, (key_dim,), dtype), Spec("v_recent", room, (value_dim,), dtype)]
        return made

    def bytes(self, key_dim: int, value_dim: int, dtype: torch.dtype, length: int) -> int:
        """Bytes per KV head and row that a sequence of `length` tokens takes, without unused slots."""
        total = 0
        slots = self.format.closed(length) if self.kivi else self.slots(length)
        for spec in self.specs(key_dim, value_dim, dtype, slots):
            count = min(spec.slots, length) if spec.name.endswith("_recent") else spec.slots
            total += count * int(torch.Size(spec.tail).numel()) * spec.dtype.itemsize
        return total

    def bytes_per_token(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> Fraction:
        """Bytes per KV head that one token adds, while the window (if there is one) is not full."""
        slots = self.format.group or 1
        total = 0
        for spec in self.specs(key_dim, value_dim, dtype, slots):
            if not spec.name.endswith("_recent"):
                total += spec.slots * int(torch.Size(spec.tail).numel()) * spec.dtype.itemsize
        return Fraction(total, slots)

    # ------------------------------------------------------------------ writing and reading

    def exchange(
        self,
        cache: list[Tensor],
        k: Tensor,  # [B, Hkv, S, D]
        v: Tensor,  # [B, Hkv, S, Dv]
        starts: Tensor,  # [B] int64
        stops: Tensor | None,  # [B] int64: tokens at or beyond it are padding; None: there is none
        *,
        end: int,
        ragged: bool,
        first: bool,
        last: bool,
    ) -> list[Part]:
        """Write S new tokens at positions starts .. starts+S-1, and give everything up to them.

        A store with several readers (layers that share it) is handed the same tokens by each: the `first` writes, and
        where writing would take away what a later reader needs, the `last` does.
        """
        if self.kivi:
            return _exchange_kivi(self, cache, k, v, starts, stops, end, ragged, first, last)
        length = k.shape[2]
        begin = end - length
        if self.ring and (length > 1 or stops is not None):
            fresh = self._encode(k, v)
            parts = []
            if begin > 0 or ragged:
                kept = [tensor.clone() for tensor in cache]  # read after the write below took its place
                parts.append(self._ring_held(kept, starts, begin, ragged, k.dtype))
            where = starts.view(-1, 1) + torch.arange(length, device=k.device) if ragged else None
            parts.append(Part(*self._decode(fresh, k.dtype), positions=where, base=begin))
            if last:
                _overwrite(cache, fresh, starts, stops, self.sinks, self.window)
            return parts
        if first:
            self.write(cache, k, v, starts, stops, end=end, ragged=ragged)
        if self.ring:
            return [self._ring_held(cache, starts + 1, end, ragged, k.dtype)]
        if begin == 0 and not ragged:
            return [Part(*self._decode(self._encode(k, v), k.dtype))]
        return self.held(cache, starts, end=end, length=length, dtype=k.dtype)

    def write(
        self, cache: list[Tensor], k: Tensor, v: Tensor, starts: Tensor, stops: Tensor | None, *, end: int, ragged: bool
    ) -> None:
        """Write S tokens at positions starts .. starts+S-1 of a dense, paged or (for one token) ring store."""
        pieces = self._encode(k, v)
        length = k.shape[2]
        begin = end - length
        if self.page:
            self._page_write(cache, pieces, starts, stops)
        elif self.ring:
            if ragged:
                place = torch.where(starts < self.sinks, starts, self.sinks + (starts - self.sinks) % self.window)
                rows = torch.arange(len(starts), device=starts.device)
                for tensor, piece in zip(cache, pieces, strict=True):
                    tensor[rows, :, place] = piece[:, :, 0]
            else:
                slot = begin if begin < self.sinks else self.sinks + (begin - self.sinks) % self.window
                for tensor, piece in zip(cache, pieces, strict=True):
                    tensor[:, :, slot : slot + 1] = piece
        elif ragged:
            slots = starts.view(-1, 1) + torch.arange(length, device=starts.device)
            rows = torch.arange(len(starts), device=starts.device).view(-1, 1)
            for tensor, piece in zip(cache, pieces, strict=True):
                tensor[rows, :, slots] = piece.transpose(1, 2)
        else:
            for tensor, piece in zip(cache, pieces, strict=True):
                tensor[:, :, begin:end] = piece

    def fill(self, cache: list[Tensor], k: Tensor, v: Tensor) -> None:
        """Write a prompt's entries, in the order in which they are given, into a fresh dense store."""
        for tensor, piece in zip(cache, self._encode(k, v), strict=True):
            tensor[:, :, : k.shape[2]] = piece

    def put(self, cache: list[Tensor], k: Tensor, v: Tensor, slot: Tensor) -> None:
        """Write one token per row into slots [B, 1 or Hkv, 1] of a dense store, which heads may choose apart."""
        for tensor, piece in zip(cache, self._encode(k, v), strict=True):
            tensor.scatter_(2, slot.unsqueeze(-1).expand(*piece.shape), piece)

    def entries(self, cache: list[Tensor], count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values in the first `count` slots of a dense store, whatever they hold."""
        return self._decode([tensor[:, :, :count] for tensor in cache], dtype)

    def held(self, cache: list[Tensor], starts: Tensor, *, end: int, length: int, dtype: torch.dtype) -> list[Part]:
        """What a dense or paged store holds below position `end`, for queries at starts .. starts+length-1."""
        if self.page:
            return [self._page_held(cache, starts, end, length, dtype)]
        return [Part(*self._decode([tensor[:, :, :end] for tensor in cache], dtype))]

    def _encode(self, k: Tensor, v: Tensor) -> list[Tensor]:
        if self.format.full:
            return [k, v]
        return [*encode_tokens(k, self.format), *encode_tokens(v, self.format)]

    def _decode(self, pieces: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.format.full:
            return pieces[0], pieces[1]
        k, v = (
            decode_tokens(codes, params, self.format, codes.shape[-1] * 8 // self.format.bits, dtype)
            for codes, params in (pieces[:2], pieces[2:4])
        )
        return k, v

    def _ring_held(self, cache: list[Tensor], count: Tensor, most: int, ragged: bool, dtype: torch.dtype) -> Part:
        """The ring's entries once `count` tokens per row (at most `most`) were written."""
        slots = cache[0].shape[2]
        used = min(most, slots)
        k, v = self._decode([tensor[:, :, :used] for tensor in cache], dtype)
        if ragged:
            return Part(k, v, _ring_positions(count.view(-1, 1), used, self.sinks, self.window))
        if most <= slots:
            return Part(k, v, sure=True)
        where = _ring_positions(torch.tensor(most, device=k.device), used, self.sinks, self.window)
        return Part(k, v, where, sure=True)

    def _page_write(self, cache: list[Tensor], pieces: list[Tensor], starts: Tensor, stops: Tensor | None) -> None:
        *pools, table = cache
        length, spare = pieces[0].shape[2], pools[0].shape[0] - 1
        where = starts.view(-1, 1) + torch.arange(length, device=starts.device)
        pages = table.gather(1, (where // self.page).clamp(max=table.shape[1] - 1))
        if stops is not None:
            pages = torch.where(where < stops.view(-1, 1), pages, spare)
        pages = torch.where(pages < 0, spare, pages)
        for pool, piece in zip(pools, pieces, strict=True):
            pool[pages, :, where % self.page] = piece.transpose(1, 2)

    def _page_held(self, cache: list[Tensor], starts: Tensor, end: int, length: int, dtype: torch.dtype) -> Part:
        *pools, table = cache
        spare, page = pools[0].shape[0] - 1, self.page
        blocks = min(-(-end // page), table.shape[1])
        lead = -(-self.sinks // page)  # blocks that hold sinks
        tail = (self.window + length + page - 2) // page + 1  # blocks that a window of S queries may touch
        if self.window and lead + tail < blocks:
            low = ((starts - self.window + 1) // page).clamp(min=lead).view(-1, 1)
            ids = torch.cat(
                [
                    torch.arange(lead, device=table.device).expand(len(starts), -1),
                    low + torch.arange(tail, device=table.device),
                ],
                dim=1,
            )
            positions = (ids.unsqueeze(2) * page + torch.arange(page, device=table.device)).flatten(1)
            pages = torch.where(ids < table.shape[1], table.gather(1, ids.clamp(max=table.shape[1] - 1)), -1)
        else:
            pages, positions = table[:, :blocks], None
        pages = torch.where(pages < 0, spare, pages)

        def gather(pool: Tensor) -> Tensor:
            found = pool[pages].transpose(1, 2)  # [B, Hkv, blocks, page, X]
            found = found.flatten(2, 3)
            return found if positions is not None else found[:, :, :end]

        return Part(*self._decode([gather(pool) for pool in pools], dtype), positions=positions)


@lru_cache(maxsize=256)
def _parse(text: str) -> Layout:
    layout = Layout()
    for word in filter(None, text.split(";")):
        name, _, value = word.partition("=")
        if value and name in ("window", "sinks", "page") and value.isdecimal():
            numbers: dict[str, Any] = {name: int(value)}
            layout = replace(layout, **numbers)
        elif not value:
            layout = replace(layout, format=KVFormat.parse(name))
        else:
            raise PlanError(f"{text!r} is no layout of a cache: {word!r}")
    return layout


def _ring_positions(count: Tensor, slots: int, sinks: int, window: int) -> Tensor:
    """Where the entries of the first `slots` slots stand once `count` tokens were written; negative for none.

    `count` is a number or a column [B, 1]; the result [slots] or [B, slots].
    """
    slot = torch.arange(slots, device=count.device)
    newest = count - 1 - sinks
    place = slot - sinks
    latest = sinks + newest - (newest - place) % window
    inside = torch.where((newest >= 0) & (latest >= sinks), latest, -1)
    return torch.where(slot < sinks, torch.where(slot < count, slot, -1), inside)


def _overwrite(
    cache: list[Tensor], fresh: list[Tensor], starts: Tensor, stops: Tensor | None, sinks: int, window: int
) -> None:
    """Write tokens starts .. starts+S-1, those before `stops`, into rings that keep the latest of each slot."""
    slots, length = cache[0].shape[2], fresh[0].shape[2]
    end = starts + length if stops is None else torch.minimum(starts + length, stops)
    where = _ring_positions(end.view(-1, 1), slots, sinks, window)
    source = where - starts.view(-1, 1)
    taken = ((source >= 0) & (source < length)).view(len(starts), 1, slots, 1)
    rows = torch.arange(len(starts), device=starts.device).view(-1, 1)
    for tensor, piece in zip(cache, fresh, strict=True):
        new = piece[rows, :, source.clamp(0, length - 1)].transpose(1, 2)
        tensor.copy_(torch.where(taken, new, tensor))


def _exchange_kivi(
    layout: Layout,
    cache: list[Tensor],
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    stops: Tensor | None,
    end: int,
    ragged: bool,
    first: bool,
    last: bool,
) -> list[Part]:
    """A token is read in full precision until its group is complete and all of it at least `residual` tokens old."""
    fmt = layout.format
    group, length = fmt.group, k.shape[2]
    k_codes, k_params, v_codes, v_params, k_recent, v_recent = cache
    room = k_recent.shape[2]
    begin = end - length
    rows = torch.arange(len(starts), device=k.device).view(-1, 1)
    if first and (ragged or fmt.closed(end) > fmt.closed(begin)):
        done = (starts - fmt.residual).clamp(min=0) // group  # groups that were quantized before, per row
        todo = (starts + length - fmt.residual).clamp(min=0) // group - done
        most = length // group + 1
        where = done.view(-1, 1) * group + torch.arange(most * group, device=k.device)
        old = (where < starts.view(-1, 1)).view(len(starts), 1, -1, 1)
        ahead = (where - starts.view(-1, 1)).clamp(0, length - 1)

        def exact(recent: Tensor, new: Tensor) -> Tensor:
            found = torch.where(old, recent[rows, :, where % room].transpose(1, 2), new[rows, :, ahead].transpose(1, 2))
            return found.unflatten(2, (most, group))

        row, index = (torch.arange(most, device=k.device) < todo.view(-1, 1)).nonzero(as_tuple=True)
        place = done[row] + index
        codes, params = encode_channels(exact(k_recent, k), fmt)
        k_codes.unflatten(2, (-1, group))[row, :, place] = codes[row, :, index]
        k_params[row, :, place] = params[row, :, index]
        codes, params = encode_tokens(exact(v_recent, v), fmt)
        v_codes.unflatten(2, (-1, group))[row, :, place] = codes[row, :, index]
        v_params.unflatten(2, (-1, group))[row, :, place] = params[row, :, index]
    parts: list[Part] = []
    closed = fmt.closed(end)
    if closed:
        dims = [c.shape[-1] * 8 // fmt.bits for c in (k_codes, v_codes)]
        keys = decode_channels(
            k_codes[:, :, :closed].unflatten(2, (-1, group)), k_params[:, :, : closed // group], fmt, dims[0], k.dtype
        ).flatten(2, 3)
        values = decode_tokens(v_codes[:, :, :closed], v_params[:, :, :closed], fmt, dims[1], k.dtype)
        parts.append(Part(keys, values, reads="closed"))
    if begin > 0 or ragged:
        where = _ring_positions(starts.view(-1, 1), min(room, begin), 0, room)
        used = where.shape[1]
        parts.append(Part(k_recent[:, :, :used].clone(), v_recent[:, :, :used].clone(), where, "open"))
    fresh = starts.view(-1, 1) + torch.arange(length, device=k.device) if ragged else None
    parts.append(Part(k, v, fresh, "open", base=begin))
    if last:
        _overwrite([k_recent, v_recent], [k, v], starts, stops, 0, room)
    return parts
