"""Pages: whatever is shared, copied, dropped or swapped, a sequence reads its own tokens and no page is lost."""

from __future__ import annotations

import random
from dataclasses import astuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpass.errors import KvpassError, RequestError
from kvpass.runtime.pages import ABSENT, OutOfPages, PagePool, Table, Usage

SIZE = 4


def pool_of(pages, size=SIZE):
    return PagePool(pages, size)


def grown(pool, tokens):
    """A registered sequence of these tokens."""
    table = pool.match_prefix(tokens)
    assert pool.append(table, len(tokens) - table.length) == []
    pool.register(table, tokens)
    return table


def snapshot(pool, *tables):
    """Everything that can be seen of a pool."""
    return (
        [pool.references(page) for page in range(pool.pages)],
        list(pool._free),
        list(pool._evictable),
        {page: id(node) for page, node in pool._registered.items()},
        [(list(t.pages), t.length, id(t.prefix), list(t.on_host), t.released) for t in tables],
    )


# ---------------------------------------------------------------------- sequences


def test_a_page_is_16_tokens_unless_told_otherwise():
    pool, table = PagePool(3), Table()
    assert pool.needed(table, 16) == 1
    assert pool.needed(table, 17) == 2


@pytest.mark.parametrize(("pages", "size"), [(0, 4), (4, 0), (-1, 16)])
def test_a_pool_that_holds_nothing_is_refused(pages, size):
    with pytest.raises(RequestError, match="holds nothing"):
        PagePool(pages, size)


