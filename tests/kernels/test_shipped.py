"""The shipped kernels, compiled for GPUs that are not there, fit them: `kvpass.kernels.cases` says which these are.

All cases for all targets take a core some twenty minutes. So a run of the tests compiles those that
`shipped_cases.py` chooses, some 30 s of one core, and with KVPASS_AOT=full in the environment it compiles all of them.
`docs/kernels.md` shows what came out for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
FULL = os.environ.get("KVPASS_AOT") == "full"
TARGETS = {"sm_80", "sm_86", "sm_90", "sm_100", "gfx942"}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """What the command says, in a process where kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [environment.get("PYTHONPATH")])])
    module, workers = ("kvpass.kernels.cases", "0") if FULL else ("shipped_cases", "2")
    command = [sys.executable, "-m", "kvpass.kernels.aot", "--json", "--module", module, "--workers", workers]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    found["stderr"] = done.stderr
    return found


def test_every_configuration_compiles_for_every_target(compiled: dict[str, Any]) -> None:
    assert compiled["failures"] == []
    assert {row["target"] for row in compiled["resources"]} == TARGETS


def test_no_kernel_spills_registers(compiled: dict[str, Any]) -> None:
    assert [row for row in compiled["resources"] if row["spills"]] == []


def test_every_kernel_has_the_shared_memory_that_it_takes(compiled: dict[str, Any]) -> None:
    from kvpass.kernels.targets import SHARED_BYTES

    assert [row for row in compiled["resources"] if row["shared"] > SHARED_BYTES[row["target"]]] == []


def test_no_kernel_loads_codes_byte_by_byte(compiled: dict[str, Any]) -> None:
    assert [row for row in compiled["resources"] if row["scalar_loads"]] == []


def test_no_length_capacity_or_batch_recompiles_a_kernel(compiled: dict[str, Any]) -> None:
    """A case promises a number of variants, and goes through lengths where its label says so."""
    assert [row for row in compiled["resources"] if row["variants"] != row["needed"]] == []
    assert any("any length" in row["label"] for row in compiled["resources"])


def test_triton_is_told_to_fuse_products_and_sums(compiled: dict[str, Any]) -> None:
    """Triton 3.9 warns where nobody says so, and the next version does not fuse them."""
    assert "FP_FUSION" not in compiled["stderr"]


def test_no_two_cases_have_the_same_label() -> None:
    from kvpass.kernels.cases import cases

    labels = [case.label for case in cases("sm_90")]
    assert len(labels) == len(set(labels))
