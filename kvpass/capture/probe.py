"""Masks by execution: what a mask subgraph computes, fitted to a closed algebra.

A mask (or the part of eager attention between the score product and the softmax) is run at several lengths and at
chosen positions, and the result is fitted to {causal, strict, window w, sinks, ALiBi slopes}. Where nothing fits but
the mask still only looks back and depends on nothing but positions, it is `tabulated`: kept as it is, usable by the
cache, unknown to passes that need its meaning. Everything else is refused: looking ahead, depending on tokens, learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from kvpass.errors import CaptureError
from kvpass.ir.execute import ancestors
from kvpass.ir.program import Program, Role, aten, placeholder
from kvpass.ir.sites import SiteFinder

_BATCH = 2
_LENGTHS = (1, 2, 3, 7, 24)
_WORTH = 0.02
_TRIED = 256  # positions at which candidates are compared
_LONGEST = 2304  # dense evaluation stops here: a [2304, 2304] mask
MASKED = -5e3  # an added bias below this hides the key (families use -inf, the dtype's minimum, or -1e4)


@dataclass(frozen=True)
class NearMask:
    """The mask of the algebra that explains most of one that nothing explains.

    Attributes:
        mask: that mask.
        agree: (query, key) entries, none later than its query, that it hides and shows as the model does.
        entries: of so many, all heads counted.
        head: the first entry where they differ (-1 where they do not),
        query: by its position in the text,
        key: and by that of the token that it reads or does not.
        hidden: whether the model hides that entry (and the mask shows it).
    """

    mask: Mask
    agree: int
    entries: int
    head: int = -1
    query: int = -1
    key: int = -1
    hidden: bool = False

    def __str__(self) -> str:
        if self.head < 0:
            return f"{self.mask} explains all {self.entries} entries there, and not those at other positions"
        ways = ("hides", "shows") if self.hidden else ("shows", "hides")
        return (
            f"{self.mask} explains {self.agree} of {self.entries} entries; first apart at head {self.head}, query "
            f"{self.query}, key {self.key}, which the model {ways[0]} and {self.mask} {ways[1]}"
        )


@dataclass(frozen=True)
class Mask:
    """A fitted mask. `tabulated` is the reason why nothing in the algebra fits; the other fields are void then."""

    strict: bool = False
    window: int = 0
    sinks: int = 0
    slopes: tuple[float, ...] = ()
    tabulated: str = ""
    tested: int = 0  # positions up to here were tried
    near: NearMask | str = field(default="", compare=False)  # for a tabulated one, what comes nearest

    def __str__(self) -> str:
        if self.tabulated:
            return f"tabulated ({self.tabulated})"
        words = ["strict" if self.strict else "causal"]
        if self.window:
            words.append(f"window {self.window}")
        if self.sinks:
            words.append(f"sinks {self.sinks}")
        if self.slopes:
            words.append("ALiBi")
        return " + ".join(words)


BiasAt = Callable[[int, "dict[fx.Node, Tensor]"], Tensor]
"""The bias [B|1, H|1, S, S] added to the scores at a length, with some nodes' values replaced; hidden keys below
MASKED."""


def as_bias(value: Tensor) -> Tensor:
    """A mask tensor as an additive bias in float64, 4 axes."""
    value = (
        value.double().masked_fill(value, 0.0).masked_fill(~value, -torch.inf) if value.dtype == torch.bool else value
    )
    value = value.double()
    while value.dim() < 4:
        value = value.unsqueeze(0)
    return value


def fit(finder: SiteFinder, sources: Iterable[fx.Node], bias_at: BiasAt, layer: int, max_positions: int | None) -> Mask:
    """Fit the mask that `bias_at` shows.

    Args:
        sources: the nodes that carry the mask into the scores; their subgraphs are searched for numbers worth trying.

    Raises:
        CaptureError: the mask looks ahead, differs between batch rows, depends on tokens or is learned.
    """
    dense = {s: bias_at(s, {}) for s in _LENGTHS}
    where = f"layer {layer}"
    for bias in dense.values():
        if not torch.equal(bias, bias[:1].expand_as(bias)):
            raise CaptureError("the attention mask differs between the rows of a batch", where=where)
    longest = dense[_LENGTHS[-1]][0]  # [H|1, S, S]
    hidden = longest < MASKED
    size = longest.shape[-1]
    row, column = torch.arange(size).view(-1, 1), torch.arange(size)
    ahead = ~hidden & (column > row)
    if bool(ahead.any()):
        query, key = ahead.nonzero()[0, 1:].tolist()
        raise _looks_ahead(layer, query, key, _nearest(~hidden, torch.arange(size)))
    if bool((hidden.all(dim=-1, keepdim=True) & (longest > -torch.inf)).any()):
        raise CaptureError(
            f"in layer {layer} a token may read nothing, and its scores are hidden by a finite number: its softmax "
            "averages over all tokens, later ones too",
            where=where,
            fix="hide scores with minus infinity, or let every token read itself",
        )
    slopes, _ = _alibi(longest, hidden)
    if slopes is None:
        return _tabulate(dense, "the bias added to the scores is not ALiBi", where, _nearest_slope(longest, hidden))
    if bool((hidden != hidden[:1]).any()):
        near = _nearest(~hidden, torch.arange(size))
        return _tabulate(dense, "heads have different masks", where, near)
    fitted = _window(~hidden[0], torch.arange(size))
    if fitted is None:
        near = _nearest(~hidden, torch.arange(size))
        return _tabulate(dense, "its pattern is not causal, window or sinks", where, near)
    strict, window, sinks = fitted
    tested = size
    numbers, further = _further(finder, sources, bias_at, longest, max_positions)
    for positions, bias in further:
        later = (bias[0] >= MASKED) & (positions > positions.view(-1, 1))
        if bool(later.any()):
            query, key = positions[later.nonzero()[0, 1:]].tolist()
            raise _looks_ahead(layer, query, key, _nearest(bias[0] >= MASKED, positions, numbers))
        shown = bias[0, 0]
        if slopes:
            shown = shown - slopes[0] * (positions.view(1, -1) - positions.view(-1, 1))
            shown = shown - shown.diagonal().view(-1, 1)
        seen = shown >= MASKED
        candidates = [(window, sinks)]
        if not window:
            candidates += [
                (n + d, s) for n in numbers for d in (0, 1, -1) for s in [0, *(m for m in numbers if m <= 64)]
            ]
        if int(positions[-1]) == len(positions) - 1:  # a mask read from a table: no number in the graph says its window
            read = _window(seen, positions)
            candidates += [read[1:]] if read is not None and not window else []
        found = next((c for c in candidates if torch.equal(_predicate(positions, strict, *c), seen)), None)
        if found is None:
            near = _nearest(seen.unsqueeze(0), positions, numbers)
            return _tabulate(dense, "its pattern changes with the length", where, near)
        window, sinks = found
        tested = max(tested, int(positions[-1]) + 1)
    if max_positions is not None and window >= max_positions:
        window = sinks = 0
    for length, bias in dense.items():
        cut = longest[:, :length, :length]
        if not torch.equal(bias[0] < MASKED, cut < MASKED):
            raise CaptureError(
                f"the mask of layer {layer} at length {length} is no part of the one at {size}", where=where
            )
    return Mask(strict, window, sinks, slopes, tested=tested)


def _looks_ahead(layer: int, query: int, key: int, near: NearMask) -> CaptureError:
    return CaptureError(
        f"the attention of layer {layer} looks ahead: token {query} reads token {key}",
        where=f"layer {layer}",
        fix="kvpass rewrites causal decoders; a bidirectional or prefix mask cannot be cached token by token",
        near=str(near),
    )


def _tabulate(dense: dict[int, Tensor], reason: str, where: str, near: NearMask | str) -> Mask:
    """Accept a mask that no formula fits, if it is the same for every length."""
    largest = dense[_LENGTHS[-1]]
    for length, bias in dense.items():
        part = largest[..., :length, :length]
        same = (part == bias) | ((part < MASKED) & (bias < MASKED))
        if not bool(same.all()):
            raise CaptureError(
                f"the attention mask is not understood ({reason}) and depends on the length of the sequence",
                where=where,
                near=str(near),
            )
    return Mask(tabulated=reason, tested=_LENGTHS[-1], near=near)


def _nearest(seen: Tensor, positions: Tensor, numbers: Iterable[int] = ()) -> NearMask:
    """The causal mask, with a window and sinks or not, that agrees with `seen` [H|1, n, n] at most entries.

    A window, and sinks, must each explain `_WORTH` of the entries more than the mask without, for numbers that are
    free to choose always explain a few.

    Args:
        positions: of the n tokens.
        numbers: windows worth trying besides those up to 24.
    """
    if bool((seen == seen[:1]).all()):
        seen = seen[:1]
    some = torch.linspace(0, len(positions) - 1, min(len(positions), _TRIED)).long()
    fewer, few = seen[:, some][:, :, some], positions[some]
    within, past = (p.view(1, -1) <= p.view(-1, 1) for p in (positions, few))
    windows = [*range(1, _LENGTHS[-1] + 1), *sorted(numbers)]
    shapes = [(0, 0), *((w, s) for w in windows for s in (0, 1, 2, 4, 8) if s < int(positions[-1]))]
    best: tuple[float, Mask] | None = None
    for strict in (False, True):
        for window, sinks in shapes:
            missed = int(((_predicate(few, strict, window, sinks) != fewer) & past).sum())
            cost = missed + _WORTH * int(past.sum()) * seen.shape[0] * ((window > 0) + (sinks > 0))
            if best is None or cost < best[0]:
                best = cost, Mask(strict, window, sinks)
    assert best is not None
    mask = best[1]
    apart = (_predicate(positions, mask.strict, mask.window, mask.sinks) != seen) & within
    entries = int(within.sum()) * seen.shape[0]
    ahead = seen & ~within
    # one that looks ahead may be causal in all else
    first = [*apart.nonzero()[:1].tolist(), *ahead.nonzero()[:1].tolist()]
    if not first:
        return NearMask(mask, entries, entries)
    head, query, key = first[0]
    hidden = not bool(seen[head, query, key])
    return NearMask(mask, entries - int(apart.sum()), entries, head, int(positions[query]), int(positions[key]), hidden)


def _nearest_slope(bias: Tensor, hidden: Tensor) -> str:
    """How much of a bias [H, S, S] grows by one slope per key."""
    both = ~hidden[:, :, 1:] & ~hidden[:, :, :-1]
    steps = bias[:, :, 1:] - bias[:, :, :-1]
    if not bool(both.any()):
        return ""
    shares = []
    for head in range(bias.shape[0]):
        observed = steps[head][both[head]]
        slope = float(observed.median()) if observed.numel() else 0.0
        fits = (observed - slope).abs() <= 1e-3 * max(abs(slope), 1e-3)
        shares.append((int(fits.sum()), observed.numel(), slope))
    fitting, of, slope = min(shares, key=lambda s: s[0] / max(1, s[1]))
    head = shares.index((fitting, of, slope))
    return f"ALiBi with slope {slope:.4g} explains {fitting} of {of} steps from key to key in head {head}"


def _alibi(bias: Tensor, hidden: Tensor) -> tuple[tuple[float, ...] | None, Tensor]:
    """ALiBi slopes per head, () for no bias, None when the visible bias is something else; and the bias without it."""
    heads = bias.shape[0]
    visible = torch.where(hidden, torch.zeros_like(bias), bias)
    if not bool(visible.abs().max() > 0):
        return (), visible
    both = ~hidden[:, :, 1:] & ~hidden[:, :, :-1]
    steps = bias[:, :, 1:] - bias[:, :, :-1]
    slopes = []
    for head in range(heads):
        observed = steps[head][both[head]]
        if observed.numel() == 0:
            return None, visible
        slope = float(observed.median())
        if not bool((observed - slope).abs().max() <= 1e-3 * max(abs(slope), 1e-3)):
            return None, visible
        slopes.append(slope)
    return tuple(slopes), visible


def _predicate(positions: Tensor, strict: bool, window: int, sinks: int) -> Tensor:
    """What the algebra lets each query read, [n, n], at those positions."""
    query, key = positions.view(-1, 1), positions.view(1, -1)
    seen = key < query if strict else key <= query
    if window:
        seen = seen & ((key > query - window) | (key < sinks))
    return seen


def _window(seen: Tensor, positions: Tensor) -> tuple[bool, int, int] | None:
    """(strict, window, sinks) that reproduce `seen` [n, n] at positions 0 .. n-1 exactly, or None."""
    strict = not bool(seen.diagonal().any())
    candidates = [(0, 0)]
    hidden = [int(i) for i in (~seen[-1]).nonzero().flatten() if int(i) < len(positions) - (1 if strict else 0)]
    if hidden:
        window = len(positions) - 1 - max(hidden)
        candidates += [(window, 0), (window, min(hidden))]
    return next(((strict, *c) for c in candidates if torch.equal(_predicate(positions, strict, *c), seen)), None)


def _further(
    finder: SiteFinder, sources: Iterable[fx.Node], bias_at: BiasAt, longest: Tensor, max_positions: int | None
) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
    """The numbers in the mask's subgraph, and evidence at larger positions: (positions [n], bias [., ., n, n]) pairs.

    Numbers found in the mask's subgraph (a window is one of them) say where to look. Where the subgraph is made of
    `arange`, its positions are replaced by chosen ones, so position 130000 costs nothing; otherwise the mask is run at
    full length, up to 2304.
    """
    nodes = ancestors(sources, [placeholder(finder.graph, "input_ids")])
    numbers: set[int] = set()
    aranges: list[fx.Node] = []
    ones: list[fx.Node] = []  # masks of no padding, indexed by position
    tables = 0
    for node in nodes:
        for argument in [*node.args, *node.kwargs.values()]:
            if isinstance(argument, int) and not isinstance(argument, bool) and 1 < abs(argument) < 2**40:
                numbers.add(abs(argument))
        if node.op == "get_attr":
            weight = finder.program.weights[str(node.target)]
            if len(weight.shape) >= 2 and weight.shape[-1] == weight.shape[-2]:
                tables = max(tables, weight.shape[-1])
            elif weight.constant and len(weight.shape) == 0:
                numbers.add(abs(int(weight.read())))
        if node.target in (aten.ones_like.default, aten.new_ones.default) and finder.shapes[node].dim() == 2:
            ones.append(node)
        if "arange" in str(node.target) and finder.roles[node] == Role.POSITION:
            value = finder.shapes[node]
            if isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] == 3:
                aranges.append(node)
    limit = max_positions or 1 << 17
    wanted = set(range(20))
    for number in sorted(numbers):
        if number <= limit + 2:
            wanted |= {p for p in range(number - 3, number + 4) if 0 <= p <= limit + 2}
    wanted |= {limit - 1, limit // 2, 2 * max(wanted) + 5}
    positions = torch.tensor(sorted(p for p in wanted if p >= 0))
    if aranges:
        check = torch.tensor([*range(6), 9, 10, 12, 20, 23])

        def at(chosen: Tensor) -> Tensor:
            full = {n: torch.ones((_BATCH, int(chosen[-1]) + 1), dtype=finder.shapes[n].dtype) for n in ones}
            return bias_at(len(chosen), dict.fromkeys(aranges, chosen) | full)

        dense = longest[:, check][:, :, check]
        try:
            shown = at(check)
        except (IndexError, RuntimeError):  # positions are more than an index here; run it at full length instead
            shown = None
        if shown is not None and torch.equal(shown[0] < MASKED, dense < MASKED):
            return sorted(numbers), [(positions, at(positions))]
    top = tables if tables else max((n for n in numbers if n <= _LONGEST), default=0) + 4
    top = min(top, _LONGEST, limit)
    if top > longest.shape[-1]:
        return sorted(numbers), [(torch.arange(top), bias_at(top, {}))]
    return sorted(numbers), []


def fit_mask_argument(finder: SiteFinder, mask: fx.Node, layer: int, max_positions: int | None) -> Mask:
    """Fit a mask that arrives as a tensor (bool or additive), whatever built it.

    Raises:
        CaptureError: it depends on the tokens or on learned weights, or see `fit`.
    """
    refuse_learned(finder.program, finder, [mask], layer)

    def bias_at(length: int, replaced: dict[fx.Node, Tensor]) -> Tensor:
        return as_bias(finder.run([mask], replaced, _BATCH, length)[0])

    return fit(finder, [mask], bias_at, layer, max_positions)


def refuse_learned(program: Program, finder: SiteFinder, sources: Iterable[fx.Node], layer: int) -> None:
    """Refuse masks and biases that depend on tokens or on parameters."""
    for source in sources:
        if finder.roles[source] == Role.DATA:
            raise CaptureError(
                "the attention mask depends on the tokens",
                where=f"layer {layer}, {source.name} {source.meta.get('source', '')}".strip(),
                fix="kvpass knows padding from the lengths that it is given; remove the mask that the model derives",
            )
        for node in ancestors([source]):
            if node.op == "get_attr" and not program.weights[str(node.target)].constant:
                raise CaptureError(
                    f"the attention of layer {layer} adds a learned bias ({node.target})",
                    where=f"layer {layer}, {node.target}",
                    fix="a learned attention bias is not supported; ALiBi slopes are",
                )
