"""What a prompt is said to cost, against what torch counts while it is read."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import families
import kvpass
from kvpass.ir.cost import prompt_cost
from kvpass.passes import EvictKV, GroupHeads, PrunePyramid, ShareLayers

PROMPT = 120


def linear(x, weight, *rest, **options):
    return 2 * math.prod(x) * weight[0]


def attention(q, k, v, *rest, **options):
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


COUNTED = {  # what torch's own table lacks
    torch.ops.mkldnn._linear_pointwise: linear,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
}


def counted(slim, tokens):
    slim.prefill(tokens)  # the first call folds weights and fills tables
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        slim.prefill(tokens)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "gptj", "falcon"])
def test_a_whole_prompt_costs_what_is_counted(family):
    slim = kvpass.transform(families.build(family), progress=False, verify="off")
    tokens = torch.randint(3, 90, (1, PROMPT))
    assert prompt_cost(slim.program).total(slim.plan, PROMPT) == counted(slim, tokens)


@pytest.fixture(scope="module")
def dense():
    return kvpass.transform(families.build("llama", num_hidden_layers=8), progress=False, verify="off")


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.35])
def test_a_pruned_prompt_costs_what_the_schedule_predicts(dense, keep):
    tokens = torch.randint(3, 90, (1, PROMPT))
    step = PrunePyramid(keep=keep, length=PROMPT, max_recent=8, min_context=8)
    slim = kvpass.transform(dense, [step], progress=False, verify="off")
    assert slim.plan.fraction(PROMPT) == pytest.approx(keep, rel=0.03)
    whole, pruned = (prompt_cost(m.program).total(m.plan, PROMPT) for m in (dense, slim))
    assert pruned == pytest.approx(counted(slim, tokens), rel=0.02)
    assert pruned < (0.25 + keep * 0.85) * whole
    assert whole == counted(dense, tokens)


def test_eviction_saves_no_work_on_the_prompt_and_sharing_saves_projections():
    dense = kvpass.transform(families.build("llama", num_hidden_layers=4), progress=False, verify="off")
    tokens = torch.randint(3, 90, (1, PROMPT))
    evicted = kvpass.transform(dense, [EvictKV("snapkv", keep=0.5, window=8)], progress=False, verify="off")
    shared = kvpass.transform(dense, [ShareLayers("cla:2")], progress=False, verify="off")
    grouped = kvpass.transform(dense, [GroupHeads(1, method="mean")], progress=False, verify="off")
    whole = counted(dense, tokens)
    for slim in (evicted, shared, grouped):
        said = prompt_cost(slim.program).total(slim.plan, PROMPT)
        assert said == pytest.approx(counted(slim, tokens), rel=0.02)
        assert (said > whole) == (slim is evicted)


@pytest.mark.parametrize("family", ["gptj", "phi", "cohere", "gpt_neox_sequential"])
def test_parallel_and_sequential_layers_are_cut_where_they_end(family):
    dense = kvpass.transform(families.build(family), progress=False, verify="off")
    step = PrunePyramid(schedule="step", at=0, keep=0.2, max_recent=8, min_context=8)
    slim = kvpass.transform(dense, [step], progress=False, verify="off")
    tokens = torch.randint(3, 90, (1, PROMPT))
    assert prompt_cost(slim.program).total(slim.plan, PROMPT) == pytest.approx(counted(slim, tokens), rel=0.02)
