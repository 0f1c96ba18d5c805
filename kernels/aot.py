"""Compile kernels for GPUs that are not there, and read what came out: registers, spills, shared memory, variants.

A `Case` runs a host function of a kernel on small CPU tensors. Inside `compile_for` a launch takes the path it takes on
a GPU (types, divisibility, constants folded in) up to the machine code, and then does nothing. So what is counted are
the kernels as they will run, and a case that goes through several lengths counts how often a length recompiles.

    python -m kvpass.kernels.aot [--json] [--targets sm_90 gfx942] [--module kvpass.kernels.cases] [--workers 4]

The module named has `cases(target) -> list[Case]`. The exit status is 1 where a case fails to compile or a kernel has
`problems`. Interpreted kernels cannot be compiled, so it needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from kvpass.kernels.targets import SHARED_BYTES, Target, forced, interpreted

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 108),
    "sm_86": (GPUTarget("cuda", 86, 32), 84),
    "sm_90": (GPUTarget("cuda", 90, 32), 132),
    "sm_100": (GPUTarget("cuda", 100, 32), 148),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 304),
}
"""What kernels are compiled for, with the multiprocessors of A100, A40, H100, B200 and MI300X."""


@dataclass(frozen=True)
class Case:
    """Launches to compile.

    Attributes:
        label: says with what.
        launch: runs a host function, once or for several lengths.
        variants: how many variants of one kernel it needs, because it launches it with several sets of constants.
        kernel: name of the function that it is about, where others that are launched have cases of their own.
    """

    label: str
    launch: Callable[[], object]
    variants: int = 1
    kernel: str = ""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes in one case; of its variants, the most.

    Attributes:
        kernel: name of the function.
        target: key of `TARGETS`.
        label: that of the case.
        registers: per thread.
        spills: bytes of registers per thread that do not fit and go to memory.
        shared: bytes of shared memory per program.
        scalar_loads: instructions that load one byte from global memory: wide ones were prevented by an alignment that
            the compiler could not see.
        variants: how often the kernel was compiled.
        needed: how often the case says that it has to be.
    """

    kernel: str
    target: str
    label: str
    registers: int
    spills: int
    shared: int
    scalar_loads: int
    variants: int
    needed: int

    @property
    def problems(self) -> list[str]:
        """Why this kernel should not run there, or not like this."""
        limit = SHARED_BYTES[self.target]
        found = {
            f"spills {self.spills} bytes per thread": self.spills > 0,
            f"takes {self.shared} bytes of shared memory where {limit} fit": self.shared > limit,
            f"loads single bytes with {self.scalar_loads} instructions": self.scalar_loads > 0,
            f"was compiled {self.variants} times, not {self.needed}": self.variants > self.needed,
        }
        return [text for text, holds in found.items() if holds]


@dataclass(frozen=True)
class Failure:
    """A case that did not compile."""

    target: str
    label: str
    message: str


# ---------------------------------------------------------------------- compiling


