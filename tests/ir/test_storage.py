"""Tensors on disk: what is written comes back, what is damaged is named, and memory holds one tensor."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpass.errors import OutputError, SourceError
from kvpass.ir.storage import INDEX, SINGLE, MemoryStore, SafetensorsStore, StreamWriter, TensorStore, first_nonfinite

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and raw(left) == raw(right)


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.Size(shape).numel())
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).to(torch.bool).reshape(tuple(shape))
    data = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).reshape(tuple(shape))


def write(folder: Path, tensors: dict[str, Tensor], **options: Any) -> Path:
    writer = StreamWriter(folder, **options)
    writer.plan([(n, tuple(t.shape), t.dtype) for n, t in tensors.items()])
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.close()
    return folder


def put(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with any header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


# --- what is written comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        f"{len(s)}.{s}": random_tensor(s, dtype, i) for i, s in enumerate([(), (1,), (0,), (3, 0, 2), (7,), (2, 3, 5)])
    }
    store = SafetensorsStore(write(tmp_path, tensors))
    assert store.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert store.shape(name) == tuple(tensor.shape)
        assert store.dtype(name) == dtype
        assert same(store.load(name), tensor)


@settings(max_examples=40, deadline=None)
@given(
    content=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(DTYPES), st.integers(0, 99)),
        max_size=8,
    ),
    limit=st.integers(1, 400),
)
def test_any_tensors_come_back(content: dict[str, tuple[list[int], torch.dtype, int]], limit: int) -> None:
    tensors = {n: random_tensor(*what) for n, what in content.items()}
    with tempfile.TemporaryDirectory() as folder:
        store = SafetensorsStore(write(Path(folder), tensors, max_shard_bytes=limit))
        assert store.names() == sorted(tensors)
        assert all(same(store.load(n), t) for n, t in tensors.items())


def test_shards_keep_to_the_limit_and_the_index_agrees(tmp_path: Path) -> None:
    tensors = {f"t{i:02}": random_tensor((10 + i,), torch.float32, i) for i in range(12)}
    tensors["large"] = random_tensor((500,), torch.float32)
    write(tmp_path, tensors, max_shard_bytes=300)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    for file in files:
        inside = [n for n, f in index["weight_map"].items() if f == file]
        assert inside == ["large"] or sum(tensors[n].numel() * 4 for n in inside) <= 300
    store = SafetensorsStore(tmp_path)
    assert all(same(store.load(n), t) for n, t in tensors.items())


@pytest.mark.parametrize("limit", [10_000, 64])
def test_the_safetensors_library_reads_it(tmp_path: Path, limit: int) -> None:
    from safetensors import safe_open

    tensors = {f"{d}.é": random_tensor((3, 5), d) for d in DTYPES} | {"scalar": torch.tensor(1.5)}
    write(tmp_path, tensors, max_shard_bytes=limit, metadata={"format": "pt", "made by": "a test"})
    found: dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt", "made by": "a test"}
            found |= {n: handle.get_tensor(n) for n in handle.keys()}  # noqa: SIM118
        (length,) = struct.unpack("<Q", file.read_bytes()[:8])
        assert length % 8 == 0
    assert set(found) == set(tensors)
    assert all(same(found[n], t) for n, t in tensors.items())


def test_it_reads_what_the_safetensors_library_wrote(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {f"{d}": random_tensor((4, 3), d) for d in DTYPES} | {"empty": torch.zeros(0, 2), "x": torch.tensor(2)}
    save_file(tensors, tmp_path / SINGLE)
    store = SafetensorsStore(tmp_path)
    assert all(same(store.load(n), t) for n, t in tensors.items())


@pytest.mark.parametrize("limit", [10**9, 20_000])
def test_transformers_loads_a_model_that_was_written(tmp_path: Path, limit: int) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    config.save_pretrained(tmp_path)
    write(tmp_path, dict(model.state_dict()), max_shard_bytes=limit)
    assert (tmp_path / INDEX).exists() == (limit == 20_000)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)


def test_strided_parameters_are_written_as_they_read(tmp_path: Path) -> None:
    base = random_tensor((6, 4), torch.int32)
    tensors = {"t": base.T, "slice": base[::2, 1:], "expanded": base[:1].expand(3, 4)}
    parameter = torch.nn.Parameter(torch.randn(3))
    store = SafetensorsStore(write(tmp_path, tensors | {"p": parameter}))
    assert all(same(store.load(n), t) for n, t in tensors.items())
    assert same(store.load("p"), parameter.detach())


def test_each_load_is_a_new_buffer_and_many_threads_may_read(tmp_path: Path) -> None:
    tensors = {f"t{i}": random_tensor((5000,), torch.int64, i) for i in range(8)}
    store = SafetensorsStore(write(tmp_path, tensors, max_shard_bytes=90_000))
    store.load("t0").zero_()
    assert same(store.load("t0"), tensors["t0"])
    wrong: list[str] = []

    def read() -> None:
        for _ in range(10):
            wrong.extend(n for n, t in tensors.items() if not same(store.load(n), t))

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    store.close()
    assert same(store.load("t7"), tensors["t7"])


def test_an_index_picks_one_of_two_copies(tmp_path: Path) -> None:
    put(tmp_path / "a.safetensors", {"x": entry(0, 1), "y": entry(1, 2)}, b"\x01\x02")
    put(tmp_path / "b.safetensors", {"x": entry(0, 1)}, b"\x03")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}))
    store = SafetensorsStore(tmp_path)
    assert [int(store.load(n)) for n in store.names()] == [3, 2]


def test_large_tensors_are_read_and_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr("kvpass.ir.storage._PIECE", 1000)
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: pread(fd, [views[0][:333]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:777], at))
    tensor = random_tensor((5000,), torch.int16)
    assert same(SafetensorsStore(write(tmp_path, {"x": tensor})).load("x"), tensor)


def test_memory_store() -> None:
    store: TensorStore = MemoryStore({"b": torch.ones(2, 3), "a": torch.tensor(1)})
    assert store.names() == ["b", "a"]
    assert store.shape("b") == (2, 3)
    assert store.dtype("a") == torch.int64
    assert torch.equal(store.load("b"), torch.ones(2, 3))
    with pytest.raises(SourceError, match="no tensor c"):
        store.load("c")


# --- what is damaged is named ----------------------------------------------------------------------------------------

BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b'{"x": {', b"", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not JSON"),
    "nested without end": (b"[" * 200_000, b"", "not JSON"),
    "a list": ([1], b"", "not a JSON object"),
    "metadata is a list": ({"__metadata__": []}, b"", "__metadata__"),
    "a name twice": (b'{"w.x": {}, "w.x": {}}', b"", "w.x is there twice"),
    "entry is a number": ({"w.x": 3}, b"", "w.x.*not a JSON object"),
    "entry is empty": ({"w.x": {}}, b"", "w.x.*dtype None"),
    "unknown dtype": ({"w.x": entry(0, 1, dtype="F4")}, b"a", "w.x.*dtype 'F4'"),
    "dtype is a list": ({"w.x": entry(0, 1, dtype=["U8"])}, b"a", "w.x.*dtype"),
    "negative shape": ({"w.x": entry(0, 1, shape=[-1, -1])}, b"a", "w.x.*shape"),
    "shape of floats": ({"w.x": entry(0, 1, shape=[1.0])}, b"a", "w.x.*shape"),
    "shape of booleans": ({"w.x": entry(0, 1, shape=[True])}, b"a", "w.x.*shape"),
    "huge empty shape": ({"w.x": entry(0, 0, shape=[0, 1 << 62, 1 << 62])}, b"", "w.x.*shape"),
    "size is not the shape's": ({"w.x": entry(0, 5, shape=[2, 3])}, b"abcde", "w.x.*takes 6 bytes, and 5"),
    "offsets reversed": ({"w.x": entry(3, 1, shape=[2])}, b"abc", "w.x.*offsets"),
    "offsets negative": ({"w.x": entry(-2, 0, shape=[2])}, b"abc", "w.x.*offsets"),
    "three offsets": ({"w.x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"ab", "w.x.*offsets"),
    "overlap": ({"v": entry(0, 3), "w.x": entry(2, 4)}, b"abcd", "w.x overlap"),
    "hole": ({"v": entry(0, 3), "w.x": entry(4, 6)}, b"abcdef", "w.x leave a hole"),
    "hole at the start": ({"w.x": entry(1, 2)}, b"ab", "w.x leave a hole"),
    "out of bounds": ({"v": entry(0, 2), "w.x": entry(2, 9)}, b"abcd", "w.x would end at"),
    "bytes left over": ({"w.x": entry(0, 2)}, b"abcd", "its tensors end at"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_damaged_header_is_refused_when_opened(tmp_path: Path, case: str) -> None:
    header, data, message = BAD_HEADERS[case]
    path = put(tmp_path / SINGLE, header, data)
    with pytest.raises(SourceError, match=message) as caught:
        SafetensorsStore(tmp_path)
    assert caught.value.where == str(path)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"\x10\x00\x00", "3 bytes"),
        (struct.pack("<Q", 1 << 60) + b"{}", "not safetensors"),
        (struct.pack("<Q", 0), "not safetensors"),
        (struct.pack("<Q", 50) + b"{}", "fewer than its header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs"),
        (b"<!DOCTYPE html><html>not found</html>", "not safetensors"),
    ],
)
def test_a_file_that_is_not_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        SafetensorsStore(tmp_path)
    assert caught.value.where == str(tmp_path / SINGLE)
    assert caught.value.fix


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.arange(4.0), "b": torch.ones(3, dtype=torch.int8)})
    content = (tmp_path / SINGLE).read_bytes()
    for length in range(len(content)):
        (tmp_path / SINGLE).write_bytes(content[:length])
        with pytest.raises(SourceError, match=SINGLE):
            SafetensorsStore(tmp_path)


@settings(max_examples=50, deadline=None)
@given(where=st.integers(8, 200), value=st.integers(0, 255))
def test_a_changed_header_byte_never_escapes_as_another_error(where: int, value: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name), {"a": torch.arange(4.0), "b": torch.ones(3, dtype=torch.int8)})
        content = bytearray((folder / SINGLE).read_bytes())
        content[where % len(content)] = value
        (folder / SINGLE).write_bytes(bytes(content))
        with suppress(SourceError):
            store = SafetensorsStore(folder)
            for tensor in store.names():
                store.load(tensor)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": ["x"]}', "no weight_map"),
        (b'{"weight_map": {"w.x": 3}}', "gives 3 for w.x"),
        (b'{"weight_map": {"w.x": "../a.safetensors"}}', "for w.x"),
        (b'{"weight_map": {"w.x": "/etc/passwd"}}', "for w.x"),
        (b'{"weight_map": {"w.x": ".."}}', "w.x"),
        (b'{"weight_map": {"w.x": ""}}', "for w.x"),
        (b'{"weight_map": {"w.x": "a\\u0000"}}', "for w.x"),
        (b'{"weight_map": {"w.x": "missing.safetensors"}}', "missing.safetensors .with w.x"),
        (b'{"weight_map": {"w.x": "a.safetensors"}}', "w.x is in a.safetensors, and it is not there"),
    ],
)
def test_a_wrong_index(tmp_path: Path, index: bytes, message: str) -> None:
    put(tmp_path / "a.safetensors", {"y": entry(0, 1)}, b"a")
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(SourceError, match=message) as caught:
        SafetensorsStore(tmp_path)
    assert caught.value.where.startswith(str(tmp_path) + "/")
    assert caught.value.fix


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, {f"t{i}": torch.ones(10) for i in range(4)}, max_shard_bytes=80)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SourceError, match="t3 would end at") as caught:
        SafetensorsStore(tmp_path)
    assert caught.value.where == str(shard)


def test_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        SafetensorsStore(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="holds no weights"):
        SafetensorsStore(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(SourceError, match="neither model"):
        SafetensorsStore(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(SourceError, match=r"no pickle[\s\S]*safe_serialization=True"):
        SafetensorsStore(tmp_path)


def test_an_unknown_name(tmp_path: Path) -> None:
    store = SafetensorsStore(write(tmp_path, {"a": torch.ones(1)}))
    for ask in (store.shape, store.dtype, store.load):
        with pytest.raises(SourceError, match="no tensor b"):
            ask("b")


def _cut(path: Path) -> None:
    os.truncate(path, 100)


def _replace(path: Path) -> None:
    path.with_suffix(".new").write_bytes(b"\0" * path.stat().st_size)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [_cut, _replace, os.unlink])
def test_a_file_that_changes_before_it_is_read(tmp_path: Path, change: Callable[[Path], None]) -> None:
    store = SafetensorsStore(write(tmp_path, {"w.x": torch.ones(100)}))
    change(tmp_path / SINGLE)
    with pytest.raises(SourceError, match=SINGLE):
        store.load("w.x")


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    store = SafetensorsStore(write(tmp_path, {"a": torch.ones(2), "w.x": torch.ones(100)}))
    store.load("a")
    os.truncate(tmp_path / SINGLE, 300)
    with pytest.raises(SourceError, match=r"w\.x takes 400 bytes") as caught:
        store.load("w.x")
    assert caught.value.where == str(tmp_path / SINGLE)


def test_a_disk_that_fails_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SafetensorsStore(write(tmp_path, {"w.x": torch.ones(100)}))

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(SourceError, match=r"cannot read w\.x"):
        store.load("w.x")
    with pytest.raises(SourceError, match=SINGLE):
        SafetensorsStore(tmp_path)


# --- the writer ------------------------------------------------------------------------------------------------------


def test_calls_that_contradict_the_plan(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path)
    with pytest.raises(ValueError, match="not planned"):
        writer.write("a", torch.ones(2))
    writer.plan([("a", (2,), torch.float32), ("b", [3], torch.int8)])
    with pytest.raises(ValueError, match="before"):
        writer.plan([])
    with pytest.raises(ValueError, match="c was not planned"):
        writer.write("c", torch.ones(2))
    with pytest.raises(ValueError, match="planned as"):
        writer.write("a", torch.ones(3))
    with pytest.raises(ValueError, match="planned as"):
        writer.write("a", torch.ones(2, dtype=torch.float16))
    writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="written before"):
        writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="1 planned tensors were not written: b"):
        writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write("b", torch.ones(3, dtype=torch.int8))


def test_plans_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a is planned twice"):
        StreamWriter(tmp_path).plan([("a", (), torch.int8), ("a", (), torch.int8)])
    with pytest.raises(ValueError, match="no name"):
        StreamWriter(tmp_path).plan([("__metadata__", (), torch.int8)])
    with pytest.raises(OutputError, match="q has dtype"):
        StreamWriter(tmp_path).plan([("q", (), torch.complex64)])
    assert not list(tmp_path.iterdir())


def test_the_writer_as_a_context(tmp_path: Path) -> None:
    with StreamWriter(tmp_path) as writer:
        writer.plan([("a", (), torch.int8)])
        writer.write("a", torch.tensor(5, dtype=torch.int8))
    assert int(SafetensorsStore(tmp_path).load("a")) == 5
    with pytest.raises(ValueError, match="not planned"), StreamWriter(tmp_path) as writer:
        writer.write("a", torch.tensor(5, dtype=torch.int8))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "larger than"),
        (errno.EIO, "reports an error"),
    ],
)
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    writer = StreamWriter(tmp_path)
    writer.plan([("a", (2,), torch.float32)])

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OutputError, match=words) as caught:
        writer.write("a", torch.ones(2))
    assert caught.value.where == str(tmp_path / SINGLE)
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(OutputError, match=words):
        StreamWriter(tmp_path).plan([("a", (2,), torch.float32)])
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OutputError, match="the disk is full"):
        writer.write("a", torch.ones(2))


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        StreamWriter(tmp_path / "nowhere").plan([("a", (2,), torch.float32)])


def test_a_file_too_large_for_the_process(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    writer = StreamWriter(tmp_path)
    writer.plan([("a", (100,), torch.float32), ("b", (1_000_000,), torch.float32)])
    writer.write("a", torch.ones(100))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OutputError, match="larger than the file system or this process may write"):
            writer.write("b", torch.ones(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_holds_one_tensor(tmp_path: Path) -> None:
    script = f"""
