"""The manager: what a pass needs runs first, and a pass that does not do what it promised is caught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import families
import kvpass
from kvpass.capture import capture
from kvpass.errors import CheckError, PlanError, RequestError
from kvpass.ir.program import ATTENTION, Weight, aten, insert_call, output_node
from kvpass.ir.text import graph_text
from kvpass.manager import make_plan, run
from kvpass.passes import Context, Effect, GroupHeads, Pass, Rewritten, SplitProjections


@pytest.fixture(scope="module")
def program():
    return capture(families.build("phi3"))  # its QKV is fused


@dataclass(frozen=True)
class Scaled(Pass):
    """Multiplies the logits."""

    by: float = 1.0
    effect: ClassVar[Effect] = Effect.EXACT

    def rewrite(self, program, context):
        end = program.forward.output_node()
        end.args = (insert_call(program.forward, end, aten.mul.Tensor, output_node(program.forward), self.by),)
        return Rewritten(program.facts.layers, program.facts.layers)


@dataclass(frozen=True)
class ScaledLayout(Scaled):
    effect: ClassVar[Effect] = Effect.LAYOUT


@dataclass(frozen=True)
class Idle(Pass):
    """Promises one KV head, and does nothing."""

    claims: int = 0
    of: int = 2
    effect: ClassVar[Effect] = Effect.LOSSY

    def plan(self, plan):
        for layer in range(len(plan)):
            plan = plan.with_layer(layer, kv_heads=1)
        return plan

    def rewrite(self, program, context):
        return Rewritten(self.claims, self.of)


@dataclass(frozen=True)
class Breaking(Pass):
    """Does `what` to the program."""

    what: str
    effect: ClassVar[Effect] = Effect.LOSSY

    def rewrite(self, program, context):
        graph = program.forward
        if self.what == "leaves a dead node":
            insert_call(graph, graph.output_node(), aten.neg.default, output_node(graph))
        if self.what == "raises":
            raise ZeroDivisionError("oh")
        if self.what == "a NaN":
            name = next(n for n in sorted(program.used_weights()) if "lm_head" in n)
            program.weights[name] = Weight.of(torch.full_like(program.read(name), torch.nan))
        if self.what == "mutates":
            node = next(n for n in graph.nodes if n.target is ATTENTION)
            node.kwargs = {**node.kwargs, "window": 2}
        return Rewritten(program.facts.layers, program.facts.layers)


@dataclass(frozen=True)
class NeedsMagic(Scaled):
    requires: ClassVar[frozenset[str]] = frozenset({"magic"})


@dataclass(frozen=True)
class BreaksSplit(Scaled):
    breaks: ClassVar[frozenset[str]] = frozenset({"separate projections"})


# ---------------------------------------------------------------------- order


def test_what_a_pass_requires_runs_before_it(program):
    result, report = run(program, [GroupHeads(1)], Context())
    assert [r.name for r in report.passes] == ["SplitProjections", "GroupHeads"]
    assert [r.effect for r in report.passes] == ["layout", "lossy"]
    assert "separate projections" in result.ensured


def test_what_holds_already_is_not_done_again(program):
    _, report = run(program, [SplitProjections(), GroupHeads(1)], Context(), "off")
    assert [r.name for r in report.passes] == ["SplitProjections", "GroupHeads"]


def test_what_a_pass_breaks_is_done_again(program):
    _, report = run(program, [SplitProjections(), BreaksSplit(), GroupHeads(1)], Context(), "off")
    assert [r.name for r in report.passes] == ["SplitProjections", "BreaksSplit", "SplitProjections", "GroupHeads"]


def test_a_fact_that_nothing_establishes_is_an_error(program):
    with pytest.raises(PlanError, match=r"NeedsMagic\(\) requires \['magic'\]"):
        run(program, [NeedsMagic()], Context())


def test_the_program_that_was_given_is_not_changed(program):
    before = graph_text(program)
    run(program, [GroupHeads(1), Scaled(2.0)], Context(), "off")
    assert graph_text(program) == before
    assert program.ensured == set()


def test_no_passes_change_nothing(program):
    result, report = run(program, [], Context())
    assert graph_text(result) == graph_text(program)
    assert report.passes == []


def test_every_plan_is_made_before_any_pass_runs(program):
    with pytest.raises(PlanError, match="which 3 does not divide"):
        run(program, [Breaking("raises"), GroupHeads(3)], Context())
    assert [c.kv_heads for c in make_plan(program, [GroupHeads(1)])] == [1, 1]


# ---------------------------------------------------------------------- promises


@pytest.mark.parametrize("kind", [Scaled, ScaledLayout])
def test_an_exact_pass_that_changes_numbers_is_caught(kind, program):
    with pytest.raises(CheckError) as found:
        run(program, [kind(1.001)], Context())
    assert f"promised to be {kind.effect.value}" in found.value.what
    assert kind(1.001).describe() in found.value.what
    assert found.value.exit_status == 1
    _, report = run(program, [kind(1.0)], Context())
    assert "logits equal to 0.0e+00" in report.passes[0].checks


def test_a_pass_that_touches_nothing_while_it_promises_is_caught(program):
    with pytest.raises(CheckError, match="was to change 2 sites and changed none"):
        run(program, [Idle()], Context())
    with pytest.raises(CheckError, match="reached another plan than it promised"):
        run(program, [Idle(claims=2)], Context())


def test_a_pass_that_overlooks_layers_is_caught(program):
    with pytest.raises(CheckError, match="looked at 1 attention sites of 2"):
        run(program, [Idle(claims=1, of=1)], Context())


def test_promises_are_held_without_verification_too(program):
    with pytest.raises(CheckError, match="changed none"):
        run(program, [Idle()], Context(), "off")


@pytest.mark.parametrize(
    ("what", "words"), [("leaves a dead node", "computed for nothing"), ("a NaN", "hold a NaN or an infinity")]
)
def test_a_pass_that_breaks_the_program_is_caught_and_named(what, words, program):
    with pytest.raises(CheckError) as found:
        run(program, [Breaking(what)], Context())
    assert words in found.value.what
    assert "Breaking(what=" in found.value.what


def test_an_error_inside_a_pass_names_the_pass(program):
    with pytest.raises(ZeroDivisionError) as found:
        run(program, [Breaking("raises")], Context())
    assert any("Breaking" in note for note in found.value.__notes__)


# ---------------------------------------------------------------------- levels


def test_verification_may_be_off(program):
    _, report = run(program, [Scaled(1.5)], Context(), "off")
    assert report.passes[0].checks == []


def test_a_fast_check_of_a_large_model_says_that_it_compared_nothing_and_a_full_one_compares(program, monkeypatch):
    monkeypatch.setattr("kvpass.manager.FAST_BYTES", 1000)
    _, report = run(program, [Scaled(1.5), Scaled(1.0)], Context(), "fast")
    assert [r.checks[0] for r in report.passes] == ["structure", "structure"]
    assert all("verify='full'" in r.checks[1] for r in report.passes)
    with pytest.raises(CheckError, match="promised to be exact"):
        run(program, [Scaled(1.5)], Context(), "full")


def test_another_level_is_refused(program):
    with pytest.raises(RequestError, match="'off', 'fast' or 'full', not 'some'"):
        run(program, [], Context(), "some")
    with pytest.raises(RequestError, match="'off', 'fast' or 'full'"):
        kvpass.transform(families.build("llama"), verify=True, progress=False)


def test_a_record_counts_nodes_bytes_and_sites(program):
    _, report = run(program, [GroupHeads(1)], Context())
    split, group = report.passes
    assert (split.sites, split.of, group.sites, group.of) == (2, 2, 2, 2)
    assert split.bytes_per_token_before == split.bytes_per_token_after == group.bytes_per_token_before
    assert group.bytes_per_token_after * 2 == group.bytes_per_token_before
    assert group.nodes_before == split.nodes_after
    assert group.seconds > 0
    assert report.to_dict()["passes"][1]["description"] == "GroupHeads(kv_heads=1)"
