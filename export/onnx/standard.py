"""Attention in operators of the ONNX standard alone: what the targets `onnx` and `onnx-static` have in place of
GroupQueryAttention.

`onnx` (opset 23) returns keys and values that are longer than those it was given. Its rows may be padded anywhere:
`attention_mask` says which columns hold tokens, and a token's position is how many of them lie before it. So rows of
different lengths, padded on the left, are read in one run, in parts, and behind a cache. Of a layer with a window, a
runner may hand on the last rows alone: those that are given are taken to be the last columns of the mask.

`onnx-static` (opset 24) writes into buffers of a fixed capacity: TensorScatter puts each row's new tokens behind those
that it has, and Attention is told how many there are. A cache with a window stays as long as it is, its latest tokens
last.

Neither operator takes every mask as a flag; what causality alone does not say is a bias that is computed from positions
once per step, for all layers that see alike. Both cap scores before they add it, as models do.

Shapes: B batch, S new tokens, P rows of a cache, T tokens of the longest row, L keys, H query heads, Hkv KV heads,
D head_dim.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import Tensor

from kvpass.ir.attention import NEG_INF, columns, scored, shared_out, visible, with_tables

Target = Literal["ort", "onnx", "onnx-static"]
OPSETS: dict[str, int] = {"ort": 21, "onnx": 23, "onnx-static": 24}

# ---------------------------------------------------------------------- where tokens stand


def positions_of(ids: Tensor, mask: Tensor) -> Tensor:
    """[B, S]: positions of the new tokens, those of padding before a text clamped to 0."""
    return _last(_numbered(mask), ids.shape[1]).clamp(min=0)


def bias_grown(
    ids: Tensor,  # [B, S]
    mask: Tensor,  # [B, T]
    like: Tensor,  # of the type that the bias is to have
    past: Tensor | None,  # [B, Hkv, P, D] where a window bounds it: the last columns of those before
    alibi_slopes: Tensor | None,  # [H]
    table: Tensor | None,  # [B, H or 1, S, positions]: rows of a mask that is kept as a table
    *,
    window: int,
    sinks: int,
) -> Tensor:
    """[B, H or 1, S, L]: what is added to scores where caches are concatenated; -inf hides a key.

    A query that is padding before a text sees everything: what it computes is not read, but must be a number.
    """
    here, keys, real = _last(_numbered(mask), ids.shape[1]), _numbered(mask), mask > 0
    if past is not None:
        keys, real = (_last(x, past.shape[2] + ids.shape[1]) for x in (keys, real))
    return _bias(here, keys, real, like, alibi_slopes, table, window, sinks)


def bias_placed(
    ids: Tensor,
    mask: Tensor,
    starts: Tensor,  # [B] tokens that were there before
    like: Tensor,
    past: Tensor | None,  # [B, Hkv, P, D] where a window bounds it: the latest tokens, in order
    alibi_slopes: Tensor | None,
    table: Tensor | None,
    *,
    window: int,
    sinks: int,
) -> Tensor:
    """[B, H or 1, S, L]: as `bias_grown`, where a row's tokens stand at their positions."""
    first = starts.view(-1, 1)
    here = first + torch.arange(ids.shape[1], device=ids.device)
    if past is None:
        keys, real = torch.arange(mask.shape[1], device=ids.device).view(1, -1), None
    else:
        keys = first - past.shape[2] + torch.arange(past.shape[2] + ids.shape[1], device=ids.device)
        real = keys >= 0
    return _bias(here, keys, real, like, alibi_slopes, table, window, sinks)


def _bias(
    here: Tensor,  # [B, S]
    keys: Tensor,  # [B or 1, L]
    real: Tensor | None,  # [B, L]
    like: Tensor,
    alibi_slopes: Tensor | None,
    table: Tensor | None,
    window: int,
    sinks: int,
) -> Tensor:
    query_pos, key_pos = here.unsqueeze(1).unsqueeze(-1), keys.unsqueeze(1).unsqueeze(1)
    seen = visible(query_pos, key_pos, causal=True, strict=False, window=window, sinks=sinks)
    assert seen is not None
    if real is not None:
        seen = seen & real.unsqueeze(1).unsqueeze(1)
    part = None if table is None else columns(table, key_pos)
    seen, bias = with_tables(seen, part, alibi_slopes, key_pos - query_pos)
    assert seen is not None
    free = torch.zeros((), dtype=like.dtype, device=like.device) if bias is None else bias.to(like.dtype)
    return torch.where(seen | (query_pos < 0), free, NEG_INF)


def _numbered(mask: Tensor) -> Tensor:
    """[B, T]: the position of each column's token; padding has that of the token before it, or -1."""
    return mask.cumsum(1) - 1


def _last(x: Tensor, count: Any) -> Tensor:
    """The last columns of [B, T], gathered: a slice would have to know which of two symbols is the larger."""
    return x.index_select(1, torch.arange(count, device=x.device) + (x.shape[1] - count))


