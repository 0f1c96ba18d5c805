"""Every pair and triple of passes composes or is refused with a reason, before anything is read."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import algebra
import kvpass
from kvpass.errors import PlanError
from kvpass.verification import cache_checks

ALL = [names for size in (1, 2, 3) for names in algebra.combinations(size)]
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def dense():
    return algebra.model()


@pytest.mark.parametrize("names", ALL, ids=" + ".join)
def test_a_combination_runs_as_planned_or_is_refused_before_anything_is_read(dense, names):
    planned = algebra.outcome(dense.plan, names)
    steps = [algebra.STEPS[n] for n in names]
    if planned.plan is None:
        assert len(planned.reason) > 30
        with pytest.raises(PlanError):
            kvpass.transform(dense, steps, progress=False, verify="off")
        return
    slim = kvpass.transform(dense, steps, progress=False, verify="off")
    assert slim.plan == planned.plan
    tolerance = TOLERANCE
    if slim.plan.upward:  # a fixed point is met as nearly as was asked for, which may turn a code into its neighbour
        tolerance = max(1e-5, slim.plan[0].format.step)
    for check in cache_checks(slim):
        assert check.measured <= tolerance, check


def test_three_passes_compose_exactly_where_their_pairs_do(dense):
    for size in (3, 4, 5, 6, 7):
        for names in algebra.combinations(size):
            pairs = [algebra.outcome(dense.plan, pair).plan for pair in itertools.combinations(names, 2)]
            assert (algebra.outcome(dense.plan, names).plan is not None) == all(p is not None for p in pairs), names


def test_another_order_gives_the_same_plan_or_says_why_not(dense):
    for size in (2, 3):
        for names in algebra.combinations(size):
            planned = algebra.outcome(dense.plan, names)
            for order in itertools.permutations(names):
                other = algebra.outcome(dense.plan, order)
                if other.plan is not None:
                    assert other.plan == planned.plan, order
                else:
                    late = any(n.startswith(("GroupHeads", "ShareLayers")) for n in order[1:])
                    assert planned.plan is None or late, order


def test_the_page_of_the_docs_says_so(dense):
    page = Path(__file__).parent.parent / "docs" / "plans.md"
    assert page.read_text(encoding="utf-8") == algebra.document(dense.plan), "run `make docs`"
