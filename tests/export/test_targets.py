"""Packages of standard operators compute what torch computes, are served, and refuse what they cannot express.

`KVPASS_EXPORT=full` runs every plan of every family for both targets; without it, the model as it is of every family
for both, all plans of Llama for the targets in turn, and one plan of every other family.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import decoders
import kvpass
from export_models import WIDE, captured, greedy, served, wide
from families import build
from kvpass.errors import CheckError, PlanError
from kvpass.export.onnx import gate, runner
from kvpass.export.onnx.lower import check_plan
from kvpass.export.onnx.runner import OnnxModel
from kvpass.export.onnx.standard import OPSETS
from kvpass.passes import EvictKV, GroupHeads, PageKV, PrunePyramid, QuantizeKV, ShareLayers, SlideWindow

POSITIONS = 64
TARGETS = ("onnx", "onnx-static")
STATIC = QuantizeKV(8, layout="static")
PLANS: dict[str, Callable[[int], list[Any]]] = {  # of pairs of layers
    "as it is": lambda pairs: [],
    "fewer heads": lambda pairs: [GroupHeads((2, 1) * pairs, method="first")],
    "shared layers": lambda pairs: [ShareLayers("cla:2")],
    "two windows": lambda pairs: [SlideWindow((8, 5) * pairs, (0, 0) * pairs)],
    "a window in one layer": lambda pairs: [SlideWindow((8, 0) * pairs, (0, 0) * pairs)],
    "shared windows": lambda pairs: [ShareLayers("cla:2"), SlideWindow(8, 0)],
    "a reader with a window": lambda pairs: [ShareLayers("cla:2"), SlideWindow((0, 8) * pairs, (0, 0) * pairs)],
    "a reader with sinks": lambda pairs: [ShareLayers("cla:2"), SlideWindow((0, 8) * pairs, (0, 3) * pairs)],
    "sinks and a window": lambda pairs: [SlideWindow(8, 3)],
    "sinks and two windows": lambda pairs: [SlideWindow((8, 5) * pairs, (3, 2) * pairs)],
    "sinks in one layer": lambda pairs: [SlideWindow((8, 5) * pairs, (0, 2) * pairs)],
    "shared sinks and windows": lambda pairs: [ShareLayers("cla:2"), SlideWindow(8, 3)],
    "shared layers of fewer heads": lambda pairs: [GroupHeads(1, method="first"), ShareLayers("yoco")],
    "8 bits": lambda pairs: [STATIC],
    "8 bits, shared layers and windows": lambda pairs: [ShareLayers("cla:2"), SlideWindow(8, 0), STATIC],
    "8 bits, sinks and a window": lambda pairs: [SlideWindow(8, 3), STATIC],
}
TEXT = [torch.randint(0, 60, (8, 128), generator=torch.Generator().manual_seed(1))]
SECOND = {  # beside the model as it is, what a family is exported with
    "qwen3": ("two windows", "onnx"),
    "gemma2": ("shared layers", "onnx"),
    "gpt2": ("shared layers", "onnx-static"),
    "gpt_neox": ("sinks and a window", "onnx"),
    "phi": ("two windows", "onnx-static"),
    "opt": ("a window in one layer", "onnx-static"),
}


def cases() -> Iterator[tuple[str, str, str]]:
    product = itertools.product(WIDE, PLANS, TARGETS)
    if os.environ.get("KVPASS_EXPORT") == "full":
        yield from product
    for family, plan, target in product:
        turn = TARGETS[list(PLANS).index(plan) % 2]
        if plan == "as it is" or (target == turn if family == "llama" else SECOND[family] == (plan, target)):
            yield family, plan, target


def transformed(model: torch.nn.Module, recipe: list[Any] | None = None):
    text = TEXT if any(step.needs_calibration for step in recipe or []) else None
    return kvpass.transform(model, recipe or [], calibration=text, progress=False, verify="off")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Exports by family, plan and target: the model, the folder, and what the export said."""
    together = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # processes share what one of them exported
        together = together.parent

    @functools.cache
    def make(family: str, plan: str, target: str) -> tuple[Any, Path, dict[str, Any]]:
        folder = together / f"{family}, {plan}, {target}"
        if not folder.is_dir():
            scratch = tmp_path_factory.mktemp("scratch") / "out"
            made = model_of(family, plan).export_onnx(scratch, target=target, positions=POSITIONS)
            (scratch / "made.json").write_text(json.dumps(asdict(made)))
            with contextlib.suppress(OSError):  # the other process was first
                scratch.rename(folder)
        return model_of(family, plan), folder, json.loads((folder / "made.json").read_text())

    @functools.cache
    def model_of(family: str, plan: str):
        return transformed(captured(family), PLANS[plan](2 if family == "gemma2" else 1))

    return make


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)


