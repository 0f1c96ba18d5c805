"""ONNX packages with weights of 4 bits beside full ones, by kvpass and by onnxruntime-genai's builder, on a CPU.

    python -m benchmarks.onnx_int4 [--quick] [--rounds 8] [--json]
    python -m benchmarks.onnx_int4 --show benchmarks/results/onnx_int4.json

The model, and the loop that runs packages in turn, are those of `benchmarks.onnx`. Weights are random, so how far
logits go from those of full weights says nothing of a trained model; it is told since every export tells it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe, keep, kept, median, parser
from benchmarks.onnx import FULL, QUICK, Runner, Setting, build
from benchmarks.scale import peak_memory

PACKAGES = ("onnxruntime", "onnxruntime-genai")
KVPASS = {"fp32": (None, "fp32"), "fp32, weights int4": ("int4", "fp32"), "fp16, weights int4": ("int4", "fp16")}
BUILDER = "onnxruntime-genai builder, int4"
TOKENS = 8  # per timing


def main() -> int:
    arguments = _arguments()
    if arguments.worker:
        return _export(arguments.worker, *arguments.folders)
    if arguments.show is not None:
        print(markdown(kept("onnx_int4", arguments.show)), end="")
        return 0
    setting = QUICK if arguments.quick else FULL
    machine = describe(arguments.threads)
    document: dict[str, Any] = {"packages": {p: version(p) for p in PACKAGES}, "setting": asdict(setting)}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        document["rows"] = measure(setting, Path(folder), arguments)
    keep("onnx_int4", machine, document, arguments.json)
    print(markdown(document | {"machine": asdict(machine)}), end="")
    return 0


def _arguments() -> argparse.Namespace:
    found = parser("ONNX packages with weights of 4 bits.", shows=True)
    found.add_argument("--quick", action="store_true", help="a tiny model: walks through the code and measures nothing")
    found.add_argument("--rounds", type=int, default=8, help="timings per package and context")
    found.add_argument("--folder", help="where to make the temporary folder")
    found.add_argument("--worker", help=argparse.SUPPRESS)
    found.add_argument("folders", nargs="*", help=argparse.SUPPRESS)
    return found.parse_args()


def measure(setting: Setting, folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures of every package: of its export, of its files, and of its steps."""
    build(setting, folder / "model")
    rows: dict[str, dict[str, Any]] = {}
    runners: dict[str, Runner] = {}
    for index, name in enumerate((*KVPASS, BUILDER)):
        output = folder / str(index)
        command = [sys.executable, "-m", "benchmarks.onnx_int4", "--worker", name, str(folder / "model"), str(output)]
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
        began = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.perf_counter() - began}
        rows[name]["disk"] = sum(path.stat().st_size for path in output.iterdir())
        if "fp16" not in name:  # the loop's caches are float32
            runners[name] = Runner([output / "model.onnx"], setting.shape["head_dim"], {}, arguments.threads)
    for context in setting.contexts:
        ids = np.random.default_rng(context).integers(3, setting.shape["vocab_size"], context)
        room = context + (arguments.rounds + 1) * TOKENS
        token = {name: int(runner.read(ids, room).argmax()) for name, runner in runners.items()}
        for turn in range(arguments.rounds + 1):  # what the first round takes is thrown away
            for name, runner in random.Random(turn).sample(list(runners.items()), len(runners)):
                began = time.perf_counter()
                for _ in range(TOKENS):
                    token[name] = int(runner.step(token[name]).argmax())
                if turn:
                    taken = rows[name].setdefault("decode_seconds", {}).setdefault(str(context), [])
                    taken.append((time.perf_counter() - began) / TOKENS)
    return rows


def _export(name: str, model: str, output: str) -> int:
    """Export once; print the peak of memory and what was checked."""
    checks: list[dict[str, Any]] = []
    if name == BUILDER:
        scratch = f"{output}-scratch"
        sys.argv = ["builder", "-m", model, "-o", output, "-p", "int4", "-e", "cpu", "-c", scratch]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    else:
        import kvpass

        weights, dtype = KVPASS[name]
        slim = kvpass.transform(model, progress=False, verify="off", device="cpu")
        checks = slim.export_onnx(output, dtype=dtype, weights=weights, positions=8192).checks
    print(json.dumps({"peak": peak_memory(), "checks": checks}))
    return 0


def markdown(document: dict[str, Any]) -> str:
    """The figures as Markdown."""
    machine, shape, contexts = document["machine"], document["setting"]["shape"], document["setting"]["contexts"]
    packages = ", ".join(f"{name} {found}" for name, found in document["packages"].items())
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB; {machine['threads']} threads; "
        f"torch {machine['torch']}, {packages}; {machine['date']}",
        "",
        f"Llama, {shape['num_hidden_layers']} layers, {shape['hidden_size']} wide, {shape['vocab_size']:,} tied "
        "embeddings, random weights. Off: the largest difference of logits, of their spread, from torch with the "
        "weights that the package has; then where products round their inputs to 8 bits, as in service; then from "
        "torch with full weights, which is not checked.",
        "",
        "| package | export s | peak GB | disk MB | off | served | from full weights | "
        + " | ".join(f"decode at {c:,}, ms" for c in contexts)
        + " |",
        "| --- |" + " ---: |" * (6 + len(contexts)),
    ]
    for name, row in document["rows"].items():
        checks = row["checks"]
        full = len(checks) and checks[-1]["allowed"] is not None
        exact = checks if full else checks[:-2]
        cells = [f"{max(c['measured'] for c in exact):.1e}" if exact else "-"]
        cells += ["-", "-"] if full or not checks else [f"{c['measured']:.1e}" for c in checks[-2:]]
        steps = row.get("decode_seconds", {})
        cells += [f"{1e3 * median(steps[str(c)]):.2f}" if steps else "-" for c in contexts]
        start = [f"{row['seconds']:.1f}", f"{row['peak'] / 1e9:.2f}", f"{row['disk'] / 1e6:.1f}"]
        lines.append("| " + " | ".join([name if name == BUILDER else f"kvpass, {name}", *start, *cells]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
