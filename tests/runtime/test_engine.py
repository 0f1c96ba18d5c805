"""Continuous batching: whoever joins, leaves, forks or waits, every sequence says what it would say alone."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
import transformers as hf
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import LogitsProcessor, LogitsProcessorList

import families
import kvpass
from kvpass.errors import RequestError
from kvpass.passes import GroupHeads, PageKV, QuantizeKV, ShareLayers, SlideWindow
from kvpass.runtime import engine as engine_module
from kvpass.runtime.engine import KindUsage, Produced
from kvpass.runtime.paged import PagedMemory
from kvpass.runtime.pages import ABSENT, OutOfPages

ALL = (0, 0)  # the kind of stores that keep everything


def quiet(source, recipe):
    return kvpass.transform(source, recipe, progress=False, verify="off")


PLANS = {
    "tiny": {"num_hidden_layers": 1, "hidden_size": 16},  # a step takes under a millisecond
    "pages": {},
    "grouped": {"passes": [GroupHeads(2)], "family": "llama_mha"},
    "eight bits": {"passes": [QuantizeKV(8)]},
    "window": {"passes": [SlideWindow(window=6, sinks=2)]},
    "window that counts in the cache": {"passes": [SlideWindow(window=5, sinks=3, positions="cache")]},
    "window of one": {"passes": [SlideWindow(window=1, sinks=1)]},
    "own windows": {"family": "gemma3_text", "num_hidden_layers": 2},
    "shared": {"passes": [ShareLayers("cla:2")], "num_hidden_layers": 4},
    "shared upward": {"passes": [ShareLayers("lckv:2", tolerance=1e-12)], "num_hidden_layers": 4},
    "learned positions": {"family": "gpt2"},
}


@cache
def captured(family, **options):
    return quiet(families.build(family, **options).double(), [])


@cache
def unpaged(plan):
    options = {"family": "llama", "passes": [], **PLANS[plan]}
    passes = options.pop("passes")
    return quiet(captured(**options), passes), {}


class Pair:
    """A model with a paged cache, and what it is compared with: the same one with a cache in one stretch, alone."""

    def __init__(self, plan, page=4):
        self.base, self.known = unpaged(plan)
        self.paged = quiet(self.base, [PageKV(page)])

    def said(self, tokens, count, seed=None):
        """The `count` tokens that follow `tokens`: the likeliest, or drawn one by one after `seed`."""
        key = tuple(tokens), seed
        if key not in self.known:
            logits, state = self.base.prefill(torch.tensor([tokens]))
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            self.known[key] = state, generator, [choose(logits, generator)]
        state, generator, found = self.known[key]
        while len(found) < count:
            logits = self.base.decode(torch.tensor([[found[-1]]]), state)[:, 0]
            found.append(choose(logits, generator))
        return found[:count]


def choose(logits, generator):
    if generator is None:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits.float(), dim=-1), 1, generator=generator))


pair_of = cache(Pair)


@pytest.fixture
def tiny():
    return pair_of("tiny")


def text(length, seed=0):
    return torch.randint(3, families.VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def check(engine):
    """Every page has its owner, and sequences have the pages that their tokens need."""
    sequences = engine._sequences.values()
    for kind, pool in engine.memory.pools.items():
        pool.check([s.tables[kind] for s in sequences if s.tables])
    running, waiting, swapped = engine._running, list(engine._waiting), engine._swapped
    placed = [s.id for s in [*running, *waiting, *swapped]] + list(engine.finished)
    assert sorted(placed) == sorted(engine._sequences)
    assert len(running) <= engine.max_batch
    assert engine.swapped == sorted(engine.swapped)
    for sequence in sequences:
        on_host = sequence in swapped
        assert bool(sequence.tables) == (on_host or sequence in running)
        assert bool(sequence.host) == on_host
        for table in sequence.tables.values():
            assert table.length == len(sequence.tokens) - 1
            assert not on_host or set(table.pages) <= {ABSENT}


def emptied(engine):
    """Cancel everything; no page is left behind."""
    for sequence in list(engine._sequences):
        engine.cancel(sequence)
    check(engine)
    for kind, usage in engine.usage().items():
        assert usage.pages.used == 0, f"{usage.pages.used} pages of {kind} were never given back"
        assert usage.used_bytes == 0
    assert engine.step() == []


def counted(model, monkeypatch):
    """The tokens that each run of the model takes, padding included."""
    runs, step = [], model.executor.step

    def counting(ids, *rest):
        runs.append(ids.numel())
        return step(ids, *rest)

    monkeypatch.setattr(model.executor, "step", counting)
    return runs


# ---------------------------------------------------------------------- the same tokens as alone


@pytest.mark.parametrize(("plan", "page"), [*((plan, 3) for plan in PLANS), ("pages", 16), ("eight bits", 1)])
def test_sequences_that_join_and_leave_say_what_they_would_alone(plan, page):
    pair = pair_of(plan, page)
    engine = pair.paged.engine(capacity=400, max_batch=4)
    expected = {}
    for number, (length, new) in enumerate([(5, 12), (17, 3), (1, 20), (9, 9), (30, 6), (4, 1), (16, 14), (7, 20)]):
        prompt = text(length, seed=number)
        id = engine.add(prompt, max_new_tokens=new, stop=())
        expected[id] = prompt + pair.said(prompt, new)
        for _ in range(number % 3):
            engine.step()
            check(engine)
    assert engine.running
    assert engine.waiting
    assert engine.run() == expected
    assert engine.finished == dict.fromkeys(expected, "length")
    emptied(engine)


@pytest.mark.parametrize("plan", ["pages", "own windows"])
def test_long_prompts_are_read_in_chunks_together(plan, monkeypatch):
    pair = pair_of(plan, 3)
    monkeypatch.setattr(engine_module, "CHUNK", 30)
    engine = pair.paged.engine(capacity=300)
    prompts = [text(length, seed=length) for length in (10, 8, 7, 70, 45, 11, 9)]
    runs = counted(pair.paged, monkeypatch)
    for prompt in prompts:
        engine.add(prompt, max_new_tokens=5, stop=())
    found = engine.run()
    assert list(found.values()) == [p + pair.said(p, 5) for p in prompts]
    assert runs[:7] == [3 * 10, 30, 30, 10, 30, 15, 2 * 11]


def test_what_is_written_for_padding_is_never_read(tiny):
    engine = tiny.paged.engine(pages=40)
    first = engine.add(text(5), max_new_tokens=30, stop=())  # holds the pages with the lowest numbers
    engine.step()
    prompts = [text(length, seed=length) for length in (31, 2, 11, 3)]
    ids = [engine.add(p, max_new_tokens=6, stop=()) for p in prompts]
    found = engine.run()
    assert found[first][5:] == tiny.said(text(5), 30)
    for id, prompt in zip(ids, prompts, strict=True):
        assert found[id] == prompt + tiny.said(prompt, 6)


def test_a_step_gives_every_running_sequence_a_token(tiny):
    engine = tiny.paged.engine(pages=40, max_batch=2)
    ids = [engine.add(text(3, seed), max_new_tokens=new, stop=()) for seed, new in ((1, 4), (2, 1), (3, 2))]
    said = [tiny.said(text(3, seed), 4) for seed in (1, 2, 3)]
    assert engine.waiting == ids
    assert engine.step() == [
        Produced(ids[0], said[0][0], ""),
        Produced(ids[1], said[1][0], "length"),
        Produced(ids[2], said[2][0], ""),
        Produced(ids[0], said[0][1], ""),
        Produced(ids[2], said[2][1], "length"),
    ]
    assert (engine.running, engine.waiting, engine.swapped) == (ids[:1], [], [])
    assert engine.finished == {ids[1]: "length", ids[2]: "length"}
    assert engine.step() == [Produced(ids[0], said[0][2], "")]
    assert engine.tokens(ids[0]) == text(3, 1) + said[0][:3]
    assert engine.step() == [Produced(ids[0], said[0][3], "length")]
    assert engine.step() == []


def test_tokens_come_one_by_one(tiny):
    engine = tiny.paged.engine(pages=40)
    ids = [engine.add(text(3, seed), max_new_tokens=3, stop=()) for seed in (1, 2)]
    found = []
    for produced in engine:
        found.append(produced)
        if len(found) in (1, 3):  # whoever stops listening misses nothing
            break
    found += list(engine) if len(found) == 1 else []
    assert [p.token for p in found if p.id == ids[1]] == tiny.said(text(3, 2), 3)
    assert [p.token for p in found if p.id == ids[0]] == tiny.said(text(3, 1), 3)


def test_a_stop_token_ends_a_sequence(tiny):
    prompt = text(6)
    said = tiny.said(prompt, 12)
    stop = said[7]
    short = said[: said.index(stop) + 1]
    engine = tiny.paged.engine(pages=40)
    ids = [engine.add(prompt, max_new_tokens=12, stop=s) for s in (stop, [stop, 999], frozenset([stop]))]
    last = engine.add(prompt, max_new_tokens=len(short), stop=stop)
    found = engine.run()
    assert all(found[id] == prompt + short for id in [*ids, last])
    assert set(engine.finished.values()) == {"stop"}


def test_the_models_own_end_is_the_default(tiny, monkeypatch):
    prompt = text(6)
    said = tiny.said(prompt, 12)
    for eos in (None, said[4], [said[7], said[3]]):
        monkeypatch.setattr(tiny.paged.program.facts, "config", {"eos_token_id": eos})
        ends = [] if eos is None else eos if isinstance(eos, list) else [eos]
        expected = said[: min((said.index(end) + 1 for end in ends), default=12)]
        engine = tiny.paged.engine(pages=40)
        engine.add(prompt, max_new_tokens=12)
        assert list(engine.run().values()) == [prompt + expected]


def test_prompts_are_tensors_or_lists(tiny):
    engine = tiny.paged.engine(pages=40)
    prompt = text(6)
    ids = [engine.add(p, max_new_tokens=3, stop=()) for p in (prompt, torch.tensor(prompt), torch.tensor(prompt).int())]
    found = engine.run()
    assert [found[id] for id in ids] == [prompt + tiny.said(prompt, 3)] * 3


# ---------------------------------------------------------------------- choosing tokens

SAMPLING = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}


def test_drawn_tokens_are_those_of_transformers_whatever_runs_beside_them():
    model = families.build("llama").double()
    slim = quiet(model, [PageKV(4)])
    engine = slim.engine(pages=60)
    prompts = [text(n, seed=n) for n in (5, 9, 3)]
    ids = []
    for seed, prompt in enumerate(prompts):
        ids.append(engine.add(prompt, max_new_tokens=15, stop=(), sample=True, seed=seed, **SAMPLING))
        engine.add(prompt, max_new_tokens=9, stop=())
        engine.step()
    found = engine.run()
    for seed, (id, prompt) in enumerate(zip(ids, prompts, strict=True)):
        torch.manual_seed(seed)
        options = {"max_new_tokens": 15, "do_sample": True, "eos_token_id": None, "pad_token_id": 0, **SAMPLING}
        ids_in = torch.tensor([prompt])
        expected = model.generate(ids_in, attention_mask=torch.ones_like(ids_in), **options)
        assert found[id] == expected[0].tolist()


def test_processors_are_those_of_transformers():
    model = families.build("llama").double()
    engine = quiet(model, [PageKV(4)]).engine(pages=60)
    prompt = [5, 6, 7, 5, 6]
    processors = LogitsProcessorList([hf.NoRepeatNGramLogitsProcessor(2), hf.RepetitionPenaltyLogitsProcessor(1.5)])
    greedy = engine.add(prompt, max_new_tokens=20, stop=(), processors=processors)
    drawn = engine.add(prompt, max_new_tokens=20, stop=(), processors=processors, sample=True, seed=3, top_p=0.9)
    found = engine.run()
    options = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0, "no_repeat_ngram_size": 2}
    options |= {"repetition_penalty": 1.5, "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    ids = torch.tensor([prompt])
    assert found[greedy] == model.generate(ids, do_sample=False, **options)[0].tolist()
    torch.manual_seed(3)
    assert found[drawn] == model.generate(ids, do_sample=True, top_k=0, top_p=0.9, **options)[0].tolist()


def test_without_a_seed_the_global_generator_decides(tiny):
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        engine = tiny.paged.engine(pages=40)
        ids = [engine.add(text(4), max_new_tokens=12, stop=(), sample=True) for _ in range(2)]
        run = engine.run()
        found.append([run[id] for id in ids])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


# ---------------------------------------------------------------------- forks


def test_a_fork_shares_pages_until_the_two_part(tiny):
    engine = tiny.paged.engine(pages=40)
    prompt = text(9)  # two full pages and one of one token
    first = engine.add(prompt, max_new_tokens=12, stop=(), sample=True, seed=1)
    engine.step()
    said = engine.tokens(first)
    before = engine.usage()[ALL].pages
    twins = [engine.fork(first, seed=seed) for seed in (2, 3)]
    usage = engine.usage()[ALL].pages
    assert (usage.used, usage.shared) == (before.used, before.used)
    assert all(engine.tokens(twin) == said for twin in twins)
    check(engine)
    engine.step()
    usage = engine.usage()[ALL].pages
    assert (usage.used, usage.shared) == (before.used + 2, before.used - 1)
    check(engine)
    found = engine.run()
    assert found[first] == prompt + tiny.said(prompt, 12, seed=1)
    for twin, seed in zip(twins, (2, 3), strict=True):
        assert found[twin] == said + tiny.said(said, 10, seed=seed)
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    emptied(engine)


def test_a_fork_draws_otherwise_and_always_the_same(tiny):
    runs = []
    for _ in range(2):
        engine = tiny.paged.engine(pages=40)
        first = engine.add(text(5), max_new_tokens=12, stop=(), sample=True, seed=1)
        engine.step()
        twins = [engine.fork(first), engine.fork(first)]
        found = engine.run()
        runs.append([found[id] for id in (first, *twins)])
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs[0]}) == 3
    assert runs[0][0] == text(5) + tiny.said(text(5), 12, seed=1), "a fork moved what the first one draws"


def test_forks_wherever_a_sequence_is(tiny):
    engine = tiny.paged.engine(pages=40, max_batch=2)
    ids = [engine.add(text(n), max_new_tokens=9, stop=()) for n in (6, 7)]
    twins = {engine.fork(ids[0]): ids[0]}  # of a waiting one
    assert engine.waiting == [*ids, *twins]
    engine.step()
    twins[engine.fork(ids[1])] = ids[1]  # the batch is full
    assert engine.swapped == [3]
    twins[engine.fork(3)] = ids[1]  # of a swapped one
    assert engine.swapped == [3, 4]
    check(engine)
    found = engine.run()
    for id, first in [*twins.items(), *zip(ids, ids, strict=True)]:
        prompt = text(6 + first)
        assert found[id] == prompt + tiny.said(prompt, 9)
    with pytest.raises(RequestError, match="sequence 0 is over"):
        engine.fork(0)
    emptied(engine)


class Only(LogitsProcessor):
    """Counts up from a token; it remembers where it is, as few processors do."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores[:] = -torch.inf
        scores[:, self.token] = 0
        self.token += 1
        return scores


