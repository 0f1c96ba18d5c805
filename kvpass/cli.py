"""The `kvpass` command.

Every command ends with one status: 0 done, 1 a check failed, 2 the request was wrong, 130 interrupted. Results go to
stdout, everything else to stderr; with `--json`, stdout holds one JSON document and nothing else, also for an error.
Whatever is slow to import is imported inside the commands.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum, StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from kvpass.errors import KvpassError, PlanError, RequestError, SourceError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from kvpass.api import LayerFacts, ModelSummary
    from kvpass.ir.plan import CachePlan
    from kvpass.manager import Report
    from kvpass.quality import Scored
    from kvpass.recipe import Recipe
    from kvpass.runtime.transformed import Transformed

PIPE_WIDTH = 120  # columns of a table when stdout is no terminal
INTERRUPTED = 130


class Method(StrEnum):
    """How heads of a group become one."""

    mean = "mean"
    first = "first"
    procrustes = "procrustes"
    pca = "pca"


class Refit(StrEnum):
    """What is fitted to calibration text."""

    none = "none"
    o_proj = "o_proj"
    distill = "distill"


class Grouping(StrEnum):
    """Which heads share."""

    auto = "auto"
    search = "search"
    contiguous = "contiguous"


class Save(StrEnum):
    """What is written."""

    kvpass = "kvpass"
    hf = "hf"


class Level(StrEnum):
    """How much is verified."""

    off = "off"
    fast = "fast"
    full = "full"


class Dtype(StrEnum):
    """What to compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Commands(TyperGroup):
    """The group of commands: a wrong command line is a JSON document too where one was asked for."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        options = {"complete_var": complete_var, "windows_expand_args": windows_expand_args, **extra}
        if not standalone_mode or "--json" not in words or {"--help", "-h"} & set(words):
            return super().main(words, prog_name, standalone_mode=standalone_mode, **options)
        try:
            status = super().main(words, prog_name, standalone_mode=False, **options)
        except Exception as error:  # a usage error of Typer, whose class moved between versions
            if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
                raise
            context = getattr(error, "ctx", None)
            where = context.command_path if context is not None else "kvpass"
            _print_json(sys.stdout, _error_document(error.format_message(), where, f"see `{where} --help`"))
            sys.exit(error.exit_code)
        sys.exit(status if isinstance(status, int) else 0)


app = typer.Typer(
    name="kvpass",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Rewrite a decoder language model that you have, so that its KV cache is smaller.",
    epilog="Exit status: 0 done, 1 a check failed, 2 the request was wrong, 130 interrupted.",
)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face model folder or cached hub id, or a kvpass folder.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", metavar="R.toml", help="Passes, as a TOML file.")]
HeadsOption = Annotated[
    str | None, typer.Option("--kv-heads", metavar="N[,N…]", help="KV heads of every layer, or one number per layer.")
]
MethodOption = Annotated[Method | None, typer.Option("--method", help="How heads become one.  [default: pca]")]
RefitOption = Annotated[Refit | None, typer.Option("--refit", help="What is fitted to text.  [default: none]")]
GroupingOption = Annotated[Grouping | None, typer.Option("--grouping", help="Which heads share.  [default: auto]")]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Optimiser steps per layer of distill.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; a GPU when there is one.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="What to compute in; float32 on a CPU, else the checkpoint's.")
]


def main() -> None:
    """The entry of the `kvpass` command."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from kvpass import __version__

        typer.echo(f"kvpass {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Rewrite a decoder language model that you have, so that its KV cache is smaller."""


# ---------------------------------------------------------------------- inspect and plan


@app.command()
def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """What a model is, and which passes apply.

    Layers, heads, masks, RoPE and cache bytes, as capture proves them. No weight is read.
    """
    with _session(as_json) as out:
        found = _inspect(model)
        out.document = _summary_document(found)
        if as_json:
            return
        typer.echo(f"{found.name}: {found.family}, {found.parameters:,} parameters ({_size(found.parameter_bytes)})")
        for numbers, layer in _groups(found.layers):
            typer.echo(f"  {numbers}: {_layer_line(layer)}")
        per_token, kind = found.plan.bytes_per_token(), _dtypes(found.plan)
        typer.echo(f"cache: {per_token:,} bytes per token in {kind}")
        if found.max_positions:
            typer.echo(f"       {_size(found.plan.bytes(1, found.max_positions))} at {found.max_positions:,} tokens")
        for name, verdict in found.passes.items():
            typer.echo(f"{name}: " + ("applies" if verdict == "ok" else f"does not apply: {verdict}"))


@app.command()
def plan(
    model: ModelArgument,
    recipe: RecipeOption = None,
    kv_heads: HeadsOption = None,
    method: MethodOption = None,
    refit: RefitOption = None,
    grouping: GroupingOption = None,
    steps: StepsOption = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences in the cache.")] = 1,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Tokens per sequence.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The dry run: what the cache would be.

    A recipe that does not apply is refused with the reason. No weight is read.
    """
    with _session(as_json) as out:
        chosen = _recipe(recipe, kv_heads, method, refit, grouping, steps)
        found = _inspect(model)
        before = after = found.plan
        for step in chosen.passes:
            after = step.plan(after)
            if found.passes.get(step.key(), "ok") != "ok":
                raise PlanError(f"{step.describe()} does not apply: {found.passes[step.key()]}", where=model)
        tokens = length or found.max_positions or 4096
        out.document = {
            "model": found.name,
            "family": found.family,
            "recipe": [{"name": p.key(), **p.options()} for p in chosen.passes],
            "layers": after.table(),
            "bytes_per_token": {"before": before.bytes_per_token(), "after": after.bytes_per_token()},
            "batch": batch,
            "length": tokens,
            "bytes": {"before": before.bytes(batch, tokens), "after": after.bytes(batch, tokens)},
        }
        if as_json:
            return
        typer.echo(f"{found.name}: " + (", then ".join(p.describe() for p in chosen.passes) or "as it is"))
        _print_plan(after)
        typer.echo(_change("cache", before.bytes_per_token(), after.bytes_per_token()) + " bytes per token")
        small, large = after.bytes(batch, tokens), before.bytes(batch, tokens)
        typer.echo(f"       {_size(large)} -> {_size(small)} for {batch:,} x {tokens:,} tokens ({_dtypes(after)})")


# ---------------------------------------------------------------------- transform


@app.command()
def transform(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The folder to write.")],
    recipe: RecipeOption = None,
    kv_heads: HeadsOption = None,
    method: MethodOption = None,
    refit: RefitOption = None,
    grouping: GroupingOption = None,
    steps: StepsOption = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE", help="A text file; needed by a refit.")
    ] = None,
    save: Annotated[
        Save, typer.Option("--save", help="kvpass: program and weights; hf: a plain Hugging Face checkpoint.")
    ] = Save.kvpass,
    verify: Annotated[Level, typer.Option("--verify", help="How much is verified on the way.")] = Level.fast,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: Annotated[int, typer.Option("--seed", help="For everything random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder at OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a model and save it."""
    with _session(as_json) as out:
        began = time.perf_counter()
        if recipe is None and kv_heads is None:
            _recipe(recipe, kv_heads, method, refit, grouping, steps)  # says so where only a knob was given
            raise RequestError("nothing is to be done", fix="give --kv-heads N, or --recipe R.toml")
        chosen = _recipe(recipe, kv_heads, method, refit, grouping, steps)
        _check_output(output, model, overwrite)
        _check_calibration(chosen, calibration)
        source = _source(model, device, dtype)
        if save is Save.hf:
            _check_expressible(source, chosen)

        import kvpass

        slim = kvpass.transform(
            source,
            chosen,
            calibration=calibration,
            verify=verify.value,
            device=device,
            dtype=_dtype(dtype),
            seed=seed,
        )
        _write(slim, output, save, overwrite)
        written = sum(f.stat().st_size for f in output.iterdir() if f.is_file())
        report = slim.report
        out.document = {
            "model": model,
            "recipe": [{"name": p.key(), **p.options()} for p in chosen.passes],
            "report": report.to_dict(),
            "layers": slim.plan.table(),
            "bytes_per_token": {
                "before": report.passes[0].bytes_per_token_before if report.passes else slim.plan.bytes_per_token(),
                "after": slim.plan.bytes_per_token(),
            },
            "output": {"path": str(output), "kind": save.value, "bytes": written},
            "seconds": time.perf_counter() - began,
        }
        if as_json:
            return
        _print_report(report)
        kind = "Hugging Face checkpoint" if save is Save.hf else "kvpass program"
        typer.echo(f"saved {output} ({kind}, {_size(written)}, {time.perf_counter() - began:.1f} s)")


def _write(slim: Transformed, output: Path, save: Save, overwrite: bool) -> None:
    if save is Save.hf:
        slim.save_pretrained(output, overwrite=overwrite)
    else:
        slim.save(output, overwrite=overwrite)


def _check_output(output: Path, model: str, overwrite: bool) -> None:
    """Refuse now what could not be written at the end: make the output, and let go of it."""
    from kvpass.output import output_folder

    if Path(model).exists() and output.exists() and os.path.samefile(model, output):
        raise RequestError("the output is the model itself", where=str(output), fix="write to another folder")
    for parent in output.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise RequestError("the output lies inside a file", where=str(parent), fix="write to another folder")
            break
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise RequestError("the output folder exists and is not empty", where=str(output), fix="give --overwrite")

    class Enough(Exception):
        pass

    with contextlib.suppress(Enough), output_folder(output, overwrite=overwrite):
        raise Enough


def _check_calibration(recipe: Recipe, calibration: Path | None) -> None:
    if calibration is not None:
        from kvpass.calibration import read_text

        if not calibration.is_file():
            raise RequestError("there is no such calibration file", where=str(calibration), fix="give a text file")
        read_text(calibration)
        return
    for step in recipe.passes:
        if step.needs_calibration:
            raise RequestError(
                f"{step.describe()} needs calibration text",
                fix="give --calibration FILE (some pages like what the model is used for), or --refit none",
            )


def _check_expressible(source: str | Transformed, recipe: Recipe) -> None:
    """Refuse what no Hugging Face config can say, before any weight is read."""
    from kvpass.capture import capture
    from kvpass.export.checkpoint import target_config
    from kvpass.ir.check import plan_of
    from kvpass.manager import make_plan

    with _hushed():
        program = capture(source, weights=False) if isinstance(source, str) else source.program
    before, after = plan_of(program), make_plan(program, recipe.passes)
    counts = sorted({layer.kv_heads for layer in after})
    if len(counts) > 1:
        raise UnsupportedError(
            f"layers would have different numbers of KV heads ({counts}), and a Hugging Face config has one number",
            where=f"{program.facts.family} config",
            fix="use the same number for all layers, or --save kvpass",
        )
    config = target_config(program)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = [w for w in ("num_key_value_heads", "num_kv_heads", "multi_query_group_num") if hasattr(text, w)]
    if not words and [c.kv_heads for c in before] != [c.kv_heads for c in after] and counts != [1]:
        raise UnsupportedError(
            f"a {program.facts.family} config has no word for the number of KV heads, so it cannot say {counts[0]}",
            where=f"{program.facts.family} config",
            fix="use --save kvpass, which keeps any plan",
        )


# ---------------------------------------------------------------------- generate


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to go on from; - reads stdin.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="At most so many.")] = 64,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="Sample; 0, like no sampling option, is greedy.")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this mass.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Sample from so many tokens.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the samples.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a model continue a prompt.

    Greedy unless --temperature, --top-p or --top-k is given. The text streams when stdout is a terminal.
    """
    with _session(as_json) as out:
        text = sys.stdin.read() if prompt == "-" else prompt
        _check_source(model)

        import torch

        from kvpass.calibration import load_tokenizer

        tokenizer = load_tokenizer(model)
        ids = torch.tensor([tokenizer(text).input_ids], dtype=torch.long)
        if ids.shape[1] == 0:
            what, fix = "the prompt is empty", "give some text to go on from"
            if text:
                what, fix = "the tokenizer makes no tokens of the prompt", "put the model's tokenizer files beside it"
            raise RequestError(what, where=model if text else "--prompt", fix=fix)
        decoder = _decoder(model, device, dtype)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        if temperature != 0 and (temperature, top_p, top_k) != (None, None, None):
            chosen = {"temperature": temperature or 1.0, "top_p": top_p or 1.0, "top_k": top_k or 0}
            options |= {"do_sample": True, **chosen}
        stream = not as_json and sys.stdout.isatty()
        if stream:
            from transformers import TextStreamer

            options["streamer"] = TextStreamer(tokenizer, skip_special_tokens=True)
        torch.manual_seed(seed)
        began = time.perf_counter()
        tokens = decoder.generate(ids, **options)[0]
        seconds = time.perf_counter() - began
        new = int(tokens.shape[0]) - int(ids.shape[1])
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        out.document = {
            "model": model,
            "prompt": text,
            "text": whole,
            "continuation": tokenizer.decode(tokens[ids.shape[1] :], skip_special_tokens=True),
            "tokens": tokens.tolist(),
            "prompt_tokens": int(ids.shape[1]),
            "new_tokens": new,
            "seconds": seconds,
            "tokens_per_second": new / seconds,
            "cache_bytes": decoder.plan.bytes(1, int(tokens.shape[0])),
            "seed": seed,
        }
        if not as_json and not stream:
            typer.echo(whole)


# ---------------------------------------------------------------------- eval


@app.command(name="eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models; the first is the reference.")],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="Held-out text.")],
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens in the cache per window.")] = 192,
    continuation: Annotated[int, typer.Option("--continuation", min=1, help="Tokens scored per window.")] = 64,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of text.")] = 32,
    retrieval: Annotated[bool, typer.Option("--retrieval", help="Ask for pass keys planted in the text too.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the pass keys.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quality at measured cache bytes, side by side.

    Likelihood of held-out text whose beginning is in the cache, divergence from the first model, and retrieval.
    """
    with _session(as_json) as out:
        from kvpass.calibration import encode, load_tokenizer, read_text

        for model in models:
            _check_source(model)
        content = read_text(text)

        from kvpass import quality

        tokenizer = load_tokenizer(models[0])
        runs: dict[str, Scored] = {}
        runtimes: dict[str, dict[str, str]] = {}
        for name, model in zip(_names(models), models, strict=True):
            with _working(as_json, f"loading {name}"):
                runs[name], runtime, kind = _scored(model, device, dtype)
            runtimes[name] = {"model": model, "runtime": runtime, "dtype": kind}
        with _working(as_json, "scoring"):
            scores = quality.continuation(
                runs, encode(tokenizer, content), context=context, continuation=continuation, windows=windows
            )
        out.document = {
            "text": str(text),
            "reference": next(iter(runs)),
            "models": runtimes,
            "continuation": {name: score.to_dict() for name, score in scores.items()},
        }
        found: dict[str, quality.Retrieval] = {}
        if retrieval:
            with _working(as_json, "asking for pass keys"):
                found = quality.recall(runs, quality.planted_fact(tokenizer, content, length=context, seed=seed))
            out.document["retrieval"] = {name: result.to_dict() for name, result in found.items()}
        if as_json:
            return
        console = _console()
        console.print(quality.table(scores))
        if found:
            console.print(quality.retrieval_table(found))
        kinds = {f["dtype"] for f in runtimes.values()}
        if len(kinds) > 1:
            typer.echo("the models compute in different dtypes: " + _listing(runtimes, "dtype"))
        if {f["runtime"] for f in runtimes.values()} != {"kvpass"}:
            typer.echo("what ran them: " + _listing(runtimes, "runtime"))


