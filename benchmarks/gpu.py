"""Attention kernels and whole models on a GPU, beside torch's attention and transformers' generation.

    python -m benchmarks.gpu [--quick] [--parts decode prefill model batch] [--minutes 60] [--memory-gb 60] [--json]
    python -m benchmarks.gpu --show benchmarks/results/gpu-nvidia-h100-80gb-hbm3.json
    python -m benchmarks.gpu --rehearse

Four parts. `decode`: one query per row over a cache, as a share of the bandwidth of a copy on the device. `prefill`:
prompts, as a share of a matrix product of the same dtype. `model`: tokens per second of a 1B Llama with random weights,
before and after each pass. `batch`: the largest batch that fits before memory runs out (the experiment of LCKV, Wu and
Tu 2024, arXiv 2405.10637), and what it decodes.

A kernel's figure is the median of rounds in which all runners and the ceiling took turns, in one process. Each launch
is a CUDA graph between two events, so neither allocation nor the host counts; before it a buffer larger than the L2
cache is written. Each runner's output is compared with float32 before it is timed. What was not measured is there with
the reason. No case begins once the minutes are over; parts of an earlier run on the same device stay in the file.

`--rehearse` walks the same code at tiny sizes on a CPU, kernels interpreted, by the clock on the wall. It measures
nothing, and is never written to benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import RESULTS, describe, keep, median, parser

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvpass.kernels.attention import Keys

PARTS = ("decode", "prefill", "model", "batch")
REHEARSAL = "REHEARSAL on a CPU with interpreted kernels: no number here is a measurement."
FORMATS = ("", "int8", "int4")
KV_HEADS = 8
PAGE = 16
SPOIL = 256 << 20  # bytes written before a launch: more than any L2 cache holds
AIMED_BYTES = 64 << 20  # of bfloat16 keys and values, from which on the aims of decoding hold
AIM_COPY, AIM_TFLOPS = 0.75, 450
AIM_TIMES = {"int8": 1.6, "int4": 2.0}
TOLERANCE = 0.05  # of the largest output: beyond it a runner computes something else


class Skipped(Exception):
    """Why something is not measured."""


@dataclass(frozen=True)
class Place:
    """Where is measured.

    Attributes:
        device: a GPU, or the CPU of a rehearsal.
        dtype: of queries, of uncoded keys and values, and of models.
        name: the device as its driver calls it.
        memory: bytes that the tensors of one case may take together.
        rounds: timings per runner.
        quick: the small grid.
    """

    device: torch.device
    dtype: torch.dtype
    name: str
    memory: int
    rounds: int
    quick: bool

    @property
    def rehearsal(self) -> bool:
        return self.device.type == "cpu"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        import torch

        if not self.rehearsal:
            torch.cuda.synchronize(self.device)


def main() -> int:
    arguments = _arguments()
    if arguments.show:
        print(markdown(json.loads(Path(arguments.show).read_text(encoding="utf-8"))), end="")
        return 0
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
        if arguments.json is not None and (not arguments.json or RESULTS in Path(arguments.json).resolve().parents):
            raise SystemExit("a rehearsal measures nothing: name a file outside benchmarks/results to look at")
    import torch
    from transformers import logging

    logging.set_verbosity_error()
    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --rehearse walks through the code on a CPU")
    place = find_place(arguments)
    machine = describe(torch.get_num_threads())
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", place.name.lower()).strip("-")
    document: dict[str, Any] = {"device": about(place), "parts": earlier(arguments.json, name, place)}
    began = time.monotonic()
    for index, part in enumerate(arguments.parts):
        left = 60 * arguments.minutes - (time.monotonic() - began)
        until = time.monotonic() + left / (len(arguments.parts) - index)
        rows: list[dict[str, Any]] = []
        document["parts"][part] = {"date": datetime.date.today().isoformat(), "quick": place.quick, "rows": rows}
        for found in MEASURES[part](place, until):
            rows += found
            keep(name, machine, document, arguments.json)  # what was measured survives an end before its time
    print(markdown(document), end="")
    return 0


def _arguments() -> argparse.Namespace:
    found = parser("Attention kernels and whole models on a GPU.")
    found.add_argument("--quick", action="store_true", help="a small grid and shallow models, in 3 minutes")
    found.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    found.add_argument("--minutes", type=float, help="begin no case after them (60; 3 for --quick), a share per part")
    found.add_argument("--memory-gb", type=float, default=60, help="what tensors of a case, or a batch, may take")
    found.add_argument("--rehearse", action="store_true", help="walk through the code on a CPU; measures nothing")
    found.add_argument("--show", metavar="FILE", help="print a file of figures as Markdown, and measure nothing")
    arguments = found.parse_args()
    arguments.minutes = arguments.minutes or (3 if arguments.quick else 60)
    return arguments


def find_place(arguments: argparse.Namespace) -> Place:
    """The GPU, or the stand-in of a rehearsal: in float16, since the interpreter gets bfloat16 wrong."""
    import torch

    memory = int(arguments.memory_gb * 2**30)
    if arguments.rehearse:
        return Place(torch.device("cpu"), torch.float16, "rehearsal", 1 << 16, 2, True)
    properties = torch.cuda.get_device_properties(0)
    memory = min(memory, int(0.9 * properties.total_memory))
    return Place(torch.device("cuda", 0), torch.bfloat16, str(properties.name), memory, 25, arguments.quick)


def about(place: Place) -> dict[str, Any]:
    """The device and the libraries that drive it."""
    from importlib.metadata import version

    import torch

    facts: dict[str, Any] = {"name": place.name, "dtype": str(place.dtype).removeprefix("torch.")}
    facts |= {"torch": version("torch"), "triton": version("triton"), "cuda": torch.version.cuda or torch.version.hip}
    if not place.rehearsal:
        properties = torch.cuda.get_device_properties(place.device)
        facts["memory_gb"] = properties.total_memory / 2**30
        facts["processors"] = properties.multi_processor_count
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def earlier(target: str | None, name: str, place: Place) -> dict[str, Any]:
    """The parts that an earlier run on this device left in the file that is about to be written."""
    path = None if target is None else Path(target) if target else RESULTS / f"{name}.json"
    if path is None or not path.is_file():
        return {}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return dict(document["parts"]) if document["device"]["name"] == place.name else {}


# ---------------------------------------------------------------------- timing


def recorded(place: Place, call: Callable[[], Any]) -> Callable[[], Any]:
    """A replay of the kernels that a call launches, without the host's time; in a rehearsal the call itself."""
    import torch

    if place.rehearsal:
        call()
        return call
    side = torch.cuda.Stream(place.device)
    side.wait_stream(torch.cuda.current_stream(place.device))
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and lets libraries make what they may not make while recording
            call()
    torch.cuda.current_stream(place.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def in_turn(place: Place, replays: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each launch, all of them once in every round; the first rounds warm up."""
    import torch

    spoil = torch.empty(1024 if place.rehearsal else SPOIL, dtype=torch.uint8, device=place.device)
    times: dict[str, list[float]] = {name: [] for name in replays}
    warm = 1 if place.rehearsal else 3
    for turn in range(place.rounds + warm):
        for name, replay in replays.items():
            spoil.zero_()  # while it runs, the host gets ahead: what it takes to launch is hidden as well
            seconds = _seconds(place, replay)
            if turn >= warm:
                times[name].append(seconds)
    return times


def _seconds(place: Place, replay: Callable[[], Any]) -> float:
    import torch

    if place.rehearsal:
        began = time.perf_counter()
        replay()
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def freed() -> None:
    """Memory of what is no longer held is given back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def said(error: BaseException) -> str:
    """The first line of what went wrong."""
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return line if isinstance(error, Skipped) else f"{type(error).__name__}: {line}"


# ---------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Shape:
    """One case of attention: B rows, S queries of T tokens, G query heads per KV head, D channels."""

    batch: int
    queries: int
    length: int
    group: int
    dim: int

    def kv_bytes(self, itemsize: int) -> int:
        """Of keys and values in full precision."""
        return 2 * self.batch * KV_HEADS * self.length * self.dim * itemsize

    def flops(self) -> float:
        """Of both products under a causal mask: half of all pairs."""
        return 2.0 * self.batch * KV_HEADS * self.group * self.queries * self.length * self.dim


@dataclass(frozen=True)
class Runner:
    """One way to compute a case.

    Attributes:
        name: kernel, format and place of the keys.
        call: gives the output [B, H, S, D].
        bytes: that have to be read and written.
        part: what the output is checked against.
    """

    name: str
    call: Callable[[], Tensor]
    bytes: int
    part: Keys


def decode_shapes(place: Place) -> list[Shape]:
    if place.rehearsal:
        return [Shape(1, 1, 32, 2, 16), Shape(1, 1, 128, 1, 16), Shape(2, 1, 128, 1, 16)]
    if place.quick:
        cases = [(64, 8192, 4, 128), (1, 131072, 4, 128), (8, 8192, 8, 128), (16, 8192, 4, 64), (1, 1024, 4, 128)]
        return [Shape(b, 1, t, g, d) for b, t, g, d in cases]
    grid = product((128, 64), (4, 1, 8), (8, 64, 1), (8192, 131072, 32768, 1024))
    return [Shape(b, 1, t, g, d) for d, g, b, t in grid]


def prefill_shapes(place: Place) -> list[Shape]:
    if place.rehearsal:
        return [Shape(1, 32, 32, 4, 16)]
    if place.quick:
        return [Shape(b, t, t, 4, d) for b, t, d in ((1, 8192, 128), (4, 2048, 128), (1, 8192, 64))]
    grid = product((128, 64), (4, 1, 8), (8192, 2048, 32768, 1024, 131072), (1, 8, 64))
    return [Shape(b, t, t, g, d) for d, g, t, b in grid if b * t <= 131072]


def measure_attention(place: Place, shapes: Sequence[Shape], until: float) -> Iterator[list[dict[str, Any]]]:
    """All runners of each shape in turn, with the ceiling among them."""
    for shape in shapes:
        if time.monotonic() > until:
            yield [{**asdict(shape), "runner": "all", "skipped": "time was up"}]
            continue
        try:
            yield _attention_rows(place, shape)
        except Exception as error:  # out of memory among them
            yield [{**asdict(shape), "runner": "all", "skipped": said(error)}]
        freed()


def _attention_rows(place: Place, shape: Shape) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    replays: dict[str, Callable[[], Any]] = {}
    ceiling, work = _copy(place) if shape.queries == 1 else _matmul(place)
    replays["ceiling"] = recorded(place, ceiling)
    q, made = _runners(place, shape)
    for name, make in made:
        row = rows[name] = {**asdict(shape), "runner": name}
        try:
            runner = make()
            row |= {"bytes": runner.bytes, "error": _error(q, runner.part, runner.call(), shape)}
            if not row["error"] <= TOLERANCE:
                raise Skipped(f"its output is off by {row['error']:.3f} of the largest")
            replays[name] = recorded(place, runner.call)
        except Exception as error:  # libraries refuse in many ways; each is a reason
            row["skipped"] = said(error)
    times = in_turn(place, replays)
    best = work / median(times["ceiling"])
    for name, row in rows.items():
        if "skipped" in row:
            continue
        seconds = median(times[name])
        done = row["bytes"] if shape.queries == 1 else shape.flops()
        row |= {"seconds": seconds, "per_second": done / seconds, "ceiling": best, "share": done / seconds / best}
        row["all_seconds"] = times[name]
        if name.startswith("kvpass") and "seconds" in rows["kvpass full"]:
            row["times_full"] = rows["kvpass full"]["seconds"] / seconds
    return list(rows.values())


def _runners(place: Place, shape: Shape) -> tuple[Tensor, list[tuple[str, Callable[[], Runner]]]]:
    """Queries, and the runners of a shape, each made when it is asked for; raises Skipped where memory ends."""
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from kvpass.kernels.attention import Keys, attention
    from kvpass.kernels.store import Store

    itemsize = place.dtype.itemsize
    held = shape.kv_bytes(itemsize)
    if held > place.memory:
        raise Skipped(f"keys and values take {held / 1e9:.0f} GB, and {place.memory / 1e9:.0f} GB are allowed")
    q, k, v = (
        torch.randn(shape.batch, heads, tokens, shape.dim, dtype=place.dtype, device=place.device)
        for heads, tokens in (
            (KV_HEADS * shape.group, shape.queries), (KV_HEADS, shape.length), (KV_HEADS, shape.length)
        )
    )  # fmt: skip
    ends = torch.full((shape.batch,), shape.length, dtype=torch.long, device=place.device)
    starts = ends - shape.queries
    scale, causal = shape.dim**-0.5, shape.queries > 1
    moved = 2 * q.numel() * itemsize
    exact = Keys((k, v), ends=ends)

    def ours(fmt: str, paged: bool) -> Runner:
        nonlocal held
        store = Store(bits=int(fmt.removeprefix("int") or 0))
        share = store.bits / (8 * itemsize) + store.parameters * 2 / (shape.dim * itemsize) if fmt else 1.0
        size = int(shape.kv_bytes(itemsize) * share)
        if fmt or paged:
            # codes lie beside their paged copy for a while
            need = size * (2 if fmt and paged else 1)
            if held + need > place.memory:
                whole = (held + need) / 1e9
                raise Skipped(f"{whole:.0f} GB at once, and {place.memory / 1e9:.0f} GB are allowed")
            held += size
        part = _part(exact, store, paged)
        table = 0 if part.table is None else part.table.numel() * part.table.element_size()
        return Runner(
            "",
            lambda: attention(q, [part], starts, scale=scale, causal=causal)[0],
            sum(t.numel() * t.element_size() for t in part.tensors) + table + moved,
            part,
        )

    def sdpa(backend: SDPBackend) -> Runner:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, scale=scale, enable_gqa=shape.group > 1
                )

        return Runner("", call, shape.kv_bytes(itemsize) + moved, exact)

    def flex() -> Runner:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()  # shapes are compiled in, and only so many variants of a function are
        mask = None
        if causal:
            mask = torch.compile(create_block_mask)(
                lambda b, h, i, j: i >= j, None, None, shape.queries, shape.length, device=place.device
            )
        function = torch.compile(flex_attention, dynamic=False)
        options: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": shape.group > 1}
        return Runner("", lambda: function(q, k, v, **options), shape.kv_bytes(itemsize) + moved, exact)

    made: list[tuple[str, Callable[[], Runner]]] = [("kvpass full", lambda: ours("", False))]
    made += [
        ("torch SDPA flash", lambda: sdpa(SDPBackend.FLASH_ATTENTION)),
        ("torch SDPA cuDNN", lambda: sdpa(SDPBackend.CUDNN_ATTENTION)),
        ("torch FlexAttention", flex),
    ]
    for fmt in FORMATS[1:]:
        made.append((f"kvpass {fmt}", lambda fmt=fmt: ours(fmt, False)))  # type: ignore[misc]
    for fmt in FORMATS:
        made.append((f"kvpass {fmt or 'full'}, pages of {PAGE}", lambda fmt=fmt: ours(fmt, True)))  # type: ignore[misc]
    return q, made


def _part(exact: Keys, store: Any, paged: bool) -> Keys:
    """Keys in the format of a store, in one stretch or in pages that lie in no order."""
    from dataclasses import replace

    import torch

    from kvpass.kernels.append import encode
    from kvpass.kernels.gather import scatter_pages

    k, v = exact.tensors
    tensors = tuple(encode(k, v, store))
    if not paged:
        return replace(exact, tensors=tensors, store=store)
    batch, heads, length, _ = tensors[0].shape
    blocks = length // PAGE
    table = torch.randperm(batch * blocks, device=tensors[0].device).view(batch, blocks).int()
    pools = []
    for x in tensors:
        pool = x.new_empty((batch * blocks, heads, PAGE, x.shape[3]))
        scatter_pages(pool, x, table, torch.zeros(batch, dtype=torch.long, device=x.device), None)
        pools.append(pool)
    return replace(exact, tensors=tuple(pools), store=replace(store, page=PAGE), table=table)


def _error(q: Tensor, part: Keys, out: Tensor, shape: Shape) -> float:
    """How far the last queries of the first row and KV head are off, of the largest output, from float32."""
    from dataclasses import replace

    from kvpass.kernels.attention import attention_reference

    last = min(16, shape.queries)
    one = replace(
        part,
        tensors=tuple((t if part.table is not None else t[:1])[:, :1] for t in part.tensors),
        table=None if part.table is None else part.table[:1],
        ends=part.ends[:1] if part.ends is not None else None,
    )
    asked = q[:1, : shape.group, -last:].float()
    right, _ = attention_reference(asked, [one], shape.length - last, scale=shape.dim**-0.5)
    found = out[:1, : shape.group, -last:].float()
    worst = float((found - right).abs().max() / right.abs().max())
    return worst if math.isfinite(worst) else math.inf


def _copy(place: Place) -> tuple[Callable[[], Any], float]:
    """A copy on the device, and the bytes that it reads and writes."""
    import torch

    size = 1 << 16 if place.rehearsal else 1 << 30
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * size


def _matmul(place: Place) -> tuple[Callable[[], Any], float]:
    """A product of square matrices, and its operations."""
    import torch

    n = 64 if place.rehearsal else 8192
    a, b = (torch.randn(n, n, dtype=place.dtype, device=place.device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * n**3


# ---------------------------------------------------------------------- whole models


def plans() -> dict[str, list[Any]]:
    """The model as it is, and after each pass."""
    from kvpass.passes import EvictKV, GroupHeads, PageKV, QuantizeKV, SlideWindow

    return {
        "as it is": [],
        "GroupHeads(2)": [GroupHeads(2, method="first", grouping="contiguous")],
        "SlideWindow(1024, 4)": [SlideWindow(1024, 4)],
        "QuantizeKV(8)": [QuantizeKV(8)],
        "QuantizeKV(4)": [QuantizeKV(4)],
        "QuantizeKV(4), per token": [QuantizeKV(4, layout="token")],
        "PageKV(16)": [PageKV(16)],
        "EvictKV(snapkv, keep=0.25)": [EvictKV("snapkv", keep=0.25)],
    }


def build(place: Place) -> Any:
    """A Llama of the shape of Llama 3.2 1B (`--quick`: a quarter of its layers) with random weights, in host memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4 if place.quick else 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    }
    if place.rehearsal:
        shape |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    config = LlamaConfig(**shape, max_position_embeddings=131072, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(place.device):  # where random numbers are quick to draw
        return LlamaForCausalLM(config).to(place.dtype).eval().cpu()


def variants(place: Place, model: Any) -> Iterator[tuple[str, Any]]:
    """Each plan's model, or why there is none; weights on the device, kernels wherever they do the work."""
    import torch

    import kvpass
    from kvpass.errors import KvpassError

    options: dict[str, Any] = {"backend": "triton", "device": place.device, "dtype": place.dtype}
    options |= {"verify": "off", "progress": False}
    base = kvpass.transform(model, **options)
    for name, steps in plans().items():
        try:
            slim = kvpass.transform(base, steps, **options)
            _ = slim.executor
            yield name, slim
        except (KvpassError, torch.OutOfMemoryError) as error:
            yield name, Skipped(said(error))


def stepper(model: Any, state: Any, token: Tensor, graphed: bool) -> Callable[[], None]:
    """One more step of greedy decoding per call, replayed as a CUDA graph or run call by call.

    Raises:
        Skipped: not all attention runs in kernels, so a step cannot be recorded.
    """
    if graphed and not model.executor.steady:
        raise Skipped("a part of attention keeps its torch reference, so a step is not recorded")

    def step() -> None:
        nonlocal token
        if graphed:
            logits = model.executor.graphs.step(token, state)
        else:
            logits = model.executor.step(token, state, None)
        state.advance(1)
        token = logits[:, -1].argmax(-1, keepdim=True)

    return step


@dataclass(frozen=True)
class Stepper:
    """Something that decodes.

    Attributes:
        run: decodes so many tokens per row, and gives the seconds that it took.
        bytes: that its cache takes.
    """

    run: Callable[[int], float]
    bytes: int


def measure_model(place: Place, until: float) -> Iterator[list[dict[str, Any]]]:
    """Tokens per second of decoding, all runners in turn."""
    cases = [(2, 40)] if place.rehearsal else [(8, 4096)] if place.quick else [(8, 8192), (1, 8192), (32, 2048)]
    if time.monotonic() > until:
        yield [{"batch": b, "context": c, "runner": "all", "skipped": "time was up"} for b, c in cases]
        return
    model = build(place)
    slims = dict(variants(place, model))
    model.to(place.device)
    for batch, context in cases:
        if time.monotonic() > until:
            yield [{"batch": batch, "context": context, "runner": "all", "skipped": "time was up"}]
            continue
        yield _model_rows(place, model, slims, batch, context)
        freed()


def _model_rows(place: Place, model: Any, slims: dict[str, Any], batch: int, context: int) -> list[dict[str, Any]]:
    import torch

    tokens, rounds = (2, 2) if place.rehearsal else (32, 10)
    room = context + (rounds + 2) * tokens + 8
    ids = torch.randint(3, model.config.vocab_size, (batch, context), device=place.device)
    made: dict[str, Callable[[], Stepper]] = {}
    for name, slim in slims.items():
        for graphed in (False, True):
            label = f"kvpass: {name}" + (", CUDA graph" if graphed else "")
            made[label] = lambda slim=slim, graphed=graphed: _stepper(place, slim, ids, room, graphed)  # type: ignore[misc]
    made["transformers: static cache, compiled"] = lambda: _generated(place, model, ids, tokens)
    rows: dict[str, dict[str, Any]] = {}
    steppers: dict[str, Stepper] = {}
    for name, make in made.items():
        rows[name] = {"batch": batch, "context": context, "runner": name}
        try:
            steppers[name] = make()
            steppers[name].run(tokens)  # compiles
            rows[name]["cache_bytes"] = steppers[name].bytes
        except Exception as error:
            steppers.pop(name, None)
            rows[name]["skipped"] = said(error)
            freed()
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            times[name].append(stepper.run(tokens) / tokens)
    for name, all_seconds in times.items():
        rows[name] |= {"tokens_per_second": batch / median(all_seconds), "all_seconds": all_seconds}
    return list(rows.values())


def _stepper(place: Place, slim: Any, ids: Tensor, room: int, graphed: bool) -> Stepper:
    """kvpass, step by step from the host or by replays."""
    if isinstance(slim, Skipped):
        raise slim
    logits, state = slim.prefill(ids, capacity=room)
    token = logits.argmax(-1, keepdim=True)
    step = stepper(slim, state, token, graphed)

    def run(count: int) -> float:
        place.wait()
        began = time.perf_counter()
        for _ in range(count):
            step()
        place.wait()
        return time.perf_counter() - began

    return Stepper(run, int(state.allocated_bytes()))


class _Clock:
    """A logits processor that notes when the first token was there, and does nothing else."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.first = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.first:
            self.place.wait()
            self.first = time.perf_counter()
        return scores


def _generated(place: Place, model: Any, ids: Tensor, tokens: int) -> Stepper:
    """transformers' `generate`, which on a GPU compiles a step over its static cache by itself."""
    import torch
    from transformers import LogitsProcessorList

    def run(count: int) -> float:
        clock = _Clock(place)
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), cache_implementation="static", do_sample=False,
                max_new_tokens=count + 1, min_new_tokens=count + 1, pad_token_id=0,
                logits_processor=LogitsProcessorList([clock]),
            )  # fmt: skip
        place.wait()
        return time.perf_counter() - clock.first

    run(tokens)
    return Stepper(run, ids.shape[0] * (ids.shape[1] + tokens + 1) * _token_bytes(model))


def _token_bytes(model: Any) -> int:
    """Keys and values of one token in a cache of transformers."""
    config = model.config
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize)


