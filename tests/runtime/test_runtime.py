"""The cache and generation: whatever order tokens arrive in, the numbers are those of one pass over the whole."""

from __future__ import annotations

import pytest
import torch

import decoders
import families
import kvpass
from kvpass.errors import RequestError
from kvpass.ir.check import compare
from kvpass.passes import GroupHeads
from properties import forward as whole

SAME = 1e-5


def ids(rows=3, length=24, seed=1):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama():
    return kvpass.transform(families.build("llama"), progress=False)


@pytest.fixture(scope="module")
def sliding():
    return kvpass.transform(decoders.DECODERS["window_alternating"](), progress=False)


def assert_same(found, expected, what="the cache"):
    error = compare(expected, found)
    assert error < SAME, f"{what} changes the logits by {error:.1e} of their spread"


# ---------------------------------------------------------------------- the cache


@pytest.mark.parametrize("fixture", ["llama", "sliding"])
def test_the_cache_grows_beyond_its_capacity(fixture, request):
    model, tokens = request.getfixturevalue(fixture), ids(length=40)
    expected = whole(model, tokens)
    _, state = model.prefill(tokens[:, :4])
    assert state.capacity == 4
    before = state.allocated_bytes()
    for place in range(4, 40):
        assert_same(model.decode(tokens[:, place : place + 1], state)[:, 0], expected[:, place], f"growth at {place}")
    assert state.capacity >= 40
    assert state.allocated_bytes() > before
    assert state.used_bytes() == model.plan.bytes(3, 40) <= 3 * 40 * model.plan.bytes_per_token()


def test_room_that_was_asked_for_is_there_and_is_not_grown(llama):
    _, state = llama.prefill(ids(length=5), capacity=32)
    kept = state.stores[0][0]
    llama.decode(ids(length=27, seed=2), state)
    assert state.capacity == 32
    assert state.stores[0][0] is kept


@pytest.mark.parametrize("chunk", [1, 5, 23, 24, 100])
@pytest.mark.parametrize("fixture", ["llama", "sliding"])
def test_prefill_in_chunks_equals_prefill_at_once(fixture, chunk, request):
    model, tokens = request.getfixturevalue(fixture), ids()
    logits, state = model.prefill(tokens, chunk=chunk)
    expected = whole(model, torch.cat([tokens, ids(length=2, seed=7)], dim=1))
    assert_same(logits, expected[:, 23], f"a chunk of {chunk}")
    assert_same(model.decode(ids(length=2, seed=7), state), expected[:, 24:], f"what follows a chunk of {chunk}")


@pytest.mark.parametrize("fixture", ["llama", "sliding"])
def test_several_tokens_are_decoded_at_once(fixture, request):
    model, tokens = request.getfixturevalue(fixture), ids()
    expected = whole(model, tokens)
    _, state = model.prefill(tokens[:, :3])
    place = 3
    for count in (2, 7, 1, 11):
        assert_same(model.decode(tokens[:, place : place + count], state), expected[:, place : place + count])
        place += count
    assert state.lengths.tolist() == [24, 24, 24]


@pytest.mark.parametrize("fixture", ["llama", "sliding"])
@pytest.mark.parametrize("chunk", [4, 100])
def test_a_ragged_batch_goes_on_as_its_rows_would_alone(fixture, chunk, request):
    model, tokens = request.getfixturevalue(fixture), ids()
    lengths = torch.tensor([5, 12, 1])
    logits, state = model.prefill(tokens[:, :12], lengths, chunk=chunk)
    more = ids(length=9, seed=3)
    parts = [logits.unsqueeze(1), model.decode(more[:, :1], state), model.decode(more[:, 1:6], state)]
    parts += [model.decode(more[:, i : i + 1], state) for i in range(6, 9)]
    together = torch.cat(parts, dim=1)
    assert state.lengths.tolist() == [14, 21, 10]
    for row, length in enumerate(lengths.tolist()):
        alone = whole(model, torch.cat([tokens[row : row + 1, :length], more[row : row + 1]], dim=1))
        assert_same(together[row], alone[0, length - 1 :], f"row {row} of a ragged batch")


def test_the_padding_of_a_ragged_batch_is_never_read(llama):
    tokens, lengths = ids(), torch.tensor([5, 12, 1])
    other = tokens.clone()
    for row, length in enumerate(lengths.tolist()):
        other[row, length:] = 90
    found = []
    for prompt in (tokens, other):
        logits, state = llama.prefill(prompt, lengths)
        found.append(torch.cat([logits.unsqueeze(1), llama.decode(ids(length=2, seed=4), state)], dim=1))
    assert torch.equal(*found)


