"""Whole models whose attention runs in kernels compute what they compute with the torch references."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import interpreter  # noqa: F401  (kernels are interpreted, and quicker with it)
import kvpass
from kvpass.errors import PlanError, RequestError
from kvpass.ir.ops import REFERENCES
from kvpass.passes import EvictKV, GroupHeads, PageKV, Pass, PrunePyramid, QuantizeKV, ShareLayers, SlideWindow
from kvpass.passes.lower_attention import TWINS
from kvpass.runtime.transformed import Transformed

STEPS: dict[str, Pass] = {
    "GroupHeads": GroupHeads(1, method="first"),
    "ShareLayers, downward": ShareLayers("cla:2"),
    "ShareLayers, upward": ShareLayers("lckv:1"),
    "SlideWindow, text": SlideWindow(6, 2),
    "SlideWindow, cache": SlideWindow(6, 2, positions="cache"),
    "QuantizeKV, int8": QuantizeKV(8),
    "QuantizeKV, int4": QuantizeKV(4, layout="token"),
    "QuantizeKV, fp8": QuantizeKV(8, kind="fp8"),
    "QuantizeKV, KIVI": QuantizeKV(4, layout="kivi", group=16, residual=0),
    "EvictKV, snapkv": EvictKV("snapkv", budget=10, window=3),
    "EvictKV, h2o": EvictKV("h2o", budget=10),
    "EvictKV, tova": EvictKV("tova", budget=10),
    "PrunePyramid": PrunePyramid(schedule="pyramidinfer", decay=0.6),
    "PageKV": PageKV(4),
}
PAIRS = [
    ("ShareLayers, downward", "QuantizeKV, KIVI"),
    ("ShareLayers, downward", "SlideWindow, text"),
    ("ShareLayers, upward", "QuantizeKV, int4"),
    ("ShareLayers, upward", "PageKV"),
    ("SlideWindow, text", "QuantizeKV, int8"),
    ("SlideWindow, cache", "QuantizeKV, int4"),
    ("SlideWindow, text", "PageKV"),
    ("SlideWindow, text", "PrunePyramid"),
    ("QuantizeKV, int4", "PageKV"),
    ("QuantizeKV, fp8", "EvictKV, tova"),
    ("QuantizeKV, int8", "PrunePyramid"),
    ("EvictKV, snapkv", "PrunePyramid"),
]
PROMPT = 19


def combinations() -> list[tuple[str, ...]]:
    """No pass, every pass, and pairs whose caches differ from those of both; KVPASS_KERNELS=full takes every pair."""
    pairs = PAIRS
    if os.environ.get("KVPASS_KERNELS") == "full":
        every = itertools.combinations(STEPS, 2)
        pairs = [p for p in every if p[0].split(",")[0] != p[1].split(",")[0]]
    return [(), *((name,) for name in STEPS), *pairs]


def decoder(**changes) -> LlamaForCausalLM:
    options = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(options | changes))).eval()


@pytest.fixture(scope="module")
def dense() -> Transformed:
    return kvpass.transform(decoder(), progress=False, verify="off")


def run(model: Transformed) -> list[torch.Tensor]:
    """Logits of a text at once, of a ragged batch of prompts, and of the steps after it."""
    ids = torch.randint(0, 64, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = [model(ids)]
        logits, state = model.prefill(ids, torch.tensor([PROMPT, 8]))
        found.append(logits)
        for count in (1, 2):
            step = torch.randint(0, 64, (2, count), generator=torch.Generator().manual_seed(count))
            found.append(model.decode(step, state))
    return found


@pytest.mark.parametrize("names", combinations(), ids=lambda names: " + ".join(names) or "nothing")
def test_every_plan_runs_in_kernels_as_in_torch(dense, names):
    steps = [STEPS[n] for n in names]
    try:
        reference = kvpass.transform(dense, steps, progress=False, verify="off", backend="reference")
    except PlanError:  # tests/test_algebra.py says which and why
        if names in PAIRS:
            raise
        return
    kernels = kvpass.transform(dense, steps, progress=False, verify="off", backend="triton")
    lowered = kernels.executor.lowering
    assert lowered
    assert not [e for e in lowered if e.reason], kernels.lowering
    coded = any("QuantizeKV" in n for n in names)
    for found, expected in zip(run(kernels), run(reference), strict=True):
        error = (found - expected).abs() / expected.abs().max()
        # a code on the edge between two may fall to the other side of it in one entry, not in most
        assert error.quantile(0.75 if coded else 1.0) < 1e-5
        assert error.max() < (0.05 if coded else 1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"head_dim": 320, "hidden_size": 320, "num_attention_heads": 1, "num_key_value_heads": 1}, "256 channels")],
)
def test_what_kernels_cannot_do_keeps_its_reference_and_says_why(changes, reason):
    model = kvpass.transform(decoder(**changes), progress=False, verify="off", backend="triton")
    assert all(reason in entry.reason for entry in model.executor.lowering)
    assert reason in model.lowering
    expected = kvpass.transform(model, progress=False, verify="off", backend="reference")
    for found, right in zip(run(model), run(expected), strict=True):
        assert torch.equal(found, right)


def test_two_bits_fixed_scales_and_persistence_keep_their_references(dense):
    two = kvpass.transform(dense, [QuantizeKV(2, layout="token")], progress=False, verify="off", backend="triton")
    assert all("not 2" in entry.reason for entry in two.executor.lowering)
    fixed = [QuantizeKV(8, layout="static")]
    text = [torch.arange(600) % 50]
    model = kvpass.transform(dense, fixed, calibration=text, progress=False, verify="off", backend="triton")
    assert all("fixed ones" in entry.reason for entry in model.executor.lowering)
    lasting = [EvictKV("scissorhands", budget=40)]
    model = kvpass.transform(dense, lasting, progress=False, verify="off", backend="triton")
    reasons = {entry.op: entry.reason for entry in model.executor.lowering}
    assert "every query's weights" in reasons["column_mass"]
    assert reasons["attention"] == reasons["attend_kept"] == ""


def test_the_table_names_every_site_of_every_entry(dense):
    model = kvpass.transform(dense, [QuantizeKV(8)], progress=False, verify="off", backend="triton")
    lines = model.lowering.splitlines()
    assert lines[0].split() == ["entry", "layer", "op", "runs", "as"]
    assert sorted(line.split()[:3] for line in lines[1:]) == sorted(
        [entry, str(layer), "attention" if entry == "forward" else "attend"]
        for entry in ("forward", "prefill", "decode")
        for layer in range(2)
    )
    assert "reference" in kvpass.transform(dense, progress=False, verify="off", backend="reference").lowering


def test_gradients_flow_through_kernels_as_through_torch(dense):
    ids = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(2))
    gradients = []
    for backend in ("reference", "triton"):
        model = kvpass.transform(dense, [SlideWindow(4, 1)], progress=False, verify="off", backend=backend)
        held = model.executor.weights().items()
        weights = {n: t.requires_grad_() for n, t in held if isinstance(t, torch.nn.Parameter)}
        for tensor in weights.values():
            tensor.grad = None
        model(ids).square().mean().backward()
        gradients.append({n: t.grad.clone() for n, t in weights.items() if t.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, atol=1e-6), name


class Calls(TorchDispatchMode):
    """What is called with which shapes and numbers: all that a CUDA graph would record."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        def told(value: object) -> object:
            if isinstance(value, torch.Tensor):
                return (tuple(value.shape), value.stride(), value.dtype)
            if isinstance(value, list | tuple):
                return tuple(told(v) for v in value)
            return value

        name = str(function)
        assert name not in ("aten._local_scalar_dense.default", "aten.nonzero.default"), "a step waits for the device"
        self.seen.append((name, told(arguments), told(list((options or {}).items()))))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["", "SlideWindow, text", "QuantizeKV, int8", "QuantizeKV, KIVI", "PageKV"])
