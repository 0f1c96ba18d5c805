"""Models larger than memory: a dry run of a 70B model, and the conversion of a sharded checkpoint, tensor by tensor.

    python -m benchmarks.scale [--only dry|convert] [--gigabytes 6] [--json]

Everything runs in a fresh process whose peak memory is the kernel's own figure for that process. The dry run reads a
`config.json` and nothing else. The conversion is set beside a copy of the same folder; both bring their output to the
disk, and both are run `--repeat` times in turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, keep, median, parser, show

LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LLAMA_7B: dict[str, Any] = LLAMA_70B | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
SECONDS_AIM, MEMORY_AIM = 30.0, 1.5e9  # of a dry run
RATIO_AIM = 4.0  # checkpoint bytes over peak memory
SHARD = 1_000_000_000


def main() -> int:
    arguments = _arguments()
    if arguments.worker:
        return _work(arguments.worker, [Path(p) for p in arguments.folders])
    machine = describe(arguments.threads)
    figures: dict[str, Any] = {}
    print(machine.line())
    if arguments.only in (None, "dry"):
        figures["dry_run"] = dry_run(arguments)
    if arguments.only in (None, "convert"):
        figures["conversion"] = conversion(arguments)
    keep("scale", machine, figures, arguments.json)
    return 0


def _arguments() -> argparse.Namespace:
    found = parser("Dry runs and conversions of models larger than memory.")
    found.add_argument("--only", choices=("dry", "convert"))
    found.add_argument("--gigabytes", type=float, default=6.0, help="size of the checkpoint to convert")
    found.add_argument("--methods", nargs="+", default=["mean", "pca"], help="methods of GroupHeads")
    found.add_argument("--repeat", type=int, default=3)
    found.add_argument("--folder", help="where to make the temporary folder")
    found.add_argument("--worker", help=argparse.SUPPRESS)
    found.add_argument("folders", nargs="*", help=argparse.SUPPRESS)
    return found.parse_args()


# ---------------------------------------------------------------------- the two measurements


def dry_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of `inspect` and `plan` on a config of 70B parameters."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
        for name in ("import", "inspect", "plan"):
            runs = [_fresh(arguments, name, folder) for _ in range(arguments.repeat)]
            figures[name] = _summary(runs)
    rows = [
        [
            name,
            f"{f['seconds']:.1f} s",
            f"{f['cpu_seconds']:.1f} s",
            f"{f['peak'] / 1e9:.2f} GB",
            _answer(_within(f)) if name != "import" else "",
        ]
        for name, f in figures.items()
    ]
    show(
        "Dry run of a 70B Llama (80 layers, 8192 wide, 64/8 heads; config.json alone)",
        [
            "fresh process",
            "wall time",
            "CPU time",
            "peak memory",
            f"aim: {SECONDS_AIM:.0f} s, {MEMORY_AIM / 1e9:.1f} GB",
        ],
        rows,
        f"median of {arguments.repeat}; whole processes, imports included (the first row is the imports alone)",
    )
    return figures


def conversion(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of a data-free GroupHeads on a sharded bfloat16 checkpoint, beside a copy of it."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        free, wanted = shutil.disk_usage(temporary).free, arguments.gigabytes * 1e9
        if free < 2.5 * wanted:
            raise SystemExit(f"{free / 1e9:.0f} GB are free on the disk; {2.5 * wanted / 1e9:.0f} GB are needed")
        source, target = Path(temporary) / "model", Path(temporary) / "out"
        _fresh(arguments, "make", source, wanted)
        size, layers = _size(source), json.loads((source / "config.json").read_text())["num_hidden_layers"]
        largest = 2 * LLAMA_7B["vocab_size"] * LLAMA_7B["hidden_size"]
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(arguments.repeat):
            for name in ("copy", *arguments.methods):
                runs.setdefault(name, []).append(_fresh(arguments, name, source, target))
                runs[name][-1]["written"] = _size(target)
                shutil.rmtree(target)
        figures = {name: _summary(found) for name, found in runs.items()}
    rows = []
    for name, found in figures.items():
        found["mb_per_second"] = size / 1e6 / found["seconds"]
        found["size_over_peak"] = size / found["peak"]
        rows.append(
            [
                "copy" if name == "copy" else f'GroupHeads(kv_heads=8, method="{name}")',
                f"{found['seconds']:.1f} s",
                f"{found['cpu_seconds']:.1f} s",
                f"{found['mb_per_second']:.0f}",
                f"{found['written'] / 1e9:.2f} GB",
                f"{found['peak'] / 1e9:.2f} GB",
                f"{found['size_over_peak']:.1f}" + ("" if name == "copy" else f" ({_answer(_small(found))})"),
            ]
        )
    show(
        f"Conversion of a {size / 1e9:.1f} GB Llama checkpoint ({layers} layers, 4096 wide, 32/32 heads, bfloat16, "
        f"shards of 1 GB, largest tensor {largest / 1e9:.2f} GB)",
        [
            "fresh process",
            "wall time",
            "CPU time",
            "MB/s read",
            "written",
            "peak memory",
            f"size / peak (aim {RATIO_AIM:.0f})",
        ],
        rows,
        f"median of {arguments.repeat}, in turn; whole processes with their imports; output synced to the disk",
    )
    return figures | {"checkpoint_bytes": size, "layers": layers, "largest_tensor_bytes": largest}


def _fresh(arguments: argparse.Namespace, worker: str, *given: Any) -> dict[str, Any]:
    """Run a worker in a process of its own; what it printed, and its wall time as seen from here."""
    command = [sys.executable, "-m", "benchmarks.scale", "--worker", worker, *map(str, given)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - began
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"seconds": seconds}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds, worst peak."""
    found: dict[str, Any] = {"seconds": median([r["seconds"] for r in runs]), "peak": max(r["peak"] for r in runs)}
    found["cpu_seconds"] = median([r["cpu"] for r in runs])
    found["all_seconds"] = [r["seconds"] for r in runs]
    if "written" in runs[0]:
        found["written"] = runs[0]["written"]
    if "stages" in runs[0]:
        found["stages"] = runs[0]["stages"]
    return found


