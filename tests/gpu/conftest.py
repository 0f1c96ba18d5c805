"""Which tests here run: all of them on a GPU, all of them small on a CPU for a rehearsal, else none."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

REHEARSED = os.environ.get("KVPASS_REHEARSE") == "1" and not torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or REHEARSED:
        return
    reason = "needs an NVIDIA or AMD GPU, and torch sees none (KVPASS_REHEARSE=1 rehearses on the CPU)"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _right_bfloat16() -> Iterator[None]:
    """The interpreter of a rehearsal gets bfloat16 right; a GPU needs no help."""
    with ExitStack() as stack:
        if REHEARSED:
            beside = str(Path(__file__).resolve().parent.parent / "kernels")
            if beside not in sys.path:
                sys.path.append(beside)
            from sanitizer import bfloat16

            stack.enter_context(bfloat16())
        yield
