"""ONNX packages of one model by kvpass and by other exporters, and of its plans with smaller caches, on a CPU.

    python -m benchmarks.onnx [--quick] [--exports 3] [--loads 4] [--rounds 4] [--json]
    python -m benchmarks.onnx --show benchmarks/results/onnx.json

The model is a 100M Llama with random float32 weights and tied embeddings. Every export is a process of its own:
seconds of the whole process, imports and checks included, and the most memory that it held. Then all packages are
loaded into one process and take turns, a prompt or a few tokens each per round; medians over rounds are shown. What is
loaded first runs slower by some percent, whatever it is: so all are loaded anew several times, in another order.

One loop runs them all, as `kvpass.export.onnx.runner` does. Where a graph can write new keys and values beside the old
ones, one buffer is bound as past and as present; where it returns a longer copy, outputs are bound afresh every step.
Threads spin within a run, as they do by default, and not after it: they would take a third of the speed from the
package whose turn is next. Whoever exports the model as it is must give torch's logits, or is not measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.machine import RESULTS, describe, keep, kept, median, parser
from benchmarks.scale import peak_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvpass.export.onnx.standard import Target

BOOKWORM = Path(__file__).resolve().parent.parent / "examples" / "bookworm"
PACKAGES = ("onnxruntime", "onnxruntime-genai", "onnxscript", "onnx")
CHUNK = 512  # tokens of a prompt that one run reads, as in kvpass's runner
TOLERANCE = 1e-3  # of the spread of torch's logits: beyond it a graph computes something else
KVPASS, BUILDER = "kvpass", "onnxruntime-genai builder"
GROWN, PLACED = f"{KVPASS}, target onnx", f"{KVPASS}, target onnx-static"
LEAN = f"{KVPASS}, GroupHeads(2), SlideWindow, QuantizeKV(8)"
TORCH = {20: "torch.onnx, opset 20", 23: "torch.onnx, opset 23"}
TRANSFORMERS = "transformers OnnxExporter, fused for ORT"
AIM_BUILDER, AIM_TORCH, AIM_LEAN = 0.95, 2.0, 1.8  # speed as a multiple of theirs


@dataclass(frozen=True)
class Setting:
    """What is exported and how it is run.

    Attributes:
        shape: of the Llama.
        prompt: tokens of a timed prompt.
        contexts: tokens before those that are decoded.
        window: of the plans with a window.
        exports: processes per exporter.
        loads: times that all packages are loaded, each time beginning with another.
        rounds: timings per runner and load.
        tokens: decoded per timing.
    """

    shape: dict[str, int]
    prompt: int = 512
    contexts: tuple[int, ...] = (1024, 4096)
    window: int = 512
    exports: int = 3
    loads: int = 4
    rounds: int = 4
    tokens: int = 8


_WIDTHS = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000, "head_dim": 64}
_NARROW = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 512, "head_dim": 16}
_HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 8192}
FULL = Setting(_WIDTHS | _HEADS)
QUICK = Setting(_NARROW | _HEADS, prompt=128, contexts=(128, 256), window=64, exports=1, loads=2, rounds=2)


def main() -> int:
    arguments = _arguments()
    setting = QUICK if arguments.quick else FULL
    if arguments.worker:
        return _work(arguments.worker, Path(arguments.folders[0]), Path(arguments.folders[1]), setting.window)
    if arguments.show is not None:
        print(markdown(kept("onnx", arguments.show)), end="")
        return 0
    given = {name: getattr(arguments, name) for name in ("exports", "loads", "rounds") if getattr(arguments, name)}
    setting = replace(setting, **given)
    import torch
    from transformers import logging

    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    machine = describe(arguments.threads)
    document: dict[str, Any] = {
        "packages": {name: _version(name) for name in PACKAGES},
        "quick": arguments.quick,
        "setting": asdict(setting),
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        document |= measure(setting, Path(folder), arguments)
    keep("onnx", machine, document, arguments.json)
    print(markdown(document | {"machine": asdict(machine)}), end="")
    return 0


def _arguments() -> argparse.Namespace:
    found = parser("ONNX packages of kvpass and of other exporters, on a CPU.", shows=True)
    found.add_argument("--quick", action="store_true", help="a tiny model: walks through the code and measures nothing")
    found.add_argument("--exports", type=int, help="processes per exporter")
    found.add_argument("--loads", type=int, help="times that all packages are loaded")
    found.add_argument("--rounds", type=int, help="timings per runner and load")
    found.add_argument("--only", action="append", metavar="NAME", help="an exporter of the table; repeatable")
    found.add_argument("--folder", help="where to make the temporary folder")
    found.add_argument("--worker", help=argparse.SUPPRESS)
    found.add_argument("folders", nargs="*", help=argparse.SUPPRESS)
    arguments = found.parse_args()
    target = arguments.json
    if arguments.quick and target is not None and (not target or RESULTS in Path(target).resolve().parents):
        raise SystemExit("--quick measures nothing: name a file outside benchmarks/results to look at")
    return arguments


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---------------------------------------------------------------------- exporters, each in a process of its own

Exporter = Callable[[Path, Path, int], dict[str, Any]]  # (model, output, window) -> what else is to be told


def exporters() -> dict[str, Exporter]:
    """Every way to a package, by the name that it has in tables."""
    from kvpass.passes import GroupHeads, QuantizeKV, ShareLayers, SlideWindow

    codes = QuantizeKV(8, layout="static")
    return {
        KVPASS: _by_kvpass(lambda window: []),
        GROWN: _by_kvpass(lambda window: [], "onnx"),
        PLACED: _by_kvpass(lambda window: [], "onnx-static"),
        f"{KVPASS}, SlideWindow": _by_kvpass(lambda window: [SlideWindow(window, 0)]),
        f"{KVPASS}, ShareLayers(cla:2)": _by_kvpass(lambda window: [ShareLayers("cla:2")]),
        f"{KVPASS}, GroupHeads(2), SlideWindow": _by_kvpass(
            lambda window: [GroupHeads(2, method="first"), SlideWindow(window, 0)]
        ),
        f"{KVPASS}, QuantizeKV(8)": _by_kvpass(lambda window: [codes]),
        LEAN: _by_kvpass(lambda window: [GroupHeads(2, method="first"), SlideWindow(window, 0), codes]),
        BUILDER: _by_builder,
        **{name: _by_torch(opset) for opset, name in TORCH.items()},
        TRANSFORMERS: _by_transformers,
    }


def _by_kvpass(passes: Callable[[int], Sequence[Any]], target: Target = "ort") -> Exporter:
    def export(model: Path, output: Path, window: int) -> dict[str, Any]:
        import torch

        import kvpass

        text = [torch.randint(3, 500, (8, 256), generator=torch.Generator().manual_seed(1))]  # for fixed scales
        slim = kvpass.transform(
            str(model), passes(window), calibration=text, verify="off", progress=False, device="cpu"
        )
        exported = slim.export_onnx(output, target=target, positions=FULL.shape["max_position_embeddings"])
        return {"stages": exported.seconds, "checks": exported.checks}

    return export


def _by_builder(model: Path, output: Path, window: int) -> dict[str, Any]:
    scratch = output.with_name(output.name + "-scratch")
    sys.argv = ["builder", "-m", str(model), "-o", str(output), "-p", "fp32", "-e", "cpu", "-c", str(scratch)]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    return {}


def _by_torch(opset: int) -> Exporter:
    """`torch.onnx.export` of transformers' model, told nothing but the names and sizes of its caches."""

    def export(model: Path, output: Path, window: int) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        class WithPast(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

            def forward(self, ids: Any, mask: Any, past: Any) -> Any:
                cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
                found = self.model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
                return found.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values))

        wrapped = WithPast()
        config = wrapped.model.config
        parts = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
        batch, length, held = 2, 5, 3
        past = [torch.zeros(batch, config.num_key_value_heads, held, config.head_dim) for _ in parts]
        ids, mask = torch.zeros(batch, length, dtype=torch.long), torch.ones(batch, held + length, dtype=torch.long)
        output.mkdir()
        torch.onnx.export(
            wrapped, (ids, mask, past), str(output / "model.onnx"), dynamo=True, opset_version=opset,
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{p}" for p in parts)],
            output_names=["logits", *(f"present.{p}" for p in parts)],
            dynamic_shapes=(
                {0: "batch", 1: "length"}, {0: "batch", 1: "total"}, [{0: "batch", 2: "held"} for _ in parts],
            ),
        )  # fmt: skip
        return {}

    return export


