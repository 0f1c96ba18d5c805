"""Snapshots: what they do not depend on, what they show, and how changes are graded."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx

import kvpass
from families import build
from kvpass.errors import RequestError
from kvpass.ir.program import ATTENTION, Program, Weight, aten, sweep
from kvpass.passes import EvictKV, GroupHeads, PageKV, Pass, QuantizeKV, ShareLayers, SlideWindow
from kvpass.regression.diff import Grade, compare, compare_logits, unrolled
from kvpass.regression.sketch import sketch
from kvpass.regression.snapshot import Snapshot, dump, parse, take
from kvpass.runtime.transformed import Transformed
from small_models import Decoder, edited, quick

SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/regression"]
import kvpass
from families import build
from kvpass.passes import *
from kvpass.passes import EvictKV, QuantizeKV, ShareLayers, SlideWindow
from kvpass.regression.snapshot import dump, take
from small_models import Decoder, quick
names = {names}
base = quick(build("llama"))
evicting = quick(base, EvictKV("snapkv", keep=0.5, window=4))
for model in (base, quick(base, QuantizeKV(8)), evicting, quick(Decoder(names))):
    print(dump(take(model)))
"""


@pytest.fixture(scope="module")
def base() -> Transformed:
    """Four layers, of which every other one reads a window."""
    return quick(build("ministral"))


@pytest.fixture(scope="module")
def taken(base: Transformed) -> Snapshot:
    return take(base)


