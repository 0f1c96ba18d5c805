"""SlideWindow against attention written out inside the family's own model, and against StreamingLLM's re-rotation.

The reference is `transformers`' model whose attention is replaced by a few lines over the keys and queries that it is
handed (rotated at positions of the text, in float64), one query at a time.
"""

from __future__ import annotations

import pytest
import torch

import decoders
import families
import kvpass
from kvpass.errors import PlanError, UnsupportedError
from kvpass.ir.execute import evaluate
from kvpass.ir.program import ATTENTION, placeholder
from kvpass.passes import PageKV, QuantizeKV, ShareLayers, SlideWindow
from properties import error, stateless
from properties import forward as whole
from written_out import EXACT, captured, ids, reference


def mixed(q, keys, values, scale, softcap):
    """One query [B, H, D] over keys [B, H, n, D]."""
    scores = (keys @ q.unsqueeze(-1)).squeeze(-1) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return (scores.softmax(-1).unsqueeze(2) @ values).squeeze(2)


def kept(t, window, sinks):
    """The tokens that stand in the cache when token t reads it, itself included."""
    return [j for j in range(t + 1) if not window or j > t - window or j < sinks]


def at_text_positions(per_layer):
    def read(layer, q, k, v, scale, softcap):
        out = []
        for t in range(q.shape[2]):
            where = torch.tensor(kept(t, *per_layer[layer]))
            out.append(mixed(q[:, :, t], k[:, :, where], v[:, :, where], scale, softcap))
        return torch.stack(out, dim=2)

    return read


def turned(x, positions, interleaved, channels):
    """x [.., D] whose first `channels` are turned on by so many positions, others as they are; frequencies are float32
    as the family's are, angles float64."""
    frequencies = 1.0 / 1e4 ** (torch.arange(0, channels, 2).float() / channels)
    angles = positions * frequencies.double()
    rotated, rest = x[..., :channels], x[..., channels:]
    a, b = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    a, b = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    joined = torch.stack([a, b], dim=-1).flatten(-2) if interleaved else torch.cat([a, b], dim=-1)
    return torch.cat([joined, rest], dim=-1)


def at_cache_positions(per_layer, interleaved=False, channels=8):
    """StreamingLLM: keys are cached before RoPE, then keys and query are rotated by their index in the cache."""

    def read(layer, q, k, v, scale, softcap):
        window, sinks = per_layer[layer]
        rope = (interleaved, channels)
        keys = torch.stack([turned(k[:, :, j], -j, *rope) for j in range(k.shape[2])], dim=2)
        out = []
        for t in range(q.shape[2]):
            where = kept(t, window, sinks)
            place = min(t, sinks + window - 1) if window else t
            assert place == len(where) - 1
            query = turned(q[:, :, t], place - t, *rope)
            cache = torch.stack([turned(keys[:, :, j], i, *rope) for i, j in enumerate(where)], dim=2)
            out.append(mixed(query, cache, v[:, :, torch.tensor(where)], scale, softcap))
        return torch.stack(out, dim=2)

    return read


def slid(source, *passes):
    return kvpass.transform(source, list(passes), progress=False, verify="off")


def assert_cached(slim, tokens, expected, allowed=EXACT):
    """Prefill whole, in chunks and padded, then pieces of every kind."""
    logits, state = slim.prefill(tokens[:, :3])
    assert error(logits, expected[:, 2]) < allowed
    place = 3
    for count in (1, 1, 1, 1, 1, 9, 1, 2):
        found = slim.decode(tokens[:, place : place + count], state)
        assert error(found, expected[:, place : place + count]) < allowed, f"{count} tokens from {place} on"
        place += count
    for chunk in (1, 4, 15):
        assert error(slim.prefill(tokens, chunk=chunk)[0], expected[:, -1]) < allowed, f"chunks of {chunk}"
    rows = torch.arange(2)
    for lengths in (torch.tensor([12, 5]), torch.tensor([2, 13])):
        logits, state = slim.prefill(tokens[:, : int(lengths.max())], lengths, chunk=5)
        assert error(logits, expected[rows, lengths - 1]) < allowed
        for count in (1, 1, 6, 1):
            where = state.lengths.view(-1, 1) + torch.arange(count)
            found = slim.decode(tokens[rows.view(-1, 1), where], state)
            assert error(found, expected[rows.view(-1, 1), where]) < allowed, f"{lengths.tolist()}: {count} tokens"