@pytest.mark.parametrize(("family", "plan", "target"), list(cases()))
def test_a_package_computes_what_torch_computes_in_operators_of_the_standard(packages, family, plan, target) -> None:
    model, folder, made = packages(family, plan, target)
    asked = {c["name"] for c in made["checks"]}
    assert asked >= {"a prompt", "32 steps", "a prompt in two parts", "a step of rows of two lengths"}
    quantized = any(not c.format.full for c in model.plan)  # a rounding may turn a code into the next one
    assert all(c["measured"] < (2e-3 if quantized else 1e-5) for c in made["checks"]), made["checks"]
    path = folder / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path, load_external_data=False)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", OPSETS[target])]
    kinds = Counter(n.op_type for n in nodes(proto.graph))
    assert {n.domain for n in nodes(proto.graph)} == {""}
    assert "SimplifiedLayerNormalization" not in kinds
    assert kinds["RMSNormalization"] + kinds["LayerNormalization"] > 0
    assert ("TensorScatter" in kinds) <= (target == "onnx-static")
    owners = model.plan.owners()
    assert [i.name for i in proto.graph.input[2:]] == [
        f"past_key_values.{o}.{p}" for o in owners for p in ("key", "value")
    ]
    assert json.loads((folder / "kvpass-onnx.json").read_text())["target"] == target
    shared = json.loads((folder / "genai_config.json").read_text())["search"]["past_present_share_buffer"]
    assert shared == (target != "onnx")


def test_graphs_are_small(packages) -> None:
    counts = {t: sum(packages("llama", "as it is", t)[2]["nodes"].values()) for t in TARGETS}
    print(counts)
    assert counts["onnx"] <= 57
    assert counts["onnx-static"] <= 84
    kinds = packages("llama", "as it is", "onnx")[2]["nodes"]
    assert (kinds["Attention"], kinds["RotaryEmbedding"], kinds["RMSNormalization"]) == (2, 4, 5)


# ---------------------------------------------------------------------- the runner

SERVED = ("as it is", "shared layers", "a window in one layer", "shared windows", "two windows")
SERVED += ("sinks and a window", "sinks and two windows")


@pytest.fixture(scope="module", params=[(p, t) for p in SERVED for t in TARGETS], ids=lambda case: ", ".join(case))
def pair(request, packages):
    model, folder, _ = packages("llama", *request.param)
    return model, OnnxModel.open(folder, threads=1)


def some_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(3))


def torch_logits(model, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids).numpy()


def same(found: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.abs(found - right).max() < 1e-5 * np.ptp(right))


@pytest.mark.parametrize("chunk", [512, 7])
def test_rows_of_different_lengths_give_what_they_give_alone(pair, monkeypatch, chunk: int) -> None:
    model, run = pair
    monkeypatch.setattr(runner, "CHUNK", chunk)
    lengths = [20, 9, 3, 1]
    ids = some_ids(4, 46)
    right = torch_logits(model, ids)
    padded = ids[:, :20].clone()
    padded[np.arange(20) >= np.array(lengths)[:, None]] = -100  # whatever stands there
    found = run.prefill(padded, lengths)
    assert same(found, right[np.arange(4), [n - 1 for n in lengths]])
    for step in range(26):
        found = run.decode(torch.stack([ids[row, [n + step]] for row, n in enumerate(lengths)]))
        assert same(found, right[np.arange(4), [n + step for n in lengths]])