def test_a_fork_has_processors_of_its_own(tiny):
    engine = tiny.paged.engine(pages=40)
    first = engine.add([5], max_new_tokens=6, stop=(), processors=LogitsProcessorList([Only(10)]))
    engine.step()
    twin = engine.fork(first)
    found = engine.run()
    assert found[first] == found[twin] == [5, 10, 11, 12, 13, 14, 15]


# ---------------------------------------------------------------------- prefixes


def test_prompts_that_begin_alike_share_pages_and_are_read_once(tiny, monkeypatch):
    runs = counted(tiny.paged, monkeypatch)
    common = text(32, seed=1)
    prompts = [common + text(6, seed=2), common + text(5, seed=3), common[:20] + text(8, seed=4), common]
    used, read = {}, {}
    for share in (False, True):
        engine = tiny.paged.engine(pages=60, share_prefixes=share)
        runs.clear()
        ids = [engine.add(p, max_new_tokens=4, stop=()) for p in prompts]
        engine.step()
        check(engine)
        read[share] = sum(runs) - len(prompts)  # less the step of decoding
        used[share] = engine.usage()[ALL].pages.used
        found = engine.run()
        assert [found[id] for id in ids] == [p + tiny.said(p, 4) for p in prompts]
        emptied(engine)
    assert read[False] >= sum(map(len, prompts))
    assert read[True] == 38 + 5 + 8 + 4  # whole pages of 4 tokens are found, never the whole prompt
    assert used[False] == 10 + 10 + 8 + 9
    assert used[True] == used[False] - 8 - 5 - 7


