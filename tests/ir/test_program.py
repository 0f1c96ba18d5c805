"""Programs: copies, sweeps, folding, canonical text, JSON and back, and the verifier against injected faults."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx

import families
from kvpass.capture import capture
from kvpass.errors import CheckError, SourceError
from kvpass.ir.check import plan_of, verify
from kvpass.ir.execute import call_on_meta, evaluate
from kvpass.ir.fold import fold_weights
from kvpass.ir.program import (
    ATTENTION,
    ModelFacts,
    Program,
    Role,
    Weight,
    aten,
    merge_equal,
    output_node,
    placeholder,
    roles,
    sweep,
    to_module,
)
from kvpass.ir.serialize import graph_from_json, graph_to_json
from kvpass.ir.text import graph_text
from kvpass.passes import Context, GroupHeads, SplitProjections

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def llama():
    return capture(families.build("llama"))


@pytest.fixture(scope="module")
def gemma():
    return capture(families.build("gemma"))


def logits(program, ids=None):
    ids = torch.arange(12).view(2, 6) % 11 if ids is None else ids
    graph = program.forward
    with torch.no_grad():
        return evaluate([output_node(graph)], {placeholder(graph, "input_ids"): ids}, program.read)[0]


def last_call(program, target):
    return [n for n in program.forward.nodes if n.target is target][-1]


def unread(program):
    """The same program, whose weights cannot be read."""

    def refuse(name):
        def read():
            raise AssertionError(f"{name} was read")

        return read

    closed = program.copy()
    closed.weights = {n: w if w.constant else replace(w, read=refuse(n)) for n, w in closed.weights.items()}
    return closed


# ---------------------------------------------------------------------- copies


def test_a_copy_is_the_same_program(llama):
    copy = llama.copy()
    assert graph_text(copy) == graph_text(llama)
    assert torch.equal(logits(copy), logits(llama))


def test_what_is_done_to_a_copy_is_not_done_to_the_original(llama):
    before, text = logits(llama), graph_text(llama)
    copy = llama.copy()
    SplitProjections().rewrite(copy, Context())
    GroupHeads(1).rewrite(copy, Context())
    copy.add_weight("another", torch.zeros(3))
    copy.facts.name, copy.facts.layers = "another", 7
    copy.ensured.add("a fact")
    copy.evidence[0]["mask"] = "another"
    assert graph_text(llama) == text
    assert torch.equal(logits(llama), before)
    assert "another" not in llama.weights
    assert llama.facts.layers == 2
    assert llama.ensured == set()
    assert llama.evidence[0]["mask"] != "another"


def test_a_copy_shares_its_weights_and_reads_none(llama):
    copy = unread(llama).copy()
    assert copy.shapes()[output_node(copy.forward)].shape == (2, 5, 97)
    assert plan_of(copy).bytes_per_token() == plan_of(llama).bytes_per_token()
    tied = llama.copy()
    assert all(tied.weights[n] is llama.weights[n] for n in tied.weights)


# ---------------------------------------------------------------------- small graphs


def small():
    """h = embed(ids) * (1 + gain); logits = h @ head.T, as a program of eight nodes."""
    graph = fx.Graph()
    ids = graph.placeholder("input_ids")
    embed, gain, head = (graph.get_attr(n) for n in ("embed", "gain", "head"))
    h = graph.call_function(aten.embedding.default, (embed, ids))
    scale = graph.call_function(aten.add.Tensor, (gain, 1.0))
    h = graph.call_function(aten.mul.Tensor, (h, scale))
    graph.output(graph.call_function(aten.linear.default, (h, head)))
    g = torch.Generator().manual_seed(0)
    shapes = {"embed": (11, 4), "gain": (4,), "head": (11, 4)}
    weights = {n: Weight.of(torch.randn(s, generator=g)) for n, s in shapes.items()}
    return Program({"forward": graph}, weights, ModelFacts("small", "small", 11, 0))


def test_sweep_removes_what_nothing_reads_and_what_only_that_read():
    program = small()
    before = len(program.forward.nodes)
    with program.forward.inserting_before(output_node(program.forward)):
        dead = program.forward.get_attr("dead")
        dead = program.forward.call_function(aten.neg.default, (dead,))
        program.forward.call_function(aten.neg.default, (dead,))
    assert sweep(program.forward) == 3
    assert len(program.forward.nodes) == before
    assert sweep(program.forward) == 0
    placeholder(program.forward, "input_ids")


def test_equal_calls_on_positions_become_one_and_calls_on_tokens_stay():
    graph = fx.Graph()
    ids = graph.placeholder("input_ids")
    sizes = [graph.call_function(aten.sym_size.int, (ids, 1)) for _ in range(2)]
    tables = [graph.call_function(aten.arange.default, (s,), {"dtype": torch.int64}) for s in sizes]
    other = graph.call_function(aten.arange.default, (sizes[0],), {"dtype": torch.float32})
    sums = [graph.call_function(aten.add.Tensor, (ids, t)) for t in tables]
    twice = graph.call_function(aten.add.Tensor, (sums[0], sums[1]))
    graph.output(graph.call_function(aten.add.Tensor, (twice, other)))
    assert merge_equal(graph) == 2
    assert sum(n.target is aten.arange.default for n in graph.nodes) == 2
    assert sum(n.target is aten.add.Tensor for n in graph.nodes) == 4
    assert merge_equal(graph) == 0


def test_one_and_true_are_not_equal_arguments():
    graph = fx.Graph()
    ids = graph.placeholder("input_ids")
    size = graph.call_function(aten.sym_size.int, (ids, 1))
    parts = [graph.call_function(aten.full.default, ([size], value)) for value in (1, True, 1.0)]
    total = graph.call_function(aten.add.Tensor, (parts[0], parts[1]))
    graph.output(graph.call_function(aten.add.Tensor, (total, parts[2])))
    assert merge_equal(graph) == 0


@pytest.mark.parametrize("fixture", ["llama", "gemma"])
def test_shapes_that_are_remembered_are_those_of_a_new_call(fixture, request):
    program = request.getfixturevalue(fixture)
    ids = placeholder(program.forward, "input_ids")
    for batch, length in ((2, 5), (3, 7), (1, 1)):
        found = program.shapes("forward", batch, length)
        new = evaluate(list(found), {ids: found[ids]}, program.meta, "meta")
        for node, expected in zip(found, new, strict=True):
            if isinstance(expected, torch.Tensor):
                described = [(t.shape, t.stride(), t.dtype, t.device) for t in (found[node], expected)]
                assert described[0] == described[1], node.format_node()
            else:
                assert found[node] == expected, node.format_node()


def test_what_an_op_gives_is_remembered_for_what_it_knows_of_its_arguments():
    def dtype(value, of):
        return call_on_meta(aten.mul.Tensor, (torch.empty(2, dtype=of, device="meta"), value), {}).dtype

    assert [dtype(v, torch.int32) for v in (1, True, 1.0)] == [torch.int32, torch.int32, torch.float32]
    torch.set_default_dtype(torch.float64)
    try:
        assert dtype(1.0, torch.int32) == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtype(1.0, torch.float16) == torch.float16
    for numbers in ([1, 0, 2], [0, 0, 3]):  # not on the meta device: its numbers count
        found = call_on_meta(aten.nonzero.default, (torch.tensor(numbers),), {})
        assert len(found) == sum(n > 0 for n in numbers)


def test_roles_say_what_a_value_depends_on():
    program = small()
    known = {n.name: r for n, r in roles(program.forward).items()}
    assert known["input_ids"] == Role.DATA
    assert known["embed"] == known["add_tensor"] == Role.WEIGHT
    assert known["embedding_default"] == known["linear_default"] == Role.DATA


def test_weights_are_named_apart():
    program = small()
    assert program.add_weight("gain", torch.zeros(2)) == "gain.1"
    assert program.add_weight("gain", torch.zeros(2)) == "gain.2"
    assert program.weights["gain"].shape == (4,)


def test_a_weight_is_read_in_the_dtype_of_the_program():
    program = small()
    program.weights["gain"] = replace(program.weights["gain"], dtype=torch.float64)
    assert program.read("gain").dtype == torch.float64


# ---------------------------------------------------------------------- folding


def test_folding_everything_leaves_weights_and_no_expressions():
    program = small()
    folded = fold_weights(program)
    assert {n.target for n in folded.forward.nodes if n.op == "get_attr"} == {"embed", "gain.folded", "head"}
    assert not [n for n, r in roles(folded.forward).items() if r == Role.WEIGHT and n.op == "call_function"]
    assert set(folded.weights) == {"embed", "gain.folded", "head"}
    torch.testing.assert_close(folded.read("gain.folded"), program.read("gain") + 1)
    assert torch.equal(logits(folded), logits(program))
    assert "gain" in program.weights, "folding changed the program that it was given"


def test_a_models_own_expressions_stay_where_not_everything_is_folded():
    program = small()
    folded = fold_weights(program, everything=False)
    assert graph_text(folded) == graph_text(program)
    assert set(folded.weights) == {"embed", "gain", "head"}


def test_what_a_pass_made_is_folded_under_the_name_of_what_it_replaced(gemma):
    program = gemma.copy()
    SplitProjections().rewrite(program, Context())
    names = {n for n, w in program.weights.items() if not w.constant}
    folded = fold_weights(program, everything=False)
    kept = {n for n in folded.weights if not folded.weights[n].constant}
    assert kept <= names, f"new names: {kept - names}"
    assert torch.equal(logits(folded), logits(program))


def test_folding_reads_nothing_until_it_is_asked(gemma):
    program = gemma.copy()
    reads = []

    def counted(name, weight):
        def read():
            reads.append(name)
            return weight.read()

        return replace(weight, read=read)

    program.weights = {n: counted(n, w) for n, w in program.weights.items()}
    folded = fold_weights(program)
    assert reads == []
    name = next(n for n in folded.weights if n.endswith(".folded") and "layers.0.input_layernorm" in n)
    folded.read(name)
    assert reads == [name.removesuffix(".folded")]


# ---------------------------------------------------------------------- canonical text


def test_text_is_the_same_for_two_captures(llama):
    assert graph_text(capture(families.build("llama"))) == graph_text(llama)


def test_text_knows_no_batch_no_length_and_no_names_of_nodes(llama):
    copy = llama.copy()
    for number, node in enumerate(copy.forward.nodes):
        if node.op == "call_function":
            node.name = f"renamed_{number}"
    text = graph_text(copy)
    assert text == graph_text(llama)
    assert "renamed" not in text
    assert "float32[B, S, 97]" in text
    assert "0x" not in text


def test_text_shows_a_change_of_an_op_and_of_an_option(llama):
    for change in ("scale", "target"):
        copy = llama.copy()
        if change == "scale":
            node = last_call(copy, ATTENTION)
            node.kwargs = {**node.kwargs, "scale": 0.25}
        else:
            last_call(copy, aten.add.Tensor).target = aten.sub.Tensor
        assert graph_text(copy) != graph_text(llama)


def test_text_is_the_same_in_every_process(llama):
    code = (
        "import sys, families; from kvpass.capture import capture; from kvpass.ir.text import graph_text;"
        "sys.stdout.write(graph_text(capture(families.build('llama'))))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert told.stdout == graph_text(llama), told.stderr


# ---------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "llama4_text"])
def test_a_graph_goes_to_json_and_comes_back(name):
    program = capture(families.build(name))
    text = json.dumps(graph_to_json(program.forward))
    back = program.copy()
    back.entries["forward"] = graph_from_json(json.loads(text), "here")
    assert graph_text(back) == graph_text(program)
    assert json.dumps(graph_to_json(back.forward)) == text
    assert torch.equal(logits(back), logits(program))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "function.system",
        "function.eval",
        "function.__import__",
        "builtins.eval",
        "aten.no_such_op.default",
        "aten.add.NoSuchOverload",
        "aten.add",
        "aten.__class__.default",
        "prims.add.default",
        "kvpass.attention",
        "operator.attrgetter",
        "torch.load",
        "",
    ],
)
def test_what_is_no_op_is_never_resolved(target, monkeypatch):
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("a command was run"))
    nodes = [
        {"op": "placeholder", "target": "input_ids"},
        {"op": "call_function", "target": target, "args": ["true"]},
        {"op": "output", "args": [{"node": 1}]},
    ]
    with pytest.raises(SourceError) as found:
        graph_from_json(nodes, "graph.json")
    assert repr(target) in found.value.what
    assert found.value.where == "graph.json"
    assert found.value.fix


@pytest.mark.parametrize(
    "nodes",
    [
        [{"op": "call_module", "target": "model"}],
        [{"op": "call_method", "target": "system", "args": []}],
        [{"target": "input_ids"}],
        [{"op": "call_function", "target": "aten.neg.default", "args": [{"node": 3}]}],
        [{"op": "call_function", "target": "aten.neg.default"}],
        [{"op": "call_function", "target": "aten.neg.default", "args": [{"dtype": "no_such"}]}],
        [{"op": "call_function", "target": "aten.neg.default", "args": [{"code": "1"}]}],
        [{"op": "call_function", "target": "aten.neg.default", "args": [{"node": 0, "tuple": []}]}],
        [{"op": "output", "args": []}],
        ["output"],
        [None],
    ],
)
def test_a_damaged_graph_is_refused(nodes):
    with pytest.raises(SourceError) as found:
        graph_from_json(nodes, "graph.json")
    assert found.value.where == "graph.json"


# ---------------------------------------------------------------------- the verifier


def missing_weight(program):
    del program.weights[next(n.target for n in program.forward.nodes if n.op == "get_attr")]


def misshapen_weight(program):
    name = next(n.target for n in program.forward.nodes if n.op == "get_attr" and "o_proj" in n.target)
    program.weights[name] = Weight.of(torch.zeros(3, 3))


def reordered_node(program):
    node = last_call(program, ATTENTION)
    program.forward.find_nodes(op="placeholder")[0].append(node)


def dead_node(program):
    end = program.forward.output_node()
    with program.forward.inserting_before(end):
        program.forward.call_function(aten.neg.default, (output_node(program.forward),))


def in_place_op(program):
    last_call(program, aten.add.Tensor).target = aten.add_.Tensor


def foreign_op(program):
    last_call(program, aten.add.Tensor).target = torch.add


def a_function_of_python(program):
    last_call(program, aten.add.Tensor).target = os.path.join


def wrong_head_counts(program):
    """Attention is given its queries as keys of a layer that has 4 heads, and 3 of its heads as queries."""
    node = last_call(program, ATTENTION)
    with program.forward.inserting_before(node):
        three = program.forward.call_function(aten.slice.Tensor, (node.args[0], 1, 0, 3))
        two = program.forward.call_function(aten.slice.Tensor, (node.args[0], 1, 0, 2))
        back = program.forward.call_function(aten.cat.default, ([three, three], 1))
    back.replace_all_uses_with(three)
    program.forward.erase_node(back)
    users = list(node.users)
    node.args = (three, two, two, *node.args[3:])
    with program.forward.inserting_after(node):
        four = program.forward.call_function(aten.repeat.default, (node, [1, 2, 1, 1]))
    with program.forward.inserting_after(four):
        cut = program.forward.call_function(aten.slice.Tensor, (four, 1, 0, 4))
    for user in users:
        user.replace_input_with(node, cut)
    sweep(program.forward)


def missing_layer(program):
    node = last_call(program, ATTENTION)
    node.replace_all_uses_with(node.args[0])
    sweep(program.forward)


def layers_out_of_order(program):
    for node in program.forward.nodes:
        if node.target is ATTENTION:
            node.kwargs = {**node.kwargs, "layer": 1 - node.kwargs["layer"]}


def other_logits(program):
    end = program.forward.output_node()
    with program.forward.inserting_before(end):
        end.args = (program.forward.call_function(aten.slice.Tensor, (output_node(program.forward), 2, 0, 5)),)


def fixed_length(program):
    end = program.forward.output_node()
    with program.forward.inserting_before(end):
        end.args = (program.forward.call_function(aten.reshape.default, (output_node(program.forward), [2, 5, 97])),)


def foreign_node(program):
    other = fx.Graph()
    stranger = other.placeholder("x")
    node = last_call(program, aten.add.Tensor)
    node.args = (node.args[0], stranger)


FAULTS = {
    missing_weight: "does not exist",
    misshapen_weight: "does not run",
    reordered_node: "comes later or elsewhere",
    dead_node: "computed for nothing",
    in_place_op: "writes in place",
    foreign_op: "no op of the program",
    a_function_of_python: "no op of the program",
    wrong_head_counts: "heads over",
    missing_layer: "numbered [0] in a model of 2",
    layers_out_of_order: "numbered [1, 0]",
    other_logits: "logits have shape",
    fixed_length: "does not run on",
    foreign_node: "comes later or elsewhere",
}


def test_a_sound_program_passes_whatever_the_pass(llama, gemma):
    for program in (llama, gemma, unread(llama)):
        verify(program, "capture")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_verifier_finds(fault, llama):
    program = llama.copy()
    fault(program)
    with pytest.raises(CheckError) as found:
        verify(program, "SomePass()")
    assert FAULTS[fault] in found.value.what, str(found.value)
    assert "after SomePass()" in found.value.what
    assert found.value.exit_status == 1
    verify(llama, "capture")


def test_integer_arithmetic_is_allowed(llama):
    program = llama.copy()
    node = next(n for n in program.forward.nodes if n.target is aten.sym_size.int)
    users = list(node.users)
    with program.forward.inserting_after(node):
        twice = program.forward.call_function(operator.mul, (node, 2))
    with program.forward.inserting_after(twice):
        half = program.forward.call_function(operator.floordiv, (twice, 2))
    for user in users:
        user.replace_input_with(node, half)
    verify(program, "arithmetic")


def test_a_program_runs_as_a_module_of_torch(llama):
    tensors = {n: llama.read(n) for n in llama.used_weights()}
    module = to_module(llama, "forward", tensors)
    ids = torch.arange(12).view(2, 6) + 3
    with torch.no_grad():
        assert torch.equal(module(ids), logits(llama, ids))
