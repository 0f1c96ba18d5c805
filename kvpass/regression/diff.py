"""What changed between two snapshots, graded, with the first difference in words.

`compare` is the one function. The grades, from the mildest: `none`; `cosmetic` (the text differs and what is computed
does not); `numerical` (the same graph with other numbers: weights, constants, logits); `structural` (another graph);
`plan` (another cache). A difference of one grade mostly brings milder ones along: the grade of a `Diff` is the worst.
"""

from __future__ import annotations

import difflib
import enum
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvpass.regression.snapshot import Logits, Part, Row, Snapshot, WeightLine

CONSTANTS = 2e-5  # relative; constants are written with six digits
WEIGHTS = 1e-4  # of a weight's norm; rounding on another machine moves the float32 ones by some 1e-7
SHOWN = 40  # lines of a diff
COMPARED = 1000  # calls behind the first that differs: a diff of layers that are alike takes time


class Grade(enum.IntEnum):
    """How much of a change it is; see the module."""

    NONE = 0
    COSMETIC = 1
    NUMERICAL = 2
    STRUCTURAL = 3
    PLAN = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Difference:
    """One part in which two snapshots differ.

    Attributes:
        grade: of this part.
        where: the plan, the weights, an entry, and so on.
        what: the first difference, in words.
        detail: lines of a diff, where there are any.
    """

    grade: Grade
    where: str
    what: str
    detail: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diff:
    """All differences, the worst first, and notes on what is ambiguous and therefore none."""

    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def grade(self) -> Grade:
        return max((d.grade for d in self.differences), default=Grade.NONE)

    def text(self) -> str:
        """For a terminal."""
        lines = [f"change: {self.grade}"]
        for found in self.differences:
            lines.append(f"  {found.where} ({found.grade}): {found.what}")
            lines += [f"      {line}" for line in found.detail]
        lines += [f"  ambiguous: {note}" for note in self.notes]
        return "\n".join(lines)

    def markdown(self, title: str) -> str:
        """For a pull request."""
        lines = [f"### {title}: {self.grade}", ""]
        if self.differences:
            lines += ["| part | change | first difference |", "| --- | --- | --- |"]
            lines += [f"| {d.where} | {d.grade} | {_cell(d.what)} |" for d in self.differences]
        else:
            lines.append("Nothing changed.")
        lines += ["", *(f"- ambiguous: {note}" for note in self.notes)] if self.notes else []
        for found in self.differences:
            if found.detail:
                lines += ["", f"<details><summary>{found.where}</summary>", "", "```diff", *found.detail, "```"]
                lines += ["", "</details>"]
        return "\n".join(lines) + "\n"


def compare(old: Snapshot, new: Snapshot, *, tolerance: float | None = None) -> Diff:
    """Grade what changed.

    Args:
        old, new: the snapshots.
        tolerance: of logits, relative to their spread; what `old` says where None.
    """
    found = [*_plans(old, new), *_models(old, new)]
    notes: list[str] = []
    for name, a, b in (("", old.program, new.program), ("onnx ", old.onnx, new.onnx)):
        if a is None or b is None:
            found += [_present(name.strip(), a is not None)] if a is not b else []
            continue
        for entry in dict.fromkeys([*a.graphs, *b.graphs]):
            if entry not in a.graphs or entry not in b.graphs:
                found.append(_present(f"{name}{entry}", entry in a.graphs))
            else:
                found += _graphs(f"{name}{entry}", entry, a, b)
        found += _weights(f"{name}weights", a, b)
    if old.logits is not None and new.logits is not None:
        moved = compare_logits(old.logits, new.logits, tolerance)
        if not moved.passed:
            found.append(Difference(Grade.NUMERICAL, "logits", moved.words()))
        if moved.ambiguous:
            notes.append("near-ties, which rounding may decide either way: " + "; ".join(moved.ambiguous))
    elif old.logits is not new.logits:
        found.append(_present("logits", old.logits is not None))
    if old.recipe != new.recipe:
        what = f"{', '.join(old.recipe) or 'nothing'} -> {', '.join(new.recipe) or 'nothing'}"
        found.append(Difference(Grade.COSMETIC, "recipe", what))
    return Diff(tuple(sorted(found, key=lambda d: -d.grade)), tuple(notes))


