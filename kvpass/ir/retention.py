"""Which tokens of a prompt stay, as a value: who ranks them, which are never dropped, and how many are kept.

One rule serves two ends. As what a layer's cache *keeps*, it drops entries once the prompt was read (SnapKV, Li et al.
2024, arXiv 2404.14469; PyramidKV, Cai et al. 2024, arXiv 2406.02069) and, where it says so, while text is generated
(H2O, Zhang et al. 2023, arXiv 2306.14048; Scissorhands, Liu et al. 2023, arXiv 2305.17118; TOVA, Oren et al. 2024,
arXiv 2401.06104). As what a layer *passes on*, it drops tokens from the residual stream, so that the layers above
compute and cache survivors only (PyramidInfer, Yang et al. 2024, arXiv 2405.12532; FastKV, Jo et al. 2025, arXiv
2502.01068).

How many tokens stay depends on the prompt's length alone, never on the data, and is integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

from kvpass.errors import PlanError

By = Literal["mass", "persistence", "random", "recent"]
Then = Literal["append", "replace", "thin"]
RESOLUTION = 10**9  # of shares: what is finer is rounded, so that products stay within 64 bits


def fraction(value: float | Fraction) -> Fraction:
    """The nearest fraction with a denominator that integer arithmetic on lengths can bear."""
    return Fraction(value).limit_denominator(RESOLUTION)


@dataclass(frozen=True)
class Retention:
    """A rule of what stays.

    Attributes:
        by: what ranks a token: the attention "mass" that the observed queries give it; how often they gave it at least
            an even share ("persistence"); "random"; or "recent": the latest stay.
        rows: queries that are observed, the prompt's latest; 0 all; -1 as many as there are protected `recent` ones.
        slope: weight of the latest observed query, the earliest one's being 1 (linear between).
        pool: tokens over which ranks are averaged, centred; odd.
        apart: whether each KV head chooses for itself, or all heads of a layer together.
        sinks: first tokens of the prompt that always stay.
        recent, recent_share: latest tokens that always stay: with a share, that share of the prompt and one more, but
            at most `recent` where that is not 0; without one, `recent`.
        budget: tokens that stay; 0 for a share of them.
        share: what part stays, where `budget` is 0.
        of: of what: of the whole "prompt", or of the "context": what reached the layer, but for the recent tokens.
        floor: tokens of context that are not shortened further.
        stays: what happens to a context that would fall below the floor: it stays as it is (as in PyramidInfer's
            published code), or it is cut to the floor.
        then: what happens to text that follows the prompt: it is all kept ("append"); each token takes the place of
            the lowest-ranked one ("replace"); or blocks of it are thinned as they grow old ("thin").
        block, thinned: of each `block` generated tokens, so many stay (thin).
        lead: tokens of the prompt that the first block takes in (1 in PyramidInfer's published code; thin).
    """

    by: By = "mass"
    rows: int = -1
    slope: float = 1.0
    pool: int = 1
    apart: bool = False
    sinks: int = 0
    recent: int = 0
    recent_share: Fraction = Fraction(0)
    budget: int = 0
    share: Fraction = Fraction(1)
    of: Literal["prompt", "context"] = "prompt"
    floor: int = 0
    stays: bool = False
    then: Then = "append"
    block: int = 16
    thinned: int = 16
    lead: int = 0

    # ------------------------------------------------------------------ how many

    def window(self, length: Any) -> Any:
        """Latest tokens that always stay, of a text of so many: a number, or a tensor [B] of them."""
        if not self.recent_share:
            return _at_most(length, self.recent)
        wanted = length * self.recent_share.numerator // self.recent_share.denominator + 1
        return _at_most(_at_most(wanted, self.recent) if self.recent else wanted, length)

    @property
    def attends(self) -> bool:
        """Whether ranks are made of attention."""
        return self.by not in ("random", "recent")

    def observed(self, length: int) -> int:
        """Queries that are asked, of a prompt of so many tokens."""
        if not self.attends:
            return 0
        if self.rows < 0:
            return max(1, int(self.window(length)))
        return min(self.rows, length) if self.rows else length

    def count(self, reached: Any, prompt: Any) -> Any:
        """How many of `reached` tokens stay, of a prompt of `prompt` tokens: numbers, or integer tensors of them."""
        if self.budget:
            return _at_most(reached, self.budget)
        above, below = self.share.numerator, self.share.denominator
        if self.of == "prompt":
            share, least = prompt * above // below, self.least(prompt)
            return _at_most(reached, _either(share < least, least, share))
        if above >= below:
            return reached
        recent = self.window(prompt)
        context = reached - recent
        kept = context * above // below
        kept = _either(kept <= self.floor, context if self.stays else self.floor, kept)
        return _either(context <= self.floor, reached, recent + kept)

    def least(self, prompt: Any) -> Any:
        """Tokens that are never dropped, of a prompt of so many."""
        return _at_most(self.window(prompt) + self.sinks, prompt)

    def capacity(self, prompt: int) -> int:
        """Tokens that a store whose tokens replace each other holds, behind a prompt of so many."""
        return self.budget or max(self.count(prompt, prompt), self.sinks + int(self.window(prompt)) + 1)

    @property
    def prunes(self) -> bool:
        """Whether it drops tokens of a prompt."""
        return bool(self.budget) or self.share < 1

    @property
    def bounded(self) -> bool:
        """Whether what it keeps stops growing."""
        return self.then == "replace"

    def check(self, where: str) -> Retention:
        """The rule itself, where it can be followed.

        Raises:
            PlanError: numbers out of range, or a budget that what always stays fills already.
        """
        if not 0 < self.share <= 1:
            raise PlanError(f"{float(self.share)} is no share: it must lie above 0 and not above 1", where=where)
        if not 0 <= self.recent_share < 1:
            raise PlanError(f"a share of {float(self.recent_share)} for the recent tokens is not possible", where=where)
        for name in ("sinks", "recent", "budget", "floor"):
            if getattr(self, name) < 0:
                raise PlanError(f"{name} must not be negative, and is {getattr(self, name)}", where=where)
        if self.pool < 1 or self.pool % 2 == 0:
            raise PlanError(f"pool must be odd and at least 1, not {self.pool}", where=where)
        if self.slope <= 0:
            raise PlanError(f"slope must be positive, not {self.slope}", where=where)
        if self.budget and self.budget <= self.sinks + self.recent:
            raise PlanError(
                f"a budget of {self.budget} tokens leaves nothing to choose: {self.sinks} sinks and the latest "
                f"{self.recent} tokens stay in any case",
                where=where,
                fix=f"give a budget of at least {self.sinks + self.recent + 1}, or protect fewer",
            )
        if not 1 <= self.thinned <= self.block:
            raise PlanError(f"{self.thinned} of {self.block} tokens cannot be kept", where=where)
        return self

    # ------------------------------------------------------------------ as text

    def __str__(self) -> str:
        words = []
        for part in fields(self):
            value = getattr(self, part.name)
            if value != part.default:
                words.append(f"{part.name}={int(value) if isinstance(value, bool) else value}")
        return ",".join(words) or "all"

    @staticmethod
    def parse(text: str) -> Retention:
        """The rule that `str` wrote."""
        return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Retention:
    kinds = get_type_hints(Retention)
    readers: dict[Any, Callable[[str], Any]] = {bool: lambda t: t == "1", int: int, float: float, Fraction: Fraction}
    options: dict[str, Any] = {}
    for word in [] if text == "all" else text.split(","):
        name, _, value = word.partition("=")
        if name not in kinds:
            raise PlanError(f"{text!r} is no rule of what stays: {word!r}")
        options[name] = readers.get(kinds[name], str)(value)
    return Retention(**options)


def _at_most(value: Any, most: Any) -> Any:
    """The smaller one, for numbers and tensors."""
    return _either(value > most, most, value)


def _either(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, else b, for numbers and tensors."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b
