"""Checks of a finished model on the machine at hand: its structure, its weights, and that its cache changes nothing.

`verify` is what `kvpass verify` prints and what tests of whole models call. `check_finite`, `check_tokens_apart`
and `check_cache` are what `kvpass.transform` runs by itself: the first two before the passes, the last after them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from kvpass.errors import CaptureError, CheckError, SourceError
from kvpass.ir.check import TOLERANCE, compare
from kvpass.ir.check import verify as verify_program
from kvpass.ir.execute import evaluate
from kvpass.ir.fixpoint import limits
from kvpass.ir.program import ATTENTION, Program, Role, output_node, placeholder, roles
from kvpass.runtime.selective import SelectiveState

if TYPE_CHECKING:
    from kvpass.runtime.transformed import Transformed

UPWARD = 100  # times as much may differ where layers read a layer above
LENGTH = 40  # tokens per row of a check
SELECTIVE_LENGTH = 160  # of prompts that are pruned: longer than what is never dropped, as a rule
CHUNK = 7  # of the chunked prefill: no divisor of anything, so that pieces end anywhere
HF_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # two implementations of one model; 5e-2 for half precision


@dataclass(frozen=True)
class Check:
    """One check and its figures.

    Attributes:
        name: what was checked.
        passed: whether `measured` is within `allowed`.
        measured: the largest difference, relative to the spread of the logits, or a count; NaN when there is no number.
        allowed: the largest that passes.
        detail: what was run, or why it failed.
    """

    name: str
    passed: bool
    measured: float
    allowed: float
    detail: str


def verify(model: Transformed, *, seed: int = 0, length: int = LENGTH, checkpoint: str | None = None) -> list[Check]:
    """Check a model again, on this machine.

    Args:
        model: what `kvpass.transform` or `kvpass.load` gave.
        seed: of the token ids.
        length: tokens per row; fewer where the model has fewer positions.
        checkpoint: the Hugging Face folder that the model was read from; its logits by transformers are compared too.

    Returns:
        One `Check` per property, in order of cost; those that need the weights are left out when a weight is not
        finite or the structure is broken.
    """
    checks = [_structure(model), _finite(model.program)]
    if all(check.passed for check in checks):
        checks += cache_checks(model, seed=seed, length=length)
        if checkpoint is not None:
            checks.append(_against_transformers(model, checkpoint, _tokens(model.program, 2, length, seed)))
    return checks


def cache_checks(model: Transformed, *, seed: int = 0, length: int = LENGTH) -> list[Check]:
    """Whether the cache changes nothing: decode, ragged batches and chunks, each against the same without it.

    Where layers read a layer above, passes enlarge what rounding does and stop at a tolerance; where keys and values
    are quantized, rounding may turn one code into its neighbour. So much more is allowed there.
    """
    ids = _tokens(model.program, 2, length, seed)
    allowed = TOLERANCE.get(model.program.facts.dtype, 2e-5)
    stop = limits(model.program.forward)
    if stop is not None:
        allowed = max(UPWARD * allowed, 10 * stop.tolerance)
    allowed = max(allowed, *(c.format.step for c in model.plan))
    if model.plan.selective:
        known = model.program.facts.max_positions is not None  # else learned positions may end anywhere
        longer = max(length, SELECTIVE_LENGTH) if known else length
        return [
            _check("a ragged batch equals its rows alone", allowed, lambda: _ragged(model, seed, longer)),
            _check("what stays is as planned, in order and nested", 0.0, lambda: _survivors(model, seed, longer)),
        ]
    return [
        _check("prefill and decode equal forward", allowed, lambda: _decode(model, ids)),
        _check("a ragged batch equals its rows alone", allowed, lambda: _ragged(model, seed, length)),
        _check("prefill in chunks equals prefill at once", allowed, lambda: _chunks(model, ids)),
    ]


def check_cache(model: Transformed, *, seed: int = 0) -> str:
    """Run `cache_checks`; one line that says what held.

    Raises:
        CheckError: a check failed.
    """
    checks = cache_checks(model, seed=seed)
    for check in checks:
        if not check.passed:
            raise CheckError(
                f"with a cache the model computes something else: not true that {check.name} "
                f"(off by {check.measured:.1e} of the logits' spread, allowed {check.allowed:.0e})",
                where=check.detail,
                fix="this is a defect of the capture or of a pass; please report the model",
            )
    if model.plan.selective:
        return f"ragged batches equal to {checks[0].measured:.1e}; what stays is as planned ({checks[1].detail})"
    return f"cached decode, ragged batches and chunks equal to {max(c.measured for c in checks):.1e}"


def check_finite(program: Program) -> None:
    """Look for a NaN or an infinity in the weights.

    Raises:
        CheckError: naming the tensors.
    """
    check = _finite(program)
    if not check.passed:
        raise CheckError(
            f"numbers of the model's weights are NaN or infinite: {check.measured:.0f}",
            where=check.detail,
            fix="the checkpoint is damaged, or was trained into overflow; get it again",
        )


def check_tokens_apart(program: Program, device: torch.device) -> None:
    """Show by execution that tokens meet nowhere but in attention, whose keys and values are all that a cache holds.

    Every attention is given a fixed result, and one token is changed: nothing at another place may change.

    Raises:
        CaptureError: naming the first node that mixes tokens.
    """
    graph = program.forward
    length, where = 11, 4
    small, large = program.shapes("forward", 2, length), program.shapes("forward", 3, length + 2)
    role = roles(graph)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, program.facts.vocab_size, (1, length), generator=generator).repeat(2, 1)
    ids[1, where] = (ids[1, where] + 1) % program.facts.vocab_size
    given: dict[fx.Node, Any] = {placeholder(graph, "input_ids"): ids.to(device)}
    token_axis: dict[fx.Node, int] = {}
    final = [output_node(graph)]  # where it counts; what is between may hold memory that is not written yet
    for node in graph.nodes:
        if node.op != "call_function" or role[node] != Role.DATA or not isinstance(small.get(node), Tensor):
            continue
        if node.target is ATTENTION:
            value = torch.randn(small[node].shape[1:], generator=generator).to(small[node].dtype)
            given[node] = value.expand(small[node].shape).to(device)
            final += [n for n in node.all_input_nodes if role[n] == Role.DATA]
            continue
        sizes = list(zip(small[node].shape, large[node].shape, strict=True))
        axes = [axis for axis, size in enumerate(sizes) if size == (length, length + 2)]
        if sizes and sizes[0] == (2, 3) and len(axes) == 1 and small[node].numel():
            token_axis[node] = axes[0]
    others = torch.tensor([i for i in range(length) if i != where], device=device)
    allowed = 10 * TOLERANCE.get(program.facts.dtype, 2e-5)

    def weight(name: str) -> Tensor:
        return program.read(name).to(device)

    def mixing(nodes: list[fx.Node]) -> list[fx.Node]:
        with torch.no_grad():
            values = evaluate(nodes, given, weight, device)
        found = []
        for node, value in zip(nodes, values, strict=True):
            kept = value.double().nan_to_num().index_select(token_axis[node], others)
            if compare(kept[0], kept[1]) > allowed:
                found.append(node)
        return found

    if mixing([n for n in dict.fromkeys(final) if n in token_axis]):
        first = next(iter(mixing(list(token_axis))))
        raise CaptureError(
            "the model mixes tokens outside attention (a convolution or a recurrence over tokens, for one), "
            "which a cache of keys and values cannot express",
            where=f"{first.name} {first.meta.get('source', '')}".strip(),
            fix="kvpass rewrites decoders in which tokens meet in attention only",
        )


# ---------------------------------------------------------------------- the checks


def _structure(model: Transformed) -> Check:
    try:
        verify_program(model.program, "loading")
    except CheckError as error:
        return Check("structure", False, math.nan, 0.0, error.what)
    return Check("structure", True, 0.0, 0.0, f"{len(model.plan)} attention layers")


def _finite(program: Program) -> Check:
    bad: dict[str, int] = {}
    total = 0
    for name in sorted(program.used_weights()):
        weight = program.weights[name]
        if weight.constant:
            continue
        total += 1
        value = program.read(name)
        count = int((~torch.isfinite(value)).sum()) if value.is_floating_point() else 0
        if count:
            bad[name] = count
    numbers = sum(bad.values())
    detail = f"{total} tensors" if not bad else ", ".join(list(bad)[:3])
    return Check("finite weights", not bad, float(numbers), 0.0, detail)


def _check(name: str, allowed: float, measure: Callable[[], tuple[float, str]]) -> Check:
    measured, detail = measure()
    return Check(name, measured <= allowed, measured, allowed, detail)


def _decode(model: Transformed, ids: Tensor) -> tuple[float, str]:
    """The prompt by prefill, then pieces of 1, 2, 3, … tokens, against the logits of one pass without a cache."""
    length = int(ids.shape[1])
    start = (length + 1) // 2
    with torch.no_grad():
        expected = model(ids)
    logits, state = model.prefill(ids[:, :start])
    found = [logits.unsqueeze(1)]
    place, step = start, 1
    while place < length:
        found.append(model.decode(ids[:, place : place + step], state))
        place, step = place + step, step + 1
    return compare(expected[:, start - 1 :], torch.cat(found, dim=1)), f"{start} + {length - start} tokens, 2 rows"


def _ragged(model: Transformed, seed: int, length: int) -> tuple[float, str]:
    ids = _tokens(model.program, 4, length, seed + 1)
    longest = max(1, int(ids.shape[1]) - 2)  # two tokens are decoded after the prompts
    counts = [longest, max(1, longest // 2), 1, max(1, longest - 3)]
    further = ids[:, longest : longest + 2]
    prompts = ids[:, :longest]

    def run(rows: Tensor, lengths: list[int], more: Tensor) -> Tensor:
        logits, state = model.prefill(rows, torch.tensor(lengths))
        parts = [logits.unsqueeze(1)]
        parts += [model.decode(more[:, i : i + 1], state) for i in range(int(more.shape[1]))]
        return torch.cat(parts, dim=1)

    together = run(prompts, counts, further)
    alone = [run(prompts[i : i + 1, :n], [n], further[i : i + 1]) for i, n in enumerate(counts)]
    return compare(torch.cat(alone), together), f"rows of {', '.join(map(str, counts))} tokens"


def _survivors(model: Transformed, seed: int, length: int) -> tuple[float, str]:
    """How many tokens of a prompt are kept that should not be, or the other way round."""
    ids = _tokens(model.program, 2, length, seed + 2)
    prompt = int(ids.shape[1])
    _, state = model.prefill(ids)
    assert isinstance(state, SelectiveState)
    wrong, below = 0, {row: set(range(prompt)) for row in range(2)}
    for owner, count in model.plan.kept(prompt).items():
        cuts = [c.passes for c in model.plan.layers[:owner] if c.passes is not None]
        for row, heads in enumerate(state.positions(owner)):
            for line in heads.tolist():
                safe = {
                    *range(state.rules[owner].sinks),
                    *range(prompt - int(state.rules[owner].window(prompt)), prompt),
                }
                wrong += abs(len(line) - count) + (line != sorted(set(line))) + len(set(line) - below[row])
                wrong += len(safe - set(line)) if not cuts and count < prompt else 0
            if not state.rules[owner].prunes:
                below[row] = set(heads[0].tolist())
    return float(wrong), f"2 prompts of {prompt} tokens"


def _chunks(model: Transformed, ids: Tensor) -> tuple[float, str]:
    prompt, more = (ids[:, :-1], ids[:, -1:]) if ids.shape[1] > 1 else (ids, ids[:, :0])

    def run(chunk: int) -> Tensor:
        logits, state = model.prefill(prompt, chunk=chunk)
        parts = [logits.unsqueeze(1)]
        if more.shape[1]:
            parts.append(model.decode(more, state))
        return torch.cat(parts, dim=1)

    length = int(prompt.shape[1])
    return compare(run(length), run(CHUNK)), f"{length} tokens, {CHUNK} at a time"


def _against_transformers(model: Transformed, folder: str, ids: Tensor) -> Check:
    name = "logits equal those of transformers"
    allowed = HF_TOLERANCE.get(model.program.facts.dtype, 5e-2)
    from transformers import AutoModelForCausalLM

    try:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=model.program.facts.dtype).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(
            f"transformers cannot load the checkpoint: {str(error).splitlines()[0]}", where=folder
        ) from error
    with torch.no_grad():
        expected = plain.to(model.device)(input_ids=ids.to(model.device), use_cache=False).logits
        found = model(ids)
    return _check(name, allowed, lambda: (compare(expected, found), f"{ids.shape[0]} x {ids.shape[1]} tokens"))


def _tokens(program: Program, rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    length = min(length, program.facts.max_positions or length)
    return torch.randint(0, program.facts.vocab_size, (rows, length), generator=generator)
