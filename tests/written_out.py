"""Families' own models with an attention that a test writes out, in float64: what rewritten models are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

import families
import kvpass
from kvpass.runtime.transformed import Transformed

EXACT = 1e-6  # norms and angles are float32 in any dtype; what is wrong is off by more than a hundredth
Read = Callable[[int, Tensor, Tensor, Tensor, float, float], Tensor]
RULE: dict[str, Read] = {}  # what attention does: (layer, query, key, value, scale, softcap) -> [B, H, S, D]
CAPTURED: dict[Any, Transformed] = {}


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: Any = None, **options: Any
) -> tuple[Tensor, None]:
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = RULE["read"](module.layer_idx, query, key, value, scale, options.get("softcap") or 0.0)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("written_out", _attend)


def reference(name: str, tokens: Tensor, read: Read, **changes: Any) -> Tensor:
    """Logits of the family's model whose attention is `read(layer, q, k, v, scale, softcap)` (heads repeated)."""
    model = families.build(name, attn_implementation="written_out", **changes).double()
    RULE["read"] = read
    with torch.no_grad():
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def captured(name: str = "llama", **changes: Any) -> Transformed:
    """The family's model in float64 with nothing done to it."""
    key = (name, str(sorted(changes.items())))
    if key not in CAPTURED:
        model = families.build(name, **changes).double()
        CAPTURED[key] = kvpass.transform(model, dtype=torch.float64, progress=False, verify="off")
    return CAPTURED[key]


def ids(rows: int = 2, length: int = 22, seed: int = 1) -> Tensor:
    """Random tokens."""
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
