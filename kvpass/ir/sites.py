"""Typed views of attention: where its operands come from, which weight rows feed which head, what rotates them.

A site is found by its op; everything else about it is learned by running the small subgraph around it (`Path`):

- the *layout* by pushing sign codes from the projection's rows to the attention input at position 0, where RoPE is the
  identity: each output channel answers with the code of the row it came from, through reshapes, interleavings,
  repeated heads, norms and scales alike;
- *RoPE* by pushing unit vectors and reading the 2x2 blocks between positions 0, 1 and 2;
- *norms* by asking which changes of scale and phase commute with the path.

So no family and no spelling is special. What does not fit is refused with `Refusal`, a reason and a node.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from kvpass.ir.execute import ancestors, evaluate, in_order, widened
from kvpass.ir.kv_format import KVFormat
from kvpass.ir.program import ATTEND, ATTEND_SHARED, ATTENTION, FEEDBACK, Program, Role, aten, placeholder, roles

_CODES = 96  # sign codes per row: two of 30k rows agree on 80 of them with probability below 1e-9
_BATCH, _LENGTH = 2, 3

Operand = Literal["q", "k", "v"]


class Refusal(Exception):
    """A proof that failed: why, and at which node. Passes turn it into an error for the user.

    Args:
        reason: what was expected and what was found.
        node: where.
        near: what came nearest to the proof, and by how much it missed.
        fix: what to change in the model's code.
    """

    def __init__(self, reason: str, node: fx.Node | None = None, *, near: str = "", fix: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.near = near
        self.fix = fix

    def __str__(self) -> str:
        source = self.node.meta.get("source", "") if self.node is not None else ""
        place = f" (at {self.node.name}{': ' + source if source else ''})" if self.node is not None else ""
        return self.reason + place


def source_of(node: fx.Node) -> str:
    """The line of the model's code that a node comes from: its own, or for one that a rewrite put there that of the
    nearest node it is made from; "" where none is known."""
    seen = {node}
    level = [node]
    while level:
        for current in level:
            if current.meta.get("source"):
                return str(current.meta["source"])
        level = list(dict.fromkeys(n for c in level for n in c.all_input_nodes if n not in seen))
        seen.update(level)
    return ""


@dataclass(frozen=True)
class Rotary:
    """RoPE as read from a path: channel pairs (i, j) with z = k[i] + 1j * k[j], their angles per position, the rest.

    `frequency[p]` is the angle in radians that pair p turns from one position to the next; `scale` multiplies the
    rotated channels (1 unless the family scales its tables, as YaRN does). `layout` names the usual arrangements.
    """

    pairs: tuple[tuple[int, int], ...]
    free: tuple[int, ...]
    frequency: tuple[float, ...]
    scale: float

    @property
    def layout(self) -> str:
        if not self.pairs:
            return "none"
        first = self.pairs[0]
        half = len(self.pairs)
        if all(j == i + 1 for i, j in self.pairs) and len(self.pairs) > 1:
            return "interleaved"
        if all(j - i == first[1] - first[0] for i, j in self.pairs) and first[1] - first[0] == half:
            return "half"
        return "interleaved" if half == 1 and first[1] == first[0] + 1 else "other"


@dataclass(frozen=True)
class Norm:
    """What commutes with the part of a path between its projection and the attention input.

    `linear`: any change of scale passes through. Otherwise the path normalises: `per_head` says whether each head is
    normalised alone, `phase` whether turning a RoPE pair by one angle for all tokens passes through.
    """

    linear: bool
    per_head: bool
    phase: bool


@dataclass(frozen=True)
class Projection:
    """A matrix product of data with a weight: `x @ weight.T + bias`."""

    node: fx.Node  # the product, with its bias where that is added separately
    x: fx.Node
    weight: fx.Node
    transposed: bool  # the weight is stored [in, rows], as Conv1D does
    bias: fx.Node | None


_ATTENTIONS = (ATTENTION, ATTEND, ATTEND_SHARED)
_TRANSPOSES = {aten.numpy_T.default, aten.t.default, aten.transpose.int, aten.permute.default}
_PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default}
_SUMS = {aten.add.Tensor, aten.add_.Tensor}


class SiteFinder:
    """All attention sites of one entry, in layer order, with what they share (roles and shapes)."""

    def __init__(self, program: Program, entry: str = "forward") -> None:
        self.program = program
        self.entry = entry
        self.graph = program.entries[entry]
        self.nodes = [n for n in self.graph.nodes if n.op == "call_function" and n.target in _ATTENTIONS]
        self._memo: dict[Any, Any] = {}

    @cached_property
    def roles(self) -> dict[fx.Node, Role]:
        return roles(self.graph)

    @cached_property
    def shapes(self) -> dict[fx.Node, Any]:
        return self.program.shapes(self.entry, _BATCH, _LENGTH)

    @cached_property
    def scaled(self) -> tuple[dict[fx.Node, Any], dict[fx.Node, Any]]:
        """Shapes for 2 x 5 and for 3 x 7 tokens: what changes tells batch and length apart."""
        return self.program.shapes(self.entry, 2, 5), self.program.shapes(self.entry, 3, 7)

    def __iter__(self) -> Iterator[AttentionSite]:
        for layer, node in enumerate(self.nodes):
            yield AttentionSite(self, node, layer)

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, layer: int) -> AttentionSite:
        return AttentionSite(self, self.nodes[layer], layer)

    # ------------------------------------------------------------------ running parts of the graph

    def run(
        self, outputs: list[fx.Node], given: dict[fx.Node, Tensor], batch: int, length: int, *, widen: bool = False
    ) -> list[Any]:
        """Values of `outputs` for chosen values of inner nodes; large or absent weights are replaced by random ones.

        With `widen`, what the model computes in half precision is computed in float32.
        """
        ids = placeholder(self.graph, "input_ids")
        start: dict[fx.Node, Any] = {ids: torch.zeros((batch, length), dtype=torch.long)}
        if not widen:
            return evaluate(outputs, start | given, self.probe_weight)

        def weight(name: str) -> Tensor:
            tensor = self.probe_weight(name)
            return tensor.to(widened(tensor.dtype))

        return evaluate(outputs, start | given, weight, widen=widened)

    def position_sources(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes that number the tokens 0, 1, 2, … and from which `nodes` know positions, found by running them.

        What is given to them instead moves everything that depends on positions. Those made from other ones are left
        out.
        """
        above = in_order(ancestors(nodes))
        whole = [n for n in above if n.op == "call_function" and self.roles[n] == Role.POSITION]
        counted = [n for n in whole if _is_count(self.shapes.get(n))]
        values = [self.run(counted, {}, 2, length) for length in (5, 7)]
        found: list[fx.Node] = []
        for node, small, large in zip(counted, *values, strict=True):
            numbers = all(torch.equal(v, torch.arange(len(v), dtype=v.dtype)) for v in (small, large))
            if numbers and (len(small), len(large)) == (5, 7) and not ancestors([node]) & set(found):
                found.append(node)
        return found

    def crossing(self, layer: int) -> list[fx.Node]:
        """What the layers above `layer` read of it and of the layers below: its residual stream first.

        The stream is the last node through which everything goes that this layer's attention has to say to the next
        one's. Whatever else passes from below it to above it (a copy of the embeddings, for one) follows; keys and
        values that layers share do not.

        Raises:
            Refusal: there is no such node, or what passes is not [B, S, ...].
        """
        begin, end = self.nodes[layer], self.nodes[layer + 1]
        reached = reached_from([begin])
        needed = ancestors([end]) & reached
        for stream in reversed(in_order(needed)):
            above = reached_from([stream]) - {stream}
            if end in above and not any(
                source in reached and source not in above and source is not stream
                for node in above
                for source in node.all_input_nodes
            ):
                break
        else:
            raise Refusal(
                "no single tensor carries what this layer adds to the next",
                begin,
                fix="let layers pass on one tensor, the residual stream",
            )
        shared = {n for site in self.nodes if site in above for n in site.args[1:3]}
        others = {
            source
            for node in above
            for source in node.all_input_nodes
            if source not in above and source is not stream and source not in shared
        }
        found = [stream, *(n for n in in_order(others) if self.roles[n] == Role.DATA and n.op != "placeholder")]
        for node in found:
            sizes = [tuple(v[node].shape) for v in self.scaled]
            if [s[:2] for s in sizes] != [(2, 5), (3, 7)] or sizes[0][2:] != sizes[1][2:]:
                raise Refusal(
                    f"a tensor of shape {sizes[0]} for 2 x 5 tokens passes from layer to layer",
                    node,
                    fix="give every tensor that layers pass on the axes [batch, length, ...]",
                )
        return found

    def probe_weight(self, name: str) -> Tensor:
        weight = self.program.weights[name]
        if weight.constant or weight.nbytes <= 1 << 20:
            tensor = weight.read()
            if not isinstance(tensor, FakeTensor):
                return tensor.to(weight.dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return (torch.rand(weight.shape, generator=generator) + 0.5).to(weight.dtype)

    def projection(self, node: fx.Node) -> Projection | None:
        """The projection that this node is, if it is one."""
        role = self.roles
        if node.target in _SUMS and len(node.all_input_nodes) == 2:
            for data, bias in (node.args[:2], node.args[1::-1]):
                if (
                    isinstance(data, fx.Node)
                    and isinstance(bias, fx.Node)
                    and role[bias] == Role.WEIGHT
                    and self.shapes[bias].dim() == 1
                ):
                    inner = self.projection(data)
                    if inner is not None and inner.bias is None:
                        return replace(inner, node=node, bias=bias)
            return None
        if node.target not in _PRODUCTS:
            return None
        arguments = [a for a in node.args if isinstance(a, fx.Node)]
        if node.target is aten.linear.default:
            x, weight = arguments[:2]
            bias = arguments[2] if len(arguments) > 2 else None
            transposed = False
        elif node.target is aten.addmm.default:
            bias, x, weight = arguments[:3]
            transposed = True
        else:
            x, weight = arguments[:2]
            bias, transposed = None, True
        if role[x] != Role.DATA or role[weight] != Role.WEIGHT or self.shapes[weight].dim() != 2:
            return None
        if bias is not None and role[bias] != Role.WEIGHT:
            return None
        source = weight
        if transposed and source.target in _TRANSPOSES and self.shapes[source].dim() == 2:
            inner_weight = source.args[0]
            if isinstance(inner_weight, fx.Node):
                weight, transposed = inner_weight, False
        return Projection(node, x, weight, transposed, bias)

    def root(self, node: fx.Node) -> Projection:
        """The one projection that all data of `node` comes from.

        Raises:
            Refusal: there is none, or several.
        """
        found: dict[fx.Node, Projection] = {}
        seen: set[fx.Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current in seen or self.roles[current] != Role.DATA:
                continue
            seen.add(current)
            projection = self.projection(current)
            if projection is not None:
                found[current] = projection
                continue
            if current.op == "placeholder" or current.target in (*_ATTENTIONS, FEEDBACK):
                raise Refusal(
                    "it is not computed by a projection",
                    current,
                    fix="compute queries, keys and values with a linear layer each, or one for all",
                )
            stack.extend(current.all_input_nodes)
        if len(found) != 1:
            names = ", ".join(str(p.weight.target) for p in list(found.values())[:4])
            raise Refusal(
                f"it comes from {len(found)} projections ({names}), not one",
                node,
                near="; ".join(f"{n.name} at {source_of(n)}" for n in in_order(found)[:4]),
                fix="compute it with one linear layer; two without anything between them can be multiplied into one",
            )
        return next(iter(found.values()))


def reached_from(starts: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on `starts`, themselves included; the graph's output is none."""
    reached = set(starts)
    stack = list(reached)
    while stack:
        for user in stack.pop().users:
            if user not in reached and user.op != "output":
                reached.add(user)
                stack.append(user)
    return reached


@dataclass(frozen=True, eq=False)
class Path:
    """The way from a projection to one attention operand."""

    finder: SiteFinder
    projection: Projection
    target: fx.Node  # the attention operand, [B, Hx, S, D]

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """Everything between the projection and the operand that depends on the projection, in order."""
        start = self.projection.node
        reach: set[fx.Node] = {start}
        inside = []
        for node in in_order(ancestors([self.target], [start])):
            if node is not start and any(n in reach for n in node.all_input_nodes):
                reach.add(node)
                inside.append(node)
        return inside

    @cached_property
    def cuts(self) -> list[fx.Node]:
        """The nodes that every way from the projection to the operand passes through, both ends included."""
        start = self.projection.node
        inside = [start, *self.nodes]
        members = set(inside)
        left = {n: sum(u in members for u in n.users) for n in inside}
        live: set[fx.Node] = set()
        cuts = []
        for node in inside:
            for source in node.all_input_nodes:
                if source in members:
                    left[source] -= 1
                    if left[source] == 0:
                        live.discard(source)
            live.add(node)
            if live == {node}:
                cuts.append(node)
        return cuts

    @property
    def heads(self) -> int:
        return int(self.finder.shapes[self.target].shape[1])

    @property
    def head_dim(self) -> int:
        return int(self.finder.shapes[self.target].shape[3])

    @property
    def row_count(self) -> int:
        return int(self.finder.shapes[self.projection.node].shape[-1])

    def push(self, rows: Tensor) -> Tensor:
        """The operand [N, Hx, S, D] when the projection gives `rows` [N, S, R]; no half precision on the way."""
        batch, length, count = rows.shape
        shape = self.finder.shapes[self.projection.node].shape
        value = rows.reshape(batch * length, count) if len(shape) == 2 else rows
        value = value.to(widened(self.finder.shapes[self.projection.node].dtype))
        result: Tensor = self.finder.run([self.target], {self.projection.node: value}, batch, length, widen=True)[0]
        return result.double()

    @cached_property
    def signature(self) -> Any:
        """Equal for paths that compute the same function of the projection's rows; None when it depends on weights."""
        index: dict[fx.Node, Any] = {self.projection.node: 0}
        parts: list[Any] = [self.row_count]

        def key(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                return ("in", index[argument]) if argument in index else ("out", argument)
            if isinstance(argument, list | tuple):
                return tuple(key(a) for a in argument)
            return argument

        for node in self.nodes:
            for source in node.all_input_nodes:
                if source not in index and self.finder.roles[source] == Role.WEIGHT:
                    return None
            parts.append((node.target, key(node.args), tuple((k, key(v)) for k, v in node.kwargs.items())))
            index[node] = len(index)
        return tuple(parts)

    def _memo(self, what: str, compute: Any) -> Any:
        if self.signature is None:
            return compute()
        key = (what, self.signature)
        if key not in self.finder._memo:
            try:
                self.finder._memo[key] = compute()
            except Refusal as refusal:
                self.finder._memo[key] = refusal
        found = self.finder._memo[key]
        if isinstance(found, Refusal):
            raise found
        return found

    @cached_property
    def rows(self) -> Tensor:
        """[Hx, D] int64: the projection row that feeds each channel of each head at position 0.

        Raises:
            Refusal: a channel is not fed by exactly one row.
        """
        result: Tensor = self._memo("rows", self._find_rows)
        return result

    def _find_rows(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        count = self.row_count
        codes = (torch.randint(0, 2, (_CODES, count), generator=generator) * 2 - 1).double()
        out = self.push(codes.view(_CODES, 1, count))[:, :, 0, :]
        heads, dim = out.shape[1], out.shape[2]
        signs = torch.sign(out.reshape(_CODES, heads * dim)).float()
        found = []
        for chunk in signs.T.split(2048):
            agreement = (chunk @ codes.float()).abs() / _CODES
            best, where = agreement.max(dim=1)
            if bool((best < 0.9).any()):
                worst = int(best.argmin())
                raise Refusal(
                    f"channel {worst % dim} of head {worst // dim} is not fed by one row of "
                    f"{self.projection.weight.target} at position 0 (best agreement {float(best.min()):.2f})",
                    self.target,
                    near=f"row {int(where[worst])} is the nearest: it explains the sign of "
                    f"{round(float(best.min()) * _CODES)} of {_CODES} probes, {round(0.9 * _CODES)} are needed; "
                    f"{int((best >= 0.9).sum())} of {len(best)} channels have their row",
                    fix="let each channel of a head be one row of the projection, through reshapes, norms and scales",
                )
            found.append(where)
        return torch.cat(found).view(heads, dim)

    @cached_property
    def norm(self) -> Norm:
        """Which changes of scale and phase commute with the path; see `Norm`."""
        result: Norm = self._memo("norm", self._find_norm)
        return result

    def _find_norm(self) -> Norm:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn((1, 1, self.row_count), generator=generator).double()
        length = 2
        base = self.push(x.expand(1, length, -1))
        double = self.push((2 * x).expand(1, length, -1))
        linear = _close(double, 2 * base) and _close(self.push(torch.zeros_like(x).expand(1, length, -1)), 0 * base)
        one_head = x.clone()
        one_head[..., self.rows[0]] *= 3.0
        per_head = self.heads == 1 or _close(self.push(one_head.expand(1, length, -1))[:, 1:], base[:, 1:])
        turned, expected = x.clone(), base.clone()
        angle = torch.tensor(0.7, dtype=torch.float64)
        for i, j in self.rotary.pairs:
            a, b = x[..., self.rows[:, i]], x[..., self.rows[:, j]]
            turned[..., self.rows[:, i]] = a * angle.cos() - b * angle.sin()
            turned[..., self.rows[:, j]] = a * angle.sin() + b * angle.cos()
            p, q = base[..., i], base[..., j]
            expected[..., i] = p * angle.cos() - q * angle.sin()
            expected[..., j] = p * angle.sin() + q * angle.cos()
        phase = _close(self.push(turned.expand(1, length, -1)), expected)
        return Norm(linear, per_head, phase)

    @cached_property
    def rotary(self) -> Rotary:
        """RoPE on this path; no pairs where there is none.

        Raises:
            Refusal: positions change the operand in another way than by turning pairs of channels.
        """
        result: Rotary = self._memo("rotary", self._find_rotary)
        return result

    def _find_rotary(self) -> Rotary:
        dim, count, length = self.head_dim, self.row_count, 3
        unit = torch.zeros((dim, count), dtype=torch.float64)
        for head in {0, self.heads - 1}:
            unit[torch.arange(dim), self.rows[head]] = 1.0
        out = self.push(unit.unsqueeze(1).expand(dim, length, count))  # [D, Hx, 3, D]
        blocks = []
        for head in sorted({0, self.heads - 1}):
            at = out[:, head]  # [D inputs, 3 positions, D channels]
            inverse = torch.linalg.pinv(at[:, 0])
            blocks.append(torch.stack([(inverse @ at[:, t]).T for t in range(length)]))
        turn = blocks[0]  # [3, D, D]: channels at position t = turn[t] @ channels at position 0
        if not _close(blocks[-1], turn, 1e-4):
            apart = (blocks[-1] - turn).abs()
            raise Refusal(
                "heads are rotated differently",
                self.target,
                near=f"heads 0 and {self.heads - 1} differ by {float(apart.max()):.3g}, most in channel "
                f"{int(apart.amax(dim=(0, 2)).argmax())}",
                fix="turn all heads of a layer by the same angles",
            )
        pairs: list[tuple[int, int]] = []
        free, frequency, scale = [], [], 1.0
        first = turn[1]
        taken: set[int] = set()
        for i in range(dim):
            if i in taken:
                continue
            partners = [j for j in range(dim) if j != i and abs(float(first[i, j])) > 1e-9]
            strong = [j for j in partners if abs(float(first[i, j])) > 1e-5 * float(first[i].abs().max())]
            if not partners or (not strong and not _antisymmetric(first, i, partners)):
                free.append(i)
                continue
            j = max(partners, key=lambda c: abs(float(first[i, c])))
            block = first[[i, j]][:, [i, j]]
            radius = float((block[0, 0] ** 2 + block[0, 1] ** 2).sqrt())
            proper = abs(float(block[0, 0] - block[1, 1])) < 1e-4 * radius
            proper &= abs(float(block[0, 1] + block[1, 0])) < 1e-4 * radius
            if not proper:
                raise Refusal(
                    f"positions change channel {i} in another way than a rotation",
                    self.target,
                    near=_nearest_rotation(block, i, j, len(pairs)),
                    fix="turn both channels of a pair by one angle: (a cos - b sin, a sin + b cos)",
                )
            angle = float(torch.atan2(block[1, 0], block[0, 0]))
            second = turn[2][[i, j]][:, [i, j]]
            twice = float(torch.atan2(second[1, 0], second[0, 0]))
            if abs((twice - 2 * angle + torch.pi) % (2 * torch.pi) - torch.pi) > 1e-3:
                raise Refusal(
                    f"the angle of channels {i}, {j} does not grow evenly with the position",
                    self.target,
                    near=f"they turn by {angle:.4g} from position 0 to 1 and by {twice:.4g} from 0 to 2, modulo a turn",
                    fix="let the angle be a frequency times the position",
                )
            taken |= {i, j}
            pairs.append((i, j))
            frequency.append(angle)
        for i in free:
            if abs(float(first[i, i]) - 1.0) > 1e-4:
                raise Refusal(
                    f"positions scale channel {i}",
                    self.target,
                    near=f"by {float(first[i, i]):.4g} from position 0 to 1; {len(pairs)} pairs of channels rotate",
                    fix="keep the size of queries and keys the same at every position",
                )
        return Rotary(tuple(pairs), tuple(free), tuple(frequency), scale)

    def frontier(self) -> tuple[fx.Node, tuple[int, ...]]:
        """The last cut that still is a plain arrangement of this operand's rows, and how to get there.

        Returns the node and the permutation that brings [B, S, Hx, D] into its layout; an empty permutation means that
        the node is [B, S, Hx*D].

        Raises:
            Refusal: the operand shares its norm or RoPE with another one, or its layout has other axes.
        """
        count, example = self.row_count, self.finder.shapes[self.projection.node]
        code = torch.arange(_BATCH * _LENGTH * count).view(_BATCH, _LENGTH, count)
        values: list[Tensor | None] = [None] * len(self.cuts)
        for power in range(4):  # digits small enough to be exact in bfloat16
            digit = ((code >> (7 * power)) & 127).to(example.dtype)
            given = digit.reshape(_BATCH * _LENGTH, count) if example.dim() == 2 else digit
            parts = self.finder.run(self.cuts, {self.projection.node: given}, _BATCH, _LENGTH)
            for i, part in enumerate(parts):
                if isinstance(part, Tensor) and part.dtype == example.dtype:
                    earlier = values[i]
                    scaled = part.double() * 128**power
                    values[i] = scaled if earlier is None else earlier + scaled
        wanted = (
            self.rows.view(1, 1, self.heads, self.head_dim)
            + count * torch.arange(_LENGTH).view(1, -1, 1, 1)
            + count * _LENGTH * torch.arange(_BATCH).view(-1, 1, 1, 1)
        ).double()  # [B, S, Hx, D]
        best: tuple[fx.Node, tuple[int, ...]] | None = None
        roles = self.finder.roles
        moved: set[fx.Node] = set()  # what positions may change, at lengths beyond this probe too
        for node in self.nodes:
            if any(n in moved or roles[n] == Role.POSITION for n in node.all_input_nodes):
                moved.add(node)
        for node, value in zip(self.cuts, values, strict=True):
            if node in moved or not isinstance(value, Tensor) or value.numel() != wanted.numel():
                continue
            if value.dim() == 3 and torch.equal(value, wanted.flatten(2)):
                best = (node, ())
            elif value.dim() == 4:
                for permutation in ((0, 1, 2, 3), (0, 2, 1, 3)):
                    if torch.equal(value, wanted.permute(permutation)):
                        best = (node, permutation)
        if best is None:
            raise Refusal(
                "its rows are not laid out apart from other operands' before a norm or RoPE",
                self.target,
                fix="split queries, keys and values before they are normalised or turned",
            )
        return best


def _is_count(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point() and value.numel() > 1


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    spread = float(b.abs().max()) or 1.0
    return bool((a - b).abs().max() <= tolerance * spread)


def _nearest_rotation(block: Tensor, i: int, j: int, before: int) -> str:
    """How far a 2x2 block is from the rotation, scaled or not, that is nearest to it."""
    cos, sin = float(block[0, 0] + block[1, 1]) / 2, float(block[1, 0] - block[0, 1]) / 2
    rotation = torch.tensor([[cos, -sin], [sin, cos]], dtype=block.dtype)
    angle = float(torch.atan2(rotation[1, 0], rotation[0, 0]))
    entries = ", ".join(f"{float(e):.4g}" for e in block.flatten())
    return (
        f"channels {i} and {j} are mixed by ({entries}); the nearest rotation turns by {angle:.4g} and is off by "
        f"{float((block - rotation).abs().max()):.3g}; {before} pairs before it rotate"
    )


def _antisymmetric(block: Tensor, i: int, partners: list[int]) -> bool:
    return any(abs(float(block[i, j] + block[j, i])) < 1e-3 * abs(float(block[i, j])) for j in partners)


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention of the model: its op, its operands and what was proved about them."""

    finder: SiteFinder
    node: fx.Node
    layer: int

    @property
    def q(self) -> fx.Node:
        return _argument(self.node, 0)

    @property
    def k(self) -> fx.Node:
        return _argument(self.node, 1)

    @property
    def v(self) -> fx.Node:
        return _argument(self.node, 2)

    def bare(self, operand: Operand) -> fx.Node:
        """`q`, `k` or `v` as the model computes it, before the fixed scales of a quantized cache (layout `static`)."""
        node = {"q": self.q, "k": self.k, "v": self.v}[operand]
        return _argument(node, 0) if KVFormat.parse(self.option("kv_format")).layout == "static" else node

    def option(self, name: str) -> Any:
        """A keyword of the op (`scale`, `window`, …), with the op's default."""
        for argument in self.node.target._schema.arguments:  # type: ignore[union-attr]
            if argument.name == name:
                return self.node.kwargs.get(name, argument.default_value)
        raise KeyError(name)

    def optional(self, name: str) -> fx.Node | None:
        """An optional tensor argument of the op (`sink_logits`, `alibi_slopes`, `mask`)."""
        names = [a.name for a in self.node.target._schema.arguments]  # type: ignore[union-attr]
        index = names.index(name)
        value = self.node.args[index] if index < len(self.node.args) else self.node.kwargs.get(name)
        return value if isinstance(value, fx.Node) else None

    def set_optional(self, name: str, value: fx.Node | None) -> None:
        """Set an optional tensor argument of the op."""
        names = [a.name for a in self.node.target._schema.arguments]  # type: ignore[union-attr]
        index = names.index(name)
        arguments = [*self.node.args, *([None] * (index + 1 - len(self.node.args)))]
        arguments[index] = value
        self.node.args = tuple(arguments)

    @property
    def upward(self) -> bool:
        """Whether it reads the keys and values of a layer above it, as the pass before left them."""
        return self.k.target is FEEDBACK

    @cached_property
    def kv_source(self) -> int:
        """The layer whose keys and values it reads; its own number where it has some of its own."""
        if self.upward:
            layer = self.k.kwargs["layer"]
            assert isinstance(layer, int)
            return layer
        return next(i for i, node in enumerate(self.finder.nodes) if _argument(node, 1) is self.k)

    @property
    def heads(self) -> int:
        return int(self.finder.shapes[self.q].shape[1])

    @property
    def kv_heads(self) -> int:
        return int(self.finder.shapes[self.k].shape[1])

    @property
    def head_dim(self) -> int:
        return int(self.finder.shapes[self.k].shape[3])

    @property
    def value_dim(self) -> int:
        return int(self.finder.shapes[self.v].shape[3])

    @property
    def kv_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.finder.shapes[self.k].dtype
        return dtype

    def path(self, operand: Operand) -> Path:
        """The way from the projection to `q`, `k` or `v`, fixed scales of a quantized cache left out.

        Raises:
            Refusal: the operand does not come from one projection.
        """
        target = self.bare(operand)
        return Path(self.finder, self.finder.root(target), target)

    @cached_property
    def output(self) -> OutputProjection:
        """The projection that mixes the heads back into the residual stream.

        Raises:
            Refusal: something other than a rearrangement stands between attention and that projection.
        """
        return _find_output(self)


@dataclass(frozen=True)
class OutputProjection:
    """W_O: which of its input columns reads which channel of which head."""

    projection: Projection
    columns: Tensor  # [H, Dv] int64


def _find_output(site: AttentionSite) -> OutputProjection:
    finder = site.finder
    reach = {site.node}
    node = site.node
    while True:
        users = [u for u in node.users if u.op != "output"]
        if len(users) != 1:
            raise Refusal(
                "the attention output is read in several places before its output projection",
                node,
                near="; ".join(f"{u.name} at {source_of(u)}" for u in in_order(users)[:4]),
                fix="let the output projection alone read what attention gives",
            )
        projection = finder.projection(users[0])
        if projection is not None and projection.x in reach:
            following = [u for u in users[0].users if finder.projection(u) is not None]
            if len(users[0].users) == 1 and following:
                wider = finder.projection(following[0])
                if wider is not None and wider.weight is projection.weight:
                    projection = wider
            break
        node = users[0]
        reach.add(node)
        if any(finder.roles[n] == Role.DATA and n not in reach for n in node.all_input_nodes):
            others = [n for n in node.all_input_nodes if finder.roles[n] == Role.DATA and n not in reach]
            raise Refusal(
                "the attention output is combined with other data before its output projection",
                node,
                near=f"{_next_projection(finder, node)} would read it, were it not for {others[0].name} "
                f"({source_of(others[0])})",
                fix="combine after the output projection, or fold a gate of fixed numbers into its weight",
            )
    heads, dim = site.heads, site.value_dim
    code = torch.arange(_BATCH * heads * _LENGTH * dim, dtype=torch.float64).view(_BATCH, heads, _LENGTH, dim)
    value = finder.run([projection.x], {site.node: code}, _BATCH, _LENGTH)[0].double().reshape(_BATCH, _LENGTH, -1)
    channel = (
        (
            torch.arange(heads).view(1, 1, -1, 1) * _LENGTH * dim
            + torch.arange(dim).view(1, 1, 1, -1)
            + dim * torch.arange(_LENGTH).view(1, -1, 1, 1)
            + heads * _LENGTH * dim * torch.arange(_BATCH).view(-1, 1, 1, 1)
        )
        .double()
        .flatten(2)
    )  # [B, S, H*Dv]: the code of each (head, channel)
    order = value[0, 0].argsort()
    if value.shape != channel.shape or not torch.equal(value[..., order], channel):
        same = int((value[..., order] == channel).sum()) if value.shape == channel.shape else 0
        raise Refusal(
            "the attention output is changed (a norm, a gate) before its output projection",
            projection.node,
            near=f"{same} of {channel.numel()} entries arrive as they are at {projection.weight.target}",
            fix="fold fixed factors into the output projection, and leave norms between the two out",
        )
    return OutputProjection(projection, order.view(heads, dim))


def _next_projection(finder: SiteFinder, node: fx.Node) -> str:
    """The weight of the first projection that reads a node, over other nodes or not."""
    for user in in_order(reached_from([node]) - {node}):
        found = finder.projection(user)
        if found is not None:
            return str(found.weight.target)
    return "no projection"


def _argument(node: fx.Node, index: int) -> fx.Node:
    value = node.args[index]
    assert isinstance(value, fx.Node)
    return value
