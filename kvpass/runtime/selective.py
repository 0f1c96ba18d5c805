"""Cache state where tokens are dropped by rank: every layer holds a number of tokens of its own.

How many tokens stay follows from lengths alone, so the host knows every count without asking the device; only which
ones they are is the device's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpass.ir.plan import CachePlan
from kvpass.ir.retention import Retention
from kvpass.ir.selection import thin
from kvpass.runtime.state import State


@dataclass
class SelectiveState(State):
    """A state whose stores hold chosen tokens.

    Attributes:
        prompts: tokens of each row's prompt.
        texts: tokens of each row's text so far: what `lengths` says, on the host.
        fills: per owner, the tokens that its store holds of each row.
        budgets: per owner whose tokens replace each other, how many it holds of each row.
        extras: per owner, positions int32 [B, G, slots] (-1 where there is nothing) and what `EXTRAS` lists.
        thinned: per owner whose text is thinned, the slot of each row below which that is done.
        scales: per owner, the scale and the soft cap of its attention.
        rules: per owner, what its store keeps.
    """

    prompts: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    fills: dict[int, list[int]] = field(default_factory=dict)
    budgets: dict[int, list[int]] = field(default_factory=dict)
    extras: dict[int, list[Tensor]] = field(default_factory=dict)
    thinned: dict[int, list[int]] = field(default_factory=dict)
    scales: dict[int, tuple[float, float]] = field(default_factory=dict)
    rules: dict[int, Retention] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rules = self.rules or {owner: self.plan.rule(owner) for owner in self.plan.owners()}
        self._steady: dict[str, Tensor] = {}  # what `decode` is told at every step alike

    @staticmethod
    def fresh(plan: CachePlan, batch: int, device: torch.device) -> SelectiveState:
        """A state that waits for prompts; see `begin`."""
        return SelectiveState(plan, torch.zeros(batch, dtype=torch.long, device=device))

    # ------------------------------------------------------------------ sizes

    def begin(self, prompts: list[int], capacity: int, scales: dict[int, tuple[float, float]]) -> dict[str, Any]:
        """Make room for prompts of these lengths, and for text up to `capacity` tokens; what `prefill` has to be told.

        Nothing is held yet: `fills` says what will be once the prompts were read.
        """
        self.prompts, self.texts, self.scales = list(prompts), list(prompts), scales
        reached = [self.plan.reached(n) for n in prompts]
        kept = [self.plan.kept(n) for n in prompts]
        told: dict[str, Any] = {"prompt": self._tensor(prompts), "last": self._tensor([r[-1] for r in reached]) - 1}
        for cache in self.plan:
            if cache.passes is not None:
                counts = [r[cache.layer + 1] for r in reached]
                told |= {f"count_{cache.layer}": self._tensor(counts), f"width_{cache.layer}": max(counts)}
        for owner, rule in self.rules.items():
            self.fills[owner] = [k[owner] for k in kept]
            told |= {f"keep_{owner}": self._tensor(self.fills[owner]), f"keep_width_{owner}": max(self.fills[owner])}
            if rule.then == "replace":
                self.budgets[owner] = [rule.capacity(n) for n in prompts]
            if rule.then == "thin":
                self.thinned[owner] = [n - rule.lead for n in self.fills[owner]]
        self.refresh()
        self._make(capacity, batch=len(prompts))
        return told

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.lengths.device)

    def _slots(self, owner: int, capacity: int) -> int:
        """Slots that an owner needs for text of up to `capacity` tokens."""
        if self.rules[owner].then == "replace":
            return min(max(self.budgets[owner]), max(capacity, self.max_length)) + 1
        more = capacity - min(self.prompts)
        return max(self.fills[owner]) + max(0, more)

    def _make(self, capacity: int, batch: int) -> None:
        """Allocate, or make more room, keeping what is held."""
        self.capacity = capacity
        device = self.lengths.device
        for owner, rule in self.rules.items():
            cache, layout = self.plan[owner], self.plan.layout(owner)
            slots = self._slots(owner, capacity)
            groups = cache.kv_heads if rule.apart else 1
            specs = layout.specs(cache.key_dim, cache.value_dim, cache.dtype, slots)
            shapes = [((batch, cache.kv_heads, s.slots, *s.tail), s.dtype, 0) for s in specs]
            self.stores[owner] = _grown(self.stores.get(owner), shapes, device)
            extra: list[tuple[tuple[int, ...], torch.dtype, int]] = [((batch, groups, slots), torch.int32, -1)]
            if rule.then == "replace":
                extra.append(((batch, groups, slots), torch.float32, 0))
            held = self.extras.get(owner)
            if rule.then == "thin":
                rows = rule.window(max(capacity, self.max_length))
                queries = (batch, cache.heads, rows, cache.key_dim)
                extra += [(queries, cache.dtype, 0), (queries[:3], torch.float32, 0), ((batch, rows), torch.int32, -1)]
                if held is not None and held[1].shape[2] != rows:
                    held = [held[0], *_spread(held[1:], rows)]
            self.extras[owner] = _grown(held, extra, device)

    def reserve(self, capacity: int) -> None:
        if capacity > self.capacity:
            self._make(max(capacity, 2 * self.capacity), self.batch)

    def tensors(self, owner: int) -> list[Tensor]:
        """An owner's store and what lies beside it, in the order of `insert_cache.store_names`."""
        return [*self.stores[owner], *self.extras[owner]]

    # ------------------------------------------------------------------ steps

    def told(self, count: int) -> dict[str, Any]:
        """What `decode` has to be told of each owner for `count` more tokens per row."""
        if not self._steady:
            for owner, fills in self.fills.items():
                recents = [self.rules[owner].window(n) for n in self.prompts]
                self._steady[f"budget_{owner}"] = self._tensor(self.budgets.get(owner, fills))
                self._steady[f"recent_{owner}"] = self._tensor(recents)
        arguments: dict[str, Any] = dict(self._steady)
        for owner, fills in self.fills.items():
            arguments |= {
                f"fill_{owner}": self._tensor(fills),
                f"end_{owner}": max(fills) + count,
                f"ragged_{owner}": len(set(fills)) > 1,
            }
        return arguments

    def advance(self, counts: Tensor | int) -> None:
        """Record that each row took `counts` tokens more, and thin what has grown old."""
        steps = [counts] * self.batch if isinstance(counts, int) else [int(c) for c in counts.tolist()]
        self.texts = [n + step for n, step in zip(self.texts, steps, strict=True)]
        super().advance(counts)
        for owner, fills in self.fills.items():
            for row, step in enumerate(steps):
                fills[row] += step
                if owner in self.budgets:
                    fills[row] = min(fills[row], self.budgets[owner][row])
        self._thin()

    def refresh(self) -> None:
        """Bring the longest and the shortest length up to date, from the host's numbers alone."""
        texts = self.texts or [0]
        self.min_length, self.max_length, self.ragged = min(texts), max(texts), len(set(texts)) > 1

    def _thin(self) -> None:
        """Thin the generated text of every row whose oldest whole block has left the recent window."""
        if not self.thinned:
            return
        first = self.plan.owners()[0]
        for row, length in enumerate(list(self.fills[first])):
            for owner, done in self.thinned.items():
                rule = self.rules[owner]
                window = rule.window(length)
                while self.fills[owner][row] - window - done[row] >= rule.block:
                    begin = self.fills[owner][row] - window - rule.block
                    fill = thin(
                        rule, self.plan.layout(owner), self.tensors(owner), row, begin, self.fills[owner][row], window,
                        *self.scales[owner], self.texts[row] - 1,
                    )  # fmt: skip
                    self.fills[owner][row] = fill
                    done[row] = fill - window

    def positions(self, owner: int) -> list[Tensor]:
        """Per row, where the tokens that an owner's store holds stand, [G, fill] in ascending order.

        A store that only grows writes positions for the prompt alone: what follows it lies in order.
        """
        found = []
        for row, fill, text in zip(self.extras[owner][0], self.fills[owner], self.texts, strict=True):
            held = torch.stack([line[line >= 0].sort().values for line in row])
            following = torch.arange(text - fill + held.shape[1], text, device=held.device, dtype=held.dtype)
            found.append(torch.cat([held, following.expand(len(held), -1)], dim=1))
        return found

    def used_bytes(self) -> int:
        """Bytes of the entries that hold tokens, and of what lies beside them, all layers and rows."""
        return sum(
            self.plan.held_bytes({owner: fills[row] for owner, fills in self.fills.items()}, prompt)
            for row, prompt in enumerate(self.prompts)
        )

    def allocated_bytes(self) -> int:
        return super().allocated_bytes() + sum(t.nbytes for ts in self.extras.values() for t in ts)

    # ------------------------------------------------------------------ rows

    def select(self, rows: Tensor) -> None:
        wanted = self._checked(rows)
        self.lengths = self.lengths.index_select(0, rows)
        for tensors in (self.stores, self.extras):
            for owner, held in tensors.items():
                tensors[owner] = [t.index_select(0, rows) for t in held]
        for numbers in (self.fills, self.budgets, self.thinned):
            for owner, per_row in numbers.items():
                numbers[owner] = [per_row[row] for row in wanted]
        self._steady = {}
        self.prompts, self.texts = ([numbers[row] for row in wanted] for numbers in (self.prompts, self.texts))
        self.refresh()

    def clone(self) -> State:
        copied = SelectiveState(
            self.plan,
            self.lengths.clone(),
            {owner: [t.clone() for t in ts] for owner, ts in self.stores.items()},
            self.capacity,
            prompts=list(self.prompts),
            texts=list(self.texts),
            fills={owner: list(n) for owner, n in self.fills.items()},
            budgets={owner: list(n) for owner, n in self.budgets.items()},
            extras={owner: [t.clone() for t in ts] for owner, ts in self.extras.items()},
            thinned={owner: list(n) for owner, n in self.thinned.items()},
            scales=self.scales,
            rules=self.rules,
        )
        copied.refresh()
        return copied


