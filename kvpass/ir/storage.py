"""Tensors on disk: safetensors read and written one tensor at a time, so that memory holds one tensor and not a model.

No pickle is read, nothing is mapped into memory, and a file is held against its own header before any tensor is read.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpass.errors import OutputError, SourceError
from kvpass.output import output_error

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000
_PIECE = 1 << 30
_CHUNK = 1 << 22
_DAMAGED = "download it again: the file is truncated or damaged"


class TensorStore(Protocol):
    """Named tensors that are read when they are asked for."""

    def names(self) -> list[str]:
        """All names, in a fixed order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading it."""
        ...

    def load(self, name: str) -> Tensor:
        """Read one tensor, on the CPU."""
        ...


class MemoryStore:
    """A `TensorStore` over tensors that are already in memory; `load` returns them as they are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        """All names, in the order given."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self.load(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self.load(name).dtype

    def load(self, name: str) -> Tensor:
        """The tensor; SourceError for a name that is not stored."""
        if name not in self._tensors:
            raise _unknown(name, "memory")
        return self._tensors[name]


@dataclass(frozen=True)
class _Entry:
    """Where one tensor's bytes stand in a shard."""

    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


_Stamp = tuple[int, int, int, int]


class SafetensorsStore:
    """A `TensorStore` over the safetensors of a model folder: `model.safetensors`, or an index and its shards.

    Headers are read and checked when the store is opened; each `load` then reads that one tensor into a new buffer.
    Safe to use from several threads.

    Raises:
        SourceError: there are no safetensors, or a file is damaged (with its name, and the tensor's where one is).
    """

    def __init__(self, folder: str | Path) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._stamps: dict[Path, _Stamp] = {}
        self._folder = Path(folder)
        self._entries = self._open()

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, from the header."""
        return self._entry(name).dtype

    def load(self, name: str) -> Tensor:
        """Read one tensor into a new buffer on the CPU.

        Raises:
            SourceError: no such tensor, the file changed since it was opened, or the disk failed.
        """
        entry = self._entry(name)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        try:
            got = _read_into(self._descriptor(entry.shard), data.numpy().data, entry.offset)
        except OSError as error:
            raise SourceError(
                f"cannot read {name}: {error.strerror or error}", where=str(entry.shard), fix="check the disk and retry"
            ) from error
        if got < entry.nbytes:
            raise SourceError(
                f"{name} takes {entry.nbytes} bytes, and the file ends after {got} of them: it changed after opening",
                where=str(entry.shard),
                fix=_DAMAGED,
            )
        return data.view(entry.dtype).reshape(entry.shape)

    def close(self) -> None:
        """Close the files; a later `load` opens them again."""
        with self._lock:
            while self._descriptors:
                _, descriptor = self._descriptors.popitem()
                with suppress(OSError):
                    os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise _unknown(name, str(self._folder))
        return self._entries[name]

    def _descriptor(self, shard: Path) -> int:
        with self._lock:
            if shard not in self._descriptors:
                descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
                if _stamp(descriptor) != self._stamps[shard]:
                    os.close(descriptor)
                    raise SourceError(
                        "the file changed after it was opened", where=str(shard), fix="start again with the new file"
                    )
                self._descriptors[shard] = descriptor
            return self._descriptors[shard]

    def _open(self) -> dict[str, _Entry]:
        folder = self._folder
        if not folder.is_dir():
            raise SourceError("the model folder does not exist", where=str(folder), fix="check the path")
        if (folder / SINGLE).is_file():
            return self._header(folder / SINGLE)
        if not (folder / INDEX).is_file():
            raise _no_weights(folder)
        weight_map = _weight_map(folder / INDEX)
        shards: dict[str, dict[str, _Entry]] = {}
        entries: dict[str, _Entry] = {}
        for name, file in weight_map.items():
            if file not in shards:
                if not (folder / file).is_file():
                    raise SourceError(
                        f"the index names a shard that is missing: {file} (with {name})",
                        where=str(folder / file),
                        fix="download the missing file",
                    )
                shards[file] = self._header(folder / file)
            if name not in shards[file]:
                raise SourceError(
                    f"the index says that {name} is in {file}, and it is not there",
                    where=str(folder / file),
                    fix="download the index and its shards again: they do not belong together",
                )
            entries[name] = shards[file][name]
        return entries

    def _header(self, shard: Path) -> dict[str, _Entry]:
        try:
            descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._stamps[shard] = _stamp(descriptor)
                return _read_header(descriptor, shard)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise SourceError(
                f"cannot read the file: {error.strerror or error}", where=str(shard), fix="check its permissions"
            ) from error


def _unknown(name: str, where: str) -> SourceError:
    return SourceError(f"there is no tensor {name}", where=where)


def _no_weights(folder: Path) -> SourceError:
    if any(folder.glob("pytorch_model*.bin")):
        return SourceError(
            "the folder holds its weights as pickle (pytorch_model*.bin), and kvpass reads no pickle",
            where=str(folder),
            fix="convert it with transformers: model.save_pretrained(folder, safe_serialization=True)",
        )
    others = sorted(p.name for p in folder.glob("*.safetensors") if p.is_file())
    if others:
        return SourceError(
            f"the folder holds {others[0]}, and neither {SINGLE} nor {INDEX}",
            where=str(folder),
            fix=f"download {INDEX}, or rename a single file to {SINGLE}",
        )
    return SourceError(
        f"the folder holds no weights (neither {SINGLE} nor {INDEX})",
        where=str(folder),
        fix="give the folder of a model in safetensors",
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The index: tensor name -> file name in the same folder."""
    try:
        document = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"the index is not JSON: {error}", where=str(index), fix=_DAMAGED) from error
    except OSError as error:
        raise SourceError(
            f"cannot read the index: {error.strerror or error}", where=str(index), fix="check its permissions"
        ) from error
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found:
        raise SourceError("the index has no weight_map", where=str(index), fix=_DAMAGED)
    for name, file in found.items():
        if not isinstance(file, str) or not file or "\0" in file or Path(file).name != file:
            raise SourceError(
                f"the index gives {file!r} for {name}, and not the name of a file beside it",
                where=str(index),
                fix=_DAMAGED,
            )
    return found