import resource, torch
from kvpass.ir.storage import SafetensorsStore, StreamWriter, first_nonfinite
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
first_nonfinite(torch.ones(2_000_000))
before = peak()
writer = StreamWriter({str(tmp_path)!r}, max_shard_bytes=50_000_000)
writer.plan([(f"t{{i}}", (2000, 1000), torch.float32) for i in range(20)])
for i in range(20):
    writer.write(f"t{{i}}", torch.full((2000, 1000), float(i)))
writer.close()
store = SafetensorsStore({str(tmp_path)!r})
for i in range(20):
    tensor = store.load(f"t{{i}}")
    assert tensor[1999, 999] == i and first_nonfinite(tensor) is None
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40


# --- finding what is not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 64, 1 << 22])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_first_nonfinite_is_the_first(monkeypatch: pytest.MonkeyPatch, chunk: int, bad: float) -> None:
    monkeypatch.setattr("kvpass.ir.storage._CHUNK", chunk)
    for shape in [(), (7,), (1, 40), (3, 4, 5)]:
        clean = torch.ones(shape)
        assert first_nonfinite(clean) is None
        for flat in range(0, clean.numel(), 3):
            tensor = clean.clone()
            tensor.view(-1)[flat:] = bad
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))
            assert first_nonfinite(tensor) == index
    strided = torch.ones(6, 4)
    strided[5, 1] = bad
    assert first_nonfinite(strided.T) == (1, 5)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point])
def test_first_nonfinite_in_each_dtype(dtype: torch.dtype) -> None:
    tensor = torch.ones(2, 3).to(dtype)
    assert first_nonfinite(tensor) is None
    tensor[1, 2] = float("nan")
    assert first_nonfinite(tensor) == (1, 2)


def test_integers_and_nothing_are_finite() -> None:
    assert first_nonfinite(torch.ones(3, dtype=torch.int64)) is None
    assert first_nonfinite(torch.ones(3, dtype=torch.bool)) is None
    assert first_nonfinite(torch.ones(0, 4)) is None
