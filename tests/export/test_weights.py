"""Weights are read when they are written, one after the other, and what stands for them meanwhile is never written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

import kvpass
from export_models import wide
from kvpass.export.onnx import export as exporting
from kvpass.export.onnx.lower import lower
from kvpass.export.onnx.optimize import optimize
from kvpass.export.onnx.weights import write
from kvpass.ir.execute import evaluate
from kvpass.ir.fold import fold_weights, read_late
from kvpass.ir.program import output_node, placeholder


def transformed(source):
    return kvpass.transform(source, progress=False, verify="off", device="cpu")


def matrices(path: Path) -> dict[str, np.ndarray]:
    """The matrices of a package as they are on the disk."""
    found = onnx.load(path).graph.initializer
    return {
        i.name: numpy_helper.to_array(i) for i in found if len(i.dims) == 2 and i.data_type != onnx.TensorProto.INT64
    }


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_matrix_is_read_once_when_it_is_written(tmp_path: Path, monkeypatch, dtype: str, tied: bool) -> None:
    model = transformed(wide("llama", tie_word_embeddings=tied, vocab_size=512))  # 64 x 512 is not folded as small
    graph = lower(model.program, model.plan, 64)
    shapes = {n: tuple(p.shape) for n, p in graph.module.named_parameters() if p.dim() == 2}
    assert set(graph.readers) == set(shapes)
    reads: Counter[str] = Counter()

    def counting(name, read):
        def counted():
            reads[name] += 1
            return read()

        return counted

    expected = {n: read().to(torch.float16 if dtype == "fp16" else torch.float32) for n, read in graph.readers.items()}
    graph.readers.update({n: counting(n, read) for n, read in graph.readers.items()})
    proto = exporting._to_onnx(graph, dtype)
    optimize(proto)
    assert not reads
    write(proto, tmp_path / "model.onnx", "model.onnx.data")
    assert reads == dict.fromkeys(shapes, 1)
    held = matrices(tmp_path / "model.onnx")
    written = sum(a.size for n, a in held.items() if not n.startswith("w_table"))
    assert written == sum(t.numel() for t in expected.values())
    for layer in range(2):
        parts = [expected[f"w_model__layers__{layer}__self_attn__{p}_proj__weight"] for p in "qkv"]
        assert np.array_equal(held[f"qkv_weight_{layer}"], torch.cat(parts).T.numpy())
        for part in ("self_attn__o_proj", "mlp__gate_proj", "mlp__up_proj", "mlp__down_proj"):
            name = f"w_model__layers__{layer}__{part}__weight"
            assert np.array_equal(held[f"{name}_t"], expected[name].T.numpy())


def test_numbers_of_a_weight_that_nothing_reads_are_an_error() -> None:
    model = transformed(wide("llama"))
    graph = lower(model.program, model.plan, 64)
    graph.readers.clear()
    with pytest.raises(ir.passes.PassError):
        exporting._to_onnx(graph, "fp32")


def test_vectors_are_not_waited_for() -> None:
    model = transformed(wide("gpt2"))
    graph = lower(model.program, model.plan, 64)
    assert graph.readers
    for name, parameter in graph.module.named_parameters():
        assert (
            (parameter.dim() > 1) == (name in graph.readers) == isinstance(parameter, torch._subclasses.FakeTensor)
        ), name


def test_running_with_late_reads_holds_no_weight_between_its_uses() -> None:
    model = wide("llama", tie_word_embeddings=True)
    program = fold_weights(transformed(model).program)
    whole = Counter(str(n.target) for n in program.forward.nodes if n.op == "get_attr")
    read_late(program.forward)
    ids = torch.arange(12).view(1, 12)
    order = list(program.forward.nodes)
    for node in order:
        if node.op == "get_attr":
            (user,) = node.users
            between = order[order.index(node) : order.index(user)]
            assert all(n.op == "get_attr" for n in between)
    again = Counter(str(n.target) for n in program.forward.nodes if n.op == "get_attr")
    assert again.keys() == whole.keys()
    assert again["model.embed_tokens.weight"] == 2
    given = {placeholder(program.forward, "input_ids"): ids}
    (logits,) = evaluate([output_node(program.forward)], given, program.read)
    with torch.no_grad():
        assert torch.allclose(logits, model(ids).logits, atol=1e-5)


EXPORT = """
import json, sys, threading, time
import kvpass

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def export(source, target):
    slim = kvpass.transform(source, progress=False, verify="off", device="cpu")
    return slim.export_onnx(target, positions=128).bytes

export(sys.argv[1], sys.argv[1] + "-out")  # imports and everything that is made once
before, most = anonymous(), 0

def watch():
    global most
    while True:
        most = max(most, anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
size = export(sys.argv[2], sys.argv[2] + "-out")
print(json.dumps({"size": size, "growth": most - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read where Linux tells it")
def test_an_export_from_a_folder_grows_by_less_than_the_model(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    for name, width in (("small", 64), ("large", 1536)):
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3}
        wide("llama", **heads, **sizes).save_pretrained(tmp_path / name)
    given = [str(tmp_path / "small"), str(tmp_path / "large")]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # else what glibc keeps of free memory varies
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, *given], capture_output=True, text=True, check=True, env=environment
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["size"] > 150e6
    assert found["growth"] < 0.6 * found["size"]