@pytest.mark.parametrize("counts", [[1] * 9, [9], [4, 4, 1], [3, 0, 2, 4], [8, 1]])
def test_a_sequence_takes_the_pages_that_its_tokens_fill_and_no_more(counts):
    pool, table = pool_of(5), Table()
    for count in counts:
        expected = -(-(table.length + count) // SIZE) - len(table.pages)
        assert pool.needed(table, count) == expected
        free = pool.free
        assert pool.append(table, count) == []
        assert free - pool.free == expected
        pool.check([table])
    assert (table.length, len(table.pages), pool.free) == (9, 3, 2)


def test_pages_keep_their_place_as_a_sequence_grows():
    pool, table = pool_of(5), Table()
    pool.append(table, 6)
    before = list(table.pages)
    pool.append(table, 6)
    assert table.pages[:2] == before
    assert len(set(table.pages)) == 3


def test_every_page_can_be_had_and_comes_back():
    pool, tables = pool_of(6), [Table() for _ in range(3)]
    for table in tables:
        pool.append(table, 2 * SIZE)
    assert sorted(page for table in tables for page in table.pages) == list(range(6))
    assert pool.free == 0
    for table in tables:
        pool.release(table)
    assert pool.free == pool.available == 6
    pool.check([])


def test_out_of_pages_says_what_is_missing():
    pool, table = pool_of(3), Table()
    pool.append(table, 5)
    with pytest.raises(OutOfPages) as caught:
        pool.append(table, 2 * SIZE)
    assert isinstance(caught.value, KvpassError)
    assert (caught.value.needed, caught.value.available, caught.value.total) == (2, 1, 3)
    assert "2 pages are needed, 1 are free of 3 in total" in str(caught.value)
    assert "swap out" in caught.value.fix


def test_out_of_pages_changes_nothing():
    pool = pool_of(4)
    pool.release(grown(pool, list(range(5))))  # one evictable page, which must not be evicted in vain
    table = Table()
    pool.append(table, SIZE + 1)
    twin = pool.fork(table)
    before = snapshot(pool, table, twin)
    with pytest.raises(OutOfPages):
        pool.append(table, 2 * SIZE)  # a copy and two pages, of which two are there
    assert snapshot(pool, table, twin) == before
    pool.append(twin, SIZE)  # a copy and one page
    pool.check([table, twin])


def test_swapping_in_without_room_changes_nothing():
    pool, table, other = pool_of(3), Table(), Table()
    pool.append(table, 2 * SIZE)
    pool.swap_out(table)
    pool.append(other, 2 * SIZE)
    before = snapshot(pool, table, other)
    with pytest.raises(OutOfPages):
        pool.swap_in(table)
    assert snapshot(pool, table, other) == before


# ---------------------------------------------------------------------- defects of the caller


def test_releasing_twice_is_a_defect():
    pool, table = pool_of(2), Table()
    pool.append(table, 1)
    pool.release(table)
    with pytest.raises(AssertionError, match="released before"):
        pool.release(table)


def test_freeing_a_page_twice_is_a_defect():
    pool, table = pool_of(2), Table()
    pool.append(table, 1)
    alias = Table(list(table.pages), table.length)  # not a fork
    pool.release(table)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release(alias)


@pytest.mark.parametrize(
    "use",
    [
        lambda pool, table: pool.append(table, 1),
        lambda pool, table: pool.fork(table),
        lambda pool, table: pool.truncate(table, 0),
        lambda pool, table: pool.drop_before(table, 0),
        lambda pool, table: pool.register(table, [1] * 6),
        lambda pool, table: pool.swap_out(table),
    ],
    ids=["append", "fork", "truncate", "drop_before", "register", "swap_out"],
)
def test_only_a_sequence_in_the_pool_can_be_used(use):
    pool, table = pool_of(4), Table()
    pool.append(table, 6)
    pool.swap_out(table)
    with pytest.raises(AssertionError, match="swapped out"):
        use(pool, table)
    pool.release(table)
    with pytest.raises(AssertionError, match="released before"):
        use(pool, table)
    with pytest.raises(AssertionError, match="released before"):
        pool.swap_in(table)


@pytest.mark.parametrize(
    "use",
    [
        lambda pool, table: pool.append(table, -1),
        lambda pool, table: pool.truncate(table, 7),
        lambda pool, table: pool.truncate(table, -1),
        lambda pool, table: pool.drop_before(table, 7),
        lambda pool, table: pool.register(table, [1] * 3),
    ],
    ids=["append", "truncate beyond", "truncate below", "drop beyond", "too few tokens"],
)
def test_numbers_that_cannot_be_are_defects(use):
    pool, table = pool_of(4), Table()
    pool.append(table, 6)
    before = snapshot(pool, table)
    with pytest.raises(AssertionError):
        use(pool, table)
    assert snapshot(pool, table) == before


# ---------------------------------------------------------------------- sharing


def test_a_fork_takes_no_page():
    pool, table = pool_of(3), Table()
    pool.append(table, 6)
    twin = pool.fork(table)
    assert (twin.pages, twin.length, pool.free) == (table.pages, 6, 1)
    assert twin.pages is not table.pages
    assert [pool.references(page) for page in table.pages] == [2, 2]
    pool.check([table, twin])


def test_the_first_to_write_in_a_shared_page_gets_a_copy_and_the_last_keeps_the_page():
    pool, table = pool_of(6), Table()
    pool.append(table, 6)
    full, last = table.pages
    twins = [pool.fork(table), pool.fork(table)]
    for holders, writer in ((3, table), (2, twins[0])):
        assert pool.references(last) == holders
        assert pool.needed(writer, 1) == 1
        copies = pool.append(writer, 1)
        assert copies == [(last, writer.pages[1])]
        assert writer.pages[0] == full
        assert pool.references(writer.pages[1]) == 1
        pool.check([table, *twins])
    assert pool.needed(twins[1], 1) == 0
    assert pool.append(twins[1], 1) == []
    assert twins[1].pages == [full, last]
    assert pool.references(full) == 3


def test_a_shared_page_without_room_is_not_copied():
    pool, table = pool_of(6), Table()
    pool.append(table, 2 * SIZE)
    twin = pool.fork(table)
    assert pool.append(table, 1) == pool.append(twin, 1) == []
    assert table.pages[:2] == twin.pages[:2]
    assert table.pages[2] != twin.pages[2]


def test_no_tokens_are_no_reason_to_copy():
    pool, table = pool_of(6), Table()
    pool.append(table, 1)
    twin = pool.fork(table)
    assert pool.append(twin, 0) == []
    assert twin.pages == table.pages


def test_a_copy_and_fresh_pages_in_one_append():
    pool, table = pool_of(6), Table()
    pool.append(table, 6)
    twin = pool.fork(table)
    assert pool.needed(twin, 2 * SIZE) == 3
    [(source, target)] = pool.append(twin, 2 * SIZE)
    assert (source, target) == (table.pages[1], twin.pages[1])
    assert len(twin.pages) == 4
    pool.check([table, twin])


def test_a_shared_page_is_free_when_its_last_holder_leaves():
    pool, table = pool_of(2), Table()
    pool.append(table, 6)
    twin = pool.fork(table)
    pool.release(table)
    assert pool.free == 0
    pool.check([twin])
    pool.release(twin)
    assert pool.free == 2
    pool.check([])


# ---------------------------------------------------------------------- shorter sequences


@pytest.mark.parametrize(("length", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (10, 3)])
def test_truncating_frees_the_pages_beyond(length, blocks):
    pool, table = pool_of(4), Table()
    pool.append(table, 10)
    kept = table.pages[:blocks]
    pool.truncate(table, length)
    assert (table.pages, table.length, pool.free) == (kept, length, 4 - blocks)
    pool.check([table])


def test_truncating_one_sequence_leaves_its_twin_whole():
    pool, table = pool_of(4), Table()
    pool.append(table, 10)
    twin = pool.fork(table)
    pool.truncate(table, 6)
    assert (twin.length, len(twin.pages), pool.free) == (10, 3, 1)
    [(source, _)] = pool.append(table, 1)  # in the twin's page there are tokens behind the cut
    assert source == twin.pages[1]
    pool.check([table, twin])


@pytest.mark.parametrize(
    ("position", "keep_first", "dropped"),
    [
        (-3, 0, set()),
        (3, 0, set()),
        (4, 0, {0}),
        (7, 0, {0}),
        (18, 0, {0, 1, 2, 3}),
        (18, 1, {1, 2, 3}),
        (18, 4, {1, 2, 3}),
        (18, 5, {2, 3}),
        (8, 8, set()),
        (4, 16, set()),
    ],
)
def test_a_window_drops_whole_pages_between_the_sinks_and_itself(position, keep_first, dropped):
    pool, table = pool_of(6), Table()
    pool.append(table, 18)
    pages = list(table.pages)
    pool.drop_before(table, position, keep_first)
    assert table.pages == [ABSENT if block in dropped else page for block, page in enumerate(pages)]
    assert pool.free == 1 + len(dropped)
    assert table.length == 18
    pool.check([table])


def test_a_dropped_page_stays_with_the_others_that_read_it():
    pool, table = pool_of(4), Table()
    pool.append(table, 10)
    twin = pool.fork(table)
    pool.drop_before(table, 8)
    assert ABSENT not in twin.pages
    assert pool.free == 1
    heir = pool.fork(table)  # shares what is there
    assert heir.pages == [ABSENT, ABSENT, table.pages[2]]
    pool.check([table, twin, heir])
    for each in (table, twin, heir):
        pool.release(each)
    assert pool.free == 4


def test_a_window_that_slides_for_long_holds_as_many_pages_as_it_spans():
    window, sinks = 10, 5
    pool, table = pool_of(2 + 4), Table()  # the sinks' pages, and a window that begins within a page
    for length in range(1, 500):
        pool.append(table, 1)
        pool.drop_before(table, length + 1 - window, sinks)
        pool.check([table])
        assert len(table.pages) == -(-length // SIZE)
        read = {*range(min(sinks, length)), *range(max(0, length + 1 - window), length)}
        assert all(table.pages[position // SIZE] != ABSENT for position in read)


def test_a_cut_into_dropped_tokens_is_a_defect():
    pool, table = pool_of(6), Table()
    pool.append(table, 18)
    pool.drop_before(table, 12, SIZE)
    before = snapshot(pool, table)
    for length in (6, 8, 12):
        with pytest.raises(AssertionError, match="was dropped"):
            pool.truncate(table, length)
    assert snapshot(pool, table) == before
    pool.truncate(table, 13)
    pool.truncate(table, 3)  # within the sinks
    assert (len(table.pages), pool.free) == (1, 5)
    pool.check([table])


def test_a_sequence_whose_tokens_were_all_dropped_goes_on():
    pool, table = pool_of(3), Table()
    pool.append(table, 8)
    pool.drop_before(table, 8)
    assert pool.free == 3
    pool.truncate(table, 8)  # cuts nothing
    pool.append(table, 1)
    assert (table.pages[:2], len(table.pages), pool.free) == ([ABSENT, ABSENT], 3, 2)
    pool.check([table])


# ---------------------------------------------------------------------- prefixes


def test_a_registered_prefix_is_shared():
    pool = pool_of(8)
    first = grown(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    found = pool.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 10, 11])
    assert (found.pages, found.length) == (first.pages[:2], 8)
    assert [pool.references(page) for page in first.pages] == [2, 2, 1]
    pool.check([first, found])
    assert pool.append(found, 2) == []  # a page of its own, not a copy
    assert found.pages[2] != first.pages[2]


@pytest.mark.parametrize(
    ("tokens", "length"),
    [
        ([], 0),
        ([1], 0),
        ([1, 2, 3, 4], 0),  # one token is left to compute
        ([1, 2, 3, 4, 5], 4),
        ([1, 2, 3, 4, 5, 6, 7, 8], 4),
        ([1, 2, 3, 4, 5, 6, 7, 8, 0], 8),
        ([1, 2, 3, 4, 5, 6, 7, 0, 0], 4),  # a page that begins alike
        ([0, 2, 3, 4, 5, 6, 7, 8, 9], 0),  # the second page's tokens after others
        ([5, 6, 7, 8, 5, 6, 7, 8, 9], 0),  # the second page's tokens in the first place
        ([1, 2, 3, 4, 1, 2, 3, 4, 9], 4),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 0], 8),  # the third page was not full
    ],
)
def test_a_match_is_the_longest_run_of_equal_pages(tokens, length):
    pool = pool_of(8)
    first = grown(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9])
    found = pool.match_prefix(tokens)
    assert (found.pages, found.length) == (first.pages[: length // SIZE], length)


def test_equal_hashes_are_not_equal_tokens():
    assert hash((-1, -1)) == hash((-2, -2))
    pool = pool_of(4, 2)
    grown(pool, [-1, -1, 0])
    assert pool.match_prefix([-2, -2, 0]).length == 0


def test_equal_pages_after_different_ones_are_told_apart():
    pool = pool_of(8)
    tables = [grown(pool, [head] * SIZE + [7] * SIZE) for head in (1, 2)]
    for head, table in zip((1, 2), tables, strict=True):
        assert pool.match_prefix([head] * SIZE + [7] * SIZE + [0]).pages == table.pages
    assert not set(tables[0].pages) & set(tables[1].pages)


def test_of_two_equal_pages_the_first_registered_stays():
    pool, text = pool_of(8), [1, 2, 3, 4, 5]
    twins = [Table(), Table()]
    for table in twins:  # both were begun before either was registered
        pool.append(table, 5)
    for table in twins:
        pool.register(table, text)
    assert pool.match_prefix(text).pages == twins[0].pages[:1]
    pool.release(twins[1])
    assert pool.free == 8 - 2


def test_registering_goes_on_where_it_stopped():
    pool, table, text = pool_of(8), Table(), list(range(20))
    for length in range(1, 18):
        pool.append(table, 1)
        pool.register(table, text[:length])
        whole = length // SIZE * SIZE
        found = pool.match_prefix(text[: whole + 1])
        assert found.length == whole
        pool.release(found)


def test_an_unheld_registered_page_is_kept_until_it_is_needed():
    pool, text = pool_of(3), [1, 2, 3, 4, 5]
    table = grown(pool, text)
    page = table.pages[0]
    pool.release(table)
    assert (pool.free, pool.available) == (2, 3)
    pool.check([])
    found = pool.match_prefix(text)
    assert found.pages == [page]
    assert pool.references(page) == 1
    assert (pool.free, pool.available) == (2, 2)
    pool.release(found)
    other = Table()
    pool.append(other, 2 * SIZE)
    assert page not in other.pages  # free pages go first
    assert pool.match_prefix([*text, 0]).pages == [page]


def test_the_least_recently_used_page_is_evicted_first():
    pool = pool_of(3)
    texts = [[head] * (SIZE + 1) for head in range(3)]
    for text in texts:
        table = Table()
        pool.append(table, SIZE)
        pool.register(table, text)
        pool.release(table)
    pool.release(pool.match_prefix(texts[0]))  # used again: now 1 is the oldest
    other = Table()
    for expected in ([0, 2], [0], []):
        pool.append(other, SIZE)
        pool.check([other])
        kept = [head for head in range(3) if texts[head][0] in {node.tokens[0] for node in pool._registered.values()}]
        assert kept == expected
    for text in texts:
        assert pool.match_prefix(text).length == 0


def test_a_prefix_is_evicted_from_its_end():
    pool, text = pool_of(4), list(range(16))
    pool.release(grown(pool, text))
    for pages in (1, 2, 3):
        other = Table()
        pool.append(other, pages * SIZE)
        found = pool.match_prefix([*text, 0])
        assert found.length == (4 - pages) * SIZE
        for table in (found, other):
            pool.release(table)
        pool.release(grown(pool, text))


def test_a_page_whose_parent_was_evicted_is_not_found_under_other_tokens():
    pool = pool_of(4)
    table = grown(pool, [1, 1, 1, 1, 5, 5, 5, 5])
    child = table.pages[1]
    pool.drop_before(table, SIZE)  # the parent's page is evictable, the child's is held
    filler = Table()
    pool.append(filler, 3 * SIZE)
    assert pool.available == 0
    assert pool.match_prefix([1, 1, 1, 1, 5, 5, 5, 5, 0]).length == 0
    pool.release(filler)
    grown(pool, [2, 2, 2, 2])  # in what was the parent's page, or might have been
    found = pool.match_prefix([2, 2, 2, 2, 5, 5, 5, 5, 0])
    assert found.length == SIZE
    assert child not in found.pages
    assert pool.match_prefix([5, 5, 5, 5, 0]).length == 0


def test_a_page_whose_parent_is_registered_again_is_found_again():
    pool = pool_of(4)
    text = [1, 1, 1, 1, 5, 5, 5, 5]
    table = grown(pool, text)
    child = table.pages[1]
    pool.drop_before(table, SIZE)
    filler = Table()
    pool.append(filler, 3 * SIZE)
    pool.release(filler)
    parent = grown(pool, text[:SIZE])
    assert pool.match_prefix([*text, 0]).pages == [parent.pages[0], child]


def test_a_prefix_with_dropped_pages_is_registered_where_it_is_there():
    pool, text = pool_of(4), [1, 1, 1, 1, 5, 5, 5, 5]
    table = Table()
    pool.append(table, 8)
    pool.drop_before(table, SIZE)
    pool.register(table, text)
    pool.check([table])
    assert pool.match_prefix([*text, 0]).length == 0
    parent = grown(pool, text[:SIZE])
    assert pool.match_prefix([*text, 0]).pages == [parent.pages[0], table.pages[1]]


def test_a_registered_page_that_is_cut_and_written_again_is_forgotten():
    pool, text = pool_of(4), [1, 2, 3, 4, 5, 6, 7, 8]
    table = grown(pool, text)
    pool.truncate(table, 6)
    before = pool.match_prefix([*text, 0])  # nothing was written yet
    assert before.length == 8
    pool.release(before)
    assert pool.append(table, 2) == []
    assert pool.match_prefix([*text, 0]).length == 4
    pool.register(table, [1, 2, 3, 4, 5, 6, 0, 0])
    assert pool.match_prefix([1, 2, 3, 4, 5, 6, 0, 0, 9]).pages == table.pages
    assert pool.match_prefix([*text, 0]).length == 4


def test_a_registered_page_that_is_cut_while_shared_is_copied_and_stays():
    pool, text = pool_of(4), [1, 2, 3, 4, 5, 6, 7, 8]
    table = grown(pool, text)
    twin = pool.fork(table)
    pool.truncate(table, 6)
    [(source, _)] = pool.append(table, 2)
    assert source == twin.pages[1]
    assert pool.match_prefix([*text, 0]).pages == twin.pages


def test_other_tokens_for_a_registered_page_are_a_defect():
    pool = pool_of(4)
    table = grown(pool, [1, 2, 3, 4])
    twin = Table()
    pool.append(twin, 4)
    pool.register(twin, [5, 6, 7, 8])
    pool.swap_out(twin)
    pool.swap_in(twin)
    table.prefix = None
    with pytest.raises(AssertionError, match="other tokens"):
        pool.register(table, [9, 9, 9, 9])


def test_prefixes_of_evicted_pages_take_no_memory():
    pool = pool_of(4)
    for head in range(50):
        pool.release(grown(pool, [head] * (2 * SIZE)))
    assert len(pool._prefixes) == 4


def test_a_very_long_prefix_is_built_matched_and_forgotten():
    pool, text = pool_of(100_000, 1), list(range(100_001))
    pool.release(grown(pool, text[:-1]))
    found = pool.match_prefix(text)
    assert found.length == 100_000
    pool.release(found)
    other = Table()
    pool.append(other, 100_000)
    del found
    assert len(pool._prefixes) == 0
    assert "Prefix" in repr(grown(pool_of(2), [1, 2, 3, 4, 5]))


# ---------------------------------------------------------------------- swapping


def test_a_swapped_sequence_comes_back_in_fresh_pages():
    pool, table = pool_of(4), Table()
    pool.append(table, 14)
    pool.drop_before(table, 8, SIZE)
    assert [page == ABSENT for page in table.pages] == [False, True, False, False]
    held = [page for page in table.pages if page != ABSENT]
    assert pool.swap_out(table) == held
    assert (table.on_host, table.length, pool.free) == ([0, 2, 3], 14, 4)
    pool.check([table])
    other = Table()
    pool.append(other, 1)
    fresh = pool.swap_in(table)
    assert table.pages == [fresh[0], ABSENT, fresh[1], fresh[2]]
    assert (table.on_host, pool.free) == ([], 0)
    pool.check([table, other])
    pool.append(table, 2)  # its last page has room
    assert len(table.pages) == 4


def test_swapping_out_leaves_the_others_their_pages():
    pool, table = pool_of(5), Table()
    pool.append(table, 6)
    twin = pool.fork(table)
    pages = list(table.pages)
    assert pool.swap_out(table) == pages
    assert pool.free == 3
    assert [pool.references(page) for page in pages] == [1, 1]
    assert pool.append(twin, 1) == []  # it alone holds the page now
    fresh = pool.swap_in(table)
    assert not set(fresh) & set(pages)
    pool.check([table, twin])


def test_a_sequence_on_the_host_can_be_released():
    pool, table = pool_of(2), Table()
    pool.append(table, 6)
    pool.swap_out(table)
    pool.release(table)
    assert (pool.free, table.on_host, table.pages) == (2, [], [])
    pool.check([])


def test_a_swapped_prefix_can_be_registered_again():
    pool, text = pool_of(2), [1, 2, 3, 4, 5]
    table = grown(pool, text)
    pool.swap_out(table)
    filler = Table()
    pool.append(filler, 2 * SIZE)  # evicts the registered page
    pool.release(filler)
    pool.swap_in(table)
    assert pool.match_prefix(text).length == 0
    pool.register(table, text)
    assert pool.match_prefix(text).pages == table.pages[:1]


# ---------------------------------------------------------------------- reports


def test_usage_counts_a_shared_page_once():
    pool = pool_of(10)
    table = grown(pool, list(range(10)))  # 3 pages, 10 tokens
    twin = pool.fork(table)
    pool.append(twin, 1)  # a copy of the last page: 3 tokens in it
    other = grown(pool, [9] * 6)  # 2 pages
    pool.release(other)  # one evictable
    assert pool.usage([table, twin]) == Usage(pages=10, used=4, evictable=1, free=5, shared=2, tokens=13, slots=16)
    assert pool.usage([table, twin]).utilisation == 13 / 16
    assert pool.usage([table, twin]).fragmentation == 3 / 16


def test_a_page_counts_with_the_longest_sequence_in_it():
    pool, table = pool_of(4), Table()
    pool.append(table, 4)
    twin = pool.fork(table)
    pool.truncate(twin, 1)
    assert pool.usage([table, twin]).tokens == pool.usage([twin, table]).tokens == 4
    assert pool.usage([table, twin]).fragmentation == 0


def test_dropped_and_swapped_pages_are_not_used():
    pool, table, other = pool_of(6), Table(), Table()
    pool.append(table, 10)
    pool.append(other, 3)
    pool.drop_before(table, 8)
    pool.swap_out(other)
    assert astuple(pool.usage([table, other])) == (6, 1, 0, 5, 0, 2, 4)


def test_an_empty_pool_wastes_nothing():
    usage = pool_of(3).usage([])
    assert (usage.utilisation, usage.fragmentation, usage.free) == (1.0, 0.0, 3)


def test_sequences_of_mixed_lengths_use_their_pages():
    """The claim of the paper: what is wasted is less than a page per sequence."""
    chance = random.Random(0)
    pool, tables = PagePool(8192), []
    lowest = 1.0
    for _ in range(400):
        if len(tables) > 64:
            pool.release(tables.pop(chance.randrange(len(tables))))
        table, length = Table(), chance.randint(50, 2000)
        pool.append(table, chance.randint(1, length))
        tables.append(table)
        pool.append(table, length - table.length)
        usage = pool.usage(tables)
        assert usage.tokens == sum(table.length for table in tables)
        if len(tables) > 32:
            lowest = min(lowest, usage.utilisation)
    assert lowest >= 0.96
    assert usage.utilisation + usage.fragmentation == pytest.approx(1)
    pool.check(tables)


# ---------------------------------------------------------------------- check finds what is wrong


def lose(pool, table):
    pool._free.pop()


def free_twice(pool, table):
    pool._free.append(pool._free[0])


def free_used(pool, table):
    pool._free.append(table.pages[0])


def miscount(pool, table):
    pool._references[table.pages[0]] += 1


def evict_used(pool, table):
    pool._evictable[table.pages[0]] = None


def lose_and_evict_used(pool, table):
    lose(pool, table)
    evict_used(pool, table)


def evict_free(pool, table):
    pool._evictable[pool._free.pop()] = None


def repeat(pool, table):
    pool._give_back(table.pages)
    table.pages[1] = table.pages[0]
    pool._hold(table.pages)


def extend(pool, table):
    table.length += 2 * SIZE


def rename(pool, table):
    pool._registered[table.pages[0]].page = 3


def register_free(pool, table):
    del pool._registered[table.pages[-1]]
    table.prefix.page = pool._free[0]
    pool._registered[pool._free[0]] = table.prefix


def overstate(pool, table):
    table.length = len(table.pages) * SIZE - SIZE + 1
    table.prefix.depth = len(table.pages)


def end(pool, table):
    table.released = True


def both(pool, table):
    table.on_host = [0]


BROKEN = [
    lose,
    free_twice,
    free_used,
    miscount,
    evict_used,
    lose_and_evict_used,
    evict_free,
    repeat,
    extend,
    rename,
    register_free,
    overstate,
    end,
    both,
]


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_check_finds(damage):
    pool = pool_of(6)
    table = grown(pool, list(range(8)))
    pool.check([table])
    damage(pool, table)
    with pytest.raises(AssertionError):
        pool.check([table])


# ---------------------------------------------------------------------- any order of operations


class Sequence:
    """What the model knows of one sequence: its tokens, where they may be read, what is on the host."""

    def __init__(self, table, tokens, sinks):
        self.table = table
        self.tokens = tokens
        self.sinks = sinks
        self.dropped = set()  # blocks
        self.host = None  # copies of pages, in the order of the blocks held
        self.known = len(tokens)  # tokens that were offered for reuse, rounded down to pages

    def twin(self, table):
        copy = Sequence(table, list(self.tokens), self.sinks)
        copy.dropped, copy.known = set(self.dropped), self.known
        return copy


class Pages(RuleBasedStateMachine):
    """A memory of slots that hold tokens, written as an engine would, and read back through every table.

    `known` is a second account of prefix reuse: whole texts instead of a chain, each with the page that holds its end.
    """

    SIZE = 3

    TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=8)
    MORE = TOKENS | st.just([])

    @initialize(pages=st.integers(6, 24), first=TOKENS, second=TOKENS)
    def begin(self, pages, first, second):
        self.pool = PagePool(pages, self.SIZE)
        self.memory = [[None] * self.SIZE for _ in range(pages)]
        self.live = [Sequence(Table(), [], 0), Sequence(Table(), [], 4)]  # one is always in the pool
        self.known = {}  # whole text -> page
        self.grow(self.live[0], first)
        self.grow(self.live[1], second)

    # -------------------------------------------------- helpers

    def pick(self, data, host=False):
        return data.draw(st.sampled_from([s for s in self.live if (s.host is not None) == host]))

    def tables(self):
        return [s.table for s in self.live]

    def blocks(self, length):
        return -(-length // self.SIZE)

    def overwritten(self, pages):
        """What was known to be in these pages is not there any more."""
        self.known = {text: page for text, page in self.known.items() if page not in pages}

    def refused(self, needed, act):
        """Whether there were too few pages, in which case nothing changed."""
        available = self.pool.pages - len({p for t in self.tables() for p in t.pages} - {ABSENT})
        assert self.pool.available == available
        before = snapshot(self.pool, *self.tables())
        if needed <= available:
            act()
            return False
        with pytest.raises(OutOfPages) as caught:
            act()
        assert (caught.value.needed, caught.value.available) == (needed, available)
        assert snapshot(self.pool, *self.tables()) == before
        return True

    def grow(self, sequence, tokens, offer=True):
        table = sequence.table
        start, held = table.length, [p for p in table.pages if p != ABSENT]
        last = table.pages[-1] if start % self.SIZE else None
        shared = last is not None and bool(tokens) and sum(last in t.pages for t in self.tables()) > 1
        needed = self.blocks(start + len(tokens)) - self.blocks(start) + shared
        assert self.pool.needed(table, len(tokens)) == needed
        copies = []
        if self.refused(needed, lambda: copies.extend(self.pool.append(table, len(tokens)))):
            return False
        assert len(copies) == shared
        fresh = [p for p in table.pages if p != ABSENT and p not in held]
        assert len(fresh) == needed
        self.overwritten(fresh)
        if tokens and last is not None and not shared:
            self.overwritten([last])
        for source, target in copies:
            self.memory[target] = list(self.memory[source])
        sequence.tokens = sequence.tokens + tokens
        for position in range(start, start + len(tokens)):
            page = table.pages[position // self.SIZE]
            self.memory[page][position % self.SIZE] = sequence.tokens[position]
        if offer:
            self.offer(sequence)
        return True

    def offer(self, sequence):
        self.pool.register(sequence.table, sequence.tokens)
        full = len(sequence.tokens) // self.SIZE
        for block in range(sequence.known // self.SIZE, full):
            page = sequence.table.pages[block]
            if page != ABSENT:
                self.known.setdefault(tuple(sequence.tokens[: (block + 1) * self.SIZE]), page)
        sequence.known = full * self.SIZE

    # -------------------------------------------------- rules

    @rule(data=st.data(), tokens=TOKENS, sinks=st.integers(0, 4))
    def add(self, data, tokens, sinks):
        other = data.draw(st.sampled_from(self.live)).tokens
        tokens = other[: data.draw(st.integers(0, len(other)))] + tokens  # begin like another
        expected = []
        for end in range(self.SIZE, len(tokens), self.SIZE):
            if tuple(tokens[:end]) not in self.known:
                break
            expected.append(self.known[tuple(tokens[:end])])
        table = self.pool.match_prefix(tokens)
        assert table.pages == expected
        assert table.length == len(expected) * self.SIZE
        assert table.length < max(1, len(tokens))
        sequence = Sequence(table, tokens[: table.length], sinks)
        self.live.append(sequence)
        if not self.grow(sequence, tokens[table.length :]):
            self.live.remove(sequence)
            self.pool.release(table)

    @rule(data=st.data(), tokens=MORE, offer=st.booleans())
    def append(self, data, tokens, offer):
        self.grow(self.pick(data), tokens, offer)

    @rule(data=st.data(), tokens=MORE, offer=st.booleans())
    def fork(self, data, tokens, offer):
        sequence = self.pick(data)
        twin = sequence.twin(self.pool.fork(sequence.table))
        self.live.append(twin)
        self.grow(data.draw(st.sampled_from([sequence, twin])), tokens, offer)

    @precondition(lambda self: sum(s.host is None for s in self.live) > 1)
    @rule(data=st.data(), host=st.booleans())
    def release(self, data, host):
        sequence = self.pick(data, host and any(s.host is not None for s in self.live))
        self.live.remove(sequence)
        self.pool.release(sequence.table)

    @rule(data=st.data())
    def truncate(self, data):
        sequence = self.pick(data)
        lengths = range(len(sequence.tokens), -1, -1)
        possible = [n for n in lengths if n == 0 or self.blocks(n) - 1 not in sequence.dropped]
        length = data.draw(st.sampled_from(possible))
        self.pool.truncate(sequence.table, length)
        sequence.tokens = sequence.tokens[:length]
        sequence.known = min(sequence.known, length // self.SIZE * self.SIZE)
        sequence.dropped = {b for b in sequence.dropped if b < self.blocks(length)}

    @rule(data=st.data())
    def drop_before(self, data):
        sequence = self.pick(data)
        position = data.draw(st.integers(-2, len(sequence.tokens)))
        self.pool.drop_before(sequence.table, position, sequence.sinks)
        for block in range(self.blocks(len(sequence.tokens))):
            if block * self.SIZE >= sequence.sinks and (block + 1) * self.SIZE <= position:
                sequence.dropped.add(block)

    @precondition(lambda self: sum(s.host is None for s in self.live) > 1)
    @rule(data=st.data())
    def swap_out(self, data):
        sequence = self.pick(data)
        sequence.host = [list(self.memory[page]) for page in self.pool.swap_out(sequence.table)]

    @precondition(lambda self: any(s.host is not None for s in self.live))
    @rule(data=st.data(), offer=st.booleans())
    def swap_in(self, data, offer):
        sequence = self.pick(data, host=True)
        pages = []
        if self.refused(len(sequence.host), lambda: pages.extend(self.pool.swap_in(sequence.table))):
            return
        self.overwritten(pages)
        for page, content in zip(pages, sequence.host, strict=True):
            self.memory[page] = content
        sequence.host, sequence.known = None, 0
        if offer:
            self.offer(sequence)

    # -------------------------------------------------- what always holds

    @invariant()
    def consistent(self):
        self.pool.check(self.tables())

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for s in self.live:
            assert s.table.length == len(s.tokens)
            absent = {block for block, page in enumerate(s.table.pages) if page == ABSENT}
            if s.host is not None:
                assert absent == set(range(self.blocks(len(s.tokens))))
                assert len(s.host) == len(absent - s.dropped)
                continue
            assert absent == s.dropped
            for position, token in enumerate(s.tokens):
                if position // self.SIZE not in s.dropped:
                    assert self.memory[s.table.pages[position // self.SIZE]][position % self.SIZE] == token

    @invariant()
    def what_can_be_reused_is_there(self):
        assert set(self.pool._registered) == set(self.known.values())
        for text, page in self.known.items():
            assert tuple(self.memory[page]) == text[-self.SIZE :]

    @invariant()
    def usage_adds_up(self):
        usage = self.pool.usage(self.tables())
        assert usage.used + usage.evictable + usage.free == usage.pages
        held = [p for t in self.tables() for p in t.pages if p != ABSENT]
        assert usage.used == len(set(held))
        assert usage.shared == len({p for p in held if held.count(p) > 1})
        assert usage.tokens <= usage.slots == usage.used * self.SIZE
        assert usage.utilisation + usage.fragmentation == pytest.approx(1)

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        for sequence in self.live:
            self.pool.release(sequence.table)
        self.pool.check([])
        usage = self.pool.usage([])
        assert usage.used == 0
        assert usage.evictable == len(self.known)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=300, stateful_step_count=50, deadline=None, derandomize=True)
