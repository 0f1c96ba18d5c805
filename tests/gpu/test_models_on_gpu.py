"""Whole models on a GPU: kernels compute what the torch references compute there, in prompts, chunks and steps.

    pytest -m gpu

KVPASS_REHEARSE=1 runs the same with interpreted kernels, as in `test_kernels_on_gpu`.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kvpass
from kvpass.passes import EvictKV, GroupHeads, PageKV, Pass, QuantizeKV, SlideWindow

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROMPT, NEW = (300, 40) if GPU else (70, 3)
PLANS: dict[str, list[Pass]] = {
    "as it is": [],
    "fewer heads": [GroupHeads(2, method="first", grouping="contiguous")],
    "window": [SlideWindow(48, 4)],
    "int8": [QuantizeKV(8)],
    "int4": [QuantizeKV(4, layout="token")],
    "KIVI": [QuantizeKV(4)],
    "pages": [PageKV(16)],
    "a window of int8 in pages": [SlideWindow(48, 4), QuantizeKV(8), PageKV(16)],
    "chosen tokens": [EvictKV("snapkv", budget=48, window=8)],
}


@lru_cache
def llama(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, vocab_size=128, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def logits_of(name: str, backend: str, dtype: torch.dtype) -> Tensor:
    """Of a prompt, rows of two lengths (of one where tokens are chosen), and of steps with given tokens after it."""
    slim = kvpass.transform(
        llama(dtype), PLANS[name], backend=backend, device=DEVICE, dtype=dtype, verify="off", progress=False
    )
    ids = torch.randint(3, 128, (2, PROMPT + NEW), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    lengths = None if slim.plan.selective else torch.tensor([PROMPT, PROMPT - 33])
    chunk = None if slim.plan.selective else PROMPT // 2
    logits, state = slim.prefill(ids[:, :PROMPT], lengths, chunk=chunk)
    steps = [slim.decode(ids[:, i : i + 1], state)[:, -1] for i in range(PROMPT, PROMPT + NEW)]
    return torch.stack([logits, *steps]).double()


@pytest.mark.parametrize("name", PLANS)
def test_kernels_give_the_logits_of_the_references(name: str) -> None:
    expected, found = (logits_of(name, backend, torch.float32) for backend in ("reference", "triton"))
    coded = any(isinstance(p, QuantizeKV) for p in PLANS[name])
    # a value on the edge between two codes may fall to either side
    assert (found - expected).abs().max() <= (1e-2 if coded else 1e-4) * expected.abs().max()


@pytest.mark.parametrize("name", PLANS)
def test_in_half_precision_kernels_err_at_most_twice_as_much_as_the_references(name: str) -> None:
    exact = logits_of(name, "reference", torch.float32)
    plain, found = (logits_of(name, backend, torch.bfloat16) for backend in ("reference", "triton"))
    error, allowed = ((x - exact).pow(2).mean().sqrt() for x in (found, plain))
    assert error <= 2 * allowed
