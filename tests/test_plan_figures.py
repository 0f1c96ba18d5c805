"""Published and hand-computed figures: what plans of known models store, drop and repeat, and what an edge costs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import kvpass
from kvpass import cli
from kvpass.errors import PlanError, RequestError
from kvpass.ir.execute import ancestors
from kvpass.ir.fixpoint import find_block
from kvpass.ir.plan import CachePlan, LayerCache
from kvpass.ir.program import ATTENTION
from kvpass.passes import GroupHeads, ShareLayers
from kvpass.quality import continuation
from kvpass.quality.sharing import EdgeLoss, pairs, scan_sharing
from kvpass.runtime.transformed import Transformed

KIB = 1024
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}
LLAMA_70B = LLAMA_1B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def plan_of(layers, heads, kv_heads, dim):
    return CachePlan(tuple(LayerCache(i, heads, kv_heads, dim, dim, torch.bfloat16) for i in range(layers)))


def parameters_of(layers, hidden, kv_width, inner, vocab=32000):
    """Of a Llama: embedding and head, projections, MLP, norms."""
    return 2 * vocab * hidden + layers * hidden * (2 * hidden + 2 * kv_width + 3 * inner + 2) + hidden


# name -> plan, width and parameters (Wu and Tu 2024, arXiv 2405.10637, table 5)
MODELS = {
    "1.1B": (plan_of(22, 32, 4, 64), 2048, parameters_of(22, 2048, 4 * 64, 5632)),
    "7B": (plan_of(32, 32, 32, 128), 4096, parameters_of(32, 4096, 4096, 11008)),
    "30B": (plan_of(60, 52, 52, 128), 6656, parameters_of(60, 6656, 6656, 17920)),
}


@pytest.fixture
def folder(tmp_path):
    """Writes a config, and nothing else, to a folder."""

    def write(values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return str(tmp_path)

    return write


def document(*words):
    done = CliRunner().invoke(cli.app, ["plan", *words, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


# ---------------------------------------------------------------------- sharing (LCKV)


@pytest.mark.parametrize(
    ("name", "warmup", "owners", "before", "after", "unread", "share"),
    [
        ("1.1B", 2, 3, 22, 3, 19.9e6, 0.018),
        ("1.1B", 10, 11, 22, 11, 11.5e6, 0.010),
        ("7B", 2, 3, 512, 48, 973e6, 0.144),
        ("7B", 10, 11, 512, 176, 705e6, 0.105),
        ("30B", 2, 3, 1560, 78, 5.05e9, 0.155),
        ("30B", 10, 11, 1560, 286, 4.34e9, 0.133),
    ],
)
def test_lckv_saves_what_the_papers_models_say(name, warmup, owners, before, after, unread, share):
    plan, hidden, parameters = MODELS[name]
    shared = ShareLayers(f"lckv:{warmup}").plan(plan)
    assert len(shared.owners()) == owners
    assert (plan.bytes_per_token(), shared.bytes_per_token()) == (before * KIB, after * KIB)
    assert shared.bytes(7, 1000) == 7000 * after * KIB
    layers, found = cli._unread_projections(plan, shared, hidden)
    assert layers == len(plan) - owners
    assert found == pytest.approx(unread, rel=5e-3)
    assert found / parameters == pytest.approx(share, abs=5e-4)


def test_the_command_says_so_of_a_config_alone(folder):
    found = document(folder(LLAMA_1B), "--share-layers", "lckv:2", "--batch", "2", "--length", "1000")
    assert found["bytes_per_token"] == {"before": 22 * KIB, "after": 3 * KIB}
    assert found["bytes"] == {"before": 2000 * 22 * KIB, "after": 2000 * 3 * KIB}
    assert found["factor"] == {"bytes_per_token": 22 / 3, "bytes": 22 / 3}
    assert [(r["first"], r["last"], r["kv_source"]) for r in found["layers"]] == [
        (0, 0, None),
        (1, 19, 20),
        (20, 21, None),
    ]
    assert found["parameters"] == MODELS["1.1B"][2]
    assert found["unread_projections"] == {"layers": 19, "parameters": 19 * 2 * 256 * 2048}
    prompt = found["prefill"]
    assert (prompt["first"], prompt["last"], prompt["layers"], prompt["passes"]) == (1, 20, 22, 9)
    assert prompt["cost"] == 1 + 8 * 20 / 22


@pytest.fixture(scope="module")
def eight():
    return kvpass.transform(decoder(layers=8), verify="off", device="cpu", progress=False)


@pytest.mark.parametrize(
    ("kv_source", "block"),
    [
        ("lckv:2", (1, 6)),
        ("lckv:4", (2, 5)),
        ("lasagna-top:2", (0, 7)),
        ("0_1_3_3_4_6_6_7", (2, 6)),
    ],
)
def test_a_prompt_repeats_the_layers_that_the_runtime_repeats(eight, kv_source, block):
    step = ShareLayers(kv_source, upward=True)
    slim = kvpass.transform(eight, [step], verify="off", progress=False)
    found = cli._repeated_layers(slim.plan, [step])
    assert (found.first, found.last) == block
    repeated = find_block(slim.program.forward)
    inside = ancestors(repeated.targets) - ancestors(repeated.entering)
    layers = sorted(int(n.kwargs["layer"]) for n in inside if n.target is ATTENTION)
    assert layers == list(range(found.first, found.last))  # and keys and values of the last


def test_the_cost_of_a_prompt():
    plan = plan_of(8, 4, 2, 8)
    assert cli._repeated_layers(ShareLayers("cla:2").plan(plan)) is None
    line = cli._repeated_layers(ShareLayers("lckv:2").plan(plan)).line()
    assert line == (
        "prefill repeats layers 1..6 of 8 until keys and values stand still: "
        "n passes cost 1 + (n-1)*6/8 times a plain prefill (9 passes: 7.0x)"
    )
    step = ShareLayers("lckv:2", passes=5)
    found = cli._repeated_layers(step.plan(plan), [step])
    assert (found.passes, found.cost(1), found.cost(5)) == (5, 1, 4)
    assert "stand still, at most 5 times and then token by token: " in found.line()
    assert found.line().endswith("(5 passes: 4.0x)")
    step = ShareLayers("lckv:2", passes=1, fallback=False)
    line = cli._repeated_layers(step.plan(plan), [step]).line()
    assert "at most 1 times: " in line
    assert line.endswith("(1 pass: 1.0x)")


# ---------------------------------------------------------------------- grouping (GQA)


def test_llama_2_70b_keeps_an_eighth_of_what_its_heads_would():
    # 2 (K, V) x 80 layers x 64 heads x 128 channels x 2 bytes = 2.5 MiB per token; the model as published has 8 KV
    # heads (Ainslie et al. 2023, arXiv 2305.13245; Touvron et al. 2023, arXiv 2307.09288): 320 KiB.
    heads = plan_of(80, 64, 64, 128)
    groups = GroupHeads(kv_heads=8).plan(heads)
    assert (heads.bytes_per_token(), groups.bytes_per_token()) == (2560 * KIB, 320 * KIB)
    # "0.5 MB -> 0.125 MB" is a quarter, so not this model: 32 layers of 32 heads of 128 channels, the shape of a 7B
    # (2 x 32 x 32 x 128 x 2 bytes = 512 KiB), with 8 KV heads, 128 KiB.
    heads = plan_of(32, 32, 32, 128)
    assert (heads.bytes_per_token(), GroupHeads(kv_heads=8).plan(heads).bytes_per_token()) == (512 * KIB, 128 * KIB)


def test_a_layer_of_the_captured_70b_is_counted_alike(folder):
    one = {"num_hidden_layers": 1}
    published = kvpass.plan(folder(LLAMA_70B | one))
    assert published.layers == plan_of(80, 64, 8, 128).layers[:1]
    grouped = document(folder(LLAMA_70B | one | {"num_key_value_heads": 64}), "--kv-heads", "8")
    assert grouped["bytes_per_token"] == {"before": 32 * KIB, "after": published.bytes_per_token()}


# ---------------------------------------------------------------------- what an edge costs


def decoder(layers=4, silent=None, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    if silent is not None:
        torch.nn.init.zeros_(model.model.layers[silent].self_attn.o_proj.weight)
    return model


@pytest.fixture(scope="module")
def silent():
    """A decoder of four layers; attention of layer 2 reaches nothing, whatever keys and values it reads."""
    return kvpass.transform(decoder(silent=2), verify="off", device="cpu", progress=False)


TOKENS = torch.randint(0, 61, (300,), generator=torch.Generator().manual_seed(1))
SIZES = {"context": 16, "continuation": 8, "windows": 3, "batch": 2}


def test_an_edge_into_a_layer_that_reaches_nothing_costs_nothing(silent):
    edges = scan_sharing(silent, TOKENS, max_distance=3, **SIZES)
    assert {(e.reader, e.owner) for e in edges} == {(i, j) for i in range(4) for j in range(i)}
    free = [e for e in edges if e.reader == 2]
    assert [(e.loss, e.loss_se, e.kl, e.top1) for e in free] == [(0, 0, 0, 1)] * 2
    assert all(e.kl > 1e-3 for e in edges if e.reader != 2)
    assert [e.loss for e in edges] == sorted(e.loss for e in edges)
    assert len({e.nll_original for e in edges}) == 1


def test_upward_edges_are_measured_where_asked_for(silent):
    seen = []
    edges = scan_sharing(
        silent, TOKENS, max_distance=1, upward=True, progress=lambda done, total: seen.append((done, total)), **SIZES
    )
    found = {(e.reader, e.owner): e for e in edges}
    assert set(found) == {(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)}
    assert found[2, 3].kl == pytest.approx(0, abs=1e-6)
    assert found[1, 2].kl > 1e-3
    assert seen == [(i, 6) for i in range(6)]


def test_an_edge_is_measured_as_by_hand_and_the_original_once(silent, monkeypatch):
    runs = []
    prefill = Transformed.prefill
    monkeypatch.setattr(Transformed, "prefill", lambda self, *given: runs.append(self) or prefill(self, *given))
    edges = scan_sharing(silent, TOKENS, max_distance=1, **SIZES)
    assert len({id(model) for model in runs}) == 1 + len(edges) == 4
    assert len(runs) == 2 * 4  # batches of windows
    monkeypatch.undo()
    shared = kvpass.transform(silent, [ShareLayers("0_1_2_2")], verify="off", progress=False)
    score = continuation({"original": silent, "shared": shared}, TOKENS, **SIZES)["shared"]
    edge = next(e for e in edges if e.reader == 3)
    assert edge.nll == pytest.approx(score.nll, abs=1e-6)
    assert edge.loss == pytest.approx(score.nll_delta, abs=1e-6)
    assert (edge.kl, edge.top1) == (pytest.approx(score.kl, abs=1e-6), score.top1)
    assert edge.to_dict()["loss"] == edge.loss


def test_pairs_that_cannot_share_are_left_out():
    uneven = kvpass.transform(decoder(3), [GroupHeads((1, 2, 1), method="mean")], verify="off", progress=False)
    edges = scan_sharing(uneven, TOKENS, **SIZES)
    assert [(e.reader, e.owner) for e in edges] == [(2, 0)]
    with pytest.raises(PlanError, match="kv_heads"):
        scan_sharing(uneven, TOKENS, max_distance=1, **SIZES)


def test_wrong_requests(silent):
    assert pairs(4) == [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2)]
    with pytest.raises(RequestError, match="at least 1, not 0"):
        scan_sharing(silent, TOKENS, max_distance=0)
    with pytest.raises(RequestError, match="one layer"):
        scan_sharing(kvpass.transform(decoder(1), verify="off", progress=False), TOKENS)
    nothing = EdgeLoss(1, 0, float("nan"), 1.0, float("nan"), 0.0, 1.0)
    assert nothing.to_dict()["loss"] is None