def test_a_step_of_decoding_is_the_same_program_at_every_length(dense, name):
    steps = [STEPS[name]] if name else []
    model = kvpass.transform(dense, steps, progress=False, verify="off", backend="triton")
    _, state = model.prefill(torch.zeros((2, 3), dtype=torch.long), capacity=64)
    recorded = []
    for _ in range(3):
        graphs = model.executor.graphs
        graphs.step(torch.zeros((2, 1), dtype=torch.long), state)
        ((_, recording),) = state.recordings.values()
        with Calls() as calls:
            graphs._run(recording)
        recorded.append(calls.seen)
        model.decode(torch.zeros((2, 5), dtype=torch.long), state)
    assert recorded[0] == recorded[1] == recorded[2]
    assert model.executor.graphs.recorded == 1


@pytest.mark.parametrize(
    "name",
    ["ShareLayers, upward", "SlideWindow, cache", "QuantizeKV, int4", "EvictKV, snapkv", "EvictKV, h2o", "PageKV"],
)
def test_a_recorded_step_gives_what_a_step_gives(dense, name):
    steps = [STEPS[name]] if name else []
    model = kvpass.transform(dense, steps, progress=False, verify="off", backend="triton")
    assert model.executor.steady
    ids = torch.randint(0, 64, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    states = [model.prefill(ids, torch.tensor([PROMPT, 8]), capacity=64)[1] for _ in range(2)]
    for index in range(3):
        step = ids[:, index : index + 1]
        expected = model.decode(step, states[0])
        found = model.executor.graphs.step(step, states[1])
        states[1].advance(1)
        assert torch.equal(found, expected)
    assert model.executor.graphs.recorded == 1


def test_a_recording_goes_with_the_caches_that_it_holds(dense):
    model = kvpass.transform(dense, progress=False, verify="off", backend="triton")
    ids = torch.zeros((1, 3), dtype=torch.long)
    states = [model.prefill(ids, capacity=16)[1] for _ in range(2)]
    for _ in range(2):
        for state in states:  # two texts in turn do not record again and again
            model.executor.graphs.step(ids[:, :1], state)
            state.advance(1)
    assert model.executor.graphs.recorded == 2
    held = weakref.ref(states[0].stores[0][0])
    del state, states
    gc.collect()
    assert held() is None


def test_a_cache_that_grew_is_recorded_again(dense):
    model = kvpass.transform(dense, progress=False, verify="off", backend="triton")
    _, state = model.prefill(torch.zeros((1, 3), dtype=torch.long), capacity=5)
    reference = state.clone()
    for index in range(5):
        step = torch.full((1, 1), index)
        expected = model.decode(step, reference)
        assert torch.equal(model.executor.graphs.step(step, state), expected)
        state.advance(1)
    assert model.executor.graphs.recorded == 2


@pytest.mark.parametrize("op", sorted(map(str, TWINS)))
def test_every_twin_has_the_signature_of_its_op(op):
    (original,) = (o for o in TWINS if str(o) == op)
    twin = TWINS[original]
    assert original in REFERENCES
    ours, theirs = (str(o._schema).split("(", 1)[1] for o in (twin, original))
    assert ours == theirs


def test_a_backend_that_cannot_run_is_refused(dense, monkeypatch):
    with pytest.raises(RequestError, match="no backend 'cuda'"):
        kvpass.transform(dense, backend="cuda", verify="off", progress=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RequestError, match="no code for a cpu device"):
        kvpass.transform(dense, backend="triton", verify="off", progress=False)


def test_without_triton_the_reference_runs_and_kernels_are_refused():
    code = (
        "import sys; sys.modules['triton'] = None; import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else real(name, *a)\n"
        "import torch; from kvpass.runtime.executor import choose_backend\n"
        "print(choose_backend('auto', torch.device('cpu')))\n"
        "try: choose_backend('triton', torch.device('cpu'))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("reference\nRequestError kernels need Triton"), done.stderr
    assert "kvpass[gpu]" in done.stdout


# ---------------------------------------------------------------------- compiled and exported


def operands(op: str):
    """Arguments of a twin, small and of every kind that it takes."""
    made = torch.Generator().manual_seed(7)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made)

    q, k, v = some(2, 4, 3, 8), some(2, 2, 3, 8), some(2, 2, 3, 8)
    lengths = torch.tensor([3, 2])
    positions = torch.arange(3).expand(2, 3).contiguous()
    store = [torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8, 8)]
    where = torch.full((2, 2, 8), -1, dtype=torch.int32)
    numbers = torch.tensor([0, 4])
    rule = str(STEPS["EvictKV, snapkv"].plan(_plan())[0].keeps)
    return {
        "attention": ((q, k, v), {"scale": 0.3, "layer": 0}),
        "attend": ((q, k, v, store, numbers), {"end": 7, "ragged": True, "scale": 0.3}),
        "attend_shared": ((q, store, numbers), {"value_dim": 8, "end": 7, "ragged": True, "scale": 0.3}),
        "column_mass": ((q, k, lengths, lengths), {"rule": rule, "longest": 3, "scale": 0.3}),
        "keep": ((k, v, [*store, where], lengths, positions), {"layout": ""}),
        "observe": (
            (q, k, [torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2), torch.zeros(2, 2, dtype=torch.int32)],
             lengths, positions), {"scale": 0.3},
        ),
        "attend_kept": (
            (q[:, :, :1], k[:, :, :1], v[:, :, :1], [*store, where], lengths, lengths, lengths, lengths),
            {"end": 8, "layout": "", "rule": rule, "scale": 0.3},
        ),
    }[op]  # fmt: skip


