"""The ops that rank and keep: what torch asks of an op, and column mass against the whole matrix."""

import pytest
import torch

from kvpass.ir import selection
from kvpass.ir.retention import Retention, fraction

OPS = torch.ops.kvpass
RANDOM = torch.Generator().manual_seed(0)


def tensor(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=RANDOM, dtype=dtype)


def numbers(*values):
    return torch.tensor(values)


def whole_mass(q, k, lengths, observed, slope, apart, windowed):
    """[B, G, T] from the full matrix of every row alone."""
    out = []
    for row, n in enumerate(lengths.tolist()):
        group = q.shape[1] // k.shape[1]
        keys = k[row, :, :n].repeat_interleave(group, dim=0)
        scores = q[row, :, :n] @ keys.transpose(1, 2) * 0.3
        i, j = torch.arange(n).unsqueeze(1), torch.arange(n)
        hidden = (j > i) | (j <= i - windowed) if windowed else j > i
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        count = n if observed == 0 else min(observed, n)
        ramp = torch.linspace(1, slope, count, dtype=q.dtype)
        mass = (p[:, n - count :] * ramp.view(1, -1, 1)).sum(1) / (count if observed else 1)
        mass = mass.unflatten(0, (-1, group)).mean(1)
        mass = mass if apart else mass.mean(0, keepdim=True)
        out.append(torch.nn.functional.pad(mass, (0, q.shape[2] - n)))
    return torch.stack(out)


@pytest.mark.parametrize("windowed", [0, 9])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(("observed", "slope"), [(0, 1.0), (5, 1.0), (7, 1.5), (1, 1.0)])
def test_column_mass_is_the_sum_over_the_matrix(observed, slope, apart, windowed, monkeypatch):
    monkeypatch.setattr(selection, "ROWS", 8)  # several blocks
    q, k = tensor(3, 4, 30, 8), tensor(3, 2, 30, 8)
    lengths = numbers(30, 21, 3)
    rule = str(Retention(rows=observed, slope=slope, apart=apart))
    options = {"rule": rule, "longest": 30, "scale": 0.3, "window": windowed}
    found = selection.column_mass_reference(q, k, lengths, lengths, **options)
    expected = whole_mass(q, k, lengths, observed, slope, apart, windowed)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[row, :, :n], expected[row, :, :n], rtol=0, atol=1e-12)


def test_survivors_are_the_best_the_latest_of_equals_and_what_never_goes():
    ranks = torch.tensor([[[9.0, 1, 5, 5, 7, 0, 2, 0]]]).repeat(2, 1, 1)
    rule = str(Retention(sinks=1, recent=2))
    index = selection.survivors_reference(ranks, numbers(8, 6), numbers(5, 4), numbers(8, 6), width=5, rule=rule)
    assert index[:, 0].tolist() == [[0, 3, 4, 6, 7], [0, 3, 4, 5, -1]]


def test_random_ranks_depend_on_position_head_and_layer_alone():
    a = selection.noise(torch.arange(50).view(1, 1, -1), 4, 3)
    b = selection.noise(torch.arange(20, 50).view(1, 1, -1), 4, 3)
    assert torch.equal(a[:, :, 20:], b)
    assert not torch.equal(a, selection.noise(torch.arange(50).view(1, 1, -1), 4, 2))
    assert not torch.equal(a[:, 0], a[:, 1])
    assert 0.4 < float(selection.noise(torch.arange(5000).view(1, 1, -1), 1, 0).mean()) < 0.6


def check(op, arguments, options):
    torch.library.opcheck(op.default, arguments, options)


def test_opcheck_passes():
    q, k, v = tensor(2, 4, 12, 8), tensor(2, 2, 12, 8), tensor(2, 2, 12, 6)
    lengths = numbers(12, 9)
    check(OPS.prune, (tensor(2, 5, 8).requires_grad_(),), {"layer": 1, "rule": "all"})
    rule = str(Retention(rows=4, slope=1.2, apart=True, sinks=1, recent=2, budget=6))
    check(OPS.column_mass, (q, k, lengths, lengths), {"rule": rule, "longest": 12, "scale": 0.3})
    ranks = tensor(2, 2, 12)
    check(OPS.survivors, (ranks, lengths, numbers(6, 6), lengths), {"width": 6, "rule": rule})
    index = selection.survivors_reference(ranks, lengths, numbers(6, 6), lengths, width=6, rule=rule)
    store = [torch.zeros(2, 2, 8, 8, dtype=q.dtype), torch.zeros(2, 2, 8, 6, dtype=q.dtype)]
    where = torch.full((2, 2, 8), -1, dtype=torch.int32)
    positions = torch.arange(12).expand(2, -1).contiguous()
    check(OPS.keep, (k, v, [*store, where], lengths, positions, index), {"layout": ""})
    selection.keep_reference(k, v, [*store, where], lengths, positions, index, layout="")
    queries = [torch.zeros(2, 4, 5, 8, dtype=q.dtype), torch.zeros(2, 4, 5), torch.full((2, 5), -1, dtype=torch.int32)]
    check(OPS.observe, (q, k, queries, lengths, positions), {"scale": 0.3})
    step = (tensor(2, 4, 1, 8), tensor(2, 2, 1, 8), tensor(2, 2, 1, 6))
    for then, extras in (("append", []), ("replace", [torch.zeros(2, 2, 8)]), ("thin", queries)):
        rule = str(Retention(rows=0, apart=True, budget=6, then=then))
        arguments = (*step, [*store, where, *extras], lengths, numbers(6, 6), numbers(6, 6), numbers(1, 1))
        check(OPS.attend_kept, arguments, {"end": 7, "layout": "", "rule": rule, "scale": 0.3})


# ---------------------------------------------------------------------- rules


def test_rules_are_text_and_back():
    for rule in (
        Retention(),
        Retention(by="persistence", rows=64, recent=32, apart=True, then="replace", budget=99),
        Retention(
            recent_share=fraction(0.2), share=fraction(0.7310585786), of="context", stays=True, slope=1.2, lead=1
        ),
    ):
        assert Retention.parse(str(rule)) == rule


@pytest.mark.parametrize("ratio", [0.9, 0.8, 0.7, 0.1, 1 / 3, 0.9963019858])
def test_counts_are_those_of_a_float_computed_exactly(ratio):
    rule = Retention(recent_share=fraction(0.2), share=fraction(ratio), of="context", floor=1, stays=True)
    for length in (*range(40, 3000, 7), 8192, 131072):
        context = length - (int(length * 0.2 + 1e-9) + 1)
        assert rule.window(length) == length - context
        assert rule.count(length, length) == length - context + int(context * ratio + 1e-9)
        assert int(rule.window(torch.tensor([length]))) == rule.window(length)


@pytest.mark.parametrize(
    "rule",
    [
        Retention(budget=40),
        Retention(share=fraction(0.3), sinks=4, recent=9),
        Retention(share=fraction(0.3), recent_share=fraction(0.15), sinks=4),
        Retention(share=fraction(0.8), recent_share=fraction(0.2), recent=16, of="context", floor=12),
        Retention(share=fraction(0.8), recent_share=fraction(0.2), of="context", floor=64, stays=True),
        Retention(of="context", floor=5, recent=3),
    ],
    ids=str,
)
def test_counts_of_tensors_are_counts(rule):
    prompts = torch.arange(1, 400)
    for part in (1, 2, 3):
        reached = (prompts + part - 1) // part
        expected = [rule.count(int(r), int(n)) for r, n in zip(reached, prompts, strict=True)]
        assert rule.count(reached, prompts).tolist() == expected