def _present(what: str, before: bool) -> Difference:
    return Difference(Grade.STRUCTURAL, what, "is gone" if before else "is new: the old snapshot was taken without it")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


# ---------------------------------------------------------------------- plan and model


def _plans(old: Snapshot, new: Snapshot) -> Iterator[Difference]:
    before, after = _layers(old), _layers(new)
    size = f"{old.bytes_per_token:,} -> {new.bytes_per_token:,} bytes per token while no window is full"
    if len(before) != len(after):
        yield Difference(Grade.PLAN, "plan", f"{len(before)} -> {len(after)} layers; {size}")
        return
    changes: dict[str, list[int]] = {}
    for layer, (a, b) in enumerate(zip(before, after, strict=True)):
        words = [
            f"{key} {a.get(key, 'none')} -> {b.get(key, 'none')}"
            for key in sorted(a.keys() | b.keys())
            if a.get(key) != b.get(key)
        ]
        if words:
            changes.setdefault(", ".join(words), []).append(layer)
    if changes:
        lines = [f"{_numbers(layers)}: {words}" for words, layers in changes.items()]
        yield Difference(Grade.PLAN, "plan", f"{lines[0]}; {size}", tuple(lines if len(lines) > 1 else ()))


def _layers(snapshot: Snapshot) -> list[dict[str, str | int]]:
    found: list[dict[str, str | int]] = []
    for row in snapshot.plan:
        first, _, last = str(row["layers"]).partition("-")
        said = {k: v for k, v in row.items() if k != "layers"}
        found += [said] * (int(last or first) - int(first) + 1)
    return found


