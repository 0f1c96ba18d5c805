"""`OnnxModel` gives what torch gives: rows together and alone, prompts in parts, windows, text drawn from a seed."""

from __future__ import annotations

import builtins
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import kvpass
from export_models import captured
from kvpass.errors import RequestError, SourceError
from kvpass.export.onnx import runner
from kvpass.export.onnx.runner import OnnxModel
from kvpass.passes import GroupHeads, QuantizeKV, ShareLayers, SlideWindow

POSITIONS = 64
RECIPES = {
    "as it is": [],
    "shared layers": [ShareLayers("cla:2")],
    "fewer heads and a window": [GroupHeads((2, 1), method="first"), SlideWindow((0, 8), (0, 0))],
    "shared windows": [ShareLayers("cla:2"), SlideWindow(8, 0)],
    "a layer reads one above it": [ShareLayers("1_1", upward=True)],
    "likewise, in at most two passes": [ShareLayers("1_1", upward=True, passes=2)],
    "likewise, come what may": [ShareLayers("1_1", upward=True, passes=2, fallback=False)],
    "8 bits": [QuantizeKV(8, layout="static")],
}
EXACT = [name for name in RECIPES if name != "likewise, come what may"]
TEXT = [torch.randint(0, 97, (8, 128), generator=torch.Generator().manual_seed(1))]


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Exports by the name of their recipe: the model, and the folder."""

    @functools.cache
    def make(recipe: str, dtype: str = "fp32"):
        model = kvpass.transform(captured("llama"), RECIPES[recipe], calibration=TEXT, progress=False, verify="off")
        folder = tmp_path_factory.mktemp("packages") / "out"
        model.export_onnx(folder, dtype=dtype, positions=POSITIONS)
        return model, folder

    return make


@pytest.fixture(scope="module", params=EXACT, ids=EXACT)
def pair(request, packages):
    model, folder = packages(request.param)
    return model, OnnxModel.open(folder, threads=1)


@pytest.fixture
def run(packages) -> OnnxModel:
    return OnnxModel.open(packages("as it is")[1], threads=1)


@pytest.fixture
def package(packages, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packages("as it is")[1], tmp_path / "copy"))


def some_ids(rows: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def torch_logits(model, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids).numpy()


@pytest.mark.parametrize(
    ("recipe", "reads"),
    [("a layer reads one above it", None), (EXACT[5], [12, 12] + [1] * 12), ("likewise, come what may", [12, 12])],
)
def test_a_prompt_is_read_in_passes_until_it_stands_still_and_then_token_by_token(packages, recipe, reads) -> None:
    model, folder = packages(recipe)
    run, seen = OnnxModel.open(folder, threads=1), []
    inner = run._run

    def counted(tokens, *rest):
        seen.append(tokens.shape[1])
        return inner(tokens, *rest)

    run._run = counted
    ids = some_ids(1, 12)
    logits, exact = run.prefill(ids), torch_logits(packages(EXACT[4])[0], ids)[:, -1]
    if reads is None:
        assert set(seen) == {12}
        assert 2 < len(seen) <= 12
    else:
        assert seen == reads
    assert same(logits, exact) == (recipe != "likewise, come what may")
    with torch.no_grad():
        assert same(logits, model.prefill(ids)[0].numpy())


def same(found: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.abs(found - right).max() < 1e-4 * np.ptp(right))


def greedy(model, ids: list[int], count: int) -> list[int]:
    text = list(ids)
    for _ in range(count):
        text.append(int(torch_logits(model, torch.tensor([text]))[0, -1].argmax()))
    return text[len(ids) :]


def test_steps_give_the_logits_of_the_whole_text(pair) -> None:
    model, run = pair
    ids = some_ids(2, 45)
    right = torch_logits(model, ids)
    assert same(run.prefill(ids[:, :20]), right[:, 19])
    for at in range(20, 45):
        assert same(run.decode(ids[:, at : at + 1]), right[:, at])


def test_rows_of_different_lengths_give_what_they_give_alone(pair) -> None:
    model, run = pair
    lengths = [20, 9, 3, 1]
    ids = some_ids(4, 50)
    right = torch_logits(model, ids)
    padded = ids[:, :20].clone()
    padded[np.arange(20) >= np.array(lengths)[:, None]] = -100  # whatever stands there
    found = run.prefill(padded, lengths, capacity=46)
    for row, length in enumerate(lengths):
        assert same(found[row], right[row, length - 1])
    for step in range(26):
        found = run.decode(torch.stack([ids[row, [n + step]] for row, n in enumerate(lengths)]))
        for row, length in enumerate(lengths):
            assert same(found[row], right[row, length + step])


def test_a_long_prompt_is_read_in_parts(pair, monkeypatch) -> None:
    model, run = pair
    monkeypatch.setattr(runner, "CHUNK", 11)  # parts of 11, 11 and 1 tokens: the last is a step
    ids = some_ids(3, 30)
    right = torch_logits(model, ids)
    found = run.prefill(ids[:, :23], [23, 12, 5])
    assert same(found, right[np.arange(3), [22, 11, 4]])
    found = run.decode(torch.stack([ids[row, [n]] for row, n in enumerate((23, 12, 5))]))
    assert same(found, right[np.arange(3), [23, 12, 5]])


def test_text_is_that_of_torch(pair) -> None:
    model, run = pair
    ids = some_ids(2, 9, seed=5)
    right = [greedy(model, ids[0].tolist(), 40), greedy(model, ids[1, :4].tolist(), 40)]
    assert run.generate(ids, [9, 4], max_new_tokens=40, eos=()) == right


def test_a_cache_with_a_window_does_not_grow_with_the_text(packages) -> None:
    run = OnnxModel.open(packages("fewer heads and a window")[1], threads=1)
    row = 2 * 16 * 4  # bytes of a token's key and value in one of the heads, of which layer 0 has 2 and layer 1 has 1
    for capacity in (30, 60):
        run.prefill(some_ids(1, 5), capacity=capacity)
        assert run.cache_bytes == (2 * capacity + 8 + runner.SLACK) * row


def test_the_cache_is_one_buffer_for_past_and_present(run) -> None:
    run.prefill(some_ids(1, 5), capacity=9)
    held = run._buffers["0.key"]
    before = held.data_ptr()
    assert np.abs(held.numpy()[:, :, 5]).max() == 0
    run.decode([[7]])
    assert held.data_ptr() == before
    assert np.abs(held.numpy()[:, :, 5]).max() > 0


def test_a_row_ends_where_its_end_is_drawn_and_the_others_go_on(run) -> None:
    ids = some_ids(2, 6, seed=8)
    free = run.generate(ids, max_new_tokens=20, eos=())
    end = next(t for t in free[0][2:] if t not in free[1])
    stopped = run.generate(ids, max_new_tokens=20, eos=[end])
    assert stopped[0] == free[0][: free[0].index(end) + 1]
    assert stopped[1] == free[1]
    assert list(run.stream(ids[:1], max_new_tokens=20, eos=[end])) == [[t] for t in stopped[0]]
    assert run.eos == (2,)


def test_the_same_seed_draws_the_same_text_and_another_seed_another(run) -> None:
    ids = some_ids(2, 6)
    texts = [run.generate(ids, max_new_tokens=12, temperature=1.5, seed=s, eos=()) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    likeliest = run.generate(ids, max_new_tokens=12, eos=())
    assert run.generate(ids, max_new_tokens=12, temperature=0.7, top_k=1, seed=1, eos=()) == likeliest
    assert run.generate(ids, max_new_tokens=12, temperature=0.7, top_p=1e-9, seed=1, eos=()) == likeliest


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    chances = np.array([0.4, 0.3, 0.2, 0.1])
    logits = np.tile(np.log(chances).astype(np.float32), (20_000, 1))
    random = np.random.default_rng(0)

    def shares(temperature: float, top_p: float, top_k: int) -> np.ndarray:
        return np.bincount(runner._choose(logits, temperature, top_p, top_k, random), minlength=4) / len(logits)

    assert shares(1.0, 1.0, 0) == pytest.approx(chances, abs=0.015)
    assert shares(0.5, 1.0, 0) == pytest.approx(chances**2 / (chances**2).sum(), abs=0.015)
    assert shares(1.0, 0.65, 0) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.015)
    assert shares(1.0, 1.0, 3) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0], abs=0.015)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda run: run.prefill(some_ids(1, 65)), "longer than the 64"),
        (lambda run: run.prefill([[]]), "at least one token"),
        (lambda run: run.prefill([3, 4]), "at least one token"),
        (lambda run: run.prefill([[3, 4], [5]]), "pad them on the right"),
        (lambda run: run.prefill([[3.0, 4.0]]), "prompts are integers"),
        (lambda run: run.prefill([[3, 97]]), "token id 97 is none of the model's 97"),
        (lambda run: run.prefill([[3, -1]]), "token id -1"),
        (lambda run: run.prefill([[3, 4]], [3]), "lengths"),
        (lambda run: run.prefill([[3, 4]], [0]), "lengths"),
        (lambda run: run.prefill([[3, 4]], [1, 1]), "lengths"),
        (lambda run: run.generate([[3, 4]], max_new_tokens=64), "more than the 64"),
        (lambda run: run.generate([[3, 4]], max_new_tokens=0), "max_new_tokens"),
        (lambda run: run.generate([[3, 4]], temperature=-1.0), "sampling"),
        (lambda run: run.generate([[3, 4]], temperature=1.0, top_p=0.0), "sampling"),
    ],
)
def test_what_the_model_cannot_read_is_refused(run, ask, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ask(run)


def test_a_text_may_fill_every_position(run) -> None:
    assert len(run.generate([[3, 4]], max_new_tokens=63, eos=())[0]) == 63
    with pytest.raises(RequestError, match="caches hold 64 tokens"):
        run.decode([[5]])


def test_a_step_needs_a_prompt_and_a_token_of_each_row(run) -> None:
    run.prefill(some_ids(2, 4), capacity=5)
    with pytest.raises(RequestError, match="each of 2 rows"):
        run.decode([[5]])
    with pytest.raises(RequestError, match="token id 97"):
        run.decode([[5], [97]])
    run.decode([[5], [6]])
    with pytest.raises(RequestError, match="full"):
        run.decode([[5], [6]])
    fresh = OnnxModel(run.session, run._layers, run.positions, run.vocab_size, ())
    with pytest.raises(RequestError, match="call prefill first"):
        fresh.decode(np.zeros((0, 1), np.int64))


def test_half_precision_runs_with_half_the_cache(packages) -> None:
    model, folder = packages("as it is", "fp16")
    run = OnnxModel.open(folder, threads=1)
    ids = some_ids(1, 12)
    right = torch_logits(model, ids)
    found = run.prefill(ids)
    assert found.dtype == np.float32
    assert np.abs(found - right[:, -1]).max() < 2e-2 * np.ptp(right)
    assert run._buffers["0.key"].numpy().dtype == np.float16


# ---------------------------------------------------------------------- folders


def _edit(package: Path, **changes: object) -> None:
    marker = package / "kvpass-onnx.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "kvpass-onnx.json").unlink(), "no ONNX package"),
        (lambda p: (p / "kvpass-onnx.json").write_text("{"), "damaged"),
        (lambda p: (p / "kvpass-onnx.json").write_text("[]"), "damaged"),
        (lambda p: _edit(p, format=2), "format 2"),
        (lambda p: _edit(p, layers=[{"owner": 0}]), "damaged"),
        (lambda p: _edit(p, positions=None), "damaged"),
        (lambda p: _edit(p, layers=[]), "other caches"),
        (lambda p: (p / "model.onnx").unlink(), "cannot load"),
        (lambda p: (p / "model.onnx").write_bytes(b"\0" * 100), "cannot load"),
        (lambda p: (p / "model.onnx.data").unlink(), "cannot load"),
        (lambda p: (p / "model.onnx.data").write_bytes(b"\0" * 64), "cannot load"),
    ],
)
def test_a_damaged_folder_is_refused(package: Path, damage, words: str) -> None:
    damage(package)
    with pytest.raises(SourceError, match=words) as refused:
        OnnxModel.open(package)
    assert refused.value.where
    assert refused.value.fix


def test_without_onnxruntime_it_says_what_to_install(package: Path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object):
        if name.startswith("onnxruntime"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RequestError, match=r"kvpass\[onnx\]"):
        OnnxModel.open(package)


def test_a_provider_that_is_not_there_is_refused(package: Path) -> None:
    with pytest.raises(RequestError, match="has no NoSuchProvider"):
        OnnxModel.open(package, providers=["NoSuchProvider"])


# ---------------------------------------------------------------------- what the operator does
# The lowering and the runner rest on what the documentation of GroupQueryAttention does not say; each line is one fact.

W, D = 8, 16


def _attention(rows: int, names: list[list[str]], **attributes: int) -> onnxruntime.InferenceSession:
    """Nodes over one cache of `rows` rows, each given as its query, key, value, past and then its outputs."""
    kind, tensor = TensorProto.FLOAT, helper.make_tensor_value_info
    queries = sorted({n[0] for n in names if n[0].startswith("q")})
    outs = [n[5] for n in names]
    given = [tensor(q, kind, ["B", "S", D]) for q in queries]
    given += [tensor(n, kind, ["B", "K", D]) for n in sorted({m for n in names for m in n[1:3]})]
    given += [tensor(n, kind, ["B", 1, rows, D]) for n in ("pk", "pv")]
    given += [tensor("n", TensorProto.INT32, ["B"]), tensor("t", TensorProto.INT32, [])]
    nodes = [
        helper.make_node(
            "GroupQueryAttention", [*n[:5], "n", "t"], n[5:], domain="com.microsoft", num_heads=1, kv_num_heads=1,
            local_window_size=W, **attributes,
        )
        for n in names
    ]  # fmt: skip
    made = [tensor(o, kind, ["B", "S", D]) for o in outs] + [tensor(n, kind, ["B", 1, rows, D]) for n in ("nk", "nv")]
    graph = helper.make_graph(nodes, "g", given, made)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


class _Cache:
    """Calls of a session whose past and present are one buffer that begins as no numbers at all."""

    def __init__(self, session: onnxruntime.InferenceSession, batch: int, rows: int) -> None:
        self.session = session
        empty = np.full((batch, 1, rows, D), np.nan, np.float32)
        self.held = {p: onnxruntime.OrtValue.ortvalue_from_numpy(empty.copy()) for p in "kv"}

    def __call__(self, held: list[int], **given: np.ndarray) -> list[np.ndarray]:
        binding = self.session.io_binding()
        given |= {"n": np.array(held, np.int32) - 1, "t": np.array(max(held), np.int32)}
        for name, value in given.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for part, buffer in self.held.items():
            binding.bind_ortvalue_input(f"p{part}", buffer)
            binding.bind_ortvalue_output(f"n{part}", buffer)
        outs = [o.name for o in self.session.get_outputs() if o.name not in ("nk", "nv")]
        for name in outs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[2:]]


def _numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _right(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int) -> np.ndarray:
    """Attention [S, D] of queries at first, first + 1, ... to the last W of their keys."""
    rows = []
    for at, query in enumerate(q.astype(np.float64), first):
        low = max(0, at - W + 1)
        score = np.exp(k[low : at + 1] @ query / D**0.5)
        rows.append(score / score.sum() @ v[low : at + 1])
    return np.array(rows)


@pytest.mark.parametrize("rows", [W, W + 5])
@pytest.mark.parametrize("steps", [[1] * 30, [5, *[1] * 20], [20, *[1] * 20], [20, 7, 1, 19, 1]])
def test_a_window_holds_behind_its_wrap(rows: int, steps: list[int]) -> None:
    cache = _Cache(_attention(rows, [["q", "k", "v", "pk", "pv", "o", "nk", "nv"]], sliding_window_cache=1), 1, rows)
    q, k, v = _numbers(3, 1, sum(steps), D)
    at = 0
    for step in steps:
        part = {n: x[:, at : at + step] for n, x in (("q", q), ("k", k), ("v", v))}
        (found,) = cache([at + step], **part)
        assert np.abs(found[0] - _right(q[0, at : at + step], k[0], v[0], at)).max() < 1e-5
        at += step


def test_a_window_takes_no_fewer_rows_than_it_reads() -> None:
    cache = _Cache(_attention(W - 1, [["q", "k", "v", "pk", "pv", "o", "nk", "nv"]], sliding_window_cache=1), 1, W - 1)
    one = _numbers(1, 1, D)
    with pytest.raises(Exception, match="must be at least local_window_size"):
        cache([1], q=one, k=one, v=one)


def test_a_window_takes_no_prompts_of_different_lengths() -> None:
    cache = _Cache(_attention(W, [["q", "k", "v", "pk", "pv", "o", "nk", "nv"]], sliding_window_cache=1), 2, W)
    x = _numbers(2, 12, D)
    with pytest.raises(Exception, match="too small for sequence_length"):
        cache([12, 5], q=x, k=x, v=x)


def test_a_window_has_no_reader_without_keys_of_its_own() -> None:
    names = [["q", "k", "v", "pk", "pv", "o", "nk", "nv"], ["q2", "k0", "v0", "nk", "nv", "r"]]
    cache = _Cache(_attention(W, names, sliding_window_cache=1), 1, W)
    one, none = _numbers(1, 1, D), np.zeros((1, 0, D), np.float32)
    with pytest.raises(Exception, match="not supported when kv_sequence_length == 0"):
        cache([1], q=one, q2=one, k=one, v=one, k0=none, v0=none)


def test_readers_of_a_window_write_it_too_and_the_last_one_keeps_it() -> None:
    # a query that depends on the output before, as in a model: so the last writer runs when all others have read
    names = [["q", "k", "v", "pk", "pv", "o", "dk", "dv"], ["o", "k", "v", "pk", "pv", "r", "nk", "nv"]]
    cache = _Cache(_attention(W, names, sliding_window_cache=1), 1, W)
    q, k, v = _numbers(3, 1, 40, D)
    first = _right(q[0], k[0], v[0], 0)
    second = _right(first, k[0], v[0], 0)
    at = 0
    for step in (13, *[1] * 27):
        part = {n: x[:, at : at + step] for n, x in (("q", q), ("k", k), ("v", v))}
        found = cache([at + step], **part)
        for out, right in zip(found, (first, second), strict=True):
            assert np.abs(out[0] - right[at : at + step]).max() < 1e-5
        at += step


def test_a_row_alone_may_write_into_a_cache_of_many() -> None:
    # what `prefill` does with prompts of different lengths; then all rows go on together
    cache = _Cache(_attention(W, [["q", "k", "v", "pk", "pv", "o", "nk", "nv"]], sliding_window_cache=1), 2, W)
    q, k, v = _numbers(3, 2, 40, D)
    lengths = [20, 3]
    whole = {p: b.numpy().copy() for p, b in cache.held.items()}
    for row, length in enumerate(lengths):
        alone = _Cache(cache.session, 1, W)
        (found,) = alone([length], **{n: x[row : row + 1, :length] for n, x in (("q", q), ("k", k), ("v", v))})
        assert np.abs(found[0] - _right(q[row, :length], k[row], v[row], 0)).max() < 1e-5
        for part, buffer in alone.held.items():
            whole[part][row] = buffer.numpy()[0]
    cache.held = {p: onnxruntime.OrtValue.ortvalue_from_numpy(x) for p, x in whole.items()}
    for step in range(20):
        at = [n + step for n in lengths]
        part = {n: np.stack([x[b, [a]] for b, a in enumerate(at)]) for n, x in (("q", q), ("k", k), ("v", v))}
        (found,) = cache([a + 1 for a in at], **part)
        for row, a in enumerate(at):
            assert np.abs(found[row] - _right(q[row, a : a + 1], k[row], v[row], a)).max() < 1e-5