def test_two_processes_with_other_hash_seeds_and_other_names_of_modules_write_the_same():
    tests = str(Path(__file__).parent.parent)
    running = []
    for seed, names in (("1", "str"), ("2", "lambda kind: 'zyxwv'[ord(kind[0]) % 5] + '_' + kind[::-1]")):
        script = SCRIPT.format(tests=tests, names=names)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, text=True)
        )
    first, second = (process.communicate(timeout=120)[0] for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert first.count("# A snapshot") == 4
    assert first == second


def rename_everything(program: Program) -> None:
    names = {name: f"w{i}.of.no.meaning" for i, name in enumerate(sorted(program.used_weights(), key=hash))}
    program.weights = {names.get(n, n): w for n, w in program.weights.items()}
    for node in program.forward.nodes:
        node.name = f"value_{abs(hash(node.name)) % 10**6}_{node.name[-1]}"
        if node.op == "get_attr":
            node.target = names[str(node.target)]


def swap_commuting_operands_and_move_calls_up(program: Program) -> None:
    graph = program.forward
    for node in list(graph.nodes):
        if node.target in (aten.add.Tensor, aten.mul.Tensor) and all(isinstance(a, fx.Node) for a in node.args):
            node.args = (node.args[1], node.args[0])
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.all_input_nodes:
            max(node.all_input_nodes, key=place.__getitem__).append(node)
            place = {n: i for i, n in enumerate(graph.nodes)}


def attention(program: Program, layer: int) -> fx.Node:
    return next(n for n in program.forward.nodes if n.target is ATTENTION and n.kwargs["layer"] == layer)


def drop_a_window(program: Program) -> None:
    node = attention(program, 0)
    node.kwargs = {**node.kwargs, "window": 0}


def scale_scores_by_a_thousandth(program: Program) -> None:
    node = attention(program, 2)
    node.kwargs = {**node.kwargs, "scale": node.kwargs["scale"] * 1.001}


def projection(program: Program, operand: str, layer: int) -> str:
    return next(n for n in program.weights if f"layers.{layer}." in n and f"{operand}_proj" in n)


def swap_two_heads(program: Program) -> None:
    name = projection(program, "q", 1)
    value = program.read(name)
    program.weights[name] = Weight.of(torch.cat([value[8:16], value[:8], value[16:]]))


def scale_a_weight_by_a_thousandth(program: Program) -> None:
    name = projection(program, "v", 3)
    program.weights[name] = Weight.of(program.read(name) * 1.001)


def change_one_entry(program: Program) -> None:
    name = projection(program, "o", 3)
    value = program.read(name).clone()
    value[3, 5] += 0.1
    program.weights[name] = Weight.of(value)


def compute_something_twice(program: Program) -> None:
    graph = program.forward
    gate = next(n for n in graph.nodes if n.target is aten.silu.default).args[0]
    with graph.inserting_before(gate):
        again = graph.node_copy(gate.args[0])  # what the other half of the gated layer reads too
    gate.replace_input_with(gate.args[0], again)


def leave_a_residual_out(program: Program) -> None:
    node = [n for n in program.forward.nodes if n.target is aten.add.Tensor][-2]
    node.replace_all_uses_with(node.args[1])
    sweep(program.forward)


def read_the_layer_below(program: Program) -> None:
    last, first = attention(program, 3), attention(program, 1)
    last.args = (*last.args[:2], first.args[2], *last.args[3:])
    sweep(program.forward)


def round_in_the_middle(program: Program, layers: int = 1) -> None:
    graph = program.forward
    for node in [n for n in graph.nodes if n.target is aten.silu.default][:layers]:
        with graph.inserting_after(node):
            half = graph.call_function(aten.to.dtype, (node, torch.bfloat16))
        with graph.inserting_after(half):
            whole = graph.call_function(aten.to.dtype, (half, torch.float32))
        node.replace_all_uses_with(whole)
        half.args = (node, torch.bfloat16)


CHANGES = {
    rename_everything: (Grade.NONE, ""),
    swap_commuting_operands_and_move_calls_up: (Grade.NONE, ""),
    compute_something_twice: (Grade.COSMETIC, "computes the same, written otherwise"),
    scale_scores_by_a_thousandth: (Grade.NUMERICAL, "layer 2: kvpass.attention (b29): 0.353553 -> 0.353907"),
    swap_two_heads: (Grade.NUMERICAL, "in another order"),
    scale_a_weight_by_a_thousandth: (Grade.NUMERICAL, "is scaled by 1.001"),
    change_one_entry: (Grade.NUMERICAL, "of its norm, read by layer"),
    leave_a_residual_out: (Grade.STRUCTURAL, "add f32[B, S, 32] (b91) became pow.Tensor_Scalar"),
    round_in_the_middle: (Grade.STRUCTURAL, "to.dtype"),
    drop_a_window: (Grade.PLAN, "layer 0: window 5 -> none"),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_injected_change_gets_its_grade_and_the_first_difference_is_said(base, taken, change):
    grade, words = CHANGES[change]
    found = compare(taken, edited(base, change))
    assert found.grade == grade, found.text()
    assert words in found.text()
    if grade == Grade.NONE:
        assert not found.differences


def test_what_only_moves_names_and_order_leaves_every_byte_of_a_snapshot(base, taken):
    for change in (rename_everything, swap_commuting_operands_and_move_calls_up):
        assert dump(edited(base, change)) == dump(taken)


def forward_calls(snapshot: Snapshot) -> list[int]:
    return list(snapshot.program.graphs["forward"].ops.values())


def test_a_size_that_is_no_product_of_the_input_is_a_value_of_its_own():
    class Clamped(Decoder):
        def __init__(self, most: int) -> None:
            super().__init__()
            self.most = most

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            steps = torch.arange(torch.sym_min(input_ids.shape[1], self.most)).sum()
            return super().forward(input_ids) + 0 * steps

    graphs = [take(quick(Clamped(most))).program.graphs["forward"] for most in (1000, 1001)]
    assert graphs[0].meaning != graphs[1].meaning
    assert "1000" in graphs[0].text


def test_one_layer_unshared_is_a_change_of_the_plan(base):
    shared, unshared = (take(quick(base, ShareLayers(source))) for source in ((0, 1, 0, 1), (0, 1, 0, 3)))
    found = compare(shared, unshared)
    assert found.grade == Grade.PLAN
    assert "layer 3: bytes_per_token 0 -> 128, kv_source 1 -> none" in found.text()
    forward = next(d for d in found.differences if d.where == "forward")
    added = [line for line in forward.detail if line.startswith("+")]
    assert len(added) == sum(forward_calls(unshared)) - sum(forward_calls(shared))
    assert not any(line.startswith("-") for line in forward.detail)


def test_what_changes_alike_in_every_layer_is_told_once():
    four = quick(build("llama", num_hidden_layers=4))

    def detail(entry: str, *steps: Pass) -> tuple[str, ...]:
        found = compare(take(four), take(quick(four, *steps)))
        return next(d for d in found.differences if d.where == entry).detail

    every, one = detail("forward", SlideWindow(12, 4)), detail("forward", SlideWindow((0, 0, 12, 0), (0, 0, 4, 0)))
    assert [line[0] for line in every] == ["-", "+", " "]
    assert every[2] == " likewise in layers 1-3"
    assert [line[0] for line in one] == ["-", "+"]
    assert "layer=2" in one[0]
    in_codes = detail("decode", QuantizeKV(8))
    assert [line[0] for line in in_codes] == ["-", "+", " "]
    cast = edited(four, lambda program: round_in_the_middle(program, layers=4))
    put_in = next(d for d in compare(take(four), cast).differences if d.where == "forward").detail
    assert sum(line.startswith("+") for line in put_in) == 2
    assert put_in[-1] == " likewise 3 times more"


def test_another_dtype_is_a_change_of_the_plan():
    found = compare(take(quick(build("llama"))), take(quick(build("llama").double())))
    assert found.grade == Grade.PLAN
    assert "dtype float32 -> float64" in found.text()


def test_another_recipe_of_the_same_effect_is_cosmetic(base, taken):
    again = replace(taken, recipe=("said otherwise",))
    assert compare(taken, again).grade == Grade.COSMETIC


def test_rounding_of_a_constant_is_no_change(base, taken):
    def nudge(program: Program) -> None:
        node = attention(program, 2)
        node.kwargs = {**node.kwargs, "scale": node.kwargs["scale"] * (1 + 1e-6)}

    assert compare(taken, edited(base, nudge)).grade == Grade.NONE


def test_rounding_of_weights_is_no_change(base, taken):
    def nudge(program: Program) -> None:
        for name in program.used_weights():
            value = program.read(name)
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
                program.weights[name] = Weight.of(value * (1 + 1e-6 * noise))

    assert compare(taken, edited(base, nudge)).grade == Grade.NONE


RECIPES = {
    "as it is": [],
    "fewer heads": [GroupHeads(1, method="mean")],
    "shared": [ShareLayers((0, 1, 0, 1))],
    "upward": [ShareLayers((0, 3, 2, 3), upward=True)],
    "a window": [SlideWindow(6, 2)],
    "quantized": [QuantizeKV(8)],
    "paged": [PageKV(4)],
    "evicting": [EvictKV("h2o", budget=20)],
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_snapshot_is_read_back_and_its_repeats_are_the_whole_graph(base, name):
    found = take(quick(base, *RECIPES[name]))
    assert parse(dump(found), "here") == found
    assert found.program.graphs.keys() == {"forward", "decode", "prefill"}
    for entry, graph in found.program.graphs.items():
        calls = [c.op for c in unrolled(found.program, entry)][:-1]
        assert {op: calls.count(op) for op in calls} == graph.ops


def test_equal_layers_are_printed_once(taken):
    text = taken.program.graphs["forward"].text
    assert "b: 2 times, layers 0-3" in text
    assert text.count("silu") == 2  # a layer with a window and one without
    assert taken.program.graphs["forward"].ops["silu"] == 4


def test_a_weight_that_only_some_layers_share_is_no_part_of_a_repeat():
    def deep(shared: bool) -> Snapshot:
        decoder = Decoder()
        decoder.blocks.append(decoder.blocks[1] if shared else copy.deepcopy(decoder.blocks[1]))
        return take(quick(decoder))

    apart, shared = deep(shared=False), deep(shared=True)
    assert "b: 3 times, layers 0-2" in apart.program.graphs["forward"].text
    assert "b: 2 times, layers 0-1" in shared.program.graphs["forward"].text
    assert compare(apart, shared).grade == Grade.STRUCTURAL


def test_a_decoder_of_ones_own_has_a_snapshot_without_a_name_in_it():
    found = dump(take(quick(Decoder(lambda kind: f"secret_{kind}"))))
    assert "secret" not in found
    assert "words" not in found
    assert "Decoder" not in found


def test_a_near_tie_is_ambiguous_and_another_token_is_a_failure(taken):
    assert taken.logits is not None
    first = taken.logits.rows[0]
    best = first.values[0]
    tied = replace(first, values=(best, best - 1e-6, *first.values[2:]))
    turned = replace(tied, tokens=(tied.tokens[1], tied.tokens[0], *tied.tokens[2:]))
    near = [replace(taken.logits, rows=(row, *taken.logits.rows[1:])) for row in (tied, turned)]
    moved = compare_logits(*near)
    assert moved.passed
    assert len(moved.ambiguous) == 1
    found = compare(replace(taken, logits=near[0]), replace(taken, logits=near[1]))
    assert found.grade == Grade.NONE
    assert "ambiguous" in found.text()

    other = replace(first, tokens=(first.tokens[1], first.tokens[0], *first.tokens[2:]))
    moved = compare_logits(taken.logits, replace(taken.logits, rows=(other, *taken.logits.rows[1:])))
    assert not moved.passed
    assert "another token is likeliest at forward 0." in moved.words()


def test_logits_that_are_not_numbers_fail(taken):
    assert taken.logits is not None
    rows = tuple(replace(row, values=(float("nan"),) * 4) for row in taken.logits.rows)
    assert not compare_logits(taken.logits, replace(taken.logits, rows=rows)).passed


def test_markdown_is_a_table_and_the_text_diffs(base, taken):
    page = compare(taken, edited(base, drop_a_window)).markdown("ministral")
    assert page.startswith("### ministral: plan\n")
    assert "| plan | plan | layer 0: window 5 -> none" in page
    assert "```diff" in page
    assert "Nothing changed." in compare(taken, taken).markdown("ministral")


def test_a_file_that_is_no_snapshot_is_refused_with_the_key(taken):
    text = dump(taken)
    for bad, words in (
        (text.replace("format = 1", "format = 9"), "format 9"),
        (text.replace("bytes_per_token = ", "bytes = 1\nbytes_per_token = ", 1), "no key 'bytes'"),
        (text.replace("[logits]", "[logitz]"), "no key 'logitz'"),
        (text.replace('dtype = "float32", layers', "dtype = 32, layers", 1), "model.dtype"),
        (text[:300], "no valid TOML"),
    ):
        with pytest.raises(RequestError) as caught:
            parse(bad, "golden.toml")
        assert words in caught.value.what, caught.value
        assert caught.value.where == "golden.toml"
        assert "--kvpass-update" in caught.value.fix


def test_a_sketch_tells_order_sign_and_scale_apart_and_is_the_same_everywhere():
    value = torch.arange(12.0).reshape(3, 4)
    assert sketch(value) == (6.49359, (1.33366, 0.0889108, 0.0))
    rms, turned = sketch(value.flip(0))
    assert rms == 6.49359
    assert max(abs(a - b) for a, b in zip(turned, sketch(value)[1], strict=True)) > 0.1
    assert sketch(value * 1.001)[0] == pytest.approx(6.50008, abs=2e-5)
    assert sketch(torch.zeros(3)) == (0.0, (0.0, 0.0, 0.0))
    assert sketch(torch.tensor([float("-inf"), 0.0]))[0] > 1e29
    assert sketch(torch.ones(2, dtype=torch.complex64)) == sketch(torch.tensor([1.0, 0.0, 1.0, 0.0]))


def test_a_saved_program_has_the_snapshot_of_the_one_in_memory(base, tmp_path):
    slim = quick(base, GroupHeads(1), SlideWindow(6, 2), QuantizeKV(8))
    slim.save(tmp_path / "slim")
    assert dump(take(kvpass.load(tmp_path / "slim", device="cpu"))) == dump(take(slim))


def test_a_model_that_cannot_be_cached_has_its_forward_graph_compared():
    class Fading(Decoder):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            length = input_ids.shape[1]
            return super().forward(input_ids) * (torch.arange(length) / length)[:, None]

    found = take(quick(Fading()))
    assert found.program.graphs.keys() == {"forward"}
    assert found.logits is not None
    assert found.logits.rows == ()
    assert all(w.rms is not None for w in found.program.weights)