def _within(found: dict[str, Any]) -> bool:
    return bool(found["seconds"] <= SECONDS_AIM and found["peak"] <= MEMORY_AIM)


def _small(found: dict[str, Any]) -> bool:
    return bool(found["size_over_peak"] >= RATIO_AIM)


def _answer(reached: bool) -> str:
    return "reached" if reached else "missed"


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


# ---------------------------------------------------------------------- what runs in a process of its own


def _work(name: str, folders: list[Path]) -> int:
    """Do one job and print its peak memory in bytes."""
    stages: dict[str, Any] = {}
    if name == "copy":
        _copy(folders[0], folders[1])
    elif name == "make":
        _make(folders[0], float(str(folders[1])))
    else:
        import kvpass

        jobs: dict[str, Callable[[], Any]] = {
            "import": lambda: __import__("kvpass.api"),
            "inspect": lambda: kvpass.inspect(str(folders[0])),
            "plan": lambda: kvpass.plan(str(folders[0]), _group(4)),
        }
        jobs.get(name, lambda: stages.update(_convert(folders[0], folders[1], name)))()
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"peak": peak_memory(), "cpu": used.ru_utime + used.ru_stime, "stages": stages}))
    return 0


def _group(kv_heads: int, method: Any = "mean") -> list[Any]:
    from kvpass.passes import GroupHeads

    return [GroupHeads(kv_heads=kv_heads, method=method)]


def _convert(source: Path, target: Path, method: str) -> dict[str, Any]:
    """Rewrite and save; seconds and peak memory after each stage."""
    import torch

    import kvpass

    began = time.perf_counter()
    slim = kvpass.transform(
        str(source), _group(8, method), dtype=torch.bfloat16, verify="fast", progress=False, device="cpu"
    )
    rewritten = {"seconds": time.perf_counter() - began, "peak": peak_memory()}
    slim.save_pretrained(target)
    return {"transform": rewritten, "save": {"seconds": time.perf_counter() - began, "peak": peak_memory()}}


def _copy(source: Path, target: Path) -> None:
    """Copy a folder's files and bring each to the disk."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _make(folder: Path, size: float) -> None:
    """A random Llama of about so many bytes."""
    write_random(folder, size, LLAMA_7B)


def write_random(folder: Path, size: float, config: dict[str, Any]) -> int:
    """A random Llama of about so many bytes, as deep as that takes, written tensor by tensor; how many layers it has.

    Args:
        folder: to be made.
        size: bytes.
        config: of the model, its number of layers aside; its `dtype` is that of the tensors.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvpass.ir.storage import StreamWriter

    dtype = getattr(torch, config["dtype"])

    def shapes(layers: int) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**config | {"num_hidden_layers": layers}))
        return {n: tuple(p.shape) for n, p in model.named_parameters()}

    def numbers(layers: int) -> int:
        return sum(math.prod(shape) for shape in shapes(layers).values())

    one = numbers(1)
    per_layer = numbers(2) - one
    layers = max(1, round((size / dtype.itemsize - one + per_layer) / per_layer))
    folder.mkdir()
    values = config | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    torch.manual_seed(0)
    with StreamWriter(folder, max_shard_bytes=SHARD) as writer:
        planned = shapes(layers)
        writer.plan([(n, s, dtype) for n, s in planned.items()])
        for name, shape in planned.items():
            if len(shape) == 1:
                tensor = torch.ones(shape, dtype=dtype)
            else:
                tensor = torch.empty(shape, dtype=dtype).normal_(std=0.02)
            writer.write(name, tensor)
            gc.collect()
    return layers


def peak_memory() -> int:
    """The most memory that this process held at once, in bytes.

    Linux's `ru_maxrss` starts from what the parent process held, so the high-water mark of the process itself is read
    where there is one.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