def _numbers(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return "layers " + ", ".join(map(str, layers))


def _models(old: Snapshot, new: Snapshot) -> Iterator[Difference]:
    a, b = vars(old.model), vars(new.model)
    words = [f"{key} {a[key]} -> {b[key]}" for key in a if a[key] != b[key]]
    if words:
        yield Difference(Grade.STRUCTURAL, "model", ", ".join(words))


# ---------------------------------------------------------------------- graphs


class _Call(NamedTuple):
    """A line of a graph with its repeats written out: its layer in words, its name there, and what it says."""

    layer: str
    name: str
    op: str
    note: str
    arguments: str


def _graphs(where: str, entry: str, a: Part, b: Part) -> Iterator[Difference]:
    old, new = a.graphs[entry], b.graphs[entry]
    if old.text == new.text:
        return
    before, after = unrolled(a, entry), unrolled(b, entry)
    detail = tuple(_call_diff(before, after))
    if [_skeleton(c) for c in before] == [_skeleton(c) for c in after]:
        for mine, its in zip(before, after, strict=True):
            numbers = zip(_floats(mine.arguments), _floats(its.arguments), strict=True)
            for x, y in numbers:
                if not math.isclose(x, y, rel_tol=CONSTANTS):
                    what = f"{mine.layer}{mine.op} ({mine.name}): {x:g} -> {y:g}"
                    yield Difference(Grade.NUMERICAL, where, what, detail)
                    return
        return
    what = _first(before, after)
    if old.meaning == new.meaning:
        yield Difference(Grade.COSMETIC, where, f"computes the same, written otherwise: {what}", detail)
        return
    counts = [
        f"{op} {old.ops.get(op, 0)} -> {new.ops.get(op, 0)}"
        for op in sorted(old.ops.keys() | new.ops.keys())
        if old.ops.get(op, 0) != new.ops.get(op, 0)
    ]
    yield Difference(Grade.STRUCTURAL, where, what + (f"; {', '.join(counts)}" if counts else ""), detail)


_HEAD = re.compile(r"(\w+): (?:once|(\d+) times)(?:, layers? (\d+)(?:-(\d+))?)?(.*?)(?:, as (\S+) (\w+?))?(, but)?:?")
_CARRIED = re.compile(r", ('\w+) is (\S+?) at first")
_BODY = re.compile(r"  (\w+?) (?:(\S[^=]*?) )?= ([\w.]+)\((.*)\)")
_READ = re.compile(r"(?<![\w.'])('?)([a-z]+)(\d+)(?:@(\d+))?(?![\w.\[(])")
_LAYER = re.compile(r"\b(?:layer=|past_key_values\.)(\d+)")
_PLACES = re.compile(r"(\blayer=|\bpast_key_values\.|\bcache\[|%|\bw)\d+\b")
_READS = re.compile(r"(%|\bw)\d+\b")
_INDEX = re.compile(r"(\d+)\+(\d*)i\b")
_FLOAT = re.compile(r"(?<![\w.])-?(?:\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+|inf|nan)(?![\w.])")


@dataclass
class _Block:
    count: int
    layers: tuple[int, int] | None
    carried: dict[str, str]
    lines: list[str]


def _blocks(part: Part, entry: str) -> dict[str, _Block]:
    found: dict[str, _Block] = {}
    changed: dict[str, str] | None = None
    block = _Block(1, None, {}, [])
    for line in part.graphs[entry].text.split("\n"):
        if line.startswith("  "):
            if changed is None:
                block.lines.append(line)
            else:
                name = line.split()[0]
                block.lines = [line if old.split()[0] == name else old for old in block.lines]
            continue
        head = _HEAD.fullmatch(line)
        if head is None:
            continue
        letter, count, first, last, carried, entry_before, block_before, _ = head.groups()
        changed = None
        layers = (int(first), int(last or first)) if first is not None else None
        block = found[letter] = _Block(int(count or 1), layers, dict(_CARRIED.findall(carried or "")), [])
        if entry_before is not None:
            changed = {}
            block.lines = [_unnoted(old) for old in _blocks(part, entry_before)[block_before].lines]
    return found


def _unnoted(line: str) -> str:
    parts = _BODY.fullmatch(line)
    return line if parts is None else f"  {parts[1]} = {parts[3]}({parts[4]})"


def unrolled(part: Part, entry: str) -> list[_Call]:
    """The calls of a graph in order, every round of every repeat written out, values called by their place."""
    blocks = _blocks(part, entry)
    starts: dict[str, int] = {}
    calls: list[_Call] = []
    for letter, block in blocks.items():
        starts[letter] = len(calls)
        period = len(block.lines)
        for turn in range(block.count):

            def place(found: re.Match[str], turn: int = turn, letter: str = letter, block: _Block = block) -> str:
                back, of, number, at = found.groups()
                if of not in blocks or of not in starts:
                    return found[0]
                if back and turn == 0:
                    return _READ.sub(place, block.carried[f"'{of}{number}"])
                rounds = turn - bool(back) if of == letter else int(at) if at else blocks[of].count - 1
                return f"%{starts[of] + rounds * len(blocks[of].lines) + int(number)}"

            def index(found: re.Match[str], turn: int = turn) -> str:
                return str(int(found[1]) + turn * int(found[2] or 1))

            for line in block.lines:
                parts = _BODY.fullmatch(line)
                if parts is None:
                    raise AssertionError(f"no line of a snapshot: {line!r}")
                arguments = _READ.sub(place, _INDEX.sub(index, parts[4]))
                own = _LAYER.search(arguments)
                layer = f"layer {own[1]}: " if own else _layer_words(block, turn)
                calls.append(_Call(layer, parts[1], parts[3], parts[2] or "", arguments))
        assert len(calls) == starts[letter] + period * block.count
    returned = part.graphs[entry].text.rstrip("\n").rsplit("\n", 1)[-1]

    def last(found: re.Match[str]) -> str:
        of = found[2]
        if of not in starts:
            return found[0]
        turn = int(found[4]) if found[4] else blocks[of].count - 1
        return f"%{starts[of] + turn * len(blocks[of].lines) + int(found[3])}"

    calls.append(_Call("", "", "return", "", _READ.sub(last, returned.removeprefix("return "))))
    return calls


def _layer_words(block: _Block, turn: int) -> str:
    if block.layers is None:
        return ""
    each = (block.layers[1] - block.layers[0] + 1) // block.count
    first = block.layers[0] + turn * each
    return f"layer {first}: " if each == 1 else f"layers {first}-{first + each - 1}: "


def _skeleton(call: _Call) -> tuple[str, str, str]:
    return call.op, call.note, _FLOAT.sub("#", call.arguments)


def _floats(text: str) -> list[float]:
    return [float(x) for x in _FLOAT.findall(text)]


def _first(before: list[_Call], after: list[_Call]) -> str:
    """The first call that differs, in words."""
    for a, b in zip(before, after, strict=False):
        if a[2:] == b[2:]:
            continue
        if a.op != b.op:
            return f"{b.layer}{_call_words(a)} became {_call_words(b)}"
        if a.arguments == b.arguments:
            return f"{b.layer}{a.op} ({a.name}) gives {b.note}, which was {a.note}"
        mine, its = _named(a.arguments), _named(b.arguments)
        options = [
            f"{key} {mine.get(key, 'none')} -> {its.get(key, 'none')}"
            for key in sorted(mine.keys() | its.keys())
            if mine.get(key) != its.get(key)
        ]
        if options:
            return f"{b.layer}{a.op} ({a.name}): {', '.join(options)}"
        pairs = zip(_split(a.arguments), _split(b.arguments), strict=False)
        changed = [f"{x} -> {y}" for x, y in pairs if x != y]
        return f"{b.layer}{a.op} ({a.name}) reads other values: {', '.join(changed) or b.arguments}"
    longer = after if len(after) > len(before) else before
    return f"{len(before)} calls became {len(after)}, from {_call_words(longer[min(len(before), len(after)) - 1])} on"


def _call_words(call: _Call) -> str:
    return f"{call.op} {call.note}".strip() + (f" ({call.name})" if call.name else "")


def _named(arguments: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^|, )([a-z_]+)=((?:(?!, [a-z_]+=).)*)", arguments))


def _split(arguments: str) -> list[str]:
    """Arguments one by one."""
    found, depth = [""], 0
    for letter in arguments:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [word.strip() for word in found]


def _call_diff(before: list[_Call], after: list[_Call]) -> list[str]:
    """The calls that differ, of graphs with their repeats written out: one layer that is no longer like the others
    makes other repeats, and most of a diff of the texts would tell of that."""
    if len(before) == len(after):
        pairs = [(a, b) for a, b in zip(before, after, strict=True) if a[2:] != b[2:]]
        lines = _once([(a.layer, [f"-{_call_line(a)}", f"+{_call_line(b)}"]) for a, b in pairs])
    else:  # what was put in moves the numbers of all values and weights behind it, so here they have none
        old, new = ([_READS.sub(r"\1", _call_line(call)) for call in calls] for calls in (before, after))
        same = 0
        while same < min(len(old), len(new)) and old[same] == new[same]:
            same += 1
        behind = 0
        while behind < min(len(old), len(new)) - same and old[-1 - behind] == new[-1 - behind]:
            behind += 1
        first, second = (x[max(same - 1, 0) : min(len(x) - behind + 1, same + COMPARED)] for x in (old, new))
        hunks: list[list[str]] = []
        for line in list(difflib.unified_diff(first, second, lineterm="", n=1))[2:]:
            if line.startswith("@@"):
                hunks.append(["..."])
            else:
                hunks[-1].append(line)
        lines = _once([("", hunk) for hunk in hunks])
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"... {len(lines) - SHOWN} more lines"]


