"""PrunePyramid against the reference implementation's own numbers (tests/oracles/README.md)."""

import json
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvpass
from kvpass.errors import PlanError
from kvpass.ir.check import compare
from kvpass.passes import PrunePyramid

FILE = Path(__file__).resolve().parent.parent / "oracles" / "pyramid_golden.npz"
TOLERANCE = 1e-4  # of the logits' spread; the reference itself is 4e-4 (absolute) away from the same in float64
CASES = ("c7b", "lin")


@pytest.fixture(scope="module")
def golden():
    with numpy.load(FILE) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def about(golden):
    return json.loads(str(golden["meta"]))


@pytest.fixture(scope="module")
def dense(golden, about):
    model = LlamaForCausalLM(LlamaConfig(**about["model"], tie_word_embeddings=False)).eval()
    weights = {k.removeprefix("w/"): torch.from_numpy(v) for k, v in golden.items() if k.startswith("w/")}
    model.load_state_dict(weights)
    return kvpass.transform(model, progress=False)


@pytest.fixture(scope="module", params=CASES)
def case(request, golden, about, dense):
    """A case's name and what a run of it gave: state after prefill, logits, lengths per step, state at the end."""
    name = request.param
    slim = kvpass.transform(dense, [PrunePyramid.from_reference(about["cases"][name])], progress=False)
    logits, state = slim.prefill(torch.from_numpy(golden["input_ids"]).long())
    after, fills, steps = state.clone(), [], []
    for token in torch.from_numpy(golden["gen_ids"]).long().T:
        steps.append(slim.decode(token.unsqueeze(1), state)[:, 0])
        fills.append([state.fills[layer][0] for layer in range(len(slim.plan))])
    return name, logits, after, steps, fills, state


def positions(state, layer):
    return torch.stack(state.positions(layer))[:, 0].numpy()


def test_prompts_keep_the_reference_s_positions(case, golden):
    name, logits, after, _, _, _ = case
    assert [after.fills[layer][0] for layer in range(8)] == golden[f"{name}/prefill_kv_len"].tolist()
    for layer in range(8):
        numpy.testing.assert_array_equal(positions(after, layer), golden[f"{name}/pos{layer}"])
    assert compare(torch.from_numpy(golden[f"{name}/prefill_last_logits"]), logits) < TOLERANCE


def test_generation_keeps_the_reference_s_positions(case, golden):
    name, _, _, steps, fills, state = case
    numpy.testing.assert_array_equal(fills, golden[f"{name}/gen_kv_len"])
    for layer in range(8):
        numpy.testing.assert_array_equal(positions(state, layer), golden[f"{name}/genpos{layer}"])
    for step, expected in zip(golden[f"{name}/gen_logits_steps"], golden[f"{name}/gen_logits"], strict=True):
        assert compare(torch.from_numpy(expected), steps[step]) < TOLERANCE


@pytest.fixture(scope="module")
def survivors(golden, about, dense):
    """Which tokens each layer holds after a prompt and 60 more, with the linear case's parameters changed."""

    @cache
    def run(**change):
        step = PrunePyramid.from_reference({**about["cases"]["lin"], "gen_decay_ratio": 0.5, **change})
        slim = kvpass.transform(dense, [step], progress=False, verify="off")
        _, state = slim.prefill(torch.from_numpy(golden["input_ids"]).long())
        for token in torch.from_numpy(golden["gen_ids"])[:, :60].long().T:
            slim.decode(token.unsqueeze(1), state)
        return [[row[0].tolist() for row in state.positions(layer)] for layer in range(8)]

    return run


@pytest.mark.parametrize(
    "change",
    [
        {"distance_weight": 1.0},
        {"recent_ratio": 0.19},
        {"streamingllm_sink_len": 0},
        {"prefill_decay_ratio": 0.85},
        {"layerwise_downsample_interval": 2},
        {"gen_compress_ratio": 0.8},
    ],
    ids=str,
)
def test_another_rule_would_be_noticed(change, survivors):
    assert survivors(**change) != survivors()


def test_parameters_that_the_reference_does_not_have_are_refused(about):
    with pytest.raises(PlanError, match="no parameter 'top_p'"):
        PrunePyramid.from_reference({**about["cases"]["c7b"], "top_p": 0.5})
    with pytest.raises(PlanError, match="blocks of 32"):
        PrunePyramid.from_reference({**about["cases"]["c7b"], "exceed_length_to_compress": 32})
