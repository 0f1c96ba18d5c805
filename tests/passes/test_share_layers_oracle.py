"""Cross-layer sharing against golden logits of the reference implementation (tests/oracles/README.md)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import kvpass
from kvpass.passes import ShareLayers

FOLDER = Path(__file__).parent.parent / "oracles"
ABOUT = json.loads((FOLDER / "lckv_golden.json").read_text())
TOLERANCE = 2e-4
CASES = [(name, init) for name, about in ABOUT["configs"].items() for init in about["inits"]]


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "lckv_golden.safetensors")


@pytest.fixture(scope="module")
def dense(golden):
    model = LlamaForCausalLM(LlamaConfig(**ABOUT["arch"], attn_implementation="sdpa")).eval()
    weights = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    model.load_state_dict(weights)
    return kvpass.transform(model, progress=False)


@pytest.fixture(scope="module")
def shared(dense):
    """Makes the model of a case, each once."""

    @cache
    def make(name, init, **options):
        about = ABOUT["configs"][name]
        strict = "all" if about["force_nodiag"] else "readers"
        step = ShareLayers(about["layer_types"], init=init, strict=strict, upward=True, **options)
        return kvpass.transform(dense, [step], progress=False)

    return make


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def is_upward(name):
    return any(int(w) > i for i, w in enumerate(ABOUT["configs"][name]["layer_types"].split("_")))


def test_the_dense_model_is_the_oracles(dense, golden):
    with torch.no_grad():
        close(dense(golden["input_ids"]), golden["dense_hf.logits"])


@pytest.mark.parametrize(("name", "init"), CASES)
def test_nine_passes_give_the_reference_s_logits(shared, golden, name, init):
    slim = shared(name, init, passes=9, tolerance=0.0, fallback=False)
    ids = golden["input_ids"]
    with torch.no_grad():
        close(slim(ids), golden[f"{name}.{init}.parallel9"])
    assert slim.executor.passes == (9 if is_upward(name) else 1)


@pytest.mark.parametrize(("name", "init"), [c for c in CASES if is_upward(c[0])])
def test_the_fixed_point_is_the_reference_s(shared, golden, name, init):
    slim = shared(name, init)
    ids = golden["input_ids"]
    exact = golden[f"{name}.{init}.exact"]
    with torch.no_grad():
        close(slim(ids), exact)
    logits, state = slim.prefill(ids)
    close(logits, exact[:, -1])
    assert state.passes[0][1]
    one_by_one, state = slim.prefill(ids[:, :1])
    steps = [one_by_one] + [slim.decode(ids[:, i : i + 1], state)[:, 0] for i in range(1, ids.shape[1])]
    close(torch.stack(steps, dim=1), exact)


@pytest.mark.parametrize("name", ABOUT["configs"])
def test_prefill_in_nine_passes_and_decode_give_the_reference_s_trace(shared, golden, name):
    slim = shared(name, "copy", passes=9, tolerance=0.0, fallback=False)
    ids, first = golden["input_ids"], ABOUT["prefill"]
    _, state = slim.prefill(ids[:, :first])
    steps = [slim.decode(ids[:, i : i + 1], state)[:, 0] for i in range(first, ids.shape[1])]
    close(torch.stack(steps, dim=1), golden[f"{name}.copy.decode"])


@pytest.mark.parametrize("name", ABOUT["configs"])
def test_parameters_and_cache_layers_are_counted_as_in_the_reference(shared, name):
    slim = shared(name, "copy")
    about = ABOUT["configs"][name]
    used = slim.program.used_weights()
    parameters = sum(w.read().numel() for n, w in slim.program.weights.items() if n in used and not w.constant)
    assert parameters == about["num_parameters"]
    assert slim.plan.owners() == about["cache_layers"]
    assert sorted(slim.prefill(torch.zeros((1, 3), dtype=torch.long))[1].stores) == about["cache_layers"]