def _stamp(descriptor: int) -> _Stamp:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill `view` from a file's `offset`; the number of bytes read, fewer only where the file ends."""
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done : done + _PIECE]], offset + done)
        if got == 0:
            break
        done += got
    return done


def _read_header(descriptor: int, shard: Path) -> dict[str, _Entry]:
    """Read and check the header of an open safetensors file: name -> where its bytes are, in file order."""

    def damaged(what: str, fix: str = _DAMAGED) -> SourceError:
        return SourceError(what, where=str(shard), fix=fix)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError(f"{Counter(n for n, _ in pairs).most_common(1)[0][0]} is there twice")
        return found

    size = os.fstat(descriptor).st_size
    start = bytearray(8)
    if _read_into(descriptor, memoryview(start), 0) < 8:
        raise damaged(f"the file has {size} bytes, too few for safetensors")
    if start == b"version ":
        raise damaged("the file is a pointer of git-lfs, not the weights", "run `git lfs pull`")
    length = int.from_bytes(start, "little")
    if not 2 <= length <= _HEADER_LIMIT:
        raise damaged(f"the file is not safetensors: its header would have {length} bytes")
    header = bytearray(length)
    if length > size - 8 or _read_into(descriptor, memoryview(header), 8) < length:
        raise damaged(f"the file has {size} bytes, fewer than its header of {length} bytes")
    try:
        document = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise damaged(f"the header is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise damaged("the header is not a JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise damaged("the header's __metadata__ is not a JSON object")

    base = 8 + length
    entries = {name: _read_entry(name, fields, shard, base) for name, fields in document.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    end = base
    for name, entry in ordered:
        if entry.offset != end:
            problem = "overlap those of the tensor before it" if entry.offset < end else "leave a hole before it"
            raise damaged(f"the bytes of {name} {problem}")
        end += entry.nbytes
        if end > size:
            raise damaged(f"the file has {size} bytes, and {name} would end at {end}")
    if end < size:
        raise damaged(f"the file has {size} bytes, and its tensors end at {end}")
    return dict(ordered)


def _read_entry(name: str, fields: Any, shard: Path, base: int) -> _Entry:
    """Check one entry of a header; its offsets count from `base`."""

    def damaged(what: str, fix: str = _DAMAGED) -> SourceError:
        return SourceError(f"{name}: {what}", where=str(shard), fix=fix)

    def counts(value: Any) -> list[int] | None:
        fits = isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
        return value if fits else None

    if not isinstance(fields, dict):
        raise damaged("its entry in the header is not a JSON object")
    code, shape, offsets = fields.get("dtype"), counts(fields.get("shape")), counts(fields.get("data_offsets"))
    if not isinstance(code, str) or code not in _DTYPES:
        raise damaged(f"unknown dtype {code!r}", f"kvpass reads {', '.join(_DTYPES)}; convert the checkpoint")
    if shape is None or math.prod(n for n in shape if n) >= 1 << 60:
        raise damaged(f"its shape is {str(fields.get('shape'))[:80]}")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(f"its offsets are {str(fields.get('data_offsets'))[:80]}")
    dtype, nbytes = _DTYPES[code], offsets[1] - offsets[0]
    needed = math.prod(shape) * dtype.itemsize
    if nbytes != needed:
        raise damaged(f"a {code} tensor of shape {shape} takes {needed} bytes, and {nbytes} are given")
    return _Entry(shard, dtype, tuple(shape), base + offsets[0], nbytes)


class StreamWriter:
    """Write a folder's safetensors one tensor at a time: `plan`, then `write` in any order, then `close`.

    Files are written in place, so write into a folder of `kvpass.output.output_folder`. As a context manager it closes
    at the end of the block; after an exception it only lets the files go.

    Args:
        folder: an existing folder.
        max_shard_bytes: tensors of more bytes in all are split over several files; a larger tensor has its own.
        metadata: the `__metadata__` of each file.

    Raises:
        OutputError: the system refused to write (a full disk, no permission), or a dtype has no name in safetensors.
        ValueError: the calls contradict the plan.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._descriptors: dict[Path, int] = {}
        self._folder = Path(folder)
        self._limit = max_shard_bytes
        self._metadata = {"format": "pt"} if metadata is None else dict(metadata)
        self._entries: dict[str, _Entry] | None = None
        self._waiting: set[str] = set()

    def plan(self, tensors: Iterable[tuple[str, Sequence[int], torch.dtype]]) -> None:
        """Say what will be written, (name, shape, dtype) each; creates the files and writes their headers."""
        if self._entries is not None:
            raise ValueError("plan() was called before")
        self._entries = {}
        shards: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
        seen: set[str] = set()
        filled = total = 0
        for name, shape, dtype in tensors:
            if name in seen or name == "__metadata__":
                raise ValueError(f"{name} is planned twice" if name in seen else f"{name} is no name for a tensor")
            if dtype not in _CODES:
                raise OutputError(f"{name} has dtype {dtype}, which safetensors cannot hold", where=str(self._folder))
            seen.add(name)
            nbytes = math.prod(shape) * dtype.itemsize
            if shards[-1] and filled + nbytes > self._limit:
                shards.append([])
                filled = 0
            shards[-1].append((name, tuple(shape), dtype))
            filled += nbytes
            total += nbytes
        for number, content in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._start(self._folder / file, content)
        self._waiting = set(self._entries)
        if len(shards) > 1:
            weight_map = {n: self._entries[n].shard.name for n in sorted(self._entries)}
            document = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self._put(self._create(self._folder / INDEX), (json.dumps(document, indent=2) + "\n").encode("utf-8"))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor; it may be on any device and have any strides."""
        if self._entries is None or name not in self._entries:
            raise ValueError(f"{name} was not planned")
        if name not in self._waiting:
            raise ValueError(f"{name} was written before")
        entry = self._entries[name]
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise ValueError(
                f"{name} was planned as {entry.dtype} {entry.shape}, and is {tensor.dtype} {tuple(tensor.shape)}"
            )
        if entry.shard not in self._descriptors:
            raise ValueError("the writer is closed")
        if entry.nbytes:
            data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            self._put(entry.shard, data.numpy().data, entry.offset)
        self._waiting.discard(name)

    def close(self) -> None:
        """Bring the files to the disk and close them; ValueError when a planned tensor was not written."""
        try:
            if self._waiting and self._descriptors:
                some = ", ".join(sorted(self._waiting)[:3])
                raise ValueError(f"{len(self._waiting)} planned tensors were not written: {some}")
            for path, descriptor in self._descriptors.items():
                try:
                    os.fsync(descriptor)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                        raise output_error(error, path) from error
        finally:
            self._release()

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._release()

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self._release()

    def _release(self) -> None:
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            with suppress(OSError):
                os.close(descriptor)

    def _start(self, shard: Path, content: list[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
        """Create a shard, place its tensors (wide dtypes first, so that all are aligned) and write its header."""
        assert self._entries is not None
        document: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        ordered = sorted(content, key=lambda item: -item[2].itemsize)
        end = 0
        for name, shape, dtype in ordered:
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            document[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header = json.dumps(document, separators=(",", ":")).encode("utf-8")
        header += b" " * (-len(header) % 8)
        base = 8 + len(header)
        for name, shape, dtype in ordered:
            begin, end = document[name]["data_offsets"]
            self._entries[name] = _Entry(shard, dtype, shape, base + begin, end - begin)
        self._put(self._create(shard), len(header).to_bytes(8, "little") + header)

    def _create(self, path: Path) -> Path:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._descriptors[path] = os.open(path, flags, 0o666)
        except OSError as error:
            raise output_error(error, path) from error
        return path

    def _put(self, path: Path, data: bytes | memoryview, offset: int = 0) -> None:
        view = memoryview(data)
        done = 0
        try:
            while done < len(view):
                wrote = os.pwrite(self._descriptors[path], view[done : done + _PIECE], offset + done)
                if wrote == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done += wrote
        except OSError as error:
            raise output_error(error, path) from error


def first_nonfinite(tensor: Tensor) -> tuple[int, ...] | None:
    """The index of the first NaN or infinity (in row-major order), or None; the memory it takes is bounded."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return None
    if tensor.numel() <= _CHUNK:
        values = tensor.detach()
        bad = ~torch.isfinite(values.float() if values.element_size() == 1 else values)
        if not bool(bad.any()):
            return None
        flat = int(bad.reshape(-1).to(torch.uint8).argmax())
        return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape))
    rows = tensor.shape[0]
    step = _CHUNK * rows // tensor.numel()
    if step == 0:
        for row in range(rows):
            found = first_nonfinite(tensor[row])
            if found is not None:
                return (row, *found)
        return None
    for start in range(0, rows, step):
        found = first_nonfinite(tensor[start : start + step])
        if found is not None:
            return (start + found[0], *found[1:])
    return None
