"""The checks of a finished model: they hold for good ones, and fail for what they are there to find."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kvpass
from decoders import DECODERS, NEGATIVE, NegativeBase
from families import build
from kvpass.capture import capture
from kvpass.errors import CaptureError, CheckError
from kvpass.passes.group_heads import GroupHeads
from kvpass.runtime.state import State
from kvpass.verification import check_cache, check_tokens_apart, verify


def made(source: nn.Module, *passes: GroupHeads, level: str = "off") -> kvpass.runtime.transformed.Transformed:
    return kvpass.transform(source, passes, verify=level, device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_good_models_pass_every_check(family: str) -> None:
    checks = verify(made(build(family)))
    assert len(checks) == 5
    assert [c.name for c in checks if not c.passed] == []
    assert all(c.measured <= c.allowed for c in checks)


def test_a_rewritten_model_passes_and_says_so() -> None:
    model = made(build("llama_mha"), GroupHeads(kv_heads=2), level="fast")
    assert "cached decode, ragged batches and chunks equal" in model.report.notes[-1]
    assert all(c.passed for c in verify(model))


@pytest.mark.parametrize("level", ["fast", "full"])
def test_tokens_that_mix_outside_attention_are_refused(level: str) -> None:
    with pytest.raises(CaptureError, match="mixes tokens outside attention") as caught:
        made(NEGATIVE["cross_token_conv"](), level=level)
    assert "conv" in caught.value.where


def test_unchecked_mixing_fails_verification() -> None:
    failed = [c.name for c in verify(made(NEGATIVE["cross_token_conv"]())) if not c.passed]
    assert "prefill and decode equal forward" in failed
    assert "prefill in chunks equals prefill at once" in failed


@pytest.mark.parametrize("family", ["deepseek_v2", "phi3", "gpt_neox_sequential", "olmoe"])
def test_memory_not_yet_written_empty_parts_and_experts_are_no_mixing(family: str) -> None:
    check_tokens_apart(capture(build(family, num_hidden_layers=2)), torch.device("cpu"))


def test_a_wrong_decode_is_found() -> None:
    model = made(DECODERS["nano_gpt"]())
    right = model.decode

    def wrong(input_ids: Tensor, state: State) -> Tensor:
        return 1.01 * right(input_ids, state)

    model.decode = wrong  # type: ignore[method-assign]
    with pytest.raises(CheckError, match="prefill and decode equal forward"):
        check_cache(model)


def test_weights_that_are_not_finite_are_named() -> None:
    source = DECODERS["nano_gpt"]()
    name, parameter = next((n, p) for n, p in source.named_parameters() if p.dim() == 2)
    with torch.no_grad():
        parameter[1, :2] = math.inf
    checks = verify(made(source))
    assert [(c.name, c.measured) for c in checks if not c.passed] == [("finite weights", 2.0)]
    with pytest.raises(CheckError, match="NaN or infinite") as caught:
        made(source, level="fast")
    assert name in caught.value.where


def test_another_checkpoint_is_told_from_the_model(tmp_path: Path) -> None:
    for seed in (0, 1):
        build("llama", seed=seed).save_pretrained(tmp_path / str(seed))
    model = kvpass.transform(tmp_path / "0", verify="off", device="cpu")
    assert verify(model, checkpoint=str(tmp_path / "0"))[-1].passed
    assert not verify(model, checkpoint=str(tmp_path / "1"))[-1].passed


class PositionsByLength(NegativeBase):
    """Learned positions, weighed by the length of the whole sequence."""

    def start(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.embed(ids) + self.wpe(positions) / ids.shape[1]


def test_a_model_that_cannot_be_cached_here_says_so() -> None:
    model = made(PositionsByLength(), level="fast")
    assert "cannot run this model with a cache" in model.report.notes[-1]
