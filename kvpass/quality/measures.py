"""Continuation likelihood: the context is compressed by prefill, the next tokens are scored teacher-forced.

Scoring text by one forward pass says little about a KV cache, since most tokens are read before anything was
dropped. Here every scored token reads a context that went through the model's cache, as in generation. All models
see the same windows, so differences to the reference are paired: their standard error is far below that of either
likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpass.errors import RequestError
from kvpass.quality.models import CacheBytes, Scored, cache_bytes, check_models, piece_length, stopwatch

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Score:
    """One model on one text. Standard errors are over windows, NaN when there is one window only.

    Attributes:
        name: what the model was called.
        reference: the model that differences, KL and agreement are against.
        nll, nll_se: negative log-likelihood per token (nats).
        perplexity: exp(nll).
        nll_delta, nll_delta_se: nll minus the reference's, window by window (nats per token).
        kl, kl_se: KL(reference || model) per token (nats).
        top1: share of tokens where both models would pick the same next token.
        bytes_per_token: the state after prefill as allocated, side buffers included, per token of context.
        used_bytes_per_token: the same for the entries that hold tokens.
        bytes_per_sequence: the state of one sequence after prefill, as allocated.
        context, continuation, windows: what was run.
        seconds: time in this model, all windows.
    """

    name: str
    reference: str
    nll: float
    nll_se: float
    perplexity: float
    nll_delta: float
    nll_delta_se: float
    kl: float
    kl_se: float
    top1: float
    bytes_per_token: float
    used_bytes_per_token: float
    bytes_per_sequence: float
    context: int
    continuation: int
    windows: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not a finite number becomes None."""
        return plain(self)


@dataclass
class _Sums:
    """What is kept of one model: a row of per-window means [B] per batch, and the bytes of each batch's state."""

    nll: list[Tensor]
    kl: list[Tensor]
    same: list[Tensor]
    states: list[CacheBytes]


def continuation(
    models: Mapping[str, Scored],
    tokens: Tensor,
    *,
    context: int = 192,
    continuation: int = 64,
    windows: int = 64,
    batch: int = 8,
    chunk: int | None = None,
    reference: str | None = None,
) -> dict[str, Score]:
    """Score how models continue a text whose beginning is in their cache.

    Args:
        models: name -> model, all over one vocabulary.
        tokens: [N] token ids of held-out text.
        context: tokens of each window that go through prefill.
        continuation: tokens after it that are scored.
        windows: windows spread evenly over the text without overlap; fewer where the text has no more.
        batch: windows that run at a time.
        chunk: tokens per row of one decode call; by default what keeps its logits under 64 MB.
        reference: the name of the original; the first model where None.

    Returns:
        A score per model, in the order given.

    Raises:
        RequestError: too few tokens, a size below 1, models of different vocabularies, an unknown reference.
    """
    check_models(models)
    first = next(iter(models)) if reference is None else reference
    if first not in models:
        raise RequestError(f"there is no model {first!r} to be the reference", fix=f"choose from {sorted(models)}")
    rows = text_windows(tokens, context, continuation, windows)
    if batch < 1:
        raise RequestError(f"batch must be at least 1, not {batch}")
    order = [first, *(name for name in models if name != first)]
    sums = {name: _Sums([], [], [], []) for name in models}
    seconds: dict[str, float] = dict.fromkeys(models, 0.0)
    for part in rows.split(batch):
        _score_batch({name: models[name] for name in order}, part, context, chunk, sums, seconds)
    base = torch.cat(sums[first].nll)
    return {name: _score(name, first, sums[name], base, context, continuation, seconds[name]) for name in models}