def _plan():
    return kvpass.plan(decoder())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("op", sorted(str(o).split(".")[1] for o in TWINS))
def test_every_twin_keeps_what_torch_asks_of_an_op(op):
    arguments, options = operands(op)
    twin = getattr(torch.ops.kvpass_fused, op).default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(twin, arguments, options, test_utils=checks)


def test_a_step_is_compiled_whole(dense):
    model = kvpass.transform(dense, [QuantizeKV(8)], progress=False, verify="off", backend="triton")
    ids = torch.zeros((1, 4), dtype=torch.long)
    _, state = model.prefill(ids, capacity=16)
    arguments = model.executor.arguments(state, 1)
    taken = {n: v for n, v in arguments.items() if n in model.executor._inputs["decode"]}
    step = model.executor.entries["decode"]
    expected = step(ids[:, :1], **taken)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(ids[:, :1], **taken), expected, atol=1e-6)


def test_a_text_of_any_length_is_exported_with_its_kernels(dense):
    model = kvpass.transform(dense, [SlideWindow(4, 1)], progress=False, verify="off", backend="triton")
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(
        model.executor.entries["forward"], (ids,), dynamic_shapes=({1: length},), strict=False
    )
    targets = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert sum("kvpass_fused.attention" in t for t in targets) == 2
    other = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.allclose(exported.module()(other), model(other), atol=1e-6)