def test_text_is_that_of_torch_and_drawn_from_a_seed(pair) -> None:
    model, run = pair
    ids = some_ids(2, 9)
    right = [greedy(model, ids[0].tolist(), 30), greedy(model, ids[1, :4].tolist(), 30)]
    assert run.generate(ids, [9, 4], max_new_tokens=30, eos=()) == right
    drawn = [run.generate(ids, [9, 4], max_new_tokens=12, temperature=1.5, seed=s, eos=()) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_cache_that_grows_is_cut_to_its_window(packages) -> None:
    run = OnnxModel.open(packages("llama", "a window in one layer", "onnx")[1], threads=1)
    run.prefill(some_ids(1, 50))
    assert run._buffers["0.key"].shape() == [1, 2, 8, 16]
    for at in range(12):
        run.decode([[5]])
        assert run._buffers["0.key"].shape()[2] <= 8 + runner.SLACK
        assert run._buffers["1.key"].shape()[2] == 51 + at


def test_a_static_cache_is_written_where_it_lies(packages) -> None:
    run = OnnxModel.open(packages("llama", "as it is", "onnx-static")[1], threads=1)
    run.prefill(some_ids(1, 5), capacity=9)
    held = run._buffers["0.key"]
    before = held.data_ptr()
    assert np.abs(held.numpy()[:, :, 5:]).max() == 0
    run.decode([[7]])
    assert held.data_ptr() == before
    assert np.abs(held.numpy()[:, :, 5]).max() > 0
    assert np.abs(held.numpy()[:, :, 6:]).max() == 0


def test_a_step_gives_the_same_whatever_room_there_is_behind_the_text(packages) -> None:
    run = OnnxModel.open(packages("llama", "shared layers", "onnx-static")[1], threads=1)
    found = []
    for capacity in (11, 20, 23, 64):  # a buffer is read as a whole where less than twice the tokens fit in
        run.prefill(some_ids(2, 10), capacity=capacity)
        found.append(run.decode([[7], [8]]))
    assert all(same(f, found[0]) for f in found[1:])


@pytest.mark.parametrize("plan", ["as it is", "a window in one layer", "shared windows"])
def test_padding_of_a_text_may_stand_anywhere_in_a_mask(packages, plan: str) -> None:
    model, folder, _ = packages("llama", plan, "onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = some_ids(1, 30)
    right = torch_logits(model, ids)
    for mask in ([1] * 12 + [0] * 6, [0] * 6 + [1] * 12, [1, 0] * 6 + [1] * 6):
        places = np.flatnonzero(mask)
        text = np.full((1, 18), 5)
        text[0, places] = ids[0, :12].numpy()
        past = {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in session.get_inputs()[2:]}
        told = {"input_ids": text, "attention_mask": np.array([mask])}
        logits, *presents = session.run(None, told | past)
        assert same(logits[:, places], right[:, :12])
        past = dict(zip(past, presents, strict=True))
        told = {"input_ids": ids[:, 12:13].numpy(), "attention_mask": np.array([[*mask, 1]])}
        assert same(session.run(None, told | past)[0][:, 0], right[:, 12])


# ---------------------------------------------------------------------- onnxruntime-genai

BY_GENAI = ("as it is", "fewer heads", "shared layers", "a window in one layer", "two windows", "shared windows")
BY_GENAI += ("a reader with a window", "sinks and a window", "sinks and two windows")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("plan", BY_GENAI)
def test_genai_writes_the_text_of_torch(packages, tmp_path: Path, plan: str, target: str) -> None:
    model, folder, _ = packages("llama", plan, target)
    prompts = [[5, 9, 33, 21, 60, 7, 11, 40, 8, 3], [8, 8, 3, 40, 22, 11, 90, 91, 17, 4]]
    right = [greedy(model, ids, 40) for ids in prompts]
    never = next(i for i in range(97) if i not in {*right[0], *right[1]})  # so that texts have one length
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = never
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    assert served(tmp_path, prompts[:1], 40) == right[:1]
    assert served(tmp_path, prompts, 40) == right


# ---------------------------------------------------------------------- what these operators have beside


class Biased(decoders.NegativeBase):
    """A decoder whose scores get a bias that depends on where queries and keys stand."""

    def __init__(self, bias: Any) -> None:
        super().__init__()
        self.bias = bias
        decoders.randomise(self, 0)
        self.eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        place = torch.arange(ids.shape[1])
        bias = self.bias(place[:, None], place[None, :])
        x = self.start(ids)
        for block in self.blocks:
            x = block(x, bias=bias)
        return self.head(self.norm(x))


def hidden(seen: torch.Tensor, bias: Any = 0.0) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) + bias


def random(kind: type[torch.nn.Module]) -> torch.nn.Module:
    model = kind()
    decoders.randomise(model, 0)
    return model.eval()


FURTHER: dict[str, Any] = {
    "ALiBi": lambda: transformed(build("bloom")),
    "ALiBi in a window": lambda: transformed(build("bloom"), [SlideWindow(8, 0)]),
    "a mask that is a table": lambda: transformed(Biased(lambda i, j: hidden((j <= i) & ((i - j) % 3 == 0)))),
    "a mask per head": lambda: transformed(
        Biased(lambda i, j: hidden(torch.stack([(j <= i) & (i - j < 2 + h) for h in range(4)])[None]))
    ),
    "a bias that is a table": lambda: transformed(
        Biased(lambda i, j: hidden(j <= i, -0.1 * (i - j).float().sqrt().nan_to_num()))
    ),
    "learned sinks": lambda: transformed(random(decoders.ScaledQueries)),
    "learned sinks in a window": lambda: transformed(random(decoders.ScaledQueries), [SlideWindow(8, 0)]),
    "heads of 6 channels": lambda: transformed(captured("llama", head_dim=6)),
}


@pytest.mark.parametrize(("what", "target"), list(zip(FURTHER, itertools.cycle(TARGETS), strict=False)))
def test_what_group_query_attention_does_not_compute(tmp_path: Path, what: str, target: str) -> None:
    model = FURTHER[what]()
    if "learned" not in what:
        with pytest.raises(PlanError, match=r"ALiBi|table|no multiple of 8") as refused:
            model.export_onnx(tmp_path / "ort")
        assert "target onnx" in str(refused.value)
    made = model.export_onnx(tmp_path / "out", target=target, positions=POSITIONS)
    assert all(c["measured"] < 1e-5 for c in made.checks), made.checks


@pytest.mark.parametrize("target", TARGETS)
def test_half_precision(tmp_path: Path, target: str) -> None:
    model = transformed(captured("llama"), PLANS["a window in one layer"](1))
    made = model.export_onnx(tmp_path / "out", target=target, positions=POSITIONS, dtype="fp16")
    assert all(c["measured"] < 5e-3 for c in made.checks), made.checks
    run = OnnxModel.open(tmp_path / "out", threads=1)
    ids = some_ids(2, 30)
    right = torch_logits(model, ids)
    assert np.abs(run.prefill(ids[:, :29]) - right[:, 28]).max() < 5e-3 * np.ptp(right)
    assert np.abs(run.decode(ids[:, 29:]) - right[:, 29]).max() < 5e-3 * np.ptp(right)
    assert run._buffers["1.key"].numpy().dtype == np.float16


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ([QuantizeKV(8)], "stored as int8"),
        ([QuantizeKV(4, layout="static")], "no codes of 4 bits"),
        ([PageKV()], "pages belong to a server"),
        ([ShareLayers("lckv:2")], "it reads a layer above it"),
        ([EvictKV("snapkv", keep=0.5)], "chosen by rank"),
        ([PrunePyramid(schedule="pyramidinfer", decay=0.8)], "chosen by rank"),
    ],
)
def test_a_plan_that_cannot_be_expressed_is_refused_before_anything_is_read(recipe, reason: str, target) -> None:
    with pytest.raises(PlanError, match=reason):
        check_plan(kvpass.plan(wide("llama", num_hidden_layers=4), recipe), target)


