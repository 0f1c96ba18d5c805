"""`python -m examples.odd_layer`: what `kvpass explain` says of a decoder of which one layer is not like the others.

Four layers; in layer 2 a token does not read every third token before it. Nothing in {causal, window, sinks, ALiBi}
does that, so `slide-window` cannot say what the layer would read in a window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpass
from kvpass.explanation import table

DIM, HEADS, LAYERS, ODD = 32, 4, 4, 2


class Layer(nn.Module):
    """Attention alone; where `sparse`, to two of three tokens."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.sparse = sparse
        self.norm = nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def mask(self, length: int) -> Tensor:
        query, key = torch.arange(length).unsqueeze(1), torch.arange(length)
        seen = key <= query
        return seen & ((key % 3 != 2) | (key == query)) if self.sparse else seen

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x.shape[1]))
        return x + self.out(y.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Token ids [B, S] to logits [B, S, V]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, DIM)
        self.layers = nn.ModuleList(Layer(sparse=n == ODD) for n in range(LAYERS))
        self.head = nn.Linear(DIM, 61)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


if __name__ == "__main__":
    print(table(kvpass.explain(Decoder(), "slide-window")))
