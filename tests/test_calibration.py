"""Calibration text: from wherever it comes, as windows of tokens of one shape; or an error before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import families
import kvpass
from kvpass.calibration import encode, load_tokenizer, token_stream, windows
from kvpass.errors import RequestError
from kvpass.passes import GroupHeads

BOOKWORM = Path(__file__).parents[1] / "examples" / "bookworm"
FOLDER = str(BOOKWORM)
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune."


def test_a_file_strings_and_a_generator_of_strings_give_the_same_tokens(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 2, encoding="utf-8")
    expected = token_stream(path, FOLDER)
    assert expected.dtype == torch.long
    assert expected.dim() == 1
    assert torch.equal(token_stream(str(path), FOLDER), expected)
    assert torch.equal(token_stream([TEXT * 2], FOLDER), expected)
    assert torch.equal(token_stream((t for t in [TEXT * 2]), FOLDER), expected)
    halves = token_stream([TEXT, TEXT], FOLDER)
    assert load_tokenizer(FOLDER).decode(halves) == TEXT * 2


def test_no_special_tokens_are_put_in():
    ids = encode(load_tokenizer(FOLDER), TEXT)
    assert load_tokenizer(FOLDER).decode(ids) == TEXT


def test_tensors_of_any_shape_are_one_stream():
    parts = [torch.arange(6).view(2, 3), torch.arange(4, dtype=torch.int32)]
    assert token_stream(parts, None).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert token_stream((t for t in parts), None).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


def test_one_tensor_is_its_rows():
    assert token_stream(torch.arange(6).view(2, 3), None).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "the calibration is empty"),
        (iter(()), "the calibration is empty"),
        ("no/such/file.txt", "there is no text file 'no/such/file.txt'"),
        (Path("."), "there is no text file"),
        ([3], "strings or token tensors, not int"),
        ([["a"]], "strings or token tensors, not list"),
    ],
)
def test_what_is_no_calibration_is_refused(source, words):
    with pytest.raises(RequestError) as found:
        token_stream(source, FOLDER)
    assert words in found.value.what
    assert found.value.exit_status == 2


def test_files_that_hold_no_text_are_refused(tmp_path):
    for content, words in ((b"", "empty"), (b" \n\t ", "empty"), (b"\xff\xfe\x00caf\xe9", "cannot be read")):
        path = tmp_path / "text.txt"
        path.write_bytes(content)
        with pytest.raises(RequestError, match=words) as found:
            token_stream(path, FOLDER)
        assert found.value.where == str(path)


def test_strings_need_a_tokenizer(tmp_path):
    with pytest.raises(RequestError, match="a module brings none") as found:
        token_stream([TEXT], None)
    assert "tensors" in found.value.fix
    with pytest.raises(RequestError, match="tokenizer") as found:
        token_stream([TEXT], str(tmp_path))
    assert found.value.where == str(tmp_path)


def test_floating_point_tensors_are_no_tokens():
    with pytest.raises(RequestError):
        token_stream([torch.rand(600)], None)


# ---------------------------------------------------------------------- windows


@pytest.mark.parametrize("size", [512, 513, 700, 2048, 2049, 100_000])
def test_windows_have_one_shape_and_are_pieces_of_the_stream(size):
    stream = torch.arange(size)
    batches = windows(stream, size)
    assert len({b.shape for b in batches}) == 1
    rows = torch.cat(batches)
    assert rows.shape[1] == 256
    assert rows.shape[0] <= 128
    assert bool((rows[:, 1:] == rows[:, :-1] + 1).all()), "a window is not a piece of the text"
    assert len(set(rows[:, 0].tolist())) == len(rows), "a window was taken twice"
    assert int(rows.min()) == 0
    assert int(rows.max()) == size - 1


def test_each_batch_looks_like_the_whole_text():
    stream = torch.arange(100_000)
    spread = [(int(b.min()), int(b.max())) for b in windows(stream, 100_000)]
    assert all(low < 15_000 and high > 85_000 for low, high in spread), spread


def test_few_windows_make_one_batch():
    assert [b.shape for b in windows(torch.arange(600), 600)] == [(2, 256)]


@pytest.mark.parametrize("size", [0, 1, 511])
def test_too_little_text_is_refused(size):
    with pytest.raises(RequestError, match=f"has {size} tokens; at least 512 are needed"):
        windows(torch.zeros(size, dtype=torch.long), 10)


@pytest.mark.parametrize("wrong", [-1, 10, 99])
def test_ids_outside_the_vocabulary_are_refused_and_named(wrong):
    stream = torch.ones(600, dtype=torch.long)
    stream[17] = wrong
    with pytest.raises(RequestError, match=f"token id {wrong};"):
        windows(stream, 10)


def test_text_is_used_by_passes_that_can_and_needs_no_pass_that_does():
    data = [torch.randint(3, 60, (600,), generator=torch.Generator().manual_seed(0))]
    slim = kvpass.transform(families.build("llama"), [GroupHeads(1)], calibration=data, progress=False)
    assert "swap_kl" in slim.report.passes[-1].details[0]
    kvpass.transform(families.build("llama"), calibration=data, progress=False)


def test_windows_are_no_longer_than_the_positions_of_the_model():
    """GPT-2 here has 128 learned positions; a window of 256 tokens has nowhere to stand."""
    data = [torch.randint(3, 60, (600,), generator=torch.Generator().manual_seed(0))]
    slim = kvpass.transform(families.build("gpt2"), [GroupHeads(2)], calibration=data, progress=False)
    assert "swap_kl" in slim.report.passes[-1].details[0]
