"""In-context retrieval: facts planted in a context that then lies in the cache, and asked for afterwards.

Likelihood hardly notices a cache that lost single tokens; retrieval does. Two kinds of tasks have one form, a
`RecallBatch`: `recall_task` plants key-value pairs for the small model of `kvpass.quality.recall_model`, and
`planted_fact` plants a pass key in text for real models (Mohtashami and Jaggi 2023, arXiv 2305.16300).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpass.calibration import encode
from kvpass.errors import RequestError
from kvpass.quality.measures import per_token, pieces, plain, standard_error
from kvpass.quality.models import CacheBytes, Scored, check_models

if TYPE_CHECKING:
    from rich.table import Table

QUARTERS = 4


@dataclass(frozen=True)
class Alphabet:
    """Token ids of the associative-recall language: filler, then keys, then values."""

    filler: int = 16
    keys: int = 24
    values: int = 24

    @property
    def vocab_size(self) -> int:
        return self.filler + self.keys + self.values

    @property
    def first_key(self) -> int:
        return self.filler

    @property
    def first_value(self) -> int:
        return self.filler + self.keys


ALPHABET = Alphabet()


@dataclass(frozen=True)
class RecallBatch:
    """Sequences with facts in their context, and questions after it.

    Attributes:
        tokens: [N, L] the context, then questions with their answers (teacher-forced).
        context: tokens that go through prefill; the rest is decoded.
        query_positions: [N, Q] the token whose logits predict an answer token; at least context - 1.
        answers: [N, Q] the answer tokens; -1 where a row has fewer.
        facts: [N, Q] which fact an answer token belongs to; a fact is recalled when all its tokens are right.
        depths: [N, F] where each fact stands in the context, from 0 (its start) to 1 (its end).
    """

    tokens: Tensor
    context: int
    query_positions: Tensor
    answers: Tensor
    facts: Tensor
    depths: Tensor


@dataclass(frozen=True)
class Retrieval:
    """How much one model recalled.

    Attributes:
        name: what the model was called.
        accuracy: share of facts recalled, all their tokens right under greedy decoding.
        accuracy_se: its standard error over sequences; NaN for one sequence.
        by_depth: accuracy of the facts in each quarter of the context, first quarter first; NaN where there are none.
        facts: how many were asked for.
        bytes_per_token: the state after prefill as allocated, side buffers included, per token of context.
        used_bytes_per_token: the same for the entries that hold tokens.
        bytes_per_sequence: the state of one sequence after prefill, as allocated.
        context: tokens of context.
        seconds: time in this model.
    """

    name: str
    accuracy: float
    accuracy_se: float
    by_depth: tuple[float, ...]
    facts: int
    bytes_per_token: float
    used_bytes_per_token: float
    bytes_per_sequence: float
    context: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes None."""
        return plain(self)


def recall(
    models: Mapping[str, Scored], task: RecallBatch, *, batch: int = 16, chunk: int | None = None
) -> dict[str, Retrieval]:
    """Ask models for facts that lie in their cache: the context by prefill, the questions by decode.

    Args:
        models: name -> model, all over one vocabulary.
        task: what to ask.
        batch: sequences that run at a time.
        chunk: tokens per row of one decode call; by default what keeps its logits under 64 MB.

    Raises:
        RequestError: no models, models of different vocabularies, a task whose questions lie inside its context.
    """
    check_models(models)
    if batch < 1:
        raise RequestError(f"batch must be at least 1, not {batch}")
    count, length = task.tokens.shape
    asked = task.answers >= 0
    if not 1 <= task.context < length or not bool(asked.any()):
        raise RequestError(f"the task has no questions after its context of {task.context} tokens")
    places = task.query_positions - (task.context - 1)
    if int(places[asked].min()) < 0 or int(places[asked].max()) >= length - task.context:
        raise RequestError(
            "the task asks inside its context, or behind its end",
            fix=f"query positions lie from {task.context - 1} to {length - 2}",
        )
    states: dict[str, list[CacheBytes]] = {name: [] for name in models}
    seconds: dict[str, float] = dict.fromkeys(models, 0.0)
    picked: dict[str, list[Tensor]] = {name: [] for name in models}
    for rows in task.tokens.split(batch):
        parts: dict[str, list[Tensor]] = {name: [] for name in models}
        for _, _, logits in pieces(models, rows, task.context, chunk, states, seconds):
            for name, found in logits:
                parts[name].append(found.argmax(dim=-1).cpu())
        for name, columns in parts.items():
            picked[name].append(torch.cat(columns, dim=1))
    results = {}
    for name in models:
        choices = torch.cat(picked[name])  # [N, L - context]
        right = choices.gather(1, places.clamp(0, choices.shape[1] - 1)) == task.answers
        results[name] = _result(name, task, right, asked, states[name], seconds[name], count)
    return results


