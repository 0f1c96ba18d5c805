"""Continuation scores against direct computations, and measured bytes against the plan."""

import copy
import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import kvpass
from kvpass.calibration import token_stream
from kvpass.errors import RequestError, SourceError
from kvpass.quality import HuggingFaceModel, cache_bytes, continuation, table
from kvpass.quality.measures import kl_divergence, text_windows

BOOKWORM = str(Path(__file__).parents[2] / "examples" / "bookworm")
VOCAB = 97
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def tiny(seed=0, vocab_size=VOCAB):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, "vocab_size": vocab_size})).eval()


def windowed(window=6):
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**TINY, num_key_value_heads=2, sliding_window=window)).eval()


def noisy(model, scale):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return other


def stream(count, seed=0, vocab_size=VOCAB):
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def transform(source):
    return kvpass.transform(source, [], device="cpu", verify="off", progress=False)


def direct(model, rows, context):
    """Log-probabilities [W, n, V] of the tokens after the context, by one forward over everything."""
    with torch.no_grad():
        logits = model(rows).logits
    return logits[:, context - 1 : -1].double().log_softmax(-1)


SIZES = {"context": 20, "continuation": 9, "windows": 5, "batch": 2}


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("kind", ["transformed", "hugging face"])
def test_likelihood_equals_a_full_forward(kind, chunk):
    model, tokens = tiny(), stream(200)
    scored = transform(model) if kind == "transformed" else HuggingFaceModel(model)
    score = continuation({"model": scored}, tokens, chunk=chunk, **SIZES)["model"]
    rows = text_windows(tokens, 20, 9, 5)
    logp = direct(model, rows, 20)
    nll = -logp.gather(2, rows[:, 20:, None]).squeeze(2).mean(dim=1)
    assert score.nll == pytest.approx(float(nll.mean()), abs=1e-5)
    assert score.nll_se == pytest.approx(float(nll.std() / math.sqrt(5)), abs=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.nll))
    assert (score.windows, score.context, score.continuation) == (5, 20, 9)


def test_bookworm_likelihood_equals_a_full_forward():
    tokens = token_stream(f"{BOOKWORM}/heldout.txt", BOOKWORM)
    sizes = {"context": 48, "continuation": 16, "windows": 4, "batch": 4}
    models = {"original": HuggingFaceModel(BOOKWORM, device="cpu"), "ours": transform(BOOKWORM)}
    scores = continuation(models, tokens, **sizes)
    plain = AutoModelForCausalLM.from_pretrained(BOOKWORM, dtype=torch.float32).eval()
    rows = text_windows(tokens, 48, 16, 4)
    expected = float(-direct(plain, rows, 48).gather(2, rows[:, 48:, None]).mean())
    assert scores["original"].nll == pytest.approx(expected, abs=1e-5)
    assert scores["ours"].nll == pytest.approx(expected, abs=1e-5)
    assert expected < 5.5  # chance is 8.3
    assert scores["ours"].kl < 1e-5
    assert scores["ours"].top1 == 1
    assert scores["ours"].used_bytes_per_token == scores["original"].bytes_per_token


def test_a_model_against_itself():
    model = HuggingFaceModel(tiny())
    scores = continuation({"a": model, "b": model}, stream(200), **SIZES)
    for score in scores.values():
        assert (score.kl, score.kl_se, score.top1, score.nll_delta, score.nll_delta_se) == (0, 0, 1, 0, 0)
        assert score.reference == "a"


