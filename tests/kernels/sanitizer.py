"""What Triton's interpreter lets pass and a GPU does not: checks of kernels under `TRITON_INTERPRET=1`.

    with sanitize():
        append(cache, k, v, starts, stops, store)  # any number of launches

Every access of a launch is held against the tensors among its arguments. A `Defect` is raised for

- a load or store outside all of them, from their first to their last element (not only their storages), or at an
  address that is no multiple of its size, which a GPU refuses;
- one store that writes an address twice: which lane wins is not defined;
- two programs of one launch that write one address, or one that reads what another writes: programs have no order.
  Atomics may meet each other; only their bounds are checked.

Inside `sanitize()`, or inside `bfloat16()` alone, bfloat16 is computed as a GPU does, in float32 and rounded to nearest
even; the interpreter itself multiplies and compares the bits as integers, and rounds towards zero.

The interpreter runs programs one after the other in one thread, and so does this. Works with Triton 3.6 to 3.9; where
kernels are compiled, nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface, TensorHandle, _ir

NOBODY, SEVERAL = 0, -1


class Defect(AssertionError):
    """A kernel did what has no defined result on a GPU."""


@contextmanager
def sanitize() -> Iterator[None]:
    """Check every launch inside, and compute bfloat16 rightly."""
    old = InterpreterBuilder
    checks = {
        "create_masked_load": partial(_checked, old.create_masked_load, "load", 0, 1),
        "create_masked_store": partial(_checked, old.create_masked_store, "store", 0, 2),
        "create_atomic_rmw": partial(_checked, old.create_atomic_rmw, "atomic", 1, 3),
        "create_atomic_cas": partial(_checked, old.create_atomic_cas, "atomic", 0, None),
    }
    launch = partial(_launch, GridExecutor.__call__)
    with bfloat16(), _replace(InterpreterBuilder, **checks), _replace(GridExecutor, __call__=launch):
        yield


def _replace(owner: type, **functions: Callable[..., Any]) -> Any:
    """Methods in the place of others, for a while; before Triton 3.9 there is no `get_bf16`."""
    return mock.patch.multiple(owner, create=True, **{name: _method(function) for name, function in functions.items()})


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **keywords: function(*arguments, **keywords)


# ---------------------------------------------------------------------- addresses


@dataclass
class _Region:
    """A stretch of memory that a launch may touch, and which of its programs did.

    Attributes:
        low, high: addresses of its first byte and behind its last.
        step: bytes told apart: the smallest element of the tensors there.
        written, read: [(high - low) / step] int32: number of the program, from 1; NOBODY, or SEVERAL programs.
    """

    low: int
    high: int
    step: int
    written: np.ndarray | None = field(default=None, repr=False)
    read: np.ndarray | None = field(default=None, repr=False)

    def table(self, name: str) -> np.ndarray:
        """`written` or `read`, made at its first use: zeros that are never touched cost nothing."""
        found = getattr(self, name)
        if found is None:
            found = np.zeros(-(-(self.high - self.low) // self.step), np.int32)
            setattr(self, name, found)
        return found


_regions: list[_Region] = []


def _launch(old: Callable[..., Any], executor: GridExecutor, *arguments: Any, **keywords: Any) -> None:
    """One launch, with regions of its own."""
    _regions[:] = _extents(_tensors([*arguments, *keywords.values()]))
    try:
        old(executor, *arguments, **keywords)
    except InterpreterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Defect):
            cause = cause.__cause__
        if cause is None:
            raise
        raise Defect(f"{executor.fn.__name__}: {cause}") from error
    finally:
        _regions.clear()


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple | list):
            yield from _tensors(argument)
        elif isinstance(argument, Tensor):
            yield argument
        elif hasattr(argument, "base"):  # a tensor descriptor, or a tensor with another type
            yield argument.base


def _extents(tensors: Iterable[Tensor]) -> list[_Region]:
    """The memory of some tensors from first to last element, no further than their storages, without overlaps."""
    found: list[_Region] = []
    spans = []
    for x in tensors:
        if x.numel():
            low, storage = x.data_ptr(), x.untyped_storage()
            last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            high = min(low + (last + 1) * x.element_size(), storage.data_ptr() + storage.nbytes())
            spans.append((low, high, x.element_size()))
    for low, high, step in sorted(spans):
        if found and low < found[-1].high:
            found[-1].high = max(found[-1].high, high)
            found[-1].step = min(found[-1].step, step)
        else:
            found.append(_Region(low, high, step))
    return found


def _checked(
    old: Callable[..., Any],
    what: str,
    pointer: int,
    mask: int | None,
    builder: InterpreterBuilder,
    *arguments: Any,
    **keywords: Any,
) -> TensorHandle:
    """An access whose addresses are looked at first; its pointers and its mask are the arguments of these numbers."""
    pointers = arguments[pointer]
    addresses = pointers.data.ravel()
    if mask is not None:
        addresses = addresses[np.broadcast_to(arguments[mask].data, pointers.data.shape).ravel()]
    if addresses.size:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        _check(what, addresses, size, builder.grid_idx, builder.grid_dim)
    return old(builder, *arguments, **keywords)


def _check(what: str, addresses: np.ndarray, size: int, program: tuple[int, ...], grid: tuple[int, ...]) -> None:
    where = f"{what} of {size} bytes in program {program}"
    if (addresses & np.uint64(size - 1)).any():
        raise Defect(f"{where}: misaligned address")
    if what == "store" and (np.diff(np.sort(addresses)) < size).any():
        raise Defect(f"{where}: one address is written twice")
    x, y, z = program
    me = x + grid[0] * (y + grid[1] * z) + 1
    left = addresses
    for region in _regions:
        inside = (left >= np.uint64(region.low)) & (left <= np.uint64(max(region.high - size, 0)))
        if not inside.any():
            continue
        here = left if inside.all() else left[inside]
        if what != "atomic":
            _own(region, here, size, what, me, grid, where)
        left = left[~inside]
        if not left.size:
            return
    near = min(_regions, key=lambda r: min(abs(int(left[0]) - r.low), abs(int(left[0]) - r.high)), default=None)
    place = (
        "" if near is None else f", the first {int(left[0]) - near.low} bytes into a tensor of {near.high - near.low}"
    )
    raise Defect(f"{where}: out of bounds with {left.size} of {addresses.size} elements{place}")


def _own(region: _Region, addresses: np.ndarray, size: int, what: str, me: int, grid: Any, where: str) -> None:
    """Note who touched what, unless another program's accesses forbid it."""
    index = ((addresses - np.uint64(region.low)) // np.uint64(region.step)).astype(np.intp)
    if size > region.step:
        index = index[:, None] + np.arange(size // region.step)
    if region.written is not None or what == "store":
        writers = region.table("written")[index]
        _alone(writers, me, grid, f"{where}: a race, the address is written by program")
    if what == "load":
        readers = region.table("read")
        before = readers[index]
        readers[index] = np.where((before == NOBODY) | (before == me), np.int32(me), np.int32(SEVERAL))
        return
    if region.read is not None:
        _alone(region.read[index], me, grid, f"{where}: a race, the address is read by program")
    region.table("written")[index] = me


def _alone(others: np.ndarray, me: int, grid: Any, message: str) -> None:
    clash = others[(others != NOBODY) & (others != me)]
    if clash.size:
        number = int(clash[0]) - 1
        who = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
        raise Defect(f"{message} {who if number >= 0 else 'several others'}")


# ---------------------------------------------------------------------- bfloat16


@contextmanager
def bfloat16() -> Iterator[None]:
    """Compute bfloat16 as float32 rounded to nearest even."""
    old = InterpreterBuilder
    builder = {
        "get_bf16": lambda builder, value: narrow(np.array([value], np.float32)),
        "cast_impl": partial(_cast, old.cast_impl),
        "create_fp_to_fp": partial(_convert, old.create_fp_to_fp),
        "create_dot": partial(_arithmetic, old.create_dot, 3),
        "create_fma": partial(_arithmetic, old.create_fma, 3),
        "binary_op": partial(_arithmetic, old.binary_op, 2),
        "unary_op": partial(_arithmetic, old.unary_op, 1),
        "create_clampf": partial(_arithmetic, old.create_clampf, 3),
        "create_rsqrt": partial(_arithmetic, old.create_rsqrt, 1),
    }
    reduce = partial(_reduce, ReduceScanOpInterface.apply)
    with _replace(InterpreterBuilder, **builder), _replace(ReduceScanOpInterface, apply=reduce):
        yield


def _is_bfloat16(handle: TensorHandle) -> bool:
    """Whether the numbers are bits of bfloat16; comparisons keep their operands' type and hold booleans."""
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def widen(handle: TensorHandle) -> TensorHandle:
    """bfloat16 as float32; others as they are."""
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def narrow(values: np.ndarray) -> TensorHandle:
    """float32 rounded to bfloat16: to the nearest, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _arithmetic(
    old: Callable[..., Any], count: int, builder: InterpreterBuilder, *arguments: Any, **keywords: Any
) -> TensorHandle:
    """An operation whose first `count` arguments are numbers; the last of them has the type of the result."""
    operands, rest = arguments[:count], arguments[count:]
    if not any(_is_bfloat16(x) for x in operands):
        return old(builder, *arguments, **keywords)
    result = old(builder, *map(widen, operands), *rest, **keywords)
    return narrow(result.data) if _is_bfloat16(operands[-1]) and result.data.dtype == np.float32 else result


def _cast(old: Callable[..., Any], builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    source = widen(source)
    return narrow(source.data.astype(np.float32)) if target.scalar == tl.bfloat16 else old(builder, source, target)


def _convert(
    old: Callable[..., Any], builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype, rounding: Any
) -> TensorHandle:
    """A cast between types of 16 bits, to or from 8 bits, or with a rounding of its own."""
    source = widen(source)
    nearest = target.scalar in (tl.bfloat16, tl.float16, tl.float32) and rounding != _ir.ROUNDING_MODE.RTZ
    return builder.cast_impl(source, target) if nearest else old(builder, source, target, rounding)


def _reduce(old: Callable[..., Any], operation: ReduceScanOpInterface, tensors: Any) -> Any:
    if not isinstance(tensors, tuple):
        return operation.apply((tensors,))[0]
    found = old(operation, tuple(_typed(widen(x.handle), x) if _is_bfloat16(x.handle) else x for x in tensors))
    return tuple(
        _typed(narrow(y.handle.data), y) if _is_bfloat16(x.handle) else y for x, y in zip(tensors, found, strict=True)
    )


def _typed(handle: TensorHandle, like: tl.tensor) -> tl.tensor:
    kind = handle.dtype.scalar
    return tl.tensor(handle, tl.block_type(kind, like.type.shape) if like.type.is_block() else kind)
