"""The cache plan: what each layer stores, as a small immutable table that passes edit and one pass turns into code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from kvpass.errors import PlanError
from kvpass.ir.kv_format import FULL, KVFormat
from kvpass.ir.kv_layout import Layout
from kvpass.ir.retention import Retention


@dataclass(frozen=True)
class LayerCache:
    """What one layer reads and keeps for each token.

    Attributes:
        layer: the layer's index.
        heads: query heads H.
        kv_heads: KV heads Hkv.
        key_dim, value_dim: channels per head (D, Dv).
        dtype: what keys and values are computed in, and stored in where `format` is full precision.
        window: tokens that the layer reads, its own included; 0 reads all.
        sinks: first tokens that stay readable behind the window.
        positions: "" when the mask is in the algebra, else why it is kept as a table.
        kv_source: the layer whose keys and values it reads; None for its own.
        format: how keys and values are stored.
        page: tokens per page; 0 for one stretch of memory per row.
        cache_positions: whether rotary positions are those in the cache (StreamingLLM), not those in the text.
        keeps: which tokens its store keeps; None for all.
        passes: which tokens of a prompt go on to the layers above; None for all.
    """

    layer: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    window: int = 0
    sinks: int = 0
    positions: str = ""
    kv_source: int | None = None
    format: KVFormat = FULL
    page: int = 0
    cache_positions: bool = False
    keeps: Retention | None = None
    passes: Retention | None = None

    @property
    def owner(self) -> bool:
        """Whether the layer has keys and values of its own."""
        return self.kv_source is None

    @property
    def upward(self) -> bool:
        """Whether it reads the keys and values of a layer above it."""
        return self.kv_source is not None and self.kv_source > self.layer

    def bytes_per_token(self) -> int:
        """Bytes that one token adds to this layer's cache, while its window (if it has one) is not full."""
        if not self.owner:
            return 0
        layout = Layout(self.format, self.window, self.sinks, self.page)
        return -(-(self.kv_heads * layout.bytes_per_token(self.key_dim, self.value_dim, self.dtype)) // 1)


@dataclass(frozen=True)
class CachePlan:
    """The table of all layers."""

    layers: tuple[LayerCache, ...]

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    def readers(self, owner: int) -> list[LayerCache]:
        """The layers that read a layer's keys and values, itself included."""
        return [c for c in self.layers if c.layer == owner or c.kv_source == owner]

    def owners(self) -> list[int]:
        """The layers that keep keys and values."""
        return [c.layer for c in self.layers if c.owner]

    def layout(self, owner: int) -> Layout:
        """How an owner's store lies in memory: it keeps what the reader with the widest window needs."""
        readers = self.readers(owner)
        cache = self.layers[owner]
        bounded = not self.selective and all(c.window > 0 and not c.positions for c in readers)
        window = max(c.window for c in readers) if bounded else 0
        sinks = max(c.sinks for c in readers) if bounded else 0
        return Layout(cache.format, window, sinks, cache.page)

    def checked(self, where: str) -> CachePlan:
        """The plan itself, where every store can be what its readers ask for; `where` is for the message.

        Raises:
            PlanError: two wishes exclude each other, with the reason.
        """
        if self.selective:
            for cache in self.layers:
                self.check_selected(cache.layer, where)
        for owner in self.owners():
            layout = self.layout(owner)
            above = next((c.layer for c in self.readers(owner) if c.upward), None)
            if above is not None and layout.window:
                raise PlanError(
                    f"layer {above} reads layer {owner} above it, whose cache would keep a window only, and a ring "
                    "cannot be written again in every pass over a prompt",
                    where=where,
                    fix="let layers read one below them, or leave that layer without a window",
                )
            if above is not None and layout.kivi:
                raise PlanError(
                    f"layer {above} reads layer {owner} above it, whose latest tokens would be kept apart (KIVI) and "
                    "cannot be written again in every pass over a prompt",
                    where=where,
                    fix="let layers read one below them, or quantize per token",
                )
            if layout.kivi and layout.window:
                raise PlanError(
                    f"layer {owner} keeps a window, which would cut through KIVI's groups of tokens",
                    where=where,
                    fix='use layout="token"',
                )
            if layout.kivi and layout.page:
                raise PlanError(
                    "KIVI keeps each sequence's latest tokens in a buffer of its own, which pages do not hold",
                    where=where,
                    fix='use layout="token"',
                )
        return self

    def check_selected(self, layer: int, where: str) -> None:
        """What one layer must be where tokens are dropped by rank, in it or elsewhere.

        Raises:
            PlanError: it is not, with the reason.
        """
        cache = self.layers[layer]
        if cache.positions:
            raise PlanError(
                f"the mask of layer {cache.layer} is kept as a table, and kvpass cannot show what it hides from "
                "tokens that have left their place",
                where=where,
                fix="no tokens can be dropped by rank from this model; a window or quantization may serve instead",
            )
        if cache.upward:
            raise PlanError(
                f"layer {cache.layer} reads a layer above it in several passes, and which tokens stay would change "
                "from pass to pass",
                where=where,
                fix="share layers downward",
            )
        if cache.page:
            raise PlanError(
                "pages are handed out for all layers alike, and where tokens are dropped by rank, layers hold "
                "different numbers of them",
                where=where,
                fix="leave out PageKV, or the pass that drops tokens",
            )
        if cache.cache_positions:
            raise PlanError(
                f"layer {cache.layer} counts positions in its cache, where tokens dropped by rank leave gaps",
                where=where,
                fix='slide with positions="text"',
            )
        if cache.format.layout == "kivi":
            raise PlanError(
                f"layer {cache.layer} quantizes groups of neighbouring tokens (KIVI), which dropping tokens by "
                "rank takes apart",
                where=where,
                fix='quantize per token: layout="token"',
            )
        shared = cache.owner and len(self.readers(cache.layer)) > 1
        rule = self.rule(cache.layer)
        if shared and rule.then != "append" and rule.by != "recent":
            raise PlanError(
                f"several layers read what layer {cache.layer} keeps, and each would rank its tokens differently "
                "as text is generated",
                where=where,
                fix="choose a policy that only drops tokens of the prompt",
            )
        if cache.keeps is not None and cache.window:
            raise PlanError(
                f"layer {cache.layer} reads a window only, which is what its cache keeps",
                where=where,
                fix="drop entries by rank or by age, not both",
            )
        if cache.passes is not None and any(
            c.kv_source is not None and c.kv_source <= cache.layer for c in self.layers[cache.layer + 1 :]
        ):
            raise PlanError(
                f"tokens leave behind layer {cache.layer}, and layers above read keys and values of all tokens "
                "from below",
                where=where,
                fix="share layers first; PrunePyramid then prunes where it can",
            )
        if cache.keeps is not None and not cache.owner:
            raise PlanError(f"layer {cache.layer} has no keys and values of its own to drop", where=where)

    @property
    def upward(self) -> bool:
        """Whether a layer reads the keys and values of one above it, so that prefill takes several passes."""
        return any(c.upward for c in self.layers)

    @property
    def bounded(self) -> bool:
        """Whether the cache stops growing: every store keeps a window, or a number of tokens, only."""
        return all(self.layout(owner).window > 0 or self.rule(owner).bounded for owner in self.owners())

    # ------------------------------------------------------------------ what stays of a prompt

    @property
    def selective(self) -> bool:
        """Whether some tokens of a prompt are dropped by rank, so that layers hold different ones."""
        return any(c.keeps is not None or c.passes is not None for c in self.layers)

    def rule(self, owner: int) -> Retention:
        """What an owner's store keeps. Where tokens are dropped by rank anywhere, a layer with a window is one that
        keeps its first tokens and the latest, as many as it can read: their positions have gaps, which a ring has not.
        """
        cache, readers = self.layers[owner], self.readers(owner)
        if cache.keeps is not None or not self.selective or not all(c.window for c in readers):
            return cache.keeps or Retention()
        sinks, window = max(c.sinks for c in readers), max(c.window for c in readers)
        return Retention(by="recent", sinks=sinks, budget=sinks + window, then="replace")

    def reached(self, prompt: int) -> list[int]:
        """Tokens of a prompt that each layer computes."""
        counts, count = [], prompt
        for cache in self.layers:
            counts.append(count)
            if cache.passes is not None:
                count = cache.passes.count(count, prompt)
        return counts

    def kept(self, prompt: int) -> dict[int, int]:
        """Tokens of a prompt that each owner's store holds once it was read."""
        counts = self.reached(prompt)
        kept = {}
        for owner in self.owners():
            kept[owner] = self.rule(owner).count(counts[owner], prompt)
        return kept

    def fraction(self, prompt: int) -> float:
        """What part of the bytes of the same plan without selection a prompt's cache takes."""
        return self.bytes(1, prompt) / self.unselected().bytes(1, prompt)

    def unselected(self) -> CachePlan:
        """The plan with every token kept."""
        return CachePlan(tuple(replace(c, keeps=None, passes=None) for c in self.layers))

    def bytes_per_token(self) -> int:
        """Bytes that one token adds to the cache, all layers together, while no window is full."""
        return sum(layer.bytes_per_token() for layer in self.layers)

    def bytes(self, batch: int, length: int) -> int:
        """Bytes of the cache of `batch` sequences of `length` tokens each: scales, residuals and full windows counted,
        unused slots not."""
        if self.selective:
            return batch * self.held_bytes(self.kept(length), length)
        return batch * self.held_bytes(dict.fromkeys(self.owners(), length))

    def held_bytes(self, held: dict[int, int], prompt: int = 0) -> int:
        """Bytes of one sequence whose owners hold so many tokens, of a prompt of `prompt`."""
        total = 0
        for owner, length in held.items():
            cache = self.layers[owner]
            layout = self.layout(owner)
            total += cache.kv_heads * layout.bytes(cache.key_dim, cache.value_dim, cache.dtype, length)
            if self.selective:
                total += self.side_bytes(owner, length, prompt)
        return total

    def side_bytes(self, owner: int, length: int, prompt: int) -> int:
        """Bytes beside an owner's keys and values: positions, ranks, and queries that will rank."""
        cache = self.layers[owner]
        keeps = self.rule(owner)
        groups = cache.kv_heads if keeps.apart else 1
        total = 4 * groups * length
        if keeps.then == "replace":
            total += 4 * groups * length
        if keeps.then == "thin":
            rows = int(keeps.window(max(length, prompt)))
            total += rows * (cache.heads * (cache.key_dim * cache.dtype.itemsize + 4) + 4)
        return total

    def per_device(self, tensor_parallel: int) -> int:
        """Bytes per token on each device: a KV head is not split, so a device holds max(1, Hkv / devices) of them."""
        if tensor_parallel < 1:
            raise PlanError(f"tensor_parallel must be at least 1, not {tensor_parallel}")
        total = 0
        for layer in self.layers:
            held = max(1, -(-layer.kv_heads // tensor_parallel))
            total += replace(layer, kv_heads=held).bytes_per_token()
        return total

    def with_layer(self, layer: int, **changes: object) -> CachePlan:
        """The plan with one layer changed."""
        layers = list(self.layers)
        layers[layer] = replace(layers[layer], **changes)  # type: ignore[arg-type]
        return CachePlan(tuple(layers))

    def table(self) -> list[dict[str, object]]:
        """One row per run of equal layers, for printing: layers, heads, kv_heads, dims, window, bytes per token."""
        rows: list[dict[str, object]] = []
        previous: LayerCache | None = None
        for layer in self.layers:
            key = replace(layer, layer=0)
            if previous is not None and key == previous:
                rows[-1]["last"] = layer.layer
                continue
            previous = key
            rows.append(
                {
                    "first": layer.layer,
                    "last": layer.layer,
                    "heads": layer.heads,
                    "kv_heads": layer.kv_heads,
                    "key_dim": layer.key_dim,
                    "value_dim": layer.value_dim,
                    "dtype": str(layer.dtype).removeprefix("torch."),
                    "stored": str(layer.format) or str(layer.dtype).removeprefix("torch."),
                    "kv_source": layer.kv_source,
                    "window": layer.window,
                    "sinks": layer.sinks,
                    "page": layer.page,
                    "keeps": "" if layer.keeps is None else str(layer.keeps),
                    "passes": "" if layer.passes is None else str(layer.passes),
                    "mask": layer.positions or "in the algebra",
                    "bytes_per_token": layer.bytes_per_token(),
                }
            )
        return rows