def test_prompts_with_one_beginning_are_read_together_once_it_is_known(tiny, monkeypatch):
    engine = tiny.paged.engine(pages=60)
    common = text(32, seed=1)
    engine.add(common, max_new_tokens=1, stop=())
    engine.step()
    runs = counted(tiny.paged, monkeypatch)
    prompts = [common + text(n, seed=n) for n in (6, 7, 5)]
    ids = [engine.add(p, max_new_tokens=2, stop=()) for p in prompts]
    found = engine.run()
    assert runs[0] == 3 * 7
    assert [found[id] for id in ids] == [p + tiny.said(p, 2) for p in prompts]


def test_what_was_said_is_found_again(tiny, monkeypatch):
    engine = tiny.paged.engine(pages=60)
    engine.add(text(6), max_new_tokens=11, stop=())
    (said,) = engine.run().values()
    assert engine.usage()[ALL].pages.evictable == 4  # of 17 tokens the last was never read
    runs = counted(tiny.paged, monkeypatch)
    again = engine.add([*said, 9], max_new_tokens=3, stop=())
    assert engine.run()[again] == [*said, 9, *tiny.said([*said, 9], 3)]
    assert runs[0] == 2
    emptied(engine)


def test_kept_pages_make_room_for_new_text(tiny):
    engine = tiny.paged.engine(pages=8)
    for seed in range(5):
        prompt = text(20, seed)
        id = engine.add(prompt, max_new_tokens=8, stop=())
        assert engine.run()[id] == prompt + tiny.said(prompt, 8)
        check(engine)