def _listing(facts: Mapping[str, Mapping[str, str]], key: str) -> str:
    return ", ".join(f"{name} {fact[key]}" for name, fact in facts.items())


def _names(models: Sequence[str]) -> list[str]:
    """Short names that differ: the folder's name where that is enough, else the path; a number for the same twice."""
    short = [Path(m).name or m for m in models]
    names: list[str] = []
    for index, model in enumerate(models):
        name = short[index] if short.count(short[index]) == 1 else model
        count = 2
        while name in names:
            name, count = f"{model} ({count})", count + 1
        names.append(name)
    return names


def _scored(model: str, device: str | None, dtype: Dtype | None) -> tuple[Scored, str, str]:
    """A model, what runs it (transformers where kvpass cannot), and what it computes in."""
    from kvpass.errors import CaptureError
    from kvpass.quality import HuggingFaceModel

    try:
        decoder = _decoder(model, device, dtype)
        _ = decoder.executor
    except (CaptureError, UnsupportedError):
        from kvpass.api import choose_device

        plain = HuggingFaceModel(model, device=choose_device(device), dtype=_dtype(dtype))
        return plain, "transformers", str(plain.model.dtype).removeprefix("torch.")
    return decoder, "kvpass", str(decoder.program.facts.dtype).removeprefix("torch.")