# ---------------------------------------------------------------------- positions of the text


TEXT = [
    ("llama", {"num_hidden_layers": 3}, SlideWindow((4, 0, 6), (2, 9, 0)), [(4, 2), (0, 0), (6, 0)]),
    ("mistral", {}, SlideWindow((3, 9), (0, 1)), [(3, 0), (5, 1)]),
    ("gpt2", {}, SlideWindow((1, 5), (3, 0)), [(1, 3), (5, 0)]),
]


@pytest.mark.parametrize(("name", "changes", "step", "per_layer"), TEXT, ids=[t[0] for t in TEXT])
def test_each_layer_reads_its_sinks_and_its_window(name, changes, step, per_layer):
    slim, tokens = slid(captured(name, **changes), step), ids()
    expected = reference(name, tokens, at_text_positions(per_layer), **changes)
    assert [(c.window, c.sinks) for c in slim.plan] == per_layer
    assert not any(c.cache_positions for c in slim.plan)
    assert error(whole(slim, tokens), expected) < EXACT
    assert_cached(slim, tokens, expected)
    assert error(expected, stateless(captured(name, **changes), tokens)) > 0.01
    state = slim.prefill(tokens)[1]
    slots = [sum(pair) if pair[0] else tokens.shape[1] for pair in per_layer]
    assert [[t.shape[2] for t in store] for store in state.stores.values()] == [[n, n] for n in slots]


def test_the_mask_of_every_layer_is_the_one_asked_for():
    slim = slid(captured("llama", num_hidden_layers=3), SlideWindow((4, 0, 6), (2, 9, 0)))
    graph = slim.program.forward
    sites = [n for n in graph.nodes if n.target is ATTENTION]
    given = {placeholder(graph, "input_ids"): ids(1, 12)}
    operands = evaluate([n.args[i] for n in sites for i in (0, 1)], given, slim.program.read)
    for layer, pair in enumerate([(4, 2), (0, 0), (6, 0)]):
        q, k = operands[2 * layer : 2 * layer + 2]
        eye = torch.eye(12, dtype=torch.float64).expand(1, 2, 12, 12)  # values that say which key was read
        weights = ATTENTION(q, k, eye, **sites[layer].kwargs)
        seen = torch.zeros(12, 12, dtype=torch.bool)
        for t in range(12):
            seen[t, kept(t, *pair)] = True
        assert torch.equal(weights[0].amin(0) > 0, seen)
        assert torch.equal(weights[0].amax(0) > 0, seen)


def test_a_window_as_long_as_the_text_changes_nothing():
    slim, tokens = captured("llama"), ids(2, 20)
    for step in (SlideWindow(20, 0), SlideWindow(16, 4), SlideWindow(16, 4, positions="cache"), SlideWindow(1, 19)):
        assert error(stateless(slid(slim, step), tokens), stateless(slim, tokens)) < EXACT
    assert error(stateless(slid(slim, SlideWindow(15, 4)), tokens), stateless(slim, tokens)) > 1e-4


def test_a_window_stays_where_it_is_narrower():
    source = captured("mistral")
    assert [(c.window, c.sinks) for c in SlideWindow(8, 3).plan(source.plan)] == [(5, 3)] * 2
    assert [(c.window, c.sinks) for c in SlideWindow(5, 3).plan(source.plan)] == [(5, 3)] * 2
    assert [(c.window, c.sinks) for c in SlideWindow((2, 0), 3).plan(source.plan)] == [(2, 3), (5, 0)]
    assert error(stateless(slid(source, SlideWindow(8, 0)), ids()), stateless(source, ids())) < EXACT


