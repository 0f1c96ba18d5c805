"""Outputs that appear whole or not at all: a folder or a file is made beside its place and renamed when it is done."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import signal
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from kvpass.errors import OutputError, RequestError

_WORDS = {
    errno.ENOSPC: ("the disk is full", "free some space, or write to another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or write to another disk"),
    errno.EFBIG: ("the file is larger than the file system or this process may write", "raise `ulimit -f`"),
    errno.EROFS: ("the file system is read-only", "write to another place"),
    errno.EACCES: ("there is no permission to write here", "write to another place, or change the permissions"),
    errno.EPERM: ("there is no permission to write here", "write to another place, or change the permissions"),
    errno.EIO: ("the disk reports an error", "check the disk, or write to another one"),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "choose a shorter one"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another path"),
    errno.EEXIST: ("something appeared there in the meantime", "choose another path"),
    errno.ENOTEMPTY: ("something appeared there in the meantime", "choose another path"),
}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
PROGRAM = "kvpass.json"  # in every folder that `Transformed.save` wrote
_OURS = ("config.json", PROGRAM)
_SUFFIXES = (".safetensors", ".onnx")


def holds_program(folder: str | Path) -> bool:
    """Whether `Transformed.save` wrote a folder; looking imports nothing slow."""
    return (Path(folder) / PROGRAM).is_file()


def output_error(error: OSError, path: str | Path) -> OutputError:
    """The `OutputError` that says in plain words what the system refused while `path` was written."""
    words, fix = _WORDS.get(error.errno or 0, (error.strerror or str(error), ""))
    return OutputError(f"cannot write: {words}", where=str(path), fix=fix)


@contextmanager
def output_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends, and is removed when it raises.

    SIGTERM in the block raises SystemExit(143) where the process has no handler of its own, so it cleans up too.

    Args:
        path: the folder to write; missing parents are made.
        overwrite: replace a model folder that stands there; the old one stays until the new one is complete.

    Raises:
        RequestError: `path` is a file, or a folder with content that may not be replaced; raised before the block.
        OutputError: the system refused to write.
    """
    target = Path(os.path.realpath(path))
    _check_folder(target, path, overwrite)

    def commit(partial: Path) -> None:
        if _check_folder(target, path, overwrite):
            _swap(partial, target)
        else:
            os.rename(partial, target)

    with _all_or_nothing(target, path, commit) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def output_file(path: str | Path, *, overwrite: bool = True) -> Iterator[TextIO]:
    """Yield a UTF-8 text handle whose content becomes `path` when the block ends, and is removed when it raises.

    A device or a pipe (`/dev/stdout`) is written directly.

    Raises:
        RequestError: `path` is a folder, or a file stands there and `overwrite` is False; raised before the block.
        OutputError: the system refused to write.
    """
    target = Path(os.path.realpath(path))
    if _is_device(path):
        try:
            with open(path, "w", encoding="utf-8", newline="\n") as handle:
                yield handle
        except OSError as error:
            if error.errno in _DISK or error.filename == os.fspath(path):
                raise output_error(error, path) from error
            raise
        return
    _check_file(target, path, overwrite)

    def commit(partial: Path) -> None:
        _check_file(target, path, overwrite)
        os.replace(partial, target)

    with (
        _all_or_nothing(target, path, commit) as partial,
        open(partial, "x", encoding="utf-8", newline="\n") as handle,
    ):
        yield handle


def _check_folder(target: Path, shown: str | Path, overwrite: bool) -> bool:
    """Whether a folder with content stands at `target`; RequestError when it may not be replaced."""
    try:
        if not target.exists():
            return False
        if not target.is_dir():
            raise RequestError("the output is a folder, and a file stands there", where=str(shown), fix="rename one")
        names = os.listdir(target)
    except OSError as error:
        raise output_error(error, shown) from error
    if not names:
        return False
    if not overwrite:
        raise RequestError(
            "the output folder exists and is not empty", where=str(shown), fix="choose another folder, or overwrite it"
        )
    if not any(n in _OURS or n.endswith(_SUFFIXES) for n in names):
        raise RequestError(
            "the folder to overwrite does not hold a model (no config.json, kvpass.json, *.safetensors or *.onnx)",
            where=str(shown),
            fix="choose another folder, or empty this one yourself",
        )
    return True


def _check_file(target: Path, shown: str | Path, overwrite: bool) -> None:
    try:
        folder, exists = target.is_dir(), target.exists()
    except OSError as error:
        raise output_error(error, shown) from error
    if folder:
        raise RequestError("the output is a file, and a folder stands there", where=str(shown), fix="name a file")
    if exists and not overwrite:
        raise RequestError("the output file exists", where=str(shown), fix="choose another name, or overwrite it")


def _is_device(path: str | Path) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def _all_or_nothing(target: Path, shown: str | Path, commit: Callable[[Path], None]) -> Iterator[Path]:
    """Yield an unused path beside `target`; then `commit` it, or remove it and the parents that were made for it."""
    partial = _sibling(target, "partial")
    made: list[Path] = []
    with _terminate_raises():
        try:
            with _signals_held():
                try:
                    _make_parents(target.parent, made)
                except OSError as error:
                    raise output_error(error, shown) from error
            yield partial
            with _signals_held():
                try:
                    commit(partial)
                except OSError as error:
                    raise output_error(error, shown) from error
        except BaseException as error:
            with _signals_held():
                _remove(partial)
                for folder in reversed(made):
                    with suppress(OSError):
                        folder.rmdir()
            if isinstance(error, OSError) and (error.errno in _DISK or _concerns(error, partial)):
                raise output_error(error, shown) from error
            raise


def _sibling(target: Path, word: str) -> Path:
    return target.parent / f".{target.name[:50]}.{word}-{secrets.token_hex(4)}"


def _make_parents(folder: Path, made: list[Path]) -> None:
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    for parent in reversed(missing):
        with suppress(FileExistsError):
            parent.mkdir()
            made.append(parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _concerns(error: OSError, partial: Path) -> bool:
    name = error.filename
    return isinstance(name, str | os.PathLike) and Path(name).is_relative_to(partial)


def _swap(partial: Path, target: Path) -> None:
    """Put `partial` in the place of the folder `target`; the old one comes back when that fails."""
    aside = _sibling(target, "old")
    os.rename(target, aside)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        warnings.warn(f"the replaced folder could not be removed: {aside}", stacklevel=2)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _terminate_raises() -> Iterator[None]:
    """SIGTERM raises SystemExit(143) in the block, unless the process has its own way with it."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    try:
        signal.signal(signal.SIGTERM, terminate)
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block has ended."""
    if not _in_main_thread():
        yield
        return
    pending: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    held = {s: h for s, h in before.items() if callable(h)}
    try:
        for number in held:
            signal.signal(number, lambda n, frame: pending.append(n))
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if pending:
            signal.raise_signal(pending[0])
