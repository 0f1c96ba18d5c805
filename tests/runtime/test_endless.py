"""Text without end: a bounded cache takes bounded memory, tables of positions included, and knows far positions."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

import families
import kvpass
from kvpass.errors import UnsupportedError
from kvpass.passes import SlideWindow
from kvpass.runtime import executor

WINDOW, SINKS = 12, 3


def ids(length, seed=1):
    return torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def short_tables(monkeypatch):
    monkeypatch.setattr(executor, "STRETCH", 32)


@cache
def dense(family):
    return kvpass.transform(families.build(family), progress=False, verify="off")


def model(positions, sinks=SINKS, family="llama"):
    step = SlideWindow(WINDOW, sinks, positions=positions)
    return kvpass.transform(dense(family), [step], progress=False)


@pytest.mark.parametrize("positions", ["text", "cache"])
def test_positions_beyond_the_first_tables_are_those_of_one_pass(positions, short_tables):
    slim, tokens = model(positions), ids(150)
    with torch.no_grad():
        expected = slim(tokens)
    logits, state = slim.prefill(tokens[:, :40])
    found, rows = [logits], set()
    for place in range(40, 150):
        found.append(slim.decode(tokens[:, place : place + 1], state)[:, 0])
        rows |= {len(t) for t in slim.executor._position_tables(state.min_length, state.max_length).values()}
    torch.testing.assert_close(torch.stack(found, dim=1), expected[:, 39:], rtol=1e-5, atol=1e-5)
    assert max(rows) <= 2 * executor.STRETCH, "tables grew with the text"
    with torch.no_grad():  # back at the start
        again, _ = slim.prefill(tokens[:, :20])
    torch.testing.assert_close(again, expected[:, 19], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("positions", "sinks"), [("cache", SINKS), ("text", 0)])
@pytest.mark.parametrize("start", [10**4, 10**6, 10**8])
def test_a_window_computes_the_same_wherever_in_the_text_it_stands(positions, sinks, start):
    """RoPE sees distances only, and in the cache's positions no distance grows with the text."""
    slim, tokens = model(positions, sinks), ids(40)
    here = _from(slim, tokens, 200)
    there = _from(slim, tokens, start)
    torch.testing.assert_close(there, here, rtol=2e-5, atol=2e-5)


def _from(slim, tokens, start):
    """Logits of tokens that follow `start` others, of which only the sinks (tokens 3, 4, 5) are still in the ring."""
    (window, sinks) = (slim.plan[0].window, slim.plan[0].sinks)
    _, state = slim.prefill(torch.arange(3, 3 + max(1, sinks)).view(1, -1), capacity=window + sinks)
    for store in state.stores.values():
        for tensor in store:
            tensor[:, :, sinks:] = 0  # where the ring begins depends on the position
    state.lengths = torch.tensor([start])
    state.refresh()
    out = torch.cat([slim.decode(tokens[:, i : i + 1], state) for i in range(tokens.shape[1])], dim=1)
    return out[:, window:]  # by then the ring holds nothing from before


def test_single_precision_angles_would_not_know_a_far_position():
    """What the tables are computed in double precision for."""
    position, frequency = 10**6, 10000.0 ** (-2 / 16)
    single = torch.tensor(float(position)) * torch.tensor(frequency)
    wrong = abs(math.cos(float(single)) - math.cos(position * float(torch.tensor(frequency))))
    assert wrong > 1e-3


def test_a_model_that_does_not_rotate_cannot_count_positions_in_its_cache():
    with pytest.raises(UnsupportedError, match="RoPE"):
        model("cache", family="gpt2")
