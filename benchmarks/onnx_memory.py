"""What an ONNX export of a model of some gigabytes holds in memory, stage by stage, and how long it takes.

    python -m benchmarks.onnx_memory [--gigabytes 2.2] [--dtypes fp32 fp16] [--passes] [--json]
    python -m benchmarks.onnx_memory --show benchmarks/results/onnx_memory.json

A random float32 Llama is written tensor by tensor; then every export is a process of its own, watched from outside,
where no lock of Python hides a peak. Of the resident memory, pages of files (the libraries, and what ONNX Runtime maps
of the package) can be taken back by the system at any time; anonymous memory cannot, and is shown apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, keep, kept, parser
from benchmarks.scale import write_random

AIM = 1.3  # resident memory of an export over the size of the model in the package's dtype
PERIOD = 0.005  # seconds between two looks at a process
STAGES = ("lower", "export", "optimize", "quantize", "write", "check")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1280,
    "intermediate_size": 4096,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def main() -> int:
    arguments = _arguments()
    if arguments.worker:
        return _work(arguments.worker, *arguments.folders)
    if arguments.show is not None:
        print(markdown(kept("onnx_memory", arguments.show)), end="")
        return 0
    machine = describe(arguments.threads)
    document: dict[str, Any] = {"onnxruntime": version("onnxruntime"), "runs": {}}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = Path(folder) / "model"
        layers = write_random(source, arguments.gigabytes * 1e9, LLAMA)
        document |= {"layers": layers, "checkpoint_bytes": _size(source)}
        document["imports"] = watch(arguments.threads, "imports", source, folder)
        for dtype in arguments.dtypes:
            for passes in ("none", "fewer") if arguments.passes else ("none",):
                found = watch(arguments.threads, dtype, source, Path(folder) / f"{dtype}-{passes}", passes)
                document["runs"][dtype if passes == "none" else f"{dtype}, GroupHeads(2)"] = found
    keep("onnx_memory", machine, document, arguments.json)
    print(markdown(document | {"machine": asdict(machine)}), end="")
    return 0


def _arguments() -> argparse.Namespace:
    found = parser("Memory and time of ONNX exports.", shows=True)
    found.add_argument("--gigabytes", type=float, default=2.2, help="of the float32 checkpoint")
    found.add_argument("--dtypes", nargs="+", default=["fp32", "fp16", "int4"], choices=("fp32", "fp16", "int4"))
    found.add_argument("--passes", action="store_true", help="export with GroupHeads too")
    found.add_argument("--folder", help="where to make the temporary folder")
    found.add_argument("--worker", help=argparse.SUPPRESS)
    found.add_argument("folders", nargs="*", help=argparse.SUPPRESS)
    return found.parse_args()


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def watch(threads: int, *given: Any) -> dict[str, Any]:
    """Run a worker and look at its memory all the while: bytes at most, in all and per stage."""
    command = [sys.executable, "-m", "benchmarks.onnx_memory", "--worker", *map(str, given)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    seen: list[tuple[float, int, int]] = []
    highest = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            if (held := _held(process.pid)) is not None:
                seen.append((time.monotonic(), held["VmRSS"], held["RssAnon"]))
                highest = max(highest, held["VmHWM"])
            time.sleep(PERIOD)
        seconds = time.monotonic() - began
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the export ended with status {process.returncode}")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    stages = {}
    for name, (start, end) in found.pop("spans").items():
        inside = [(rss, anonymous) for at, rss, anonymous in seen if start <= at <= end]
        peaks = [max(values) for values in zip(*inside, strict=True)] if inside else [0, 0]
        stages[name] = {"seconds": end - start, "peak": peaks[0], "anonymous": peaks[1]}
    return found | {
        "seconds": seconds, "peak": highest, "anonymous": max(a for _, _, a in seen), "stages": stages,
    }  # fmt: skip


def _held(pid: int) -> dict[str, int] | None:
    """Bytes that a process holds, by the names that Linux gives them; None once it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    fields = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    wanted = ("VmRSS", "RssAnon", "VmHWM")
    return {n: int(fields[n].split()[0]) * 1024 for n in wanted} if "VmRSS" in fields else None


def _work(name: str, source: str, target: str, passes: str = "none") -> int:
    """Export once; print when each stage began and ended, and how large the package is."""
    import kvpass
    from kvpass.passes import GroupHeads

    spans: dict[str, tuple[float, float]] = {}
    found: dict[str, Any] = {"spans": spans}
    began = time.monotonic()
    recipe = [GroupHeads(2, method="mean")] if passes == "fewer" else []
    slim = kvpass.transform(source, recipe, progress=False, device="cpu")
    spans["transform"] = (began, time.monotonic())
    if name == "imports":
        import onnxruntime  # noqa: F401

        import kvpass.export.onnx.optimize
    else:
        if name == "int4":
            made = slim.export_onnx(target, weights="int4")
        else:
            made = slim.export_onnx(target, dtype="fp16" if name == "fp16" else "fp32")
        end = time.monotonic()
        for stage in reversed([s for s in STAGES if s in made.seconds]):
            spans[stage] = (end - made.seconds[stage], end)
            end -= made.seconds[stage]
        found |= {"bytes": made.bytes, "checks": made.checks}
    print(json.dumps(found))
    return 0


def markdown(document: dict[str, Any]) -> str:
    """The figures as Markdown."""
    machine = document["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB; {machine['threads']} threads; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, onnxruntime {document['onnxruntime']}; "
        f"{machine['date']}",
        "",
        f"Llama, {document['layers']} layers, {LLAMA['hidden_size']} wide, {document['checkpoint_bytes'] / 1e9:.2f} GB "
        "in float32, from its folder. Bytes at most, whole process; imports and capture alone hold "
        f"{_gb(document['imports']['peak'])} GB, {_gb(document['imports']['anonymous'])} GB of it anonymous.",
        "",
        f"| package | GB | seconds | resident GB | times the size (aim {AIM}) | anonymous GB | times the size |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, run in document["runs"].items():
        size = run["bytes"]
        lines.append(
            f"| {name} | {_gb(size)} | {run['seconds']:.1f} | {_gb(run['peak'])} | {run['peak'] / size:.2f} | "
            f"{_gb(run['anonymous'])} | {run['anonymous'] / size:.2f} |"
        )
    lines += ["", "| stage | " + " | ".join(f"{n}: s, resident GB, anonymous GB" for n in document["runs"]) + " |"]
    lines.append("| --- |" + " ---: |" * len(document["runs"]))
    lines += [_row(stage, list(document["runs"].values())) for stage in ("transform", *STAGES)]
    return "\n".join(lines) + "\n"


def _row(stage: str, runs: Sequence[dict[str, Any]]) -> str:
    found = [r["stages"].get(stage) for r in runs]
    cells = [f"{c['seconds']:.1f}, {_gb(c['peak'])}, {_gb(c['anonymous'])}" if c else "-" for c in found]
    return f"| {stage} | " + " | ".join(cells) + " |"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


if __name__ == "__main__":
    sys.exit(main())
