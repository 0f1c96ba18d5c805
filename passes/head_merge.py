"""The algebra of merging KV heads: which linear maps turn several heads into one, and what that loses.

Scores and outputs of attention do not change under these maps of a KV head and the query heads that read it:

- a pair of channels that RoPE turns is a complex number z; z -> c z on the key and z -> z / conj(c) on the query, c !=
0;
- channels without position ("free"), key and query: any invertible M on the key, M^-T on the query;
- the value, any invertible M, and M^-1 on the columns of W_O.

A norm between projection and attention leaves fewer: no magnitudes (the norm takes them back), and phases only where
its weights are equal over each pair. A merge picks members of that symmetry group, head by head, so that the heads of a
group agree as well as they can, and then keeps one. Everything here is float64 on second moments; nothing knows a
graph.

Sources: Ainslie et al. 2023, arXiv 2305.13245 (mean, first); Jin et al. 2024, arXiv 2412.20677 (Procrustes alignment);
complex PCA per RoPE frequency generalises the rotations of Jin et al. and of TransMLA, arXiv 2502.07864; weighting
values by W_O is the whitening of SVD-LLM, arXiv 2403.07378.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Method = Literal["mean", "first", "procrustes", "pca"]
Groups = tuple[tuple[int, ...], ...]

EXHAUSTIVE = 3000  # partitions that are all tried; beyond, groups are grown and then improved by swaps
JOINT_SEARCH = 16  # heads above which a group's cost is taken as the sum of its pairs'
_COLUMNS = 512  # input columns in float64 at a time
ROUNDS, SETTLED = 15, 1e-4  # of Procrustes alignment, and the movement below which it has converged
RIDGE = 1e-9  # of the mean eigenvalue, where a weighting matrix is inverted


@dataclass(frozen=True)
class KeyBasis:
    """Which changes of basis a site's keys allow.

    Attributes:
        pairs: channels (i, j) that RoPE turns together.
        free: channels without position.
        magnitude: whether a head may be scaled.
        phase: whether a pair may be turned.
        free_full: whether the free channels may be mixed.
    """

    pairs: tuple[tuple[int, int], ...]
    free: tuple[int, ...]
    magnitude: bool = True
    phase: bool = True
    free_full: bool = True

    @cached_property
    def first(self) -> Tensor:
        return torch.tensor([i for i, _ in self.pairs], dtype=torch.long)

    @cached_property
    def second(self) -> Tensor:
        return torch.tensor([j for _, j in self.pairs], dtype=torch.long)

    @cached_property
    def rest(self) -> Tensor:
        return torch.tensor(self.free, dtype=torch.long)

    def complex(self, rows: Tensor) -> Tensor:
        """The pairs of real rows [..., D] as complex numbers [..., P]."""
        return torch.complex(rows[..., self.first].contiguous(), rows[..., self.second].contiguous())

    def assemble(self, scales: Tensor, mixed: Tensor) -> Tensor:
        """A real map [D, m * D] of m heads from complex scales [P, m] and a map of the free channels [F, m * F]."""
        pairs, members = scales.shape
        size, loose = 2 * pairs + len(self.free), len(self.free)
        whole = torch.zeros((size, members, size), dtype=torch.float64)
        for head in range(members):
            real, imaginary = scales[:, head].real, scales[:, head].imag
            whole[self.first, head, self.first] = real
            whole[self.first, head, self.second] = -imaginary
            whole[self.second, head, self.first] = imaginary
            whole[self.second, head, self.second] = real
            block = mixed[:, head * loose : (head + 1) * loose]
            whole[self.rest.unsqueeze(1), head, self.rest.unsqueeze(0)] = block
        return whole.reshape(size, members * size)


@dataclass(frozen=True)
class SiteStats:
    """Second moments of one site, per KV head; P pairs, F free channels, Dv value channels, all float64.

    Attributes:
        key_cov: [P, Hkv, Hkv] complex, E[z_h conj(z_g)] of keys as attention sees them, centred per window (what is
            constant over the keys of a row, softmax ignores).
        key_free_cov: [Hkv * F, Hkv * F].
        query_energy: [P, Hkv], E|q|^2 summed over the query heads that read the KV head.
        query_free_cov: [Hkv, F, F], summed likewise.
        value_cov: [Hkv * Dv, Hkv * Dv], not centred.
        out_gram: [Hkv, Dv, Dv], sum of W_O^T W_O over the query heads that read the KV head.
    """

    key_cov: Tensor
    key_free_cov: Tensor
    query_energy: Tensor
    query_free_cov: Tensor
    value_cov: Tensor
    out_gram: Tensor

    @property
    def kv_heads(self) -> int:
        return int(self.out_gram.shape[0])

    @staticmethod
    def data_free(
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        wo: Tensor,
        basis: KeyBasis,
        bq: Tensor | None = None,
        bk: Tensor | None = None,
        bv: Tensor | None = None,
    ) -> SiteStats:
        """The moments that inputs of unit covariance would give: weights wq [H, D, C], wk [Hkv, D, C], wv [Hkv, Dv, C],
        wo [H, hidden, Dv], and biases by head, in any dtype. A key's bias is the same for all keys, so it does not
        count. All moments are sums over C: a few of its columns at a time are in float64."""
        kv, value_dim, _ = wv.shape
        ratio, pairs, loose = wq.shape[0] // kv, len(basis.pairs), len(basis.free)
        key_cov = torch.zeros((pairs, kv, kv), dtype=torch.complex128)
        key_free = torch.zeros((kv * loose, kv * loose), dtype=torch.float64)
        energy = torch.zeros((pairs, kv), dtype=torch.float64)
        query_free = torch.zeros((kv, loose, loose), dtype=torch.float64)
        value_cov = torch.zeros((kv * value_dim,) * 2, dtype=torch.float64)
        for keys in _columns(wk, None):
            z = basis.complex(keys.transpose(1, 2)).permute(2, 0, 1)  # [P, Hkv, c]
            key_cov += z @ z.mH
            rows = keys[:, basis.rest].flatten(0, 1)
            key_free.addmm_(rows, rows.T)
        for queries in _columns(wq, bq):
            zq = basis.complex(queries.transpose(1, 2))  # [H, c, P]
            energy += zq.abs().pow(2).sum(1).reshape(kv, ratio, -1).sum(1).T
            free_q = queries[:, basis.rest].unflatten(0, (kv, ratio))
            query_free += torch.einsum("krfc,krgc->kfg", free_q, free_q)
        for values in _columns(wv, bv):
            rows = values.flatten(0, 1)
            value_cov.addmm_(rows, rows.T)
        return SiteStats(
            key_cov=key_cov,
            key_free_cov=key_free,
            query_energy=energy,
            query_free_cov=query_free,
            value_cov=value_cov,
            out_gram=output_gram(wo, kv),
        )


def _columns(weight: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    """Some columns [heads, D, c] of a weight [heads, D, C] at a time in float64, then its bias as one more column."""
    for part in weight.split(_COLUMNS, dim=-1):
        yield part.double()
    if bias is not None:
        yield bias.double().unsqueeze(-1)


def output_gram(wo: Tensor, kv_heads: int) -> Tensor:
    """W_O^T W_O [Hkv, Dv, Dv] per KV head, from wo [H, hidden, Dv]."""
    gram = torch.stack([head.T @ head for head in (part.double() for part in wo)])
    return gram.reshape(kv_heads, -1, *gram.shape[1:]).sum(1)


@dataclass(frozen=True)
class HeadMerge:
    """Maps that give a site G KV heads instead of Hkv; m = Hkv / G heads are in each group.

    Attributes:
        groups: the KV heads of each group; maps of a group take its heads in this order.
        key_map: [G, D, m * D], new key = map @ stacked keys of the group.
        query_map: [Hkv, D, D], for the query heads that read KV head h: new query = map @ query.
        value_map: [G, Dv, m * Dv].
        out_map: [Hkv, Dv, Dv], new columns of W_O = old columns @ map.
        key_residual: share of the query-weighted key energy that is lost, over all groups.
        value_residual: share of the W_O-weighted value energy that is lost.
    """

    groups: Groups
    key_map: Tensor
    query_map: Tensor
    value_map: Tensor
    out_map: Tensor
    key_residual: float
    value_residual: float


@dataclass(frozen=True)
class _Merged:
    """One group's maps and what they lose, in the weighted energies that make groups comparable."""

    key_map: Tensor  # [D, m * D]
    query_maps: list[Tensor]  # m of [D, D]
    value_map: Tensor  # [Dv, m * Dv]
    out_maps: list[Tensor]
    key_lost: float
    value_lost: float


