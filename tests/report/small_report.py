"""A small decoder whose layers can be grouped, shared, windowed and chosen from, and how much of it is measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvpass.report import Sizes

WIDTH, HEADS, VOCABULARY, LAYERS = 32, 4, 61, 3
SIZES = Sizes(context=40, continuation=12, windows=3, prompt=48)
HOSTILE = "</title></script><script>throw 'run'</script><img src=//evil.test/x onerror=alert(1)>\"'&{{7*7}}"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.up = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, HEADS, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.o(read.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + torch.tanh(self.up(x))


class Decoder(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(layers)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