class _Absent(DriverBase):
    """A device that is not there: code is generated for it, and its launches do nothing."""

    numbers = count(1000)  # kernels are cached per device, so each of these finds no kernels of others

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.device = next(self.numbers)
        self.kernels: dict[Any, list[Any]] = {}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**31},
            load_binary=lambda name, code, shared, device: (None, None, 0, 0, 2**31),
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What runs a kernel that was just compiled: nothing, but it is noted."""
        self.kernels[source.fn] = list(source.fn.device_caches[self.device][0].values())
        return lambda *arguments: None

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("there is no device to write a launcher for")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("there is no device to measure on")


def _compiles() -> None:
    if interpreted():
        raise ValueError("kernels of this process are interpreted: compile in one without TRITON_INTERPRET")


@contextmanager
def compile_for(target: str) -> Iterator[dict[Any, list[Any]]]:
    """Inside, launches compile for `target` and do nothing.

    Yields what was compiled so far: for every `@triton.jit` function that was launched, its variants as
    `triton.compiler.CompiledKernel`.
    """
    _compiles()
    if target not in TARGETS:
        raise ValueError(f"no target {target!r}: choose from {', '.join(TARGETS)}")
    architecture, processors = TARGETS[target]
    before, absent = driver._active, _Absent(architecture)
    driver.set_active(absent)
    try:
        with forced(Target(target, processors)):
            yield absent.kernels
    finally:
        driver.set_active(before)


def measure(case: Case, target: str) -> list[Resources]:
    """Compile a case and read what each of its kernels takes."""
    with compile_for(target) as kernels:
        case.launch()
    found = []
    for function, variants in kernels.items():
        if case.kernel not in ("", function.__name__):
            continue
        registers, spills, shared, loads = map(max, zip(*map(_figures, variants), strict=True))
        found.append(
            Resources(
                function.__name__, target, case.label, registers, spills, shared, loads, len(variants), case.variants
            )
        )
    return found


# ---------------------------------------------------------------------- reading


def _figures(kernel: Any) -> tuple[int, int, int, int]:
    """Registers, spilled bytes, bytes of shared memory, loads of single bytes."""
    if "cubin" in kernel.asm:
        registers, spills = _usage(kernel.asm["cubin"])
        loads = re.findall(r"\bld\.global(?:\.(?!v[248]\b)[\w:]+)*\.[usb]8\b", kernel.asm["ptx"])
    else:
        text = kernel.asm["amdgcn"]
        # scalar registers spill too, into lanes of vector registers: the stack has room for them that is not used
        registers, spills = _field(text, "vgpr_count"), 4 * _field(text, "vgpr_spill_count")
        loads = re.findall(r"\b(?:global|buffer|flat)_load_[us]byte", text)
    return registers, spills, int(kernel.metadata.shared), len(loads)


def _field(text: str, name: str) -> int:
    """A number of the metadata behind AMD's assembler text."""
    found = re.search(rf"^[\s-]*\.{name}:\s*(\d+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the compiled kernel says nothing of {name}: this version of Triton writes other metadata")
    return int(found[1])


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a kernel for NVIDIA."""
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        raise ValueError(
            "this wheel of Triton comes without cuobjdump, which tells registers and spills: install Triton from PyPI, "
            "or set TRITON_CUOBJDUMP_PATH to that of a CUDA toolkit"
        ) from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of registers: {text.strip()[:200]!r}")
    return int(found[1]), int(found[2])


# ---------------------------------------------------------------------- all cases


def measure_all(module: str, targets: Sequence[str], workers: int = 0) -> tuple[list[Resources], list[Failure]]:
    """All cases of a module for some targets, in worker processes (0: one per core), in the order of the cases."""
    _compiles()
    jobs = [(module, target, index) for target in targets for index in range(len(_cases(module, target)))]
    resources: list[Resources] = []
    failures: list[Failure] = []
    with (
        _cache_folder(),
        ProcessPoolExecutor(workers or os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        for found in pool.map(_job, jobs):
            if isinstance(found, Failure):
                failures.append(found)
            else:
                resources += found
    return resources, failures


@lru_cache
def _cases(module: str, target: str) -> list[Case]:
    found: list[Case] = importlib.import_module(module).cases(target)
    return found


def _job(job: tuple[str, str, int]) -> list[Resources] | Failure:
    """One case, in a worker process; what a compiler raises may be of any class."""
    module, target, index = job
    torch.set_num_threads(1)
    case = _cases(module, target)[index]
    try:
        return measure(case, target)
    except Exception as error:
        return Failure(target, case.label, f"{type(error).__name__}: {error}")


@contextmanager
def _cache_folder() -> Iterator[None]:
    """Worker processes cache compiled kernels in a folder that starts empty, where the user has not named one."""
    name = "TRITON_CACHE_DIR"
    if name in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile kernels for GPUs that are not there.")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--module", default="kvpass.kernels.cases", help="has cases(target) -> list[Case]")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    arguments = parser.parse_args()
    resources, failures = measure_all(arguments.module, arguments.targets, arguments.workers)
    if arguments.json:
        rows = [asdict(r) | {"problems": r.problems} for r in resources]
        document = {"triton": triton.__version__, "resources": rows, "failures": [asdict(f) for f in failures]}
        print(json.dumps(document, indent=1))
    else:
        for r in resources:
            print(
                f"{r.target} {r.label} {r.kernel}: {r.registers} registers, {r.shared} bytes shared",
                *r.problems,
                sep="; ",
            )
        for f in failures:
            print(f"{f.target} {f.label}: {f.message}")
    return int(bool(failures) or any(r.problems for r in resources))


if __name__ == "__main__":
    sys.exit(main())
