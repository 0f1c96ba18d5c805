"""Packages that prune prompts keep the tokens that torch keeps, in caches of different lengths, and go on from them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import kvpass
from export_models import captured, wide
from kvpass.errors import CheckError, PlanError, RequestError
from kvpass.export.onnx import chosen, gate
from kvpass.export.onnx import export as exporting
from kvpass.export.onnx.chosen import choices_of, told
from kvpass.export.onnx.lower import check_plan, lower
from kvpass.export.onnx.runner import OnnxModel
from kvpass.ir.retention import Retention
from kvpass.passes import EvictKV, GroupHeads, PrunePyramid, QuantizeKV, ShareLayers, SlideWindow

POSITIONS = 300
RECIPES = {
    "a pyramid": [PrunePyramid(schedule="pyramidinfer", decay=0.5)],
    "a fraction of the bytes": [PrunePyramid(keep=0.6)],
    "every head its own tokens": [EvictKV("snapkv", keep=0.4)],
    "fewer tokens above": [EvictKV("pyramidkv", keep=0.5)],
    "shared layers": [ShareLayers("cla:2"), EvictKV("snapkv", keep=0.5)],
    "one head in 8 bits": [GroupHeads(1, method="first"), EvictKV("snapkv", keep=0.5), QuantizeKV(8, layout="static")],
}
FAMILIES = [("gpt2", "a fraction of the bytes"), ("phi", "every head its own tokens"), ("opt", "fewer tokens above")]


def transformed(family: str, recipe: str):
    steps = RECIPES[recipe]
    text = [torch.randint(0, 97, (8, 64), generator=torch.Generator().manual_seed(1))]
    layers = {"num_hidden_layers": 4, "max_position_embeddings": 512} if family == "llama" else {}
    calibration = text if any(step.needs_calibration for step in steps) else None
    return kvpass.transform(captured(family, **layers), steps, calibration=calibration, progress=False, verify="off")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    @functools.cache
    def make(recipe: str):
        model, folder = transformed("llama", recipe), tmp_path_factory.mktemp("chosen") / "out"
        return model, folder, model.export_onnx(folder, positions=POSITIONS)

    return make


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_of_different_lengths_are_pruned_and_continued_as_torch_does(packages, recipe: str) -> None:
    model, folder, made = packages(recipe)
    assert [c["name"] for c in made.checks] == ["prompts of two lengths", "32 steps"]
    quantized = not model.plan[0].format.full
    assert all(c["measured"] < (2e-3 if quantized else 1e-5) for c in made.checks), made.checks
    ids = torch.randint(3, 97, (3, 160), generator=torch.Generator().manual_seed(7))
    lengths, rows = torch.tensor([140, 57, 3]), torch.arange(3)
    run = OnnxModel.open(folder, threads=1)
    logits, state = model.prefill(ids[:, :140], lengths)
    pairs = [(run.prefill(ids[:, :140], lengths, capacity=150), logits)]
    for step in range(6):
        token = ids[rows, lengths + step].unsqueeze(1)
        pairs.append((run.decode(token), model.decode(token, state)[:, -1]))
    for found, right in pairs:
        assert np.abs(found - right.numpy()).max() < (3e-3 if quantized else 1e-5) * np.ptp(right.numpy())
    for owner in model.plan.owners():
        fills = state.fills[owner]
        assert run._fills[owner].tolist() == fills
        assert run._buffers[f"{owner}.key"].shape()[2] == max(fills) - 6 + 147  # what stays, and room for 150 tokens
        for row, fill in enumerate(fills):
            kept = model.plan.layout(owner).entries(
                [t[row : row + 1] for t in state.stores[owner]], fill, torch.float32
            )
            held = run._buffers[f"{owner}.key"].numpy()[row, :, :fill].astype(np.float32)
            assert np.abs(held - kept[0][0].numpy()).max() <= (1 if quantized else 1e-4)
    short = run.generate(ids[:, :140], lengths, max_new_tokens=5, eos=())
    with torch.no_grad():
        text = model.generate(ids[:1, :140], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert short[0] == text[0, 140:].tolist()


@pytest.mark.parametrize(("family", "recipe"), FAMILIES)
def test_other_families(tmp_path: Path, family: str, recipe: str) -> None:
    made = transformed(family, recipe).export_onnx(tmp_path / "out")
    assert all(c["measured"] < 1e-5 for c in made.checks), made.checks


def test_half_precision(tmp_path: Path) -> None:
    made = transformed("llama", "a pyramid").export_onnx(tmp_path / "out", dtype="fp16", positions=POSITIONS)
    assert all(c["measured"] < 1e-2 for c in made.checks), made.checks


@pytest.mark.parametrize(
    "steps", [RECIPES["every head its own tokens"], [ShareLayers("lckv:2")]], ids=["chosen", "upward"]
)
def test_two_graphs_share_weights_of_4_bits(tmp_path: Path, steps) -> None:
    decoder = wide("llama", num_hidden_layers=4, max_position_embeddings=512)
    model = kvpass.transform(decoder, steps, progress=False, verify="off")
    made = model.export_onnx(tmp_path / "out", weights="int4", positions=POSITIONS)
    assert all(c["measured"] < (c["allowed"] or 1) for c in made.checks), made.checks
    assert made.nodes["MatMulNBits"] > 4 * 4
    for file in (tmp_path / "out").glob("*.onnx"):
        proto = onnx.load(file, load_external_data=False)
        codes = [i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.UINT8]
        assert {e.value for i in codes for e in i.external_data if e.key == "location"} == {"model.onnx.data"}


def test_both_graphs_read_one_file_of_weights(packages) -> None:
    _, folder, _ = packages("every head its own tokens")
    for file in ("model.onnx", "prompt.onnx"):
        proto = onnx.load(folder / file, load_external_data=False)
        matrices = [i for i in proto.graph.initializer if len(i.dims) == 2 and i.name.startswith("w_model")]
        assert len(matrices) > 4 * 6
        assert all(i.external_data for i in matrices)
        assert {e.value for i in proto.graph.initializer for e in i.external_data if e.key == "location"} == {
            "model.onnx.data"
        }
    assert not (folder / "genai_config.json").exists()  # one graph for prompts and steps is all that it runs


def test_what_the_runner_tells_is_what_the_plan_says(packages) -> None:
    for recipe in RECIPES:
        plan = packages(recipe)[0].plan
        choices, owners = choices_of(plan), plan.owners()
        for prompt in (1, 2, 31, 64, 100, 257):
            indices, held = told(choices, owners, prompt)
            assert held == plan.kept(prompt)
            for choice in choices:
                reached = plan.reached(prompt)[choice.layer]
                asked = min(Retention.parse(choice.rule).observed(prompt), reached)
                assert indices[choice.name] == range(reached - asked, reached)


def test_a_rule_that_looks_at_no_attention_asks_nobody() -> None:
    plan = kvpass.plan(wide("llama", num_hidden_layers=2))
    recent = Retention(by="recent", sinks=2, budget=20)
    plan = plan.with_layer(0, keeps=recent).with_layer(1, keeps=recent)
    assert [c.name for c in choices_of(plan)] == ["", ""]
    assert set(told(choices_of(plan), [0, 1], 50)[0]) == {"kept.in.0", "kept.in.1"}


def test_other_survivors_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survivors = chosen.survivors_of_prompt
    monkeypatch.setattr(chosen, "survivors_of_prompt", lambda ranks, *rest, **rule: survivors(-ranks, *rest, **rule))
    with pytest.raises(CheckError, match="logits differ") as caught:
        transformed("llama", "a fraction of the bytes").export_onnx(tmp_path / "out", positions=POSITIONS)
    assert "prompt.onnx" in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [[EvictKV("snapkv", budget=100)], *RECIPES.values()])
def test_the_prompts_of_the_check_lose_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps) -> None:
    layers = {"num_hidden_layers": 4, "max_position_embeddings": 512}
    text = [torch.randint(0, 97, (8, 64), generator=torch.Generator().manual_seed(1))]
    model = kvpass.transform(captured("llama", **layers), steps, calibration=text, progress=False, verify="off")
    read: list[int] = []

    def run(model, folder, lengths, steps, *, seed):
        read.extend(lengths.tolist())
        return torch.zeros(1 + steps, 2, 97), torch.zeros(1 + steps, 2, 97)

    monkeypatch.setattr(gate, "_by_runner", run)
    gate._compare_chosen(model, tmp_path, "fp32", POSITIONS)
    assert len(read) == 2
    for length in read:
        assert any(kept < length for kept in model.plan.kept(length).values())


def test_another_place_of_new_tokens_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(*arguments):
        graph = lower(*arguments)
        if graph.reads == "one":
            nodes = graph.module.graph.nodes
            starts = next(n for n in nodes if n.op == "placeholder" and n.target == "starts")
            fill = next(n for n in nodes if n.op == "placeholder" and n.target == "fill_3")
            starts.replace_all_uses_with(fill)
            graph.module.recompile()
        return graph

    monkeypatch.setattr(exporting, "lower", moved)
    with pytest.raises(CheckError, match="32 steps: logits differ"):
        transformed("llama", "a fraction of the bytes").export_onnx(tmp_path / "out", positions=POSITIONS)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ([EvictKV("h2o", budget=200)], "changes as text is generated"),
        ([EvictKV("random", budget=200)], "changes as text is generated|is random"),
        ([SlideWindow(8, 0), EvictKV("snapkv", keep=0.5)], "window"),
        ([EvictKV("snapkv", keep=0.5), QuantizeKV(4, layout="static")], "4 bits"),
        ([EvictKV("snapkv", keep=0.5), QuantizeKV(8)], "stored as int8"),
    ],
)
def test_what_changes_as_text_is_generated_is_refused(recipe, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_plan(kvpass.plan(wide("llama", num_hidden_layers=4), recipe))


def test_more_positions_than_were_learned_are_refused(tmp_path: Path) -> None:
    model = captured("gpt2")
    with pytest.raises(RequestError, match="learned fewer than 5000 positions"):
        model.export_onnx(tmp_path / "out", positions=5000)
    assert not any(tmp_path.iterdir())


def test_the_folder_says_what_was_chosen(packages) -> None:
    model, folder, _ = packages("a pyramid")
    marker = json.loads((folder / "kvpass-onnx.json").read_text())
    assert [(c["layer"], c["passes"]) for c in marker["choices"]] == [
        (c.layer, True) for c in model.plan if c.passes is not None and c.passes.prunes
    ]
