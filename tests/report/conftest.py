"""A text, and one report that has most there is to show: fewer heads, a window, chosen tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvpass.passes import EvictKV, GroupHeads, SlideWindow
from kvpass.report import Figures, measure
from small_report import HOSTILE, SIZES, VOCABULARY, Decoder


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    return Decoder()


@pytest.fixture(scope="session")
def text() -> Tensor:
    return torch.randint(0, VOCABULARY, (400,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def figures(decoder: Decoder, text: Tensor) -> Figures:
    steps = [GroupHeads((2, 4, 2), method="mean"), SlideWindow((0, 8, 0), sinks=2), EvictKV("snapkv", keep=0.7)]
    return measure(decoder, steps, text=[text], sizes=SIZES, device="cpu", command="kvpass report MODEL")


@pytest.fixture(scope="session")
def hostile(figures: Figures) -> Figures:
    """The same of a model whose every name tries to leave its place."""
    records = tuple({**r, "description": HOSTILE, "checks": [HOSTILE]} for r in figures.passes)
    points = tuple(replace(p, name=HOSTILE) for p in figures.quality)
    section = replace(figures.graphs.sections[0], name=HOSTILE, lines=(f"+{HOSTILE}",))
    graphs = replace(figures.graphs, sections=(section, *figures.graphs.sections), words=((HOSTILE, "plan", HOSTILE),))
    return replace(
        figures,
        model=HOSTILE,
        family=HOSTILE,
        recipe=(HOSTILE,),
        passes=records,
        notes=(HOSTILE,),
        text=HOSTILE,
        quality=points,
        graphs=graphs,
        environment={**figures.environment, HOSTILE: HOSTILE, "command": HOSTILE},
    )