def _once(changes: list[tuple[str, list[str]]]) -> list[str]:
    """The lines of changes, each with its layer in words; what differs in layer and values alone is told once."""
    shown: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    for layer, lines in changes:
        key = tuple(_PLACES.sub(r"\1", line) for line in lines)
        shown.setdefault(key, (lines, []))[1].append(layer)
    found = []
    for lines, (_, *others) in shown.values():
        found += lines
        numbers = [int(n) for words in others for n in re.findall(r"^layer (\d+): $", words)]
        if others:
            known = len(numbers) == len(others)
            found.append(f" likewise in {_numbers(numbers)}" if known else f" likewise {len(others)} times more")
    return found


def _call_line(call: _Call) -> str:
    return f" {call.note} {call.op}({call.arguments})".replace("  ", " ")


# ---------------------------------------------------------------------- weights


def _weights(where: str, a: Part, b: Part) -> Iterator[Difference]:
    if [w.shape for w in a.weights] != [w.shape for w in b.weights]:
        old, new = sorted(w.shape for w in a.weights), sorted(w.shape for w in b.weights)
        gone, fresh = _without(old, new), _without(new, old)
        what = f"{len(old)} -> {len(new)} weights"
        what += f"; gone: {', '.join(gone[:4])}" * bool(gone) + f"; new: {', '.join(fresh[:4])}" * bool(fresh)
        yield Difference(Grade.STRUCTURAL, where, what if gone or fresh else f"{what}, read in another order")
        return
    changed = [(i, x, y) for i, (x, y) in enumerate(zip(a.weights, b.weights, strict=True)) if _other(x, y)]
    if changed:
        number, x, y = changed[0]
        many = f"{len(changed)} of {len(a.weights)} weights changed; " if len(changed) > 1 else ""
        yield Difference(Grade.NUMERICAL, where, f"{many}w{number} {x.shape} {_how(x, y)}{_reader(a, number)}")


