"""The commands `kvpass snapshot`, `kvpass diff` and `kvpass check`, which `kvpass.cli` takes in at its end."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpass.cli import (
    Flags,
    JsonOption,
    ModelArgument,
    OnnxTarget,
    _check_calibration,
    _session,
    _source,
    _takes_flags,
    _working,
    app,
)
from kvpass.errors import RequestError, SourceError

if TYPE_CHECKING:
    from kvpass.regression.diff import Diff
    from kvpass.regression.snapshot import Snapshot


class Contents(StrEnum):
    """What a snapshot keeps of weights."""

    content = "content"
    shapes = "shapes"


class Change(StrEnum):
    """How much of a change it is, from the mildest."""

    none = "none"
    cosmetic = "cosmetic"
    numerical = "numerical"
    structural = "structural"
    plan = "plan"


WeightsOption = Annotated[Contents, typer.Option("--weights", help="Fingerprints of weights, or their shapes alone.")]
AllowOption = Annotated[Change, typer.Option("--allow", help="The worst change that ends with status 0.")]


@app.command()
@_takes_flags
def snapshot(
    model: ModelArgument,
    flags: Flags,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to write it, if not to stdout.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE", help="A text file; needed by a refit.")
    ] = None,
    weights: WeightsOption = Contents.content,
    logits: Annotated[bool, typer.Option("--logits/--no-logits", help="Ask the model for logits, too.")] = True,
    onnx: Annotated[
        OnnxTarget | None, typer.Option("--onnx", help="Export it for this target, and keep that graph too.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="For everything random.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write what a model, rewritten or as it is, computes and stores, as a text to be reviewed and compared."""
    with _session(as_json) as out:
        chosen = flags.build()
        _check_calibration(chosen, calibration)
        _source(model, "cpu", None)

        from kvpass.output import output_file
        from kvpass.regression.golden import transformed
        from kvpass.regression.snapshot import dump, take

        with _working(as_json, "taking a snapshot"):
            recipe = chosen if chosen.passes else None
            made = transformed(model, recipe, calibration=calibration, seed=seed)
            found = take(made, weights=weights.value, logits=logits, onnx=None if onnx is None else onnx.value)
        out.document = {"model": model, "snapshot": asdict(found)}
        if output is not None:
            with output_file(output) as handle:
                handle.write(dump(found))
        elif not as_json:
            typer.echo(dump(found), nl=False)


@app.command(name="diff")
def difference(
    old: Annotated[str, typer.Argument(metavar="A", help="A snapshot, or a model.")],
    new: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    allow: AllowOption = Change.none,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", min=0.0, help="Of logits, relative to their spread.  [default: A's]")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="For a pull request.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Grade what changed between two snapshots: none, cosmetic, numerical, structural, plan.

    Status 1 when it is worse than --allow.
    """
    with _session(as_json) as out:
        if markdown and as_json:
            raise RequestError("--markdown and --json exclude each other", fix="give one of them")

        from kvpass.regression.diff import Grade, compare

        with _working(as_json, "comparing"):
            found = compare(_read_or_take(old), _read_or_take(new), tolerance=tolerance)
        out.document = {"a": old, "b": new, **_diff_document(found)}
        out.status = 0 if found.grade <= Grade[allow.name.upper()] else 1
        if not as_json:
            typer.echo(found.markdown(f"{Path(old).name} to {Path(new).name}") if markdown else found.text())


def _read_or_take(what: str) -> Snapshot:
    from kvpass.regression.snapshot import read, take

    if not Path(what).is_dir() and (Path(what).is_file() or what.endswith(".toml")):
        return read(what)

    from kvpass.regression.golden import transformed

    _source(what, "cpu", None)
    return take(transformed(what))


def _diff_document(found: Diff) -> dict[str, Any]:
    rows = [{**asdict(d), "grade": str(d.grade)} for d in found.differences]
    return {"grade": str(found.grade), "differences": rows, "notes": list(found.notes)}


@app.command()
def check(
    lock: Annotated[Path, typer.Argument(metavar="LOCK", help="The checks: kvpass-lock.toml.")] = Path(
        "kvpass-lock.toml"
    ),
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="This check; may be repeated.")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the goldens.")] = False,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.")] = None,
    summary: Annotated[Path | None, typer.Option("--summary", metavar="FILE", help="Write Markdown.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare models with the goldens of a repository, as a lock file lists them."""
    with _session(as_json) as out:
        from kvpass.output import output_file
        from kvpass.regression import lock as locks

        with _working(as_json, "checking") as tell:
            results = locks.run_lock(lock, only=only or (), update=update, tell=tell)
        for path, write in ((junit, locks.junit), (summary, locks.summary)):
            if path is not None:
                with output_file(path) as handle:
                    handle.write(write(results, lock.name))
        out.document = {
            "lock": str(lock),
            "checks": [
                {
                    "name": r.name,
                    "status": r.status,
                    "seconds": r.seconds,
                    "error": "" if r.error is None else str(r.error),
                    **(_diff_document(r.outcome.diff) if r.outcome is not None and r.outcome.diff is not None else {}),
                }
                for r in results
            ],
        }
        wrong = [r for r in results if not r.passed]
        asked_wrongly = all(isinstance(r.error, RequestError | SourceError) for r in wrong)
        out.status = 0 if not wrong else 2 if asked_wrongly else 1
        if as_json:
            return
        for result in results:
            typer.echo(f"{result.name}: {result.status} ({result.seconds:.1f} s)")
            if not result.passed or (result.outcome is not None and result.outcome.diff and result.outcome.diff.notes):
                typer.echo("\n".join("  " + line for line in result.text().split("\n")))
        typer.echo(f"{lock}: {sum(r.passed for r in results)} of {len(results)} checks passed")
        if any(r.status == "failed" for r in results):
            typer.echo(f"if this is what you meant: kvpass check {lock} --update, and commit the goldens")
