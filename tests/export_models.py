"""Tiny models whose heads are as wide as ONNX Runtime's operators ask for."""

from __future__ import annotations

from typing import Any

from torch import nn

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
