"""Pages of a KV cache: which page holds which tokens of which sequence.

A cache that is one block per sequence has to guess how long the sequence will get. PagedAttention (Kwon et al. 2023,
arXiv 2309.06180) cuts it into pages of a fixed number of tokens, and a block table per sequence names them: token `t`
is in slot `t % page_size` of page `table.pages[t // page_size]`. Waste is then less than one page per sequence, and
sequences that begin alike can share pages.

This is the bookkeeping alone. The tensors are the caller's, so what needs data moved returns the copies to make. They
are made in the order in which they were returned and before anything else is written to the pages: a page that an
operation frees keeps its data until then, and only until then.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from kvpass.errors import KvpassError, RequestError

ABSENT = -1  # a block table's entry that has no page: dropped, or on the host


class OutOfPages(KvpassError):
    """The pool cannot give the pages that an operation needs; the operation changed nothing.

    Args:
        needed: pages that the operation takes.
        available: pages that the pool could give.
        total: pages that the pool has.
        sequence: the id of the sequence that needs them, where it has one.
        fix: what the user can do about it.
    """

    def __init__(
        self,
        needed: int,
        available: int,
        total: int,
        *,
        sequence: int | None = None,
        fix: str = "release or swap out a sequence and try again, or make a larger pool",
    ) -> None:
        self.needed = needed
        self.available = available
        self.total = total
        self.sequence = sequence
        super().__init__(
            f"{needed} pages are needed, {available} are free of {total} in total",
            where="" if sequence is None else f"sequence {sequence}",
            fix=fix,
        )


@dataclass(eq=False)
class Prefix:
    """A full page's tokens and, through `parent`, all tokens before them.

    A pool has one node for each such text, so two nodes are the same text when they are the same object. It lives as
    long as a table, a page or a longer prefix refers to it.

    Attributes:
        parent: the prefix without its last page; None when that is empty.
        tokens: the last page's tokens.
        depth: pages that the text fills.
        page: the page that holds the last tokens' keys and values; None when none does (any more).
    """

    parent: Prefix | None = field(repr=False)
    tokens: tuple[int, ...]
    depth: int
    page: int | None = None


@dataclass(eq=False)
class Table:
    """One sequence's block table. `Table()` is a sequence of no tokens; `PagePool` does everything else with it.

    Attributes:
        pages: the page of each block of `page_size` tokens, ABSENT where there is none.
        length: tokens in the sequence, those in dropped pages included.
        prefix: the text of its leading full pages, as far as it is registered.
        on_host: blocks that are swapped out, ascending; empty when the sequence is in the pool.
        released: whether the sequence is over.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0
    prefix: Prefix | None = None
    on_host: list[int] = field(default_factory=list)
    released: bool = False


@dataclass(frozen=True)
class Usage:
    """What a pool's pages are used for.

    Attributes:
        pages: pages in the pool: used + evictable + free.
        used: pages that some table holds.
        evictable: pages that no table holds, kept because a new sequence may begin with their tokens.
        free: pages that hold nothing.
        shared: pages that more than one table holds.
        tokens: tokens in used pages, those of a shared page counted once.
        slots: tokens that the used pages have room for.
    """

    pages: int
    used: int
    evictable: int
    free: int
    shared: int
    tokens: int
    slots: int

    @property
    def utilisation(self) -> float:
        """Part of the allocated slots that holds tokens; 1 when nothing is allocated."""
        return self.tokens / self.slots if self.slots else 1.0

    @property
    def fragmentation(self) -> float:
        """Part of the allocated slots that is empty, at the end of partly filled pages."""
        return (self.slots - self.tokens) / self.slots if self.slots else 0.0


