"""Continuous batching: sequences of different lengths join and leave a running batch, over one pool of pages.

A step is one token for every running sequence, whatever its length (iteration-level scheduling: Orca, Yu et al., OSDI
2022). Their keys and values lie in pages of one pool (PagedAttention, Kwon et al. 2023, arXiv 2309.06180), so a
sequence takes memory as it grows and gives it back when it ends; sequences that begin alike share the pages of their
prefix, and forks share everything until they part (copy on write).
"""

from __future__ import annotations

import copy
from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvpass.errors import RequestError
from kvpass.ir.plan import CachePlan
from kvpass.runtime.generation import config_for_generation, generation_config
from kvpass.runtime.paged import Kind, PagedMemory, PagedState, Tables
from kvpass.runtime.pages import ABSENT, OutOfPages, Table, Usage
from kvpass.runtime.transformed import CHUNK

if TYPE_CHECKING:
    from kvpass.runtime.transformed import Transformed

LITTLE = 256  # tokens of several prompts, padding included, that are run together however much of them is padding
Ending = Literal["", "length", "stop"]


class Produced(NamedTuple):
    """One token of one sequence.

    Attributes:
        id: the sequence.
        token: its new token.
        finished: why the sequence is over: "length" (`max_new_tokens` are there) or "stop" (the token is one of
            `stop`); "" when it goes on.
    """

    id: int
    token: int
    finished: Ending


@dataclass(frozen=True)
class KindUsage:
    """What the pages of one kind of store are used for.

    Attributes:
        pages: counts of pages and tokens; see `pages.Usage`.
        page_bytes: bytes of one page in all stores of the kind.
    """

    pages: Usage
    page_bytes: int

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that sequences hold."""
        return self.pages.used * self.page_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the pool, with the one page that takes what is written for padding."""
        return (self.pages.pages + 1) * self.page_bytes


@dataclass(eq=False)
class _Sequence:
    """A sequence wherever it is.

    Attributes:
        tokens: the prompt and what was produced. While it runs, all but the last are in the cache.
        longest: tokens, prompt included, at which it ends.
        processors, warpers: what is done to its logits, in this order.
        generator: what its tokens are drawn with; None for the likeliest.
        tables: the block table of each kind.
        host: what its pages hold, while it is swapped out.
        ending: why it is over.
    """

    id: int
    tokens: list[int]
    longest: int
    stop: frozenset[int]
    processors: LogitsProcessorList
    warpers: LogitsProcessorList
    generator: torch.Generator | None
    tables: Tables = field(default_factory=dict)
    host: dict[Kind, list[Tensor]] = field(default_factory=dict)
    ending: Ending = ""