def _grown(
    held: list[Tensor] | None, shapes: list[tuple[tuple[int, ...], torch.dtype, int]], device: torch.device
) -> list[Tensor]:
    """Tensors of these shapes, dtypes and values, with what is held in their first slots."""
    made = []
    for index, (shape, dtype, value) in enumerate(shapes):
        old = held[index] if held is not None else None
        if old is not None and old.shape == shape:
            made.append(old)
            continue
        new = torch.full(shape, value, dtype=dtype, device=device)
        if old is not None:
            new[tuple(slice(n) for n in old.shape)] = old
        made.append(new)
    return made


def _spread(held: list[Tensor], rows: int) -> list[Tensor]:
    """Queries, log-sum-exps and their positions, with the query at position p in slot p mod `rows`."""
    queries, lse, asked = held
    where = torch.where(asked >= 0, asked % rows, rows).long()  # one slot more takes what is none
    batch = torch.arange(len(asked), device=asked.device).unsqueeze(1)
    made = []
    for tensor, value in ((queries.transpose(1, 2), 0), (lse.transpose(1, 2), 0), (asked, -1)):
        new = tensor.new_full((tensor.shape[0], rows + 1, *tensor.shape[2:]), value)
        new[batch, where] = tensor
        made.append(new[:, :rows])
    return [made[0].transpose(1, 2).contiguous(), made[1].transpose(1, 2).contiguous(), made[2].contiguous()]