def _other(x: WeightLine, y: WeightLine) -> bool:
    """Whether two weights differ, where both were kept with their content."""
    if x.rms is None or y.rms is None:
        return False
    return not x.moved(y) <= WEIGHTS


def _how(x: WeightLine, y: WeightLine) -> str:
    assert x.rms is not None
    assert y.rms is not None
    turned = max((abs(p - q) for p, q in zip(x.projections, y.projections, strict=False)), default=0.0)
    if turned <= WEIGHTS and x.rms:
        return f"is scaled by {y.rms / x.rms:.6g}"
    if abs(x.rms - y.rms) <= WEIGHTS * x.rms and turned > 0.1:
        return "holds as much as before in another order or under other signs (its root mean square is the same)"
    return f"moved by about {x.moved(y):.1e} of its norm"


def _reader(part: Part, number: int) -> str:
    entry = next(iter(part.graphs))
    for call in unrolled(part, entry):
        if re.search(rf"\bw{number}\b", call.arguments):
            return f", read by {call.layer}{call.op} ({entry} {call.name})"
    return ""


def _without(first: list[str], second: list[str]) -> list[str]:
    left = list(second)
    found = []
    for item in first:
        if item in left:
            left.remove(item)
        else:
            found.append(item)
    return found


# ---------------------------------------------------------------------- logits


@dataclass(frozen=True)
class Moved:
    """How two readings of the same positions differ.

    Attributes:
        worst: the largest difference, relative to the spread.
        at: where.
        allowed: how large it may be.
        other: positions whose likeliest token is another one by more than is allowed.
        ambiguous: positions whose likeliest token is another one within what is allowed: a near-tie, which rounding
            may decide either way.
        missing: why positions cannot be compared, where they cannot.
    """

    worst: float
    at: str
    allowed: float
    other: tuple[str, ...] = ()
    ambiguous: tuple[str, ...] = ()
    missing: str = ""

    def words(self) -> str:
        """What is wrong, in words."""
        if self.missing:
            return self.missing
        found = f"off by {self.worst:.1e} of the spread at {self.at} (allowed {self.allowed:.0e})" if self.at else ""
        return "; ".join([w for w in (found, *(f"another token is likeliest at {o}" for o in self.other[:3])) if w])

    @property
    def passed(self) -> bool:
        return self.worst <= self.allowed and not self.other and not self.missing


def compare_logits(old: Logits, new: Logits, tolerance: float | None = None) -> Moved:
    """Compare two readings; allowed is what the old one says unless `tolerance` is given."""
    allowed = old.tolerance if tolerance is None else tolerance
    if [r.at for r in old.rows] != [r.at for r in new.rows]:
        return Moved(0.0, "", allowed, missing=f"{len(old.rows)} and {len(new.rows)} positions were read")
    worst, at = 0.0, ""
    other: list[str] = []
    ambiguous: list[str] = []
    for a, b in zip(old.rows, new.rows, strict=True):
        spread = max(a.spread, b.spread) or 1.0
        # by rank, not by token: of two vectors that lie within e of each other, so do the sorted ones
        pairs = [*zip(a.values, b.values, strict=True), *zip(a.projections, b.projections, strict=True)]
        moved = max(abs(x - y) for x, y in [*pairs, (a.spread, b.spread)]) / spread
        moved = moved if moved == moved else float("inf")
        if moved > worst:
            worst, at = moved, a.at
        if a.tokens[0] != b.tokens[0]:
            near = _behind(a, b.tokens[0]) <= 2 * allowed * spread and _behind(b, a.tokens[0]) <= 2 * allowed * spread
            (ambiguous if near else other).append(f"{a.at}: {a.tokens[0]} -> {b.tokens[0]}")
    return Moved(worst, at, allowed, tuple(other), tuple(ambiguous))


def _behind(row: Row, token: int) -> float:
    """How far a token's logit lies behind the best, at least."""
    if token in row.tokens:
        return row.values[0] - row.values[row.tokens.index(token)]
    return row.values[0] - row.values[-1]
