"""What capture refuses: each with the right class, a reason that names the place, and what the user can do."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertLMHeadModel, BertModel, LlamaModel, T5Config, T5ForConditionalGeneration

import decoders
import families
import kvpass
from kvpass.capture import capture
from kvpass.errors import CaptureError, CheckError, SourceError
from kvpass.passes import GroupHeads


def refusal(source, kind=CaptureError, words=""):
    """The error of transforming `source`, held against what every refusal owes the user."""
    with pytest.raises(kind) as found:
        kvpass.transform(source, progress=False)
    error = found.value
    assert error.exit_status == (1 if isinstance(error, CheckError) else 2)
    assert words in str(error), f"{words!r} is not said in: {error}"
    assert "Traceback" not in str(error)
    assert len(error.what) > 20, error.what
    return error


# ---------------------------------------------------------------------- decoders by hand

NEGATIVE = {
    "bidirectional": ("layer 0 looks ahead", "token 0 reads token 1", ""),
    "prefix_lm": ("layer 0 looks ahead", "prefix mask", "layer 0"),
    "learned_bias": ("layer 0 adds a learned bias", "tables.0", "tables.0"),
    "odd_layer": ("layer 2", "looks ahead", "layer 2"),
    "pooled_encoder": ("to (2, 61), not to logits", "not an encoder, a classifier", ""),
    "data_dependent_mask": ("mask depends on the tokens", "layer 0", "layer 0"),
    "cross_token_conv": ("mixes tokens outside attention", "convolution", ""),
    "no_attention": ("the model has no attention", "no KV cache", ""),
}


@pytest.mark.parametrize("name", sorted(decoders.NEGATIVE))
def test_what_is_no_causal_decoder_is_refused(name):
    first, second, place = NEGATIVE[name]
    error = refusal(decoders.NEGATIVE[name](), CaptureError, first)
    assert second in str(error)
    assert place in error.where
    assert error.fix, f"{name} leaves the user without a remedy: {error}"


class Broken(decoders.NegativeBase):
    """A decoder whose forward does something that capture cannot express."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids):
        if self.fault == "control flow" and ids.sum() > 10:
            ids = ids + 0
        if self.fault == "item":
            ids = ids[:, : int(ids.max())]
        if self.fault == "fixed batch":
            ids = ids.view(3, -1)
        if self.fault == "fixed length":
            ids = ids.view(-1, 19)
        if self.fault == "counts its calls":
            self.calls += 1
        logits = super().forward(ids)
        if self.fault == "two outputs":
            return logits, logits
        if self.fault == "last token only":
            return logits[:, -1:]
        return {"scores": logits} if self.fault == "no logits" else logits


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("control flow", "Python control flow"),
        ("item", "Python control flow"),
        ("fixed batch", "does not run on a batch of 2"),
        ("fixed length", "a length of 5"),
        ("counts its calls", "changes its own state"),
        ("two outputs", "does not return logits"),
        ("no logits", "does not return logits"),
        ("last token only", "not to logits [batch, length, vocabulary]"),
    ],
)
def test_a_forward_that_is_no_function_of_the_tokens_is_refused(fault, words):
    error = refusal(Broken(fault).eval(), CaptureError, words)
    assert error.fix


def test_control_flow_on_values_is_shown_with_its_line():
    assert "test_refusals.py" in refusal(Broken("control flow").eval()).where


