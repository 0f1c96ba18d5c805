"""The state of a paged cache: pools of pages for every store, and a table per row that says which are its own.

Stores that keep the same tokens (the whole text, or one window) share their tables: page 7 of such a `Kind` is page 7
in the pool of each of its stores. One more page than the bookkeeping knows of takes what is written for padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpass.ir.plan import CachePlan
from kvpass.runtime.pages import ABSENT, OutOfPages, PagePool, Table, Usage
from kvpass.runtime.state import State

Kind = tuple[int, int]  # what stores keep: (window, sinks), (0, 0) for everything
Tables = dict[Kind, Table]


class PagedMemory:
    """Pools of pages, one tensor [pages + 1, Hkv, page, ...] for each part of each store.

    Args:
        plan: what each layer stores.
        pages: pages per kind.
        device: where the pools lie.
    """

    def __init__(self, plan: CachePlan, pages: dict[Kind, int], device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.page = next(c.page for c in plan if c.page)
        self.kinds: dict[Kind, list[int]] = {}
        for owner in plan.owners():
            self.kinds.setdefault(self.kind(owner), []).append(owner)
        self.pools = {kind: PagePool(pages[kind], self.page) for kind in self.kinds}
        self.tensors = {owner: self._tensors(owner, pages[self.kind(owner)]) for owner in plan.owners()}
        self.version = 0  # how often the tensors were replaced

    def kind(self, owner: int) -> Kind:
        """What an owner's store keeps."""
        layout = self.plan.layout(owner)
        return layout.window, layout.sinks

    def _tensors(self, owner: int, pages: int) -> list[Tensor]:
        cache, layout = self.plan[owner], self.plan.layout(owner)
        return [
            torch.zeros((pages + 1, cache.kv_heads, spec.slots, *spec.tail), dtype=spec.dtype, device=self.device)
            for spec in layout.specs(cache.key_dim, cache.value_dim, cache.dtype, self.page)
        ]

    def extend(self, kind: Kind, count: int) -> None:
        """Add pages to a kind's pools. The tensors are new ones, so states over them have to take them up."""
        self.pools[kind].extend(count)
        self.version += 1
        for owner in self.kinds[kind]:
            grown = self._tensors(owner, self.pools[kind].pages)
            for new, old in zip(grown, self.tensors[owner], strict=True):
                new[: len(old) - 1] = old[:-1]
            self.tensors[owner] = grown

    def copy(self, kind: Kind, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages, one after the other."""
        for source, target in copies:
            for owner in self.kinds[kind]:
                for tensor in self.tensors[owner]:
                    tensor[target] = tensor[source]

    def take(self, kind: Kind, pages: Sequence[int]) -> list[Tensor]:
        """What some pages hold, on the host: one tensor for each part of each store of the kind."""
        index = torch.tensor(list(pages), dtype=torch.long, device=self.device)
        return [t[index].cpu() for owner in self.kinds[kind] for t in self.tensors[owner]]

    def put(self, kind: Kind, pages: Sequence[int], held: Sequence[Tensor]) -> None:
        """Fill pages with what `take` gave."""
        index = torch.tensor(list(pages), dtype=torch.long, device=self.device)
        parts = iter(held)
        for owner in self.kinds[kind]:
            for tensor in self.tensors[owner]:
                tensor[index] = next(parts).to(self.device)

    def page_bytes(self, kind: Kind) -> int:
        """Bytes of one page in all stores of a kind."""
        return sum(t[0].numel() * t.element_size() for owner in self.kinds[kind] for t in self.tensors[owner])

    def allocated_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(t.numel() * t.element_size() for ts in self.tensors.values() for t in ts)

    def usage(self, rows: Sequence[Tables]) -> dict[Kind, Usage]:
        """What the pages of each kind are used for, given all live sequences."""
        return {kind: pool.usage([tables[kind] for tables in rows]) for kind, pool in self.pools.items()}


@dataclass
class PagedState(State):
    """A state whose rows own pages.

    Attributes:
        memory: the pools.
        rows: per row, the table of each kind.
        growing: whether pools are made larger when they run out, instead of raising `OutOfPages`.
        held: `lengths` on the host, as of the last `refresh`.
    """

    memory: PagedMemory | None = None
    rows: list[Tables] = field(default_factory=list)
    growing: bool = False
    held: list[int] = field(default_factory=list)
    _tables: dict[Kind, Tensor] = field(default_factory=dict)
    _version: int = 0

    @staticmethod
    def fresh(plan: CachePlan, batch: int, capacity: int, device: torch.device) -> PagedState:
        """A state with pools of its own, which grow."""
        page = next(c.page for c in plan if c.page)
        pages = max(1, batch * -(-capacity // page))
        kinds = {(layout.window, layout.sinks) for layout in map(plan.layout, plan.owners())}
        memory = PagedMemory(plan, dict.fromkeys(kinds, pages), device)
        rows: list[Tables] = [{kind: Table() for kind in memory.kinds} for _ in range(batch)]
        lengths = torch.zeros(batch, dtype=torch.long, device=device)
        return PagedState.of(memory, rows, lengths, growing=True)

    @staticmethod
    def of(memory: PagedMemory, rows: list[Tables], lengths: Tensor, *, growing: bool = False) -> PagedState:
        """A state over sequences that have pages already."""
        state = PagedState(memory.plan, lengths, memory=memory, rows=rows, growing=growing)
        state.refresh()
        state._write_tables()
        return state

    @property
    def pool(self) -> PagedMemory:
        assert self.memory is not None
        return self.memory

    def _write_tables(self) -> None:
        """Make the tensors that the graph reads from the tables, [B, blocks] with some room; the last column is -1."""
        for kind in self.pool.kinds:
            wide = max((len(r[kind].pages) for r in self.rows), default=0)
            wide += wide // 8 + 8
            padded = [r[kind].pages + [ABSENT] * (wide - len(r[kind].pages)) for r in self.rows]
            self._tables[kind] = torch.tensor(padded, dtype=torch.long, device=self.pool.device).view(-1, wide)
        self._version = self.pool.version
        self.stores = {
            owner: [*self.pool.tensors[owner], self._tables[kind]]
            for kind, owners in self.pool.kinds.items()
            for owner in owners
        }

    def _write_blocks(self, changed: dict[Kind, list[tuple[int, int]]]) -> None:
        """Bring the given (row, block) pairs of those tensors up to date."""
        if self._version != self.pool.version or any(
            block >= self._tables[kind].shape[1] - 1 for kind, pairs in changed.items() for _, block in pairs
        ):
            self._write_tables()
            return
        for kind, pairs in changed.items():
            if pairs:
                cells = [(row, block, self.rows[row][kind].pages[block]) for row, block in pairs]
                row, block, page = torch.tensor(cells, dtype=torch.long, device=self.pool.device).unbind(1)
                self._tables[kind][row, block] = page

    def prepare(self, count: int, stops: Tensor | None = None) -> None:
        """Take the pages that `count` more tokens per row need.

        What was taken for a step that did not come to its end (it raised, or lengths were not advanced) is given back
        first.

        Raises:
            OutOfPages: the pools are too small and not growing; no row has changed.
        """
        self.settle()
        ends = [n + count for n in self.held]
        if stops is not None:
            ends = [min(end, stop) for end, stop in zip(ends, stops.tolist(), strict=True)]
        counts: dict[Kind, list[int]] = {}
        for kind, pool in self.pool.pools.items():
            tables = [row[kind] for row in self.rows]
            counts[kind] = [max(0, end - table.length) for end, table in zip(ends, tables, strict=True)]
            needed = pool.needed_by_all(tables, counts[kind])
            if needed > pool.available:
                if not self.growing:
                    raise OutOfPages(needed, pool.available, pool.pages)
                self.pool.extend(kind, max(needed - pool.available, pool.pages))
        changed: dict[Kind, list[tuple[int, int]]] = {kind: [] for kind in counts}
        for kind, pool in self.pool.pools.items():
            for index, (row, n) in enumerate(zip(self.rows, counts[kind], strict=True)):
                table = row[kind]
                first = len(table.pages)
                copies = pool.append(table, n)
                self.pool.copy(kind, copies)
                changed[kind] += [(index, block) for block in range(first - len(copies), len(table.pages))]
        self._write_blocks(changed)

    def settle(self) -> None:
        """Give back what `prepare` took beyond the rows' lengths."""
        cut = False
        for row, length in zip(self.rows, self.held, strict=True):
            for kind, table in row.items():
                if table.length > length:
                    self.pool.pools[kind].truncate(table, length)
                    cut = True
        if cut:
            self._write_tables()

    def reserve(self, capacity: int) -> None:
        """Nothing: pages are taken token by token."""

    def advance(self, counts: Tensor | int) -> None:
        if isinstance(counts, Tensor):
            super().advance(counts)
            return
        self.lengths = self.lengths + counts  # equal counts: all is known without asking the device
        self.held = [n + counts for n in self.held]
        self.min_length, self.max_length = self.min_length + counts, self.max_length + counts
        self._drop()

    def refresh(self) -> None:
        """Bring what the host knows of the lengths up to date. Pages beyond them are given back."""
        super().refresh()
        self.held = self.lengths.tolist()
        self.settle()
        self._drop()

    def _drop(self) -> None:
        """Give back the pages that windows have left behind."""
        changed: dict[Kind, list[tuple[int, int]]] = {}
        for (window, sinks), pool in self.pool.pools.items():
            if not window:
                continue
            changed[window, sinks] = pairs = []
            for index, row in enumerate(self.rows):
                table = row[window, sinks]
                position = table.length + 1 - max(window, 2)  # the last token stays: `settle` may cut back to it
                pairs += [(index, block) for block in pool.drop_before(table, position, sinks)]
        if self._tables and any(changed.values()):
            self._write_blocks(changed)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in that order and with repeats, which share pages until they part."""
        wanted = self._checked(rows)
        kept = [{kind: self.pool.pools[kind].fork(row[kind]) for kind in row} for row in (self.rows[i] for i in wanted)]
        self.release()
        self.rows = kept
        self.lengths = self.lengths.index_select(0, rows)
        self.refresh()
        self._write_tables()

    def release(self) -> None:
        """Give all pages back."""
        for row in self.rows:
            for kind, table in row.items():
                self.pool.pools[kind].release(table)
        self.rows, self.held = [], []

    def clone(self) -> PagedState:
        """A copy that shares pages with this one until either writes. `release` gives back what it holds."""
        rows = [{kind: self.pool.pools[kind].fork(table) for kind, table in row.items()} for row in self.rows]
        copied = PagedState.of(self.pool, rows, self.lengths.clone(), growing=self.growing)
        copied.passes = list(self.passes)
        return copied

    def allocated_bytes(self) -> int:
        """Bytes of the pools and the tables."""
        beside = [self.lengths, *self._tables.values()]
        return self.pool.allocated_bytes() + sum(t.numel() * t.element_size() for t in beside)

    def usage(self) -> dict[Kind, Usage]:
        """What the pages are used for; see `PagePool.usage`."""
        return self.pool.usage(self.rows)
