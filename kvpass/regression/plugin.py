"""The pytest plugin: the fixture `kv_regression`, and `--kvpass-update`.

    def test_the_cache_is_as_reviewed(kv_regression):
        kv_regression.check("models/mine", [GroupHeads(2), QuantizeKV(8)])

The golden stands beside the test file, in `goldens/<test file>/<test>.toml`, and belongs into the repository. pytest
loads this module whether a test uses it or not, so nothing slow is imported before the first check.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from torch import nn

    from kvpass.calibration import Calibration
    from kvpass.passes.base import Pass
    from kvpass.recipe import Recipe
    from kvpass.regression.golden import Outcome
    from kvpass.runtime.transformed import Transformed

GradeName = Literal["none", "cosmetic", "numerical", "structural", "plan"]
PROPERTY = "kvpass"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvpass")
    group.addoption("--kvpass-update", action="store_true", help="Write the goldens of kv_regression.check.")
    parser.addini("kvpass_goldens", "Folder of the goldens, from the root of the project.", default="")


@pytest.fixture
def kv_regression(request: pytest.FixtureRequest) -> Iterator[KVRegression]:
    """Compares models with goldens; see `KVRegression.check`."""
    with _untraced():
        yield KVRegression(request)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was written and which ties were near: reports come from all workers of xdist, as properties of tests."""
    reports = [r for rs in terminalreporter.stats.values() for r in rs if getattr(r, "when", "") == "call"]
    found = [value for r in reports for key, value in r.user_properties if key == PROPERTY]
    if not found:
        return
    counts = {status: sum(v.startswith(f"{status} ") for v in found) for status in ("written", "unchanged", "passed")}
    terminalreporter.section("kvpass goldens")
    words = [f"{count} {status}" for status, count in counts.items() if count]
    terminalreporter.line(", ".join(words) or "none passed")
    for value in sorted(v for v in found if v.startswith(("written ", "ambiguous "))):
        terminalreporter.line(f"  {value}")


class KVRegression:
    """The fixture `kv_regression` of one test."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request
        self._checked: set[Path] = set()

    def check(
        self,
        model: str | Path | nn.Module | Transformed,
        recipe: Recipe | str | Path | Pass | Iterable[Pass] | None = None,
        *,
        name: str = "",
        calibration: Calibration | None = None,
        weights: Literal["content", "shapes"] = "content",
        logits: bool = True,
        onnx: Literal["ort", "onnx", "onnx-static"] | bool = False,
        tolerance: float | None = None,
        allow: GradeName = "cosmetic",
        seed: int = 0,
    ) -> Outcome:
        """Fail the test where a transformed model is not what its golden says.

        Args:
            model: a folder or hub id, a module, or what `kvpass.transform` gave.
            recipe: passes, a `Recipe` or the path of one; None for the model as it is.
            name: of the golden, where a test has several.
            calibration: what `kvpass.transform` takes.
            weights: "shapes" leaves their contents out.
            logits: whether answers to fixed tokens are compared.
            onnx: a target of `export_onnx` whose graph is compared too; True for "ort".
            tolerance: of logits, relative to their spread; by dtype where None.
            allow: the worst change that passes.
            seed: of the transform.

        Returns:
            What was found, where the test goes on.

        Raises:
            KvpassError: the model cannot be transformed, or a golden not be read or written.
        """
        from kvpass.errors import RequestError
        from kvpass.regression import golden
        from kvpass.regression.diff import Grade

        path = self.golden(name)
        if path in self._checked:
            raise RequestError("two checks of one test have the same golden", where=str(path), fix="give each a name=")
        self._checked.add(path)
        if allow.upper() not in Grade.__members__:
            raise RequestError(f"there is no grade {allow!r}", fix=f"choose from {[str(g) for g in Grade]}")
        target = "ort" if onnx is True else onnx or None
        kept = golden.Kept(weights, logits, target, tolerance, Grade[allow.upper()])
        update = bool(self._request.config.getoption("--kvpass-update"))
        made = golden.transformed(model, recipe, calibration=calibration, seed=seed)
        outcome = golden.check(made, path, kept, update=update)
        properties = self._request.node.user_properties
        shown = self._shown(path)
        properties.append((PROPERTY, f"{outcome.status} {shown}"))
        if outcome.status == "passed" and outcome.diff is not None:
            properties += [(PROPERTY, f"ambiguous {shown}: {note}") for note in outcome.diff.notes]
        if outcome.status == "failed":
            pytest.fail(f"{shown}\n{outcome.text()}\n{ADVICE}", pytrace=False)
        return outcome

    def golden(self, name: str = "") -> Path:
        """Where this test's golden is."""
        request = self._request
        folder = request.config.getini("kvpass_goldens")
        here = request.path.parent / "goldens"
        if folder:
            here = request.config.rootpath / folder / request.path.relative_to(request.config.rootpath).parent
        test = request.node.nodeid.split("::", 1)[1].replace("::", ".")
        words = re.sub(r"[^\w.,=+-]+", "-", test).strip("-")
        return here / request.path.stem / (words + (f"--{name}" if name else "") + ".toml")

    def _shown(self, path: Path) -> str:
        root = self._request.config.rootpath
        return str(path.relative_to(root) if path.is_relative_to(root) else path)


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Without the records that torch.export logs of itself, of which pytest would print thousands with a failure."""
    logger = logging.getLogger("torch.__trace")
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = before


ADVICE = "if this is what you meant: pytest --kvpass-update, and commit the golden"