def merge_heads(
    stats: SiteStats,
    basis: KeyBasis,
    count: int,
    method: Method = "pca",
    grouping: Literal["search", "contiguous"] = "search",
) -> HeadMerge:
    """Merge a site's KV heads into `count` groups of equal size."""
    heads = stats.kv_heads
    assert heads % count == 0, f"{count} groups of {heads} heads"
    key_total, value_total = _totals(stats)
    known: dict[tuple[int, ...], float] = {}  # costs, not maps: a search looks at hundreds of groups

    def cost(members: tuple[int, ...]) -> float:
        if members not in known:
            found = _merge_group(stats, basis, members, method)
            known[members] = found.key_lost / key_total + found.value_lost / value_total
        return known[members]

    groups = contiguous(heads, count) if grouping == "contiguous" else search_groups(heads, count, cost)
    chosen = [_merge_group(stats, basis, g, method) for g in groups]
    size, value_dim = 2 * len(basis.pairs) + len(basis.free), stats.out_gram.shape[-1]
    query_map = torch.zeros((heads, size, size), dtype=torch.float64)
    out_map = torch.zeros((heads, value_dim, value_dim), dtype=torch.float64)
    for members, part in zip(groups, chosen, strict=True):
        for position, head in enumerate(members):
            query_map[head] = part.query_maps[position]
            out_map[head] = part.out_maps[position]
    return HeadMerge(
        groups=groups,
        key_map=torch.stack([part.key_map for part in chosen]),
        query_map=query_map,
        value_map=torch.stack([part.value_map for part in chosen]),
        out_map=out_map,
        key_residual=sum(part.key_lost for part in chosen) / key_total,
        value_residual=sum(part.value_lost for part in chosen) / value_total,
    )


