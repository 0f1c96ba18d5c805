"""The command `kvpass report`, which `kvpass.cli` takes in at its end."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvpass.cli import (
    DeviceOption,
    DtypeOption,
    Flags,
    JsonOption,
    Level,
    ModelArgument,
    _check_calibration,
    _dtype,
    _hushed,
    _session,
    _size,
    _source,
    _takes_flags,
    _working,
    app,
)
from kvpass.errors import RequestError


@app.command()
@_takes_flags
def report(
    model: ModelArgument,
    flags: Flags,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="Held-out text.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
    original: Annotated[
        str | None,
        typer.Option("--original", metavar="MODEL", help="What MODEL was made of, if it was rewritten already."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE", help="A text file; needed by a refit.")
    ] = None,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens in the cache per window.")] = 192,
    continuation: Annotated[int, typer.Option("--continuation", min=1, help="Tokens scored per window.")] = 64,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of text.")] = 32,
    prompt: Annotated[
        int | None,
        typer.Option("--prompt", min=1, help="Tokens of the prompt that layers are shown for.  [default: two windows]"),
    ] = None,
    verify: Annotated[Level, typer.Option("--verify", help="How much is verified on the way.")] = Level.fast,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: Annotated[int, typer.Option("--seed", help="For everything random.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a model pass by pass, measure it, and write one HTML page that needs no network.

    With --original, MODEL may be what was rewritten already.
    """
    with _session(as_json) as out:
        chosen = flags.build()
        if not chosen.passes and original is None:
            raise RequestError(
                "there is nothing to compare: no pass is asked for",
                fix="ask for a pass, such as --kv-heads N, or give what the model was made of with --original",
            )
        if output.is_dir():
            raise RequestError("the output is a file, and a folder stands there", where=str(output), fix="name a file")
        _check_calibration(chosen, calibration)

        from kvpass.calibration import read_text

        read_text(text)
        source = _source(model, device, dtype)
        compared = None if original is None else _source(original, device, dtype)

        from kvpass.report import Sizes, write

        with _working(as_json, "capturing") as tell, _hushed():
            figures = write(
                output,
                source,
                chosen,
                text=text,
                original=compared,
                calibration=calibration,
                sizes=Sizes(context, continuation, windows, prompt),
                verify=verify.value,
                device=device,
                dtype=_dtype(dtype),
                seed=seed,
                command=shlex.join(["kvpass", *sys.argv[1:]]),
                tell=tell,
            )
        out.document = {"output": str(output), "bytes": output.stat().st_size, "figures": figures.to_dict()}
        if not as_json:
            before, after = figures.bytes_per_token
            typer.echo(f"cache: {before:,} -> {after:,} bytes per token")
            for point in figures.quality:
                found = point.reason if point.nll is None else f"NLL {point.nll:.4f}, KL {point.kl:.4f}"
                typer.echo(f"{point.name}: {found}")
            typer.echo(f"wrote {output} ({_size(output.stat().st_size)})")
