"""The cache plan: what each layer stores, as a small immutable table that passes edit and one pass turns into code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from kvpass.errors import PlanError


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps for each token.

    Attributes:
        layer: the layer's index.
        heads: query heads H.
        kv_heads: KV heads Hkv.
        key_dim, value_dim: channels per head (D, Dv).
        dtype: how keys and values are stored.
        window: tokens that the layer reads, its own included; 0 reads all.
        sinks: first tokens that stay readable behind the window.
        positions: "" when the mask is in the algebra, else why it is kept as a table.
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

    def bytes_per_token(self) -> int:
        """Bytes that one token adds to this layer's cache."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True)
class CachePlan:
    """The table of all layers."""

    layers: tuple[LayerCache, ...]

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def bytes_per_token(self) -> int:
        """Bytes that one token adds to the cache, all layers together."""
        return sum(layer.bytes_per_token() for layer in self.layers)

    def bytes(self, batch: int, length: int) -> int:
        """Bytes of the cache of `batch` sequences of `length` tokens each."""
        return batch * length * self.bytes_per_token()

    def per_device(self, tensor_parallel: int) -> int:
        """Bytes per token on each device: a KV head is not split, so a device holds max(1, Hkv / devices) of them."""
        if tensor_parallel < 1:
            raise PlanError(f"tensor_parallel must be at least 1, not {tensor_parallel}")
        total = 0
        for layer in self.layers:
            held = max(1, -(-layer.kv_heads // tensor_parallel))
            total += held * (layer.key_dim + layer.value_dim) * layer.dtype.itemsize
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
                    "window": layer.window,
                    "sinks": layer.sinks,
                    "mask": layer.positions or "in the algebra",
                    "bytes_per_token": layer.bytes_per_token(),
                }
            )
        return rows