def test_lists_are_as_good_as_tuples():
    assert SlideWindow([4, 0], [1, 2]) == SlideWindow((4, 0), (1, 2))


# ---------------------------------------------------------------------- positions in the cache

CACHE = {  # rotary in halves with groups, with a norm; adjacent pairs; a part of the channels, in both ways
    "llama": (False, 8),
    "qwen3": (False, 16),
    "phi": (False, 4),
    "glm": (True, 4),
    "mistral": (False, 8),
}


@pytest.mark.parametrize("name", CACHE)
def test_positions_in_the_cache_are_streaming_llms(name):
    source, tokens = captured(name), ids()
    step = SlideWindow((6, 4), (3, 2), positions="cache")
    per_layer = [(5, 3), (4, 2)] if name == "mistral" else [(6, 3), (4, 2)]
    expected = reference(name, tokens, at_cache_positions(per_layer, *CACHE[name]))
    slim = slid(source, step)
    assert [(c.window, c.sinks, c.cache_positions) for c in slim.plan] == [(*pair, True) for pair in per_layer]
    found = whole(slim, tokens)
    assert error(found, expected) < 1e-5
    assert_cached(slim, tokens, found)
    text = stateless(slid(source, SlideWindow((6, 4), (3, 2))), tokens)
    assert error(found[:, :6], text[:, :6]) < EXACT, "nothing was forgotten yet"
    assert error(found[:, 9:], text[:, 9:]) > 0.01, "positions are those of the text"


@pytest.mark.parametrize(("window", "sinks"), [(1, 1), (8, 1), (2, 7)])
def test_the_last_position_in_the_cache_is_sinks_and_window_less_one(window, sinks):
    tokens = ids(1)
    expected = reference("llama", tokens, at_cache_positions([(window, sinks)] * 2))
    slim = slid(captured("llama"), SlideWindow(window, sinks, positions="cache"))
    assert error(whole(slim, tokens), expected) < 1e-5


def test_a_layer_without_a_window_counts_in_the_text():
    tokens = ids()
    slim = slid(captured("llama"), SlideWindow((0, 5), (4, 2), positions="cache"))
    expected = reference("llama", tokens, at_cache_positions([(0, 0), (5, 2)]))
    assert [c.cache_positions for c in slim.plan] == [False, True]
    assert error(whole(slim, tokens), expected) < 1e-5
    assert_cached(slim, tokens, whole(slim, tokens))


def test_without_sinks_both_ways_of_counting_are_one():
    slim = captured("llama")
    text, cache = (slid(slim, SlideWindow(5, 0, positions=p)) for p in ("text", "cache"))
    assert not any(c.cache_positions for c in cache.plan)
    assert cache.graph_text() == text.graph_text()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "layer 0 does not know positions by RoPE"),
        ("gpt2", "layer 0 does not know positions by RoPE"),
        ("smollm3", "layer 1 does not know positions by RoPE"),
        ("hunyuan_v1_dense", "how layer 0 knows positions cannot be shown: .* another way than a rotation"),
    ],
)
def test_positions_that_are_no_rotation_cannot_be_counted_in_the_cache(name, reason):
    source = captured(name, num_hidden_layers=2) if name == "smollm3" else captured(name)
    with pytest.raises(UnsupportedError, match=reason) as caught:
        slid(source, SlideWindow(5, 2, positions="cache"))
    assert caught.value.fix == "use positions='text'"
    assert slid(source, SlideWindow(5, 2)).plan[0].window == 5


def test_one_layer_without_rotation_may_be_left_as_it_is():
    slim = slid(captured("smollm3", num_hidden_layers=2), SlideWindow((5, 0), 2, positions="cache"))
    assert [c.cache_positions for c in slim.plan] == [True, False]
    assert_cached(slim, ids(), whole(slim, ids()))


