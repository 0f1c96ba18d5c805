"""`save` and `load`: a program as JSON and its weights as safetensors. No pickle, and no code is read from a folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvpass.errors import SourceError
from kvpass.ir.fold import fold_weights
from kvpass.ir.program import ModelFacts, Program, Weight
from kvpass.ir.serialize import graph_from_json, graph_to_json
from kvpass.ir.storage import SafetensorsStore, StreamWriter
from kvpass.output import PROGRAM, output_folder

if TYPE_CHECKING:
    from kvpass.runtime.executor import Backend
    from kvpass.runtime.transformed import Transformed

MARKER = PROGRAM
FORMAT = 1
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def save(model: Transformed, folder: Path, *, overwrite: bool) -> Path:
    """Write a transformed model; the folder appears whole or not at all."""
    program = fold_weights(model.program, everything=False)
    facts = asdict(program.facts)
    facts |= {"dtype": _name(program.facts.dtype), "stored_dtype": _name(program.facts.stored_dtype), "folder": None}
    used = sorted(program.used_weights())
    document = {
        "format": FORMAT,
        "facts": facts,
        "graph": graph_to_json(program.forward),
        "complex": [n for n in used if program.weights[n].dtype.is_complex],
        "constants": [n for n in used if program.weights[n].constant],
        "ensured": sorted(program.ensured),
        "page_size": program.page_size,
        "recipe": model.recipe.dump(),
        "report": model.report.to_dict(),
    }
    with output_folder(folder, overwrite=overwrite) as partial:
        (partial / MARKER).write_text(json.dumps(document, indent=1), encoding="utf-8")
        writer = StreamWriter(partial)
        writer.plan([_stored(n, program.weights[n]) for n in used])
        for name in used:
            value = program.read(name)
            writer.write(name, torch.view_as_real(value) if value.is_complex() else value)
        writer.close()
        copy_companions(program.facts.folder, partial)
    return folder


def load(folder: str | Path, *, device: str | torch.device | None = None, backend: Backend = "auto") -> Transformed:
    """Read what `Transformed.save` wrote.

    Raises:
        SourceError: the folder is none of kvpass's, is damaged, or was saved by a newer version.
    """
    from kvpass.api import choose_device
    from kvpass.manager import PassRecord, Report
    from kvpass.recipe import Recipe
    from kvpass.runtime.transformed import Transformed

    path = Path(folder)
    marker = path / MARKER
    if not marker.is_file():
        raise SourceError(
            f"{path} holds no program of kvpass",
            where=str(marker),
            fix="give a folder that Transformed.save or `kvpass transform --save kvpass` wrote",
        )
    try:
        document: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        version = document["format"]
        facts = dict(document["facts"])
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"the saved program is damaged: {error}", where=str(marker), fix="save it again") from error
    if version != FORMAT:
        raise SourceError(
            f"the program was saved in format {version}; this version reads format {FORMAT}",
            where=str(marker),
            fix="load it with the version of kvpass that saved it, or save it again",
        )
    facts |= {"dtype": _dtype(facts["dtype"]), "stored_dtype": _dtype(facts["stored_dtype"]), "folder": str(path)}
    store = SafetensorsStore(path)
    constants = set(document["constants"])
    pairs = set(document["complex"])
    weights = {n: _weight(store, n, n in constants, n in pairs) for n in store.names()}
    graph = graph_from_json(document["graph"], str(marker))
    program = Program({"forward": graph}, weights, ModelFacts(**facts), set(document["ensured"]))
    program.page_size = int(document.get("page_size", 0))
    for name in program.used_weights():
        if name not in weights:
            raise SourceError(f"the saved program names a weight that is not stored: {name}", where=str(path))
    recorded = document["report"]
    report = Report(recorded["model"], recorded["family"], [PassRecord(**p) for p in recorded["passes"]])
    report.notes, report.quality = recorded["notes"], recorded["quality"]
    recipe = Recipe.parse(document["recipe"], str(marker))
    return Transformed(program, report, choose_device(device), recipe, backend=backend)


def copy_companions(source: str | None, target: Path) -> None:
    """Copy the tokenizer and the generation config of a model folder, where there are any."""
    if source is None:
        return
    from kvpass.capture import resolve_folder

    folder = resolve_folder(source)
    for name in COPIED:
        if (folder / name).is_file():
            (target / name).write_bytes((folder / name).read_bytes())


def _stored(name: str, weight: Weight) -> tuple[str, tuple[int, ...], torch.dtype]:
    """How a weight is stored: safetensors has no complex numbers, so those are pairs."""
    if weight.dtype.is_complex:
        return name, (*weight.shape, 2), weight.dtype.to_real()
    return name, weight.shape, weight.dtype


def _weight(store: SafetensorsStore, name: str, constant: bool, pairs: bool) -> Weight:
    shape, dtype = tuple(store.shape(name)), store.dtype(name)
    if pairs:
        return Weight(shape[:-1], dtype.to_complex(), lambda: torch.view_as_complex(store.load(name)), constant)
    return Weight(shape, dtype, lambda: store.load(name), constant)


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(name: str | None) -> torch.dtype | None:
    found = None if name is None else getattr(torch, name, None)
    if name is not None and not isinstance(found, torch.dtype):
        raise SourceError(f"the saved program names a dtype {name!r}")
    return found