def _by_transformers(model: Path, output: Path, window: int) -> dict[str, Any]:
    """transformers' own: a graph for the prompt and one for what follows, each with all weights.

    The batch of the sample stays in the graphs; with one of two rows no attention is fused.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters import OnnxConfig, OnnxExporter

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sample = {"input_ids": torch.zeros(1, 5, dtype=torch.long), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    exported = OnnxExporter().export_for_generation(loaded, sample, config, multi_token_decode=True)
    exported.save_pretrained(output)
    return {}


def _work(name: str, model: Path, output: Path, window: int) -> int:
    """Export once and print what it took."""
    found = exporters()[name](model, output, window)
    print(json.dumps({"peak": peak_memory(), **found}))
    return 0


def _export(name: str, model: Path, output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one export took, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.onnx", *(["--quick"] if arguments.quick else []), "--worker", name]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    shutil.rmtree(output, ignore_errors=True)
    began = time.perf_counter()
    done = subprocess.run([*command, str(model), str(output)], env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return {"skipped": said[-1] if said else f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"seconds": seconds}


# ---------------------------------------------------------------------- runners, all in one process


class Runner:
    """Runs a package for one sequence, by one graph or by one for the prompt's begin and one for what follows.

    Attributes:
        caches: the past inputs, with the heads of each, the elements per head, and their type.
        windows: per past input the window of its layer or 0, where keys and values are written in place.
    """

    def __init__(self, graphs: Sequence[Path], head_dim: int, windows: dict[str, int] | None, threads: int) -> None:
        self.first, self.further = [_session(graph, threads) for graph in graphs] * (3 - len(graphs))
        past = [i for i in self.further.get_inputs() if "past_key_values" in i.name]
        kinds = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
        self.caches = {i.name: (int(i.shape[1]), head_dim, kinds[i.type]) for i in past}  # a fixed size may be a word
        self.windows = windows
        self.held: list[Any] = []
        self.count = 0
        self.binding: Any = None

    def read(self, ids: NDArray[np.int64], capacity: int) -> NDArray[np.float32]:
        """Logits [V] behind a prompt [S], read into new caches with room for so many tokens."""
        from onnxruntime import OrtValue

        rows = {name: 0 if self.windows is None else self.rows(name, capacity) for name in self.caches}
        empty = [np.zeros((1, heads, rows[name], dim), kind) for name, (heads, dim, kind) in self.caches.items()]
        self.held = [OrtValue.ortvalue_from_numpy(cache, "cpu", 0) for cache in empty]
        self.count = 0
        self.binding = None
        for begin in range(0, len(ids), CHUNK):
            logits = self._run(self.further if begin else self.first, ids[begin : begin + CHUNK])
        return logits

    def step(self, token: int) -> NDArray[np.float32]:
        """Logits [V] behind one more token."""
        return self._run(self.further, np.array([token], np.int64))

    def rows(self, name: str, tokens: int) -> int:
        """Rows that a cache has for so many tokens."""
        from kvpass.export.onnx.runner import SLACK

        window = (self.windows or {}).get(name, 0)
        return window + (SLACK if tokens > window else 0) if window else tokens

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of keys and values after so many tokens."""
        sizes = ((self.rows(name, tokens), *cache) for name, cache in self.caches.items())
        return sum(rows * heads * dim * np.dtype(kind).itemsize for rows, heads, dim, kind in sizes)

    def _run(self, session: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        begin, self.count = self.count, self.count + len(ids)
        told = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, self.count), np.int64),
            "position_ids": np.arange(begin, self.count)[None],
        }
        binding = self.binding or self._bound(session)
        for name in told.keys() & {i.name for i in session.get_inputs()}:
            binding.bind_cpu_input(name, told[name])
        binding.bind_output("logits")  # first, and anew since its size changes
        session.run_with_iobinding(binding)
        value, *presents = binding.get_outputs()
        if self.windows is None:
            self.held = presents
        else:
            self.binding = binding
        logits: NDArray[np.float32] = value.numpy()[0, -1].copy()
        return logits

    def _bound(self, session: Any) -> Any:
        """Logits and presents are returned; presents where the pasts lie if the graph writes them in place."""
        binding = session.io_binding()
        known = {i.name for i in session.get_inputs()}
        binding.bind_output("logits")
        presents = [o.name for o in session.get_outputs() if o.name != "logits"]
        for present, name, value in zip(presents, self.caches, self.held, strict=True):
            if name in known:
                binding.bind_ortvalue_input(name, value)
            if self.windows is None:
                binding.bind_output(present)
            else:
                binding.bind_ortvalue_output(present, value)
        return binding


