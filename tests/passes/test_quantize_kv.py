"""QuantizeKV against the family's own model whose attention reads rounded keys and values, written out in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

import families
import kvpass
from kvpass.errors import PlanError, RequestError
from kvpass.ir.kv_format import KVFormat, decode_channels, decode_tokens, encode_channels, encode_tokens
from kvpass.ir.plan import CachePlan, LayerCache
from kvpass.passes import GroupHeads, PageKV, QuantizeKV, ShareLayers, SlideWindow
from kvpass.passes.quantize_kv import fit_scale
from properties import error
from properties import forward as whole
from written_out import captured

EXACT = 1e-6  # norms and angles are float32 in any dtype; a code that is off by one shows as 1e-3
RULE = {}

FORMATS = {
    "int8": QuantizeKV(),
    "int4": QuantizeKV(4, layout="token"),
    "int2": QuantizeKV(2, layout="token"),
    "fp8": QuantizeKV(8, kind="fp8"),
    "kivi4:8:16": QuantizeKV(4, group=8, residual=16),
    "kivi2:8:0": QuantizeKV(2, group=8, residual=0),
    "kivi8:16:16": QuantizeKV(8, layout="kivi", group=16, residual=16),
    "static8": QuantizeKV(8, layout="static"),
    "static4": QuantizeKV(4, layout="static"),
}


def straight(x, rounded):
    """`rounded` with the gradient of x."""
    return x + (rounded - x).detach()


def rounded_tokens(x, fmt):
    return straight(x, decode_tokens(*encode_tokens(x, fmt), fmt, x.shape[-1], x.dtype))


def rounded_groups(k, fmt):
    groups = [
        decode_channels(*encode_channels(part, fmt), fmt, k.shape[-1], k.dtype)
        for part in k.split(fmt.group, dim=2)
        if part.shape[2] == fmt.group
    ]
    rest = k[:, :, len(groups) * fmt.group :]
    return straight(k, torch.cat([*groups, rest], dim=2))


def rounded_at(x, scale, fmt):
    """Whole numbers of steps of a fixed size, as many as a signed code of so many bits has."""
    half = 2 ** (fmt.bits - 1)
    return straight(x, (x / scale).round().clamp(-half, half - 1) * scale)


def reads_rounded(module, query, key, value, attention_mask, scaling=None, **options):
    """Attention as KIVI and its relatives define it: a query reads in full precision what is not in a group that was
    complete, and `residual` tokens old, when it came."""
    fmt, group = RULE["format"], query.shape[1] // key.shape[1]
    length = query.shape[2]
    if fmt.layout == "kivi":
        old_k, old_v = rounded_groups(key, fmt), rounded_tokens(value, fmt)
    elif fmt.layout == "static":
        scales = RULE["scales"][module.layer_idx]
        old_k, old_v = (rounded_at(x, scale, fmt) for x, scale in zip((key, value), scales, strict=True))
    else:
        old_k, old_v = rounded_tokens(key, fmt), rounded_tokens(value, fmt)
    key, value, old_k, old_v = (t.repeat_interleave(group, dim=1) for t in (key, value, old_k, old_v))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = []
    for t in range(length):
        closed = length
        if fmt.layout == "kivi":
            closed = fmt.group * (max(0, t + 1 - fmt.residual) // fmt.group)
        seen = [torch.cat([old[:, :, :closed], new[:, :, closed:]], 2) for old, new in ((old_k, key), (old_v, value))]
        keys, values = (x[:, :, : t + 1] for x in seen)
        scores = (keys @ query[:, :, t].unsqueeze(-1)).squeeze(-1) * scale
        out.append((scores.softmax(-1).unsqueeze(2) @ values).squeeze(2))
    return torch.stack(out, dim=1).contiguous(), None


AttentionInterface.register("reads_rounded", reads_rounded)


def ids(rows=2, length=43, seed=1):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def quantized(source, *passes):
    fixed = any(step.needs_calibration for step in passes)
    text = [ids(8, 128, seed=5)] if fixed else None
    return kvpass.transform(source, list(passes), calibration=text, progress=False, verify="off")


def assert_cached(slim, tokens, expected):
    length = tokens.shape[1]
    logits, state = slim.prefill(tokens[:, :5])
    assert error(logits, expected[:, 4]) < EXACT
    place = 5
    while place < length:
        count = 1 if place % 3 else min(7, length - place)
        found = slim.decode(tokens[:, place : place + count], state)
        assert error(found, expected[:, place : place + count]) < EXACT, f"{count} tokens from {place} on"
        place += count
    for chunk in (length, 9):
        assert error(slim.prefill(tokens, chunk=chunk)[0], expected[:, -1]) < EXACT
    rows, lengths = torch.arange(2), torch.tensor([19, 3])
    logits, state = slim.prefill(tokens[:, :19], lengths, chunk=8)
    assert error(logits, expected[rows, lengths - 1]) < EXACT
    for count in (1, 1, 11, 1):
        where = state.lengths.view(-1, 1) + torch.arange(count)
        found = slim.decode(tokens[rows.view(-1, 1), where], state)
        assert error(found, expected[rows.view(-1, 1), where]) < EXACT
    return state


# ---------------------------------------------------------------------- the meaning


@pytest.fixture(scope="module")
def variants():
    return {name: quantized(captured(), step) for name, step in FORMATS.items()}


def model_that_rounds(name, fmt, slim=None):
    RULE["format"] = KVFormat.parse(fmt)
    if RULE["format"].layout == "static":
        RULE["scales"] = [
            [slim.program.read(f"layers.{layer}.{part}_scale") for part in "kv"] for layer in range(len(slim.plan))
        ]
    return families.build(name, attn_implementation="reads_rounded").double()


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_way_of_running_reads_what_the_cache_gives_back(fmt, variants):
    slim, tokens = variants[fmt], ids()
    with torch.no_grad():
        expected = model_that_rounds("llama", fmt, slim)(tokens, use_cache=False).logits
    assert {str(c.format) for c in slim.plan} == {fmt}
    assert error(whole(slim, tokens), expected) < EXACT
    state = assert_cached(slim, tokens, expected)
    assert error(expected, whole(captured(), tokens)) > 1e-3, "nothing was rounded"
    state.select(torch.tensor([1, 1, 0]))
    copy = state.clone()
    token = torch.tensor([[7], [8], [9]])
    first = slim.decode(token, state)
    assert torch.equal(first, slim.decode(token, copy))


def test_fewer_bits_lose_more(variants):
    exact = whole(captured(), ids())
    off = {fmt: error(whole(slim, ids()), exact) for fmt, slim in variants.items()}
    assert off["int8"] < off["int4"] < off["int2"]
    assert off["kivi8:16:16"] < off["kivi4:8:16"] < off["kivi2:8:0"]
    assert off["int8"] < off["fp8"] < off["int2"]


def test_what_is_recent_is_exact(variants):
    """Until the first group is complete and old enough, KIVI is the model itself."""
    for fmt, tokens in (("kivi4:8:16", 23), ("kivi8:16:16", 31), ("kivi2:8:0", 7)):
        exact = whole(captured(), ids())
        found = whole(variants[fmt], ids())
        assert error(found[:, :tokens], exact[:, :tokens]) < EXACT
        assert error(found[:, tokens], exact[:, tokens]) > 1e-4, f"{fmt}: token {tokens} reads no closed group"


@pytest.mark.parametrize("fmt", ["int4", "fp8", "kivi4:8:16"])
def test_gradients_pass_straight_through(fmt):
    tokens = ids(length=30)
    target = torch.randn(2, 30, 97, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model = model_that_rounds("llama", fmt)
    (model(tokens, use_cache=False).logits * target).sum().backward()
    slim = quantized(captured(), FORMATS[fmt])
    weights, expected = slim.executor.weights(), dict(model.named_parameters())
    names = [f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in "qkvo"]
    for name in names:
        weights[name].requires_grad_(True)
    (slim(tokens) * target).sum().backward()
    for name in names:
        spread = float(expected[name].grad.abs().max())
        assert spread > 1e-2
        assert error(weights[name].grad, expected[name].grad) < 1e-5 * spread, name


# ---------------------------------------------------------------------- memory


def bytes_by_hand(fmt, length, dim=8, itemsize=8):
    """Bytes of one KV head of one row, keys and values: codes, scales, and what is kept exact."""
    per_token = {
        "int8": 2 * (dim + 2),
        "fp8": 2 * (dim + 2),
        "int4": 2 * (dim // 2 + 4),
        "int2": 2 * (dim // 4 + 4),
        "static8": 2 * dim,
        "static4": 2 * (dim // 2),
    }
    if fmt in per_token:
        return length * per_token[fmt]
    bits, group, residual = (int(n) for n in fmt.removeprefix("kivi").split(":"))
    groups = max(0, length - residual) // group
    codes = 2 * groups * group * dim * bits // 8
    scales = groups * dim * 4 + groups * group * 4
    return codes + scales + min(length, residual + group) * 2 * dim * itemsize


@pytest.mark.parametrize("fmt", FORMATS)
def test_bytes_count_scales_and_what_is_kept_exact(fmt, variants):
    slim = variants[fmt]
    for length in (3, 16, 32, 43):
        by_hand = 2 * 2 * bytes_by_hand(fmt, length)  # two layers of two KV heads
        assert slim.plan.bytes(3, length) == 3 * by_hand
    _, state = slim.prefill(ids(3, 32))
    tensors = sum(t.nbytes for store in state.stores.values() for t in store)
    assert state.allocated_bytes() == tensors + 3 * 8
    assert state.used_bytes() == 3 * 4 * bytes_by_hand(fmt, 32)
    unused = 0
    if fmt.startswith("kivi"):  # room for all groups, of which the recent ones are not written yet
        group, residual = (int(n) for n in fmt.split(":")[1:])
        bits = int(fmt.split(":")[0].removeprefix("kivi"))
        open_ = 32 - max(0, 32 - residual) // group * group
        unused = open_ * (2 * 8 * bits // 8 + 4) + open_ // group * 8 * 4
        assert [t.shape[2] for t in state.stores[0]] == [32, 32 // group, 32, 32, residual + group, residual + group]
        unused += max(0, residual + group - 32) * 2 * 8 * 8
    assert tensors == state.used_bytes() + 3 * 4 * unused
    if not fmt.startswith("kivi"):
        assert slim.plan.bytes_per_token() == 4 * bytes_by_hand(fmt, 1)


def test_a_cache_grows_and_keeps_its_codes(variants):
    for fmt in ("int4", "kivi4:8:16"):
        slim, tokens = variants[fmt], ids()
        expected = whole(slim, tokens)
        _, state = slim.prefill(tokens[:, :20])
        before = state.allocated_bytes()
        found = slim.decode(tokens[:, 20:], state)
        assert error(found, expected[:, 20:]) < EXACT
        assert state.allocated_bytes() > before


# ---------------------------------------------------------------------- with other passes


@pytest.mark.parametrize(
    "steps",
    [
        (QuantizeKV(4, layout="token"), SlideWindow(7, 3)),
        (SlideWindow(7, 3, positions="cache"), QuantizeKV(2)),
        (QuantizeKV(), PageKV(4)),
        (ShareLayers("0_0"), QuantizeKV(4, group=8, residual=8)),
        (QuantizeKV(8, kind="fp8"), ShareLayers("1_1", upward=True, tolerance=0.0)),
        (GroupHeads(1), QuantizeKV(4, group=8, residual=8)),
        (GroupHeads(1), SlideWindow((6, 0), 2), QuantizeKV(4, layout="static")),
        (ShareLayers("0_0"), QuantizeKV(8, layout="static"), PageKV(4)),
        (SlideWindow(8, 2, positions="cache"), QuantizeKV(8, layout="static")),
    ],
    ids=["int4, window", "window, int2", "int8, paged", "shared, kivi", "fp8, upward", "grouped, kivi"]
    + ["grouped, window, static", "shared, static, paged", "cache positions, static"],
)
def test_the_cache_of_several_passes(steps):
    slim, tokens = quantized(captured(), *steps), ids()
    assert_cached(slim, tokens, whole(slim, tokens))
    assert all(not c.format.full for c in slim.plan)


def test_a_scale_is_where_least_is_lost_and_what_is_lost_is_told():
    x = torch.randn((2, 3, 500, 4), generator=torch.Generator().manual_seed(3))
    x[..., 1] *= 40
    x[..., 2] = 0
    for bits, most in ((8, 0.009), (4, 0.13)):
        fmt = KVFormat("int", bits, "static")
        scale, lost = fit_scale([x[:1], x[1:]], fmt)
        assert scale.shape == (3, 1, 4)
        rounded = rounded_at(x, scale, fmt)
        assert abs(lost - float((rounded - x).norm() / x.norm())) < 1e-6
        assert lost < most
        assert torch.equal(rounded[..., 2], x[..., 2])
        for factor in (0.8, 1.2):
            assert (rounded_at(x, scale * factor, fmt) - x).norm() > (rounded - x).norm()
    whole_range = x.abs().amax((0, 2)).unsqueeze(1).clamp_min(1e-9)
    assert (rounded_at(x, whole_range / 7, fmt) - x).norm() > 1.1 * (rounded - x).norm(), "clipping gained nothing"


def test_the_report_says_what_calibration_found():
    slim = kvpass.transform(
        families.build("llama"), [QuantizeKV(8, layout="static")], calibration=[ids(8, 128)], progress=False
    )
    for layer in slim.report.passes[-1].details:
        assert layer["stored"] == "static8"
        assert 0.001 < layer["keys_error"] < 0.02
        assert 0.001 < layer["values_error"] < 0.02
    assert slim.plan.bytes_per_token() * 4 == kvpass.plan(families.build("llama")).bytes_per_token()
    without = [QuantizeKV(8, layout="static")]
    with pytest.raises(RequestError, match="needs calibration text"):
        kvpass.transform(families.build("llama"), without, progress=False)


def test_a_family_with_windows():
    slim, tokens = quantized(captured("mistral"), QuantizeKV(4)), ids()
    assert {str(slim.plan.layout(owner)) for owner in slim.plan.owners()} == {"int4;window=5"}
    assert_cached(slim, tokens, whole(slim, tokens))


def test_the_layout_that_is_chosen():
    plan = captured().plan

    def chosen(step, *before):
        made = plan
        for other in before:
            made = other.plan(made)
        return {str(c.format) for c in step.plan(made)}

    assert chosen(QuantizeKV()) == {"int8"}
    assert chosen(QuantizeKV(4)) == {"kivi4:32:32"}
    assert chosen(QuantizeKV(2, group=16, residual=64)) == {"kivi2:16:64"}
    assert chosen(QuantizeKV(8, kind="fp8")) == {"fp8"}
    assert chosen(QuantizeKV(4, layout="token")) == {"int4"}
    assert chosen(QuantizeKV(8, layout="kivi")) == {"kivi8:32:32"}
    assert chosen(QuantizeKV(4), PageKV()) == {"int4"}
    assert chosen(QuantizeKV(4), SlideWindow(8)) == {"int4"}
    assert chosen(QuantizeKV(4), SlideWindow((8, 0))) == {"int4"}
    assert chosen(QuantizeKV(4), ShareLayers("1_1", upward=True)) == {"int4"}
    assert chosen(QuantizeKV(4), ShareLayers("0_0")) == {"kivi4:32:32"}


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ((SlideWindow(8), QuantizeKV(4, layout="kivi")), "a window, which would cut through KIVI's groups"),
        ((QuantizeKV(4), SlideWindow((8, 0))), "layer 0 keeps a window, which would cut through KIVI's groups"),
        ((PageKV(), QuantizeKV(4, layout="kivi")), "a buffer of its own, which pages do not hold"),
        ((QuantizeKV(4), PageKV()), "a buffer of its own, which pages do not hold"),
        ((QuantizeKV(8), QuantizeKV(4)), r"layer 0 is quantized already \(int8\)"),
        ((QuantizeKV(8), GroupHeads(1)), "in full precision"),
        ((QuantizeKV(8, layout="static"), ShareLayers("0_0")), "scaled per layer already"),
        ((ShareLayers("1_1", upward=True), QuantizeKV(8, layout="static")), "scales are calibrated in one"),
        ((QuantizeKV(2, layout="static"),), "integers of 8 or 4 bits, not 'int' of 2"),
        ((QuantizeKV(8, kind="fp8", layout="static"),), "integers of 8 or 4 bits, not 'fp8' of 8"),
        ((QuantizeKV(3),), "bits 8 or 4 or 2, not 3"),
        ((QuantizeKV(4, kind="fp8"),), "bits 8, not 4"),
        ((QuantizeKV(8, kind="fp8", layout="kivi"),), "layout 'kivi' stores integers, not kind 'fp8'"),
        ((QuantizeKV(4, group=7),), "group must be a power of two from 8 on, not 7"),
        ((QuantizeKV(4, group=16, residual=24),), "residual must be a multiple of the group of 16 tokens, not 24"),
        ((QuantizeKV(4, residual=-32),), "residual must be a multiple"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_is_refused(steps, match):
    plan = captured().plan
    for step in steps[:-1]:
        plan = step.plan(plan)
    with pytest.raises(PlanError, match=match) as caught:
        steps[-1].plan(plan)
    assert caught.value.fix


@pytest.mark.parametrize(("key_dim", "value_dim"), [(8, 7), (7, 8)])
def test_heads_that_do_not_fill_bytes_are_refused(key_dim, value_dim):
    plan = CachePlan((LayerCache(0, 4, 2, key_dim, value_dim, torch.float32),))
    for step, per_byte in ((QuantizeKV(4), 2), (QuantizeKV(2), 4), (QuantizeKV(4, layout="token"), 2)):
        with pytest.raises(PlanError, match=f"packs {per_byte} channels into a byte, which does not divide 7 channels"):
            step.plan(plan)
    assert str(QuantizeKV(8).plan(plan)[0].format) == "int8"
    even = CachePlan((LayerCache(0, 4, 2, 6, 6, torch.float32),))
    assert str(QuantizeKV(4, layout="token").plan(even)[0].format) == "int4"
    with pytest.raises(PlanError, match="does not divide 6 channels"):
        QuantizeKV(2).plan(even)


# ---------------------------------------------------------------------- in use


@pytest.mark.parametrize("fmt", ["int4", "kivi4:8:16"])
def test_generation_is_over_the_same_logits(fmt, variants):
    slim, prompt = variants[fmt], ids(length=6)
    found = slim.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert torch.equal(found[:, 6:], whole(slim, found)[:, 5:-1].argmax(-1))
    beams = slim.generate(
        prompt, max_new_tokens=26, num_beams=3, do_sample=False, eos_token_id=None, length_penalty=0.0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    logits = whole(slim, beams.sequences).log_softmax(-1)[:, 5:-1]
    total = logits.gather(-1, beams.sequences[:, 6:].unsqueeze(-1)).sum((1, 2))
    assert error(beams.sequences_scores.double(), total) < 1e-4


def test_the_checks_of_the_cache_hold_in_float32():
    slim = kvpass.transform(families.build("llama"), FORMATS["kivi4:8:16"], progress=False)
    assert any("cached decode" in note for note in slim.report.notes)


@pytest.mark.parametrize("fmt", ["kivi4:8:16", "static8"])
def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path, variants, fmt):
    slim, tokens = variants[fmt], ids()
    slim.save(tmp_path / "out")
    back = kvpass.load(tmp_path / "out")
    assert back.plan == slim.plan
    assert torch.equal(whole(back, tokens), whole(slim, tokens))
    states = [m.prefill(tokens[:, :31])[1] for m in (slim, back)]
    assert torch.equal(*(m.decode(tokens[:, 31:], s) for m, s in zip((slim, back), states, strict=True)))