@pytest.mark.parametrize("fixture", ["llama", "sliding"])
def test_rows_may_be_reordered_repeated_and_dropped(fixture, request):
    model, tokens = request.getfixturevalue(fixture), ids()
    _, state = model.prefill(tokens[:, :8], torch.tensor([8, 6, 3]))
    state.select(torch.tensor([2, 0, 0]))
    assert state.lengths.tolist() == [3, 8, 8]
    more = ids(length=3, seed=5)
    found = model.decode(more, state)
    for row, source in enumerate([2, 0, 0]):
        prompt = tokens[source : source + 1, : [8, 6, 3][source]]
        alone = whole(model, torch.cat([prompt, more[row : row + 1]], dim=1))
        assert_same(found[row], alone[0, -3:], f"row {row}, once row {source},")
    state.select(torch.tensor([1]))
    assert state.batch == 1
    assert not state.ragged
    last = ids(rows=1, length=2, seed=6)
    alone = whole(model, torch.cat([tokens[:1, :8], more[1:2], last], dim=1))
    assert_same(model.decode(last, state), alone[:, -2:], "a row that was left alone")


def test_a_clone_lives_its_own_life(llama):
    tokens = ids()
    _, state = llama.prefill(tokens[:, :8])
    copy = state.clone()
    expected = whole(llama, tokens)
    llama.decode(ids(length=5, seed=9), state)
    assert copy.lengths.tolist() == [8, 8, 8]
    assert_same(llama.decode(tokens[:, 8:], copy), expected[:, 8:], "what happened to the original of a clone")


def test_two_states_of_one_model_do_not_meet(llama):
    a, b = ids(), ids(seed=2)
    _, first = llama.prefill(a[:, :9])
    _, second = llama.prefill(b[:, :4])
    for place in range(3):
        assert_same(llama.decode(a[:, 9 + place : 10 + place], first)[:, 0], whole(llama, a)[:, 9 + place])
        assert_same(llama.decode(b[:, 4 + place : 5 + place], second)[:, 0], whole(llama, b)[:, 4 + place])


# ---------------------------------------------------------------------- generation as transformers does it

GREEDY = ["llama", "gpt2", "bloom", "gemma2", "mistral"]


@pytest.fixture(scope="module", params=GREEDY)
def pair(request):
    model = families.build(request.param)
    return model, kvpass.transform(model, progress=False)


def padded(rows=3, length=9, lengths=(9, 4, 6)):
    tokens = ids(rows, length)
    mask = torch.ones_like(tokens)
    for row, real in enumerate(lengths):
        tokens[row, : length - real] = 0
        mask[row, : length - real] = 0
    return tokens, mask


def test_greedy_generation_is_that_of_transformers(pair):
    model, slim = pair
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids(), attention_mask=torch.ones(3, 24, dtype=torch.long), **options)
    assert slim.generate(ids(), **options).tolist() == expected.tolist()


def test_padded_prompts_generate_as_in_transformers(pair):
    model, slim = pair
    tokens, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert slim.generate(tokens, **options).tolist() == model.generate(tokens, **options).tolist()


def test_beams_are_those_of_transformers(pair):
    model, slim = pair
    tokens, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    options |= {"num_return_sequences": 2, "length_penalty": 0.5}
    assert slim.generate(tokens, **options).tolist() == model.generate(tokens, **options).tolist()


def test_sampling_with_a_seed_is_that_of_transformers(pair):
    model, slim = pair
    tokens, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
    found = []
    for source in (slim, model, slim):
        torch.manual_seed(11)
        found.append(source.generate(tokens, **options).tolist())
    assert found[0] == found[2], "the same seed gave other tokens"
    assert found[0] == found[1], "transformers samples other tokens"


def test_generation_stops_at_the_end_token(pair):
    model, slim = pair
    greedy = model.generate(ids(1), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 24:].tolist()
    end = greedy[5]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    found = slim.generate(ids(1), **options)[0, 24:].tolist()
    assert found == greedy[: greedy.index(end) + 1]
    rows = slim.generate(ids(), **options)
    assert (
        rows.tolist() == model.generate(ids(), attention_mask=torch.ones(3, 24, dtype=torch.long), **options).tolist()
    )


