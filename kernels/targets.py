"""What kernels are run by, and the static tile shapes for each: no tuning at run time, so no start-up cost and no
recompilation in the middle of serving.

A `Target` is a device's architecture, how many multiprocessors it has and how much shared memory a program may take.
Tile shapes stand in a table, per kernel, architecture and width of a head; what fits no row of it is refused, and the
caller falls back to its torch reference.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from kvpass.kernels.store import Store

SHARED_BYTES = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx90a": 65536,
    "gfx942": 65536,
    "gfx950": 163840,
}
"""Shared memory that one program may take, in bytes, per architecture (CUDA programming guide, AMD's ISA guides)."""


@dataclass(frozen=True)
class Target:
    """What kernels run on.

    Attributes:
        arch: "sm_90", "gfx942", ..., or "interpreter".
        processors: multiprocessors (compute units), over which a sequence is split.
    """

    arch: str
    processors: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory per program; that of the smallest architecture where this one is not listed."""
        return SHARED_BYTES.get(self.arch, min(SHARED_BYTES.values()))

    @property
    def large(self) -> bool:
        """Whether large tiles with several stages fit."""
        return self.arch == "interpreter" or self.shared_bytes >= SHARED_BYTES["sm_80"]

    @property
    def amd(self) -> bool:
        return self.arch.startswith("gfx")


INTERPRETER = Target("interpreter", 4)


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut up: rows and columns of a tile, warps, and stages of the software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels, which is decided when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def target_of(device: torch.device) -> Target:
    """What kernels on tensors of `device` run on."""
    if _forced:
        return _forced[-1]
    return INTERPRETER if interpreted() else _device_target(device)


_forced: list[Target] = []


class forced:
    """A context in which kernels are cut for `target`, whatever the device: for compiling ahead of time."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __enter__(self) -> Target:
        _forced.append(self.target)
        return self.target

    def __exit__(self, *_: object) -> None:
        _forced.pop()


@lru_cache(maxsize=16)
def _device_target(device: torch.device) -> Target:
    if device.type != "cuda":
        raise ValueError(
            f"Triton has no code for a {device.type} device: use a GPU, or set TRITON_INTERPRET=1 before Python starts "
            "to have kernels interpreted (slow, for tests)"
        )
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = str(properties.gcnArchName).split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Target(arch, int(properties.multi_processor_count))


def wide(dim: int) -> int:
    """The power of two that holds `dim` channels, at least the 16 that a matrix product takes."""
    return max(16, 1 << (dim - 1).bit_length())


def prefill_tile(target: Target, dtype: torch.dtype, dim: int, store: Store, paged: bool) -> Tile:
    """Many queries: tiles of (query, head of a group) rows by keys. `dim` is a power of two."""
    if target.arch == "interpreter":
        return _in_group(Tile(128, 128, 4, 1), store)
    if store.group:
        return decode_tile(target, dtype, dim, store, paged)
    if dtype == torch.float32:
        if target.amd:
            return Tile(32, 32, 4, 1)
        if dim > 128:
            return Tile(16, 16, 8, 2) if target.large else Tile(16, 32, 8, 1)
        return Tile(16, 32, 8, 2 if target.large else 1) if dim > 64 else Tile(32, 32, 8, 2)
    if target.amd:
        return Tile(64, 32, 4, 1)
    if dim > 128:
        return Tile(32, 32, 4, 2) if store.bits == 4 else Tile(64, 32, 8, 1 if store.bits else 2)
    if store.bits and dim > 64 and target.arch not in ("sm_90", "sm_100"):
        return Tile(128, 16, 8, 2)
    if store.bits or paged or not target.large:
        return Tile(64, 32, 8, 2)
    return Tile(128, 32 if target.arch == "sm_80" else 64, 8, 3)


def decode_tile(target: Target, dtype: torch.dtype, dim: int, store: Store, paged: bool) -> Tile:
    """A few queries: their heads of a group in 16 rows, against long runs of keys. `dim` is a power of two."""
    if target.arch == "interpreter":
        return _in_group(Tile(16, 128, 4, 1), store)
    if store.group:
        return _in_group(Tile(16, 32, 4, 1) if target.amd else Tile(16, 32, 8, 2), store)
    if target.amd:
        return Tile(16, 32 if dim > 128 or dtype == torch.float32 else 64, 4, 1)
    if dtype == torch.float32:
        return Tile(16, 16 if dim > 128 else 32, 8, 2)
    if dim > 128:
        return Tile(16, 32, 4, 3 if target.large else 2)
    if store.bits and (paged or target.arch not in ("sm_80", "sm_90")):
        return Tile(16, 64, 4, 2)
    return Tile(16, 64, 4, 3 if target.large else 2)


def _in_group(tile: Tile, store: Store) -> Tile:
    """The keys of a tile share the parameters of one group under KIVI."""
    return replace(tile, columns=min(tile.columns, store.group)) if store.group else tile


def splits(target: Target, programs: int, tiles: int) -> int:
    """Into how many runs of tiles each sequence is cut, so that `programs` of them fill the machine twice.

    Depends on shapes and the machine alone, never on how long sequences are now: a CUDA graph holds for all lengths.
    """
    wanted = -(-2 * target.processors // max(1, programs))
    return max(1, min(1 << (wanted - 1).bit_length(), 64, -(-tiles // 2)))
