"""Attention in ONNX Runtime's own operator, GroupQueryAttention: what the target `ort` has.

Shapes: B batch, S new tokens, P rows of a cache, H query heads, Hkv KV heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpass.ir.plan import LayerCache


def scoring(cache: LayerCache, options: dict[str, Any]) -> dict[str, Any]:
    """Attributes of the operator that say what a score is."""
    found: dict[str, Any] = {"num_heads": cache.heads, "kv_num_heads": cache.kv_heads, "scale": float(options["scale"])}
    return found | ({"softcap": float(options["softcap"])} if options.get("softcap") else {})


def group_query_attention(
    query: Tensor,  # [B, S, H*D]
    key: Tensor,  # [B, S or 0, Hkv*D]
    value: Tensor,
    past_key: Tensor,  # [B, Hkv, P, D]
    past_value: Tensor,
    seqlens: Tensor,  # [B] int32: tokens of each row, less 1
    total: Tensor,  # int32: tokens of the longest row
    cos: Tensor | None,
    sin: Tensor | None,
    numbers: Tensor | None,  # [B, S] positions of the queries, where they do not follow from lengths
    sink_logits: Tensor | None,
    scales: list[Tensor] | None,  # [1, Hkv, 1, D] of keys and of values, where the cache holds codes
    *,
    attributes: dict[str, Any],
    fresh: bool,
    ring: bool,
) -> tuple[Tensor, ...]:
    """`com.microsoft::GroupQueryAttention`; a reader of another layer's cache has no presents of its own.

    Only where the cache holds codes does the operator ask for them of readers, too: nothing reads those.
    """
    batch, heads, past, dim = past_key.shape
    shapes: list[Any] = [list(query.shape)]
    dtypes = [query.dtype]
    if fresh or scales is not None:
        shapes += [[batch, heads, past if ring else past + key.shape[1], dim]] * 2
        dtypes += [past_key.dtype] * 2
    inputs: list[Tensor | None] = [query, key, value, past_key, past_value, seqlens, total, cos, sin]
    inputs += [numbers, None, sink_logits, *(scales or ())]
    while inputs and inputs[-1] is None:
        inputs.pop()
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention", inputs, attributes, dtypes=dtypes, shapes=shapes, version=1
        )
    )