class Engine:
    """A running batch over a paged cache; `Transformed.engine` makes one.

    Not for several threads at once. After an error nothing is half done: a sequence is where it was, `cancel` and
    `step` go on, and every page has its owner.

    Args:
        model: a model whose plan has `PageKV`.
        pages: pages in the pool of each kind of store, one number or one per kind (window, sinks).
        max_batch: sequences that run together.
        when_full: what happens when a sequence needs a page and there is none: "error" raises `OutOfPages`; "swap"
            copies the youngest sequence to host memory until there is room again.
        share_prefixes: keep full pages findable by their text, so that prompts that begin alike share them. Where
            stores have windows, or differ in what they keep, nothing is shared.
        capacity: tokens of all sequences together to make pages for, instead of `pages`; by default `max_batch`
            sequences as long as the model's positions, 2048 at most.

    Raises:
        RequestError: the cache is not paged, or numbers that hold nothing.
    """

    def __init__(
        self,
        model: Transformed,
        *,
        pages: int | Mapping[Kind, int] | None = None,
        max_batch: int = 8,
        when_full: Literal["error", "swap"] = "error",
        share_prefixes: bool = True,
        capacity: int | None = None,
    ) -> None:
        plan = model.plan
        if not any(c.page for c in plan):
            raise RequestError(
                "sequences join and leave a batch over a cache of pages, and this model's is not paged",
                fix="add PageKV() to the recipe",
            )
        if max_batch < 1:
            raise RequestError(f"max_batch must be at least 1, not {max_batch}")
        if when_full not in ("error", "swap"):
            raise RequestError(f"there is no when_full={when_full!r}", fix="choose 'error' or 'swap'")
        if pages is not None and capacity is not None:
            raise RequestError("pages and capacity say the same twice", fix="give one of them")
        if capacity is not None and capacity < 1:
            raise RequestError(f"capacity must be at least 1, not {capacity}")
        self.model = model
        self.max_batch = max_batch
        self.when_full = when_full
        if pages is None:
            longest = min(model.program.facts.max_positions or CHUNK, CHUNK)
            pages = _pages(plan, capacity or max_batch * longest, max_batch)
        kinds = _kinds(plan)
        if isinstance(pages, int):
            pages = dict.fromkeys(kinds, pages)
        if set(pages) != kinds:
            raise RequestError(
                f"pages are given for {sorted(pages)}, and stores keep {sorted(kinds)} (window, sinks)",
                fix="give one number, or one for each of these",
            )
        self.memory = PagedMemory(plan, dict(pages), model.device)
        self.share_prefixes = share_prefixes and kinds == {(0, 0)}
        self._ids = 0
        self._sequences: dict[int, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._swapped: list[_Sequence] = []  # the first to come back first
        self._produced: deque[Produced] = deque()
        self._state: PagedState | None = None  # over the running sequences, as long as they are the same
        self._stop: frozenset[int] | None = None

    # ------------------------------------------------------------------ sequences

    def add(
        self,
        prompt: Tensor | Sequence[int],
        *,
        max_new_tokens: int = 64,
        stop: int | Iterable[int] | None = None,
        processors: LogitsProcessorList | None = None,
        sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> int:
        """Queue a sequence.

        Args:
            prompt: [S] token ids.
            max_new_tokens: tokens after which it is over.
            stop: ids that end it; by default those of the model's generation config, none where it has none.
            processors: what changes its logits, called with (its tokens [1, S], float32 logits [1, V]).
            sample: draw tokens instead of taking the likeliest.
            temperature, top_k, top_p: Hugging Face's warpers of that name, in this order, after `processors`.
            seed: what the drawn tokens follow from, whatever else runs; by default from torch's global generator.

        Returns:
            its id.

        Raises:
            RequestError: no prompt that the model could read, or options that contradict each other.
            OutOfPages: the prompt does not fit into the whole pool.
        """
        tokens = self._tokens(prompt)
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        warpers = _warpers(temperature, top_k, top_p)
        if warpers and not sample:
            raise RequestError("temperature, top_k and top_p change what is drawn", fix="add sample=True")
        longest = len(tokens) + max_new_tokens
        self.model.executor.check_length(longest - 1)
        for kind, pool in self.memory.pools.items():
            needed = _peak(kind, 0, _soon(tokens, longest), self.memory.page)
            if needed > pool.pages:
                raise OutOfPages(needed, pool.pages, pool.pages, fix="shorten the prompt, or make a larger pool")
        generator = None
        if sample:
            generator = torch.Generator(self.model.device)
            generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        sequence = _Sequence(
            self._ids,
            tokens,
            longest,
            self._stops(stop),
            LogitsProcessorList(processors or ()),
            warpers,
            generator,
        )
        self._ids += 1
        self._sequences[sequence.id] = sequence
        self._waiting.append(sequence)
        return sequence.id

    def fork(self, id: int, *, seed: int | None = None) -> int:
        """A second sequence that goes on from where this one is, with the same limits and processors.

        It shares all pages with the first; each page that either writes to is copied then. Where `max_batch` sequences
        run already it waits among the swapped ones, in pages of its own.

        Args:
            id: the first sequence; not a finished one.
            seed: what the tokens that it draws follow from; by default the first one's seed and the new id.

        Returns:
            its id.
        """
        first = self._find(id)
        if first.ending:
            raise RequestError(f"sequence {id} is over", fix="add its tokens as a prompt")
        generator = None
        if first.generator is not None:
            generator = torch.Generator(self.model.device)
            derived = (first.generator.initial_seed() + (self._ids + 1) * 0x9E3779B97F4A7C15) % 2**63
            generator.manual_seed(derived if seed is None else seed)
        twin = _Sequence(
            self._ids,
            list(first.tokens),
            first.longest,
            first.stop,
            copy.deepcopy(first.processors),
            first.warpers,
            generator,
        )
        if first in self._waiting:
            self._waiting.append(twin)
        elif first in self._running and len(self._running) < self.max_batch:
            twin.tables = {k: pool.fork(first.tables[k]) for k, pool in self.memory.pools.items()}
            self._running.append(twin)
            self._state = None
        else:
            twin.host = dict(first.host) if first.host else self._take(first)
            twin.tables = {kind: _on_host(table) for kind, table in first.tables.items()}
            self._swapped.append(twin)  # it has the highest id
        self._ids += 1
        self._sequences[twin.id] = twin
        return twin.id

    def cancel(self, id: int) -> None:
        """End a sequence wherever it is, and forget it and its tokens; finished ones too."""
        sequence = self._find(id)
        del self._sequences[id]
        if sequence.ending:
            return
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._running:
            self._leave(sequence)
        else:
            self._swapped.remove(sequence)
            self._release(sequence)

    def tokens(self, id: int) -> list[int]:
        """The prompt of a sequence and what was produced."""
        return list(self._find(id).tokens)

    @property
    def running(self) -> list[int]:
        """Sequences that get a token in every step."""
        return [s.id for s in self._running]

    @property
    def waiting(self) -> list[int]:
        """Sequences that have not begun, first come first."""
        return [s.id for s in self._waiting]

    @property
    def swapped(self) -> list[int]:
        """Sequences in host memory, the first to come back first."""
        return [s.id for s in self._swapped]

    @property
    def finished(self) -> dict[int, Ending]:
        """Why sequences are over, for those not cancelled since."""
        return {s.id: s.ending for s in self._sequences.values() if s.ending}

    def usage(self) -> dict[Kind, KindUsage]:
        """What the pages of each kind are used for, in pages, tokens and bytes."""
        used = self.memory.usage([s.tables for s in self._running])
        return {kind: KindUsage(usage, self.memory.page_bytes(kind)) for kind, usage in used.items()}

    # ------------------------------------------------------------------ steps

    def step(self) -> list[Produced]:
        """Let in who waits, where there is room, and give every running sequence one more token.

        A sequence that is let in gets its first token from its prompt and its second in the same step. Swapped ones
        come before waiting ones.

        Raises:
            OutOfPages: a sequence (`sequence` names it) needs a page that the pool cannot give. Nothing has changed:
                cancel one and step again.
        """
        self._advance()
        produced, self._produced = list(self._produced), deque()
        return produced

    def __iter__(self) -> Iterator[Produced]:
        """Tokens as they come, until nothing is left to do."""
        while self._produced or self._waiting or self._running or self._swapped:
            if not self._produced:
                self._advance()
            while self._produced:
                yield self._produced.popleft()

    def run(self) -> dict[int, list[int]]:
        """Step until nothing is left.

        Returns:
            the tokens of all finished sequences, prompts included.
        """
        for _ in self:
            pass
        return {id: self.tokens(id) for id in self.finished}

    def _advance(self) -> None:
        self._make_room()
        self._bring_back()
        self._admit()
        self._decode()

    def _make_room(self) -> None:
        """See that one more token per running sequence fits."""
        while self._running and (short := self._short()) is not None:
            if self.when_full == "error":
                raise short
            for sequence in self._running:
                for kind in self.memory.kinds:
                    self._check_alone(sequence, kind)
            self._preempt(max(self._running, key=lambda s: s.id))

    def _short(self) -> OutOfPages | None:
        """What is missing for one more token per running sequence, naming the first that would go without."""
        for kind, pool in self.memory.pools.items():
            if len(self._running) <= pool.available:  # nobody needs more than one
                continue
            tables = [s.tables[kind] for s in self._running]
            needed = pool.needed_by_all(tables, [1] * len(tables))
            if needed <= pool.available:
                continue
            for count, sequence in enumerate(self._running, 1):
                if pool.needed_by_all(tables[:count], [1] * count) > pool.available:
                    return OutOfPages(
                        needed,
                        pool.available,
                        pool.pages,
                        sequence=sequence.id,
                        fix="cancel a sequence and step again; when_full='swap', or a larger pool, avoids it",
                    )
        return None

    def _check_alone(self, sequence: _Sequence, kind: Kind) -> None:
        """Raise where a sequence's next token would not fit into the whole pool."""
        pool, table = self.memory.pools[kind], sequence.tables[kind]
        blocks = set(table.on_host) | {block for block, page in enumerate(table.pages) if page != ABSENT}
        needed = len(blocks) + self._blocks(table.length + 1) - len(table.pages)
        if needed > pool.pages:
            raise OutOfPages(
                needed, pool.pages, pool.pages, sequence=sequence.id, fix="cancel it, or make a larger pool"
            )

    def _preempt(self, sequence: _Sequence) -> None:
        """Move a running sequence to the host."""
        sequence.host = self._take(sequence)
        for kind, pool in self.memory.pools.items():
            pool.swap_out(sequence.tables[kind])
        self._running.remove(sequence)
        self._state = None
        insort(self._swapped, sequence, key=lambda s: s.id)

    def _take(self, sequence: _Sequence) -> dict[Kind, list[Tensor]]:
        """What the pages of a running sequence hold, on the host."""
        return {
            kind: self.memory.take(kind, [page for page in table.pages if page != ABSENT])
            for kind, table in sequence.tables.items()
        }

    def _bring_back(self) -> None:
        """Swapped sequences return, while there is room for them and for everybody's next token."""
        while self._swapped and len(self._running) < self.max_batch:
            sequence = self._swapped[0]
            for kind, pool in self.memory.pools.items():
                table = sequence.tables[kind]
                tables = [s.tables[kind] for s in self._running]
                needed = len(table.on_host) + self._blocks(table.length + 1) - len(table.pages)
                needed += pool.needed_by_all(tables, [1] * len(tables))
                if needed > pool.available:
                    if not self._running:
                        self._check_alone(sequence, kind)
                    return
            tables_in: list[Table] = []
            try:
                for kind, pool in self.memory.pools.items():
                    pages = pool.swap_in(sequence.tables[kind])
                    tables_in.append(sequence.tables[kind])
                    self.memory.put(kind, pages, sequence.host[kind])
            except BaseException:
                for (_, pool), table in zip(self.memory.pools.items(), tables_in, strict=False):
                    pool.swap_out(table)
                raise
            sequence.host = {}
            self._swapped.pop(0)
            self._running.append(sequence)
            self._state = None
            self._register(sequence)

    # ------------------------------------------------------------------ prompts

    def _admit(self) -> None:
        """Read the prompts of waiting sequences, first come first served, while there is room."""
        while self._waiting and not self._swapped and len(self._running) < self.max_batch:
            chosen: list[_Sequence] = []
            try:
                self._choose_prompts(chosen)
                if not chosen:
                    return
                tokens = self._read_prompts(chosen)
            except BaseException:
                for sequence in reversed(chosen):
                    self._release(sequence)
                    self._waiting.appendleft(sequence)
                raise
            for sequence, token in zip(chosen, tokens, strict=True):
                self._running.append(sequence)
                self._register(sequence)
                self._take_token(sequence, token)
            self._state = None

    def _choose_prompts(self, chosen: list[_Sequence]) -> None:
        """Take waiting sequences that are read together, with the pages that hold their prefixes already.

        They begin at the same position, take no more than `CHUNK` tokens with padding, of which that is at most a
        fifth or they are few anyway, and no two of them go on alike: the second finds the pages of the first in the
        next round.
        """
        page = self.memory.page
        taken = {
            kind: pool.needed_by_all([s.tables[kind] for s in self._running], [1] * len(self._running))
            for kind, pool in self.memory.pools.items()
        }
        begun: set[tuple[int, ...]] = set()
        start = longest = total = 0
        while self._waiting and len(self._running) + len(chosen) < self.max_batch:
            sequence = self._waiting[0]
            self._begin(sequence)
            try:
                tokens, known = sequence.tokens, next(iter(sequence.tables.values())).length
                size, real = max(longest, len(tokens) - known), total + len(tokens) - known
                needed = {kind: _peak(kind, known, _soon(tokens, sequence.longest), page) for kind in taken}
                fits = all(taken[k] + needed[k] <= pool.available for k, pool in self.memory.pools.items())
                begin = tuple(tokens[: known + page])
                padded = size * (len(chosen) + 1)
                joins = known == start and begin not in begun and padded <= min(CHUNK, max(LITTLE, real * 5 // 4))
                joins = joins or not chosen
            except BaseException:
                self._release(sequence)
                raise
            if not (fits and joins):
                self._release(sequence)
                assert fits or chosen or self._running, "an empty pool has no room for what `add` let in"
                return
            chosen.append(self._waiting.popleft())
            taken = {kind: taken[kind] + needed[kind] for kind in taken}
            if self.share_prefixes:
                begun.add(begin)
            start, longest, total = known, size, real

    def _begin(self, sequence: _Sequence) -> None:
        if self.share_prefixes:
            sequence.tables = {k: pool.match_prefix(sequence.tokens) for k, pool in self.memory.pools.items()}
        else:
            sequence.tables = {kind: Table() for kind in self.memory.kinds}

    def _read_prompts(self, sequences: list[_Sequence]) -> list[int]:
        """Run what is not in the cache of prompts that begin at the same position; the first token of each."""
        device, executor = self.model.device, self.model.executor
        start = next(iter(sequences[0].tables.values())).length
        counts = [len(s.tokens) - start for s in sequences]
        longest = max(counts)
        ids = torch.zeros((len(sequences), longest), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : counts[row]] = torch.tensor(sequence.tokens[start:])
        ids = ids.to(device)
        ends = torch.tensor(counts)
        stops = (start + ends).to(device) if min(counts) < longest else None
        rows = [s.tables for s in sequences]
        state = PagedState.of(self.memory, rows, torch.full((len(rows),), start, dtype=torch.long, device=device))
        logits = torch.empty(0)
        for begin in range(0, longest, CHUNK):  # several prompts fit into one chunk
            end = min(begin + CHUNK, longest)
            last = (ends - 1 - begin).clamp(max=end - begin - 1).to(device)
            logits = executor.step(ids[:, begin:end], state, last, stops)[:, 0]
            state.lengths = torch.full_like(state.lengths, start + end)
            state.refresh()
        return self._choose_tokens(sequences, logits)

    # ------------------------------------------------------------------ tokens

    def _decode(self) -> None:
        """One token for every running sequence."""
        if not self._running:
            return
        device = self.model.device
        if self._state is None:
            lengths = torch.tensor([len(s.tokens) - 1 for s in self._running], device=device)
            self._state = PagedState.of(self.memory, [s.tables for s in self._running], lengths)
        state = self._state
        ids = torch.tensor([[s.tokens[-1]] for s in self._running], device=device)
        try:
            logits = self.model.executor.decode(ids, state)[:, 0]
            tokens = self._choose_tokens(self._running, logits)
        except BaseException:
            state.settle()
            self._state = None
            raise
        state.advance(1)
        for sequence, token in zip(list(self._running), tokens, strict=True):
            if len(sequence.tokens) % self.memory.page == 0:
                self._register(sequence)
            self._take_token(sequence, token)

    def _choose_tokens(self, sequences: list[_Sequence], logits: Tensor) -> list[int]:
        """The next token of each sequence from logits [B, V]. Where that fails, no generator has moved."""
        chosen = logits.argmax(dim=-1)
        before = [(s.generator, s.generator.get_state()) for s in sequences if s.generator is not None]
        sequence = None
        try:
            for row, sequence in enumerate(sequences):
                if not sequence.processors and sequence.generator is None:
                    continue
                scores = logits[row : row + 1].float()
                if sequence.processors:
                    scores = sequence.processors(torch.tensor([sequence.tokens], device=scores.device), scores)
                if sequence.generator is None:
                    chosen[row] = scores.argmax(dim=-1)[0]
                    continue
                if sequence.warpers:
                    scores = sequence.warpers(chosen.new_empty((1, 0)), scores)  # they do not look at tokens
                drawn = torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=sequence.generator)
                chosen[row] = drawn[0, 0]
            return list(chosen.tolist())
        except BaseException as error:
            for generator, held in before:
                generator.set_state(held)
            if sequence is not None:
                error.add_note(f"while a token of sequence {sequence.id} was chosen")
            raise

    def _take_token(self, sequence: _Sequence, token: int) -> None:
        """Record a token of a running sequence, which may end it."""
        sequence.tokens.append(token)
        if token in sequence.stop:
            sequence.ending = "stop"
        elif len(sequence.tokens) >= sequence.longest:
            sequence.ending = "length"
        self._produced.append(Produced(sequence.id, token, sequence.ending))
        if sequence.ending:
            self._leave(sequence)

    def _register(self, sequence: _Sequence) -> None:
        """Let others share the full pages of a sequence, which are written."""
        if self.share_prefixes:
            for kind, pool in self.memory.pools.items():
                pool.register(sequence.tables[kind], sequence.tokens)

    def _leave(self, sequence: _Sequence) -> None:
        """Take a sequence out of the running batch."""
        self._running.remove(sequence)
        self._state = None
        self._release(sequence)

    def _release(self, sequence: _Sequence) -> None:
        """Give back all that a sequence holds."""
        for kind, table in sequence.tables.items():
            self.memory.pools[kind].release(table)
        sequence.tables, sequence.host = {}, {}

    # ------------------------------------------------------------------ numbers

    def _blocks(self, length: int) -> int:
        """Blocks that `length` tokens take."""
        return -(-length // self.memory.page)

    def _find(self, id: int) -> _Sequence:
        if id not in self._sequences:
            raise RequestError(f"there is no sequence {id}", fix="it was cancelled, or `add` never gave that id")
        return self._sequences[id]

    def _tokens(self, prompt: Tensor | Sequence[int]) -> list[int]:
        ids = torch.as_tensor(prompt)
        if ids.dim() != 1:
            raise RequestError(
                f"a prompt is one row of token ids, not {tuple(ids.shape)}", fix="add sequences one by one"
            )
        if not len(ids):
            raise RequestError("the prompt is empty", fix="give at least one token")
        tokens: list[int] = self.model._ids(ids.unsqueeze(0))[0].tolist()
        return tokens

    def _stops(self, stop: int | Iterable[int] | None) -> frozenset[int]:
        if isinstance(stop, int):
            return frozenset([stop])
        if stop is not None:
            return frozenset(stop)
        if self._stop is None:
            facts = self.model.program.facts
            own = generation_config(facts.folder, config_for_generation(facts.config, facts.vocab_size)).eos_token_id
            self._stop = frozenset([own] if isinstance(own, int) else own or ())
        return self._stop


def _kinds(plan: CachePlan) -> set[Kind]:
    layouts = [plan.layout(owner) for owner in plan.owners()]
    return {(layout.window, layout.sinks) for layout in layouts}


def _soon(tokens: Sequence[int], longest: int) -> int:
    """Tokens that the cache holds once a prompt was read and its first token, if that is not the last, was too."""
    return len(tokens) + (longest > len(tokens) + 1)


def _peak(kind: Kind, known: int, length: int, page: int) -> int:
    """Pages that a sequence takes at most on its way from `known` tokens, whole pages, to `length`: a chunk of a prompt
    is written as a whole before a window moves on."""
    window, sinks = kind
    if not window:
        return -(-length // page) - known // page
    most = 0
    for begin in range(0, length, CHUNK):
        dropped = max(0, (begin + 1 - max(window, 2)) // page - -(-sinks // page))
        most = max(most, -(-min(begin + CHUNK, length) // page) - dropped)
    return most


def _pages(plan: CachePlan, capacity: int, sequences: int) -> dict[Kind, int]:
    """Pages per kind for so many tokens of all sequences together; of a window no more than they can fill."""
    page = next(c.page for c in plan if c.page)
    found = {}
    for window, sinks in _kinds(plan):
        found[window, sinks] = -(-capacity // page)
        if window:
            held = -(-sinks // page) + (window + page - 2) // page + 2
            reading = -(-min(CHUNK, capacity) // page)
            found[window, sinks] = min(found[window, sinks], sequences * held + reading)
    return found


def _on_host(table: Table) -> Table:
    """The table of a copy in host memory of what a sequence has, in the pool or on the host."""
    held = [block for block, page in enumerate(table.pages) if page != ABSENT]
    return Table([ABSENT] * len(table.pages), table.length, on_host=held or list(table.on_host))


def _warpers(temperature: float | None, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    """Hugging Face's warpers, where they do something, in the order in which its `generate` applies them."""
    found = LogitsProcessorList()
    try:
        if temperature is not None and temperature != 1.0:
            found.append(TemperatureLogitsWarper(temperature))
        if top_k is not None and top_k != 0:
            found.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1.0:
            found.append(TopPLogitsWarper(top_p))
    except ValueError as error:
        raise RequestError(str(error), fix="temperature > 0, top_k >= 1, 0 < top_p <= 1") from error
    return found
