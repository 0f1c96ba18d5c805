"""Let a layer's heads read another layer's keys and values as well as linear maps allow.

A layer that loses its own keys and values can still adapt to those that it gets: which of the other layer's heads each
of its own reads (a permutation, found by what it explains), a complex factor per RoPE frequency on the queries, and any
linear map of values on W_O. These are the symmetries of `head_merge`, here fitted between two layers by least squares
on calibration text: k_reader ~ c k_owner per frequency, v_reader ~ N v_owner. With `turning`, both layers' projections
are to be averaged, so that the reader's are turned into the owner's frame instead (as Jin et al. 2024, arXiv
2412.20677, turn heads of one layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpass.errors import UnsupportedError
from kvpass.ir.program import Program, Weight, sweep
from kvpass.ir.sites import SiteFinder
from kvpass.ir.staged import Staged
from kvpass.passes.base import Context
from kvpass.passes.group_heads import basis_of, merge_constants, rewire
from kvpass.passes.head_merge import HeadMerge, KeyBasis, closest_turn, unit

TOKENS = 2048  # of calibration text that are read; their keys and values of all layers are held at once
RIDGE = 1e-4  # of the mean energy of a value channel


class _Seen:
    """What one site computed on the calibration text: heads first, tokens next."""

    def __init__(self, q: list[Tensor], k: list[Tensor], v: list[Tensor], basis: KeyBasis) -> None:
        self.basis = basis
        keys = torch.cat([part - part.mean(dim=2, keepdim=True) for part in k]).cpu().double()  # as softmax sees them
        self.keys = keys.permute(1, 0, 2, 3).flatten(1, 2)  # [Hkv, N, D]
        self.values = torch.cat(v).cpu().double().permute(1, 0, 2, 3).flatten(1, 2)
        power = torch.cat(q).cpu().double()
        turned = basis.complex(power).abs().pow(2).mean(dim=(0, 2))  # [H, P]
        self.energy = turned.unflatten(0, (len(self.keys), -1)).sum(1)  # [Hkv, P]

    @property
    def pairs(self) -> Tensor:
        """[Hkv, N, P] complex."""
        return self.basis.complex(self.keys)


def align(program: Program, sources: Sequence[int], context: Context, *, turning: bool) -> list[dict[str, Any]]:
    """Adapt every layer that is to read another one; its own keys and values stay in place until they are shared.

    Returns:
        per reader: the heads that it reads, and the shares of its keys' and values' energy that those explain.

    Raises:
        UnsupportedError: what a layer's projections mean could not be shown.
    """
    rows = torch.cat(list(context.batches))
    batches = rows[: max(1, TOKENS // rows.shape[1])].split(1)
    original = program.copy()
    staged = Staged(original, batches, context.device)
    seen: list[_Seen] = []
    finder = SiteFinder(original)
    bases = [basis_of(site) for site in finder]
    for site, basis in zip(finder, bases, strict=True):
        context.progress(site.layer, len(bases), f"reading layer {site.layer}")
        staged.advance([site.q, site.k, site.v])
        q, k, v = (staged.values(n) for n in (site.q, site.k, site.v))
        seen.append(_Seen(q, k, v, basis))
        for node in (site.q, site.k, site.v):
            staged.forget(node)
    details = []
    for site in list(SiteFinder(program)):
        owner, basis = sources[site.layer], bases[site.layer]
        if owner == site.layer:
            continue
        if not basis.phase:
            raise UnsupportedError(
                f"layer {site.layer} normalises its keys with weights that differ within RoPE's pairs, so heads "
                "cannot be turned",
                where=f"layer {site.layer}",
                fix="use align=False",
            )
        merge, record = _fit(seen[site.layer], seen[owner], basis, turning)
        heads, kv_heads = site.heads, site.kv_heads
        place = rewire(program, site, kv_heads)
        place.constants.update(merge_constants(merge, heads, kv_heads))
        for name in place.names:
            program.weights[name] = Weight.of(place.constants[name.rsplit(".", 1)[-1]], constant=True)
        details.append({"layer": site.layer, **record})
    sweep(program.forward)
    return details


def _fit(reader: _Seen, owner: _Seen, basis: KeyBasis, turning: bool) -> tuple[HeadMerge, dict[str, Any]]:
    mine, theirs = reader.pairs.permute(2, 0, 1), owner.pairs.permute(2, 0, 1)  # [P, Hkv, N]
    cross = mine @ theirs.mH  # [P, reader's head, owner's head]
    energy, other = mine.abs().pow(2).sum(2), theirs.abs().pow(2).sum(2)
    explained = cross.abs().pow(2) / other.clamp_min(1e-300).unsqueeze(1)
    weight = reader.energy.T  # [P, Hkv]
    key_share = (weight.unsqueeze(2) * explained).sum(0) / (weight * energy).sum(0).clamp_min(1e-300).unsqueeze(1)
    gram = _moments(owner.values)
    product = torch.einsum("hnd,gne->hgde", reader.values, owner.values)  # v_reader v_owner^T
    maps = torch.linalg.solve(gram.unsqueeze(0), product.mT).mT  # [h, g, Dv, Dv]: v_reader ~ map v_owner
    total = reader.values.pow(2).sum(dim=(1, 2)).clamp_min(1e-300)
    value_share = (maps * product).sum(dim=(2, 3)) / total.unsqueeze(1)
    partner = matching(key_share + value_share)
    heads, dim, value_dim = len(partner), reader.keys.shape[2], reader.values.shape[2]
    loose = torch.eye(len(basis.free), dtype=torch.float64)
    query_map = torch.zeros((heads, dim, dim), dtype=torch.float64)
    key_map = torch.zeros((heads, dim, dim), dtype=torch.float64)
    out_map = torch.zeros((heads, value_dim, value_dim), dtype=torch.float64)
    value_map = torch.zeros((heads, value_dim, value_dim), dtype=torch.float64)
    order = [partner.index(g) for g in range(heads)]  # the reader's head that goes to each place
    for place, head in enumerate(order):
        factor = cross[:, head, place] / other[:, place].clamp_min(1e-300)
        turn = unit(factor)
        scale = turn if turning or not basis.magnitude else factor
        query_map[head] = basis.assemble(scale.conj().unsqueeze(1), loose)
        key_map[place] = basis.assemble(turn.conj().unsqueeze(1), loose)
        rotation = closest_turn(product[head, place])
        out_map[head] = rotation if turning else maps[head, place]
        value_map[place] = rotation.T
    found = torch.tensor(partner)
    shares = [float(s[torch.arange(heads), found].mean()) for s in (key_share, value_share)]
    merge = HeadMerge(tuple((h,) for h in order), key_map, query_map, value_map, out_map, 1 - shares[0], 1 - shares[1])
    return merge, {"heads": partner, "keys_explained": shares[0], "values_explained": shares[1]}


def _moments(values: Tensor) -> Tensor:
    """Second moments [Hkv, Dv, Dv] of values [Hkv, N, Dv], kept away from singular."""
    gram = values.mT @ values
    size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)
    return gram + RIDGE * size.view(-1, 1, 1) * torch.eye(gram.shape[-1], dtype=gram.dtype)


def matching(gain: Tensor) -> list[int]:
    """For each row of [H, H] a column of its own, so that no exchange of two gains anything."""
    size = len(gain)
    table = gain.tolist()
    found = [-1] * size
    for _, row, column in sorted(((table[r][c], r, c) for r in range(size) for c in range(size)), reverse=True):
        if found[row] < 0 and column not in found:
            found[row] = column
    better = True
    while better:
        better = False
        for a in range(size):
            for b in range(a):
                now = table[a][found[a]] + table[b][found[b]]
                if table[a][found[b]] + table[b][found[a]] > now + 1e-12:
                    found[a], found[b] = found[b], found[a]
                    better = True
    return found
