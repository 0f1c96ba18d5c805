"""`explain`: what a pass finds at each layer of a model, and for one odd layer which, where, why and how nearly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig
from typer.testing import CliRunner, Result

import decoders
import families
import kvpass
from examples.odd_layer import Decoder
from kvpass import cli
from kvpass.errors import CaptureError, RequestError
from kvpass.explanation import EXPLAINED, Explanation, table
from kvpass.recipe import PASSES

VOCAB, DIM, HEADS, SIZE = 61, 32, 4, 8
ROOT = Path(__file__).parent.parent
LINES = Path(__file__).read_text(encoding="utf-8").splitlines()


def line_of(marker: str) -> str:
    """`file.py:line` of the line of this file that ends with a comment."""
    (number,) = [n for n, line in enumerate(LINES, 1) if line.endswith(f"# {marker}")]
    return f"{Path(__file__).name}:{number} "


class Block(nn.Module):
    """Attention with RoPE, and one oddity or none."""

    def __init__(self, odd: str, spelling: str) -> None:
        super().__init__()
        self.odd, self.spelling = odd, spelling
        self.norm = nn.LayerNorm(DIM)
        self.q, self.k, self.v, self.o, self.g = (nn.Linear(DIM, DIM, bias=False) for _ in range(5))
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.whole = decoders.RMSNorm(DIM)
        self.mlp = decoders.GeluMLP(DIM, DIM)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        if self.odd == "rope":
            stretched = torch.cat([angles.sin()[:, :5], 1.5 * angles.sin()[:, 5:6], angles.sin()[:, 6:]], dim=-1)
            return x * angles.cos() + decoders.rotate_half(x) * stretched  # no rotation
        return x * angles.cos() + decoders.rotate_half(x) * angles.sin()

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, s, _ = h.shape
        if self.odd == "order":  # channels outermost, then v, k, q, then heads from the last to the first
            v, k, q = self.qkv(h).view(b, s, SIZE, 3, HEADS).flip(-1).permute(3, 0, 4, 1, 2)
            return q, k, v
        key = self.whole(self.k(h)) if self.odd == "norm" else self.k(h)
        q, k, v = (t.view(b, s, HEADS, SIZE).transpose(1, 2) for t in (self.q(h), key, self.v(h)))
        return q, k, v

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        b, s, c = x.shape
        h = self.norm(x)
        q, k, v = self.heads(h)
        q, k = self.turn(q, angles), self.turn(k, angles)
        query, key = torch.arange(s).view(-1, 1), torch.arange(s)
        seen = key <= query
        if self.odd == "mask":
            seen = seen & ((key % 3 != 2) | (key == query))  # every third key
        if self.odd == "branch" and bool((h.sum() > 0).item()):  # a branch
            x = x + 1
        if self.spelling == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            y = (q @ k.mT * SIZE**-0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(b, s, c)
        if self.odd == "gate":
            y = y * torch.sigmoid(self.g(h))  # a gate
        if self.odd == "twice":
            return x + self.o(y) + self.g(y)
        x = x + self.o(y)
        return x + self.mlp(x)


class Model(nn.Module):
    """Four layers, of which some are odd."""

    def __init__(self, spelling: str = "sdpa", **odd: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        kinds = {layer: kind for kind, layer in odd.items()}
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Block(kinds.get(n, ""), spelling) for n in range(4))
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        angles = decoders.rotary_angles(torch.arange(ids.shape[1]), SIZE).repeat(1, 2)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, angles)
        return self.head(x)


def the_miss(found: list[Explanation], layer: int) -> Explanation:
    """The only layer that does not match, which must be this one, with all that a miss owes."""
    assert [e.layer for e in found] == list(range(len(found)))
    assert [e.layer for e in found if not e.matched] == [layer]
    miss = found[layer]
    assert all((miss.failed, miss.reason, miss.node, miss.source, miss.near_miss, miss.remedy)), miss
    return miss


def facts(explained: Explanation) -> dict[str, str]:
    return {f.name: f.value for f in explained.evidence}


# ---------------------------------------------------------------------- one odd layer


@pytest.mark.parametrize("name", ["slide-window", "evict-kv", "prune-pyramid"])
def test_a_mask_that_hides_every_third_key_is_told_by_the_entries_that_causal_misses(name: str) -> None:
    found = kvpass.explain(Model(mask=2), name)
    miss = the_miss(found, 2)
    assert miss.failed == "mask"
    assert "table" in miss.reason
    assert miss.source.startswith(line_of("every third key"))
    hidden = sum(key % 3 == 2 and key < query for query in range(24) for key in range(24))
    assert miss.near_miss == (
        f"causal explains {300 - hidden} of 300 entries; first apart at head 0, query 3, key 2, which the model hides "
        "and causal shows"
    )
    assert facts(miss)["mask"].startswith("tabulated")
    assert facts(found[1])["mask"].startswith("causal, tried at positions up to ")


def test_a_mask_that_is_kept_as_a_table_does_not_trouble_passes_that_do_not_read_it() -> None:
    found = kvpass.explain(Model(mask=2), "group-heads")
    assert all(e.matched for e in found)
    assert facts(found[2])["mask"].startswith("tabulated")


def test_a_saved_program_tells_the_mask_that_was_kept_as_a_table(tmp_path: Path) -> None:
    kvpass.transform(Model(mask=2), verify="off", progress=False).save(tmp_path / "saved")
    for name in ("evict-kv", "lower-attention"):
        miss = the_miss(kvpass.explain(str(tmp_path / "saved"), name), 2)
        assert "table" in miss.reason
        assert miss.source.startswith(line_of("every third key"))
        assert miss.near_miss.startswith("causal explains 216 of 300 entries")


def test_a_layer_that_capture_refuses_leaves_the_others_explained() -> None:
    model = Model("eager", mask=2)
    with pytest.raises(CaptureError, match="mask is not understood"):
        kvpass.plan(model)
    found = kvpass.explain(model, "group-heads")
    miss = the_miss(found, 2)
    assert (miss.failed, "mask is not understood" in miss.reason) == ("capture", True)
    assert miss.near_miss.startswith("causal explains 216 of 300 entries; first apart at head 0, query 3, key 2")
    assert line_of("every third key").split(":")[0] in miss.source
    assert facts(miss)["k rows"] == "blocks.2.k.weight: 0..31 in order of heads of 32 rows"
    assert "mask" not in facts(miss), "what stands in for a refused mask was told as evidence"


def test_a_layer_that_looks_ahead_is_named_and_the_others_match() -> None:
    miss = the_miss(kvpass.explain(decoders.NEGATIVE["odd_layer"](), "slide-window"), 2)
    assert miss.failed == "capture"
    assert "looks ahead: token" in miss.reason
    assert "decoders.py:" in miss.source


@pytest.mark.parametrize("name", ["group-heads", "share-layers", "raise-rotary"])
def test_a_pair_that_does_not_rotate_is_told_with_the_rotation_nearest_to_it(name: str) -> None:
    found = kvpass.explain(Model(rope=1), name)
    miss = the_miss(found, 1)
    assert miss.failed in ("RoPE of k", "RoPE of q")
    assert miss.reason == "positions change channel 1 in another way than a rotation"
    assert miss.source.startswith(line_of("no rotation"))
    assert miss.near_miss.startswith("channels 1 and 5 are mixed by (")
    assert miss.near_miss.endswith("is off by 0.025; 1 pairs before it rotate")
    assert ("k rows" in facts(miss)) == (name != "raise-rotary")
    assert facts(found[0])["RoPE of k"] == "4 pairs, half, in all 8 channels, frequencies 1 to 0.001 per position"


def test_a_gate_before_the_output_projection_is_named_with_what_it_reads() -> None:
    miss = the_miss(kvpass.explain(Model(gate=3), "group-heads"), 3)
    assert miss.failed == "o columns"
    assert miss.reason == "the attention output is combined with other data before its output projection"
    assert miss.source == line_of("a gate") + "forward: y = y * torch.sigmoid(self.g(h))  # a gate"
    assert miss.near_miss.startswith("blocks.3.o.weight would read it, were it not for sigmoid")
    assert facts(miss)["norms"] == "q none; k none; v none"


def test_an_output_that_two_projections_read_is_told_with_both() -> None:
    miss = the_miss(kvpass.explain(Model(twice=0), "group-heads"), 0)
    assert miss.failed == "o columns"
    assert miss.near_miss.count("return x + self.o(y) + self.g(y)") == 2


def test_a_norm_over_all_heads_is_told_by_what_it_does_to_the_others() -> None:
    miss = the_miss(kvpass.explain(Model(norm=2), "group-heads"), 2)
    assert miss.reason.startswith("its keys are normalised over all heads together")
    assert miss.near_miss.startswith("a change of one head changes the others")
    assert "k over all heads" in facts(miss)["norms"]


def test_a_fused_projection_in_an_odd_order_matches_and_its_map_is_shown() -> None:
    found = kvpass.explain(Model(order=1), "group-heads")
    assert all(e.matched for e in found)
    assert [facts(found[1])[f"{o} rows"] for o in "qkv"] == [
        f"blocks.1.qkv.weight: {first} - h + 12 c for channel c of head h of 96 rows" for first in (11, 7, 3)
    ]
    assert facts(found[0])["k rows"] == "blocks.0.k.weight: 0..31 in order of heads of 32 rows"
    assert facts(found[1])["may become"] == "1, 2, 4 KV heads"


def test_a_layer_that_export_gives_up_at_is_named_alone() -> None:
    (found,) = kvpass.explain(Model(branch=2), "group-heads")
    assert (found.layer, found.matched, found.node) == (2, False, "blocks.2")
    assert found.source.startswith(line_of("a branch").strip())
    with pytest.raises(CaptureError):
        kvpass.explain(Model(branch=2), "group-heads", layer=1)


def test_layers_without_attention_are_named_and_the_others_match() -> None:
    config = Lfm2Config(
        **families.LLAMA | {"num_hidden_layers": 3}, layer_types=["full_attention", "conv", "full_attention"]
    )
    miss = the_miss(kvpass.explain(Lfm2ForCausalLM(config).eval(), "quantize-kv"), 1)
    assert miss.reason == "layer 1 has no attention: nothing in it keeps keys and values"
    assert "F.conv1d" in miss.source
    assert miss.near_miss == "2 of 3 layers attend"


def test_a_state_space_layer_is_named_with_its_line(tmp_path: Path) -> None:
    MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=2).save_pretrained(tmp_path)
    (found,) = kvpass.explain(str(tmp_path), "group-heads")
    assert (found.layer, found.matched) == (0, False)
    assert "modeling_mamba.py:" in found.source


# ---------------------------------------------------------------------- families


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    families.build("llama").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", EXPLAINED)
def test_every_pass_matches_every_layer_of_a_llama(name: str, llama: str) -> None:
    found = kvpass.explain(llama, name)
    assert [(e.layer, e.matched, e.reason) for e in found] == [(0, True, ""), (1, True, "")]
    assert all(f.name and f.value for e in found for f in e.evidence)


def test_every_pass_of_recipes_can_be_explained() -> None:
    assert set(PASSES) < set(EXPLAINED)


def test_a_norm_over_all_heads_is_refused_by_heads_alone() -> None:
    model = families.build("olmo2")
    found = kvpass.explain(model, "group-heads")
    assert not any(e.matched for e in found)
    assert all("normalised over all heads" in e.reason and "modeling_olmo2.py:" in e.source for e in found)
    assert all(e.matched for e in kvpass.explain(model, "share-layers"))


def test_latent_attention_is_told_with_both_projections_and_their_lines() -> None:
    found = kvpass.explain(families.build("deepseek_v3"), "group-heads")
    assert [(e.layer, e.failed) for e in found] == [(n, "k rows") for n in range(3)]
    assert found[1].near_miss.count("modeling_deepseek_v3.py:") == 2
    assert facts(found[1])["v rows"].endswith("kv_b_proj.weight: 8 + 20 h + c for channel c of head h of 80 rows")
    assert table(found).startswith("layers 0-2: NOT matched (k rows)")


# ---------------------------------------------------------------------- the command


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["explain", *words])


def test_the_command_prints_layers_that_say_the_same_together(llama: str) -> None:
    said = run(llama, "--pass", "group-heads")
    assert said.exit_code == 0, said.output
    assert said.stdout.startswith("layers 0-1: matched\n")
    assert "model.layers.*.self_attn.k_proj.weight: 0..15 in order of heads of 16 rows" in said.stdout
    assert said.stdout.endswith("2 of 2 layers match\n")
    assert max(map(len, said.stdout.splitlines())) <= 120


def test_json_holds_every_layer_and_no_weight_is_read(llama: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(llama) / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    done = run(str(tmp_path), "--pass", "share-layers", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["pass"], found["matched"], [e["layer"] for e in found["layers"]]) == ("share-layers", 2, [0, 1])
    assert found["layers"][0]["evidence"][-1] == {"name": "may read one another", "value": "layers 0, 1"}


def test_a_folder_that_kvpass_saved_is_explained(llama: str, tmp_path: Path) -> None:
    shared = kvpass.transform(llama, [PASSES["share-layers"]("cla:2")], progress=False)  # type: ignore[call-arg]
    shared.save(tmp_path / "slim")
    for source in (shared, str(tmp_path / "slim")):
        reasons = [e.reason for e in kvpass.explain(source, "group-heads")]
        assert [bool(r) for r in reasons] == [False, True]
        assert "each layer has its own" in reasons[1]
    found = json.loads(run(str(tmp_path / "slim"), "--pass", "group-heads", "--layer", "1", "--json").stdout)
    assert [(e["layer"], e["failed"]) for e in found["layers"]] == [(1, "plan")]


def test_a_layer_or_a_pass_that_does_not_exist_is_refused(llama: str) -> None:
    beyond = run(llama, "--pass", "group-heads", "--layer", "2")
    assert (beyond.exit_code, "the model has 2 layers" in beyond.output) == (2, True)
    unknown = run("no-such-folder", "--pass", "no-such-pass")
    assert (unknown.exit_code, "give group-heads, share-layers" in unknown.output) == (2, True)
    with pytest.raises(RequestError, match="no pass 'no-such-pass' to explain"):
        kvpass.explain(llama, "no-such-pass")


def test_the_document_shows_what_the_commands_print() -> None:
    text = (ROOT / "docs" / "explain.md").read_text(encoding="utf-8")
    example, command = re.findall(r"```text\n(.*?)```", text, re.S)
    assert example == table(kvpass.explain(Decoder(), "slide-window")) + "\n"
    said = run(str(ROOT / "examples" / "bookworm"), "--pass", "group-heads", "--layer", "3")
    assert (said.exit_code, said.stdout) == (0, command)