def symmetric_transform(
    basis: KeyBasis, kv_heads: int, dim: int, value_dim: int, generator: torch.Generator
) -> HeadMerge:
    """A random member of the symmetry group, heads reordered too: a merge that must change nothing."""
    assert dim == 2 * len(basis.pairs) + len(basis.free)
    order = torch.randperm(kv_heads, generator=generator).tolist()
    pairs, loose = len(basis.pairs), len(basis.free)
    query_map = torch.zeros((kv_heads, dim, dim), dtype=torch.float64)
    out_map = torch.zeros((kv_heads, value_dim, value_dim), dtype=torch.float64)
    key_maps, value_maps = [], []
    for head in order:
        angle = torch.rand(pairs, generator=generator, dtype=torch.float64) * 2 * torch.pi
        size = 0.5 + torch.rand(pairs, generator=generator, dtype=torch.float64)
        scale = torch.polar(size if basis.magnitude else torch.ones_like(size), angle)
        if not basis.phase:
            scale = scale.abs().to(torch.complex128)
        mix = _random_invertible(loose, generator) if basis.free_full else torch.eye(loose, dtype=torch.float64)
        key_maps.append(basis.assemble(scale.unsqueeze(1), mix))
        query_map[head] = basis.assemble((1 / scale.conj()).unsqueeze(1), torch.linalg.inv(mix).T)
        turn = _random_invertible(value_dim, generator)
        value_maps.append(turn)
        out_map[head] = torch.linalg.inv(turn)
    groups = tuple((head,) for head in order)
    return HeadMerge(groups, torch.stack(key_maps), query_map, torch.stack(value_maps), out_map, 0.0, 0.0)


def _random_invertible(size: int, generator: torch.Generator) -> Tensor:
    """A well-conditioned map: an orthogonal one with scales from 0.7 to 1.4."""
    if size == 0:
        return torch.zeros((0, 0), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn((size, size), generator=generator, dtype=torch.float64)).Q
    return turn * (0.7 + 0.7 * torch.rand(size, generator=generator, dtype=torch.float64))


# ---------------------------------------------------------------------- one group