def text_windows(tokens: Tensor, context: int, continuation: int, count: int) -> Tensor:
    """Up to `count` windows [W, context + continuation], spread evenly over a stream [N] without overlap.

    Raises:
        RequestError: the stream is not a row of token ids, or is shorter than one window; a size below 1.
    """
    for name, value in (("context", context), ("continuation", continuation), ("windows", count)):
        if value < 1:
            raise RequestError(f"{name} must be at least 1, not {value}")
    stream = torch.as_tensor(tokens)
    if stream.dim() != 1 or stream.is_floating_point() or stream.dtype == torch.bool:
        raise RequestError(f"the text is integers [N], not {stream.dtype} {tuple(stream.shape)}")
    span = context + continuation
    if stream.numel() < span:
        raise RequestError(
            f"the text has {stream.numel()} tokens; one window of {context} + {continuation} needs {span}",
            fix="give a longer text, or a shorter context or continuation",
        )
    used = min(count, stream.numel() // span)
    slack = stream.numel() - used * span  # spread evenly between the windows
    starts = [index * span + (slack * index // (used - 1) if used > 1 else 0) for index in range(used)]
    return torch.stack([stream[s : s + span] for s in starts]).long().cpu()


def _score_batch(
    models: Mapping[str, Scored],
    rows: Tensor,  # [B, context + continuation]
    context: int,
    chunk: int | None,
    sums: dict[str, _Sums],
    seconds: dict[str, float],
) -> None:
    """All models side by side over one batch; the reference comes first. Logits live for one piece only."""
    targets = rows[:, context:]
    totals = {name: torch.zeros(3, rows.shape[0], dtype=torch.float64) for name in models}  # nll, kl, same
    for start, stop, logits in pieces(models, rows, context, chunk, sums_of(sums), seconds):
        wanted = targets[:, start:stop]
        expected: Tensor | None = None
        for name, found in logits:
            logp = found.float().log_softmax(dim=-1)
            if expected is None:
                expected = logp
            logp = logp.to(expected.device)
            picked = logp.gather(2, wanted.to(logp.device).unsqueeze(2)).squeeze(2)
            same = logp.argmax(dim=-1) == expected.argmax(dim=-1)
            for index, value in enumerate((-picked, kl_divergence(expected, logp), same)):
                totals[name][index] += value.double().sum(dim=1).cpu()
    for name, total in totals.items():
        nll, kl, same = total / targets.shape[1]
        sums[name].nll.append(nll)
        sums[name].kl.append(kl)
        sums[name].same.append(same)


def sums_of(sums: dict[str, _Sums]) -> dict[str, list[CacheBytes]]:
    """Where each model's measured states are collected."""
    return {name: kept.states for name, kept in sums.items()}


def pieces(
    models: Mapping[str, Scored],
    rows: Tensor,
    context: int,
    chunk: int | None,
    states: dict[str, list[CacheBytes]],
    seconds: dict[str, float],
) -> Iterator[tuple[int, int, Iterator[tuple[str, Tensor]]]]:
    """Run a batch [B, context + n] through prefill and decode, models side by side.

    Yields (start, stop, (name, logits [B, stop - start, V]) per model): the predictions of the tokens
    context + start .. context + stop. Logits of one model are made when asked for. Sizes of the states after
    prefill are added to `states`, times to `seconds`.
    """
    held: dict[str, Any] = {}
    opening: dict[str, Tensor] = {}
    for name, model in models.items():
        with stopwatch(seconds, name):
            opening[name], held[name] = model.prefill(rows[:, :context])
        states[name].append(cache_bytes(held[name]))
    check_vocabulary(opening)
    batch, vocab_size = next(iter(opening.values())).shape
    yield 0, 1, ((name, logits.unsqueeze(1)) for name, logits in opening.items())
    opening.clear()
    length = piece_length(batch, vocab_size, chunk)

    def decode(ids: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, model in models.items():
            with stopwatch(seconds, name):
                logits = model.decode(ids, held[name])
            yield name, logits

    end = rows.shape[1] - context
    for start in range(1, end, length):
        stop = min(start + length, end)
        yield start, stop, decode(rows[:, context + start - 1 : context + stop - 1])


def check_vocabulary(logits: Mapping[str, Tensor]) -> None:
    """All models must predict over one vocabulary."""
    sizes = {name: int(found.shape[-1]) for name, found in logits.items()}
    if len(set(sizes.values())) > 1:
        raise RequestError(
            "the models have different vocabularies: " + ", ".join(f"{n} {s}" for n, s in sizes.items()),
            where=next(n for n, s in sizes.items() if s != next(iter(sizes.values()))),
            fix="compare models that share a tokenizer",
        )


def kl_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) over the last axis of two tensors of log-probabilities, in nats; at least 0."""
    weights = expected.exp()
    terms = torch.where(weights > 0, weights * (expected - found), torch.zeros_like(weights))
    return terms.sum(dim=-1).clamp_min(0)


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values [W]; NaN for one value."""
    if values.numel() < 2:
        return math.nan
    return float(values.double().std(correction=1) / math.sqrt(values.numel()))


def per_token(states: Sequence[CacheBytes], tokens: int, rows: int) -> tuple[float, float, float]:
    """Allocated and used bytes per token of context, and allocated bytes per sequence, of `rows` sequences."""
    allocated, used = sum(s.allocated for s in states), sum(s.used for s in states)
    return allocated / (rows * tokens), used / (rows * tokens), allocated / rows


def plain(record: Any) -> dict[str, Any]:
    """A dataclass as JSON values; what is not a finite number becomes None."""

    def value(item: Any) -> Any:
        if isinstance(item, float):
            return item if math.isfinite(item) else None
        return [value(i) for i in item] if isinstance(item, list | tuple) else item

    return {name: value(item) for name, item in asdict(record).items()}


def _score(
    name: str, reference: str, sums: _Sums, base: Tensor, context: int, continuation: int, seconds: float
) -> Score:
    nll, kl = torch.cat(sums.nll), torch.cat(sums.kl)
    windows = int(nll.numel())
    allocated, used, sequence = per_token(sums.states, context, windows)
    mean = float(nll.mean())
    return Score(
        name=name,
        reference=reference,
        nll=mean,
        nll_se=standard_error(nll),
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        nll_delta=float((nll - base).mean()),
        nll_delta_se=standard_error(nll - base),
        kl=float(kl.mean()),
        kl_se=standard_error(kl),
        top1=float(torch.cat(sums.same).mean()),
        bytes_per_token=allocated,
        used_bytes_per_token=used,
        bytes_per_sequence=sequence,
        context=context,
        continuation=continuation,
        windows=windows,
        seconds=seconds,
    )


def table(scores: Mapping[str, Score]) -> Table:
    """Scores side by side, for a terminal."""
    from rich.table import Table

    rows = list(scores.values())
    shape = f"{rows[0].windows} windows, {rows[0].context} + {rows[0].continuation} tokens" if rows else ""
    view = Table(title=f"continuation ({shape}; ± is one standard error)")
    view.add_column("model")
    for heading in ("cache B/token", "of reference", "NLL", "Δ NLL", "perplexity", "KL", "top-1", "seconds"):
        view.add_column(heading, justify="right")
    for score in rows:
        origin = scores.get(score.reference)
        view.add_row(
            score.name,
            f"{score.bytes_per_token:,.1f}",
            f"{score.bytes_per_token / origin.bytes_per_token:.1%}" if origin and origin.bytes_per_token else "",
            f"{score.nll:.4f} ± {score.nll_se:.4f}",
            "" if score.name == score.reference else f"{score.nll_delta:+.4f} ± {score.nll_delta_se:.4f}",
            f"{score.perplexity:.3f}",
            f"{score.kl:.4f}",
            f"{score.top1:.1%}",
            f"{score.seconds:.1f}",
        )
    return view
