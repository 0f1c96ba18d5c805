"""ShareLayers against a decoder written out: one token after the other, each layer reading the list it was given.

Everything is float64 but the norms and angles of the family, which are float32 in any dtype, so that what is compared
is the meaning: an entry too many or too few is off by a tenth, rounding by 1e-12.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import families
import kvpass
from kvpass.errors import PlanError, UnsupportedError
from kvpass.export import checkpoint
from kvpass.ir import attention as arithmetic
from kvpass.ir.execute import evaluate
from kvpass.ir.fixpoint import logits_of
from kvpass.ir.kv_format import KVFormat
from kvpass.ir.plan import CachePlan, LayerCache
from kvpass.ir.program import ATTEND, ATTEND_SHARED, ATTENTION, FEEDBACK, output_node, placeholder
from kvpass.ir.sites import SiteFinder
from kvpass.manager import run
from kvpass.passes import Context, GroupHeads, PageKV, QuantizeKV, ShareLayers, SlideWindow
from kvpass.passes.share_layers import read_sources
from properties import error, stateless
from properties import forward as whole

EXACT = 1e-6  # room for one of those float32 to be rounded the other way
LAYERS = 4


def ids(rows=2, length=14, seed=1):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def build(name="llama", **changes):
    return families.build(name, **{"num_hidden_layers": LAYERS, **changes}).double()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def dense(model):
    return captured(model)


def captured(model):
    return kvpass.transform(model, dtype=next(model.parameters()).dtype, progress=False, verify="off")


def rewritten(source, *passes):
    return kvpass.transform(source, list(passes), progress=False, verify="off")


MADE = {}


def shared(source, kv_source, *more, fresh=False, **options):
    """The variant; made once, as tests do not change it but where they ask for a `fresh` one."""
    steps = (ShareLayers(kv_source, **{"upward": True, "tolerance": 0.0, **options}), *more)
    key = (id(source), *steps)
    if fresh or key not in MADE:
        MADE[key] = source, rewritten(source, *steps)
    return MADE[key][1]


def one_by_one(slim, tokens):
    logits, state = slim.prefill(tokens[:, :1])
    steps = [logits.unsqueeze(1)] + [slim.decode(tokens[:, i : i + 1], state) for i in range(1, tokens.shape[1])]
    return torch.cat(steps, dim=1)


# ---------------------------------------------------------------------- the decoder, written out


class Llama:
    """A tiny Llama from its weights, float64, nothing shared with the package."""

    def __init__(self, model):
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.hidden_size // self.heads
        self.epsilon = config.rms_norm_eps
        self.frequencies = 1.0 / 10000.0 ** (torch.arange(0, self.dim, 2).float() / self.dim)

    def __getitem__(self, name):
        return self.weights[name]

    def norm(self, x, name):
        x = x.float()  # norms and angles are float32 whatever the model's dtype
        return (x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()).double() * self[name]

    def turned(self, x, positions):
        angle = positions.float().unsqueeze(-1) * self.frequencies
        cos, sin, (a, b) = angle.cos().double(), angle.sin().double(), x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def project(self, x, layer, letter, heads):
        rows = x @ self[f"model.layers.{layer}.self_attn.{letter}_proj.weight"].T
        return rows.unflatten(-1, (heads, self.dim))

    def rest(self, x, mixed, layer):
        """What follows attention in a layer, for x [.., hidden] and what attention gave [.., H * D]."""
        at = f"model.layers.{layer}."
        x = x + mixed @ self[at + "self_attn.o_proj.weight"].T
        inner = self.norm(x, at + "post_attention_layernorm.weight")
        gate, up = (inner @ self[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        return x + (torch.nn.functional.silu(gate) * up) @ self[at + "mlp.down_proj.weight"].T

    def head(self, x):
        return self.norm(x, "model.norm.weight") @ self["lm_head.weight"].T

    def sequential(self, tokens, kv_source, strict_all=False, windows=None):
        """Logits [B, S, V], token by token: what a layer reads is what stands in its source's list when it reads."""
        return torch.stack([self._row(row, kv_source, strict_all, windows or {}) for row in tokens])

    def _row(self, tokens, kv_source, strict_all, windows):
        lists = {owner: [] for owner in set(kv_source)}
        logits = []
        for t, token in enumerate(tokens.tolist()):
            x, place = self["model.embed_tokens.weight"][token], torch.tensor([t])
            for layer, source in enumerate(kv_source):
                inner = self.norm(x, f"model.layers.{layer}.input_layernorm.weight")
                q = self.turned(self.project(inner, layer, "q", self.heads), place)
                entries = lists[source]
                if source == layer:
                    k = self.turned(self.project(inner, layer, "k", self.kv_heads), place)
                    entries.append((t, k, self.project(inner, layer, "v", self.kv_heads)))
                read = [e for e in entries if not (strict_all and e[0] == t)]
                read = [e for e in read if layer not in windows or e[0] > t - windows[layer]]
                mixed = torch.zeros(self.heads, self.dim, dtype=torch.float64)
                for head in range(self.heads if read else 0):
                    kv_head = head * self.kv_heads // self.heads
                    scores = torch.stack([q[head] @ k[kv_head] for _, k, _ in read]) / self.dim**0.5
                    mixed[head] = scores.softmax(0) @ torch.stack([v[kv_head] for _, _, v in read])
                x = self.rest(x, mixed.flatten(), layer)
            logits.append(self.head(x))
        return torch.stack(logits)

    def passes(self, tokens, kv_source, count, learned):
        """Logits after `count` passes over the whole text, through the last `learned` of which gradients flow."""
        batch, length = tokens.shape
        positions, before = torch.arange(length).view(-1, 1), None
        for number in range(count):
            with torch.set_grad_enabled(number >= count - learned):
                x, now = self["model.embed_tokens.weight"][tokens], {}
                for layer, source in enumerate(kv_source):
                    inner = self.norm(x, f"model.layers.{layer}.input_layernorm.weight")
                    q = self.turned(self.project(inner, layer, "q", self.heads), positions)
                    if source == layer:
                        k = self.turned(self.project(inner, layer, "k", self.kv_heads), positions)
                        now[layer] = k, self.project(inner, layer, "v", self.kv_heads)
                    if source > layer and before is None:
                        x = self.rest(x, torch.zeros(batch, length, self.heads * self.dim).double(), layer)
                        continue
                    k, v = before[source] if source > layer else now[source]
                    k, v = (z.repeat_interleave(self.heads // self.kv_heads, dim=2) for z in (k, v))
                    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.dim**0.5
                    seen = torch.ones(length, length).tril(-1 if source > layer else 0).bool()
                    weights = scores.masked_fill(~seen, -1e300).softmax(-1) * seen
                    x = self.rest(x, torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2), layer)
                before = now
        return self.head(x)


UPWARD = ["3_3_3_3", "0_3_3_3", "1_1_3_3", "0_3_2_3", "0_3_0_3", "0_0_3_3"]
DOWNWARD = ["0_0_2_2", "0_1_0_1"]


@pytest.fixture(scope="module")
def sequential(model):
    known, decoder = {}, Llama(model)

    def logits(kv_source, rows=2, length=14, **options):
        key = (kv_source, rows, length, str(options))
        if key not in known:
            sources = [int(w.rstrip("s")) for w in kv_source.split("_")]
            known[key] = decoder.sequential(ids(rows, length), sources, **options)
        return known[key]

    return logits


def test_the_decoder_written_out_is_the_model(model, dense, sequential):
    with torch.no_grad():
        expected = model(ids()).logits
    assert error(sequential("0_1_2_3"), expected) < EXACT
    assert error(whole(dense, ids()), expected) < EXACT


# ---------------------------------------------------------------------- what kv_source says


def text(*runs):
    """`text((0, 1), (20, 20))` is 0 followed by twenty times 20."""
    return tuple(source for source, count in runs for source in [source] * count)


def each(low, high):
    return [(layer, 1) for layer in range(low, high)]


GRAMMAR = [
    (22, "sandwich-top:3", text((0, 1), (20, 20), (21, 1))),
    (22, "sandwich-middle:3", text((0, 1), (10, 20), (21, 1))),
    (22, "sandwich:3", text((0, 1), (1, 20), (21, 1))),
    (22, "lckv:2", text((0, 1), (20, 20), (21, 1))),
    (22, "lckv:10", text(*each(0, 5), (16, 12), *each(17, 22))),
    (22, "sandwich-top:11", text(*each(0, 5), (16, 12), *each(17, 22))),
    (22, "lckv:0", text((21, 22))),
    (22, "lckv:1", text((0, 1), (21, 21))),
    (22, "lckv:3", text((0, 1), (1, 1), (20, 19), (21, 1))),
    (22, "lckv:21", text(*each(0, 22))),
    (22, "cla:2", tuple(layer - layer % 2 for layer in range(22))),
    (22, "cla:1", text(*each(0, 22))),
    (22, "cla:3", tuple(layer - layer % 3 for layer in range(22))),
    (22, "cla:22", text((0, 22))),
    (22, "yoco", text(*each(0, 11), (11, 11))),
    (5, "yoco", (0, 1, 2, 2, 2)),
    (22, "lasagna:11", tuple(layer - layer % 2 for layer in range(22))),
    (22, "lasagna-bottom:11", tuple(layer - layer % 2 for layer in range(22))),
    (22, "lasagna-top:11", tuple(layer - layer % 2 + 1 for layer in range(22))),
    (22, "lasagna-middle:2", text((5, 11), (16, 11))),
    (7, "lasagna:3", (0, 0, 2, 2, 4, 4, 4)),
    (7, "lasagna-middle:3", (0, 0, 2, 2, 5, 5, 5)),
    (22, "pizza:11", text(*each(0, 10), (10, 12))),
    (22, "pizza-bottom:11", text(*each(0, 10), (10, 12))),
    (22, "pizza-middle:3", text((0, 1), (1, 1), (11, 20))),
    (22, "pizza-top:3", text((0, 1), (1, 1), (21, 20))),
    (22, "pizza:1", text((0, 22))),
    (4, " CLA:2 ", (0, 0, 2, 2)),
    (4, "0_1_1_3", (0, 1, 1, 3)),
    (4, (0, 1, 1, 3), (0, 1, 1, 3)),
    (12, "0_1_2_3_4_5_6_7_8_9_10_10", (*range(11), 10)),
]


@pytest.mark.parametrize(("layers", "kv_source", "expected"), GRAMMAR, ids=lambda value: str(value)[:24])
def test_kv_source_says_who_reads_whom(layers, kv_source, expected):
    found = read_sources(kv_source, layers)
    assert found.layers == expected
    assert found.sliding == ()


def test_a_number_with_an_s_is_a_layer_with_a_window():
    found = read_sources("0s_1s_2_2s", 4)
    assert (found.layers, found.sliding, found.upward) == ((0, 1, 2, 2), (0, 1, 3), False)
    mix = "_".join([*(f"{i}s" for i in range(10)), "10s", *["11"] * 11])
    assert read_sources(mix, 22).sliding == tuple(range(11))
    assert read_sources(mix, 22).layers == text(*each(0, 11), (11, 11))


@pytest.mark.parametrize("words", ["lckv:2", "sandwich-top:3", "pizza-middle:2", "lasagna-top:2"])
def test_names_that_point_upward_need_no_permission(words, dense):
    assert read_sources(words, 4).upward
    assert ShareLayers(words).plan(dense.plan).upward


@pytest.mark.parametrize("words", ["cla:2", "yoco", "pizza:2", "sandwich-bottom:3", "0_1_1_3"])
def test_others_do(words):
    assert not read_sources(words, 4).upward


def test_a_list_is_as_good_as_a_tuple():
    assert ShareLayers([0, 0, 2, 2]) == ShareLayers((0, 0, 2, 2))
    assert hash(ShareLayers([0, 0, 2, 2])) == hash(ShareLayers((0, 0, 2, 2)))


# ---------------------------------------------------------------------- refusals


def refused(plan, *passes, match):
    """The last of several passes is, and says why and what to do."""
    for step in passes[:-1]:
        plan = step.plan(plan)
    with pytest.raises(PlanError, match=match) as caught:
        passes[-1].plan(plan)
    assert caught.value.fix, "what to do is not said"


@pytest.mark.parametrize(
    ("kv_source", "match"),
    [
        ("0_1_2", "lists 3 layers, the model has 4"),
        ((0, 1, 2, 3, 4), "lists 5 layers, the model has 4"),
        ("0_1_2_4", "kv_source of layer 3 is 4"),
        ((0, 1, -1, 3), "kv_source of layer 2 is -1"),
        ((0, True, 2, 3), "kv_source of layer 1 is True"),
        ((0, 1.0, 2, 3), "kv_source of layer 1 is 1.0"),
        ("0_0_1_3", "layer 2 is to read layer 1, which reads layer 0 and keeps nothing"),
        ("1_2_2_3", "layer 0 is to read layer 1, which reads layer 2"),
        ("1_0_2_3", "layer 0 is to read layer 1, which reads layer 0"),
        ("0_2_2_3", "layer 1 is to read layer 2 above it: a prompt then takes several passes"),
        ("cla:0", "does not fit a model of 4 layers"),
        ("cla:5", "does not fit a model of 4 layers"),
        ("lckv:4", "does not fit a model of 4 layers"),
        ("pizza:5", "does not fit a model of 4 layers"),
        ("sandwich:0", "does not fit a model of 4 layers"),
        ("pizza", "no list of layers and no known word"),
        ("yoco:2", "no list of layers and no known word"),
        ("0-1-1-3", "no list of layers and no known word"),
        ("", "no list of layers and no known word"),
        ("0_1_1_x", "no list of layers and no known word"),
        ("0_1s_1s_3", "no window is given"),
    ],
    ids=str,
)
def test_a_kv_source_that_cannot_be_is_refused(dense, kv_source, match):
    refused(dense.plan, ShareLayers(kv_source), match=match)


def test_knobs_that_contradict_are_refused(dense):
    refused(dense.plan, ShareLayers("0_1_1_3", window=8), match="marks no layer with s")
    for options in ({"passes": -1}, {"tolerance": -1e-3}):
        with pytest.raises(PlanError, match="must not be negative"):
            ShareLayers("0_1_1_3", **options).plan(dense.plan)


def test_layers_are_shared_once(dense):
    refused(dense.plan, ShareLayers("0_0_2_3"), ShareLayers("0_1_2_2"), match=r"layers \[1\] already read another")


@pytest.mark.parametrize(
    "changes", [{"kv_heads": 1}, {"key_dim": 4}, {"value_dim": 4}, {"dtype": torch.bfloat16}], ids=str
)
def test_layers_of_different_shapes_do_not_share(changes):
    layers = [LayerCache(i, 4, 2, 8, 8, torch.float32) for i in range(3)]
    plan = CachePlan(tuple(layers)).with_layer(1, **changes)
    (name,) = changes
    refused(plan, ShareLayers("0_0_2"), match=f"layer 1 has {name} .*, layer 0 has")
    assert ShareLayers("0_1_0").plan(plan)[2].kv_source == 0
    assert ShareLayers("0_0_2").plan(plan.with_layer(1, heads=8, **{name: getattr(layers[0], name)})).owners() == [0, 2]


def test_layers_that_count_positions_differently_do_not_share(dense):
    plan = SlideWindow((4, 0, 4, 4), 2, positions="cache").plan(dense.plan)
    refused(plan, ShareLayers("0_0_2_3"), match="layers 1 and 0 count positions differently")
    assert ShareLayers("0_1_0_3").plan(plan).owners() == [0, 1, 3]
    refused(
        ShareLayers("0_1_0_3").plan(dense.plan),
        SlideWindow((4, 0, 0, 0), 2, positions="cache"),
        match="layers that read layer 0 would count positions differently",
    )


def test_heads_are_merged_before_layers_share(dense):
    refused(dense.plan, ShareLayers("0_0_2_2"), GroupHeads(1), match="merged where each layer has its own")
    plan = ShareLayers("0_0_2_2").plan(GroupHeads(1).plan(dense.plan))
    assert [c.kv_heads for c in plan] == [1] * 4


def test_what_is_written_again_in_every_pass_is_no_ring_and_no_residual(dense):
    up = ShareLayers("0_3_3_3", upward=True)
    ring = "layer 1 reads layer 3 above it, whose cache would keep a window only"
    refused(dense.plan, up, SlideWindow(8), match=ring)
    refused(dense.plan, SlideWindow(8), up, match=ring)
    refused(dense.plan, up, QuantizeKV(4, layout="kivi"), match=r"latest tokens would be kept apart \(KIVI\)")
    refused(dense.plan, QuantizeKV(4, layout="kivi"), up, match=r"latest tokens would be kept apart \(KIVI\)")
    refused(
        dense.plan, QuantizeKV(4, layout="kivi"), ShareLayers("0s_0s_2_3", window=8), match="cut through KIVI's groups"
    )
    assert SlideWindow((4, 4, 0, 0)).plan(up.plan(dense.plan)).layout(3).window == 0
    assert QuantizeKV(4).plan(up.plan(dense.plan))[3].format == KVFormat.parse("int4")


def test_a_family_whose_layers_all_have_windows_does_not_share_upward():
    slim = captured(families.build("mistral").double())
    with pytest.raises(PlanError, match="a ring cannot be written again"):
        shared(slim, "1_1")


@pytest.mark.parametrize("name", ["gemma3_text", "smollm3"])  # two angles; an angle and none
def test_layers_that_rotate_keys_differently_do_not_share(name):
    slim = captured(build(name, num_hidden_layers=2))
    for kv_source, pair in (("0_0", "1 and 0"), ("1_1", "0 and 1")):
        with pytest.raises(UnsupportedError, match=rf"layers {pair} rotate keys differently \(RoPE\)"):
            shared(slim, kv_source)


# ---------------------------------------------------------------------- what is left of the program


def needed(program, kv_source):
    """The nodes that the logits need when every reader is given its source's keys and values, by walking the graph."""
    sites = list(SiteFinder(program))
    instead = {}
    for layer, source in enumerate(kv_source):
        node, owner = sites[layer].node, sites[source].node
        operands = [] if source > layer else list(owner.args[1:3])
        instead[node] = [node.args[0], *operands]
    seen, stack = set(), [output_node(program.forward), placeholder(program.forward, "input_ids")]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += instead.get(node, node.all_input_nodes)
    return seen


@pytest.mark.parametrize(
    ("name", "kv_source"),
    [("llama", "0_0_2_2"), ("llama", "0_3_3_3"), ("llama", "0_3_0_3"), ("qwen2", "1_1"), ("qwen3", "0_0")],
)
def test_readers_have_no_projections_no_rotation_and_no_cache(name, kv_source, dense):
    slim = dense if name == "llama" else captured(families.build(name).double())
    sources = [int(w) for w in kv_source.split("_")]
    layers = len(sources)
    found = shared(slim, kv_source)
    owners = sorted(set(sources))
    gone = [
        f"model.layers.{i}.self_attn.{part}"
        for i in range(layers)
        if i not in owners
        for part in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias", "k_norm.weight")
    ]
    before, after = slim.program.used_weights(), found.program.used_weights()
    assert before - after == before & set(gone)
    assert len(before - after) == (layers - len(owners)) * {"llama": 2, "qwen2": 4, "qwen3": 3}[name]
    assert after <= before

    graph = found.program.forward
    feedbacks = [n for n in graph.nodes if n.target is FEEDBACK]
    assert len(feedbacks) == 2 * len({s for i, s in enumerate(sources) if s > i})
    assert len(graph.nodes) == len(needed(slim.program, sources)) + 1 + len(feedbacks)
    assert [n.target for n in graph.nodes].count(ATTENTION) == layers

    assert found.plan.owners() == owners
    assert found.plan.bytes_per_token() * layers == slim.plan.bytes_per_token() * len(owners)
    if name != "llama":
        return
    for entry in ("prefill", "decode"):
        cached = found.executor.program.entries[entry]
        names = [str(n.target) for n in cached.nodes if n.op == "placeholder" and "cache" in str(n.target)]
        assert names == [f"cache_{o}_{part}" for o in owners for part in ("k", "v")]
        targets = [n.target for n in cached.nodes]
        upward = sum(s > i for i, s in enumerate(sources))
        assert (targets.count(ATTEND), targets.count(ATTEND_SHARED)) == (layers - upward, upward)
        assert targets.count(FEEDBACK) == 0
    _, state = found.prefill(ids(length=3))
    assert sorted(state.stores) == owners
    assert state.allocated_bytes() == 2 * 3 * found.plan.bytes_per_token() + 2 * 8


# ---------------------------------------------------------------------- the meaning


@pytest.mark.parametrize("kv_source", DOWNWARD + UPWARD)
def test_every_way_of_running_is_the_decoder_written_out(dense, sequential, kv_source):
    slim, tokens, expected = shared(dense, kv_source), ids(), sequential(kv_source)
    assert error(whole(slim, tokens), expected) < EXACT
    assert error(one_by_one(slim, tokens), expected) < EXACT
    logits, state = slim.prefill(tokens[:, :6])
    assert error(logits, expected[:, 5]) < EXACT
    assert error(slim.decode(tokens[:, 6:13], state), expected[:, 6:13]) < EXACT
    assert error(slim.decode(tokens[:, 13:], state), expected[:, 13:]) < EXACT
    for chunk in (1, 4, 13):
        assert error(slim.prefill(tokens, chunk=chunk)[0], expected[:, -1]) < EXACT
    assert error(expected, whole(dense, tokens)) > 0.1, "sharing changed nothing"


@pytest.mark.parametrize("kv_source", ["0_0_2_2", "0_3_3_3", "3_3_3_3", "0_3_2_3"])
@pytest.mark.parametrize("chunk", [2048, 3])
def test_rows_of_different_lengths(dense, sequential, kv_source, chunk):
    slim, tokens, expected = shared(dense, kv_source), ids(3), sequential(kv_source, rows=3)
    lengths = torch.tensor([5, 9, 1])
    logits, state = slim.prefill(tokens[:, :9], lengths, chunk=chunk)
    rows = torch.arange(3)
    assert error(logits, expected[rows, lengths - 1]) < EXACT
    for count in (1, 3, 1):
        where = state.lengths.view(-1, 1) + torch.arange(count)
        found = slim.decode(tokens[rows.view(-1, 1), where], state)
        assert error(found, expected[rows.view(-1, 1), where]) < EXACT
    state.select(torch.tensor([2, 0]))
    where = state.lengths.view(-1, 1) + torch.arange(2)
    taken = torch.tensor([[2], [0]])
    assert error(slim.decode(tokens[taken, where], state), expected[taken, where]) < EXACT


@pytest.mark.parametrize("kv_source", ["0_0_2_2", "0_3_3_3"])
def test_no_layer_reads_its_own_token_where_that_is_asked_for(dense, sequential, kv_source):
    slim, tokens = shared(dense, kv_source, strict="all"), ids()
    expected = sequential(kv_source, strict_all=True)
    assert error(whole(slim, tokens), expected) < EXACT
    assert error(one_by_one(slim, tokens), expected) < EXACT
    assert error(slim.prefill(tokens, chunk=5)[0], expected[:, -1]) < EXACT
    assert error(expected, sequential(kv_source)) > 0.1


@pytest.mark.parametrize("kv_source", ["0s_0s_2_2s", "0_1s_1s_3", "0_3s_2s_3"])
def test_layers_marked_with_s_read_a_window(dense, sequential, kv_source):
    sliding = {i: 3 for i, word in enumerate(kv_source.split("_")) if word.endswith("s")}
    slim, tokens = shared(dense, kv_source, window=3), ids()
    expected = sequential(kv_source, windows=sliding)
    assert {c.layer: c.window for c in slim.plan if c.window} == sliding
    assert error(whole(slim, tokens), expected) < EXACT
    assert error(one_by_one(slim, tokens), expected) < EXACT
    assert error(slim.prefill(tokens, chunk=5)[0], expected[:, -1]) < EXACT
    state = slim.prefill(tokens[:, :7])[1]
    assert error(slim.decode(tokens[:, 7:], state), expected[:, 7:]) < EXACT
    assert error(expected, sequential(kv_source)) > 0.01


@pytest.mark.parametrize(
    ("kv_source", "paged", "passes"),
    [("0_3_2_3", False, 0), ("0_3_0_3", False, 2), ("0_3_3_3", False, 2), ("0_3_0_3", True, 2)],
)
def test_rings_within_and_below_the_layers_that_are_repeated(dense, kv_source, paged, passes):
    """A pass writes the same tokens again, and falling back writes them once more: a ring must not lose by that."""
    windows = tuple(4 if i in (0, 2) and s in (0, 2) else 0 for i, s in enumerate(map(int, kv_source.split("_"))))
    more = [SlideWindow(windows, 1)] + ([PageKV(3)] if paged else [])
    slim, tokens = shared(dense, kv_source, *more, passes=passes), ids()
    expected = whole(slim, tokens)
    assert error(one_by_one(slim, tokens), expected) < EXACT
    for chunk in (3, 5, 20):
        assert error(slim.prefill(tokens, chunk=chunk)[0], expected[:, -1]) < EXACT
    logits, state = slim.prefill(tokens[:, :8], torch.tensor([8, 3]))
    assert error(logits, expected[[0, 1], [7, 2]]) < EXACT
    where = state.lengths.view(-1, 1) + torch.arange(6)
    rows = torch.arange(2).view(-1, 1)
    assert error(slim.decode(tokens[rows, where], state), expected[rows, where]) < EXACT


@pytest.mark.parametrize(("name", "kv_source"), [("bloom", "1_1"), ("gemma2", "0_3_2_3")])
def test_families(name, kv_source):
    """ALiBi, fused projections, soft caps, windows of the layers that are repeated: the graph says it all."""
    slim = captured(families.build(name).double())
    found, tokens = shared(slim, kv_source), ids(length=11)
    expected = whole(found, tokens)
    allowed = 1e-6 * float(expected.abs().max())
    assert error(expected, stateless(slim, tokens)) > 0.05
    assert error(one_by_one(found, tokens), expected) < allowed
    state = found.prefill(tokens[:, :4], torch.tensor([4, 2]))[1]
    rows, where = torch.arange(2).view(-1, 1), state.lengths.view(-1, 1) + torch.arange(7)
    assert error(found.decode(tokens[rows, where], state), expected[rows, where]) < allowed


# ---------------------------------------------------------------------- the first keys and values


def kv_rows(name, weights, layer, heads):
    """Views of one layer's key and value projections, weights and biases, whatever they are fused into."""
    if name == "gpt2":
        at = f"transformer.h.{layer}.attn.c_attn."
        weight, bias = weights[at + "weight"], weights[at + "bias"]
        return [weight[:, weight.shape[0] :], bias[weight.shape[0] :]]
    if name == "gpt_neox":
        at = f"gpt_neox.layers.{layer}.attention.query_key_value."
        return [weights[at + part].unflatten(0, (heads, 3, -1))[:, 1:] for part in ("weight", "bias")]
    names = [f"model.layers.{layer}.self_attn.{x}_proj.{part}" for x in "kv" for part in ("weight", "bias")]
    return [weights[n] for n in names if n in weights]


@pytest.mark.parametrize(("name", "kv_source"), [("qwen2", "1_1"), ("gpt2", "0_0"), ("gpt_neox", "1_1")])
def test_the_mean_of_the_readers_projections_biases_too(name, kv_source):
    source, owner = captured(families.build(name).double()), int(kv_source[0])
    program = source.program.copy()
    weights = {n: program.read(n).clone() for n in program.used_weights()}
    pairs = zip(*(kv_rows(name, weights, layer, source.plan[0].heads) for layer in (0, 1)), strict=True)
    means = [torch.stack(pair).mean(0) for pair in pairs]
    assert sorted(m.dim() for m in means) == {"qwen2": [1, 1, 2, 2], "gpt2": [1, 2], "gpt_neox": [3, 4]}[name]
    for view, mean in zip(kv_rows(name, weights, owner, source.plan[0].heads), means, strict=True):
        assert float((view - mean).abs().max()) > 1e-3
        view.copy_(mean)
    program.weights |= {n: replace(program.weights[n], read=lambda t=t: t) for n, t in weights.items()}
    by_hand, _ = run(program, [ShareLayers(kv_source, upward=True, tolerance=0.0)], Context(), "off")
    expected = logits_of(by_hand.forward, {placeholder(by_hand.forward, "input_ids"): ids()}, by_hand.read)
    assert error(stateless(shared(source, kv_source, init="mean"), ids()), expected) < EXACT
    assert error(stateless(shared(source, kv_source), ids()), expected) > 0.01


def test_the_mean_over_four_readers_is_over_them_alone(model, dense):
    by_hand = Llama(model)
    for view, *others in zip(*(kv_rows("llama", by_hand.weights, i, 4) for i in (1, 2, 3)), strict=True):
        view.copy_((view + others[0] + others[1]) / 3)
    expected = by_hand.sequential(ids(), [0, 1, 1, 1])
    assert error(whole(shared(dense, "0_1_1_1", init="mean"), ids()), expected) < EXACT


# ---------------------------------------------------------------------- passes


@pytest.mark.parametrize(
    ("kv_source", "count"), [("0_3_3_3", 1), ("0_3_3_3", 5), ("3_3_3_3", 2), ("1_1_3_3", 5), ("0_3_0_3", 2)]
)
def test_after_n_passes_the_first_n_tokens_are_exact(dense, sequential, model, kv_source, count):
    slim, tokens = shared(dense, kv_source, passes=count, fallback=False), ids()
    exact, sources = sequential(kv_source), [int(w) for w in kv_source.split("_")]
    found = whole(slim, tokens)
    assert slim.executor.passes == count
    assert error(found[:, :count], exact[:, :count]) < EXACT
    assert error(found[:, count:], exact[:, count:]) > 1e-3
    assert error(found, Llama(model).passes(tokens, sources, count, 0)) < EXACT
    logits, state = slim.prefill(tokens)
    assert error(logits, found[:, -1]) < EXACT
    assert state.passes == [(count, False)]
    state = slim.prefill(tokens[:, :1])[1]
    later = slim.decode(tokens[:, 1:], state)  # the first token is in the store, so one token more is exact
    assert state.passes == [(count, False)]
    assert error(later[:, :count], exact[:, 1 : count + 1]) < EXACT
    assert error(later[:, count:], exact[:, count + 1 :]) > 1e-3


def test_passes_that_are_enough_are_said_to_be(dense):
    tokens = ids()
    slim = shared(dense, "0_3_3_3")
    whole(slim, tokens)
    needed = slim.executor.passes
    assert 2 < needed <= tokens.shape[1]
    assert slim.prefill(tokens)[1].passes == [(needed, True)]
    assert slim.prefill(tokens, chunk=5)[1].passes[0] == (5, True)
    enough = shared(dense, "0_3_3_3", passes=needed)
    assert enough.prefill(tokens)[1].passes == [(needed, True)]
    loose = shared(dense, "0_3_3_3", tolerance=1e6)
    whole(loose, tokens)
    assert loose.executor.passes == 1
    assert loose.prefill(tokens)[1].passes == [(1, True)]
    assert slim.prefill(tokens[:, :1])[1].passes == [], "one token is exact in one run"
    fewer = [slim, shared(dense, "0_3_3_3", tolerance=1e-2)]
    counts = []
    for other in fewer:
        off = error(whole(other, tokens), whole(slim, tokens))
        counts.append(other.executor.passes)
        assert off <= 1e3 * other.recipe.passes[0].tolerance
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_a_prompt_that_does_not_settle_is_read_token_by_token(dense, sequential):
    tokens, exact = ids(), sequential("0_3_3_3")
    slim = shared(dense, "0_3_3_3", passes=2, fallback=True)
    assert error(whole(slim, tokens), exact) < EXACT
    assert 2 < slim.executor.passes <= 14
    logits, state = slim.prefill(tokens[:, :10])
    assert error(logits, exact[:, 9]) < EXACT
    assert state.passes == [(2 + 10, True)]
    assert error(slim.decode(tokens[:, 10:13], state), exact[:, 10:13]) < EXACT
    assert state.passes == [(12, True), (2 + 3, True)]
    assert error(slim.decode(tokens[:, 13:], state), exact[:, 13:]) < EXACT
    assert len(state.passes) == 2
    assert state.clone().passes == state.passes
    logits, state = slim.prefill(ids(3)[:, :9], torch.tensor([4, 9, 1]))
    assert error(logits, sequential("0_3_3_3", rows=3)[[0, 1, 2], [3, 8, 0]]) < EXACT


def test_the_checks_of_the_cache_know_of_the_tolerance(dense):
    """In float64 they allow 1e-9, which passes that stop at 1e-5 do not reach."""
    slim = kvpass.transform(dense, ShareLayers("0_3_3_3", upward=True), progress=False)
    assert any("cached decode" in note for note in slim.report.notes)
    slim = kvpass.transform(dense, ShareLayers("0_3_3_3", upward=True, passes=2, fallback=False), progress=False)
    assert any("at most 2 passes" in note for note in slim.report.notes)


def test_gradients_flow_through_the_last_two_passes(model, dense):
    tokens, sources = ids(length=8), [0, 3, 3, 3]
    slim = shared(dense, "0_3_3_3", fresh=True, passes=5, fallback=False)
    names = [f"model.layers.3.self_attn.{n}_proj.weight" for n in "kv"] + ["model.layers.1.self_attn.q_proj.weight"]
    weights = slim.executor.weights()
    for name in names:
        weights[name].requires_grad_(True)
    target = torch.randn(2, 8, 97, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (slim(tokens) * target).sum().backward()
    assert slim.executor.passes == 5

    def by_hand(learned):
        decoder = Llama(model)
        leaves = [decoder.weights[n].requires_grad_(True) for n in names]
        return torch.autograd.grad((decoder.passes(tokens, sources, 5, learned) * target).sum(), leaves)

    for name, expected, one, all_ in zip(names, by_hand(2), by_hand(1), by_hand(5), strict=True):
        found = weights[name].grad
        assert float(found.abs().max()) > 1e-3
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        for other in (one, all_):
            assert float((found - other).abs().max()) > 1e-4, "as many passes as these do not give this gradient"


def test_a_gradient_does_not_change_the_logits(dense):
    tokens = ids()
    for passes in (0, 1):
        slim = shared(dense, "0_3_3_3", fresh=True, passes=passes, fallback=False)
        expected = whole(slim, tokens)
        slim.executor.weights()["model.layers.3.self_attn.k_proj.weight"].requires_grad_(True)
        found = slim(tokens)
        assert found.requires_grad
        assert error(found.detach(), expected) < EXACT


def test_the_first_row_of_an_upward_reader_reads_nothing_and_gives_zero(dense):
    program = shared(dense, "0_3_3_3").program
    graph, tokens = program.forward, ids()
    generator = torch.Generator().manual_seed(0)
    given = {placeholder(graph, "input_ids"): tokens}
    for node in graph.nodes:
        if node.target is FEEDBACK:
            given[node] = torch.randn(2, 2, 14, 8, generator=generator, dtype=torch.float64)
    readers = [n for n in graph.nodes if n.target is ATTENTION and n.args[1].target is FEEDBACK]
    assert len(readers) == 2
    for value in evaluate(readers, given, program.read):
        assert not bool(value[:, :, 0].any())
        assert bool((value[:, :, 1:].abs().amax(-1) > 1e-3).all())


# ---------------------------------------------------------------------- what the comparison would notice

VISIBLE = arithmetic.visible


def diagonal_kept(*args, strict, causal, **options):
    return VISIBLE(*args, strict=False, causal=causal or strict, **options)


def future_seen(*args, strict, causal, **options):
    return VISIBLE(*args, strict=False, causal=False, **options)


def window_too_wide(*args, window, **options):
    return VISIBLE(*args, window=window and window + 1, **options)


@pytest.mark.parametrize(
    ("mutant", "kv_source", "windows"),
    [(diagonal_kept, "0_3_3_3", {}), (future_seen, "0_3_3_3", {}), (window_too_wide, "0_1s_1s_3", {1: 3, 2: 3})],
)
def test_a_wrong_mask_is_noticed(dense, sequential, monkeypatch, mutant, kv_source, windows):
    slim, tokens = shared(dense, kv_source, window=3 if windows else 0, passes=0), ids()
    expected = sequential(kv_source, **({"windows": windows} if windows else {}))
    for mutated in (False, True):
        if mutated:
            monkeypatch.setattr(arithmetic, "visible", mutant)
        errors = [error(whole(slim, tokens), expected), error(one_by_one(slim, tokens), expected)]
        errors.append(error(slim.prefill(tokens)[0], expected[:, -1]))
        if not mutated:
            assert max(errors) < EXACT
        elif windows:  # a ring cannot read what it does not keep, so only the stateless mask can be too wide
            assert errors[0] > 1e-3
        else:  # token by token there is no future but the slot that is not written yet
            assert min(errors) > 1e-3


# ---------------------------------------------------------------------- on disk


@pytest.mark.parametrize("kv_source", ["0_0_2_2", "0_2s_2_3"])
def test_saved_and_loaded_it_is_the_same_to_the_bit(dense, tmp_path, kv_source):
    options = {"window": 3} if "s" in kv_source else {}
    slim, tokens = shared(dense, kv_source, passes=3, init="mean", **options), ids()
    slim.save(tmp_path / "out")
    back = kvpass.load(tmp_path / "out")
    assert back.plan == slim.plan
    assert torch.equal(whole(back, tokens), whole(slim, tokens))
    assert back.executor.passes == slim.executor.passes
    pairs = [(m.prefill(tokens[:, :9])) for m in (slim, back)]
    assert torch.equal(pairs[0][0], pairs[1][0])
    assert pairs[0][1].passes == pairs[1][1].passes
    again = [m.decode(tokens[:, 9:], state) for m, (_, state) in zip((slim, back), pairs, strict=True)]
    assert torch.equal(*again)
    assert back.recipe.passes == slim.recipe.passes


@pytest.fixture(scope="module")
def shallow():
    return captured(families.build("llama"))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (ShareLayers("0_0"), "layer 1 reads the keys and values of layer 0"),
        (ShareLayers("1_1", upward=True), "layer 0 reads the keys and values of layer 1"),
        (ShareLayers("0_1", strict="all"), "layer 0 does not read its own token"),
        (ShareLayers("0_1s", window=6), "layer 1 reads a window of 6 tokens"),
        (SlideWindow((0, 9), 3), "layer 1 reads a window of 9 tokens and the first 3"),
        (QuantizeKV(), "layer 0 reads keys and values as int8 stores them"),
    ],
    ids=str,
)
def test_a_checkpoint_of_the_family_cannot_say_it(shallow, tmp_path, monkeypatch, step, reason):
    """However large the model: what is too large to be read back and compared is not written wrong either."""
    monkeypatch.setattr(checkpoint, "CHECKED_BYTES", 0)
    with pytest.raises(UnsupportedError, match=reason) as caught:
        rewritten(shallow, step).save_pretrained(tmp_path / "out")
    assert "save()" in caught.value.fix
    assert list(tmp_path.iterdir()) == []