def _result(
    name: str, task: RecallBatch, right: Tensor, asked: Tensor, states: list[CacheBytes], seconds: float, count: int
) -> Retrieval:
    wrong = torch.zeros(task.depths.shape, dtype=torch.long)
    wrong.scatter_add_(1, task.facts, (asked & ~right).long())
    tokens = torch.zeros_like(wrong).scatter_add_(1, task.facts, asked.long())
    wanted = tokens > 0  # [N, F]
    recalled = wanted & (wrong == 0)
    quarter = (task.depths * QUARTERS).long().clamp(0, QUARTERS - 1)
    by_depth = []
    for index in range(QUARTERS):
        here = wanted & (quarter == index)
        by_depth.append(float(recalled[here].double().mean()) if bool(here.any()) else math.nan)
    allocated, used, sequence = per_token(states, task.context, count)
    rows = wanted.any(dim=1)
    by_row = (recalled.sum(dim=1).double() / wanted.sum(dim=1).clamp_min(1))[rows]
    return Retrieval(
        name=name,
        accuracy=float(recalled[wanted].double().mean()),
        accuracy_se=standard_error(by_row),
        by_depth=tuple(by_depth),
        facts=int(wanted.sum()),
        bytes_per_token=allocated,
        used_bytes_per_token=used,
        bytes_per_sequence=sequence,
        context=task.context,
        seconds=seconds,
    )


def retrieval_table(results: Mapping[str, Retrieval]) -> Table:
    """Results side by side, for a terminal."""
    from rich.table import Table

    rows = list(results.values())
    shape = f"{rows[0].facts} facts in contexts of {rows[0].context} tokens" if rows else ""
    view = Table(title=f"retrieval ({shape}; ± is one standard error)")
    view.add_column("model")
    for heading in ("cache B/token", "recalled", "1st quarter", "2nd", "3rd", "4th", "seconds"):
        view.add_column(heading, justify="right")
    for result in rows:
        depths = ["" if math.isnan(value) else f"{value:.1%}" for value in result.by_depth]
        spread = "" if math.isnan(result.accuracy_se) else f" ± {result.accuracy_se:.1%}"
        view.add_row(
            result.name,
            f"{result.bytes_per_token:,.1f}",
            f"{result.accuracy:.1%}{spread}",
            *depths,
            f"{result.seconds:.1f}",
        )
    return view


# ---------------------------------------------------------------------- key-value pairs


def recall_task(
    seed: int = 0,
    count: int = 64,
    length: int = 96,
    pairs: int = 8,
    *,
    queries: int | None = None,
    alphabet: Alphabet = ALPHABET,
) -> RecallBatch:
    """Key-value pairs planted at random depths in a stream of filler, and asked for at the end.

    Args:
        seed: of everything random.
        count: sequences N.
        length: tokens of context.
        pairs: facts per sequence; their keys differ.
        queries: keys asked for, in random order; all of them where None.
        alphabet: the token ids.

    Raises:
        RequestError: pairs that do not fit into the context or the alphabet, more queries than pairs.
    """
    asked = pairs if queries is None else queries
    if count < 1 or pairs < 1 or not 1 <= asked <= pairs:
        raise RequestError(
            f"count {count}, pairs {pairs} and queries {asked} are not possible",
            fix="take at least one sequence and one pair, and ask for 1 to `pairs` of them",
        )
    if pairs > alphabet.keys or 2 * pairs > length:
        raise RequestError(
            f"{pairs} pairs do not fit: the alphabet has {alphabet.keys} keys, the context {length} tokens",
            fix=f"take at most {min(alphabet.keys, length // 2)} pairs",
        )
    return plant(torch.Generator().manual_seed(seed), count, length, pairs, asked, alphabet)


def plant(random: torch.Generator, count: int, length: int, pairs: int, asked: int, alphabet: Alphabet) -> RecallBatch:
    """`recall_task` from a generator; the sizes are taken to be right."""
    context = torch.randint(0, alphabet.filler, (count, length), generator=random)
    keys = torch.rand(count, alphabet.keys, generator=random).argsort(dim=1)[:, :pairs] + alphabet.first_key
    values = torch.randint(0, alphabet.values, (count, pairs), generator=random) + alphabet.first_value
    # a pair takes two tokens: draw places in a context that is `pairs` tokens shorter, then make room
    places = torch.rand(count, length - pairs, generator=random).argsort(dim=1)[:, :pairs].sort(dim=1).values
    places = places + torch.arange(pairs)
    context.scatter_(1, places, keys).scatter_(1, places + 1, values)
    order = torch.rand(count, pairs, generator=random).argsort(dim=1)[:, :asked]
    answers = values.gather(1, order)
    questions = torch.stack([keys.gather(1, order), answers], dim=2).reshape(count, 2 * asked)
    positions = (length + 2 * torch.arange(asked)).expand(count, asked)
    return RecallBatch(
        tokens=torch.cat([context, questions], dim=1),
        context=length,
        query_positions=positions.contiguous(),
        answers=answers,
        facts=order,
        depths=places.double() / max(1, length - 2),
    )


