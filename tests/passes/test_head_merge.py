"""The merge algebra against direct computation on random heads: nothing here knows a model."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpass.passes.head_merge import (
    HeadMerge,
    KeyBasis,
    SiteStats,
    contiguous,
    merge_heads,
    partitions,
    search_groups,
    symmetric_transform,
)

METHODS = ("mean", "first", "procrustes", "pca")
DIM, VALUE_DIM, WIDTH, HIDDEN = 6, 5, 7, 9


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def bases():
    full = KeyBasis(pairs=((0, 3), (1, 4), (2, 5)), free=())
    partial = KeyBasis(pairs=((0, 1), (2, 3)), free=(4, 5))
    none = KeyBasis(pairs=(), free=tuple(range(DIM)))
    return {"rope": full, "partial": partial, "no rope": none}


def site(seed, kv_heads, ratio=1):
    """Weights by head: wq, wk, wv, wo and biases."""
    heads = kv_heads * ratio
    return {
        "wq": normal(seed, heads, DIM, WIDTH),
        "wk": normal(seed + 1, kv_heads, DIM, WIDTH),
        "wv": normal(seed + 2, kv_heads, VALUE_DIM, WIDTH),
        "wo": normal(seed + 3, heads, HIDDEN, VALUE_DIM),
    }


def rotate(x, basis, positions):
    """RoPE on [heads, tokens, D] at the given positions, an angle of its own per pair."""
    z = basis.complex(x)
    angle = positions.unsqueeze(-1) * torch.tensor(
        [1.0 / (1 + f) for f in range(len(basis.pairs))], dtype=torch.float64
    )
    z = z * torch.polar(torch.ones_like(angle), angle)
    out = x.clone()
    out[..., basis.first], out[..., basis.second] = z.real, z.imag
    return out


def attend(weights, basis, x):
    """Attention of one sequence x [tokens, WIDTH], every head over all tokens."""
    positions = torch.arange(x.shape[0], dtype=torch.float64)
    q = rotate(torch.einsum("hdc,tc->htd", weights["wq"], x), basis, positions)
    k = rotate(torch.einsum("hdc,tc->htd", weights["wk"], x), basis, positions)
    v = torch.einsum("hdc,tc->htd", weights["wv"], x)
    ratio = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(ratio, 0), v.repeat_interleave(ratio, 0)
    mixed = torch.softmax(q @ k.mT, dim=-1) @ v
    return torch.einsum("htd,hxd->tx", mixed, weights["wo"])


def apply(weights, merge):
    """The merged site's weights, query heads in the order of their groups."""
    kv_heads = weights["wk"].shape[0]
    ratio = weights["wq"].shape[0] // kv_heads
    queries = [h * ratio + i for g in merge.groups for h in g for i in range(ratio)]
    keys = [merge.key_map[g] @ weights["wk"][list(m)].flatten(0, 1) for g, m in enumerate(merge.groups)]
    values = [merge.value_map[g] @ weights["wv"][list(m)].flatten(0, 1) for g, m in enumerate(merge.groups)]
    return {
        "wq": torch.stack([merge.query_map[q // ratio] @ weights["wq"][q] for q in queries]),
        "wk": torch.stack(keys),
        "wv": torch.stack(values),
        "wo": torch.stack([weights["wo"][q] @ merge.out_map[q // ratio] for q in queries]),
    }


def stats_of(weights, basis):
    return SiteStats.data_free(*(weights[n] for n in ("wq", "wk", "wv", "wo")), basis)


def copies(weights, of, basis, seed, kind):
    """A site whose KV head i is head of[i] of `weights`, seen through a symmetry of its own."""
    index = torch.tensor(of)
    ratio = weights["wq"].shape[0] // weights["wk"].shape[0]
    wide = {
        "wq": weights["wq"].unflatten(0, (-1, ratio))[index].flatten(0, 1).clone(),
        "wk": weights["wk"][index].clone(),
        "wv": weights["wv"][index].clone(),
        "wo": weights["wo"].unflatten(0, (-1, ratio))[index].flatten(0, 1).clone(),
    }
    wide["wq"] += 0.1 * normal(seed, *wide["wq"].shape)  # query heads of their own
    if kind == "plain":
        return wide
    turn = symmetric_transform(basis, len(of), DIM, VALUE_DIM, generator(seed))
    if kind == "turned":  # no scales, only turns
        turn = symmetric_transform(
            KeyBasis(basis.pairs, basis.free, magnitude=False), len(of), DIM, VALUE_DIM, generator(seed)
        )
        orthogonal = [torch.linalg.qr(m).Q for m in turn.value_map]
        out_map = turn.out_map.clone()
        for (head,), q in zip(turn.groups, orthogonal, strict=True):
            out_map[head] = q.T
        key_map, query_map = turn.key_map.clone(), turn.query_map.clone()
        for position, (head,) in enumerate(turn.groups):
            free = basis.rest.unsqueeze(1), basis.rest.unsqueeze(0)
            if basis.free:
                q = torch.linalg.qr(key_map[position][free]).Q
                key_map[position][free], query_map[head][free] = q, q
        turn = HeadMerge(turn.groups, key_map, query_map, torch.stack(orthogonal), out_map, 0.0, 0.0)
    return apply(wide, turn)


@pytest.mark.parametrize("name", ["rope", "partial", "no rope"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), kv_heads=st.sampled_from([1, 2, 4, 6]), ratio=st.sampled_from([1, 3]))
def test_a_symmetry_changes_nothing(name, seed, kv_heads, ratio):
    basis, weights = bases()[name], site(seed, kv_heads, ratio)
    x = normal(seed + 9, 6, WIDTH)
    turned = apply(weights, symmetric_transform(basis, kv_heads, DIM, VALUE_DIM, generator(seed)))
    torch.testing.assert_close(attend(turned, basis, x), attend(weights, basis, x), rtol=1e-9, atol=1e-9)


def test_a_conjugate_is_not_a_symmetry():
    """The trap of a sign: turning the query by 1/c instead of 1/conj(c) must show."""
    basis, weights = bases()["rope"], site(3, 2)
    merge = symmetric_transform(basis, 2, DIM, VALUE_DIM, generator(3))
    wrong = HeadMerge(
        merge.groups, merge.key_map, merge.query_map.transpose(1, 2), merge.value_map, merge.out_map, 0.0, 0.0
    )
    x = normal(5, 6, WIDTH)
    assert (attend(apply(weights, wrong), basis, x) - attend(weights, basis, x)).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["rope", "partial", "no rope"])
def test_copies_come_back_with_every_method_wherever_they_stand(name, method):
    basis = bases()[name]
    wide = copies(site(1, 4, ratio=2), [2, 0, 1, 3, 0, 3, 2, 1], basis, 7, "plain")
    merge = merge_heads(stats_of(wide, basis), basis, 4, method)
    assert merge.groups == ((0, 6), (1, 4), (2, 7), (3, 5))
    assert merge.key_residual < 1e-12
    assert merge.value_residual < 1e-12
    x = normal(8, 6, WIDTH)
    torch.testing.assert_close(attend(apply(wide, merge), basis, x), attend(wide, basis, x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("method", "kind"), [("procrustes", "turned"), ("pca", "turned"), ("pca", "scaled")])
@pytest.mark.parametrize("name", ["rope", "partial", "no rope"])
def test_copies_in_other_bases_come_back(name, method, kind):
    basis = bases()[name]
    wide = copies(site(11, 4), [2, 0, 1, 3, 0, 3, 2, 1], basis, 13, kind)
    merge = merge_heads(stats_of(wide, basis), basis, 4, method)
    assert merge.key_residual < 1e-9
    assert merge.value_residual < 1e-9
    x = normal(8, 6, WIDTH)
    torch.testing.assert_close(attend(apply(wide, merge), basis, x), attend(wide, basis, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rope", "partial", "no rope"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_pca_loses_least_and_says_how_much(name, seed):
    basis, weights = bases()[name], site(seed, 4, ratio=2)
    stats = stats_of(weights, basis)
    merges = {m: merge_heads(stats, basis, 2, m, "contiguous") for m in METHODS}
    for method in ("mean", "first", "procrustes"):
        assert merges["pca"].key_residual <= merges[method].key_residual + 1e-9
        assert merges["pca"].value_residual <= merges[method].value_residual + 1e-9
    assert merges["procrustes"].value_residual >= 0
    # the loss, taken directly: what W_O makes of v_h - out_map v_new, for inputs of unit covariance
    for merge in merges.values():
        lost = total = 0.0
        for g, members in enumerate(merge.groups):
            new = merge.value_map[g] @ weights["wv"][list(members)].flatten(0, 1)
            for head in members:
                for query in (2 * head, 2 * head + 1):
                    wo = weights["wo"][query]
                    lost += float((wo @ (weights["wv"][head] - merge.out_map[head] @ new)).pow(2).sum())
                    total += float((wo @ weights["wv"][head]).pow(2).sum())
        assert merge.value_residual == pytest.approx(lost / total, rel=1e-6, abs=1e-9)


def test_the_new_key_is_as_large_as_the_old_ones():
    """The gauge: no head may leave its order of magnitude, or half precision would lose it."""
    basis, weights = bases()["rope"], site(21, 4)
    weights["wq"][0] *= 1e-4  # a query head that hardly asks
    merge = merge_heads(stats_of(weights, basis), basis, 2, "pca", "contiguous")
    merged = apply(weights, merge)
    for name in ("wk", "wv"):
        ratio = float(merged[name].pow(2).mean() / weights[name].pow(2).mean())
        assert 0.2 < ratio < 5, f"{name} changed its energy {ratio:.2f} times"


@pytest.mark.parametrize("phase", [True, False])
def test_under_a_norm_heads_keep_their_size(phase):
    basis = KeyBasis(pairs=((0, 3), (1, 4), (2, 5)), free=(), magnitude=False, phase=phase, free_full=False)
    merge = merge_heads(stats_of(site(2, 4), basis), basis, 2, "pca")
    for turn in merge.query_map:
        torch.testing.assert_close(turn @ turn.T, torch.eye(DIM, dtype=torch.float64))
        if not phase:
            torch.testing.assert_close(turn, torch.eye(DIM, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(8, 4), (8, 2), (6, 2), (9, 3), (12, 4), (32, 8), (4, 1), (4, 4)]),
)
def test_searched_groups_are_a_partition_no_worse_than_neighbours(seed, shape):
    heads, count = shape
    table = torch.rand((heads, heads), generator=generator(seed)).tolist()

    def cost(members):
        return sum(table[a][b] for a, b in itertools.combinations(members, 2))

    groups = search_groups(heads, count, cost)
    assert sorted(h for g in groups for h in g) == list(range(heads))
    assert {len(g) for g in groups} == {heads // count}
    assert sum(map(cost, groups)) <= sum(map(cost, contiguous(heads, count))) + 1e-9


def test_ties_keep_neighbours_together():
    assert search_groups(8, 4, lambda members: 1.0) == contiguous(8, 4)


def test_the_number_of_partitions():
    assert [partitions(8, 2), partitions(8, 4), partitions(6, 3), partitions(5, 5), partitions(4, 1)] == [
        105,
        35,
        10,
        1,
        1,
    ]