def _session(graph: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _open(name: str, folder: Path, head_dim: int, threads: int) -> Runner:
    from kvpass.export.onnx.runner import MARKER

    graphs = [folder / file for file in (["prefill.onnx", "decode.onnx"] if name == TRANSFORMERS else ["model.onnx"])]
    windows: dict[str, int] | None = None
    if name == BUILDER:
        windows = {}
    elif name.startswith(KVPASS) and name != GROWN:
        layers = json.loads((folder / MARKER).read_text(encoding="utf-8"))["layers"]
        windows = {f"past_key_values.{e['owner']}.{part}": e["window"] for e in layers for part in ("key", "value")}
    return Runner(graphs, head_dim, windows, threads)


# ---------------------------------------------------------------------- measuring


def measure(setting: Setting, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row of figures for every exporter, and how busy the machine was."""
    busy = {"before exports": _load()}
    model = build(setting, folder / "model")
    rows: dict[str, dict[str, Any]] = {name: {"runner": name} for name in arguments.only or exporters()}
    outputs = {name: folder / str(index) for index, name in enumerate(rows)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for _ in range(setting.exports):
        for name, output in outputs.items():
            if "skipped" in rows[name]:
                continue
            found = _export(name, folder / "model", output, arguments)
            if "skipped" in found:
                rows[name]["skipped"] = found["skipped"]
            else:
                runs[name].append(found)
    for name, row in rows.items():
        if "skipped" in row:
            continue
        row |= _exported(runs[name], outputs[name])
        try:
            row |= _checked(name, outputs[name], model, setting, arguments.threads)
        except ValueError as error:
            row["skipped"] = str(error)
    del model
    busy["before speeds"] = _load()
    good = [name for name, row in rows.items() if "skipped" not in row]
    head_dim = setting.shape["head_dim"]
    for load in range(setting.loads):
        begin = load * len(good) // setting.loads
        order = good[begin:] + good[:begin]
        _time(setting, {name: _open(name, outputs[name], head_dim, arguments.threads) for name in order}, rows)
        gc.collect()
    for name in good:
        row = rows[name]
        row["prefill_tokens_per_second"] = setting.prompt / median(row["all_prefill_seconds"])
        row["decode_seconds"] = {context: median(times) for context, times in row["all_decode_seconds"].items()}
    busy["at the end"] = _load()
    return {"load_average": busy, "rows": list(rows.values())}


def _load() -> float | None:
    """Processes that ran or waited for a core in the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def build(setting: Setting, folder: Path) -> Any:
    """A Llama with random weights, saved; with a tokenizer, since exporters want one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**setting.shape, tie_word_embeddings=True)).eval()
    model.save_pretrained(folder)
    for path in BOOKWORM.glob("tokenizer*.json"):
        shutil.copy(path, folder)
    return model


def _exported(runs: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Median seconds and the worst peak of some exports; what lies in the folder."""
    import onnx

    graphs = [onnx.load(str(path), load_external_data=False).graph for path in sorted(folder.glob("*.onnx"))]
    found: dict[str, Any] = {
        "export_seconds": median([r["seconds"] for r in runs]),
        "all_export_seconds": [r["seconds"] for r in runs],
        "peak": max(r["peak"] for r in runs),
        "disk": sum(path.stat().st_size for path in folder.iterdir()),
        "nodes": [len(graph.node) for graph in graphs],
    }
    if "stages" in runs[0]:
        found["check_seconds"] = median([r["stages"]["check"] for r in runs])
        found["stages"] = runs[0]["stages"]
    return found


def _checked(name: str, folder: Path, model: Any, setting: Setting, threads: int) -> dict[str, float]:
    """Bytes of the cache, and how far logits behind the end of a window are off, as a share of their spread.

    Right is what torch computes where the model is exported as it is. A plan computes something else, which its export
    has compared with torch; here the loop is compared with kvpass's runner.

    Raises:
        ValueError: they are too far.
    """
    import torch

    from kvpass.export.onnx.runner import OnnxModel

    runner = _open(name, folder, model.config.head_dim, threads)
    length = setting.window + 8
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, length + 8)
    rest = ids[length:].tolist()
    found = np.stack([runner.read(ids[:length], len(ids)), *(runner.step(token) for token in rest)])
    if name.startswith(f"{KVPASS},") and name not in (GROWN, PLACED):
        other = OnnxModel.open(folder)
        right = np.concatenate([other.prefill(ids[None, :length]), *(other.decode([[token]]) for token in rest)])
    else:
        with torch.no_grad():
            right = model(torch.from_numpy(ids)[None], logits_to_keep=len(rest) + 1).logits[0].numpy()
    difference = float(np.abs(found - right).max() / np.ptp(right))
    if not difference <= TOLERANCE:
        raise ValueError(f"logits differ by {difference:.1e} of their spread from the right ones")
    return {"difference": difference, "cache_bytes": runner.cache_bytes(setting.contexts[-1])}


def _time(setting: Setting, runners: dict[str, Runner], rows: dict[str, dict[str, Any]]) -> None:
    """Seconds of prompts, and of tokens behind each context, are added to rows: all runners in every round."""
    vocabulary = setting.shape["vocab_size"]

    def rounds() -> Iterator[tuple[str, Runner, list[float]]]:
        """Every runner once per round, in another order each time; what the first round takes is thrown away."""
        for turn in range(setting.rounds + 1):
            for name, runner in random.Random(turn).sample(list(runners.items()), len(runners)):
                taken: list[float] = []
                yield name, runner, taken
                if turn:
                    found[name] += taken

    found: dict[str, list[float]] = {name: rows[name].setdefault("all_prefill_seconds", []) for name in runners}
    ids = np.random.default_rng(1).integers(3, vocabulary, setting.prompt)
    for _, runner, taken in rounds():
        began = time.perf_counter()
        runner.read(ids, setting.prompt)
        taken.append(time.perf_counter() - began)
    for context in setting.contexts:
        found = {n: rows[n].setdefault("all_decode_seconds", {}).setdefault(str(context), []) for n in runners}
        ids = np.random.default_rng(context).integers(3, vocabulary, context)
        room = context + (setting.rounds + 1) * setting.tokens
        token = {name: int(runner.read(ids, room).argmax()) for name, runner in runners.items()}
        for name, runner, taken in rounds():
            began = time.perf_counter()
            for _ in range(setting.tokens):
                token[name] = int(runner.step(token[name]).argmax())
            taken.append((time.perf_counter() - began) / setting.tokens)


# ---------------------------------------------------------------------- Markdown


def markdown(document: dict[str, Any]) -> str:
    """The table, what was aimed at, and what was not measured."""
    machine, setting, rows = document["machine"], document["setting"], document["rows"]
    packages = ", ".join(f"{name} {found}" for name, found in document["packages"].items() if found)
    shape, contexts = setting["shape"], setting["contexts"]
    heads = f"{shape['num_attention_heads']}/{shape['num_key_value_heads']} heads"
    lines = ["**A tiny model: no number here is a measurement.**", ""] if document["quick"] else []
    lines += [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB; {machine['threads']} threads; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, {packages}; {machine['date']}",
        "",
        f"Llama, {shape['num_hidden_layers']} layers, {shape['hidden_size']} wide, {heads}, {shape['vocab_size']:,} "
        f"tied embeddings, float32, one sequence; windows of {setting['window']} tokens.",
        "",
    ]
    head = ["exporter", "export s", "peak GB", "disk MB", "nodes", f"prefill {setting['prompt']}, tok/s"]
    head += [*(f"decode at {c:,}, ms" for c in contexts), f"KV MB at {contexts[-1]:,}"]
    lines += _table(head, [_cells(row, contexts) for row in rows])
    lines += [
        "",
        f"Exports: whole processes, median of {setting['exports']}; in brackets what the check against torch took, "
        f"which others leave out. Speeds: medians of {setting['loads'] * setting['rounds']} rounds of a prompt or of "
        f"{setting['tokens']} tokens, in turn in one process, packages loaded {setting['loads']} times in different "
        "orders. Graphs of torch.onnx, of transformers and of kvpass's target onnx return longer copies of keys and "
        "values, so a step holds them twice.",
        "",
    ]
    known = [f"{load:.1f} {part}" for part, load in document["load_average"].items() if load is not None]
    if known:
        lines += [f"Load average of the machine: {', '.join(known)}.", ""]
    lines += _table(["aim", "wanted", "by medians", "by the fastest rounds", ""], aims(rows, contexts))
    skipped = [f"- {row['runner']}: {row['skipped']}" for row in rows if "skipped" in row]
    if skipped:
        lines += ["", "Not measured:", "", *skipped]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], contexts: Sequence[int]) -> list[str]:
    if "skipped" in row:
        return [row["runner"], "not measured", *["-"] * (5 + len(contexts))]
    checking = f" ({row['check_seconds']:.1f})" if "check_seconds" in row else ""
    return [
        row["runner"],
        f"{row['export_seconds']:.1f}{checking}",
        f"{row['peak'] / 1e9:.2f}",
        f"{row['disk'] / 1e6:,.1f}",
        " + ".join(f"{n:,}" for n in row["nodes"]),
        f"{row['prefill_tokens_per_second']:,.0f}",
        *(f"{1e3 * row['decode_seconds'][str(c)]:.2f}" for c in contexts),
        f"{row['cache_bytes'] / 1e6:.1f}",
    ]