# ---------------------------------------------------------------------- caches


def appended(past: Tensor, new: Tensor) -> Tensor:  # [B, Hkv, P, D], [B, Hkv, S, D]
    """[B, Hkv, P + S, D]"""
    return torch.cat([past, new], dim=2)


def coded(x: Tensor) -> Tensor:
    """Keys or values that were divided by their scales, as a cache of codes holds them."""
    return x.round().clamp(-128, 127).to(torch.int8)


def placed(past: Tensor, new: Tensor, starts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The buffer [B, Hkv, P, D] with new tokens [B, Hkv, S, D] behind those of each row, and its rows in use."""
    present = _operator("TensorScatter", [past, new, starts], {"axis": 2, "mode": "linear"}, [list(past.shape)], 24)[0]
    # Attention computes to the end of a buffer, however little of it is said to be in use
    return present, _cut(present, 0, mask.shape[1], mask.shape[1])


def slid(past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The buffer [B, Hkv, P, D] of the latest tokens with those of [B, Hkv, S, D] in it, and all that queries may
    read. Nothing but the sum of both reads the old buffer, so the new one may lie in its place."""
    rows = torch.cat([past, new], dim=2)
    return _cut(rows, new.shape[2], sys.maxsize, past.shape[2]), rows


def _cut(x: Tensor, begin: Any, end: Any, rows: Any) -> Tensor:
    """Rows from `begin` to `end`, which torch could only slice if it knew that `end` is no larger than there are."""
    bounds = [torch.scalar_tensor(n, dtype=torch.int64).view(1) for n in (begin, end, 2)]
    return _operator("Slice", [x, *bounds], {}, [[x.shape[0], x.shape[1], rows, x.shape[3]]], 13)[0]


# ---------------------------------------------------------------------- operators


def rotary_embedding(
    x: Tensor,  # [B, S, H*D], or [B, H, S, D]
    cos: Tensor,  # [positions, pairs]
    sin: Tensor,
    positions: Tensor,  # [B, S]
    *,
    heads: int,
    interleaved: bool,
) -> Tensor:
    """`RotaryEmbedding`; see `kvpass.ir.ops.rotary_reference`."""
    attributes = {"interleaved": int(interleaved), "num_heads": heads, "rotary_embedding_dim": 2 * cos.shape[1]}
    return _operator("RotaryEmbedding", [x, cos, sin, positions], attributes, [list(x.shape)], 23)[0]


def attend_appended(
    q: Tensor,  # [B, S, H*D]
    k: Tensor,  # [B, S, Hkv*D]
    v: Tensor,
    past_key: Tensor,  # [B, Hkv, P, D]
    past_value: Tensor,
    bias: Tensor,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    """`Attention` behind a past: [B, S, H*D], and all keys and values [B, Hkv, P + S, D]."""
    rows = [*past_key.shape[:2], past_key.shape[2] + q.shape[1], past_key.shape[3]]
    attributes = {"q_num_heads": heads, "kv_num_heads": kv_heads, "scale": scale, "softcap": softcap}
    inputs: list[Tensor | None] = [q, k, v, bias, past_key, past_value]
    return _operator("Attention", inputs, attributes, [list(q.shape), rows, rows], 23)


def attend_over(
    q: Tensor,  # [B, H, S, D]
    keys: Tensor,  # [B, Hkv, L, D]
    values: Tensor,
    bias: Tensor | None,  # None: each row reads what it holds, and its queries are the last of it
    held: Tensor | None,  # [B] tokens of each row
    sink_logits: Tensor | None,  # [H]
    *,
    scale: float,
    softcap: float,
    opset: int,
) -> Tensor:
    """`Attention` over keys that are there: [B, H, S, D]. Learned sinks the operator has not, and it is spelled out.

    Codes are read as the numbers they are: their scales are factors of queries and of what comes out.
    """
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    if sink_logits is not None:
        assert bias is not None
        weights = shared_out(scored(q, keys, None, bias, scale, softcap), sink_logits, may_be_empty=False)
        return torch.matmul(weights.to(values.dtype).flatten(2, 3), values).reshape(q.shape)
    attributes: dict[str, Any] = {"scale": scale, "softcap": softcap}
    inputs: list[Tensor | None] = [q, keys, values, *([bias] if bias is not None else [None, None, None, held])]
    attributes["is_causal"] = int(bias is None)
    return _operator("Attention", inputs, attributes, [list(q.shape)], opset)[0]


def _operator(
    name: str, inputs: list[Tensor | None], attributes: dict[str, Any], shapes: list[list[Any]], version: int
) -> tuple[Tensor, ...]:
    """An operator of the standard, whose outputs have the type of its first input."""
    assert inputs[0] is not None
    dtypes = [inputs[0].dtype] * len(shapes)
    made = torch.onnx.ops.symbolic_multi_out(
        f"::{name}", inputs, attributes, dtypes=dtypes, shapes=shapes, version=version
    )
    return tuple(made)
