"""The canonical text of a dataflow graph: what it computes, free of what things are called and how they are ordered.

`canonical_text` is the one function. It takes `Node`s, which `programs` makes of torch.fx graphs and `packages` of ONNX
models, and settles everything that two captures of the same model may do differently:

- values are numbered in the order of a depth-first walk from what is returned, not in the order of the file;
- operands of commutative calls are ordered by height, then by a hash of all below them, then by what their weights
  hold;
- what does not depend on the tokens comes first (`c` lines), so that layers are alike from the first one on;
- layers that differ in nothing but the numbers of their weights and caches are one `repeat` with a count.

In a repeat, `'b7` is b7 of the round before, `w3+9i` is weight 3 in round 0, 12 in round 1. Names of lines start again
in every block; of a block that is almost that of an earlier entry, the lines that differ are printed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

PERIODS = 8  # layers that a repeated body spans at most: every eighth layer is one with full attention, say
LETTERS = (
    "abdeghjklmnpqrstvxyz"  # of blocks; c is what is common, i counts rounds, w are weights, f32 and u8 are dtypes
)
NEAR = 5  # levels
COMMON, WEIGHT, NUMBER = 1 << 29, 1 << 30, 1 << 31  # heights that put them behind values: mul(x, w), add(x, 1e-06)
ALIKE = 1 / 3  # of a block's lines may differ from those of the block that it is printed by


@dataclass(frozen=True)
class Index:
    """A number that goes up from layer to layer: of a layer, of a weight."""

    kind: str
    number: int


@dataclass(eq=False)
class Node:
    """A value of a graph: an input, a weight or a call.

    Attributes:
        op: what is called; "" for an input, "weight" for a weight.
        args: per argument its pieces: text, values and indices. An input's or a weight's own name is its only argument.
        commutes: whether the first two arguments may be swapped.
        data: of inputs, whether they carry tokens, or keys and values.
        note: what is known of the value, such as its shape.
        after: calls that must have happened before, because of what they write.
        order: of weights, numbers that tell contents apart.
    """

    op: str
    args: Sequence[Sequence[str | Index | Node]]
    commutes: bool = False
    data: bool = False
    note: str = ""
    after: Sequence[Node] = ()
    order: tuple[float, ...] = ()

    @property
    def is_call(self) -> bool:
        return self.op not in ("", "weight")

    def operands(self) -> list[Node]:
        """The values that it reads, in order."""
        return [piece for arg in self.args for piece in arg if isinstance(piece, Node)]


@dataclass(frozen=True)
class Canonical:
    """A graph's canonical form.

    Attributes:
        text: its lines.
        ops: how many calls of each operator there are, every round of a repeat counted.
        meaning: a hash that is also blind to values that are computed twice and to reshapes of reshapes.
        blocks: the lines of each block by its letter, for `canonical_text` of another entry.
    """

    text: str
    ops: dict[str, int]
    meaning: str
    blocks: dict[str, tuple[str, ...]]


def canonical_text(
    outputs: Sequence[tuple[str, Node]],
    effects: Sequence[Node] = (),
    numbers: dict[Node, int] | None = None,
    earlier: Mapping[str, tuple[str, ...]] | None = None,
) -> Canonical:
    """The canonical form of a graph.

    Args:
        outputs: what is returned, each with its name ("" for the only one).
        effects: calls that are made for what they write.
        numbers: of weights, by an entry before; new ones go on from there. It is added to.
        earlier: blocks of entries before, "forward b" -> lines; of a block that is like one of them, only the lines
            that differ are printed.
    """
    numbers = {} if numbers is None else numbers
    roots = [node for _, node in outputs] + list(effects)
    nodes = _postorder(roots)
    varying = _varying(nodes)
    hashes = _order_operands(nodes, varying)
    calls = [n for n in _scheduled([n for _, n in outputs], list(effects), hashes) if n.is_call]
    common, data = [n for n in calls if n not in varying], [n for n in calls if n in varying]
    inputs: list[Node] = []
    for node in common + data:
        for operand in node.operands():
            if operand.op == "weight":
                numbers.setdefault(operand, len(numbers))
            elif operand.op == "" and operand not in inputs:
                inputs.append(operand)
    lines = [_line(n, numbers) for n in data]
    writer = _Writer(numbers, _input_names(inputs))
    writer.block("c", [_line(n, numbers) for n in common], 1)
    for start, period, count in _repeats(lines):
        writer.block("", lines[start : start + period * count], count)
    returned = ", ".join(f"{name} = {writer.name(n)}" if name else writer.name(n) for name, n in outputs)
    named = list(dict.fromkeys(_every_layer(n) if _has_index(n) else writer.inputs[n] for n in inputs))
    return Canonical(
        text=writer.text([f"inputs {', '.join(named)}"], [f"return {returned}"], earlier or {}),
        ops=dict(sorted(Counter(n.op for n in calls).items())),
        meaning=_meaning(outputs, nodes, numbers, writer.inputs),
        blocks=writer.blocks,
    )


# ---------------------------------------------------------------------- order


def _postorder(roots: Iterable[Node]) -> list[Node]:
    """Every node below `roots`, operands first, without recursion: graphs are thousands of calls deep."""
    done: dict[Node, None] = {}
    stack: list[tuple[Node, bool]] = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, entered = stack.pop()
        if node in done:
            continue
        if entered:
            done[node] = None
            continue
        stack.append((node, True))
        below = [*node.operands(), *node.after]
        stack.extend((n, False) for n in reversed(below) if n not in done)
    return list(done)


def _order_operands(nodes: list[Node], varying: set[Node]) -> dict[Node, str]:
    """Put the operands of commutative calls into their canonical order; the hash of all below each node.

    What decides is near the call before it is far: layers are to come out alike. So heights count what varies only, for
    the tables of positions would raise the first layer's; and hashes of a few levels go before those of everything.
    """
    hashes: dict[Node, str] = {}
    near: dict[Node, list[str]] = {}  # per node, hashes of 0, 1, 2... levels below it
    heights: dict[Node, int] = {}
    for node in nodes:
        if node in varying:
            heights[node] = 1 + max((heights[n] for n in node.operands() if n in varying), default=0)
        else:
            heights[node] = WEIGHT if node.op == "weight" else COMMON
        if node.commutes:
            mine, its = (
                [(heights[p], near[p][-1], hashes[p]) if isinstance(p, Node) else (NUMBER, str(p), "") for p in arg]
                for arg in node.args[:2]
            )
            if its < mine or (its == mine and _held(node.args[1]) < _held(node.args[0])):
                node.args = [node.args[1], node.args[0], *node.args[2:]]
        hashes[node] = _hash(_words(node, hashes))
        if node in varying:
            levels = [{n: near[n][level] for n in node.operands()} for level in range(NEAR)]
            near[node] = [node.op, *(_hash(_words(node, level)) for level in levels)]
        else:
            near[node] = [hashes[node]] * (NEAR + 1)
    return hashes


def _words(node: Node, below: Mapping[Node, str]) -> list[str]:
    """What a node says, with hashes of what it reads; of indices and of weights, what they have in every layer."""
    args = [[below[p] if isinstance(p, Node) else p.kind if isinstance(p, Index) else p for p in a] for a in node.args]
    if node.op == "weight":
        return [node.op, node.note]
    if node.commutes:
        args[:2] = sorted(args[:2])
    return [node.op, *(word for arg in args for word in (*arg, ","))]


def _held(arg: Sequence[str | Index | Node]) -> list[tuple[float, ...]]:
    """What tells two branches of the same shape apart: the contents of their weights, and their layers."""
    found: list[tuple[float, ...]] = []
    for node in _postorder([p for p in arg if isinstance(p, Node)]):
        if node.op == "weight":
            found.append(node.order)
        found += [(float(p.number),) for a in node.args for p in a if isinstance(p, Index)]
    return found


def _scheduled(outputs: list[Node], effects: list[Node], hashes: dict[Node, str]) -> list[Node]:
    """All nodes in order; what is called only for what it writes stands right behind the last value that it reads."""
    main = _postorder(outputs)
    place = {node: i for i, node in enumerate(main)}
    behind: dict[int, list[Node]] = {}
    waiting = [n for n in effects if n not in place]
    for root in sorted(waiting, key=lambda n: (max((place.get(o, 0) for o in n.operands()), default=0), hashes[n])):
        fresh = [n for n in _postorder([root]) if n not in place]
        anchor = max((place[o] for n in fresh for o in [*n.operands(), *n.after] if o in place), default=len(main) - 1)
        for node in fresh:
            place[node] = anchor
        behind.setdefault(anchor, []).extend(fresh)
    return [n for i, node in enumerate(main) for n in (node, *behind.get(i, ()))]


def _varying(nodes: list[Node]) -> set[Node]:
    """What depends on tokens, keys or values."""
    found: set[Node] = set()
    for node in nodes:
        if node.data or any(n in found for n in node.operands()):
            found.add(node)
    return found


def _meaning(
    outputs: Sequence[tuple[str, Node]], nodes: list[Node], numbers: dict[Node, int], inputs: dict[Node, str]
) -> str:
    known: dict[Node, str] = dict(inputs)
    for node in nodes:
        if node in known:
            continue
        args = list(node.args)
        while node.op == "reshape" and isinstance(args[0][0], Node) and args[0][0].op == "reshape":
            args[0] = args[0][0].args[0]
        if node.op == "weight":
            known[node] = f"w{numbers.get(node)}"
            continue
        words = [known[p] if isinstance(p, Node) else str(p) for arg in args for p in (*arg, ",")]
        known[node] = _hash([node.op, *words, *(known[n] for n in node.after)])
    written = sorted(known[n] for n in nodes if n.op.startswith("kvpass."))
    return _hash([*(f"{name}={known[n]}" for name, n in outputs), *written])[:16]


def _hash(words: list[str]) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


# ---------------------------------------------------------------------- lines and repeats


@dataclass(frozen=True)
class _Line:
    """A call, taken apart: the words that repeats must share, the values that it reads, and its indices."""

    node: Node
    words: str
    reads: tuple[Node, ...]
    indices: tuple[Index, ...]


def _line(node: Node, numbers: dict[Node, int]) -> _Line:
    words, reads, indices = [node.op, node.note], [], []
    for arg in node.args:
        for piece in arg:
            inner = piece.args[0] if isinstance(piece, Node) and piece.op == "" else [piece]
            for part in inner:  # an input's name may hold the number of a layer
                if isinstance(part, Index):
                    words.append(f"#{part.kind}")
                    indices.append(part)
                elif isinstance(part, str):
                    words.append(part)
                elif part.op == "weight":
                    words.append(part.note)
                    indices.append(Index("w", numbers[part]))
                else:
                    words.append("%")
                    reads.append(part)
        words.append(",")
    return _Line(node, "\0".join(words), tuple(reads), tuple(indices))


def _repeats(lines: list[_Line]) -> list[tuple[int, int, int]]:
    """The lines as stretches (start, period, count): bodies that are repeated, and what lies between, once each."""
    place = {line.node: i for i, line in enumerate(lines)}
    marks = [i for i, line in enumerate(lines) if any(x.kind == "layer" for x in line.indices)]
    gaps = sorted(
        {marks[j] - marks[i] for i in range(len(marks)) for j in range(i + 1, min(i + PERIODS, len(marks) - 1) + 1)}
    )
    found: list[tuple[int, int, int]] = []
    single = at = 0
    while at < len(lines):
        best = (0, 0)
        for period in gaps:
            count = _rounds(lines, place, at, period)
            if (count - 1) * period > best[0] * best[1]:
                best = (period, count - 1)
        if best[1]:
            if at > single:
                found.append((single, at - single, 1))
            found.append((at, best[0], best[1] + 1))
            at += best[0] * (best[1] + 1)
            single = at
        else:
            at += 1
    if at > single:
        found.append((single, at - single, 1))
    return found


def _rounds(lines: list[_Line], place: dict[Node, int], start: int, period: int) -> int:
    """How often the lines from `start` on repeat."""
    strides: dict[tuple[int, int], int] = {}
    relative: dict[tuple[int, int], bool] = {}
    at = start
    while at + period < len(lines):
        here, there = lines[at], lines[at + period]
        if here.words != there.words:
            break
        line = (at - start) % period
        moves = [b.number - a.number for a, b in zip(here.indices, there.indices, strict=True)]
        reads = zip(here.reads, there.reads, strict=True)
        if not all(m >= 0 and m == strides.setdefault((line, i), m) for i, m in enumerate(moves)) or not all(
            _same_read(place, start, period, a, b, relative, (line, i)) for i, (a, b) in enumerate(reads)
        ):
            break
        at += 1
    return 1 + (at - start) // period


def _same_read(
    place: dict[Node, int],
    start: int,
    period: int,
    here: Node,
    there: Node,
    relative: dict[tuple[int, int], bool],
    slot: tuple[int, int],
) -> bool:
    """Whether a value and the one that the next round reads in its place are the same one from before the repeat, or
    one round apart; and which of the two it is in every round alike."""
    if here is there:
        return place.get(here, -1) < start and not relative.setdefault(slot, False)
    if here not in place or there not in place or place[there] < start:
        return False
    return place[there] - place[here] == period and relative.setdefault(slot, True)


def _has_index(node: Node) -> bool:
    return any(isinstance(piece, Index) for piece in node.args[0])


def _every_layer(node: Node) -> str:
    return "".join("*" if isinstance(piece, Index) else str(piece) for piece in node.args[0])


def _input_names(inputs: list[Node]) -> dict[Node, str]:
    """What inputs are called; those of one name are numbered in the order in which they are first read."""
    plain = ["".join(str(p.number) if isinstance(p, Index) else str(p) for p in n.args[0]) for n in inputs]
    seen: Counter[str] = Counter()
    names = {}
    for node, name in zip(inputs, plain, strict=True):
        names[node] = name if plain.count(name) == 1 else f"{name}.{seen[name]}"
        seen[name] += 1
    return names


@dataclass
class _Writer:
    """Names lines and writes blocks."""

    numbers: dict[Node, int]
    inputs: dict[Node, str]
    places: dict[Node, tuple[str, int, int]] = field(default_factory=dict)  # block, line, round
    rounds: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # by the name of a line

    def block(self, letter: str, lines: list[_Line], count: int) -> None:
        if not lines:
            return
        position = len(self.rounds) - ("c" in self.rounds)
        letter = letter or LETTERS[position % len(LETTERS)] * (1 + position // len(LETTERS))
        period = len(lines) // count
        self.rounds[letter] = count
        for i, line in enumerate(lines):
            self.places[line.node] = (letter, i % period, i // period)
        carried: dict[str, str] = {}
        written = []
        for i in range(period):
            first, second = lines[i], lines[i + period] if count > 1 else None
            name = f"{letter}{i}"
            written.append(f"{name} = {self._call(first, second, carried)}")
            self.notes[written[-1]] = f"{name} {first.node.note} ="
        layers = sorted({x.number for line in lines for x in line.indices if x.kind == "layer"})
        words = f"{letter}: " + (f"{count} times" if count > 1 else "once")
        if layers and letter != "c":
            words += f", layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f", layer {layers[0]}"
        words += "".join(f", {name} is {value} at first" for name, value in sorted(carried.items()))
        self.heads[letter], self.blocks[letter] = words, tuple(written)

    def _call(self, line: _Line, later: _Line | None, carried: dict[str, str]) -> str:
        reads = iter(range(len(line.reads)))
        indices = iter(range(len(line.indices)))

        def index(position: int) -> str:
            number = line.indices[position].number
            stride = later.indices[position].number - number if later is not None else 0
            return str(number) + ("" if not stride else "+i" if stride == 1 else f"+{stride}i")

        def word(piece: str | Index | Node) -> str:
            if isinstance(piece, str):
                return piece
            if isinstance(piece, Index):
                return index(next(indices))
            if piece.op == "":
                return "".join(map(word, piece.args[0])) if _has_index(piece) else self.inputs[piece]
            if piece.op == "weight":
                return f"w{index(next(indices))}"
            position = next(reads)
            if later is None or later.reads[position] is piece:
                return self.name(piece)
            letter, number, turn = self.places[later.reads[position]]
            back = 1 - turn
            shown = "'" * back + f"{letter}{number}"
            if back:
                carried[shown] = self.name(piece)
            return shown

        arguments = ", ".join("".join(word(p) for p in arg) for arg in line.node.args)
        return f"{line.node.op}({arguments})"

    def name(self, node: Node) -> str:
        """A value as lines outside its block call it."""
        if node.op == "weight":
            return f"w{self.numbers[node]}"
        if node.op == "":
            return self.inputs[node]
        letter, number, turn = self.places[node]
        last = self.rounds[letter] - 1
        return f"{letter}{number}" + ("" if turn == last else f"@{turn}")

    def text(self, head: list[str], tail: list[str], earlier: Mapping[str, tuple[str, ...]]) -> str:
        lines = list(head)
        for letter, body in self.blocks.items():
            like, changed = _most_alike(body, earlier)
            if like:
                lines.append(f"{self.heads[letter]}, as {like}" + (", but:" if changed else ""))
            else:
                lines.append(f"{self.heads[letter]}:")
            lines += ["  " + self._noted(line) for line in (changed if like else body)]
        return "\n".join([*lines, *tail]) + "\n"

    def _noted(self, line: str) -> str:
        name, _, call = line.partition(" =")
        note = self.notes[line]
        return line if note == f"{name}  =" else note + call


def _most_alike(body: tuple[str, ...], earlier: Mapping[str, tuple[str, ...]]) -> tuple[str, list[str]]:
    """The earlier block that has almost the same lines, and those that differ."""
    best: tuple[str, list[str]] = ("", [])
    fewest = int(len(body) * ALIKE) + 1
    for name, other in earlier.items():
        if len(other) == len(body) > 2:
            changed = [mine for mine, its in zip(body, other, strict=True) if mine != its]
            if len(changed) < fewest:
                best, fewest = (name, changed), len(changed)
    return best