def test_differences_are_paired_with_the_reference():
    model, tokens = tiny(), stream(300)
    other = noisy(model, 0.3)
    models = {"noisy": HuggingFaceModel(other), "original": HuggingFaceModel(model)}
    scores = continuation(models, tokens, reference="original", **SIZES)
    assert list(scores) == ["noisy", "original"]
    rows = text_windows(tokens, 20, 9, 5)
    expected, found = direct(model, rows, 20), direct(other, rows, 20)
    wanted = rows[:, 20:, None]
    delta = (expected - found).gather(2, wanted).squeeze(2).mean(dim=1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean(dim=1)
    score = scores["noisy"]
    assert score.nll_delta == pytest.approx(float(delta.mean()), abs=1e-5)
    assert score.nll_delta_se == pytest.approx(float(delta.std() / math.sqrt(5)), abs=1e-5)
    assert score.kl == pytest.approx(float(kl.mean()), abs=1e-5)
    assert score.kl > 0.01
    assert score.kl_se == pytest.approx(float(kl.std() / math.sqrt(5)), abs=1e-5)
    assert score.top1 == pytest.approx(float((expected.argmax(-1) == found.argmax(-1)).double().mean()))
    assert score.top1 < 1


def test_more_noise_more_divergence():
    model = tiny()
    models = {"original": HuggingFaceModel(model)}
    models |= {str(scale): HuggingFaceModel(noisy(model, scale)) for scale in (0.03, 0.1, 0.3)}
    kl = [score.kl for score in continuation(models, stream(200), **SIZES).values()]
    assert kl[0] == 0
    assert kl == sorted(kl)


def test_bytes_are_those_of_the_plan_and_of_what_lies_beside():
    model = tiny()
    ours = transform(model)
    scores = continuation({"original": HuggingFaceModel(model), "ours": ours}, stream(200), **SIZES)
    planned = ours.plan.bytes(1, 20)
    lengths = 8  # one int64 per row
    assert scores["ours"].bytes_per_sequence == planned + lengths
    assert scores["ours"].bytes_per_token == (planned + lengths) / 20
    assert scores["ours"].used_bytes_per_token == ours.plan.bytes_per_token()
    assert scores["original"].bytes_per_sequence == planned
    _, state = ours.prefill(stream(30).reshape(3, 10), torch.tensor([10, 4, 7]))
    assert cache_bytes(state).allocated == ours.plan.bytes(3, 10) + 3 * lengths
    assert cache_bytes(state).used == ours.plan.bytes(1, 21)


def test_bytes_count_each_storage_once_and_whole():
    class Side:
        __slots__ = ("scales",)

        def __init__(self, scales):
            self.scales = scales

    keys = torch.zeros(4, 100)
    side = Side(torch.zeros(7, dtype=torch.int8))
    state = {"layers": [(keys, keys[:, :10]), side], "self": None, "module": torch.nn.Linear(5, 5)}
    state["self"] = state
    assert cache_bytes(state).allocated == 4 * 100 * 4 + 7
    assert cache_bytes(state).used == 4 * 100 * 4 + 4 * 10 * 4 + 7


@pytest.mark.parametrize("build", [tiny, windowed])
def test_rows_of_different_lengths(build):
    model = build()
    scored, ids, more = HuggingFaceModel(model), stream(36).reshape(3, 12), stream(12, seed=1).reshape(3, 4)
    counts = [12, 5, 9]
    logits, state = scored.prefill(ids, torch.tensor(counts))
    first, second = scored.decode(more[:, :3], state), scored.decode(more[:, 3:], state)
    assert state.lengths == [16, 9, 13]
    for row, count in enumerate(counts):
        with torch.no_grad():
            whole = model(torch.cat([ids[row, :count], more[row]])[None]).logits[0, count - 1 :]
        found = torch.cat([logits[row : row + 1], first[row], second[row]])
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


def test_a_model_in_training_stays_so():
    model = tiny().train()
    HuggingFaceModel(model).prefill(stream(8).reshape(1, 8))
    assert model.training


def test_windows_cover_the_text_without_overlap():
    rows = text_windows(torch.arange(103), 6, 4, 7)
    assert rows.shape == (7, 10)
    assert rows[0, 0] == 0
    assert rows[-1, -1] == 102
    assert bool((rows[1:, 0] > rows[:-1, -1]).all())
    assert text_windows(torch.arange(35), 6, 4, 7).shape == (3, 10)


def test_divergence_where_a_token_is_impossible():
    expected = torch.tensor([0.5, 0.5, 0.0]).log()
    assert float(kl_divergence(expected, torch.tensor([0.25, 0.25, 0.5]).log())) == pytest.approx(math.log(2))
    assert float(kl_divergence(expected, torch.tensor([1.0, 0.0, 0.0]).log())) == math.inf


def test_a_single_window_has_no_standard_error():
    score = continuation({"a": HuggingFaceModel(tiny())}, stream(29), **SIZES)["a"]
    assert score.windows == 1
    assert math.isnan(score.nll_se)
    assert json.loads(json.dumps(score.to_dict(), allow_nan=False))["nll_se"] is None


def test_the_table_prints():
    model = tiny()
    models = {"a": HuggingFaceModel(model), "b": HuggingFaceModel(noisy(model, 0.1))}
    scores = continuation(models, stream(200), **SIZES)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(scores))
    text = console.export_text()
    assert f"{scores['b'].nll:.4f}" in text
    assert "5 windows, 20 + 9 tokens" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": stream(28)}, "28 tokens"),
        ({"context": 0}, "context must be at least 1"),
        ({"continuation": 0}, "continuation must be at least 1"),
        ({"windows": 0}, "windows must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"tokens": stream(100).reshape(2, 50)}, "integers"),
        ({"tokens": torch.rand(100)}, "integers"),
        ({"tokens": stream(100) + VOCAB}, "outside the vocabulary"),
        ({"reference": "c"}, "no model 'c'"),
        ({"models": {}}, "no models"),
        ({"models": {"a": HuggingFaceModel(tiny()), "b": HuggingFaceModel(tiny(vocab_size=99))}}, "a 97, b 99"),
    ],
)
def test_wrong_requests(changes, message):
    arguments = {"models": {"a": HuggingFaceModel(tiny())}, "tokens": stream(100), **SIZES, **changes}
    with pytest.raises(RequestError, match=message):
        continuation(arguments.pop("models"), arguments.pop("tokens"), **arguments)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(SourceError, match="no causal language model"):
        HuggingFaceModel(tmp_path)