def _totals(stats: SiteStats) -> tuple[float, float]:
    """The weighted key and value energies of a whole site; never zero, so that shares can be taken."""
    keys = float((stats.query_energy * stats.key_cov.diagonal(dim1=1, dim2=2).real).sum())
    kv, loose = stats.query_free_cov.shape[0], stats.query_free_cov.shape[-1]
    blocks = stats.key_free_cov.reshape(kv, loose, kv, loose)
    keys += sum(float((stats.query_free_cov[h] * blocks[h, :, h]).sum()) for h in range(kv))
    dim = stats.out_gram.shape[-1]
    values = stats.value_cov.reshape(kv, dim, kv, dim)
    total = sum(float((stats.out_gram[h] * values[h, :, h]).sum()) for h in range(kv))
    tiny = torch.finfo(torch.float64).tiny
    return max(keys, tiny), max(total, tiny)


def _merge_group(stats: SiteStats, basis: KeyBasis, members: tuple[int, ...], method: Method) -> _Merged:
    index = torch.tensor(members)
    cov = stats.key_cov[:, index][:, :, index]
    b, c, key_lost = _merge_pairs(cov, stats.query_energy[:, index], basis, method)
    loose = _blocks(stats.key_free_cov, len(basis.free), index)
    full = basis.free_full or not basis.free
    forward, backward, free_lost = _merge_vectors(loose, stats.query_free_cov[index], method, full)
    key_map = basis.assemble(b, forward)
    query_maps = [basis.assemble(c[:, [h]].conj(), backward[h].T) for h in range(len(members))]
    values = _blocks(stats.value_cov, stats.out_gram.shape[-1], index)
    value_map, out_maps, value_lost = _merge_vectors(values, stats.out_gram[index], method, True)
    return _Merged(key_map, query_maps, value_map, out_maps, key_lost + free_lost, value_lost)


def _blocks(cov: Tensor, dim: int, index: Tensor) -> Tensor:
    """The blocks [m, dim, m, dim] of some heads of a covariance [heads * dim, heads * dim]."""
    heads = cov.shape[0] // dim if dim else 0
    if not dim:
        return torch.zeros((len(index), 0, len(index), 0), dtype=torch.float64)
    return cov.reshape(heads, dim, heads, dim)[index][:, :, index]


