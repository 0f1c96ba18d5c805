"""ONNX graphs as canonical text: without names, and with what branches read of the graph around them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpass.regression.canonical import Canonical, canonical_text
from kvpass.regression.packages import read_package

onnx = pytest.importorskip("onnx")


def branching(folder: Path, prefix: str, op: str = "Neg", reverse: bool = False) -> Canonical:
    """cond ? op(x + y) : x, where the sum is read inside the branch alone."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    operands = ["x", "y"][:: -1 if reverse else 1]
    branches = {}
    for name, node in (("then", (op, [f"{prefix}sum"])), ("else", ("Identity", ["x"]))):
        out = f"{prefix}{name}"
        value = helper.make_tensor_value_info(out, kind, [None])
        branches[f"{name}_branch"] = helper.make_graph([helper.make_node(node[0], node[1], [out])], name, [], [value])
    nodes = [
        helper.make_node("Add", operands, [f"{prefix}sum"], name=f"{prefix}adds"),
        helper.make_node("If", ["cond"], ["result"], **branches),
    ]
    inputs = [helper.make_tensor_value_info(n, kind, [None]) for n in ("x", "y")]
    inputs.append(helper.make_tensor_value_info("cond", onnx.TensorProto.BOOL, []))
    outputs = [helper.make_tensor_value_info("result", kind, [None])]
    path = folder / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs)), path)
    return canonical_text(read_package(folder).graphs["model"])


def test_a_branch_that_reads_a_value_from_outside_is_part_of_the_text(tmp_path):
    assert branching(tmp_path, "some.").text == (
        "inputs x, y, cond\n"
        "a: once:\n"
        "  a0 = Identity(x)\n"
        "  a1 = Add(y, x)\n"
        "  a2 = Neg(a1)\n"
        "  a3 = If(cond, else_branch=a0, then_branch=a2)\n"
        "return result = a3\n"
    )


def test_names_and_the_order_of_a_sum_are_not_in_the_text_and_an_operator_in_a_branch_is(tmp_path):
    plain = branching(tmp_path, "some.")
    assert branching(tmp_path, "other/", reverse=True) == plain
    other = branching(tmp_path, "some.", op="Abs")
    assert other.meaning != plain.meaning
    assert "Abs(a1)" in other.text
