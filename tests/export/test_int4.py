"""Weights of 4 bits are those that onnxruntime's own quantizer gives, and packages compute what they stand for."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import kvpass
from export_models import captured
from kvpass.errors import CheckError, RequestError
from kvpass.export.onnx import export as exporting
from kvpass.export.onnx.lower import lower
from kvpass.export.onnx.quantize import BLOCK, codes_of, numbers_of
from kvpass.ir.execute import evaluate
from kvpass.ir.program import output_node, placeholder
from kvpass.passes import GroupHeads, ShareLayers, SlideWindow

CASES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "tied rows that fill no block": ("llama", {"tie_word_embeddings": True, "hidden_size": 80}),
    "gpt2": ("gpt2", {}),  # matrices the other way round, biases, tied
    "phi": ("phi", {}),
    "gemma2": ("gemma2", {}),
    "opt": ("opt", {}),
}


def transformed(family: str, recipe=(), **overrides):
    return kvpass.transform(captured(family, **overrides), list(recipe), progress=False, verify="off")


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / "model.onnx").graph


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_a_package_computes_what_its_codes_stand_for(tmp_path: Path, case: str, dtype: str) -> None:
    family, overrides = CASES[case]
    made = transformed(family, **overrides).export_onnx(tmp_path / "out", dtype=dtype, weights="int4")
    *exact, served, loss = made.checks
    assert all(c["measured"] < (1e-5 if dtype == "fp32" else 5e-3) for c in exact), made.checks
    assert "rounded" in served["name"]
    assert 0 < served["measured"] < served["allowed"]
    assert loss["allowed"] is None
    assert loss["measured"] > served["measured"] / 10  # it is another model than that of full weights
    assert "MatMul" not in made.nodes
    assert "Gemm" not in made.nodes
    kinds = Counter(n.op_type for n in graph_of(tmp_path / "out").node)
    tied = family in ("gpt2", "gemma2", "opt") or "tied" in case
    assert kinds["GatherBlockQuantized"] == tied
    assert family != "llama" or kinds["Slice"] == ("fill" in case)
    vocabulary = 97
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    rows = [i for i in graph_of(tmp_path / "out").initializer if len(i.dims) == 2 and i.dims[0] == vocabulary]
    tables = [i.name for i in rows if i.data_type in floats and i.dims[-1] > 3]  # 3 scales are the most of a row
    assert len(tables) == (not tied), tables


@pytest.mark.parametrize(
    "recipe",
    [[GroupHeads(1, method="first")], [ShareLayers("cla:2")], [SlideWindow(8, 3)]],
    ids=["fewer heads", "shared layers", "sinks"],
)
def test_smaller_caches_have_weights_of_4_bits_too(tmp_path: Path, recipe) -> None:
    made = transformed("llama", recipe).export_onnx(tmp_path / "out", weights="int4")
    assert all(c["measured"] < 1e-5 for c in made.checks[:-2]), made.checks


def test_codes_are_those_of_the_quantizer_of_onnxruntime(tmp_path: Path) -> None:
    model = transformed("llama")
    model.export_onnx(tmp_path / "full")
    model.export_onnx(tmp_path / "out", weights="int4")
    theirs = MatMulNBitsQuantizer(
        onnx.load(tmp_path / "full" / "model.onnx"), block_size=BLOCK, is_symmetric=True, accuracy_level=4
    )
    theirs.process()

    def products(graph: onnx.GraphProto) -> list[tuple[bytes, bytes]]:
        held = {i.name: numpy_helper.to_array(i).tobytes() for i in graph.initializer}
        nodes = [n for n in graph.node if n.op_type == "MatMulNBits"]
        assert all(
            {a.name: a.i for a in n.attribute}.items() >= {"accuracy_level": 4, "bits": 4, "block_size": BLOCK}.items()
            for n in nodes
        )
        return [(held[n.input[1]], held[n.input[2]]) for n in nodes]

    mine = products(graph_of(tmp_path / "out"))
    assert len(mine) == 11
    assert mine == products(theirs.model.model.graph)


@pytest.mark.parametrize("inputs", [32, 64, 80])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_numbers_of_codes_are_half_a_step_from_what_was_rounded(inputs: int, kind) -> None:
    matrix = np.random.default_rng(0).standard_normal((inputs, 6)).astype(kind)
    codes, scales = codes_of(matrix)
    assert codes.shape == (6, -(-inputs // BLOCK), BLOCK // 2)
    assert scales.dtype == kind
    numbers = numbers_of(codes, scales, inputs)
    step = np.repeat(np.abs(scales.astype(np.float32)), BLOCK, axis=1)[:, :inputs].T
    assert numbers.shape == matrix.shape
    error = np.abs(numbers - matrix) / step
    assert (error <= 1.01).all()  # the far end of a block is 7, and a number may lie at 8
    assert np.median(error) < 0.3


def test_weights_that_were_written_wrongly_are_noticed(tmp_path: Path, monkeypatch) -> None:
    def spoiled(*arguments):
        graph = lower(*arguments)
        (name,) = (n for n in graph.readers if n.endswith("layers__1__self_attn__k_proj__weight"))
        read = graph.readers[name]
        graph.readers[name] = lambda: read() * 1.05
        return graph

    monkeypatch.setattr(exporting, "lower", spoiled)
    with pytest.raises(CheckError, match="logits differ"):
        transformed("llama").export_onnx(tmp_path / "out", weights="int4")
    assert not any(tmp_path.iterdir())


def test_a_model_is_not_changed_by_an_export_with_fewer_bits(tmp_path: Path) -> None:
    model = transformed("llama")
    ids = torch.arange(12).view(1, 12)
    before = model(ids)
    model.export_onnx(tmp_path / "out", weights="int4")
    assert torch.equal(model(ids), before)
    graph = model.program.forward
    (logits,) = evaluate([output_node(graph)], {placeholder(graph, "input_ids"): ids}, model.program.read)
    assert torch.allclose(logits, before, atol=1e-5)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no weights 'int3'"):
        transformed("llama").export_onnx(tmp_path / "out", weights="int3")


def test_the_quantizer_leaves_logging_as_it_was() -> None:
    code = """
import logging
import numpy as np
from kvpass.export.onnx.quantize import codes_of
codes_of(np.ones((32, 4), np.float32))
assert logging.getLogger().level == logging.WARNING, logging.getLogger().level
assert not logging.getLogger().handlers
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert logging.getLogger("onnx_ir").level == logging.NOTSET


def test_the_standard_has_no_weights_of_4_bits(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the standard has no product"):
        transformed("llama").export_onnx(tmp_path / "out", target="onnx", weights="int4")
