"""The cache plan: what each layer stores, as a small immutable table that passes edit and one pass turns into code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from kvpass.errors import PlanError
from kvpass.ir.kv_format import FULL, KVFormat
from kvpass.ir.kv_layout import Layout


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
        bounded = all(c.window > 0 and not c.positions for c in readers)
        window = max(c.window for c in readers) if bounded else 0
        sinks = max(c.sinks for c in readers) if bounded else 0
        return Layout(cache.format, window, sinks, cache.page)

    def checked(self, where: str) -> CachePlan:
        """The plan itself, where every store can be what its readers ask for; `where` is for the message.

        Raises:
            PlanError: two wishes exclude each other, with the reason.
        """
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

    @property
    def upward(self) -> bool:
        """Whether a layer reads the keys and values of one above it, so that prefill takes several passes."""
        return any(c.upward for c in self.layers)

    @property
    def bounded(self) -> bool:
        """Whether the cache stops growing: every store keeps a window only."""
        return all(self.layout(owner).window > 0 for owner in self.owners())

    def bytes_per_token(self) -> int:
        """Bytes that one token adds to the cache, all layers together, while no window is full."""
        return sum(layer.bytes_per_token() for layer in self.layers)

    def bytes(self, batch: int, length: int) -> int:
        """Bytes of the cache of `batch` sequences of `length` tokens each: scales, residuals and full windows counted,
        unused slots not."""
        total = 0
        for owner in self.owners():
            cache = self.layers[owner]
            layout = self.layout(owner)
            total += cache.kv_heads * layout.bytes(cache.key_dim, cache.value_dim, cache.dtype, length)
        return batch * total

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
                    "mask": layer.positions or "in the algebra",
                    "bytes_per_token": layer.bytes_per_token(),
                }
            )
        return rows