# ---------------------------------------------------------------------- how much fits


def measure_batch(place: Place, until: float) -> Iterator[list[dict[str, Any]]]:
    """The largest batch of each plan, and what it decodes."""
    import torch

    context = 48 if place.rehearsal else 4096 if place.quick else 8192
    if not place.rehearsal:
        whole = torch.cuda.get_device_properties(place.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, place.memory / whole), place.device)
    model = build(place)
    freed()
    slims = variants(place, model)
    for name, slim in slims:
        yield [_batch_row(place, f"kvpass: {name}", slim, _own_trial, context, until)]
        del slim
        freed()
    model.to(place.device)
    yield [_batch_row(place, "transformers: static cache", model, _transformers_trial, context, until)]
    if not place.rehearsal:
        torch.cuda.set_per_process_memory_fraction(1.0, place.device)


def _batch_row(
    place: Place, name: str, model: Any, trial: Callable[[Place, Any, int, int], float], context: int, until: float
) -> dict[str, Any]:
    row: dict[str, Any] = {"context": context, "runner": name, "memory_gb": place.memory / 2**30}
    if isinstance(model, Skipped):
        return row | {"skipped": said(model)}
    if time.monotonic() > until:
        return row | {"skipped": "time was up"}
    try:
        found = largest(lambda size: trial(place, model, size, context), until)
    except Exception as error:
        return row | {"skipped": said(error)}
    return row | dict(zip(("batch", "tokens_per_second", "settled"), found, strict=True))