def _merge_pairs(cov: Tensor, energy: Tensor, basis: KeyBasis, method: Method) -> tuple[Tensor, Tensor, float]:
    """b, c [P, m] and the loss, so that z_h ~ c_h zbar with zbar = sum_h b_h z_h; cov [P, m, m], energy [P, m]."""
    pairs, members = energy.shape
    one = torch.ones((pairs, members), dtype=torch.complex128)
    if members == 1 or pairs == 0:
        return one, one, 0.0
    mean = one / members
    first = torch.zeros_like(one)
    first[:, 0] = 1

    def lost(b: Tensor, c: Tensor) -> float:
        left = torch.eye(members, dtype=torch.complex128) - c.unsqueeze(2) * b.unsqueeze(1)
        rest = (left @ cov @ left.mH).diagonal(dim1=1, dim2=2).real
        return float((energy * rest).sum().clamp_min(0))

    if method == "mean":
        return mean, one, lost(mean, one)
    if method == "first":
        return first, one, lost(first, one)
    if not basis.phase:
        # nothing can be turned: the best of the mean and each head as it is
        choices = [mean] + [torch.roll(first, h, dims=1) for h in range(members)]
        best = min(choices, key=lambda b: lost(b, one))
        return best, one, lost(best, one)
    if method == "procrustes" or not basis.magnitude:
        weight = torch.ones_like(energy) if method == "procrustes" else _weights(energy)
        weighted = weight.unsqueeze(2) * cov * weight.unsqueeze(1)
        c = unit(torch.linalg.eigh(weighted).eigenvectors[..., -1])
        for _ in range(ROUNDS):
            turned = unit((weighted @ c.unsqueeze(2)).squeeze(2), c)
            moved, c = float((turned - c).abs().max()), turned
            if moved < SETTLED:
                break
        c = c * unit(c[:, :1]).conj()
        b = c.conj() / members
        return b, c, lost(b, c)
    w = _weights(energy)
    u = torch.linalg.eigh(w.unsqueeze(2) * cov * w.unsqueeze(1)).eigenvectors[..., -1]
    b, c = u.conj() * w, u / w
    # what is left free: a complex factor. The new key is as large as the old ones, and in phase with the strongest.
    size = (b.unsqueeze(1) @ cov @ b.conj().unsqueeze(2)).squeeze(2).squeeze(1).real.clamp_min(0)
    old = cov.diagonal(dim1=1, dim2=2).real.mean(1)
    strongest = torch.gather(b, 1, b.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    factor = torch.where(size > 0, (old / size.clamp_min(1e-300)).sqrt(), 1.0) * unit(strongest).conj()
    factor = torch.where(factor.abs() > 0, factor, torch.ones_like(factor)).unsqueeze(1)
    b, c = b * factor, c / factor
    return b, c, lost(b, c)


def _weights(energy: Tensor) -> Tensor:
    """Square roots of energies [P, m], kept away from zero so that they can be divided by."""
    floor = energy.mean(dim=1, keepdim=True) * 1e-8
    return torch.where(floor > 0, energy.maximum(floor), torch.ones_like(energy)).sqrt()


def unit(z: Tensor, fallback: Tensor | None = None) -> Tensor:
    """z / |z|, and 1 (or `fallback`) where z is 0."""
    size = z.abs()
    other = torch.ones_like(z) if fallback is None else fallback
    return torch.where(size > 0, z / size.clamp_min(1e-300), other)


def _merge_vectors(cov: Tensor, gram: Tensor, method: Method, full: bool) -> tuple[Tensor, list[Tensor], float]:
    """Merge vectors v_h of m heads: vbar = forward @ stacked v, v_h ~ backward[h] @ vbar.

    Args:
        cov: [m, D, m, D], E[v_h v_g^T].
        gram: [m, D, D], how errors of each head count.
        method: how.
        full: whether the channels may be mixed.

    Returns:
        forward [D, m * D], backward m of [D, D], and the weighted error.
    """
    members, dim = gram.shape[0], gram.shape[1]
    eye = torch.eye(dim, dtype=torch.float64)
    if members == 1 or dim == 0:
        return eye, [eye] * members, 0.0
    flat = cov.reshape(members * dim, members * dim)

    def lost(forward: Tensor, backward: list[Tensor]) -> float:
        left = torch.eye(members * dim, dtype=torch.float64) - torch.cat(backward) @ forward
        rest = (left @ flat @ left.T).reshape(members, dim, members, dim)
        return max(0.0, sum(float((gram[h] * rest[h, :, h]).sum()) for h in range(members)))

    mean = eye.repeat(1, members) / members
    same = [eye] * members
    if method == "mean":
        return mean, same, lost(mean, same)
    choices = [mean]
    for head in range(members):
        choices.append(torch.zeros_like(mean))
        choices[-1][:, head * dim : (head + 1) * dim] = eye
    if method == "first":
        return choices[1], same, lost(choices[1], same)
    if not full:
        best = min(choices, key=lambda forward: lost(forward, same))
        return best, same, lost(best, same)
    if method == "procrustes":
        spectral = torch.linalg.eigh(flat).eigenvectors[:, -dim:].reshape(members, dim, dim)
        turns = closest_turn(spectral.mT)  # close to the answer already
        for _ in range(ROUNDS):
            forward = turns.permute(1, 0, 2).reshape(dim, members * dim) / members
            turned = closest_turn((forward @ flat).reshape(dim, members, dim).permute(1, 0, 2))
            moved, turns = float((turned - turns).abs().max()), turned
            if moved < SETTLED:
                break
        turns = turns[0].T @ turns
        forward = turns.permute(1, 0, 2).reshape(dim, members * dim) / members
        backward = list(turns.mT)
        return forward, backward, lost(forward, backward)
    roots, inverses = _root(gram)
    scaled = torch.einsum("hij,hjgk,gkl->higl", roots, cov, roots).reshape(members * dim, members * dim)
    basis = torch.linalg.eigh(scaled).eigenvectors[:, -dim:]
    forward = torch.cat([basis[h * dim : (h + 1) * dim].T @ roots[h] for h in range(members)], dim=1)
    backward = [inverses[h] @ basis[h * dim : (h + 1) * dim] for h in range(members)]
    # what is left free: any invertible map. The new vector is turned towards the mean of the old ones, and as large.
    turn = closest_turn(mean @ flat @ forward.T)
    size = float((forward @ flat @ forward.T).trace())
    factor = (float(flat.trace()) / members / size) ** 0.5 if size > 0 else 1.0
    forward, backward = factor * turn @ forward, [b @ turn.T / factor for b in backward]
    return forward, backward, lost(forward, backward)


def closest_turn(cross: Tensor) -> Tensor:
    """The orthogonal R [..., D, D] of largest tr(R^T cross): R x is closest to y for cross = E[y x^T] (Procrustes)."""
    left, _, right = torch.linalg.svd(cross)
    return left @ right


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square roots [m, D, D] of positive matrices, and their inverses."""
    values, vectors = torch.linalg.eigh(gram)
    floor = values.clamp_min(0).mean(dim=1, keepdim=True) * RIDGE
    values = torch.where(floor > 0, values.maximum(floor), torch.ones_like(values)).sqrt()
    return (vectors * values.unsqueeze(1)) @ vectors.mT, (vectors / values.unsqueeze(1)) @ vectors.mT


# ---------------------------------------------------------------------- which heads share


def contiguous(heads: int, count: int) -> Groups:
    """Neighbours share."""
    size = heads // count
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(count))


def search_groups(heads: int, count: int, cost: Callable[[tuple[int, ...]], float]) -> Groups:
    """The partition into `count` equal groups of least summed cost; neighbours where that is as good.

    All partitions are tried where they are few; otherwise groups grow from the cheapest pair and improve by swaps.
    """
    size = heads // count
    start = contiguous(heads, count)
    if size == 1 or count == 1:
        return start
    if partitions(heads, size) <= EXHAUSTIVE:
        return _cheapest([start, *_all_partitions(tuple(range(heads)), size)], cost)
    measure = cost
    if size > 2 and heads > JOINT_SEARCH:
        pairs = {pair: cost(pair) for pair in itertools.combinations(range(heads), 2)}

        def pairwise(members: tuple[int, ...]) -> float:
            return sum(pairs[pair] for pair in itertools.combinations(members, 2))

        measure = pairwise
    return _cheapest([_improved(g, measure) for g in (start, _grown(heads, size, cost))], measure)


def partitions(heads: int, size: int) -> int:
    """How many ways there are to split heads into unordered groups of a size."""
    ways = 1
    for left in range(heads, 0, -size):
        for k in range(1, size):
            ways = ways * (left - k) // k
    return ways


def _all_partitions(heads: tuple[int, ...], size: int) -> Iterator[Groups]:
    if not heads:
        yield ()
        return
    for others in itertools.combinations(heads[1:], size - 1):
        group = (heads[0], *others)
        rest = tuple(h for h in heads if h not in group)
        for tail in _all_partitions(rest, size):
            yield (group, *tail)


def _cheapest(candidates: list[Groups], cost: Callable[[tuple[int, ...]], float]) -> Groups:
    best, least = candidates[0], sum(cost(g) for g in candidates[0])
    for groups in candidates[1:]:
        total = sum(cost(g) for g in groups)
        if total < least - 1e-12 - 1e-9 * least:
            best, least = groups, total
    return best


def _grown(heads: int, size: int, cost: Callable[[tuple[int, ...]], float]) -> Groups:
    pairs = {pair: cost(pair) for pair in itertools.combinations(range(heads), 2)}
    left = set(range(heads))
    groups = []
    while left:
        seed = min((p for p in pairs if left.issuperset(p)), key=lambda p: pairs[p])
        members = list(seed)
        left -= set(seed)
        while len(members) < size:
            nearest = min(left, key=lambda h: (sum(pairs[min(h, m), max(h, m)] for m in members), h))
            members.append(nearest)
            left.discard(nearest)
        groups.append(tuple(sorted(members)))
    return tuple(sorted(groups))


def _improved(groups: Groups, cost: Callable[[tuple[int, ...]], float]) -> Groups:
    current = [list(g) for g in groups]
    costs = [cost(tuple(g)) for g in current]
    improved = True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(len(current)), 2):
            for i, j in itertools.product(range(len(current[a])), range(len(current[b]))):
                left, right = list(current[a]), list(current[b])
                left[i], right[j] = right[j], left[i]
                left, right = sorted(left), sorted(right)
                new = cost(tuple(left)), cost(tuple(right))
                if sum(new) < costs[a] + costs[b] - 1e-12 - 1e-9 * (costs[a] + costs[b]):
                    current[a], current[b] = left, right
                    costs[a], costs[b] = new
                    improved = True
    return tuple(sorted(tuple(g) for g in current))