@pytest.mark.parametrize(
    ("target", "make", "recipe", "reason"),
    [
        ("onnx", lambda: wide("llama"), [SlideWindow(8, 2, positions="cache")], "positions counted in the cache"),
        ("onnx-static", lambda: build("bloom"), [SlideWindow(8, 2)], "ALiBi and sinks"),
        ("onnx", lambda: Biased(lambda i, j: hidden(j < i)), [], "do not read their own token"),
        ("onnx-static", lambda: build("deepseek_v3"), [], "channels and values"),
    ],
)
def test_attention_that_cannot_be_expressed_is_refused_before_anything_is_written(
    tmp_path: Path, target: Any, make: Any, recipe: list[Any], reason: str
) -> None:
    model = transformed(make(), recipe)
    with pytest.raises(PlanError, match=reason):
        model.export_onnx(tmp_path / "out", target=target)
    assert not any(tmp_path.iterdir())


def test_an_operator_that_the_standard_has_not_is_noticed() -> None:
    node = helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft")
    proto = helper.make_model(helper.make_graph([node], "g", [], []))
    gate.lint(proto)
    with pytest.raises(CheckError, match="the standard has no FusedMatMul"):
        gate.lint(proto, "onnx")


# ---------------------------------------------------------------------- what the operators do
# The lowering rests on what their documentation leaves open in part; each test is one fact.

