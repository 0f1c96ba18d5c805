"""Compiling ahead of time tells what is wrong with a kernel, for GPUs that are not there."""

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
LIMITS = {"sm_86": 101376, "gfx942": 65536}


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """What the command says of `little_kernels`, in a process where kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "kvpass.kernels.aot", "--json", "--module", "little_kernels", "--workers", "1"]
    command += ["--targets", *LIMITS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _row(printed: dict[str, Any], kernel: str, target: str) -> dict[str, Any]:
    (row,) = [r for r in printed["resources"] if (r["kernel"], r["target"]) == (kernel, target)]
    return dict(row)


@pytest.mark.parametrize("target", LIMITS)
def test_a_good_kernel_is_compiled_once_for_all_lengths_and_has_no_problems(
    printed: dict[str, Any], target: str
) -> None:
    row = _row(printed, "good", target)
    assert row["problems"] == []
    assert row["label"] == "any length"
    assert (row["variants"], row["spills"], row["scalar_loads"]) == (1, 0, 0)
    assert 0 < row["registers"] < 64


@pytest.mark.parametrize("target", LIMITS)
def test_a_kernel_that_looks_at_its_length_is_seen_to_be_compiled_again(printed: dict[str, Any], target: str) -> None:
    row = _row(printed, "recompiles", target)
    assert row["variants"] == 3  # a length of 1, multiples of 16, others
    assert row["problems"] == ["was compiled 3 times, not 1"]


@pytest.mark.parametrize("target", LIMITS)
def test_loads_of_single_bytes_are_seen(printed: dict[str, Any], target: str) -> None:
    row = _row(printed, "bytewise", target)
    assert row["problems"] == [f"loads single bytes with {row['scalar_loads']} instructions"]


@pytest.mark.parametrize("target", LIMITS)
def test_spilled_registers_are_seen(printed: dict[str, Any], target: str) -> None:
    row = _row(printed, "spills", target)
    assert row["problems"] == [f"spills {row['spills']} bytes per thread"]


@pytest.mark.parametrize("target", LIMITS)
def test_more_shared_memory_than_there_is_is_seen(printed: dict[str, Any], target: str) -> None:
    row = _row(printed, "overfull", target)
    assert f"takes {row['shared']} bytes of shared memory where {LIMITS[target]} fit" in row["problems"]


@pytest.mark.parametrize("target", LIMITS)
def test_what_does_not_compile_is_told_and_stops_nothing_else(printed: dict[str, Any], target: str) -> None:
    (failure,) = [f for f in printed["failures"] if f["target"] == target]
    assert failure["label"] == "a sum of Python"
    assert "sum is not defined" in failure["message"]
    assert len(printed["resources"]) == 10


def test_an_interpreted_kernel_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpass.kernels.aot import compile_for

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="in one without TRITON_INTERPRET"), compile_for("sm_90"):
        pass
