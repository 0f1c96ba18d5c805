"""Recipes: passes as strict TOML, and back.

    [[pass]]
    name = "group-heads"
    kv_heads = 2
    method = "pca"

Passes run in the order in which they stand. A key that a pass does not have is an error, not a comment.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from kvpass.errors import RequestError
from kvpass.passes.base import Pass
from kvpass.passes.evict_kv import EvictKV
from kvpass.passes.group_heads import GroupHeads
from kvpass.passes.page_kv import PageKV
from kvpass.passes.prune_pyramid import PrunePyramid
from kvpass.passes.quantize_kv import QuantizeKV
from kvpass.passes.share_layers import ShareLayers
from kvpass.passes.slide_window import SlideWindow
from kvpass.passes.split_projections import SplitProjections

PASSES: dict[str, type[Pass]] = {
    p.key(): p
    for p in (GroupHeads, ShareLayers, SlideWindow, EvictKV, PrunePyramid, QuantizeKV, PageKV, SplitProjections)
}


@dataclass(frozen=True)
class Recipe:
    """An ordered list of passes."""

    passes: tuple[Pass, ...] = ()

    @staticmethod
    def of(recipe: Recipe | str | Path | Pass | Iterable[Pass] | None) -> Recipe:
        """A recipe from a recipe, a path to a TOML file, a pass, or passes.

        Raises:
            RequestError: the file cannot be read, or a key or value in it is wrong.
        """
        if recipe is None:
            return Recipe()
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Pass):
            return Recipe((recipe,))
        if isinstance(recipe, str | Path):
            return Recipe.load(recipe)
        passes = tuple(recipe)
        for step in passes:
            if not isinstance(step, Pass):
                raise RequestError(
                    f"a recipe holds passes, not {type(step).__name__}",
                    fix="write kvpass.transform(source, [GroupHeads(kv_heads=2)])",
                )
        return Recipe(passes)

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Read a TOML recipe."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise RequestError(f"the recipe cannot be read: {error.strerror}", where=str(path)) from error
        except UnicodeDecodeError as error:
            raise RequestError(f"the recipe is no UTF-8 text: {error}", where=str(path)) from error
        return Recipe.parse(text, str(path))

    @staticmethod
    def parse(text: str, where: str = "recipe") -> Recipe:
        """Read a recipe from TOML text."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RequestError(f"the recipe is no valid TOML: {error}", where=where) from error
        unknown = set(data) - {"pass"}
        if unknown:
            raise RequestError(
                f"unknown key {sorted(unknown)[0]!r} in the recipe", where=where, fix="a recipe is a list of [[pass]]"
            )
        entries = data.get("pass", [])
        if not isinstance(entries, list):
            raise RequestError("`pass` is a list", where=where, fix="write [[pass]] with two brackets")
        return Recipe(tuple(build(entry, f"{where}, pass {i + 1}") for i, entry in enumerate(entries)))

    def dump(self) -> str:
        """The recipe as TOML that `parse` reads back."""
        return "\n".join(_dump_pass(step) for step in self.passes)


def build(entry: dict[str, Any], where: str) -> Pass:
    """One pass from plain values.

    Raises:
        RequestError: no such pass, no such key, or a value of the wrong kind.
    """
    if not isinstance(entry, dict):
        raise RequestError(f"a pass is a table, not {entry!r}", where=where, fix="write [[pass]] with two brackets")
    values = dict(entry)
    name = values.pop("name", None)
    if not isinstance(name, str) or name not in PASSES:
        raise RequestError(f"there is no pass {name!r}", where=where, fix=f"choose from {sorted(PASSES)}")
    kind = PASSES[name]
    hints = get_type_hints(kind)
    definitions: dict[str, Any] = {
        f.name: (hints[f.name], ... if f.default is f.default_factory else f.default)  # both MISSING: required
        for f in fields(kind)  # type: ignore[arg-type]
    }
    model = create_model(kind.__name__, __config__=ConfigDict(extra="forbid", strict=True), **definitions)
    converted = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        checked = model.model_validate(converted)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(p) for p in first["loc"][:1])
        if first["type"] == "extra_forbidden":
            raise RequestError(
                f"{name} has no key {key!r}",
                where=where,
                fix=f"its keys are {[f.name for f in fields(kind)]}",  # type: ignore[arg-type]
            ) from error
        raise RequestError(f"{name}: {key}: {first['msg']}", where=where) from error
    return kind(**{f.name: getattr(checked, f.name) for f in fields(kind)})  # type: ignore[arg-type]


def _dump_pass(step: Pass) -> str:
    lines = ["[[pass]]", f'name = "{step.key()}"']
    for key, value in step.options().items():
        if value is not None:  # which TOML cannot say, and every knob that may be None is None by default
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return str(value)