def aims(rows: Sequence[dict[str, Any]], contexts: Sequence[int]) -> list[list[str]]:
    """What was aimed at, and what came of it: by medians, and by fastest rounds, which busy neighbours touch least."""
    known = {row["runner"]: row for row in rows if "skipped" not in row}
    found: list[list[str]] = []

    def add(
        what: str, other: str, wanted: float, times: Callable[[dict[str, Any]], list[float]], ours: str = KVPASS
    ) -> None:
        if ours not in known or other not in known:
            found.append([what, f"{wanted:.2f}", "not measured", "", ""])
            return
        own, theirs = times(known[ours]), times(known[other])
        ratio = median(theirs) / median(own)
        verdict = "reached" if ratio >= wanted else "missed"
        found.append([what, f"{wanted:.2f}", f"{ratio:.2f}", f"{min(theirs) / min(own):.2f}", verdict])

    def decode(context: int) -> Callable[[dict[str, Any]], list[float]]:
        return lambda row: list(row["all_decode_seconds"][str(context)])

    add("prefill, times as fast as the builder", BUILDER, AIM_BUILDER, lambda row: list(row["all_prefill_seconds"]))
    for context in contexts:
        add(f"decode at {context:,}, times as fast as the builder", BUILDER, AIM_BUILDER, decode(context))
    for name in TORCH.values():
        add(f"decode at {contexts[-1]:,}, times as fast as {name}", name, AIM_TORCH, decode(contexts[-1]))
    sizes = [known[name]["cache_bytes"] for name in (BUILDER, LEAN) if name in known]
    size = f"1/{sizes[0] / sizes[1]:.0f}" if len(sizes) == 2 else "part"
    what = f"{LEAN}: decode at {contexts[-1]:,}, times as fast as the builder, at {size} of its KV bytes"
    add(what, BUILDER, AIM_LEAN, decode(contexts[-1]), LEAN)
    return found


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


if __name__ == "__main__":
    sys.exit(main())