@pytest.mark.parametrize("plan", ["window", "own windows"])
def test_stores_with_windows_share_nothing(plan):
    pair = pair_of(plan)
    engine = pair.paged.engine(capacity=200)
    assert not engine.share_prefixes
    prompt = text(14)
    ids = [engine.add(prompt, max_new_tokens=9, stop=()) for _ in range(3)]
    found = engine.run()
    assert [found[id] for id in ids] == [prompt + pair.said(prompt, 9)] * 3
    assert all(u.pages.evictable == 0 for u in engine.usage().values())
    emptied(engine)


# ---------------------------------------------------------------------- windows


def test_a_window_takes_the_same_memory_however_long_the_text(monkeypatch):
    pair = pair_of("window")
    engine = pair.paged.engine(pages=2 * 4)  # a sequence: a page of sinks, and a window begun and ended within pages
    prompts = [text(5), text(9)]
    ids = [engine.add(p, max_new_tokens=400, stop=()) for p in prompts]
    used, bytes_held = [], set()
    while engine.waiting or engine.running:
        engine.step()
        check(engine)
        used.append(engine.usage()[6, 2].pages.used)
        bytes_held.add(engine.memory.allocated_bytes())
    assert max(used) <= 2 * 4
    assert len(bytes_held) == 1
    for id, prompt in zip(ids, prompts, strict=True):
        assert engine.tokens(id) == prompt + pair.said(prompt, 400)
    emptied(engine)


@pytest.mark.parametrize(("pages", "fits"), [(5, False), (6, True)])
def test_a_prompt_under_a_window_takes_the_pages_of_a_chunk(pages, fits, monkeypatch):
    pair = pair_of("window")
    monkeypatch.setattr(engine_module, "CHUNK", 9)
    engine = pair.paged.engine(pages=pages)  # of 4 tokens: the first for the sinks, and those of tokens 28..44
    if not fits:
        with pytest.raises(OutOfPages, match="6 pages are needed"):
            engine.add(text(60), max_new_tokens=5, stop=())
        return
    id = engine.add(text(60), max_new_tokens=5, stop=())
    assert engine.run()[id] == text(60) + pair.said(text(60), 5)
    emptied(engine)


def test_a_window_of_one_token_can_be_taken_back(monkeypatch):
    pair = pair_of("window of one")
    engine = pair.paged.engine(pages=8)
    prompt = text(6)
    id = engine.add(prompt, max_new_tokens=12, stop=())
    for _ in range(11):
        fail_once(engine, monkeypatch)
        with pytest.raises(RuntimeError, match="on purpose"):
            engine.step()
        check(engine)
        engine.step()
    assert engine.run()[id] == prompt + pair.said(prompt, 12)


def test_swapped_windows_come_back(monkeypatch):
    pair = pair_of("own windows")
    engine = pair.paged.engine(capacity=200, when_full="swap")
    assert set(engine.usage()) == {(5, 0), ALL}
    prompts = [text(14, seed) for seed in range(3)]
    ids = [engine.add(p, max_new_tokens=20, stop=()) for p in prompts]
    for turn in range(12):
        engine.step()
        engine._preempt(engine._running[turn % 2])
        check(engine)
    found = engine.run()
    assert [found[id] for id in ids] == [p + pair.said(p, 20) for p in prompts]
    emptied(engine)


# ---------------------------------------------------------------------- too few pages


def everything(engine):
    """All that can be seen of an engine's sequences and pages."""
    return (
        engine.running,
        engine.waiting,
        engine.swapped,
        {s.id: (list(s.tokens), s.ending) for s in engine._sequences.values()},
        {s.id: [(k, list(t.pages), t.length) for k, t in s.tables.items()] for s in engine._sequences.values()},
        {kind: usage.pages for kind, usage in engine.usage().items()},
    )


