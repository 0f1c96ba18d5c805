"""Cache state: the stores of every layer, preallocated, and how many tokens each row holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
        stores: per owner of keys and values, the tensors of its layout, [B, Hkv, slots, ...]; entries beyond a row's
            length are never read.
        capacity: tokens per row that there is room for; it grows when that runs out.
        passes: what each run of several tokens took, where layers read the layer above (`ir.fixpoint`): the passes, and
            whether keys and values stood still.
        recordings: steps over these caches that were recorded (`runtime.decode_graph`).
    """

    plan: CachePlan
    lengths: Tensor
    stores: dict[int, list[Tensor]] = field(default_factory=dict)
    capacity: int = 0
    min_length: int = 0
    max_length: int = 0
    ragged: bool = False
    passes: list[tuple[int, bool]] = field(default_factory=list)
    recordings: dict[tuple[int, ...], tuple[object, Any]] = field(default_factory=dict, repr=False)

    @staticmethod
    def empty(plan: CachePlan, batch: int, capacity: int, device: torch.device) -> State:
        """A state for `batch` rows with room for `capacity` tokens each."""
        if any(c.page for c in plan):
            from kvpass.runtime.paged import PagedState

            return PagedState.fresh(plan, batch, capacity, device)
        if plan.selective:
            from kvpass.runtime.selective import SelectiveState

            return SelectiveState.fresh(plan, batch, device)
        state = State(plan, torch.zeros(batch, dtype=torch.long, device=device), capacity=capacity)
        for owner in plan.owners():
            cache, layout = plan[owner], plan.layout(owner)
            specs = layout.specs(cache.key_dim, cache.value_dim, cache.dtype, layout.slots(capacity))
            state.stores[owner] = [
                torch.zeros((batch, cache.kv_heads, spec.slots, *spec.tail), dtype=spec.dtype, device=device)
                for spec in specs
            ]
        return state

    @property
    def batch(self) -> int:
        return int(self.lengths.shape[0])

    def allocated_bytes(self) -> int:
        """Bytes held by the caches and everything beside them, measured from the tensors."""
        tensors = [self.lengths, *(t for store in self.stores.values() for t in store)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def used_bytes(self) -> int:
        """Bytes of the entries that hold tokens, all layers and rows."""
        return sum(self.plan.bytes(1, length) for length in self.lengths.tolist())

    def tensors(self, owner: int) -> list[Tensor]:
        """An owner's store, in the order in which entries take it."""
        return self.stores[owner]

    def told(self, count: int) -> dict[str, Any]:
        """What else entries are told to run `count` tokens per row."""
        return {}

    def prepare(self, count: int, stops: Tensor | None = None) -> None:
        """Make room for `count` more tokens in each row; a row needs none at or beyond its `stops`."""
        self.reserve(self.max_length + count)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row, keeping what is held."""
        if capacity <= self.capacity:
            return
        self.capacity = max(capacity, 2 * self.capacity)
        for owner, tensors in self.stores.items():
            cache, layout = self.plan[owner], self.plan.layout(owner)
            specs = layout.specs(cache.key_dim, cache.value_dim, cache.dtype, layout.slots(self.capacity))
            for index, (spec, old) in enumerate(zip(specs, tensors, strict=True)):
                if spec.slots > old.shape[2]:
                    new = old.new_zeros((old.shape[0], old.shape[1], spec.slots, *spec.tail))
                    new[:, :, : old.shape[2]] = old
                    tensors[index] = new

    def advance(self, counts: Tensor | int) -> None:
        """Record that each row took `counts` tokens more."""
        self.lengths = self.lengths + counts
        if isinstance(counts, Tensor):
            self.refresh()
        else:  # all is known without asking the device
            self.min_length, self.max_length = self.min_length + counts, self.max_length + counts

    def refresh(self) -> None:
        """Bring the host's copy of the longest length up to date."""
        longest, shortest = int(self.lengths.max()), int(self.lengths.min())
        self.min_length, self.max_length, self.ragged = shortest, longest, longest != shortest

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in that order and with repeats (beam search, leaving a batch)."""
        self._checked(rows)
        self.lengths = self.lengths.index_select(0, rows)
        self.stores = {owner: [t.index_select(0, rows) for t in ts] for owner, ts in self.stores.items()}
        self.refresh()

    def _checked(self, rows: Tensor) -> list[int]:
        wanted: list[int] = rows.tolist()
        for row in wanted:
            if not 0 <= row < self.batch:
                raise RequestError(f"row {row} does not exist in a batch of {self.batch}")
        return wanted

    def clone(self) -> State:
        """An independent copy."""
        stores = {owner: [t.clone() for t in ts] for owner, ts in self.stores.items()}
        copied = State(self.plan, self.lengths.clone(), stores, self.capacity, passes=list(self.passes))
        copied.refresh()
        return copied