# ---------------------------------------------------------------------- with other passes


@pytest.mark.parametrize(
    "steps",
    [
        (ShareLayers("0_0_2"), SlideWindow((5, 3, 4), 2, positions="cache")),
        (SlideWindow((5, 3, 4), 2, positions="cache"), ShareLayers("0_0_2"), QuantizeKV(8)),
        (QuantizeKV(4, layout="token"), SlideWindow(5, (2, 1, 3), positions="cache"), PageKV(3)),
        (ShareLayers("0_1_1"), SlideWindow((4, 4, 0), 1), PageKV(2)),
    ],
    ids=["shared", "shared, int8", "int4, paged", "shared, paged"],
)
def test_the_cache_of_several_passes(steps):
    slim, tokens = slid(captured("llama", num_hidden_layers=3), *steps), ids()
    assert_cached(slim, tokens, whole(slim, tokens))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (SlideWindow(-1), "window -1 and sinks 4 must not be negative"),
        (SlideWindow(4, -2), "window 4 and sinks -2 must not be negative"),
        (SlideWindow(0), "no layer gets a window"),
        (SlideWindow((0, 0)), "no layer gets a window"),
        (SlideWindow((4, 4, 4)), "window lists 3 layers, the model has 2"),
        (SlideWindow(4, (1,)), "sinks lists 1 layers, the model has 2"),
    ],
    ids=str,
)
def test_windows_that_cannot_be_are_refused(step, match):
    with pytest.raises(PlanError, match=match):
        step.plan(captured("llama").plan)


def test_windows_are_given_once_in_the_cache_and_not_to_tables():
    plan = SlideWindow((4, 0), 2, positions="cache").plan(captured("llama").plan)
    with pytest.raises(PlanError, match="layer 0 already counts positions in its cache"):
        SlideWindow(3, 2).plan(plan)
    assert SlideWindow((0, 3), 2).plan(plan)[1].window == 3
    table = captured("llama").plan.with_layer(1, positions="tabulated mask")
    with pytest.raises(PlanError, match=r"the mask of layer 1 is a table \(tabulated mask\)"):
        SlideWindow(3, 2).plan(table)
    assert SlideWindow((3, 0), 2).plan(table)[0].window == 3


def test_groups_of_tokens_are_not_cut_through():
    plan = captured("llama").plan
    for steps in ((QuantizeKV(4), SlideWindow(8)), (SlideWindow(8), QuantizeKV(4, layout="kivi"))):
        with pytest.raises(PlanError, match="a window, which would cut through KIVI's groups"):
            steps[1].plan(steps[0].plan(plan))


# ---------------------------------------------------------------------- text without end


def constant(state, slim, length):
    assert state.max_length == length
    return state.allocated_bytes(), [tuple(t.shape) for store in state.stores.values() for t in store]


def test_memory_is_that_of_sinks_and_window():
    slim = slid(captured("llama"), SlideWindow((6, 3), 2))
    _, state = slim.prefill(ids(length=9), capacity=5000)
    seen = {str(constant(state, slim, 9))}
    per_slot = slim.plan.bytes_per_token() // 2
    assert state.allocated_bytes() == 2 * (8 + 5) * per_slot + 2 * 8
    assert slim.plan.bytes(2, 10**6) == state.used_bytes() == 2 * (8 + 5) * per_slot
    assert slim.plan.bounded
    for _ in range(12):
        slim.decode(ids(length=7), state)
        seen.add(str(constant(state, slim, state.max_length)))
    assert len(seen) == 1