# ---------------------------------------------------------------------- a pass key in text

FACT = " The pass key is {key}. Remember it: {key} is the pass key."
QUESTION = " What is the pass key? The pass key is"


def planted_fact(
    tokenizer: Any,
    filler_text: str,
    *,
    count: int = 16,
    length: int = 512,
    digits: int = 5,
    fact: str = FACT,
    question: str = QUESTION,
    depth: float | None = None,
    seed: int = 0,
) -> RecallBatch:
    """A pass key planted in text, and asked for behind it.

    Args:
        tokenizer: the models' own.
        filler_text: ordinary text; each sequence takes another stretch of it.
        count: sequences N.
        length: tokens of context: filler, the fact, and the token that begins a text where the tokenizer has one.
        digits: of the pass key.
        fact: the planted sentence; {key} stands for the pass key.
        question: what comes after the context; the answer follows after a space.
        depth: where the fact stands, from 0 to 1; spread evenly over the sequences where None.
        seed: of the keys and the stretches of text.

    Raises:
        RequestError: too little text, a context too short for the fact, a fact without {key}, a depth outside 0..1.
    """
    if "{key}" not in fact:
        raise RequestError("the fact does not hold the key", fix="write {key} where the pass key belongs")
    if count < 1 or digits < 1:
        raise RequestError(f"count {count} and digits {digits} must be at least 1")
    if depth is not None and not 0 <= depth <= 1:
        raise RequestError(f"depth must be from 0 to 1, not {depth}")
    text = encode(tokenizer, filler_text)
    begin = _begin(tokenizer)
    random = torch.Generator().manual_seed(seed)
    contexts, tails, splits, depths = [], [], [], []
    for index in range(count):
        key = "".join(str(int(d)) for d in torch.randint(0, 10, (digits,), generator=random))
        planted = encode(tokenizer, fact.format(key=key))
        room = length - begin.numel() - planted.numel()
        if room < 1:
            raise RequestError(
                f"a context of {length} tokens has no room beside the fact's {planted.numel()}",
                fix=f"take a length of at least {length - room + 1}",
            )
        if text.numel() < room:
            raise RequestError(
                f"the filler text has {text.numel()} tokens; {room} are needed",
                fix="give a longer text, or a shorter length",
            )
        start = int(torch.randint(0, text.numel() - room + 1, (1,), generator=random))
        filler = text[start : start + room]
        where = depth if depth is not None else (index + 0.5) / count
        cut = round(where * room)
        contexts.append(torch.cat([begin, filler[:cut], planted, filler[cut:]]))
        depths.append(where)
        asked, tail = encode(tokenizer, question), encode(tokenizer, f"{question} {key}")
        same = 0  # the answer is what the key adds, also where it changes how the end of the question is cut
        while same < min(asked.numel(), tail.numel()) and int(asked[same]) == int(tail[same]):
            same += 1
        tails.append(tail)
        splits.append(same)
    longest, most = max(t.numel() for t in tails), max(t.numel() - s for t, s in zip(tails, splits, strict=True))
    tokens = torch.zeros(count, length + longest, dtype=torch.long)
    positions = torch.full((count, most), length - 1)
    answers = torch.full((count, most), -1)
    for row, (context, tail, split) in enumerate(zip(contexts, tails, splits, strict=True)):
        tokens[row, :length] = context
        tokens[row, length : length + tail.numel()] = tail
        wanted = tail.numel() - split
        positions[row, :wanted] = torch.arange(length + split - 1, length + tail.numel() - 1)
        answers[row, :wanted] = tail[split:]
    return RecallBatch(
        tokens=tokens,
        context=length,
        query_positions=positions,
        answers=answers,
        facts=torch.zeros_like(answers),
        depths=torch.tensor(depths, dtype=torch.float64).unsqueeze(1),
    )


def _begin(tokenizer: Any) -> Tensor:
    """[1] the token that this tokenizer puts before a text, or [0]."""
    first = getattr(tokenizer, "bos_token_id", None)
    if first is None or list(tokenizer.encode(""))[:1] != [first]:
        return torch.zeros(0, dtype=torch.long)
    return torch.tensor([first])
