"""Outputs appear whole or not at all, whatever ends the work in the middle."""

# ruff: noqa: PT012

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvpass.errors import KvpassError, OutputError, RequestError
from kvpass.output import output_file, output_folder

ROOT = os.geteuid() == 0 if hasattr(os, "geteuid") else False


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "model"
    with output_folder(target) as partial:
        assert partial.parent == target.parent
        assert partial.name.startswith(".model.partial-")
        (partial / "config.json").write_text("{}")
        assert not target.exists()
    assert tree(tmp_path) == ["new", "new/deep", "new/deep/model", "new/deep/model/config.json"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_nothing_is_left_when_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(error), output_folder(tmp_path / "kept" / "new" / "model") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
        raise error("stop")
    assert tree(tmp_path) == ["kept"]


def test_an_empty_folder_is_filled_and_survives_a_failure(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with pytest.raises(ValueError, match="stop"), output_folder(target):
        raise ValueError("stop")
    assert tree(tmp_path) == ["model"]
    with output_folder(target) as partial:
        (partial / "a").touch()
    assert tree(tmp_path) == ["model", "model/a"]


def test_what_stands_there_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    before = tree(tmp_path)
    for target, words in ((tmp_path / "file", "a file stands there"), (tmp_path / "model", "not empty")):
        with pytest.raises(RequestError, match=words) as caught, output_folder(target):
            pytest.fail("the block ran")
        assert caught.value.where == str(target)
    with pytest.raises(RequestError), output_folder(tmp_path / "file", overwrite=True):
        pytest.fail("the block ran")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("mark", ["config.json", "kvpass.json", "a.safetensors", "model.onnx"])
def test_overwrite_swaps_the_whole_folder(tmp_path: Path, mark: str) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / mark).write_text("old")
    (target / "sub").mkdir()
    with output_folder(target, overwrite=True) as partial:
        assert (target / mark).read_text() == "old"
        (partial / "new").touch()
    assert tree(tmp_path) == ["model", "model/new"]


def test_overwrite_keeps_the_old_folder_when_the_block_raises(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(ValueError, match="stop"), output_folder(target, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
        raise ValueError("stop")
    assert tree(tmp_path) == ["model", "model/config.json"]
    assert (target / "config.json").read_text() == "old"


def test_overwrite_puts_the_old_folder_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename = os.rename

    def fail(source: Path, to: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, to)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OutputError, match="reports an error"), output_folder(target, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert tree(tmp_path) == ["model", "model/config.json"]
    assert (target / "config.json").read_text() == "old"


def test_overwrite_refuses_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    (tmp_path / "home" / "documents").mkdir(parents=True)
    (tmp_path / "home" / "letter.txt").touch()
    before = tree(tmp_path)
    with pytest.raises(RequestError, match="does not hold a model"), output_folder(tmp_path / "home", overwrite=True):
        pytest.fail("the block ran")
    assert tree(tmp_path) == before


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(KvpassError), output_folder(target) as partial:
        (partial / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert tree(tmp_path) == ["model", "model/theirs"]


def test_a_link_and_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with output_folder(tmp_path / "link") as partial:
        (partial / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").exists()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with output_folder(".") as partial:
        (partial / "b").touch()
    assert (tmp_path / "cwd" / "b").exists()


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError), output_folder(tmp_path / "file" / "model"):
        pytest.fail("the block ran")
    assert tree(tmp_path) == ["file"]


@pytest.mark.skipif(ROOT, reason="root may write everywhere")
def test_a_parent_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="no permission"), output_folder(tmp_path / "locked" / "model"):
        pytest.fail("the block ran")


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only")])
def test_a_full_disk_in_the_block_is_said_in_words(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(OutputError, match=words) as caught, output_folder(tmp_path / "model") as partial:
        (partial / "a").touch()
        raise OSError(number, os.strerror(number))
    assert caught.value.where == str(tmp_path / "model")
    assert isinstance(caught.value.__cause__, OSError)
    assert tree(tmp_path) == []


def test_other_errors_of_the_block_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), output_folder(tmp_path / "model"):
        (tmp_path / "no source").read_text()
    with pytest.raises(OutputError), output_folder(tmp_path / "model") as partial:
        (partial / "no folder" / "file").write_text("x")
    assert tree(tmp_path) == []


def test_it_works_outside_the_main_thread(tmp_path: Path) -> None:
    def work() -> None:
        with output_folder(tmp_path / "model") as partial:
            (partial / "a").touch()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert tree(tmp_path) == ["model", "model/a"]


def test_the_signal_handlers_are_put_back(tmp_path: Path) -> None:
    def own(number: int, frame: object) -> None:
        seen.append(number)

    seen: list[int] = []
    interrupt, default = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with output_folder(tmp_path / "a"), output_folder(tmp_path / "b"):
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.signal(signal.SIGTERM, own)
        with output_folder(tmp_path / "c"):
            signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, default)


WORK = """
import sys, time
from pathlib import Path
from kvpass.output import output_file, output_folder
root = Path(sys.argv[1])
with output_folder(root / "new" / "model") as partial, output_file(root / "new" / "report.txt") as report:
    (partial / "file").write_text("x" * 1000)
    report.write("half")
    print("ready", flush=True)
    time.sleep(30)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_process_that_is_stopped_leaves_nothing(tmp_path: Path, number: int, status: int) -> None:
    # a process in the background of a shell starts with SIGINT ignored
    def restore() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert len(tree(tmp_path)) == 4
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == status
    assert tree(tmp_path) == []


def test_a_signal_while_it_is_renamed_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename = os.rename

    def interrupted(source: Path, to: Path) -> None:
        rename(source, to)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), output_folder(target, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert tree(tmp_path) == ["model", "model/config.json"]
    assert (target / "config.json").read_text() == "new"


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.txt"
    with output_file(path) as handle:
        handle.write("é\n")
        assert not path.exists()
    assert path.read_bytes() == "é\n".encode()
    with output_file(path) as handle:
        handle.write("second")
        handle.flush()
        assert path.read_text(encoding="utf-8") == "é\n"
    assert path.read_text() == "second"
    assert tree(tmp_path) == ["new", "new/report.txt"]


def test_the_old_file_stays_when_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), output_file(path) as handle:
        handle.write("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="stop"), output_file(tmp_path / "new" / "other.txt"):
        raise ValueError("stop")
    assert tree(tmp_path) == ["report.txt"]
    assert path.read_text() == "old"


def test_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("old")
    with pytest.raises(RequestError, match="exists"), output_file(tmp_path / "report.txt", overwrite=False):
        pytest.fail("the block ran")
    with pytest.raises(RequestError, match="folder stands there"), output_file(tmp_path):
        pytest.fail("the block ran")
    with pytest.raises(OutputError), output_file(tmp_path / "report.txt" / "below.txt"):
        pytest.fail("the block ran")
    with pytest.raises(OutputError, match="too long"), output_file(tmp_path / ("n" * 300)):
        pytest.fail("the block ran")
    assert tree(tmp_path) == ["report.txt"]


def test_a_device_is_written_and_not_replaced() -> None:
    with output_file("/dev/null") as handle:
        handle.write("x")
    assert not Path("/dev/null").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_device() -> None:
    with pytest.raises(OutputError, match="the disk is full"), output_file("/dev/full") as handle:
        handle.write("x")
