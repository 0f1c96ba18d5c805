"""Calibration and evaluation text as token windows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpass.errors import RequestError

Calibration = str | Path | Iterable[str] | Iterable[Tensor]
WINDOW, WINDOWS, PER_BATCH = 256, 128, 8
LEAST_TOKENS = 512
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model folder.

    Raises:
        RequestError: there is none.
    """
    from transformers import AutoTokenizer

    advice = "give token-id tensors instead of text, or put the tokenizer's files beside the model"
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        raise RequestError("the model's folder holds no tokenizer", where=folder, fix=advice)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        told = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise RequestError(f"the tokenizer cannot be loaded: {told}", where=folder, fix=advice) from error


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids [N] of a text, without special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # the whole text at once, without the length warning of the wrapper
        ids = backend.encode(text, add_special_tokens=False).ids
    else:
        ids = tokenizer.encode(text, add_special_tokens=False)
    return torch.tensor(ids, dtype=torch.long)


def read_text(path: str | Path) -> str:
    """The text of a file.

    Raises:
        RequestError: it cannot be read, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the text cannot be read: {error}", where=str(path)) from error
    if not text.strip():
        raise RequestError("the text is empty", where=str(path), fix="give a text file of at least some pages")
    return text


def token_stream(source: Calibration, folder: str | None) -> Tensor:
    """All tokens [N] of a text file, strings, or token tensors.

    Raises:
        RequestError: nothing is in it, or strings come without a tokenizer to read them.
    """
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            raise RequestError(
                f"there is no text file {str(source)!r}", fix="calibration is a path, strings, or token-id tensors"
            )
        pieces: list[Any] = [read_text(source)]
    else:
        pieces = list(source)
    if not pieces:
        raise RequestError("the calibration is empty", fix="give a text file of at least some pages")
    streams = []
    tokenizer = None
    for piece in pieces:
        if isinstance(piece, Tensor):
            if piece.is_floating_point() or piece.is_complex() or piece.dtype == torch.bool:
                raise RequestError(f"calibration tensors hold integer token ids, not {piece.dtype}")
            streams.append(piece.reshape(-1).long())
        elif isinstance(piece, str):
            if tokenizer is None:
                if folder is None:
                    raise RequestError(
                        "calibration strings need a tokenizer, and a module brings none",
                        fix="give calibration as token-id tensors",
                    )
                tokenizer = load_tokenizer(folder)
            streams.append(encode(tokenizer, piece))
        else:
            raise RequestError(f"calibration holds strings or token tensors, not {type(piece).__name__}")
    return torch.cat(streams)


def windows(
    stream: Tensor, vocab_size: int, *, length: int = WINDOW, count: int = WINDOWS, per_batch: int = PER_BATCH
) -> list[Tensor]:
    """Up to `count` windows spread evenly over a stream, as batches [per_batch, length].

    Raises:
        RequestError: fewer than 512 tokens, or ids outside the vocabulary.
    """
    if stream.numel() < LEAST_TOKENS:
        raise RequestError(
            f"the calibration has {stream.numel()} tokens; at least {LEAST_TOKENS} are needed",
            fix="a few pages of text like what the model is used for",
        )
    low, high = int(stream.min()), int(stream.max())
    if low < 0 or high >= vocab_size:
        raise RequestError(
            f"calibration holds token id {low if low < 0 else high}; the vocabulary has {vocab_size}",
            fix="tokenize with this model's own tokenizer",
        )
    length = min(length, stream.numel() // 2)
    available = stream.numel() // length
    used = max(1, min(count, available))
    per_batch = min(per_batch, used)
    used -= used % per_batch
    starts = torch.linspace(0, stream.numel() - length, used).long() if used > 1 else torch.zeros(1, dtype=torch.long)
    rows = torch.stack([stream[s : s + length] for s in starts.tolist()])
    # neighbours in the text go to different batches, so that each batch looks like the whole
    order = torch.arange(used).reshape(per_batch, -1).T.reshape(-1)
    return list(rows[order].split(per_batch))
