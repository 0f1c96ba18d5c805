"""What a pass is: an effect, a change of the plan, a rewrite of the program, and a record of what it did."""

from __future__ import annotations

import enum
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpass.ir.plan import CachePlan
from kvpass.ir.program import Program


class Effect(enum.Enum):
    """What a pass promises about the numbers."""

    EXACT = "exact"  # the same function, up to rounding
    LAYOUT = "layout"  # the same function, stored or ordered differently
    LOSSY = "lossy"  # another function; its effect on quality is to be measured


@dataclass
class Context:
    """What a pass may use besides the program.

    Attributes:
        batches: calibration tokens, [b, T] int64 each and all of one shape; empty when none were given.
        device: where to compute.
        seed: for anything random.
        progress: called with (done, total, what) as the pass goes on.
    """

    batches: Sequence[Tensor] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    progress: Callable[[int, int, str], None] = lambda done, total, what: None


@dataclass
class Rewritten:
    """What a pass did.

    Attributes:
        sites: attention sites that it rewrote.
        of: sites that the model has.
        details: per layer, what a report shows of it.
    """

    sites: int
    of: int
    details: list[dict[str, Any]] = field(default_factory=list)


class Pass(ABC):
    """One rewrite. Subclasses are frozen dataclasses whose fields are the knobs.

    `plan` is pure and raises `PlanError`; `rewrite` edits the program that it is given. `requires` and `ensures` name
    facts about a program; the manager runs what establishes a missing fact first.
    """

    effect: ClassVar[Effect]
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()

    def plan(self, plan: CachePlan) -> CachePlan:
        """The plan after this pass.

        Raises:
            PlanError: the pass cannot be applied to this plan, with the reason.
        """
        return plan

    @property
    def needs_calibration(self) -> bool:
        """Whether the pass cannot run without calibration text."""
        return False

    @abstractmethod
    def rewrite(self, program: Program, context: Context) -> Rewritten:
        """Edit the program's `forward` entry and weights."""

    @classmethod
    def key(cls) -> str:
        """The name in recipes and on the command line: GroupHeads -> group-heads."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()

    def options(self) -> dict[str, Any]:
        """The knobs as plain values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def describe(self) -> str:
        """One line: the name and the knobs that are not at their default."""
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"
