"""The pass of docs/write-a-pass.md does what the page says: planned, run, verified, composed, and named in a recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import kvpass
from examples.local_global import LocalGlobal
from kvpass.errors import PlanError, RequestError
from kvpass.passes import GroupHeads, QuantizeKV
from kvpass.recipe import PASSES, Recipe

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "write-a-pass.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, num_key_value_heads=4, max_position_embeddings=64, **sizes)
    ).eval()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, LocalGlobal.key(), LocalGlobal)


def test_the_page_shows_the_pass_as_it_is():
    shown = [block.strip() for block in re.findall(r"```python\n(.*?)```", PAGE, re.S)]
    code = (ROOT / "examples" / "local_global.py").read_text(encoding="utf-8").strip()
    assert code in shown, "copy examples/local_global.py into docs/write-a-pass.md"
    assert len(code.splitlines()) <= 42


def test_every_second_layer_keeps_a_window_only(decoder):
    plan = kvpass.plan(decoder, LocalGlobal(8, every=2))
    assert [cache.window for cache in plan] == [8, 0, 8, 0]
    assert plan.bytes(1, 64) * 64 == kvpass.plan(decoder).bytes(1, 64) * (8 + 64) // 2


def test_what_it_computes_is_the_model_with_windows_in_those_layers(decoder):
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    slim = kvpass.transform(decoder, LocalGlobal(8, every=2), verify="full", progress=False)
    config = decoder.config.to_dict() | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
    config["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config.pop("model_type")
    same = Qwen2ForCausalLM(Qwen2Config(**config)).eval()  # a family that has such layers, with the same weights
    missing = same.load_state_dict(decoder.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        for name in missing:  # its biases, which a Llama has not
            same.get_parameter(name).zero_()
        torch.testing.assert_close(slim(ids), same(ids).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(slim(ids), decoder(ids).logits, rtol=1e-4, atol=1e-5)


def test_it_composes_with_other_passes_and_decodes_what_one_pass_computes(decoder):
    slim = kvpass.transform(
        decoder, [GroupHeads(2, method="mean"), LocalGlobal(8, every=2), QuantizeKV(8)], verify="full", progress=False
    )
    assert [(c.kv_heads, c.window, str(c.format)) for c in slim.plan] == [(2, 8, "int8"), (2, 0, "int8")] * 2
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    logits, state = slim.prefill(ids[:, :12])
    for place in range(12, 20):
        logits = slim.decode(ids[:, place : place + 1], state)
    error = (logits.flatten() - slim(ids)[0, -1]).abs().max() / slim(ids).std()
    assert error < 0.05, f"decoding is off by {error:.1e} of the logits' spread"


def test_a_wish_that_makes_no_sense_is_refused_with_what_to_do(decoder):
    with pytest.raises(PlanError, match="every=6"):
        kvpass.plan(decoder, LocalGlobal(0))


def test_a_recipe_does_not_know_the_pass_until_it_is_entered():
    with pytest.raises(RequestError, match="there is no pass 'local-global'"):
        Recipe.parse('[[pass]]\nname = "local-global"\nwindow = 8\n')


@pytest.mark.usefixtures("registered")
def test_a_recipe_names_the_pass_and_a_folder_remembers_it(decoder, tmp_path):
    recipe = Recipe.parse('[[pass]]\nname = "local-global"\nwindow = 8\nevery = 2\n')
    assert recipe.passes == (LocalGlobal(8, every=2),)
    assert Recipe.parse(recipe.dump()) == recipe
    with pytest.raises(RequestError, match="local-global has no key 'step'"):
        Recipe.parse('[[pass]]\nname = "local-global"\nwindow = 8\nstep = 2\n')
    slim = kvpass.transform(decoder, recipe, progress=False)
    slim.save(tmp_path / "slim")
    again = kvpass.load(tmp_path / "slim")
    assert again.plan == slim.plan
    assert again.recipe == recipe