# ---------------------------------------------------------------------- verify


@app.command()
def verify(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A kvpass folder, or a Hugging Face folder.")],
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the token ids.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Check an output again on this machine.

    Its structure, its weights, that the cache changes nothing, and that transformers computes the same of a checkpoint.
    """
    with _session(as_json) as out:
        decoder = _decoder(model, device, dtype)

        from kvpass.verification import verify as verify_model

        with _working(as_json, "checking"):
            checks = verify_model(decoder, seed=seed, checkpoint=None if _is_program(model) else model)
        passed = all(check.passed for check in checks)
        out.document = {"model": model, "passed": passed, "checks": [asdict(check) for check in checks]}
        out.status = 0 if passed else 1
        if as_json:
            return
        from rich.table import Table

        table = Table(box=_box())
        for heading in ("check", "", "measured", "allowed", "detail"):
            table.add_column(heading, overflow="fold")
        for check in checks:
            figures = ("" if math.isnan(check.measured) else f"{check.measured:.1e}", f"{check.allowed:.0e}")
            figures = figures if check.allowed else (f"{check.measured:.0f}" if figures[0] else "", "0")
            table.add_row(check.name, "passed" if check.passed else "FAILED", *figures, check.detail)
        _console().print(table)
        typer.echo(f"{model}: " + ("all checks passed" if passed else "a check FAILED"))


# ---------------------------------------------------------------------- requests


def _recipe(
    path: Path | None,
    kv_heads: str | None,
    method: Method | None,
    refit: Refit | None,
    grouping: Grouping | None,
    steps: int | None,
) -> Recipe:
    """The recipe that the options say: a file, or one GroupHeads."""
    knobs: dict[str, Any] = {
        name: value.value if isinstance(value, Enum) else value
        for name, value in (("method", method), ("refit", refit), ("grouping", grouping), ("steps", steps))
        if value is not None
    }
    given = [f"--{name}" for name in knobs]
    if path is not None and (kv_heads is not None or knobs):
        other = ["--kv-heads"] * (kv_heads is not None) + given
        raise RequestError(f"--recipe and {other[0]} exclude each other", fix="put everything into the recipe")
    if kv_heads is None and knobs:
        raise RequestError(f"{given[0]} belongs to --kv-heads, which is not given", fix="give --kv-heads N")

    from kvpass.recipe import Recipe, build

    if path is not None:
        return Recipe.load(path)
    if kv_heads is None:
        return Recipe()
    return Recipe((build({"name": "group-heads", "kv_heads": _counts(kv_heads), **knobs}, "the command line"),))


def _counts(text: str) -> int | list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(
            f"--kv-heads takes a number, or numbers with commas, not {text!r}",
            where="--kv-heads",
            fix="write 2, or 4,4,2,2 with one number per layer",
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def _is_program(model: str) -> bool:
    return (Path(model) / "kvpass.json").is_file()


def _check_source(model: str) -> None:
    """Refuse what cannot be a model, without looking for it elsewhere."""
    path = Path(model)
    advice = "give a folder with config.json and *.safetensors, or one that kvpass wrote"
    if path.is_dir():
        return
    if path.exists():
        raise SourceError("a model is a folder, and this is a file", where=model, fix=advice)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            snapshot_download(model, local_files_only=True)
            return
        except (OSError, ValueError, HFValidationError, HfHubHTTPError):
            raise SourceError(
                "there is no such folder, and no such model in the local Hugging Face cache",
                where=model,
                fix=f"{advice}; `hf download {model}` fetches a model of the hub",
            ) from None
    raise SourceError("there is no such folder", where=model, fix=advice)


def _source(model: str, device: str | None, dtype: Dtype | None) -> str | Transformed:
    """What `kvpass.transform` takes: the path of a Hugging Face model, or a loaded kvpass folder."""
    _check_source(model)
    if not _is_program(model):
        return model

    import kvpass

    loaded = kvpass.load(model, device=device)
    kind = loaded.program.facts.dtype
    if dtype is not None and _dtype(dtype) != kind:
        raise RequestError(
            f"the saved program computes in {str(kind).removeprefix('torch.')}, not in {dtype.value}",
            where=model,
            fix="leave --dtype out, or transform the original model again with it",
        )
    return loaded


def _decoder(model: str, device: str | None, dtype: Dtype | None) -> Transformed:
    """A model that runs: a kvpass folder, or a Hugging Face model as it is."""
    source = _source(model, device, dtype)
    if not isinstance(source, str):
        return source

    import kvpass

    with _hushed():
        return kvpass.transform(source, verify="off", device=device, dtype=_dtype(dtype), progress=False)


def _inspect(model: str) -> ModelSummary:
    source = _source(model, None, None)

    from kvpass import api

    with _hushed():
        return api.inspect(source) if isinstance(source, str) else api.summarize(source.program)


def _dtype(dtype: Dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    import torch

    found: torch.dtype = getattr(torch, dtype.value)
    return found


# ---------------------------------------------------------------------- one command


class _Outcome:
    """What a command has to say to a machine, and its exit status."""

    def __init__(self) -> None:
        self.document: dict[str, Any] = {}
        self.status = 0


@contextlib.contextmanager
def _session(as_json: bool) -> Iterator[_Outcome]:
    """The frame of a command: errors become messages and statuses, and stdout stays clean."""
    outcome, stdout = _Outcome(), sys.stdout

    def fail(what: str, where: str, fix: str, text: str) -> None:
        if as_json:
            _print_json(stdout, _error_document(what, where, fix))
        elif text:
            typer.echo(f"kvpass: {text}", err=True)

    with _interrupts() as interrupts:
        try:
            with _quiet(), contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                yield outcome
            if as_json:
                _print_json(stdout, outcome.document)
            stdout.flush()
        except typer.Exit:
            raise
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # nobody reads on: no complaint at exit
            raise typer.Exit(1) from None
        except (Exception, KeyboardInterrupt) as error:
            if interrupts or isinstance(error, KeyboardInterrupt):
                what = "interrupted; nothing was left behind"
                fail(what, "", "", what)
                raise typer.Exit(INTERRUPTED) from None
            if isinstance(error, KvpassError):
                fail(error.what, error.where, error.fix, str(error))
                raise typer.Exit(error.exit_status) from None
            traceback.print_exc(file=sys.stderr)
            what = f"unexpected {type(error).__name__}: {error}"
            fail(what, "", "please report it with the traceback on stderr", "")
            raise typer.Exit(1) from None
    if outcome.status:
        raise typer.Exit(outcome.status)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C as usual, and remembered: a library that is being imported turns it into an error of its own."""
    seen: list[int] = []
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield seen
        return

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No logs, bars and warnings of the libraries, unless the user asked for them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules and os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    level = logging.root.manager.disable
    if "TORCH_LOGS" not in os.environ and os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
                warnings.filterwarnings("default", module=r"kvpass\.")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Nothing on stderr: torch.export prints the graph as far as it came when it gives up."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _working(as_json: bool, what: str) -> Iterator[None]:
    """A sign of life on a terminal."""
    if as_json or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def _error_document(what: str, where: str, fix: str) -> dict[str, Any]:
    return {"error": {"what": what, "where": where, "fix": fix}}


def _print_json(stream: TextIO, document: Mapping[str, Any]) -> None:
    stream.write(json.dumps(_plain(document), indent=2, allow_nan=False) + "\n")
    stream.flush()


def _plain(value: Any) -> Any:
    """JSON values; what is not a finite number becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | int):
        return value
    return str(value).removeprefix("torch.")


# ---------------------------------------------------------------------- words and tables


def _console() -> Console:
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def _box() -> Any:
    from rich import box

    return box.SIMPLE


def _print_plan(plan: CachePlan) -> None:
    from rich.table import Table

    table = Table(box=_box())
    table.add_column("layers")
    for heading in ("query heads", "KV heads", "K x V", "window", "dtype", "bytes per token"):
        table.add_column(heading, justify="right")
    for row in plan.table():
        window = str(row["window"] or "all") + (f" + {row['sinks']} sinks" if row["sinks"] else "")
        table.add_row(
            _range(int(str(row["first"])), int(str(row["last"]))),
            str(row["heads"]),
            str(row["kv_heads"]),
            f"{row['key_dim']} x {row['value_dim']}",
            window,
            str(row["dtype"]),
            f"{row['bytes_per_token']:,}",
        )
    _console().print(table)


def _print_report(report: Report) -> None:
    from rich.table import Table

    table = Table(box=_box())
    table.add_column("pass", overflow="fold")
    table.add_column("effect")
    for heading in ("sites", "seconds", "cache bytes per token"):
        table.add_column(heading, justify="right")
    table.add_column("checks", overflow="fold")
    for done in report.passes:
        table.add_row(
            done.description.removesuffix("()"),
            done.effect,
            f"{done.sites} of {done.of}",
            f"{done.seconds:.1f}",
            f"{done.bytes_per_token_before:,} -> {done.bytes_per_token_after:,}",
            "; ".join(done.checks) or "off",
        )
    _console().print(table)
    found = report.quality
    if found.get("measured"):
        typer.echo(
            f"quality on {found['on']}: {found['nll_original']:.4f} -> {found['nll']:.4f} nats per token, "
            f"KL {found['kl']:.4f}, top-1 agreement {found['top1']:.1%}"
        )
    elif found:
        typer.echo(f"quality not measured: {found['reason']}")
    for note in report.notes:
        typer.echo(note)


def _summary_document(found: ModelSummary) -> dict[str, Any]:
    return {
        "name": found.name,
        "family": found.family,
        "parameters": found.parameters,
        "parameter_bytes": found.parameter_bytes,
        "vocab_size": found.vocab_size,
        "max_positions": found.max_positions,
        "layers": [asdict(layer) for layer in found.layers],
        "cache": {"bytes_per_token": found.plan.bytes_per_token(), "dtype": _dtypes(found.plan)},
        "passes": found.passes,
    }


def _groups(layers: Sequence[LayerFacts]) -> list[tuple[str, LayerFacts]]:
    """Layers that are equal but for their number: "0-3, 5", and their facts."""
    groups: dict[LayerFacts, list[int]] = {}
    for layer in layers:
        groups.setdefault(replace(layer, layer=0, refusals=()), []).append(layer.layer)
    return [(_ranges(numbers), layer) for layer, numbers in groups.items()]


def _ranges(numbers: Sequence[int]) -> str:
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    words = [_range(first, last) for first, last in ends]
    if len(words) > 8:
        words = [*words[:4], "…", words[-1]]
        return ", ".join(words) + f" ({len(numbers)} layers)"
    return ", ".join(words)


def _layer_line(layer: LayerFacts) -> str:
    size = f"{layer.key_dim}" if layer.key_dim == layer.value_dim else f"{layer.key_dim}/{layer.value_dim}"
    words = [f"{_many(layer.heads, 'query head')}, {_many(layer.kv_heads, 'KV head')} x {size}", layer.mask]
    if layer.rotary not in ("none", "unknown"):
        words.append(f"RoPE {layer.rotary.replace(',', '')}".replace(" channels", ""))
    if layer.norm not in ("none", "unknown"):
        words.append(f"normalised keys ({layer.norm})")
    if layer.softcap:
        words.append(f"soft-cap {layer.softcap:g}")
    if layer.sink_logits:
        words.append("sink logits")
    if not math.isclose(layer.scale, layer.key_dim**-0.5, rel_tol=1e-3):
        words.append(f"scale {layer.scale:g}")
    if layer.layout == "fused":
        words.append("fused projection")
    return ", ".join(words)


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _dtypes(plan: CachePlan) -> str:
    return ", ".join(sorted({str(layer.dtype).removeprefix("torch.") for layer in plan}))


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _change(what: str, before: int, after: int) -> str:
    if before == after:
        return f"{what}: {after:,}"
    return f"{what}: {before:,} -> {after:,} ({after / before:.1%})"


def _size(count: int) -> str:
    """Bytes for people, in decimal units."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