class Scores(nn.Module):
    """One attention whose probabilities are changed after the softmax."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = (p(x).unsqueeze(1) for p in (self.q, self.k, self.v))
        hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        weights = (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1)
        return self.head((weights.square() @ v).squeeze(1))


def test_probabilities_that_are_changed_are_refused():
    refusal(Scores().eval(), CaptureError, "changes the attention probabilities after the softmax")


# ---------------------------------------------------------------------- transformers' other models

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}


def test_an_encoder_is_refused_by_name():
    error = refusal(BertModel(BertConfig(**TINY)).eval())
    assert error.fix
    assert any(word in str(error) for word in ("encoder", "causal", "logits")), error


def test_an_encoder_with_a_head_looks_both_ways():
    error = refusal(BertLMHeadModel(BertConfig(**TINY)).eval())
    assert error.fix


def test_an_encoder_in_a_folder_is_refused_before_its_weights_are_read(tmp_path):
    config = BertConfig(**TINY, architectures=["BertForMaskedLM"])
    config.save_pretrained(tmp_path)
    error = refusal(tmp_path, CaptureError, "BertForMaskedLM is not a causal language model")
    assert "config.json" in error.where


def t5():
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=40)
    return T5ForConditionalGeneration(config).eval()


def test_an_encoder_decoder_is_refused_as_a_module_and_as_a_folder(tmp_path):
    model = t5()
    model.config.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        error = refusal(source, CaptureError, "encoder-decoder")
        assert "decoder-only" in error.fix


def test_a_decoder_without_its_head_is_refused():
    error = refusal(LlamaModel(families.FAMILIES["llama"].config()).eval())
    assert "logits" in str(error) or "head" in str(error), error
    assert error.fix


# ---------------------------------------------------------------------- what capture must leave as it was


class Dropping(decoders.NegativeBase):
    def forward(self, ids):
        return nn.functional.dropout(super().forward(ids), 0.5, training=self.training)


def test_a_model_in_training_is_captured_as_it_is_in_inference_and_left_in_training():
    model = Dropping().train()
    model.blocks[0].eval()
    before = {n: m.training for n, m in model.named_modules()}
    ids = torch.randint(0, 61, (2, 9))
    slim = kvpass.transform(model, progress=False)
    assert {n: m.training for n, m in model.named_modules()} == before, "capture changed which parts are in training"
    with torch.no_grad():
        torch.testing.assert_close(slim(ids), model.eval()(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_is_restored(implementation):
    model = families.build("llama", attn_implementation=implementation)
    kvpass.transform(model, progress=False)
    assert model.config._attn_implementation == implementation


def test_the_attention_implementation_is_restored_after_a_refusal():
    model = BertModel(BertConfig(**TINY)).eval()
    before = model.config._attn_implementation
    refusal(model)
    assert model.config._attn_implementation == before
    assert not model.training


def test_capture_changes_no_weight():
    model = families.build("llama").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    capture(model)
    assert model.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    families.build("llama").save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_do_not_fit_the_config_are_refused(folder):
    edit_config(folder, intermediate_size=64)
    error = refusal(folder, SourceError, "do not belong together")
    assert "(48, 32)" in error.what
    assert "(64, 32)" in error.what
    assert "mlp" in error.what


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    error = refusal(folder, SourceError)
    assert "model.layers.1.mlp.up_proj.weight" in str(error)


def test_a_folder_that_holds_pickles_only_is_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "convert it" in refusal(folder, SourceError, "pickle").fix


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert refusal(folder, SourceError, "safetensors").fix


def test_a_folder_without_a_config_is_refused(folder):
    (folder / "config.json").unlink()
    error = refusal(folder, SourceError)
    assert str(folder) in str(error)
    assert "config.json" in error.fix


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "no such family"}', '{"model_type": "llama"'])
def test_a_broken_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    error = refusal(folder, SourceError)
    assert str(folder) in str(error)
    assert error.fix


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    error = refusal(tmp_path / "nowhere", SourceError)
    assert "nowhere" in str(error)


def test_a_config_that_contradicts_itself_is_refused(folder):
    edit_config(folder, num_attention_heads=5)
    assert "heads (5)" in refusal(folder, SourceError).what


def test_a_nan_in_a_checkpoint_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckError) as found:
        kvpass.transform(folder, [GroupHeads(1)], progress=False)
    assert "model.layers.1.self_attn.v_proj.weight" in str(found.value)
    assert found.value.exit_status == 1
    assert "checkpoint" in found.value.fix


def test_an_infinity_in_an_output_projection_is_named():
    model = families.build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 3] = float("inf")
    with pytest.raises(CheckError) as found:
        kvpass.transform(model, [GroupHeads(1)], progress=False)
    assert "model.layers.0.self_attn.o_proj.weight" in str(found.value)