def largest(fits: Callable[[int], float], until: float) -> tuple[int, float, bool]:
    """The largest batch that `fits` without running out of memory, to a sixteenth; what it gave; whether that is sure.

    The batch is doubled until it is too large, then the gap is halved; time that is up ends it early.
    """
    import torch

    low, high, given, size = 0, 0, 0.0, 1
    while True:
        try:
            low, given = size, fits(size)
        except torch.OutOfMemoryError:
            high = size
        freed()  # behind the handler, whose traceback holds tensors
        if high and high - low <= max(1, low // 16):
            return low, given, True
        if time.monotonic() > until:
            return low, given, False
        size = (low + high) // 2 if high else 2 * low


STEPS = 16  # tokens per row that a batch decodes to show that it fits
CHUNK_TOKENS = 16384  # of a prompt that are read at a time, so that what is searched is the room for caches


def _chunk(batch: int) -> int:
    return max(16, CHUNK_TOKENS // batch)


def _prompts(place: Place, vocabulary: int, batch: int, context: int, bytes_needed: int) -> Tensor:
    """Random prompts; a rehearsal has no memory that ends, so it ends here."""
    import torch

    if place.rehearsal and bytes_needed > place.memory:
        raise torch.OutOfMemoryError("rehearsed")
    return torch.randint(3, vocabulary, (batch, context), device=place.device)


def _own_trial(place: Place, slim: Any, batch: int, context: int) -> float:
    """Read prompts and decode; tokens per second of all rows."""
    ids = _prompts(place, slim.program.facts.vocab_size, batch, context, slim.plan.bytes(batch, context))
    steps = 2 if place.rehearsal else STEPS
    # where tokens are dropped by rank, a prompt is read at once
    chunk = None if slim.plan.selective else _chunk(batch)
    logits, state = slim.prefill(ids, capacity=context + steps + 1, chunk=chunk)
    token = logits.argmax(-1, keepdim=True)
    for step in range(steps + 1):
        if step == 1:  # the first may compile
            place.wait()
            began = time.perf_counter()
        token = slim.decode(token, state)[:, -1].argmax(-1, keepdim=True)
    place.wait()
    return batch * steps / (time.perf_counter() - began)


def _transformers_trial(place: Place, model: Any, batch: int, context: int) -> float:
    """The same with a static cache of transformers, step by step."""
    import torch
    from transformers import StaticCache

    ids = _prompts(place, model.config.vocab_size, batch, context, batch * context * _token_bytes(model))
    steps = 2 if place.rehearsal else STEPS
    cache = StaticCache(config=model.config, max_cache_len=context + steps + 1)
    with torch.no_grad():
        for piece in ids.split(_chunk(batch), dim=1):
            logits = model(piece, past_key_values=cache, logits_to_keep=1).logits
        for step in range(steps + 1):
            if step == 1:
                place.wait()
                began = time.perf_counter()
            logits = model(logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache, logits_to_keep=1).logits
    place.wait()
    return batch * steps / (time.perf_counter() - began)


MEASURES: dict[str, Callable[[Place, float], Iterable[list[dict[str, Any]]]]] = {
    "decode": lambda place, until: measure_attention(place, decode_shapes(place), until),
    "prefill": lambda place, until: measure_attention(place, prefill_shapes(place), until),
    "model": measure_model,
    "batch": measure_batch,
}


# ---------------------------------------------------------------------- showing


def markdown(document: dict[str, Any]) -> str:
    """All tables of a file of figures."""
    device, machine, parts = document["device"], document.get("machine"), document["parts"]
    rehearsal = device["name"] == "rehearsal"
    lines = [f"**{REHEARSAL}**", ""] if rehearsal else []
    facts = [f"{device['name']}, {device['dtype']}", f"torch {device['torch']}", f"Triton {device['triton']}"]
    if "processors" in device:
        facts[0] += f", {device['processors']} multiprocessors, {device['memory_gb']:.0f} GB"
        facts.append(f"CUDA {device['cuda']}, cuDNN {device['cudnn']}")
    if machine:
        facts.append(f"transformers {machine['transformers']}")
    dates = sorted({part["date"] + (", quick grid" if part["quick"] else "") for part in parts.values()})
    lines += ["; ".join([*facts, *dates]), ""]
    lines += _table(["aim", "wanted", "measured", ""], aims(parts))
    shape = {"batch": "rows", "length": "T", "group": "G", "dim": "D"}
    if "decode" in parts:
        lines += ["", "Decode attention, 8 KV heads: microseconds, share of the bandwidth of a copy, and how many", ""]
        lines[-2] += " times as fast as full precision in one stretch."
        lines += _pivot(parts["decode"]["rows"], shape, _decode_cell)
    if "prefill" in parts:
        lines += ["", "Prefill attention, causal, 8 KV heads: TFLOP/s, and the share of a matrix product.", ""]
        lines += _pivot(parts["prefill"]["rows"], shape, lambda r: f"{r['per_second'] / 1e12:.0f}, {r['share']:.0%}")
    if "model" in parts:
        lines += ["", "Whole models: tokens per second of all rows, and the cache.", ""]
        cell = lambda r: f"{r['tokens_per_second']:,.0f}, {r['cache_bytes'] / 1e6:,.0f} MB"  # noqa: E731
        lines += _pivot(parts["model"]["rows"], {"batch": "rows", "context": "context"}, cell)
    if "batch" in parts:
        lines += ["", "The largest batch, and the tokens per second that it decodes.", ""]
        lines += _pivot(parts["batch"]["rows"], {"context": "context", "memory_gb": "GB"}, _batch_cell)
    return "\n".join(lines) + "\n"


def aims(parts: dict[str, Any]) -> list[list[str]]:
    """What was aimed at, and what came of it."""
    decode, prefill = (parts.get(name, {}).get("rows", []) for name in ("decode", "prefill"))
    large = [
        r for r in decode
        if "share" in r and 4 * r["batch"] * KV_HEADS * r["length"] * r["dim"] >= AIMED_BYTES
    ]  # fmt: skip
    found: list[list[str]] = []

    def add(what: str, wanted: float, values: list[float], text: Callable[[float], str]) -> None:
        if not values:
            found.append([what, text(wanted), "not measured", ""])
            return
        reached = sum(v >= wanted for v in values)
        span = f"{text(min(values))} to {text(max(values))}, median {text(median(values))}"
        verdict = "reached" if reached == len(values) else "missed" if not reached else "in part"
        measured = text(values[0]) if len(values) == 1 else f"{span}; {reached} of {len(values)} shapes"
        found.append([what, text(wanted), measured, verdict])

    add(
        "decode, full precision, from 64 MB of keys and values on: share of a copy's bandwidth", AIM_COPY,
        [r["share"] for r in large if r["runner"] == "kvpass full"], lambda x: f"{x:.0%}",
    )  # fmt: skip
    for fmt, wanted in AIM_TIMES.items():
        times = [r["times_full"] for r in large if r["runner"] == f"kvpass {fmt}" and "times_full" in r]
        add(f"the same, {fmt}: times as fast as full precision", wanted, times, lambda x: f"{x:.2f}")
    best = [
        r["per_second"] / 1e12 for r in prefill
        if "share" in r and r["runner"] == "kvpass full" and r["dim"] == 128 and r["length"] == 8192
    ]  # fmt: skip
    add("prefill of 8,192 tokens, D 128: TFLOP/s", AIM_TFLOPS, best, lambda x: f"{x:.0f}")
    return found


def _decode_cell(row: dict[str, Any]) -> str:
    text = f"{1e6 * row['seconds']:,.1f}, {row['share']:.0%}"
    return text + (f", {row['times_full']:.2f}x" if "times_full" in row and row["runner"] != "kvpass full" else "")


def _batch_cell(row: dict[str, Any]) -> str:
    return f"{row['batch']:,}{'' if row['settled'] else ' or more'}, {row['tokens_per_second']:,.0f}"


def _pivot(rows: list[dict[str, Any]], keys: dict[str, str], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    """A line per case and a column per runner, or the other way round where runners are many; reasons below."""
    runners = list(dict.fromkeys(r["runner"] for r in rows if r["runner"] != "all"))
    cases = list(dict.fromkeys(tuple(r[key] for key in keys) for r in rows))
    cells: dict[tuple[Any, str], str] = {}
    reasons: dict[str, dict[str, int]] = {}
    for r in rows:
        case = tuple(r[key] for key in keys)
        if "skipped" in r:
            among = reasons.setdefault(r["skipped"], {})
            among[r["runner"]] = among.get(r["runner"], 0) + 1
        else:
            cells[case, r["runner"]] = cell(r)
    if len(cases) > 3:
        head = [*keys.values(), *runners]
        body = [[*(f"{n:,}" for n in case), *(cells.get((case, r), "-") for r in runners)] for case in cases]
    else:
        head = ["", *(_case(case, keys) for case in cases)]
        body = [[r, *(cells.get((case, r), "-") for case in cases)] for r in runners]
    lines = _table(head, body)
    if reasons:
        lines += ["", "Not measured:", ""]
        for reason, among in reasons.items():
            what = ", ".join(f"{runner} ({count} of {len(cases)})" for runner, count in among.items())
            lines.append(f"- {reason}: {what}")
    return lines


def _case(case: Sequence[Any], keys: dict[str, str]) -> str:
    return ", ".join(f"{name} {n:,.6g}" for name, n in zip(keys.values(), case, strict=True))


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


if __name__ == "__main__":
    sys.exit(main())
