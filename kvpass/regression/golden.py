"""Goldens: the snapshots that a repository keeps, and a model compared with one.

`check` is the one function, behind the pytest fixture and behind `kvpass check`. A golden is written when it is asked
for, and then only where something changed: rounding on another machine does not touch the file.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvpass.errors import RequestError
from kvpass.output import holds_program, output_file
from kvpass.regression.diff import Diff, Grade, compare
from kvpass.regression.snapshot import Snapshot, Target, Weights, dump, read, take

if TYPE_CHECKING:
    from torch import nn

    from kvpass.calibration import Calibration
    from kvpass.passes.base import Pass
    from kvpass.recipe import Recipe
    from kvpass.runtime.transformed import Transformed

Status = Literal["passed", "failed", "written", "unchanged"]


@dataclass(frozen=True)
class Kept:
    """What a golden keeps of a model, and what may change.

    Attributes:
        weights: "content" or "shapes": projections of a PCA may come out with other signs on another machine, which
            changes weights and not the model.
        logits: whether the answers to fixed tokens are kept.
        onnx: the target whose exported graph is; none where None.
        tolerance: of logits, relative to their spread; by dtype where None.
        allow: the worst grade that passes.
    """

    weights: Weights = "content"
    logits: bool = True
    onnx: Target | None = None
    tolerance: float | None = None
    allow: Grade = Grade.COSMETIC


@dataclass(frozen=True)
class Outcome:
    """What became of one check.

    Attributes:
        status: "passed" and "failed" of a check, "written" and "unchanged" of an update.
        golden: the file.
        diff: what changed since the golden was written; None where there was none to compare with.
        why: why there is no diff.
        seconds: that it took, the transform included where it was part of it.
    """

    status: Status
    golden: Path
    diff: Diff | None
    why: str
    seconds: float

    def text(self) -> str:
        """For a terminal: what changed, or why nothing can be said."""
        return self.why if self.diff is None else self.diff.text()


def transformed(
    source: str | Path | nn.Module | Transformed,
    recipe: Recipe | str | Path | Pass | Iterable[Pass] | None = None,
    *,
    calibration: Calibration | None = None,
    seed: int = 0,
) -> Transformed:
    """The model that a check is about, on the CPU; what is transformed already stays as it is where there is no recipe.

    Raises:
        KvpassError: what `kvpass.transform` raises.
    """
    import kvpass
    from kvpass.runtime.transformed import Transformed

    if isinstance(source, Transformed) and recipe is None:
        return source
    if isinstance(source, str | Path) and holds_program(source):
        loaded = kvpass.load(source, device="cpu", backend="reference")
        if recipe is None:
            return loaded
        source = loaded
    # what verification would show, the golden shows: a check is about a model that was verified when it was written
    options: dict[str, Any] = {"calibration": calibration, "seed": seed, "device": "cpu", "backend": "reference"}
    return kvpass.transform(source, recipe, verify="off", progress=False, **options)


def check(model: Transformed, golden: Path, kept: Kept | None = None, *, update: bool = False) -> Outcome:
    """Compare a model with its golden, or write the golden.

    Raises:
        RequestError: the golden cannot be read, and is not to be written.
        OutputError: it cannot be written.
    """
    kept = kept or Kept()
    began = time.perf_counter()
    if not update and not golden.is_file():
        why = "there is no golden; `pytest --kvpass-update` or `kvpass check --update` writes it"
        return Outcome("failed", golden, None, why, 0.0)
    old = _old(golden, update)
    new = take(model, weights=kept.weights, logits=kept.logits, onnx=kept.onnx, tolerance=kept.tolerance)
    if old is None:
        _write(new, golden)
        return Outcome("written", golden, None, "there was none", time.perf_counter() - began)
    diff = compare(old, new, tolerance=kept.tolerance)
    if not update:
        status: Status = "passed" if diff.grade <= kept.allow else "failed"
        return Outcome(status, golden, diff, "", time.perf_counter() - began)
    stale = diff.grade > Grade.NONE or _kinds(old) != _kinds(new)
    if stale:
        _write(new, golden)
    return Outcome("written" if stale else "unchanged", golden, diff, "", time.perf_counter() - began)


def _old(golden: Path, update: bool) -> Snapshot | None:
    try:
        return read(golden)
    except RequestError:
        if update:
            return None
        raise


def _kinds(snapshot: Snapshot) -> tuple[object, ...]:
    """What a comparison does not grade: what is kept, to which tolerance, and the hashes of graphs."""
    tolerance = snapshot.logits and snapshot.logits.tolerance
    hashes = [g.meaning for p in (snapshot.program, snapshot.onnx) if p is not None for g in p.graphs.values()]
    return all(w.rms is not None for w in snapshot.program.weights), tolerance, hashes


def _write(snapshot: Snapshot, golden: Path) -> None:
    with output_file(golden) as handle:
        handle.write(dump(snapshot))
