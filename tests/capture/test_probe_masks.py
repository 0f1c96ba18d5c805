"""Masks are found by running them: however a mask is spelled, it is read exactly, kept as a table, or refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import decoders
import kvpass
from kvpass.capture import capture
from kvpass.capture.probe import Mask
from kvpass.errors import CaptureError
from kvpass.ir.check import compare
from kvpass.ir.sites import SiteFinder
from kvpass.runtime.transformed import Transformed

HEADS, DIM = 4, 32
SPELLINGS = ("masked_fill", "added minimum", "where", "sdpa bool", "sdpa float")


class Layer(torch.nn.Module):
    """Attention alone, in one of the spellings that models use."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling = spelling
        self.norm = decoders.RMSNorm(DIM)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x, seen, bias):
        def heads(t):
            return t.view(t.shape[0], t.shape[1], HEADS, DIM // HEADS).transpose(1, 2)

        q, k, v = (heads(p(self.norm(x))) for p in (self.q, self.k, self.v))
        least = torch.finfo(x.dtype).min
        if self.spelling.startswith("sdpa"):
            mask = seen
            if bias is not None or self.spelling == "sdpa float":
                mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) + (0 if bias is None else bias)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            scores = scores if bias is None else scores + bias
            if self.spelling == "masked_fill":
                scores = scores.masked_fill(~seen, -torch.inf)
            elif self.spelling == "where":
                scores = torch.where(seen, scores, least)
            else:
                scores = scores + (1.0 - seen.float()) * least
            y = scores.softmax(-1) @ v
        return x + self.o(y.transpose(1, 2).flatten(2))


class Decoder(torch.nn.Module):
    """One rule of what query i may read of keys j per layer, and perhaps a bias on the scores."""

    def __init__(self, *rules, spelling="masked_fill", bias=None):
        super().__init__()
        self.rules, self.bias = rules, bias
        self.embed, self.wpe = torch.nn.Embedding(61, DIM), torch.nn.Embedding(512, DIM)
        self.layers = torch.nn.ModuleList(Layer(spelling) for _ in rules)
        self.head = torch.nn.Linear(DIM, 61, bias=False)
        decoders.randomise(self, 0)
        self.eval()

    def forward(self, ids):
        place = torch.arange(ids.shape[1])
        i, j = place[:, None], place[None, :]
        x = self.embed(ids) + self.wpe(place)
        for layer, rule in zip(self.layers, self.rules, strict=True):
            x = layer(x, rule(i, j), None if self.bias is None else self.bias(i, j))
        return self.head(x)


def causal(i, j):
    return j <= i


def window(size, sinks=0):
    return lambda i, j: (j <= i) & ((i - j < size) | (j < sinks))


def strict(i, j):
    return j < i


def every_third(i, j):
    return (j <= i) & ((i - j) % 3 == 0)


def masks(model):
    """The masks that were found in a decoder, or in what is captured already."""
    program = model.program if isinstance(model, Transformed) else capture(model)
    found = [program.evidence[layer]["mask"] for layer in range(program.facts.layers)]
    for site, mask in zip(SiteFinder(program), found, strict=True):
        if not mask.tabulated:
            assert (site.option("strict"), site.option("window"), site.option("sinks")) == (
                mask.strict,
                mask.window,
                mask.sinks,
            )
            assert site.optional("mask") is None, "a mask that was understood is still kept as a table"
    return found


def ids(length=30, rows=2):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(2))


