"""Cache state: preallocated keys and values per layer, and how many tokens each row holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpass.errors import RequestError
from kvpass.ir.plan import CachePlan


@dataclass
class State:
    """What a running batch remembers. `decode` updates it in place.

    Attributes:
        plan: what each layer stores.
        lengths: [B] int64, tokens that each row holds.
        keys, values: per layer [B, Hkv, C, D] and [B, Hkv, C, Dv]; entries beyond a row's length are never read.
    """

    plan: CachePlan
    lengths: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    max_length: int = 0
    ragged: bool = False

    @staticmethod
    def empty(plan: CachePlan, batch: int, capacity: int, device: torch.device) -> State:
        """A state for `batch` rows with room for `capacity` tokens each; it grows when that runs out."""
        state = State(plan, torch.zeros(batch, dtype=torch.long, device=device))
        for layer in plan:
            shape = (batch, layer.kv_heads, capacity)
            state.keys.append(torch.zeros((*shape, layer.key_dim), dtype=layer.dtype, device=device))
            state.values.append(torch.zeros((*shape, layer.value_dim), dtype=layer.dtype, device=device))
        return state

    @property
    def batch(self) -> int:
        return int(self.lengths.shape[0])

    @property
    def capacity(self) -> int:
        return int(self.keys[0].shape[2])

    def allocated_bytes(self) -> int:
        """Bytes held by the caches and everything beside them, measured from the tensors."""
        return sum(t.numel() * t.element_size() for t in [*self.keys, *self.values, self.lengths])

    def used_bytes(self) -> int:
        """Bytes of the entries that hold tokens, all layers and rows."""
        tokens = int(self.lengths.sum())
        return tokens * self.plan.bytes_per_token()

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row, keeping what is held."""
        if capacity <= self.capacity:
            return
        grown = max(capacity, 2 * self.capacity)
        for tensors in (self.keys, self.values):
            for index, old in enumerate(tensors):
                new = old.new_zeros((old.shape[0], old.shape[1], grown, old.shape[3]))
                new[:, :, : self.max_length] = old[:, :, : self.max_length]
                tensors[index] = new

    def advance(self, counts: Tensor | int) -> None:
        """Record that each row took `counts` tokens more."""
        self.lengths = self.lengths + counts
        self.refresh()

    def refresh(self) -> None:
        """Bring the host's copy of the longest length up to date."""
        longest, shortest = int(self.lengths.max()), int(self.lengths.min())
        self.max_length, self.ragged = longest, longest != shortest

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in that order and with repeats (beam search, leaving a batch)."""
        for row in rows.tolist():
            if not 0 <= row < self.batch:
                raise RequestError(f"row {row} does not exist in a batch of {self.batch}")
        self.lengths = self.lengths.index_select(0, rows)
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]
        self.refresh()

    def clone(self) -> State:
        """An independent copy."""
        return State(
            self.plan,
            self.lengths.clone(),
            [k.clone() for k in self.keys],
            [v.clone() for v in self.values],
            self.max_length,
            self.ragged,
        )
