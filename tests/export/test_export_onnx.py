"""What `export_onnx` writes is run by ONNX Runtime as by torch, or is refused, and nothing is left of what failed.

`KVPASS_EXPORT=full` runs every plan of every family; without it, every plan of llama and some of the others.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

import kvpass
from export_models import WIDE, captured, wide
from families import build
from kvpass.errors import CheckError, OutputError, PlanError, RequestError, UnsupportedError
from kvpass.export.onnx import export as exporting
from kvpass.export.onnx import gate
from kvpass.export.onnx.lower import check_plan, lower
from kvpass.passes import EvictKV, GroupHeads, PageKV, QuantizeKV, ShareLayers, SlideWindow

STATIC = QuantizeKV(8, layout="static")
PLANS: dict[str, Callable[[int], list[Any]]] = {  # of pairs of layers
    "as it is": lambda pairs: [],
    "fewer heads": lambda pairs: [GroupHeads((2, 1) * pairs, method="first")],
    "shared layers": lambda pairs: [ShareLayers("cla:2")],
    "a window": lambda pairs: [SlideWindow(8, 0)],
    "sinks and a window": lambda pairs: [SlideWindow(8, 3)],
    "sinks and two windows": lambda pairs: [SlideWindow((8, 5) * pairs, (3, 2) * pairs)],
    "shared sinks and windows": lambda pairs: [ShareLayers("cla:2"), SlideWindow(8, 3)],
    "shared windows": lambda pairs: [ShareLayers("cla:2"), SlideWindow(8, 0)],
    "a window in one layer": lambda pairs: [SlideWindow((8, 0) * pairs, (0, 0) * pairs)],
    "shared layers of fewer heads": lambda pairs: [GroupHeads(1, method="first"), ShareLayers("yoco")],
    "a layer reads one above it": lambda pairs: [ShareLayers("_".join("1" * 2 * pairs), upward=True)],
    "8 bits": lambda pairs: [QuantizeKV(8, layout="static")],
    "4 bits": lambda pairs: [QuantizeKV(4, layout="static")],
    "8 bits, fewer heads and a window": lambda pairs: [GroupHeads(1, method="first"), SlideWindow(8, 0), STATIC],
    "8 bits, shared layers": lambda pairs: [ShareLayers("cla:2"), STATIC],
    "8 bits, sinks and a window": lambda pairs: [SlideWindow(8, 3), STATIC],
}
CASES = [(family, "as it is") for family in WIDE] + [("llama", plan) for plan in PLANS if plan != "as it is"]
CASES += [("gpt2", "shared layers"), ("phi", "a window"), ("gpt2", "8 bits"), ("gemma2", "8 bits"), ("phi", "4 bits")]
CASES += [("gemma2", "a layer reads one above it")]  # through a window
if os.environ.get("KVPASS_EXPORT") == "full":
    CASES = [case for case in itertools.product(WIDE, PLANS) if case != ("gemma2", "4 bits")]  # refused: it has windows
TEXT = [torch.randint(0, 97, (8, 128), generator=torch.Generator().manual_seed(1))]


def transformed(family: str, recipe=()):
    return kvpass.transform(captured(family), list(recipe), calibration=TEXT, progress=False, verify="off")


def bits(model) -> int:
    return model.plan[0].format.bits


@pytest.fixture(scope="module")
def llama():
    return transformed("llama")


@pytest.mark.parametrize(("family", "plan"), CASES, ids=[f"{family}, {plan}" for family, plan in CASES])
def test_a_package_computes_what_torch_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, plan: str
) -> None:
    model = transformed(family, PLANS[plan](2 if family == "gemma2" else 1))
    translate, asked_for = torch.onnx.export, []
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: asked_for.append(a) or translate(*a, **k))
    made = model.export_onnx(tmp_path / "out")
    assert len(asked_for) == (2 if model.plan.upward else 1)  # per graph: every operation has a translation
    asked, owners = {c["name"] for c in made.checks}, model.plan.owners()
    layouts = {owner: model.plan.layout(owner) for owner in owners}
    rings = [o for o in owners if gate.window_kept(model.plan, o, made.positions, "ort") or layouts[o].sinks]
    assert asked >= {"a prompt", "32 steps", "a prompt in two parts", "a step of rows of two lengths"}
    assert ("prompts of two lengths" in asked) == (not (model.plan.upward or rings))
    assert ("prompts in passes" in asked) == model.plan.upward
    quantized = any(not c.format.full for c in model.plan)  # a rounding may turn a code into the next one
    assert all(c["measured"] < (2e-3 if quantized else 1e-5) for c in made.checks), made.checks
    assert ("codes of keys and values" in asked) == (quantized and not rings)
    assert made.nodes.get("GroupQueryAttention", 0) == sum(c.sinks == 0 for c in model.plan)
    proto = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    inputs = [i.name for i in proto.graph.input]
    assert inputs[:2] == ["input_ids", "attention_mask"]
    assert inputs[2:] == [f"past_key_values.{o}.{part}" for o in owners for part in ("key", "value")]
    kinds = {i.type.tensor_type.elem_type for i in proto.graph.input[2:]}
    assert kinds == {{0: onnx.TensorProto.FLOAT, 8: onnx.TensorProto.INT8, 4: onnx.TensorProto.UINT8}[bits(model)]}
    heads = {i.name: i.type.tensor_type.shape.dim[1].dim_value for i in proto.graph.input[2:]}
    rows = {x.window + x.sinks for x in layouts.values()}
    unit = math.gcd(*rows) if len(rows) > 1 and all(x.sinks for x in layouts.values()) else 0
    right = {o: model.plan[o].kv_heads * ((x.window + x.sinks) // unit if unit else 1) for o, x in layouts.items()}
    assert heads == {f"past_key_values.{o}.{p}": right[o] for o in owners for p in ("key", "value")}
    told = json.loads((tmp_path / "out" / "kvpass-onnx.json").read_text())
    assert [layer["owner"] for layer in told["layers"]] == list(owners)


def test_the_graph_of_passes_reads_the_weights_of_the_other(tmp_path: Path) -> None:
    decoder = wide("llama", num_hidden_layers=4, hidden_size=64, intermediate_size=160)
    model = kvpass.transform(decoder, [ShareLayers("lckv:2")], progress=False, verify="off")
    model.export_onnx(tmp_path / "out")
    data = (tmp_path / "out" / "model.onnx.data").stat().st_size
    assert (tmp_path / "out" / "pass.onnx").stat().st_size < data / 10
    proto = onnx.load(tmp_path / "out" / "pass.onnx", load_external_data=False)
    places = {e.value for i in proto.graph.initializer for e in i.external_data if e.key == "location"}
    assert places == {"model.onnx.data"}
    for file in ("model.onnx", "pass.onnx"):
        nodes = onnx.load(tmp_path / "out" / file, load_external_data=False).graph.node
        turned = [{a.name: a.i for a in n.attribute}.get("do_rotary") for n in nodes if "GroupQuery" in n.op_type]
        assert turned == [1] * 4


def test_rope_is_done_by_the_operator_where_it_can_be(llama) -> None:
    graph = lower(llama.program, llama.plan, 32).module.graph
    calls = [n for n in graph.nodes if "group_query_attention" in str(n.target)]
    assert all(n.kwargs["attributes"]["do_rotary"] == 1 for n in calls)
    narrow = kvpass.transform(build("llama"), progress=False, verify="off")  # heads of 8 channels
    graph = lower(narrow.program, narrow.plan, 32).module.graph
    calls = [n for n in graph.nodes if "group_query_attention" in str(n.target)]
    assert calls
    assert not any("do_rotary" in n.kwargs["attributes"] for n in calls)


def test_a_graph_with_another_scale_is_noticed(tmp_path: Path, monkeypatch) -> None:
    def spoiled(*arguments):
        graph = lower(*arguments)
        (name,) = (n for n, _ in graph.module.named_buffers() if n.endswith("layers__1__v_scale"))
        setattr(graph.module, name, graph.module.get_buffer(name) * 1.02)
        return graph

    model = transformed("llama", [STATIC])
    monkeypatch.setattr(exporting, "lower", spoiled)
    with pytest.raises(CheckError, match="codes of keys and values differ"):
        model.export_onnx(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_codes_in_half_precision(tmp_path: Path) -> None:
    made = transformed("llama", [STATIC]).export_onnx(tmp_path / "out", dtype="fp16")
    assert all(c["measured"] < c["allowed"] for c in made.checks), made.checks
    proto = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    scales = {i for n in proto.graph.node if n.op_type == "GroupQueryAttention" for i in n.input[-2:]}
    kinds = {i.name: i.data_type for i in proto.graph.initializer}
    assert len(scales) == 4
    assert {kinds[s] for s in scales} == {onnx.TensorProto.FLOAT}  # as the operator asks


def test_half_precision(tmp_path: Path, llama) -> None:
    made = llama.export_onnx(tmp_path / "out", dtype="fp16")
    assert all(c["measured"] < 5e-3 for c in made.checks), made.checks
    proto = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert {i.data_type for i in proto.graph.initializer if len(i.dims) == 2} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ([SlideWindow(8, 2, positions="cache")], "positions counted in the cache"),
        ([QuantizeKV(8)], "stored as int8"),
        ([SlideWindow(8, 2), QuantizeKV(4, layout="static")], "it keeps sinks"),
        ([SlideWindow(8, 0), QuantizeKV(4, layout="static")], "heads of 32 channels, not 16"),
        ([PageKV()], "pages"),
        ([EvictKV("h2o", budget=200)], "chosen by rank"),
        ([ShareLayers("cla:2"), SlideWindow((8, 0, 8, 0), (3, 0, 3, 0))], "another layer reads beyond them"),
        ([ShareLayers("cla:2"), SlideWindow((0, 8, 0, 8), (0, 3, 0, 3))], "another layer reads beyond them"),
    ],
)
def test_what_the_target_cannot_express_is_refused_before_anything_is_read(tmp_path: Path, recipe, reason) -> None:
    decoder = wide("llama", num_hidden_layers=4)
    if "counted" not in reason:  # which the plan does not know
        with pytest.raises(PlanError, match=reason):
            check_plan(kvpass.plan(decoder, recipe))
    model = kvpass.transform(decoder, recipe, calibration=TEXT, progress=False, verify="off")
    with pytest.raises(PlanError, match=reason):
        model.export_onnx(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_learned_positions_are_the_models_however_large_their_table(tmp_path: Path) -> None:
    model = captured("gpt2", n_positions=5000)  # proofs take less of it
    made = model.export_onnx(tmp_path / "out", positions=64)
    assert all(c["measured"] < 1e-5 for c in made.checks), made.checks


def test_few_positions_are_enough_or_refused(tmp_path: Path, llama) -> None:
    with pytest.raises(RequestError, match="16 positions at least, not 15"):
        llama.export_onnx(tmp_path / "out", positions=15)
    assert not any(tmp_path.iterdir())
    pruned = transformed("llama", [EvictKV("snapkv", keep=0.5, window=2)])
    plans = [(llama, {"target": "onnx"}), (transformed("llama", [SlideWindow((8, 5), (3, 2))]), {}), (pruned, {})]
    for number, (model, options) in enumerate(plans):
        made = model.export_onnx(tmp_path / str(number), positions=16, **options)
        assert all(check["measured"] < 1e-5 for check in made.checks)


def test_alibi_is_refused(tmp_path: Path) -> None:
    model = kvpass.transform(build("bloom"), progress=False, verify="off")
    with pytest.raises(PlanError, match="ALiBi"):
        model.export_onnx(tmp_path / "out")


def test_a_graph_with_another_weight_is_noticed_and_the_layer_named(tmp_path: Path, llama, monkeypatch) -> None:
    def spoiled(*arguments):
        graph = lower(*arguments)
        (name,) = (n for n in graph.readers if n.endswith("layers__1__self_attn__k_proj__weight"))
        read = graph.readers[name]
        graph.readers[name] = lambda: read() * 1.01
        return graph

    monkeypatch.setattr(exporting, "lower", spoiled)
    with pytest.raises(CheckError, match="logits differ") as caught:
        llama.export_onnx(tmp_path / "out")
    assert "keys or values that differ are the keys of layer 1" in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_writer_that_drops_its_presents_is_noticed() -> None:
    def attention(keys: int, outputs: list[str]) -> onnx.ModelProto:
        tensor = onnx.helper.make_tensor_value_info
        inputs = [tensor(n, 1, [1, size, 16]) for n, size in (("q", 1), ("k", keys), ("v", keys))]
        node = onnx.helper.make_node("GroupQueryAttention", ["q", "k", "v"], outputs, "attn", domain="com.microsoft")
        return onnx.helper.make_model(onnx.helper.make_graph([node], "g", inputs, [tensor("o", 1, [1, 1, 16])]))

    def over_codes(outputs: list[str]) -> onnx.ModelProto:
        proto = attention(0, outputs)
        proto.graph.node[0].input.extend(["pk", "pv", "n", "t", "", "", "", "", "", "ks", "vs"])
        return proto

    gate.lint(over_codes(["o", "nk", "nv"]))
    with pytest.raises(CheckError, match="does not return both"):
        gate.lint(over_codes(["o"]))
    gate.lint(attention(1, ["o", "pk", "pv"]))
    gate.lint(attention(0, ["o"]))
    with pytest.raises(CheckError, match="does not return both"):
        gate.lint(attention(1, ["o"]))
    with pytest.raises(CheckError, match="returns one"):
        gate.lint(attention(0, ["o", "pk", "pv"]))


def test_a_runtime_without_what_is_needed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = kvpass.plan(wide("llama"), [ShareLayers("cla:2")])
    gate.probe(shared, "fp32")

    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("key is empty")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(UnsupportedError, match="read another one's cache"):
        gate.probe(shared, "fp32")
    gate.probe(kvpass.plan(wide("llama")), "fp32")  # nothing is shared, nothing is asked


def test_missing_packages_are_named(tmp_path: Path, llama, monkeypatch: pytest.MonkeyPatch) -> None:
    found = exporting.importlib.util.find_spec
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda n: None if n == "onnxruntime" else found(n))
    with pytest.raises(RequestError, match="onnxruntime, which is not installed") as caught:
        llama.export_onnx(tmp_path / "out")
    assert "kvpass[onnx]" in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, llama) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError):
        llama.export_onnx(tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path: Path, llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write", full)
    with pytest.raises(OutputError, match="disk is full"):
        llama.export_onnx(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_there_stays(tmp_path: Path, llama) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(RequestError, match="not empty"):
        llama.export_onnx(tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
    with pytest.raises(RequestError, match="no target"):
        llama.export_onnx(tmp_path / "out", target="tvm")


def test_importing_kvpass_imports_no_onnx() -> None:
    import subprocess

    code = "import sys, kvpass, kvpass.cli; print([m for m in sys.modules if m.startswith('onnx')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ids_of_a_vocabulary_are_checked_against_torch_beyond_the_wrap_of_a_window(tmp_path: Path) -> None:
    model = transformed("llama", [SlideWindow(8, 0)])
    made = model.export_onnx(tmp_path / "out", positions=96)
    assert made.positions == 96
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = torch.randint(0, 97, (1, 60), generator=torch.Generator().manual_seed(2))
    run = gate._Run(model.plan, session, "fp32", made.positions)
    assert run.rings == {0: 8, 1: 8}
    logits, held = run(ids, None)
    assert {t.shape[2] for t in held.past} == {8}
    with torch.no_grad():
        assert torch.allclose(logits, model(ids), atol=1e-4)