def test_what_was_generated_is_what_forward_would_choose():
    slim = kvpass.transform(families.build("llama_mha"), [GroupHeads(2)], progress=False)
    out = slim.generate(ids(), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(whole(slim, out)[:, 23:-1].argmax(-1), out[:, 24:])


def test_without_a_limit_generation_ends_after_64_tokens(llama):
    assert llama.generate(ids(1, 4), do_sample=False, eos_token_id=None).shape == (1, 68)


def test_a_module_that_transformers_does_not_know_generates_too(sliding):
    out = sliding.generate(ids(2, 5), max_new_tokens=9, do_sample=False)
    assert torch.equal(whole(sliding, out)[:, 4:-1].argmax(-1), out[:, 5:])


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2"])
def test_gradients_are_those_of_the_original(name):
    model = families.build(name)
    slim = kvpass.transform(model, progress=False)
    tokens = ids()
    weights = {n: w for n, w in slim.executor.weights().items() if isinstance(w, torch.nn.Parameter)}
    for weight in weights.values():
        weight.requires_grad_(True)

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    loss(slim(tokens)).backward()
    loss(model(tokens).logits).backward()
    compared = 0
    for key, parameter in model.named_parameters():
        held = weights.get(key, weights.get(f"{key}.folded"))  # the latter is 1 + weight, in gemma's norms
        if held is not None and held.shape == parameter.shape:
            assert held.grad is not None, f"no gradient reaches {key}"
            spread = float(parameter.grad.abs().max())
            error = float((held.grad - parameter.grad).abs().max())
            assert error < 1e-4 * spread + 1e-7, f"the gradient of {key} is off by {error:.1e} of {spread:.1e}"
            compared += 1
    assert compared >= 0.8 * len(weights), f"only {compared} of {len(weights)} weights have the model's own names"


# ---------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(2, 5), "integers [batch, length], not torch.float32 (2, 5)"),
        (torch.zeros(5, dtype=torch.long), "not torch.int64 (5,)"),
        (torch.zeros(2, 5, 1, dtype=torch.long), "not torch.int64 (2, 5, 1)"),
        (torch.zeros(2, 5, dtype=torch.bool), "not torch.bool"),
        (torch.full((2, 5), 97), "token id 97 is outside the vocabulary of 97"),
        (torch.full((2, 5), -1), "token id -1 is outside the vocabulary of 97"),
    ],
)
@pytest.mark.parametrize("entry", ["forward", "prefill", "decode", "generate"])
def test_what_are_no_token_ids_is_refused_everywhere(entry, tokens, words, llama):
    def call():
        if entry == "forward":
            return llama(tokens)
        if entry == "decode":
            return llama.decode(tokens, llama.prefill(ids(2))[1])
        return getattr(llama, entry)(tokens)

    with pytest.raises(RequestError) as found:
        call()
    assert words in found.value.what
    assert found.value.fix
    assert found.value.exit_status == 2


def test_token_ids_of_every_integer_kind_are_taken(llama):
    expected = whole(llama, ids())
    assert torch.equal(whole(llama, ids().int()), expected)
    assert torch.equal(whole(llama, ids().to(torch.uint8)), expected)


def test_an_empty_prompt_is_refused(llama):
    empty = torch.zeros(2, 0, dtype=torch.long)
    with pytest.raises(RequestError, match="the prompt is empty"):
        llama.prefill(empty)
    with pytest.raises(RequestError):
        llama.generate(empty, max_new_tokens=2)
    with pytest.raises(RequestError, match="no tokens to decode"):
        llama.decode(empty, llama.prefill(ids(2))[1])
    with pytest.raises(RequestError):
        llama.prefill(torch.zeros(0, 4, dtype=torch.long))


@pytest.mark.parametrize("lengths", [[0, 3, 3], [3, 25, 3], [3, 3], [-1, 3, 3], [[3, 3, 3]]])
def test_lengths_that_the_prompt_does_not_have_are_refused(lengths, llama):
    with pytest.raises(RequestError, match="lengths must be 3 numbers from 1 to 24"):
        llama.prefill(ids(), torch.tensor(lengths))


def test_a_chunk_of_nothing_is_refused(llama):
    with pytest.raises(RequestError, match="chunk must be at least 1"):
        llama.prefill(ids(), chunk=0)


def test_another_batch_than_the_states_is_refused(llama):
    _, state = llama.prefill(ids())
    before = [s[0].clone() for s in state.stores.values()]
    with pytest.raises(RequestError, match="2 rows were given to a state of 3"):
        llama.decode(ids(2, 1), state)
    assert all(torch.equal(a, b) for a, b in zip(before, [s[0] for s in state.stores.values()], strict=True))


@pytest.mark.parametrize("rows", [[0, 3], [-1, 0]])
def test_a_row_that_is_not_there_cannot_be_selected(rows, llama):
    _, state = llama.prefill(ids())
    with pytest.raises(RequestError, match="does not exist in a batch of 3"):
        state.select(torch.tensor(rows))


def test_positions_that_were_never_learned_are_refused():
    slim = kvpass.transform(families.build("gpt2"), progress=False)
    _, state = slim.prefill(ids(1, 127))
    slim.decode(ids(1, 1), state)
    with pytest.raises(RequestError, match="learned positions for 128"):
        slim.decode(ids(1, 1), state)
    assert state.lengths.tolist() == [128], "a refused step moved the state"
    with pytest.raises(RequestError, match="learned positions for 128"):
        slim.prefill(ids(1, 129))
    with pytest.raises(RequestError) as found:
        slim(ids(1, 129))
    assert "128" in str(found.value)


def test_rope_goes_beyond_the_positions_of_the_config(llama):
    tokens = ids(1, 140)
    expected = whole(llama, tokens)
    _, state = llama.prefill(tokens[:, :100])
    assert_same(llama.decode(tokens[:, 100:], state), expected[:, 100:], "a length beyond max_position_embeddings")


def test_an_entry_that_is_not_there_is_refused(llama):
    with pytest.raises(RequestError, match="there is no entry 'train'"):
        llama.graph_text("train")
    assert "kvpass.attend" in llama.graph_text("decode")


def test_a_model_that_was_released_runs_again():
    model, tokens = kvpass.transform(families.build("llama"), progress=False), ids()
    expected = model(tokens)
    before = model.executor
    model.release()
    assert torch.equal(model(tokens), expected)
    assert model.executor is not before
