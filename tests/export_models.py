"""Tiny models whose heads are as wide as ONNX Runtime's operators ask for, and the greedy text that they write."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kvpass
from families import build

WIDE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "qwen3": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {"n_embd": 64, "n_head": 4},
    "gpt_neox": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96},
    "phi": {"hidden_size": 64, "num_attention_heads": 4},
    "opt": {"hidden_size": 64, "num_attention_heads": 4, "word_embed_proj_dim": 64},
}
"""What makes heads of 16 channels of a family's tiny config."""


def wide(name: str, **overrides: Any) -> nn.Module:
    """A tiny model of a family, with heads of 16 channels."""
    return build(name, **{**WIDE[name], **overrides})


@functools.cache
def captured(name: str, **overrides: Any) -> kvpass.Transformed:
    """The same as it is, which recipes are then tried on: capturing takes as long as an export."""
    return kvpass.transform(wide(name, **overrides), progress=False, verify="off")


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """What torch appends to a text."""
    text = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(count):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    return text[0, len(ids) :].tolist()


def served(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What onnxruntime-genai appends to texts of one length."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompts[0]) + count, batch_size=len(prompts))
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompts, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row).tolist()[len(prompts[0]) :] for row in range(len(prompts))]