def test_an_engine_that_is_full_says_who_needs_a_page(tiny):
    engine = tiny.paged.engine(pages=8)
    prompts = [text(n, seed=n) for n in (10, 13)]
    ids = [engine.add(p, max_new_tokens=12, stop=()) for p in prompts]
    late = engine.add(text(5), max_new_tokens=6, stop=())
    with pytest.raises(OutOfPages) as caught:
        engine.run()
    assert caught.value.sequence in ids
    assert f"sequence {caught.value.sequence}" in str(caught.value)
    assert "when_full='swap'" in caught.value.fix
    assert engine.waiting == [late]
    check(engine)
    before = everything(engine)
    with pytest.raises(OutOfPages) as again:
        engine.step()
    assert again.value.sequence == caught.value.sequence
    assert everything(engine) == before
    engine.cancel(ids[1])
    found = engine.run()
    assert found == {ids[0]: prompts[0] + tiny.said(prompts[0], 12), late: text(5) + tiny.said(text(5), 6)}
    emptied(engine)


def test_twins_that_fill_the_pool_need_one_copy_less(tiny):
    engine = tiny.paged.engine(pages=5)  # 3 pages of a prompt, 2 more for copies of the last
    first = engine.add(text(9), max_new_tokens=4, stop=(), sample=True, seed=1)
    engine.step()
    said = engine.tokens(first)
    twins = [engine.fork(first, seed=seed) for seed in (2, 3)]
    engine.step()
    assert engine.usage()[ALL].pages.free == 0
    assert engine.tokens(first) == text(9) + tiny.said(text(9), 3, seed=1)
    for twin, seed in zip(twins, (2, 3), strict=True):
        assert engine.tokens(twin) == said + tiny.said(said, 1, seed=seed)
    check(engine)


def test_the_youngest_makes_room_and_comes_back(tiny):
    engine = tiny.paged.engine(pages=12, when_full="swap")
    prompts = [text(n, seed=n) for n in (9, 14, 5, 11, 7, 10)]
    ids = [engine.add(p, max_new_tokens=18, stop=(), sample=True, seed=n) for n, p in enumerate(prompts)]
    out, ended = 0, []
    while engine.waiting or engine.running or engine.swapped:
        before = engine.running
        ended += [p.id for p in engine.step() if p.finished]
        check(engine)
        gone = [id for id in before if id in engine.swapped]
        out += len(gone)
        assert not gone or min(gone) > max((id for id in before if id in engine.running), default=-1)
        if engine.swapped:
            assert not engine.waiting or engine.waiting[0] > engine.swapped[-1], "somebody pushed to the front"
    assert out > 3
    assert ended == ids
    for seed, (id, prompt) in enumerate(zip(ids, prompts, strict=True)):
        assert engine.tokens(id) == prompt + tiny.said(prompt, 18, seed=seed)
    emptied(engine)


@pytest.mark.parametrize("when_full", ["error", "swap"])
def test_a_sequence_that_outgrows_the_pool_is_refused(tiny, when_full):
    engine = tiny.paged.engine(pages=4, when_full=when_full)
    with pytest.raises(OutOfPages, match="5 pages are needed") as caught:
        engine.add(text(16), max_new_tokens=2, stop=())
    assert "shorten the prompt" in caught.value.fix
    assert engine.waiting == []
    exact = engine.add(text(16), max_new_tokens=1, stop=())
    assert engine.run()[exact] == text(16) + tiny.said(text(16), 1)
    long = engine.add(text(9), max_new_tokens=20, stop=())
    with pytest.raises(OutOfPages) as caught:
        engine.run()
    assert caught.value.sequence == long
    assert engine.running == [long]
    assert engine.tokens(long) == text(9) + tiny.said(text(9), 8)  # 16 in the pool, and the last one
    other = engine.add(text(3), max_new_tokens=4, stop=())
    before = everything(engine)
    with pytest.raises(OutOfPages):
        engine.step()
    assert everything(engine) == before
    engine.cancel(long)
    assert engine.run()[other] == text(3) + tiny.said(text(3), 4)
    emptied(engine)


def test_a_swapped_sequence_that_outgrew_the_pool_is_refused(tiny):
    engine = tiny.paged.engine(pages=4, when_full="swap", share_prefixes=False)
    old = engine.add(text(13), max_new_tokens=30, stop=())
    while len(engine.tokens(old)) < 17:
        engine.step()
    engine._preempt(engine._running[0])
    before = everything(engine)
    with pytest.raises(OutOfPages, match="5 pages") as caught:
        engine.step()
    assert caught.value.sequence == old
    assert everything(engine) == before
    emptied(engine)


# ---------------------------------------------------------------------- what fails half way


def fail_once(engine, monkeypatch, after=False):
    """Let the next run of the model fail, before or after it has written its keys and values."""
    executor = engine.model.executor
    step = executor.step

    def failing(ids, state, *rest):
        monkeypatch.setattr(executor, "step", step)
        if after:
            step(ids, state, *rest)
        else:
            state.prepare(ids.shape[1], rest[1] if len(rest) > 1 else None)
        raise RuntimeError("on purpose")

    monkeypatch.setattr(executor, "step", failing)


@pytest.mark.parametrize("after", [False, True])
def test_a_run_that_fails_changes_nothing(tiny, after, monkeypatch):
    engine = tiny.paged.engine(pages=40)
    first = engine.add(text(8), max_new_tokens=12, stop=(), sample=True, seed=1)
    engine.step()
    said = engine.tokens(first)
    twin = engine.fork(first, seed=2)  # the next step copies a page
    for _ in range(6):
        before = everything(engine)
        for _ in range(2):
            fail_once(engine, monkeypatch, after)
            with pytest.raises(RuntimeError, match="on purpose"):
                engine.step()
            check(engine)
            assert everything(engine)[:4] == before[:4]
            assert engine.usage()[ALL].pages.tokens <= before[5][ALL].tokens + 3  # a copy that was made may stay
        engine.step()
    late = engine.add(text(13, seed=5), max_new_tokens=3, stop=())
    before = everything(engine)
    fail_once(engine, monkeypatch, after)
    with pytest.raises(RuntimeError, match="on purpose"):
        engine.step()
    assert everything(engine) == before
    check(engine)
    found = engine.run()
    assert found[first] == text(8) + tiny.said(text(8), 12, seed=1)
    assert found[twin] == said + tiny.said(said, 10, seed=2)
    assert found[late] == text(13, seed=5) + tiny.said(text(13, seed=5), 3)
    emptied(engine)