class PagePool:
    """Pages numbered from 0, each free, used by one or more tables, or evictable.

    A page is written only while one table holds it. Whatever takes pages takes all that it needs or raises `OutOfPages`
    with nothing changed. What only a defect of the caller can bring about (a sequence released twice, or used after
    its release or while it is swapped out) is an AssertionError.

    Args:
        pages: pages in the pool.
        page_size: tokens in a page.

    Raises:
        RequestError: there would be no pages, or no tokens in them.
    """

    def __init__(self, pages: int, page_size: int = 16) -> None:
        if pages < 1 or page_size < 1:
            raise RequestError(
                f"a pool of {pages} pages of {page_size} tokens holds nothing",
                fix="give at least one page of at least one token",
            )
        self.pages = pages
        self.page_size = page_size
        self._references = [0] * pages
        self._free = list(reversed(range(pages)))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._registered: dict[int, Prefix] = {}
        self._prefixes: WeakValueDictionary[tuple[Prefix | None, tuple[int, ...]], Prefix] = WeakValueDictionary()

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that can be had: free and evictable."""
        return len(self._free) + len(self._evictable)

    def extend(self, count: int) -> None:
        """Add `count` free pages, numbered on from the last."""
        self._free[:0] = reversed(range(self.pages, self.pages + count))
        self._references += [0] * count
        self.pages += count

    def references(self, page: int) -> int:
        """Tables that hold a page."""
        return self._references[page]

    # ---------------------------------------------------------------------- sequences

    def needed(self, table: Table, count: int) -> int:
        """Pages that `append` would take for `count` tokens, that of a copy included."""
        _assert_in_pool(table)
        assert count >= 0, f"{count} tokens cannot be appended"
        copied = count > 0 and self._has_room(table) and self._references[table.pages[-1]] > 1
        return self._blocks(table.length + count) - len(table.pages) + copied

    def needed_by_all(self, tables: Sequence[Table], counts: Sequence[int]) -> int:
        """Pages that `append` would take for `counts` tokens of each of several tables, one after the other.

        Of the tables that share a page, the last to write in it takes no copy.
        """
        total, writers = 0, Counter[int]()
        for table, count in zip(tables, counts, strict=True):
            total += self.needed(table, count)
            if count and self._has_room(table):
                writers[table.pages[-1]] += 1
        return total - sum(1 < count == self._references[page] for page, count in writers.items())

    def append(self, table: Table, count: int) -> list[tuple[int, int]]:
        """Make room for `count` more tokens at the end of a sequence.

        They go into the last page where that has room. Where other tables hold that page too, this one goes on in a
        copy of it.

        Returns:
            the copies to make before the tokens are written, (from page, to page): none or one.

        Raises:
            OutOfPages: nothing changed.
        """
        fresh = self._take(self.needed(table, count))
        copies: list[tuple[int, int]] = []
        if count and self._has_room(table):
            last = table.pages[-1]
            if self._references[last] > 1:
                table.pages[-1] = fresh.pop()
                copies.append((last, table.pages[-1]))
                self._give_back([last])
            else:
                self._forget(last)  # a full page was cut back: its tokens will not be those that it is known by
        table.pages += fresh
        table.length += count
        return copies

    def fork(self, table: Table) -> Table:
        """A second sequence of the same tokens, which shares all pages with the first."""
        _assert_in_pool(table)
        self._hold(table.pages)
        return Table(list(table.pages), table.length, table.prefix)

    def release(self, table: Table) -> None:
        """End a sequence, in the pool or on the host."""
        assert not table.released, "the sequence was released before"
        self._give_back(table.pages)
        table.pages, table.length, table.prefix, table.on_host, table.released = [], 0, None, [], True

    def truncate(self, table: Table, length: int) -> None:
        """Keep the first `length` tokens of a sequence; the last of them must not have been dropped."""
        _assert_in_pool(table)
        assert 0 <= length <= table.length, f"a sequence of {table.length} tokens cannot be cut to {length}"
        blocks = self._blocks(length)
        assert length in (0, table.length) or table.pages[blocks - 1] != ABSENT, f"token {length - 1} was dropped"
        self._give_back(table.pages[blocks:])
        del table.pages[blocks:]
        table.length = length
        while table.prefix is not None and table.prefix.depth > length // self.page_size:
            table.prefix = table.prefix.parent

    def drop_before(self, table: Table, position: int, keep_first: int = 0) -> list[int]:
        """Free the pages that a sliding window has left behind; their entries become ABSENT, the others stay in place.

        Args:
            position: the first token that will be read again, at most the sequence's length; below 0 drops nothing.
            keep_first: first tokens that stay readable (sinks), the same in all calls for one sequence.

        Returns:
            the blocks that were dropped.
        """
        _assert_in_pool(table)
        assert position <= table.length, f"token {position} is not in a sequence of {table.length}"
        start, end = self._blocks(keep_first), position // self.page_size
        dropped = []
        while end > start and table.pages[end - 1] != ABSENT:  # what lies before an absent page was dropped with it
            end -= 1
            self._give_back([table.pages[end]])
            table.pages[end] = ABSENT
            dropped.append(end)
        return dropped

    # ---------------------------------------------------------------------- prefixes

    def register(self, table: Table, tokens: Sequence[int]) -> None:
        """Let sequences to come share the full pages of this one. To be called once those pages are written.

        Where a page of another sequence is known by the same tokens, that one stays.

        Args:
            tokens: the sequence's tokens from its first; those beyond the last full page are not looked at.
        """
        _assert_in_pool(table)
        blocks, size = table.length // self.page_size, self.page_size
        assert len(tokens) >= blocks * size, f"{len(tokens)} tokens were given of a sequence of {table.length}"
        for block in range(0 if table.prefix is None else table.prefix.depth, blocks):
            key = table.prefix, tuple(tokens[block * size : (block + 1) * size])
            node = self._prefixes.get(key)
            if node is None:
                node = self._prefixes[key] = Prefix(*key, depth=block + 1)
            page = table.pages[block]
            if node.page is None and page != ABSENT:
                assert page not in self._registered, f"page {page} is registered with other tokens"
                node.page = page
                self._registered[page] = node
            table.prefix = node

    def match_prefix(self, tokens: Sequence[int]) -> Table:
        """A new sequence that shares the longest run of registered pages with which `tokens` begin.

        Its length says how many tokens need not be computed: whole pages, and never all tokens, since the last one's
        logits are wanted.
        """
        table = Table()
        for end in range(self.page_size, len(tokens), self.page_size):
            node = self._prefixes.get((table.prefix, tuple(tokens[table.length : end])))
            if node is None or node.page is None:
                break
            table.prefix = node
            table.pages.append(node.page)
            table.length = end
        self._hold(table.pages)
        return table

    # ---------------------------------------------------------------------- swapping

    def swap_out(self, table: Table) -> list[int]:
        """Give up all pages of a sequence until `swap_in`. Other tables keep those that they share.

        Returns:
            the pages to copy to the host, in the order of `table.on_host`.
        """
        _assert_in_pool(table)
        table.on_host = [block for block, page in enumerate(table.pages) if page != ABSENT]
        pages = [table.pages[block] for block in table.on_host]
        self._give_back(pages)
        table.pages = [ABSENT] * len(table.pages)
        return pages

    def swap_in(self, table: Table) -> list[int]:
        """Bring a sequence back into pages of its own.

        Returns:
            the pages to fill, in the order in which `swap_out` returned those that they replace.

        Raises:
            OutOfPages: nothing changed.
        """
        assert not table.released, "the sequence was released before"
        fresh = self._take(len(table.on_host))
        for block, page in zip(table.on_host, fresh, strict=True):
            table.pages[block] = page
        table.on_host = []
        table.prefix = None  # what was evicted meanwhile can be registered again
        return fresh

    # ---------------------------------------------------------------------- reports

    def usage(self, tables: Iterable[Table]) -> Usage:
        """What the pages are used for, given all live tables."""
        tokens: dict[int, int] = {}
        for table in tables:
            for block, page in enumerate(table.pages):
                if page != ABSENT:
                    held = min(self.page_size, table.length - block * self.page_size)
                    tokens[page] = max(held, tokens.get(page, 0))
        used = self.pages - self.available
        return Usage(
            pages=self.pages,
            used=used,
            evictable=len(self._evictable),
            free=self.free,
            shared=sum(count > 1 for count in self._references),
            tokens=sum(tokens.values()),
            slots=used * self.page_size,
        )

    def check(self, tables: Iterable[Table]) -> None:
        """Assert that the pool is consistent, given all live tables."""
        holders: Counter[int] = Counter()
        for table in tables:
            assert not table.released, "a released table is not live"
            assert len(table.pages) == self._blocks(table.length), f"{len(table.pages)} blocks, {table.length} tokens"
            assert all(table.pages[block] == ABSENT for block in table.on_host), "a block is here and on the host"
            held = [page for page in table.pages if page != ABSENT]
            assert len(held) == len(set(held)), "a page is twice in one table"
            holders.update(held)
            assert table.prefix is None or table.prefix.depth <= table.length // self.page_size, "a prefix is too long"
        for page, count in enumerate(self._references):
            assert count == holders[page], f"page {page} counts {count} references, {holders[page]} tables hold it"
        used, evictable, free = set(holders), set(self._evictable), set(self._free)
        assert len(free) == len(self._free), "a page is twice in the free list"
        assert used | evictable | free == set(range(self.pages)), "a page is lost or does not exist"
        assert len(used) + len(evictable) + len(free) == self.pages, "a page is in two states"
        assert evictable <= set(self._registered), "an evictable page is not registered"
        assert not free & set(self._registered), "a free page is registered"
        for page, node in self._registered.items():
            assert node.page == page, f"page {page} is registered under a prefix that names page {node.page}"

    # ---------------------------------------------------------------------- pages

    def _blocks(self, length: int) -> int:
        """Blocks that `length` tokens take."""
        return -(-length // self.page_size)

    def _has_room(self, table: Table) -> bool:
        """Whether the last page is partly filled."""
        return table.length % self.page_size > 0

    def _take(self, count: int) -> list[int]:
        """Pages for one table: free ones, then those that were not used for longest."""
        if count > self.available:
            raise OutOfPages(count, self.available, self.pages)
        pages: list[int] = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._evictable.popitem(last=False)
                self._forget(page)
            self._references[page] = 1
            pages.append(page)
        return pages

    def _hold(self, pages: Iterable[int]) -> None:
        """Add a table that holds these pages."""
        for page in pages:
            if page != ABSENT:
                self._references[page] += 1
                self._evictable.pop(page, None)

    def _give_back(self, pages: Sequence[int]) -> None:
        """Remove a table that holds these pages: the last first, as it is of no use to others without those before."""
        for page in reversed(pages):
            if page == ABSENT:
                continue
            assert self._references[page] > 0, f"page {page} was freed twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._registered:
                    self._evictable[page] = None
                else:
                    self._free.append(page)

    def _forget(self, page: int) -> None:
        """Let no new sequence share a page."""
        node = self._registered.pop(page, None)
        if node is not None:
            node.page = None


def _assert_in_pool(table: Table) -> None:
    assert not table.released, "the sequence was released before"
    assert not table.on_host, "the sequence is swapped out"