H, D = 2, 10


def _session(
    kind: str, inputs: dict[str, Any], opset: int, order: list[str] | None = None, **attributes: Any
) -> onnxruntime.InferenceSession:
    """One node with an output `o`; `order` are its inputs where some are left out."""
    given = [helper.make_tensor_value_info(n, *t) for n, t in inputs.items()]
    made = [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)]
    node = helper.make_node(kind, order or list(inputs), ["o"], **attributes)
    opsets = [helper.make_opsetid("", opset)]
    proto = helper.make_model(helper.make_graph([node], "g", given, made), opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def _numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("opset", [23, 24])
def test_scores_are_capped_before_a_bias_hides_some(opset: int) -> None:
    real = (TensorProto.FLOAT, ["B", H, None, D])
    inputs = {"q": real, "k": real, "v": real, "bias": (TensorProto.FLOAT, ["B", 1, "S", "T"])}
    q, k, v = _numbers(1, H, 3, D), _numbers(1, H, 5, D), _numbers(2, H, 5, D)[:1]
    bias = np.where(np.arange(5) <= 2 + np.arange(3)[:, None], 0, -np.inf).astype(np.float32)[None, None]
    session = _session("Attention", inputs, opset, softcap=2.0, scale=0.7)
    (found,) = session.run(None, {"q": q, "k": k, "v": v, "bias": bias})
    scores = 2.0 * np.tanh(q @ k.swapaxes(2, 3) * 0.7 / 2.0)
    assert np.abs(found - _softmax(scores + bias) @ v).max() < 1e-6


def test_the_last_query_of_a_row_is_the_last_that_it_holds_and_what_lies_behind_is_not_read() -> None:
    real = (TensorProto.FLOAT, ["B", H, None, D])
    inputs = {"q": real, "k": real, "v": real, "held": (TensorProto.INT64, ["B"])}
    session = _session("Attention", inputs, 24, ["q", "k", "v", "", "", "", "held"], is_causal=1, scale=1.0)
    q, k, v = _numbers(2, H, 3, D), _numbers(2, H, 9, D), _numbers(3, H, 9, D)[:2]
    held = [8, 4]
    (found,) = session.run(None, {"q": q, "k": k, "v": v, "held": np.array(held)})
    for row, count in enumerate(held):
        seen = np.arange(9) <= count - 3 + np.arange(3)[:, None]
        scores = np.where(seen, q[row] @ k[row].swapaxes(1, 2), -np.inf)
        assert np.abs(found[row] - _softmax(scores) @ v[row]).max() < 1e-6


def test_each_row_is_written_behind_what_it_holds() -> None:
    real = (TensorProto.FLOAT, ["B", H, None, D])
    inputs = {"past": real, "new": real, "starts": (TensorProto.INT64, ["B"])}
    past, new = _numbers(2, H, 9, D), _numbers(2, H, 3, D)
    session = _session("TensorScatter", inputs, 24, axis=2, mode="linear")
    (found,) = session.run(None, {"past": past, "new": new, "starts": np.array([6, 2])})
    for row, start in enumerate((6, 2)):
        past[row, :, start : start + 3] = new[row]
    assert np.array_equal(found, past)