def test_prompts_that_were_not_read_are_not_found_and_keep_their_turn(tiny, monkeypatch):
    engine = tiny.paged.engine(pages=40)
    prompts = [text(13, seed) for seed in range(3)]
    ids = [engine.add(prompt, max_new_tokens=3, stop=()) for prompt in prompts]
    fail_once(engine, monkeypatch)
    with pytest.raises(RuntimeError, match="on purpose"):
        engine.step()
    assert engine.usage()[ALL].pages.evictable == 0
    assert engine.waiting == ids
    runs = counted(tiny.paged, monkeypatch)
    assert engine.run() == {id: prompt + tiny.said(prompt, 3) for id, prompt in zip(ids, prompts, strict=True)}
    assert runs[0] == 3 * 13


class Refuses(LogitsProcessor):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            self.length = -1
            raise ValueError("not this one")
        return scores


@pytest.mark.parametrize("length", [4, 7])
def test_a_processor_that_fails_disturbs_nobody(tiny, length):
    engine = tiny.paged.engine(pages=40)
    drawn = engine.add(text(5), max_new_tokens=9, stop=(), sample=True, seed=1)
    refusing = LogitsProcessorList([Refuses(length)])
    greedy = engine.add(text(4), max_new_tokens=9, stop=(), processors=refusing)
    with pytest.raises(ValueError, match="not this one") as caught:
        engine.run()
    assert caught.value.__notes__ == [f"while a token of sequence {greedy} was chosen"]
    check(engine)
    found = engine.run()
    assert found[drawn] == text(5) + tiny.said(text(5), 9, seed=1)
    assert found[greedy] == text(4) + tiny.said(text(4), 9)
    emptied(engine)


def test_tokens_of_a_step_that_fails_later_are_not_lost(tiny, monkeypatch):
    engine = tiny.paged.engine(pages=40)
    id = engine.add(text(5), max_new_tokens=4, stop=())
    step, runs = tiny.paged.executor.step, []

    def failing(*rest):
        runs.append(1)
        if len(runs) == 2:  # the prompt is read, its first token is there
            raise RuntimeError("on purpose")
        return step(*rest)

    monkeypatch.setattr(tiny.paged.executor, "step", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        engine.step()
    check(engine)
    assert [p.token for p in engine.step()] == tiny.said(text(5), 2)
    assert engine.run()[id] == text(5) + tiny.said(text(5), 4)


def test_what_cannot_be_copied_to_the_host_stays(tiny, monkeypatch):
    engine = tiny.paged.engine(pages=12, when_full="swap")
    ids = [engine.add(text(n, n), max_new_tokens=20, stop=()) for n in (9, 14, 5)]
    for name in ("take", "put"):
        real, broken = getattr(PagedMemory, name), []

        def failing(self, *rest, broken=broken, real=real):
            if not broken:
                broken.append(1)
                raise MemoryError("on purpose")
            return real(self, *rest)

        monkeypatch.setattr(PagedMemory, name, failing)
        with pytest.raises(MemoryError, match="on purpose"):
            engine.run()
        check(engine)
    found = engine.run()
    assert [found[id] for id in ids] == [text(n, n) + tiny.said(text(n, n), 20) for n in (9, 14, 5)]
    emptied(engine)


# ---------------------------------------------------------------------- leaving


def test_cancelling_gives_back_what_a_sequence_held(tiny):
    engine = tiny.paged.engine(pages=40, max_batch=2, when_full="swap")
    ids = [engine.add(text(9, seed), max_new_tokens=9, stop=()) for seed in range(5)]
    engine.step()
    engine._preempt(engine._running[1])
    assert (engine.running, engine.swapped, engine.waiting) == (ids[:1], ids[1:2], ids[2:])
    for id in (ids[3], ids[1], ids[0]):
        engine.cancel(id)
        check(engine)
        with pytest.raises(RequestError, match=f"there is no sequence {id}"):
            engine.tokens(id)
    assert engine.usage()[ALL].pages.used == 0
    found = engine.run()
    assert found == {ids[n]: text(9, n) + tiny.said(text(9, n), 9) for n in (2, 4)}
    engine.cancel(ids[2])
    assert engine.finished == {ids[4]: "length"}
    emptied(engine)


def test_one_of_the_batch_leaves_in_the_middle(tiny):
    engine = tiny.paged.engine(pages=40)
    ids = [engine.add(text(n, n), max_new_tokens=12, stop=()) for n in (5, 6, 7)]
    for _ in range(3):
        engine.step()
    engine.cancel(ids[1])
    found = engine.run()
    assert found == {ids[n]: text(5 + n, 5 + n) + tiny.said(text(5 + n, 5 + n), 12) for n in (0, 2)}


# ---------------------------------------------------------------------- numbers


def test_usage_in_bytes_and_pages(tiny):
    engine = tiny.paged.engine(pages=20)
    engine.add(text(9), max_new_tokens=5, stop=())
    engine.step()
    usage = engine.usage()[ALL]
    assert isinstance(usage, KindUsage)
    cache = tiny.paged.plan[0]
    assert usage.page_bytes == 4 * tiny.paged.plan.bytes_per_token() == 4 * 2 * cache.kv_heads * cache.key_dim * 8
    assert usage.used_bytes == 3 * usage.page_bytes
    assert (usage.pages.tokens, usage.pages.slots) == (10, 12)
    assert usage.allocated_bytes == 21 * usage.page_bytes == engine.memory.allocated_bytes()


def test_capacity_is_counted_in_tokens():
    pair = pair_of("own windows")
    assert {k: p.pages for k, p in pair.paged.engine(capacity=41).memory.pools.items()} == {(5, 0): 11, ALL: 11}
    long = pair.paged.engine(capacity=100_000, max_batch=2).memory.pools
    assert long[ALL].pages == 25_000
    assert long[5, 0].pages == 2 * 3 + 512 < 25_000  # windows, and a chunk of a prompt
    own = pair.paged.engine(pages={(5, 0): 7, ALL: 20}).memory.pools
    assert {k: p.pages for k, p in own.items()} == {(5, 0): 7, ALL: 20}
    default = pair.paged.engine(max_batch=3).memory.pools
    assert default[ALL].pages == 3 * families.POSITIONS // 4


def test_little_is_wasted_on_sequences_of_mixed_lengths():
    """The claim of the PagedAttention paper, with sequences of 50 to 2000 tokens in pages of 16."""
    pair = pair_of("tiny", 16)
    engine = pair.paged.engine(capacity=16_000, max_batch=8)
    chance = random.Random(0)
    for number in range(32):
        length, new = chance.randint(50, 2000), chance.randint(10, 40)
        engine.add(text(length - new, number), max_new_tokens=new, stop=())
    found, steps = [], 0
    while engine.waiting or engine.running:
        engine.step()
        steps += 1
        usage = engine.usage()[ALL].pages
        if usage.used:
            found.append(usage.utilisation)
    print(f"\nutilisation {sum(found) / len(found):.2%} on average, {min(found):.2%} at least, of {steps} steps")
    assert len(engine.finished) == 32
    assert sum(found) / len(found) >= 0.96
    emptied(engine)


# ---------------------------------------------------------------------- wrong requests


def test_a_cache_without_pages_is_refused(tiny):
    with pytest.raises(RequestError) as caught:
        tiny.base.engine()
    assert "PageKV" in caught.value.fix


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"when_full": "wait"}, "when_full='wait'"),
        ({"pages": 3, "capacity": 9}, "pages and capacity"),
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"pages": 0}, "holds nothing"),
        ({"pages": {(5, 0): 3}}, r"stores keep \[\(0, 0\)\]"),
    ],
)
def test_engines_that_cannot_be(tiny, options, words):
    with pytest.raises(RequestError, match=words):
        tiny.paged.engine(**options)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "the prompt is empty"),
        (torch.zeros(2, 3, dtype=torch.long), {}, "one row"),
        ([1.5, 2.5], {}, "token ids are integers"),
        ([1, 97], {}, "token id 97 is outside"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([1], {"temperature": 0.5}, "change what is drawn"),
        ([1], {"sample": True, "temperature": -1.0}, "temperature"),
        ([1], {"sample": True, "top_k": -1}, "top_k"),
        ([1], {"sample": True, "top_p": -0.5}, "top_p"),
    ],
)
def test_sequences_that_cannot_be(tiny, prompt, options, words):
    engine = tiny.paged.engine(pages=4)
    with pytest.raises(RequestError, match=words):
        engine.add(prompt, **options)
    assert (engine.waiting, engine.step()) == ([], [])