def logits_of_one_layer(weights, tokens, positions):
    """The last token's logits of a one-layer Llama over some tokens at some positions, in float64."""
    w = {n: p.double() for n, p in weights.items()}

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w[name]

    def heads(x, letter):
        return (x @ w[f"model.layers.0.self_attn.{letter}_proj.weight"].T).unflatten(-1, (-1, 8))

    x = w["model.embed_tokens.weight"][tokens]
    inner = norm(x, "model.layers.0.input_layernorm.weight")
    k = torch.stack([turned(row, int(p), False, 8) for row, p in zip(heads(inner, "k"), positions, strict=True)])
    q = turned(heads(inner[-1], "q"), int(positions[-1]), False, 8)
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, heads(inner, "v")))
    weights_ = (torch.einsum("hd,nhd->hn", q, k) / 8**0.5).softmax(-1)
    x = x[-1] + torch.einsum("hn,nhd->hd", weights_, v).flatten() @ w["model.layers.0.self_attn.o_proj.weight"].T
    inner = norm(x, "model.layers.0.post_attention_layernorm.weight")
    gate, up = (inner @ w[f"model.layers.0.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    x = x + (torch.nn.functional.silu(gate) * up) @ w["model.layers.0.mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


@pytest.mark.parametrize("positions", ["text", "cache"])
def test_fifty_thousand_tokens_in_the_memory_of_thirty(positions):
    window, sinks, total = 24, 6, 50_000
    model = families.build("llama", num_hidden_layers=1)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    source = kvpass.transform(model, progress=False, verify="off")
    slim = slid(source, SlideWindow(window, sinks, positions=positions))
    tokens = ids(1, total, seed=3)
    sampled = [25, 29, 30, 31, 500, 4000, 12_345, 30_001, 49_990, 49_999]  # read one by one; the rest in pieces
    pieces, place = [], 20
    for t in sampled:
        while place < t:
            pieces.append(min(500, t - place))
            place += pieces[-1]
        pieces.append(1)
        place += 1
    logits, state = slim.prefill(tokens[:, :20], capacity=100)
    before, place, checked = state.allocated_bytes(), 20, 0
    for count in pieces:
        logits = slim.decode(tokens[:, place : place + count], state)[0, -1]
        place += count
        assert state.allocated_bytes() == before
        t = place - 1
        if count == 1 and t in sampled:
            where = torch.tensor(kept(t, window, sinks))
            index = where if positions == "text" else torch.arange(len(where))
            expected = logits_of_one_layer(weights, tokens[0, where], index)
            assert error(logits.double(), expected) < 5e-5, f"token {t}"  # angles in float32 would be off by 3e-3
            checked += 1
    assert (place, checked) == (total, len(sampled))
    assert state.stores[0][0].shape[2] == sinks + window


def test_generation_goes_on_beyond_the_window():
    slim = slid(captured("llama"), SlideWindow(6, 2, positions="cache"))
    prompt = ids(2, 5)
    found = slim.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert found.shape == (2, 35)
    greedy = whole(slim, found)[:, 4:-1].argmax(-1)
    assert torch.equal(found[:, 5:], greedy)


def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path):
    slim, tokens = slid(captured("glm"), SlideWindow(5, 2, positions="cache")), ids()
    slim.save(tmp_path / "out")
    back = kvpass.load(tmp_path / "out")
    assert back.plan == slim.plan
    assert torch.equal(whole(back, tokens), whole(slim, tokens))
    states = [m.prefill(tokens[:, :15])[1] for m in (slim, back)]
    assert torch.equal(*(m.decode(tokens[:, 15:], s) for m, s in zip((slim, back), states, strict=True)))


def test_angles_from_a_table_of_the_models_own():
    source = kvpass.transform(decoders.DECODERS["interleaved_rope"](), progress=False, verify="off")
    slim, tokens = slid(source, SlideWindow(4, 2, positions="cache")), ids()
    assert_cached(slim, tokens, whole(slim, tokens), 1e-4)
    assert error(whole(slim, tokens), stateless(slid(source, SlideWindow(4, 2)), tokens)) > 0.01
