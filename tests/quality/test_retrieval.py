"""Retrieval against models whose memory is known exactly, and against a decoder trained here."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import MistralConfig, MistralForCausalLM

import kvpass
from kvpass.calibration import encode, load_tokenizer, read_text
from kvpass.errors import CheckError, RequestError
from kvpass.quality import (
    ALPHABET,
    Alphabet,
    HuggingFaceModel,
    RecallBatch,
    planted_fact,
    recall,
    recall_task,
    retrieval_table,
    train_recall_model,
)

BOOKWORM = str(Path(__file__).parents[2] / "examples" / "bookworm")
SMALL = Alphabet(filler=8, keys=8, values=8)


class Lookup:
    """A dictionary as a decoder: the last value seen behind a key, in the last `window` tokens of the context."""

    def __init__(self, window=None, alphabet=ALPHABET):
        self.window, self.alphabet = window, alphabet

    def prefill(self, input_ids, lengths=None):
        state = {"held": input_ids[:, -(self.window or input_ids.shape[1]) :].clone()}
        return self._logits(state, input_ids[:, -1:])[:, 0], state

    def decode(self, input_ids, state):
        return self._logits(state, input_ids)

    def _logits(self, state, ids):
        logits = torch.zeros(*ids.shape, self.alphabet.vocab_size)
        for row, tokens in enumerate(state["held"].tolist()):
            known = dict(itertools.pairwise(tokens))
            for column, token in enumerate(ids[row].tolist()):
                logits[row, column, known.get(token, 0)] = 1
        return logits


class Prompter:
    """Knows the sequences by heart, but for the positions in `forgets`."""

    def __init__(self, tokens, vocab_size, forgets=()):
        self.tokens, self.vocab_size, self.forgets = tokens, vocab_size, forgets

    def prefill(self, input_ids, lengths=None):
        rows = [int((self.tokens[:, : input_ids.shape[1]] == row).all(1).nonzero()[0]) for row in input_ids]
        state = {"rows": rows, "at": input_ids.shape[1] - 1}
        return self.decode(input_ids[:, -1:], state)[:, 0], state

    def decode(self, input_ids, state):
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, source in enumerate(state["rows"]):
            for column in range(input_ids.shape[1]):
                where = state["at"] + column
                token = 0 if (source, where) in self.forgets else int(self.tokens[source, where + 1])
                logits[row, column, token] = 1
        state["at"] += input_ids.shape[1]
        return logits


class Forgetful(HuggingFaceModel):
    """A decoder whose values of the first `lost` tokens of context are zeroed."""

    def __init__(self, source, lost):
        super().__init__(source)
        self.lost = lost

    def prefill(self, input_ids, lengths=None):
        logits, state = super().prefill(input_ids, lengths)
        for layer in state.cache.layers:
            layer.values[:, :, : self.lost] = 0
        return logits, state


# ---------------------------------------------------------------------- the task


def test_facts_lie_in_the_context_and_are_asked_for_behind_it():
    task = recall_task(seed=3, count=20, length=40, pairs=6, queries=4)
    assert task.tokens.shape == (20, 40 + 8)
    for row in range(20):
        tokens = task.tokens[row].tolist()
        context = tokens[:40]
        keys = [t for t in context if ALPHABET.first_key <= t < ALPHABET.first_value]
        assert len(set(keys)) == len(keys) == 6
        for query in range(4):
            place, answer = int(task.query_positions[row, query]), int(task.answers[row, query])
            where = round(float(task.depths[row, task.facts[row, query]]) * 38)
            assert context[where : where + 2] == [tokens[place], answer]
            assert tokens[place + 1] == answer
            assert answer >= ALPHABET.first_value


def test_facts_stand_everywhere():
    depths = recall_task(count=400, length=30, pairs=5).depths.flatten()
    assert depths.min() == 0
    assert depths.max() == 1
    assert torch.histc(depths, 4, 0, 1).min() > 0.15 * depths.numel()


def test_a_full_context_is_possible():
    task = recall_task(count=3, length=12, pairs=6)
    assert recall({"all": Lookup()}, task)["all"].accuracy == 1


def test_the_seed_decides():
    first, again, other = (recall_task(seed=s).tokens for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "sizes", [{"pairs": 25}, {"pairs": 9, "length": 17}, {"queries": 9}, {"queries": 0}, {"count": 0}, {"pairs": 0}]
)
def test_impossible_tasks(sizes):
    with pytest.raises(RequestError):
        recall_task(**sizes)


# ---------------------------------------------------------------------- scoring


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_what_is_out_of_the_window_is_lost(chunk):
    task = recall_task(seed=1, count=40, length=64, pairs=8)
    results = recall({"all": Lookup(), "half": Lookup(window=32)}, task, batch=7, chunk=chunk)
    assert results["all"].accuracy == 1
    assert results["all"].by_depth == (1, 1, 1, 1)
    assert results["all"].facts == 320
    held = task.depths * 62 >= 32
    assert results["half"].accuracy == pytest.approx(float(held.double().mean()))
    early, second, third, last = results["half"].by_depth
    assert (early, last) == (0, 1)
    assert second < 0.1
    assert third > 0.9
    share = held.double().mean(dim=1)
    assert results["half"].accuracy_se == pytest.approx(float(share.std() / math.sqrt(40)))


def test_bytes_stand_beside_the_accuracy():
    task = recall_task(count=10, length=64, pairs=8)
    result = recall({"all": Lookup()}, task, batch=4)["all"]
    assert result.bytes_per_sequence == 64 * 8  # this state is the tokens themselves, int64
    assert result.bytes_per_token == 8
    assert result.used_bytes_per_token == 8


def test_a_fact_counts_when_all_its_tokens_are_right():
    tokens = torch.tensor([[5, 1, 2, 3, 4], [6, 1, 2, 3, 0]])
    task = RecallBatch(
        tokens=tokens,
        context=2,
        query_positions=torch.tensor([[1, 2, 3], [1, 2, 1]]),
        answers=torch.tensor([[2, 3, 4], [2, 3, -1]]),
        facts=torch.zeros(2, 3, dtype=torch.long),
        depths=torch.tensor([[0.1], [0.9]], dtype=torch.float64),
    )
    models = {
        "knows": Prompter(tokens, 7),
        "slips": Prompter(tokens, 7, {(0, 3)}),
        "unasked": Prompter(tokens, 7, {(1, 3)}),
        "first": Prompter(tokens, 7, {(1, 1)}),
    }
    results = recall(models, task)
    assert [r.accuracy for r in results.values()] == [1, 0.5, 1, 0.5]
    assert results["slips"].by_depth[0] == 0
    assert results["first"].by_depth[0] == 1
    assert results["first"].by_depth[3] == 0
    assert math.isnan(results["knows"].by_depth[1])
    assert json.loads(json.dumps(results["knows"].to_dict(), allow_nan=False))["by_depth"] == [1, None, None, 1]


def test_wrong_requests():
    task = recall_task(count=2)
    with pytest.raises(RequestError, match="no models"):
        recall({}, task)
    with pytest.raises(RequestError, match="batch"):
        recall({"a": Lookup()}, task, batch=0)
    with pytest.raises(RequestError, match="different vocabularies"):
        recall({"a": Lookup(), "b": Lookup(alphabet=SMALL)}, recall_task(count=2, pairs=1, alphabet=SMALL))
    inside = RecallBatch(task.tokens, 100, task.query_positions, task.answers, task.facts, task.depths)
    with pytest.raises(RequestError, match="inside its context"):
        recall({"a": Lookup()}, inside)


# ---------------------------------------------------------------------- a decoder trained for it


@pytest.fixture(scope="module")
def trained():
    return train_recall_model(0, length=24, pairs=4, alphabet=SMALL, target=0.9)


@pytest.fixture(scope="module")
def small_task():
    return recall_task(seed=9, count=64, length=24, pairs=4, alphabet=SMALL)


def test_a_trained_decoder_recalls_and_a_cut_cache_forgets(trained, small_task):
    config = MistralConfig(**{**trained.config.to_dict(), "sliding_window": 6, "model_type": "mistral"})
    windowed = MistralForCausalLM(config).eval()
    windowed.load_state_dict(trained.state_dict())
    models = {
        "original": HuggingFaceModel(trained),
        "ours": kvpass.transform(trained, [], device="cpu", progress=False),
        "half lost": Forgetful(trained, 12),
        "all lost": Forgetful(trained, 24),
        "windowed": HuggingFaceModel(windowed),
    }
    results = recall(models, small_task)
    accuracy = {name: result.accuracy for name, result in results.items()}
    assert accuracy["original"] > 0.9  # chance is 1/8, or 1/4 for one of the values in the context
    assert accuracy["ours"] == accuracy["original"]
    assert accuracy["half lost"] < accuracy["original"] - 0.3
    assert accuracy["all lost"] < 0.3
    assert accuracy["windowed"] < 0.6
    early, *_, last = results["half lost"].by_depth
    assert early < 0.4 < 0.8 < last
    assert results["ours"].used_bytes_per_token == results["original"].bytes_per_token


def test_training_is_reproducible_and_leaves_the_global_generator_alone():
    sizes = {"hidden": 16, "heads": 2, "head_dim": 8, "length": 16, "pairs": 2, "steps": 3, "target": 0.0}
    sizes["alphabet"] = SMALL
    with pytest.raises(CheckError, match="after 3 steps"):
        train_recall_model(4, **{**sizes, "length": 96})
    before = torch.get_rng_state()
    first, again, other = (train_recall_model(s, **sizes).state_dict() for s in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("sizes", [{"layers": 1}, {"pairs": 30}, {"pairs": 8, "length": 20}, {"steps": 0}])
def test_training_that_cannot_work(sizes):
    with pytest.raises(RequestError):
        train_recall_model(**sizes)


# ---------------------------------------------------------------------- a pass key in text


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BOOKWORM)


@pytest.fixture(scope="module")
def book():
    return read_text(f"{BOOKWORM}/heldout.txt")


def test_a_pass_key_in_a_book(tokenizer, book):
    task = planted_fact(tokenizer, book, count=6, length=128)
    assert task.context == 128
    for row in range(6):
        context = tokenizer.decode(task.tokens[row, :128])
        asked = task.answers[row] >= 0
        answer = tokenizer.decode(task.answers[row][asked]).strip()
        assert len(answer) == 5
        assert answer.isdigit()
        assert f"The pass key is {answer}. Remember it" in context
        place = context.index("The pass key is") / len(context)
        assert place == pytest.approx(float(task.depths[row, 0]), abs=0.25)
        places = task.query_positions[row][asked]
        assert torch.equal(task.tokens[row, places + 1], task.answers[row][asked])
        question = tokenizer.decode(task.tokens[row, 128 : int(places[0]) + 1])
        assert question.rstrip().endswith("What is the pass key? The pass key is")
    assert task.depths.flatten().tolist() == pytest.approx([(i + 0.5) / 6 for i in range(6)])
    known = recall({"known": Prompter(task.tokens, 4096)}, task)["known"]
    assert known.accuracy == 1
    assert known.facts == 6


def test_the_filler_of_a_pass_key_is_the_text(tokenizer, book):
    task = planted_fact(tokenizer, book, count=2, length=64, depth=0.0)
    text = encode(tokenizer, book).tolist()
    tail = task.tokens[0, 54:64].tolist()
    assert any(text[i : i + 10] == tail for i in range(len(text)))
    assert tokenizer.decode(task.tokens[0, :4]).startswith(" The pass")


def test_bookworm_is_asked_and_does_not_know(tokenizer, book):
    model = HuggingFaceModel(BOOKWORM, device="cpu")
    result = recall({"bookworm": model}, planted_fact(tokenizer, book, count=4, length=96))["bookworm"]
    assert result.accuracy < 0.5
    console = Console(width=140)
    with console.capture() as printed:
        console.print(retrieval_table({"bookworm": result}))
    assert "4 facts in contexts of 96 tokens" in printed.get()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 12}, "no room"),
        ({"filler_text": "Too short."}, "filler text has"),
        ({"fact": "Nothing."}, "does not hold the key"),
        ({"depth": 1.5}, "from 0 to 1"),
        ({"count": 0}, "at least 1"),
    ],
)
def test_wrong_pass_keys(tokenizer, book, changes, message):
    arguments = {"filler_text": book, **changes}
    with pytest.raises(RequestError, match=message):
        planted_fact(tokenizer, **arguments)
