"""`kvpass-lock.toml`: models, recipes and their goldens, checked without pytest.

    format = 1

    [[check]]
    name = "chat-model"
    model = "models/chat"        # from the folder of the lock file; or a hub id
    recipe = "recipes/slim.toml" # or passes in place: [[check.pass]]; none for the model as it is
    onnx = "ort"                 # the exported graph, too

Every key is in `Entry`. A key that there is not is an error, not a comment.
"""

from __future__ import annotations

import time
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvpass.errors import KvpassError, RequestError
from kvpass.regression.diff import Grade
from kvpass.regression.golden import Kept, Outcome, check, transformed

FORMAT = 1
SCHEMA = "docs/regression.md lists the keys"


class Entry(BaseModel):
    """One check of a lock file.

    Attributes:
        name: of the check; the golden is `goldens/<name>.toml` unless `golden` says otherwise.
        model: a folder, from the folder of the lock file, or a hub id in the local cache.
        recipe: the path of a recipe, from there too.
        passes: passes in place, as `pass` in the file.
        golden: where the golden is.
        calibration: a text file.
        weights, logits, onnx, tolerance, allow: see `kvpass.regression.golden.Kept`.
        seed: of the transform.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(pattern=r"^[\w.,=+-]+$")
    model: str
    recipe: str | None = None
    passes: list[dict[str, Any]] = Field(default=[], alias="pass")
    golden: str | None = None
    calibration: str | None = None
    weights: Literal["content", "shapes"] = "content"
    logits: bool = True
    onnx: Literal["ort", "onnx", "onnx-static"] | None = None
    tolerance: float | None = Field(default=None, gt=0)
    allow: Literal["none", "cosmetic", "numerical", "structural", "plan"] = "cosmetic"
    seed: int = 0


class Lock(BaseModel):
    """A lock file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal[1]
    check: list[Entry] = Field(min_length=1)


@dataclass(frozen=True)
class Result:
    """One check of a lock file and what became of it.

    Attributes:
        name: of the check.
        outcome: None where it could not be done.
        error: why not.
        seconds: that it took, capture and transform included.
    """

    name: str
    outcome: Outcome | None
    error: KvpassError | None = field(default=None, compare=False)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.outcome is not None and self.outcome.status != "failed"

    @property
    def status(self) -> str:
        return "error" if self.outcome is None else self.outcome.status

    def text(self) -> str:
        """What is wrong, or what changed."""
        return str(self.error) if self.outcome is None else self.outcome.text()


def read_lock(path: str | Path) -> Lock:
    """Read a lock file.

    Raises:
        RequestError: it cannot be read, or something in it is wrong, with the check and the key.
    """
    where = str(path)
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"the lock file cannot be read: {error.strerror}", where=where) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the lock file is no valid TOML: {error}", where=where) from error
    try:
        lock = Lock.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ", ".join(f"check {part + 1}" if isinstance(part, int) else str(part) for part in first["loc"])
        place = place.removeprefix("check, ")
        words = {"extra_forbidden": "there is no such key", "missing": "the key is missing"}
        what = f"{place}: {words.get(first['type'], first['msg'])}"
        raise RequestError(what, where=where, fix=SCHEMA) from error
    names = [entry.name for entry in lock.check]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise RequestError(f"two checks are called {twice!r}", where=where, fix="give each a name of its own")
    for entry in lock.check:
        if entry.recipe is not None and entry.passes:
            raise RequestError(f"{entry.name}: recipe and pass exclude each other", where=where, fix="keep one of them")
    return lock


def run_lock(
    path: str | Path,
    *,
    only: Sequence[str] = (),
    update: bool = False,
    tell: Callable[[str], None] = lambda words: None,
) -> list[Result]:
    """Do the checks of a lock file, all of them whatever fails.

    Args:
        path: the lock file.
        only: names of checks; all where there are none.
        update: write the goldens.
        tell: called with what is being done.

    Raises:
        RequestError: the lock file is wrong, or has no check of that name.
    """
    lock, folder = read_lock(path), Path(path).parent
    names = [entry.name for entry in lock.check]
    for name in only:
        if name not in names:
            raise RequestError(f"there is no check {name!r}", where=str(path), fix=f"choose from {names}")
    found = []
    for entry in lock.check:
        if only and entry.name not in only:
            continue
        tell(entry.name)
        began = time.perf_counter()
        try:
            outcome, error = _run(entry, folder, str(path), update), None
        except KvpassError as raised:
            outcome, error = None, raised
        found.append(Result(entry.name, outcome, error, time.perf_counter() - began))
    return found


def _run(entry: Entry, folder: Path, where: str, update: bool) -> Outcome:
    from kvpass.recipe import Recipe, build

    recipe: Recipe | Path | None = None
    if entry.recipe is not None:
        recipe = folder / entry.recipe
    elif entry.passes:
        recipe = Recipe(tuple(build(p, f"{where}, {entry.name}, pass {i + 1}") for i, p in enumerate(entry.passes)))
    here = folder / entry.model
    calibration = None if entry.calibration is None else folder / entry.calibration
    model = transformed(here if here.is_dir() else entry.model, recipe, calibration=calibration, seed=entry.seed)
    kept = Kept(entry.weights, entry.logits, entry.onnx, entry.tolerance, Grade[entry.allow.upper()])
    return check(model, folder / (entry.golden or f"goldens/{entry.name}.toml"), kept, update=update)


def junit(results: Sequence[Result], name: str) -> str:
    """The results as JUnit XML, which CI servers read."""
    failures = sum(r.status == "failed" for r in results)
    errors = sum(r.status == "error" for r in results)
    suite = ET.Element(
        "testsuite",
        name=name,
        tests=str(len(results)),
        failures=str(failures),
        errors=str(errors),
        skipped="0",
        time=f"{sum(r.seconds for r in results):.3f}",
    )
    for result in results:
        case = ET.SubElement(suite, "testcase", classname=name, name=result.name, time=f"{result.seconds:.3f}")
        if not result.passed:
            kind = "failure" if result.status == "failed" else "error"
            words = _printable(result.text())
            shown = ET.SubElement(case, kind, message=words.split("\n")[0], type=kind)
            shown.text = words
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _printable(text: str) -> str:
    """Without what XML has no way to say."""
    return "".join(letter for letter in text if letter in "\n\t" or letter >= " ")


def summary(results: Sequence[Result], name: str) -> str:
    """The results as Markdown, for the summary of a job or a comment on a pull request."""
    passed = sum(r.passed for r in results)
    lines = [f"## {name}: {passed} of {len(results)} checks passed", ""]
    lines += ["| check | | change | first difference |", "| --- | --- | --- | --- |"]
    for result in results:
        diff = result.outcome.diff if result.outcome is not None else None
        first = diff.differences[0] if diff is not None and diff.differences else None
        words = f"{first.where}: {first.what}" if first is not None else "" if result.passed else result.text()
        words = words.replace("|", "\\|").replace("\n", "<br>")
        lines.append(f"| {result.name} | {result.status} | {'' if diff is None else diff.grade} | {words} |")
    for result in results:
        if result.outcome is not None and result.outcome.diff is not None and result.outcome.diff.differences:
            lines += ["", result.outcome.diff.markdown(result.name)]
    return "\n".join(lines).rstrip("\n") + "\n"
