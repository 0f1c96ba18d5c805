"""The cache plan: a small immutable table whose bytes can be checked by hand."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

import families
from kvpass.capture import capture
from kvpass.errors import PlanError
from kvpass.ir.check import plan_of
from kvpass.ir.plan import CachePlan, LayerCache


def layer(index=0, **changes):
    options = {"heads": 8, "kv_heads": 4, "key_dim": 16, "value_dim": 24, "dtype": torch.bfloat16}
    return LayerCache(index, **(options | changes))


def test_a_token_costs_its_heads_channels_and_dtype():
    assert layer().bytes_per_token() == 4 * (16 + 24) * 2
    assert layer(kv_heads=1, dtype=torch.float32).bytes_per_token() == 40 * 4
    plan = CachePlan((layer(0), layer(1, kv_heads=1, dtype=torch.float32)))
    assert plan.bytes_per_token() == 320 + 160
    assert plan.bytes(3, 100) == 300 * 480
    assert plan.bytes(0, 100) == plan.bytes(3, 0) == 0


def test_a_window_bounds_what_a_layer_stores():
    plan = CachePlan((layer(0, window=8, sinks=2), layer(1)))
    assert plan.bytes_per_token() == 640
    assert plan.bytes(2, 100) == 2 * (10 + 100) * 320
    assert plan.bytes(2, 5) == 2 * 2 * 5 * 320
    assert not plan.bounded
    assert CachePlan((layer(0, window=8, sinks=2),)).bounded


def test_a_store_keeps_what_its_widest_reader_needs():
    plan = CachePlan((layer(0, window=8, sinks=2), layer(1, window=20, kv_source=0), layer(2, kv_source=0)))
    assert plan.owners() == [0]
    assert (plan.layout(0).window, plan.layout(0).sinks) == (0, 0)
    assert plan.bytes(1, 100) == 100 * 320
    narrower = CachePlan(plan.layers[:2])
    assert (narrower.layout(0).window, narrower.layout(0).sinks) == (20, 2)
    assert narrower.bytes(1, 100) == 22 * 320


def test_a_layer_whose_mask_is_a_table_keeps_everything():
    plan = CachePlan((layer(0, window=8, positions="tabulated mask"),))
    assert plan.bytes(1, 100) == 100 * 320


def test_a_head_is_not_split_over_devices():
    plan = CachePlan((layer(), layer(1, kv_heads=1)))
    assert [plan.per_device(n) for n in (1, 2, 4, 8)] == [320 + 80, 160 + 80, 80 + 80, 80 + 80]
    with pytest.raises(PlanError, match="at least 1, not 0"):
        plan.per_device(0)


def test_a_plan_does_not_change():
    plan = CachePlan((layer(0), layer(1)))
    other = plan.with_layer(1, kv_heads=2)
    assert [c.kv_heads for c in plan] == [4, 4]
    assert [c.kv_heads for c in other] == [4, 2]
    assert other != plan
    assert other.with_layer(1, kv_heads=4) == plan
    assert hash(other.with_layer(1, kv_heads=4)) == hash(plan)
    with pytest.raises(FrozenInstanceError):
        plan.layers = ()
    with pytest.raises(FrozenInstanceError):
        plan.layers[0].kv_heads = 1
    with pytest.raises(TypeError):
        plan.with_layer(0, heads_of_kv=1)


def test_the_table_has_a_row_per_run_of_equal_layers():
    plan = CachePlan((layer(0), layer(1), layer(2, window=8, sinks=1), layer(3), layer(4, positions="odd")))
    rows = plan.table()
    assert [(r["first"], r["last"]) for r in rows] == [(0, 1), (2, 2), (3, 3), (4, 4)]
    assert [(r["window"], r["sinks"]) for r in rows] == [(0, 0), (8, 1), (0, 0), (0, 0)]
    assert rows[0]["dtype"] == "bfloat16"
    assert rows[0]["bytes_per_token"] == 320
    assert rows[3]["mask"] == "odd"
    assert CachePlan(()).table() == []


def test_the_plan_of_a_model_is_what_its_layers_store():
    plan = plan_of(capture(families.build("gemma2", num_hidden_layers=2)))
    config = families.FAMILIES["gemma2"].config()
    assert [c.window for c in plan] == [5, 0]
    assert {(c.heads, c.kv_heads, c.key_dim, c.value_dim) for c in plan} == {
        (config.num_attention_heads, config.num_key_value_heads, 16, 16)
    }
    assert plan.bytes_per_token() == 2 * 2 * 32 * 4
    assert [c.layer for c in plan] == [0, 1]