def test_positions_that_were_never_learned_are_refused_at_once():
    pair = pair_of("learned positions")
    engine = pair.paged.engine(capacity=400)
    with pytest.raises(RequestError, match="learned positions for 128"):
        engine.add(text(100), max_new_tokens=30)
    fits = engine.add(text(100), max_new_tokens=29, stop=())
    assert engine.run()[fits] == text(100) + pair.said(text(100), 29)


# ---------------------------------------------------------------------- states over pages


def test_two_states_over_one_pool_that_grows(tiny):
    """What one state's growth does to the tensors, the other has to notice."""
    prompt = text(5)
    logits, first = tiny.paged.prefill(torch.tensor([prompt]))
    copy = first.clone()
    said = tiny.said(prompt, 12)
    tiny.paged.decode(torch.tensor([text(90, 3)]), first)  # pages are added
    for place in range(11):
        logits = tiny.paged.decode(torch.tensor([[said[place]]]), copy)[:, 0]
        assert int(logits.argmax()) == said[place + 1], f"token {place}"


def test_a_step_that_was_not_completed_is_taken_back(tiny):
    prompt = text(6)
    said = tiny.said(prompt, 8)
    _, state = tiny.paged.prefill(torch.tensor([prompt]))
    executor = tiny.paged.executor
    for place in range(7):
        executor.step(torch.tensor([text(9, 7)]), state, None)  # tried, and not kept
        copies = [state.clone()] if place % 2 else []
        for each in [state, *copies]:
            logits = tiny.paged.decode(torch.tensor([[said[place]]]), each)[:, 0]
            assert int(logits.argmax()) == said[place + 1]
            assert each.rows[0][ALL].length == 7 + place
        state.pool.pools[ALL].check([each.rows[0][ALL] for each in [state, *copies]])
        for each in copies:
            each.release()


def test_fewer_tokens_may_be_kept_than_were_run(tiny):
    prompt = text(6)
    said = tiny.said(prompt, 8)
    _, state = tiny.paged.prefill(torch.tensor([prompt]))
    tiny.paged.executor.step(torch.tensor([[*said[:3], *text(9, 7)]]), state, None)
    state.advance(torch.tensor([3]))
    assert (state.rows[0][ALL].length, len(state.rows[0][ALL].pages)) == (9, 3)
    for place in range(3, 7):
        logits = tiny.paged.decode(torch.tensor([[said[place]]]), state)[:, 0]
        assert int(logits.argmax()) == said[place + 1]


