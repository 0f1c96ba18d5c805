"""Models of the regression tests: a plain decoder whose modules are called as one likes, and edits of programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kvpass
from kvpass.ir.program import Program
from kvpass.passes import Pass
from kvpass.regression.snapshot import Snapshot, take
from kvpass.runtime.transformed import Transformed

WIDTH, HEADS, VOCABULARY = 16, 2, 31


class Block(nn.Module):
    """Attention and a gated layer whose modules have the names that `names` makes of q, k, v, o, gate, up, down."""

    def __init__(self, names: Callable[[str], str]) -> None:
        super().__init__()
        self.names = names
        kinds = ["q", "k", "v", "o", "gate", "up", "down"]
        made = {kind: nn.Linear(WIDTH, WIDTH, bias=False) for kind in kinds}
        for kind in sorted(kinds, key=names):
            self.add_module(names(kind), made[kind])

    def part(self, kind: str, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, self.names(kind))(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (self.part(o, x).view(batch, length, HEADS, -1).transpose(1, 2) for o in "qkv")
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.part("o", read.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.part("down", self.part("gate", x) * self.part("up", x))


class Decoder(nn.Module):
    """Two blocks between an embedding and a projection."""

    def __init__(self, names: Callable[[str], str] = str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(names) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.words.weight, std=0.6)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@functools.cache
def plain() -> Transformed:
    """The decoder, captured once."""
    return quick(Decoder())


def quick(source: nn.Module | Transformed, *steps: Pass) -> Transformed:
    """A transform without its checks, on the CPU, where goldens are made."""
    options: dict[str, Any] = {"verify": "off", "progress": False, "device": "cpu", "backend": "reference"}
    return kvpass.transform(source, list(steps), **options)


def edited(model: Transformed, edit: Callable[[Program], None]) -> Snapshot:
    """The snapshot of a model whose program was edited behind the back of every pass."""
    program = model.program.copy()
    edit(program)
    return take(Transformed(program, model.report, model.device, model.recipe))