def assert_same_function(model, length=30):
    """Forward and cached decode, against the module itself."""
    slim = kvpass.transform(model, progress=False)
    tokens = ids(length)
    with torch.no_grad():
        expected = model(tokens)
        assert compare(expected, slim(tokens)) < 1e-5
    logits, state = slim.prefill(tokens[:, : length // 2])
    found = [logits.unsqueeze(1)]
    found += [slim.decode(tokens[:, i : i + 1], state) for i in range(length // 2, length)]
    assert compare(expected[:, length // 2 - 1 :], torch.cat(found, dim=1)) < 1e-5
    return slim


# ---------------------------------------------------------------------- what is in the algebra

KNOWN = {
    "causal": (causal, Mask()),
    "window 1": (window(1), Mask(window=1)),
    "window 3": (window(3), Mask(window=3)),
    "window 7": (window(7), Mask(window=7)),
    "window 3, 1 sink": (window(3, 1), Mask(window=3, sinks=1)),
    "window 7, 4 sinks": (window(7, 4), Mask(window=7, sinks=4)),
    "window 40, which no short probe shows": (window(40), Mask(window=40)),
    "window 300, 4 sinks": (window(300, 4), Mask(window=300, sinks=4)),
}


def meaning(mask):
    return mask.strict, mask.window, mask.sinks, mask.slopes, mask.tabulated


@pytest.mark.parametrize(
    ("name", "spelling"),
    [(n, s) for n in KNOWN for s in SPELLINGS if n.startswith("window 3,") or s in ("masked_fill", "sdpa bool")],
)
def test_a_mask_of_the_algebra_is_found_exactly(name, spelling):
    rule, expected = KNOWN[name]
    (found,) = masks(Decoder(rule, spelling=spelling))
    assert meaning(found) == meaning(expected), f"{name} as {spelling} was read as {found}"


@pytest.mark.parametrize("name", ["window 1", "window 3, 1 sink", "window 7, 4 sinks"])
def test_what_was_read_computes_what_was_written(name):
    slim = assert_same_function(Decoder(KNOWN[name][0], causal))
    assert [c.window for c in slim.plan] == [KNOWN[name][1].window, 0]


@pytest.mark.parametrize("spelling", ["sdpa bool", "sdpa float"])
def test_a_strict_mask_is_found_and_its_empty_row_reads_nothing(spelling):
    model = Decoder(strict, causal, spelling=spelling)
    assert [str(m) for m in masks(assert_same_function(model))] == ["strict", "causal"]


@pytest.mark.parametrize("spelling", ["added minimum", "where"])
def test_a_strict_mask_whose_first_row_reads_everything_is_no_strict_mask(spelling):
    """With the least number in place of minus infinity, a row that is hidden as a whole averages all tokens, later ones
    too. Strict attention gives that row nothing: another function, so it must be refused or be the same."""
    model = Decoder(strict, causal, spelling=spelling)
    try:
        slim = kvpass.transform(model, progress=False)
    except CaptureError:
        return
    with torch.no_grad():
        assert compare(model(ids()), slim(ids())) < 1e-5, "captured as another function"


@pytest.mark.parametrize("spelling", ["where", "sdpa bool"])
def test_alibi_slopes_are_read_off_exactly(spelling):
    slopes = torch.tensor([0.5, 0.25, 0.0625, 0.3125])
    model = Decoder(causal, window(5), spelling=spelling, bias=lambda i, j: slopes.view(-1, 1, 1) * (j - i))
    found = masks(assert_same_function(model))
    assert [m.slopes for m in found] == [tuple(slopes.tolist())] * 2
    assert [m.window for m in found] == [0, 5]


def test_alibi_over_key_positions_means_the_same():
    """BLOOM adds slope * j: softmax takes no notice of what is constant over a row."""
    slopes = torch.tensor([0.5, 0.25, 0.0625, 0.3125])
    model = Decoder(causal, bias=lambda i, j: slopes.view(-1, 1, 1) * j)
    assert masks(assert_same_function(model))[0].slopes == tuple(slopes.tolist())


def test_a_mask_in_a_registered_table_is_read_too():
    class Table(Decoder):
        def __init__(self):
            super().__init__(causal)
            self.register_buffer("table", torch.ones(128, 128).tril().triu(-39).bool())

        def forward(self, ids):
            self.rules = (lambda i, j: self.table[: ids.shape[1], : ids.shape[1]],)
            return super().forward(ids)

    assert str(masks(Table())[0]) == "causal + window 40"


# ---------------------------------------------------------------------- what is kept as a table

ODD = {
    "every third token": every_third,
    "one token that nobody sees": lambda i, j: (j <= i) & ((j != 5) | (i == j)),
    "blocks of 8": lambda i, j: (j <= i) & (i // 8 == j // 8),
    "a hole far away": lambda i, j: (j <= i) & ((j != 50) | (i == j)),
    "heads apart": lambda i, j: torch.stack([(j <= i) & (i - j < 2 + h) for h in range(HEADS)]),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_mask_is_kept_as_a_table_and_decodes(name):
    model = Decoder(ODD[name], causal, spelling="sdpa bool")
    slim = assert_same_function(model, length=60)
    odd, plain = masks(slim)
    assert odd.tabulated, f"{name} was read as {odd}"
    assert not plain.tabulated
    assert [bool(c.positions) for c in slim.plan] == [True, False]


def test_a_bias_that_is_not_linear_is_kept_as_a_table():
    model = Decoder(causal, spelling="sdpa float", bias=lambda i, j: -0.1 * (i - j).float().sqrt().nan_to_num())
    assert "not ALiBi" in masks(assert_same_function(model))[0].tabulated


# ---------------------------------------------------------------------- what is refused

AHEAD = {
    "everything": lambda i, j: (i - j) < 10**6,
    "one token ahead": lambda i, j: j <= i + 1,
    "a prefix of 4": lambda i, j: (j <= i) | (j < 4),
    "one query that sees the next": lambda i, j: (j <= i) | ((i == 9) & (j == 10)),
    "a later query that sees the next": lambda i, j: (j <= i) | ((i == 100) & (j == 101)),
}


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", AHEAD)
def test_looking_ahead_is_refused_and_the_layer_is_named(name, layer):
    rules = [causal] * 3
    rules[layer] = AHEAD[name]
    with pytest.raises(CaptureError) as found:
        kvpass.transform(Decoder(*rules, spelling="sdpa bool"), progress=False)
    assert f"layer {layer}" in str(found.value), str(found.value)


def test_a_mask_that_depends_on_the_tokens_is_refused():
    class Padding(Decoder):
        def forward(self, ids):
            self.rules = (causal, lambda i, j: ((j <= i) & (ids != 0)[:, None, None, :]) | (i == j))
            return super().forward(ids)

    with pytest.raises(CaptureError, match="depends on the tokens") as found:
        capture(Padding(causal, causal, spelling="sdpa bool"))
    assert "layer 1" in found.value.where


@pytest.mark.parametrize("spelling", ["sdpa float", "masked_fill"])
def test_learned_slopes_are_refused(spelling):
    class Learned(Decoder):
        def __init__(self):
            super().__init__(causal, causal, spelling=spelling)
            self.slopes = torch.nn.Parameter(torch.rand(HEADS))
            self.bias = lambda i, j: self.slopes.view(-1, 1, 1) * (j - i)

    with pytest.raises(CaptureError, match="learned bias") as found:
        capture(Learned())
    assert "layer 0" in found.value.what
    assert "slopes" in found.value.what


def test_a_mask_that_changes_with_the_length_is_refused():
    def first_half(i, j):
        return (j <= i) & ((j * 2 < i.shape[0]) | (i == j))

    with pytest.raises(CaptureError):
        kvpass.transform(Decoder(first_half, spelling="sdpa bool"), progress=False)


# ---------------------------------------------------------------------- mutations

CHANGES = {"window 3": window(3), "sinks": window(4, 2), "strict": strict, "odd": every_third}


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_one_layers_mask_shows_in_that_layer_only(change, layer):
    before = (Mask(), Mask(window=6), Mask(window=9, sinks=1))
    rules = [causal, window(6), window(9, 1)]
    rules[layer] = CHANGES[change]
    after = masks(Decoder(*rules, spelling="sdpa bool"))
    assert [n for n in range(3) if meaning(before[n]) != meaning(after[n])] == [layer]


def test_facts_of_a_summary_are_per_layer():
    found = kvpass.inspect(Decoder(causal, window(6), every_third, spelling="sdpa bool"))
    assert [f.mask.split(" (")[0] for f in found.layers] == ["causal", "causal + window 6", "tabulated"]