def test_twins_write_in_a_pool_with_room_for_one_copy(tiny):
    prompt = text(6)
    _, state = tiny.paged.prefill(torch.tensor([prompt]))
    assert state.pool.pools[ALL].pages == 2
    state.select(torch.tensor([0, 0]))
    state.growing = False
    with pytest.raises(OutOfPages) as caught:
        state.prepare(1)
    assert caught.value.needed == 1
    state.pool.extend(ALL, 1)
    tokens = torch.tensor([[8], [9]])
    found = tiny.paged.decode(tokens, state)[:, 0].argmax(dim=-1).tolist()
    assert found == [tiny.said([*prompt, token], 1)[0] for token in (8, 9)]


# ---------------------------------------------------------------------- any order of events

PROMPTS = [[7], [7, 8], [7, 8, 9, 10], [7, 8, 9, 10, 11], [7, 8, 9, 11, 12, 13, 14], [5, 6, 5, 6, 5, 6, 5, 6, 5]]
STEPS = []  # how many sequences ran in each step that the state machine made


class Batches(RuleBasedStateMachine):
    """A pool of few pages of two tokens. Each sequence is compared with the same one alone, without pages."""

    @initialize(
        pages=st.integers(5, 14),
        max_batch=st.integers(2, 4),
        when_full=st.sampled_from(["error", "swap", "swap"]),
        share=st.booleans(),
    )
    def begin(self, pages, max_batch, when_full, share):
        self.pair = pair_of("tiny", 2)
        self.engine = self.pair.paged.engine(pages, max_batch, when_full, share)
        self.begun = {}  # id -> the text after which its seed began, the seed
        self.over = set()
        self.step_of_executor = self.pair.paged.executor.step
        self.add(PROMPTS[2], 9, 1)
        self.add(PROMPTS[4], 12, 0)

    def pick(self, data, ids):
        return data.draw(st.sampled_from(sorted(ids)))

    def live(self):
        return set(self.begun) - self.over

    @rule(prompt=st.sampled_from(PROMPTS), new=st.integers(1, 14), seed=st.sampled_from([None, 0, 1]))
    def add(self, prompt, new, seed):
        soon = len(prompt) + (new > 1)
        try:
            id = self.engine.add(prompt, max_new_tokens=new, stop=(), sample=seed is not None, seed=seed)
        except OutOfPages:
            assert -(-soon // 2) > self.engine.memory.pools[ALL].pages
            return
        self.begun[id] = list(prompt), seed, len(prompt) + new

    @precondition(lambda self: self.live())
    @rule(count=st.integers(1, 6))
    def step(self, count):
        self.steps(count)

    @rule(prompts=st.lists(st.sampled_from(PROMPTS), min_size=2, max_size=5), seed=st.sampled_from([0, 1]))
    def add_some_and_step(self, prompts, seed):
        for number, prompt in enumerate(prompts):
            self.add(prompt, 8 + number, seed + number)
        self.steps(3)

    def steps(self, count):
        for _ in range(count):
            before, running = everything(self.engine), self.engine.running
            try:
                produced = self.engine.step()
            except OutOfPages as error:
                needy = error.sequence
                if self.engine.when_full == "error":
                    assert everything(self.engine) == before
                self.live().remove(needy)
                self.engine.cancel(needy)
                del self.begun[needy]
                continue
            STEPS.append(len(running))
            self.learn(produced, before[3])
            if self.engine.when_full == "error":
                given = [p.id for p in produced]
                assert all(given.count(id) == 1 for id in running)

    def learn(self, produced, before):
        after = {id: list(tokens) for id, (tokens, _) in before.items()}
        for id, token, finished in produced:
            after[id].append(token)
            base, seed, longest = self.begun[id]
            assert after[id] == base + self.pair.said(base, len(after[id]) - len(base), seed)
            assert finished == ("length" if len(after[id]) == longest else "")
            if finished:
                self.over.add(id)
        assert after == {id: self.engine.tokens(id) for id in after}

    @precondition(lambda self: self.live())
    @rule(data=st.data(), seed=st.sampled_from([2, 3]))
    def fork(self, data, seed):
        first = self.pick(data, self.live())
        twin = self.engine.fork(first, seed=seed)
        base, own, longest = self.begun[first]
        self.begun[twin] = (base, None, longest) if own is None else (self.engine.tokens(first), seed, longest)

    @precondition(lambda self: len(self.begun) > 3)
    @rule(data=st.data())
    def cancel(self, data):
        id = self.pick(data, self.begun)
        self.engine.cancel(id)
        del self.begun[id]
        self.over.discard(id)

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data())
    def preempt(self, data):
        id = self.pick(data, self.engine.running)
        self.engine._preempt(self.engine._sequences[id])

    @rule(after=st.booleans())
    def fail(self, after):
        executor, real = self.pair.paged.executor, self.step_of_executor
        before = everything(self.engine)[3]

        def failing(ids, state, *rest):
            if after:
                real(ids, state, *rest)
            else:
                state.prepare(ids.shape[1], rest[1] if len(rest) > 1 else None)
            raise RuntimeError("on purpose")

        executor.step = failing
        try:
            if self.live():
                with pytest.raises((OutOfPages, RuntimeError), match=r"on purpose|pages are needed"):
                    self.engine.step()
        finally:
            executor.step = real
        assert everything(self.engine)[3] == before

    @invariant()
    def nothing_is_lost(self):
        check(self.engine)

    def teardown(self):
        if hasattr(self, "engine"):
            emptied(self.engine)


TestBatches = Batches.TestCase
TestBatches.settings = settings(max_examples=200, stateful_step_count=50, deadline=None, derandomize=True)
