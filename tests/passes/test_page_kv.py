"""PageKV: the unpaged model, to the last bit where the same numbers are added in the same order."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import families
import kvpass
from kvpass.errors import PlanError
from kvpass.ir.program import ATTEND
from kvpass.passes import PageKV, QuantizeKV, ShareLayers, SlideWindow
from kvpass.runtime.paged import PagedState
from kvpass.runtime.pages import OutOfPages
from properties import error
from properties import forward as whole

EXACT = 1e-9
VARIANTS = {
    "plain": ("llama", ()),
    "int8": ("llama", (QuantizeKV(),)),
    "int4, window": ("llama", (QuantizeKV(4, layout="token"), SlideWindow(6, 3))),
    "one window": ("llama", (SlideWindow((5, 0), (2, 0), positions="cache"),)),
    "a window of one": ("llama", (SlideWindow(1, 0),)),
    "shared": ("llama", (ShareLayers("0_0"),)),
    "upward": ("llama", (ShareLayers("1_1", upward=True, tolerance=0.0),)),
    "upward, two passes": ("llama", (ShareLayers("1_1", upward=True, passes=2, tolerance=0.0),)),
    "windows and none": ("gemma2", ()),
}


def ids(rows=3, length=30, seed=1):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


CAPTURED, MADE = {}, {}


def captured(name):
    if name not in CAPTURED:
        model = families.build(name, num_hidden_layers=2).double()
        CAPTURED[name] = kvpass.transform(model, dtype=torch.float64, progress=False, verify="off")
    return CAPTURED[name]


def made(name, *steps):
    if (name, *steps) not in MADE:
        MADE[name, *steps] = kvpass.transform(captured(name), list(steps), progress=False, verify="off")
    return MADE[name, *steps]


def pair(variant, page=4):
    """The model without pages and with them."""
    name, steps = VARIANTS[variant]
    return made(name, *steps), made(name, *steps, PageKV(page))


def consistent(*states):
    """The bookkeeping of states that share a memory holds together, and the tables say what it says."""
    memory = states[0].memory
    for kind, pool in memory.pools.items():
        pool.check([row[kind] for state in states for row in state.rows])
    for state in states:
        assert all(s.memory is memory for s in states)
        for kind, owners in memory.kinds.items():
            for owner in owners:
                *pools, table = state.stores[owner]
                if state is states[-1]:
                    assert all(a is b for a, b in zip(pools, memory.tensors[owner], strict=True))
                for row, tables in enumerate(state.rows):
                    pages = tables[kind].pages
                    assert table[row, : len(pages)].tolist() == pages
                    assert bool((table[row, len(pages) :] == -1).all())


# ---------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(("variant", "page"), [*((v, 4) for v in VARIANTS), ("int4, window", 1), ("plain", 16)])
def test_pages_change_nothing(variant, page):
    slim, paged = pair(variant, page)
    tokens = ids()
    assert torch.equal(whole(paged, tokens), whole(slim, tokens)), "a layout pass touches no number"
    expected = whole(slim, tokens)
    logits, state = paged.prefill(tokens[:, :7])
    assert isinstance(state, PagedState)
    assert error(logits, expected[:, 6]) < EXACT
    place = 7
    for count in (1, 1, 1, 1, 1, 9, 1, 4, 1, 3):
        found = paged.decode(tokens[:, place : place + count], state)
        assert error(found, expected[:, place : place + count]) < EXACT, f"{count} tokens from {place} on"
        consistent(state)
        place += count
    for chunk in (1, 5):
        logits, state = paged.prefill(tokens, chunk=chunk)
        assert error(logits, expected[:, -1]) < EXACT
        consistent(state)


@pytest.mark.parametrize("variant", ["plain", "int4, window", "one window", "upward, two passes", "windows and none"])
def test_rows_of_different_lengths_that_come_and_go(variant):
    slim, paged = pair(variant)
    tokens, lengths, rows = ids(), torch.tensor([3, 13, 8]), torch.arange(3)
    expected = whole(slim, tokens)
    for chunk in (2048, 5):
        logits, state = paged.prefill(tokens[:, :13], lengths, chunk=chunk)
        assert error(logits, expected[rows, lengths - 1]) < EXACT
        consistent(state)
        texts = rows
        for count, kept in ((1, None), (5, [2, 0]), (1, [1, 1, 0]), (3, None), (1, [2])):
            where = state.lengths.view(-1, 1) + torch.arange(count)
            found = paged.decode(tokens[texts.view(-1, 1), where], state)
            assert error(found, expected[texts.view(-1, 1), where]) < EXACT
            consistent(state)
            if kept is not None:
                state.select(torch.tensor(kept))
                texts = texts[kept]
                consistent(state)
        assert state.batch == 1


def test_a_page_that_is_longer_than_the_text_and_one_of_a_single_token():
    for page in (1, 1024):
        _, paged = pair("plain", page)
        assert paged.plan[0].page == page
        tokens = ids(length=6)
        _, state = paged.prefill(tokens[:, :5])
        assert error(paged.decode(tokens[:, 5:], state), whole(paged, tokens)[:, 5:]) < EXACT
        assert [len(row[0, 0].pages) for row in state.rows] == [6 if page == 1 else 1] * 3


@pytest.mark.parametrize("variant", ["plain", "int4, window", "upward"])
def test_generation_is_that_without_pages(variant):
    slim, paged = pair(variant)
    prompt = torch.tensor([[0, 0, 7, 8, 9], [5, 6, 7, 8, 9]])
    options = {"attention_mask": (prompt > 0).long(), "max_new_tokens": 18, "do_sample": False, "eos_token_id": None}
    assert torch.equal(paged.generate(prompt, **options), slim.generate(prompt, **options))
    beams = {**options, "num_beams": 3, "length_penalty": 0.0, "output_scores": True, "return_dict_in_generate": True}
    found, expected = paged.generate(prompt, **beams), slim.generate(prompt, **beams)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores)
    logits = whole(slim, found.sequences[1:]).log_softmax(-1)[:, 4:-1]
    total = logits.gather(-1, found.sequences[1:, 5:].unsqueeze(-1)).sum((1, 2))
    assert error(found.sequences_scores[1:].double(), total) < 1e-4, "a beam followed another one's cache"


# ---------------------------------------------------------------------- pages shared and parted


@pytest.mark.parametrize("variant", ["plain", "int4, window", "windows and none"])
def test_a_clone_shares_pages_until_either_writes(variant):
    slim, paged = pair(variant)
    start, one, other = ids(2, 10), ids(2, 30, seed=2), ids(2, 30, seed=3)
    _, state = paged.prefill(start)
    used = {kind: u.used for kind, u in state.usage().items()}
    copy = state.clone()
    assert copy.memory is state.memory
    assert {kind: u.used for kind, u in copy.usage().items()} == used, "a clone takes no page"
    consistent(state, copy)
    texts = [torch.cat([start, more], dim=1) for more in (one, other)]
    expected = [whole(slim, text) for text in texts]
    place = [10, 10]
    # by turns, so that pages are copied, pools grow under the other one's feet, and windows drop what is still shared
    for turn, count in enumerate((1, 1, 1, 7, 1, 2, 9, 1, 3, 8, 1)):
        for index, each in enumerate((state, copy)):
            if index == 1 and turn % 3 == 2:
                continue
            here = slice(place[index], place[index] + count)
            if here.stop > texts[index].shape[1]:
                continue
            found = paged.decode(texts[index][:, here], each)
            assert error(found, expected[index][:, here]) < EXACT, f"state {index}, {count} tokens at {here.start}"
            place[index] = here.stop
    for kind, pool in state.memory.pools.items():
        pool.check([row[kind] for s in (state, copy) for row in s.rows])
    copy.release()
    consistent(state)
    state.release()
    assert all(pool.free == pool.pages for pool in paged_pools(state))


def paged_pools(state):
    return state.memory.pools.values()


def test_the_last_page_is_copied_when_it_is_shared_and_no_other():
    _, paged = pair("plain")
    _, state = paged.prefill(ids(1, 10))  # pages of 4, 4 and 2 tokens
    (before,) = [list(row[0, 0].pages) for row in state.rows]
    copy = state.clone()
    held = [[t[before].clone() for t in ts] for ts in state.memory.tensors.values()]
    paged.decode(torch.tensor([[5]]), copy)
    (mine,), (theirs,) = ([row[0, 0].pages for row in s.rows] for s in (state, copy))
    assert mine == before
    assert theirs[:2] == before[:2]
    assert theirs[2] not in before
    for owner, kept in zip(state.memory.tensors, held, strict=True):
        for tensor, old in zip(state.memory.tensors[owner], kept, strict=True):
            assert torch.equal(tensor[before], old), "what the other one reads was written"
            assert torch.equal(tensor[theirs[2]][:, :2], old[2][:, :2])
    paged.decode(torch.tensor([[6]]), state)
    assert state.rows[0][0, 0].pages == before, "a page that is one's own again is written where it is"
    full = paged.prefill(ids(1, 8))[1]
    copy = full.clone()
    paged.decode(torch.tensor([[5]]), copy)
    assert copy.rows[0][0, 0].pages[:2] == full.rows[0][0, 0].pages, "full pages are shared for good"


def test_a_pool_that_grows_for_one_state_is_the_others_too():
    """The tensors are new ones then; what the other state writes must not go to the old ones."""
    slim, paged = pair("plain")
    start = ids(1, 10)
    _, state = paged.prefill(start)
    copy = state.clone()
    paged.decode(torch.tensor([[5]]), copy)  # copies the last page, for which the pool has to grow
    assert state.memory.pools[0, 0].pages > 3
    text = torch.cat([start, ids(1, 20, seed=4)], dim=1)
    expected = whole(slim, text)
    for place in range(10, 30):  # in place first, then into pages of the new tensors
        found = paged.decode(text[:, place : place + 1], state)
        assert error(found[:, 0], expected[:, place]) < EXACT, f"token {place}"


def test_rows_that_are_repeated_share_pages_until_they_part():
    slim, paged = pair("plain")
    tokens = ids(1, 9)
    _, state = paged.prefill(tokens)
    state.select(torch.tensor([0, 0, 0]))
    usage = state.usage()[0, 0]
    assert (usage.used, usage.shared) == (3, 3)
    following = torch.tensor([[5], [6], [7]])
    found = paged.decode(following, state)
    assert error(found, whole(slim, torch.cat([tokens.expand(3, -1), following], 1))[:, 9:]) < EXACT
    usage = state.usage()[0, 0]
    assert (usage.used, usage.shared) == (2 + 3, 2)
    consistent(state)
    state.select(torch.tensor([1]))
    assert state.usage()[0, 0].used == 3


# ---------------------------------------------------------------------- memory


def test_pools_grow_as_sequences_do():
    slim, paged = pair("plain")
    tokens = ids(2, 30)
    _, state = paged.prefill(tokens[:, :6])
    pool = state.memory.pools[0, 0]
    assert pool.pages == 2 * 2
    allocated = [state.allocated_bytes()]
    expected = whole(slim, tokens)
    for place in range(6, 30):
        assert error(paged.decode(tokens[:, place : place + 1], state)[:, 0], expected[:, place]) < EXACT
        assert state.usage()[0, 0].used == 2 * -(-(place + 1) // 4)
        assert state.usage()[0, 0].tokens == 2 * (place + 1)
        allocated.append(state.allocated_bytes())
    assert pool.pages >= 2 * 8
    assert allocated == sorted(allocated)
    tensors = [t for store in state.stores.values() for t in store[:-1]]
    assert all(t.shape[0] == pool.pages + 1 for t in tensors), "a page for each, and one for padding"
    tables = {id(store[-1]): store[-1] for store in state.stores.values()}
    assert state.allocated_bytes() == sum(t.nbytes for t in [*tensors, *tables.values(), state.lengths])
    assert state.used_bytes() == paged.plan.bytes(2, 30) == slim.plan.bytes(2, 30)


def test_room_that_was_asked_for_is_there():
    _, paged = pair("plain")
    _, state = paged.prefill(ids(2, 6), capacity=30)
    kept = state.memory.tensors[0][0]
    paged.decode(ids(2, 24, seed=2), state)
    assert state.memory.tensors[0][0] is kept
    assert state.memory.pools[0, 0].pages == 2 * 8


def test_short_rows_hold_few_pages():
    _, paged = pair("plain")
    _, state = paged.prefill(ids(3, 30), torch.tensor([30, 1, 5]))
    usage = state.usage()[0, 0]
    assert usage.used == 8 + 1 + 2
    assert usage.tokens == 36
    assert usage.slots - usage.tokens < 3 * 4, "less than a page per row is held for nothing"


@pytest.mark.parametrize(("window", "sinks", "page"), [(6, 3, 4), (5, 0, 4), (1, 1, 4), (7, 9, 2), (4, 4, 1)])
def test_pages_behind_a_window_are_given_back(window, sinks, page):
    slim = made("llama", SlideWindow(window, sinks))
    paged = made("llama", SlideWindow(window, sinks), PageKV(page))
    tokens = ids(2, 60)
    expected = whole(slim, tokens)
    lengths, rows = torch.tensor([9, 4]), torch.arange(2)
    _, state = paged.prefill(tokens[:, :9], lengths)
    kind, most = (window, sinks), 2 * (-(-sinks // page) + -(-window // page) + 2)
    for count in (1, 1, 7, 1, 1, 1, 13, *[1] * 20, 5):
        where = state.lengths.view(-1, 1) + torch.arange(count)
        found = paged.decode(tokens[rows.view(-1, 1), where], state)
        assert error(found, expected[rows.view(-1, 1), where]) < EXACT
        assert state.usage()[kind].used <= most
        for row, length in zip(state.rows, state.lengths.tolist(), strict=True):
            for token in range(length):
                readable = token < sinks or token > length - window
                assert not readable or row[kind].pages[token // page] >= 0, f"token {token} of {length} is gone"
    consistent(state)
    before = state.allocated_bytes() - sum(t.nbytes for t in {id(s[-1]): s[-1] for s in state.stores.values()}.values())
    assert paged.plan.bounded
    for _ in range(20):
        paged.decode(ids(2, 1), state)
    after = state.allocated_bytes() - sum(t.nbytes for t in {id(s[-1]): s[-1] for s in state.stores.values()}.values())
    assert after == before, "pools of a window do not grow with the text"


def test_stores_that_keep_different_tokens_have_pools_of_their_own():
    _, paged = pair("windows and none")
    tokens = ids(2, 40)
    _, state = paged.prefill(tokens)
    assert sorted(state.memory.kinds) == [(0, 0), (5, 0)]
    assert state.memory.kinds[5, 0] == [0]
    assert state.usage()[0, 0].used == 2 * 10
    assert state.usage()[5, 0].used <= 2 * 3
    assert state.stores[0][-1] is not state.stores[1][-1]
    _, paged = pair("plain")
    stores = paged.prefill(tokens)[1].stores
    assert stores[0][-1] is stores[1][-1], "stores that keep the same share a table"


def test_a_pool_that_does_not_grow_says_so_and_changes_nothing():
    slim, paged = pair("plain")
    tokens = ids(2, 20)
    expected = whole(slim, tokens)
    _, state = paged.prefill(tokens[:, :6], capacity=8)
    state.growing = False
    paged.decode(tokens[:, 6:8], state)
    for _ in range(2):
        with pytest.raises(OutOfPages, match="2 pages are needed, 0 are free of 4"):
            paged.decode(tokens[:, 8:9], state)
    consistent(state)
    assert state.lengths.tolist() == [8, 8]
    state.select(torch.tensor([1]))
    assert error(paged.decode(tokens[1:, 8:12], state), expected[1:, 8:12]) < EXACT


@pytest.mark.parametrize(("variant", "page"), [("plain", 4), ("int4, window", 4), ("a window of one", 1)])
def test_a_step_that_did_not_come_to_its_end_is_as_if_it_had_not_been(variant, page):
    slim, paged = pair(variant, page)
    tokens = ids(2, 20)
    expected = whole(slim, tokens)
    _, state = paged.prefill(tokens[:, :7])
    for count in (1, 6):
        paged.executor.step(ids(2, count, seed=9), state, None)  # pages are taken, lengths are not advanced
    found = paged.decode(tokens[:, 7:9], state)
    assert error(found, expected[:, 7:9]) < EXACT
    assert [row[kind].length for row in state.rows for kind in row] == [9, 9]
    consistent(state)
    assert error(paged.decode(tokens[:, 9:], state), expected[:, 9:]) < EXACT


# ---------------------------------------------------------------------- the plan


@pytest.mark.parametrize("page", [0, -4, 1025])
def test_pages_of_no_size_are_refused(page):
    with pytest.raises(PlanError, match=f"a page of {page} tokens") as caught:
        PageKV(page).plan(captured("llama").plan)
    assert "from 1 to 1024" in caught.value.fix


def test_a_cache_is_paged_once_and_not_under_kivi():
    plan = captured("llama").plan
    with pytest.raises(PlanError, match="paged already"):
        PageKV(8).plan(PageKV(4).plan(plan))
    with pytest.raises(PlanError, match="which pages do not hold"):
        PageKV().plan(QuantizeKV(4).plan(plan))
    assert {c.page for c in PageKV().plan(plan)} == {16}
    assert PageKV().plan(plan).bytes_per_token() == plan.bytes_per_token()


def test_a_later_pass_keeps_the_pages():
    slim = made("llama", PageKV(4), SlideWindow(6, 3), QuantizeKV(4))
    assert {str(slim.plan.layout(o)) for o in slim.plan.owners()} == {"int4;window=6;sinks=3;page=4"}
    layouts = {n.kwargs["layout"] for n in slim.executor.program.entries["decode"].nodes if n.target is ATTEND}
    assert layouts == {"int4;window=6;sinks=3;page=4"}
    tokens = ids()
    _, state = slim.prefill(tokens[:, :9])
    assert error(slim.decode(tokens[:, 9:], state), whole(slim, tokens)[:, 9:]) < EXACT


def test_saved_and_loaded_it_has_the_same_pages(tmp_path):
    _, paged = pair("int8")
    paged.save(tmp_path / "out")
    back = kvpass.load(tmp_path / "out")
    assert back.plan == paged.plan
    tokens = ids()
    states = [m.prefill(tokens[:, :9])[1] for m in (paged, back)]
    assert torch.equal(*(m.decode(tokens[:, 9:], s) for m, s in zip((paged, back), states, strict=True)))


def test_a_checkpoint_of_the_family_is_that_of_the_unpaged_model(tmp_path):
    """Pages are how the cache lies in memory here; the model is the same."""
    model = families.build("llama")
    paged = kvpass.transform(model, PageKV(), progress=False, verify="off")
    paged.save_pretrained(tmp_path / "out")
    written, expected = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in written)
