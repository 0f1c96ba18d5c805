"""Runs passes: plans first, then order by facts, checks after each, and a record of what each did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from kvpass.errors import CheckError, KvpassError, PlanError, RequestError
from kvpass.ir.check import TOLERANCE, compare, plan_of, verify
from kvpass.ir.fixpoint import logits_of
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import Program, placeholder
from kvpass.passes.base import Context, Effect, Pass
from kvpass.passes.split_projections import SplitProjections

Verify = Literal["off", "fast", "full"]
FAST_BYTES = 1 << 30  # a "fast" check runs the whole model only when its weights are smaller than this
QUALITY_WINDOWS = 4
PROVIDERS: tuple[type[Pass], ...] = (SplitProjections,)


@dataclass
class PassRecord:
    """What one pass did: the line of the report."""

    name: str
    description: str
    effect: str
    sites: int
    of: int
    seconds: float
    nodes_before: int
    nodes_after: int
    bytes_per_token_before: int
    bytes_per_token_after: int
    checks: list[str] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Report:
    """What was done to a model, pass by pass, and what is known of the result's quality."""

    model: str
    family: str
    passes: list[PassRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    quality: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def make_plan(program: Program, passes: Sequence[Pass]) -> CachePlan:
    """The plan after all passes; nothing is rewritten and no weight is read.

    Raises:
        PlanError: a pass cannot be applied, with the reason.
    """
    plan = plan_of(program)
    for step in passes:
        plan = step.plan(plan)
    return plan


def run(
    program: Program, passes: Sequence[Pass], context: Context, verify_level: Verify = "fast"
) -> tuple[Program, Report]:
    """Apply passes to a copy of a program.

    Raises:
        PlanError: before anything is read, when a pass cannot be applied.
        CheckError: a pass broke the program, or did not keep its promise.
    """
    if verify_level not in ("off", "fast", "full"):
        raise RequestError(f"verify must be 'off', 'fast' or 'full', not {verify_level!r}")
    make_plan(program, passes)
    for step in passes:
        if step.needs_calibration and not context.batches:
            raise RequestError(
                f"{step.describe()} needs calibration text",
                fix="pass calibration= (a text file, strings or token tensors), or choose refit='none'",
            )
    original, program = program, program.copy()
    report = Report(program.facts.name, program.facts.family)
    todo = list(passes)
    while todo:
        step = todo[0]
        missing = step.requires - program.ensured
        if missing:
            provider = next((p for p in PROVIDERS if p.ensures & missing), None)
            if provider is None:
                raise PlanError(f"{step.describe()} requires {sorted(missing)}, which no pass establishes")
            todo.insert(0, provider())
            continue
        todo.pop(0)
        report.passes.append(_run_one(program, step, context, verify_level))
    if plan_of(program).selective:
        report.quality = {
            "measured": False,
            "reason": "tokens are dropped from a cache, which a forward pass does not have; `kvpass eval` measures",
        }
    elif any(step.effect is Effect.LOSSY for step in passes):
        report.quality = _quality(original, program, context)
    return program, report


def _run_one(program: Program, step: Pass, context: Context, level: Verify) -> PassRecord:
    name = step.describe()
    before = program.copy()
    plan = plan_of(program)
    expected = step.plan(plan)
    began = time.perf_counter()
    try:
        done = step.rewrite(program, context)
    except KvpassError:
        raise
    except Exception as error:
        error.add_note(f"in pass {name}")
        raise
    seconds = time.perf_counter() - began
    program.ensured = (program.ensured - step.breaks) | step.ensures
    record = PassRecord(
        name=type(step).__name__,
        description=name,
        effect=step.effect.value,
        sites=done.sites,
        of=done.of,
        seconds=seconds,
        nodes_before=len(before.forward.nodes),
        nodes_after=len(program.forward.nodes),
        bytes_per_token_before=plan.bytes_per_token(),
        bytes_per_token_after=0,
        details=done.details,
    )
    if done.of != program.facts.layers:
        raise CheckError(f"{name} looked at {done.of} attention sites of {program.facts.layers}")
    if done.sites == 0 and expected != plan:
        raise CheckError(f"{name} was to change {done.of} sites and changed none")
    reached = plan_of(program)
    if step.effect is not Effect.LAYOUT and reached != expected:
        raise CheckError(f"{name} reached another plan than it promised", where=str(reached.table()))
    record.bytes_per_token_after = reached.bytes_per_token()
    if level != "off":
        verify(program, name)
        record.checks.append("structure")
        if step.effect is not Effect.LOSSY:
            record.checks.append(_check_numbers(before, program, step, level, context))
        else:
            record.checks.append(_check_finite(program, name, level, context))
    return record


def _check_numbers(before: Program, after: Program, step: Pass, level: Verify, context: Context) -> str:
    """Logits before and after, where the model is small enough or everything was asked for."""
    size = before.parameter_bytes()
    if level == "fast" and size > FAST_BYTES:
        return f"numbers not compared: {size / 1e9:.1f} GB of weights (verify='full' compares)"
    a, b = _logits(before, context), _logits(after, context)
    error = compare(a, b)
    allowed = TOLERANCE.get(before.facts.dtype, 2e-5)
    if not error <= allowed:
        raise CheckError(
            f"{step.describe()} promised to be {step.effect.value} and changed the logits by {error:.1e} of their "
            f"spread (allowed {allowed:.0e})",
            fix="this is a defect of the pass or of the capture; please report the model",
        )
    return f"logits equal to {error:.1e}"


def _check_finite(program: Program, name: str, level: Verify, context: Context) -> str:
    size = program.parameter_bytes()
    if level == "fast" and size > FAST_BYTES:
        return f"logits not run: {size / 1e9:.1f} GB of weights (verify='full' runs them)"
    logits = _logits(program, context)
    if not bool(torch.isfinite(logits).all()):
        raise CheckError(
            f"after {name}, the logits hold a NaN or an infinity",
            fix="check the checkpoint for NaN weights, or compute in float32",
        )
    return "logits finite"


def _quality(original: Program, program: Program, context: Context) -> dict[str, Any]:
    """What the lossy passes cost on some windows of the calibration text: an indication, since refits have seen it."""
    if not context.batches:
        return {"measured": False, "reason": "no text was given; `kvpass eval` measures on held-out text"}
    rows = torch.cat(list(context.batches))[:QUALITY_WINDOWS]
    sums = dict.fromkeys(("nll_original", "nll", "kl", "top1"), 0.0)
    for row in rows.split(1):
        context.progress(0, 1, "measuring quality")
        before, after = (torch.log_softmax(_logits(p, context, row).float(), dim=-1) for p in (original, program))
        target = row[:, 1:].unsqueeze(-1)
        sums["nll_original"] -= float(before[:, :-1].gather(-1, target).mean())
        sums["nll"] -= float(after[:, :-1].gather(-1, target).mean())
        sums["kl"] += float((before.exp() * (before - after)).sum(-1).mean())
        sums["top1"] += float((before.argmax(-1) == after.argmax(-1)).float().mean())
    means = {name: total / len(rows) for name, total in sums.items()}
    return {"measured": True, "on": f"{rows.numel()} tokens of the calibration text", **means}


def _logits(program: Program, context: Context, ids: Tensor | None = None) -> Tensor:
    """Logits [B, S, V] of some tokens, random ones where none are given."""
    if ids is None:
        generator = torch.Generator().manual_seed(context.seed)
        ids = torch.randint(0, program.facts.vocab_size, (2, 24), generator=generator)
    given = {placeholder(program.forward, "input_ids"): ids.to(context.device)}

    def weight(name: str) -> Tensor:
        return program.read(name).to(context.device)

    with torch.no_grad():
        return logits_of(program.forward, given, weight, context.device)
