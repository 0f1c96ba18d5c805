"""The `kvpass` command.

Every command ends with one status: 0 done, 1 a check failed, 2 the request was wrong, 130 interrupted. Results go to
stdout, everything else to stderr; with `--json`, stdout holds one JSON document and nothing else, also for an error.
Whatever is slow to import is imported inside the commands.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum, StrEnum
from inspect import Parameter, signature
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TextIO, get_type_hints

import typer
from typer.core import TyperGroup

from kvpass.errors import KvpassError, PlanError, RequestError, SourceError, UnsupportedError
from kvpass.output import holds_program

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor

    from kvpass.api import LayerFacts, ModelSummary
    from kvpass.ir.cost import PromptCost
    from kvpass.ir.plan import CachePlan
    from kvpass.manager import Report
    from kvpass.passes.base import Pass
    from kvpass.quality import Scored
    from kvpass.quality.sharing import EdgeLoss
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


class Init(StrEnum):
    """What the owner of shared keys and values projects with."""

    copy = "copy"
    mean = "mean"


class Bits(StrEnum):
    """Bits per stored number."""

    eight = "8"
    four = "4"
    two = "2"


class Format(StrEnum):
    """How numbers are stored."""

    auto = "auto"
    token = "token"
    kivi = "kivi"
    static = "static"
    fp8 = "fp8"


class Policy(StrEnum):
    """Which entries of a cache stay."""

    snapkv = "snapkv"
    pyramidkv = "pyramidkv"
    h2o = "h2o"
    scissorhands = "scissorhands"
    tova = "tova"
    recent = "recent"
    random = "random"


class Save(StrEnum):
    """What is written."""

    kvpass = "kvpass"
    hf = "hf"


class Level(StrEnum):
    """How much is verified."""

    off = "off"
    fast = "fast"
    full = "full"


class OnnxTarget(StrEnum):
    """Whose operators an ONNX package is made of."""

    ort = "ort"
    onnx = "onnx"
    onnx_static = "onnx-static"


class OnnxWeights(StrEnum):
    """What the matrices of an ONNX package are, if not of its dtype."""

    int4 = "int4"


class OnnxDtype(StrEnum):
    """What an ONNX package computes in."""

    fp32 = "fp32"
    fp16 = "fp16"


class Backend(StrEnum):
    """What computes attention."""

    auto = "auto"
    reference = "reference"
    triton = "triton"


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
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; a GPU when there is one.")]
BackendOption = Annotated[
    Backend, typer.Option("--backend", help="What computes attention: fused kernels, or plain torch.")
]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="What to compute in; float32 on a CPU, else the checkpoint's.")
]
UpwardOption = Annotated[bool, typer.Option("--upward", help="Let layers read a layer above them, too.")]


@dataclass(frozen=True)
class Flags:
    """What a command line says of a recipe: the path of a file, or passes in the order in which they stand here."""

    recipe: Annotated[Path | None, typer.Option("--recipe", metavar="R.toml", help="Passes, as a TOML file.")] = None
    kv_heads: Annotated[
        str | None,
        typer.Option("--kv-heads", metavar="N[,N…]", help="KV heads of every layer, or one number per layer."),
    ] = None
    method: Annotated[Method | None, typer.Option("--method", help="How heads become one.  [default: pca]")] = None
    refit: Annotated[Refit | None, typer.Option("--refit", help="What is fitted to text.  [default: none]")] = None
    grouping: Annotated[Grouping | None, typer.Option("--grouping", help="Which heads share.  [default: auto]")] = None
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimiser steps per layer of distill.")] = None
    share_layers: Annotated[
        str | None,
        typer.Option(
            "--share-layers", metavar="TEXT", help="Who reads whom: cla:2, yoco, lckv:2, pizza-bottom:5, 0_1_1_3."
        ),
    ] = None
    share_init: Annotated[
        Init | None, typer.Option("--share-init", help="What an owner projects with.  [default: copy]")
    ] = None
    share_align: Annotated[
        bool, typer.Option("--share-align", help="Fit readers' queries and W_O to what they read; needs text.")
    ] = False
    upward: UpwardOption = False
    window: Annotated[
        str | None, typer.Option("--window", metavar="N[,N…]", help="Latest tokens that layers read; 0 leaves a layer.")
    ] = None
    sinks: Annotated[
        str | None, typer.Option("--sinks", metavar="N[,N…]", help="First tokens that stay.  [default: 4]")
    ] = None
    cache_positions: Annotated[
        bool, typer.Option("--cache-positions", help="Count positions in the cache, for text without end.")
    ] = False
    kv_bits: Annotated[Bits | None, typer.Option("--kv-bits", help="Quantize the cache.")] = None
    kv_format: Annotated[Format | None, typer.Option("--kv-format", help="And how.  [default: auto]")] = None
    evict: Annotated[
        Policy | None, typer.Option("--evict", help="Drop entries of the cache, chosen by this method.")
    ] = None
    evict_keep: Annotated[
        float | None, typer.Option("--evict-keep", metavar="F", help="Keep this fraction of a prompt's entries.")
    ] = None
    evict_budget: Annotated[
        int | None, typer.Option("--evict-budget", min=1, metavar="N", help="Keep so many entries instead.")
    ] = None
    evict_window: Annotated[
        int | None,
        typer.Option("--evict-window", min=0, metavar="N", help="Latest tokens that stay.  [default: the method's]"),
    ] = None
    pyramid: Annotated[
        str | None,
        typer.Option(
            "--pyramid",
            metavar="F|SIZE",
            help="Drop tokens of a prompt from layer to layer: its cache takes this fraction, or a size like 64MB.",
        ),
    ] = None
    pyramid_length: Annotated[
        int | None,
        typer.Option(
            "--pyramid-length", min=1, metavar="N", help="The prompt that --pyramid is solved for.  [default: 2048]"
        ),
    ] = None
    pyramid_at: Annotated[
        int | None,
        typer.Option(
            "--pyramid-at",
            min=0,
            metavar="LAYER",
            help="Drop them all behind one layer, which passes on that fraction (FastKV).",
        ),
    ] = None
    pyramid_thin: Annotated[bool, typer.Option("--pyramid-thin", help="Thin generated text too, as it grows old.")] = (
        False
    )
    page: Annotated[int | None, typer.Option("--page", min=1, metavar="N", help="Keep it in pages of N tokens.")] = None

    def build(self) -> Recipe:
        """The recipe.

        Raises:
            RequestError: a file and flags, a flag whose pass is not asked for, or a value that cannot be read.
        """
        given = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None and v is not False}
        path = given.pop("recipe", None)
        if path is not None and given:
            raise RequestError(
                f"--recipe and {_option(next(iter(given)))} exclude each other", fix="put everything into the recipe"
            )
        passes: list[dict[str, Any]] = []
        for name, (asking, *others) in PASS_FLAGS.items():
            found = [flag for flag in others if flag in given]
            if asking in given:
                passes.append({"name": name})
                for flag in (asking, *found):
                    passes[-1] |= _knob(flag, given[flag])
            elif found:
                raise RequestError(
                    f"{_option(found[0])} belongs to {_option(asking)}, which is not given",
                    fix=f"give {_option(asking)} too, or leave {_option(found[0])} out",
                )

        from kvpass.recipe import Recipe, build

        if path is not None:
            return Recipe.load(path)
        return Recipe(tuple(build(entry, "the command line") for entry in passes))


PASS_FLAGS = {
    "group-heads": ("kv_heads", "method", "refit", "grouping", "steps"),
    "share-layers": ("share_layers", "share_init", "share_align", "upward"),
    "slide-window": ("window", "sinks", "cache_positions"),
    "quantize-kv": ("kv_bits", "kv_format"),
    "evict-kv": ("evict", "evict_keep", "evict_budget", "evict_window"),
    "prune-pyramid": ("pyramid", "pyramid_length", "pyramid_at", "pyramid_thin"),
    "page-kv": ("page",),
}
"""Passes in the order in which they compose: each with the flag that asks for it, then those that belong to it."""

KNOBS = {
    "share_layers": "kv_source",
    "share_init": "init",
    "share_align": "align",
    "kv_bits": "bits",
    "kv_format": "layout",
    "evict": "policy",
    "evict_keep": "keep",
    "evict_budget": "budget",
    "evict_window": "window",
    "pyramid": "keep",
    "pyramid_length": "length",
    "pyramid_at": "at",
    "pyramid_thin": "thin",
}
"""What flags are called in a recipe, where that is not their own name."""


def _option(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def _knob(flag: str, value: Any) -> dict[str, Any]:
    """A flag as a knob of its pass."""
    if flag == "cache_positions":
        return {"positions": "cache"}
    if value is Format.fp8:
        return {"kind": "fp8"}
    if flag == "pyramid":
        return _fraction_or_bytes(_option(flag), value)
    if flag == "pyramid_at":
        return {"at": value, "schedule": "step"}
    if flag in ("kv_heads", "window", "sinks"):
        value = _counts(_option(flag), value)
    elif flag == "kv_bits":
        value = int(value)
    elif isinstance(value, Enum):
        value = value.value
    return {KNOBS.get(flag, flag): value}


def _counts(option: str, text: str) -> int | list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(
            f"{option} takes a number, or numbers with commas, not {text!r}",
            where=option,
            fix="write 2, or 4,4,2,2 with one number per layer",
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _fraction_or_bytes(option: str, text: str) -> dict[str, Any]:
    """0.45 as a fraction to keep, 64MB and 64MiB as bytes."""
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?([a-z]*)", text.strip().lower())
    number, unit = (float(found[1]), found[2]) if found else (0.0, "")
    if not unit and 0 < number <= 1:
        return {"keep": number}
    if unit in units and 1 <= number * units[unit] < math.inf:
        return {"bytes": round(number * units[unit])}
    raise RequestError(
        f"{option} takes a fraction above 0 and not above 1, or bytes with a unit, not {text!r}",
        where=option,
        fix=f"write 0.45, or 64MB; units are {', '.join(UNITS)}",
    )


def _takes_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Flags` in the place of its parameter `flags`."""
    hints = get_type_hints(Flags, include_extras=True)
    options = [
        Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]) for f in fields(Flags)
    ]
    own = signature(command, eval_str=True)
    parameters = []
    for parameter in own.parameters.values():
        shown = parameter.replace(kind=Parameter.KEYWORD_ONLY)
        parameters += options if parameter.name == "flags" else [shown]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        flags = Flags(**{name: given.pop(name) for name in hints})
        command(flags=flags, **given)

    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


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
        found = _summary(_source(model, None, None))
        out.document = _summary_document(found)
        if as_json:
            return
        typer.echo(f"{found.name}: {found.family}, {found.parameters:,} parameters ({_size(found.parameter_bytes)})")
        for numbers, layer in _groups(found.layers):
            typer.echo(f"  {numbers}: {_layer_line(layer)}")
        per_token, kind = found.plan.bytes_per_token(), _dtypes(found.plan)
        kept, at = (" that all layers keep", "for a prompt of") if found.plan.selective else ("", "at")
        typer.echo(f"cache: {per_token:,} bytes per token{kept} in {kind}")
        if found.max_positions:
            typer.echo(f"       {_size(found.plan.bytes(1, found.max_positions))} {at} {found.max_positions:,} tokens")
        for name, verdict in found.passes.items():
            typer.echo(f"{name}: " + ("applies" if verdict == "ok" else f"does not apply: {verdict}"))


@app.command()
def explain(
    model: ModelArgument,
    name: Annotated[
        str,
        typer.Option(
            "--pass",
            metavar="NAME",
            help="As in recipes, or lower-attention (which kernels run where) or raise-rotary.",
        ),
    ],
    layer: Annotated[int | None, typer.Option("--layer", min=0, help="One layer alone.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say at which layers a pass matches, by which evidence, and what is missing where it does not.

    A miss comes with the nearest match, the node, its line in the model's code and what to change. No weight is read.
    """
    with _session(as_json) as out:
        from kvpass import explanation

        explanation.check_name(name)
        source = _source(model, "cpu", None)
        with _hushed():
            found = explanation.explain(source, name, layer)
        out.document = {
            "model": model,
            "pass": name,
            "matched": sum(e.matched for e in found),
            "layers": [asdict(e) for e in found],
        }
        if as_json and name == "lower-attention":
            from kvpass import api

            with _hushed():
                choices = api.explain_lowering(source)
            out.document["choices"] = [asdict(c) for c in choices if layer is None or c.layer == layer]
        if not as_json:
            typer.echo(explanation.table(found))


@app.command()
@_takes_flags
def plan(
    model: ModelArgument,
    flags: Flags,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences in the cache.")] = 1,
    length: Annotated[int | None, typer.Option("--length", min=1, help="Tokens per sequence.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Count numbers in this dtype, not in the checkpoint's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The dry run: what the cache would be.

    A recipe that does not apply is refused with the reason. No weight is read.
    """
    with _session(as_json) as out:
        chosen = flags.build()
        source = _source(model, None, None)
        found, hidden = _summary(source), _hidden_size(source)
        before = after = _counted(found.plan, _dtype(dtype))
        for step in chosen.passes:
            after = step.plan(after)
            if found.passes.get(step.key(), "ok") != "ok":
                raise PlanError(f"{step.describe()} does not apply: {found.passes[step.key()]}", where=model)
        steps = chosen.passes if isinstance(source, str) else (*source.recipe.passes, *chosen.passes)
        tokens = length or _usual_length(after, steps, found.max_positions)
        per_token = (before.bytes_per_token(), after.bytes_per_token())
        whole = (before.bytes(batch, tokens), after.bytes(batch, tokens))
        unread = _unread_projections(before, after, hidden)
        repeated = _repeated_layers(after, steps)
        prompt = _prompt_figures(after, _cost(found, after, hidden), tokens)
        out.document = {
            "model": found.name,
            "family": found.family,
            "recipe": [{"name": p.key(), **p.options()} for p in chosen.passes],
            "layers": _rows(after),
            "bytes_per_token": {"before": per_token[0], "after": per_token[1]},
            "batch": batch,
            "length": tokens,
            "bytes": {"before": whole[0], "after": whole[1]},
            "factor": {"bytes_per_token": per_token[0] / per_token[1], "bytes": whole[0] / whole[1]},
            "stored": _stored(after),
            "parameters": found.parameters,
            "unread_projections": {"layers": unread[0], "parameters": unread[1]},
            "prefill": repeated and repeated.to_dict(),
            "prompt": prompt and prompt.to_dict(),
        }
        if as_json:
            return
        typer.echo(f"{found.name}: " + (", then ".join(p.describe() for p in chosen.passes) or "as it is"))
        _print_plan(after)
        kept, of_prompt = (" that all layers keep", " of prompt") if after.selective else ("", "")
        typer.echo(_change("cache", *per_token) + f" bytes per token{kept}" + _factor(*per_token))
        typer.echo(
            f"       {_size(whole[0])} -> {_size(whole[1])} for {batch:,} x {tokens:,} tokens{of_prompt} "
            f"({_stored(after)})" + _factor(*whole)
        )
        if unread[1]:
            typer.echo(
                f"keys and values of {unread[0]} of {len(after)} layers are not computed: their W_K and W_V hold "
                f"{unread[1]:,} parameters ({unread[1] / found.parameters:.1%} of the model)"
            )
        if repeated is not None:
            typer.echo(repeated.line())
        if prompt is not None:
            _print_prompt(prompt)


def _usual_length(plan: CachePlan, steps: Sequence[Pass], max_positions: int | None) -> int:
    """Tokens of the sequence that figures are given for: those that a schedule was solved for, or all that fit."""
    if plan.selective:
        from kvpass.passes.prune_pyramid import PrunePyramid

        for step in reversed(steps):
            if isinstance(step, PrunePyramid) and step.schedule == "solved":
                return step.length
    return max_positions or 4096


def _cost(found: ModelSummary, after: CachePlan, hidden: int | None) -> PromptCost | None:
    """What a prompt costs once the projections of keys and values that a plan leaves out are gone; None where it is not
    known what they cost."""
    per_token = []
    for old, new, layer, cost in zip(found.plan, after, found.layers, found.cost.per_token, strict=True):
        gone = old.kv_heads * old.owner - new.kv_heads * new.owner
        if gone and (hidden is None or layer.layout == "unknown"):
            return None
        per_token.append(cost - 2 * gone * (old.key_dim + old.value_dim) * (hidden or 0))
    return replace(found.cost, per_token=tuple(per_token))


@dataclass(frozen=True)
class PromptFigures:
    """What becomes of a prompt under a plan that drops some of its tokens.

    Attributes:
        length: its tokens.
        computed: per layer, tokens that it computes.
        stored: per layer, tokens that its cache holds then; 0 where it reads another layer's.
        layer_bytes: per layer, bytes of that.
        whole: bytes of all layers if no token were dropped.
        fraction: what part of these it takes.
        flops: operations of prefill if no token were dropped, and with the plan; None where they are not known.
    """

    length: int
    computed: list[int]
    stored: list[int]
    layer_bytes: list[int]
    whole: int
    fraction: float
    flops: tuple[int, int] | None

    def lines(self) -> list[str]:
        """The sentences below the table."""
        found = [
            f"a prompt of {self.length:,} tokens takes {_size(sum(self.layer_bytes))} of cache: {self.fraction:.1%} of "
            f"the {_size(self.whole)} that it takes where no token is dropped"
        ]
        if self.flops is not None:
            before, after = self.flops
            unit, name = next(((u, n) for u, n in ((1e12, "T"), (1e9, "G")) if before >= u), (1e6, "M"))
            why = ", ranking tokens included" if after > before else ""
            found.append(
                f"prefill: {before / unit:,.1f} -> {after / unit:,.1f} {name}FLOPs per prompt of {self.length:,} "
                f"tokens ({after / before:.2f}x{why})"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "length": self.length,
            "computed": self.computed,
            "stored": self.stored,
            "bytes": sum(self.layer_bytes),
            "fraction": self.fraction,
            "flops": self.flops and dict(zip(("before", "after"), self.flops, strict=True)),
        }


def _prompt_figures(plan: CachePlan, cost: PromptCost | None, length: int) -> PromptFigures | None:
    """The figures of a prompt; None where a plan keeps all tokens."""
    if not plan.selective:
        return None
    whole = plan.unselected()
    kept = plan.kept(length)
    return PromptFigures(
        length=length,
        computed=plan.reached(length),
        stored=[kept.get(layer.layer, 0) for layer in plan],
        layer_bytes=[plan.held_bytes({o: kept[o] for o in kept if o == layer.layer}, length) for layer in plan],
        whole=whole.bytes(1, length),
        fraction=plan.fraction(length),
        flops=None if cost is None else (cost.total(whole, length), cost.total(plan, length)),
    )


def _unread_projections(before: CachePlan, after: CachePlan, hidden: int | None) -> tuple[int, int]:
    """Layers that lose their own keys and values from one plan to the next, and the parameters of their W_K and W_V
    [kv_heads * (key_dim + value_dim), hidden], biases left out; none where the model's width is not known."""
    layers = [new for old, new in zip(before, after, strict=True) if old.owner and not new.owner]
    return len(layers), sum(c.kv_heads * (c.key_dim + c.value_dim) for c in layers) * (hidden or 0)


USUAL_PASSES = 9  # over a prompt, in the models of the LCKV paper (Wu and Tu 2024, arXiv 2405.10637): 7 and 2


@dataclass(frozen=True)
class RepeatedLayers:
    """The layers that are run several times over a prompt, since some of them read a layer above them.

    Attributes:
        first, last: from the first such reader to the highest layer that one reads.
        layers: of the model.
        limit: at most so many passes; 0 for as many as it takes.
        fallback: whether a prompt that needs more is then read token by token.
    """

    first: int
    last: int
    layers: int
    limit: int = 0
    fallback: bool = True

    @property
    def passes(self) -> int:
        """The passes that a figure is given for."""
        return self.limit or USUAL_PASSES

    def cost(self, passes: int) -> float:
        """What so many passes cost, in plain prefills: at most so much, for of the last layer only keys and values are
        computed again."""
        return 1 + (passes - 1) * (self.last - self.first + 1) / self.layers

    def line(self) -> str:
        """The sentence of `kvpass plan`."""
        until = "until keys and values stand still"
        if self.limit:
            until += f", at most {self.limit} times" + (" and then token by token" if self.fallback else "")
        share = f"{self.last - self.first + 1}/{self.layers}"
        count = f"{self.passes} pass" + "es" * (self.passes > 1)
        return (
            f"prefill repeats layers {self.first}..{self.last} of {self.layers} {until}: n passes cost "
            f"1 + (n-1)*{share} times a plain prefill ({count}: {self.cost(self.passes):.1f}x)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "passes": self.passes, "cost": self.cost(self.passes)}


def _repeated_layers(plan: CachePlan, steps: Sequence[Pass] = ()) -> RepeatedLayers | None:
    """What a plan repeats of a prompt, and how often where a pass of its recipe says so; None for nothing."""
    edges = [(c.layer, c.kv_source) for c in plan if c.upward and c.kv_source is not None]
    if not edges:
        return None
    found = RepeatedLayers(min(reader for reader, _ in edges), max(owner for _, owner in edges), len(plan))

    from kvpass.passes.share_layers import ShareLayers

    for step in steps:
        if isinstance(step, ShareLayers):
            found = replace(found, limit=step.passes, fallback=step.fallback)
    return found


# ---------------------------------------------------------------------- transform


@app.command()
@_takes_flags
def transform(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The folder to write.")],
    flags: Flags,
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
        chosen = flags.build()
        if flags.recipe is None and not chosen.passes:
            raise RequestError("nothing is to be done", fix="ask for a pass, such as --kv-heads N, or give --recipe")
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
        prompt = None
        if slim.plan.selective:
            from kvpass.ir.cost import prompt_cost

            tokens = _usual_length(slim.plan, slim.recipe.passes, slim.program.facts.max_positions)
            prompt = _prompt_figures(slim.plan, prompt_cost(slim.program), tokens)
        out.document = {
            "model": model,
            "recipe": [{"name": p.key(), **p.options()} for p in chosen.passes],
            "report": report.to_dict(),
            "layers": _rows(slim.plan),
            "bytes_per_token": {
                "before": report.passes[0].bytes_per_token_before if report.passes else slim.plan.bytes_per_token(),
                "after": slim.plan.bytes_per_token(),
            },
            "prompt": prompt and prompt.to_dict(),
            "output": {"path": str(output), "kind": save.value, "bytes": written},
            "seconds": time.perf_counter() - began,
        }
        if as_json:
            return
        _print_report(report)
        if prompt is not None:
            _print_prompt(prompt)
        kind = "Hugging Face checkpoint" if save is Save.hf else "kvpass program"
        typer.echo(f"saved {output} ({kind}, {_size(written)}, {time.perf_counter() - began:.1f} s)")


@app.command()
@_takes_flags
def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to make.")],
    flags: Flags,
    target: Annotated[
        OnnxTarget,
        typer.Option(
            "--target",
            help="ort: operators of ONNX Runtime. onnx: those of the standard alone (opset 23), caches grow. "
            "onnx-static: likewise (opset 24), caches are written in place.",
        ),
    ] = OnnxTarget.ort,
    dtype: Annotated[OnnxDtype, typer.Option("--dtype", help="Of weights, caches and arithmetic.")] = OnnxDtype.fp32,
    weights: Annotated[
        OnnxWeights | None, typer.Option("--weights", help="int4: matrices of 4 bits, 32 to a scale.")
    ] = None,
    positions: Annotated[
        int | None, typer.Option("--positions", min=1, help="Tokens per row at most.  [default: the model's, 4096]")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE", help="A text file; needed by a refit.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="For everything random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder at OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model, rewritten or as it is, as an ONNX package, checked against torch.

    onnxruntime and onnxruntime-genai serve it unmodified.
    """
    with _session(as_json) as out:
        if flags.kv_bits is not None and flags.kv_format is None:  # what the operators of the target read
            flags = replace(flags, kv_format=Format.static)
        chosen = flags.build()
        _check_output(output, model, overwrite)
        _check_calibration(chosen, calibration)
        source = _source(model, "cpu", None)

        import kvpass

        options: dict[str, Any] = {"calibration": calibration, "device": "cpu", "seed": seed}
        slim = kvpass.transform(source, chosen, **options)
        slim.release()  # what checks ran with; the export reads one weight after the other
        with _hushed():
            made = slim.export_onnx(
                output,
                target=target.value,
                dtype=dtype.value,
                weights="int4" if weights is OnnxWeights.int4 else None,
                positions=positions,
                overwrite=overwrite,
            )
        out.document = {"model": model, **asdict(made)}
        if as_json:
            return
        for check in made.checks:
            bound = "not checked" if check["allowed"] is None else f"{check['allowed']:.0e} allowed"
            typer.echo(f"{check['name']}: off by {check['measured']:.1e} {check['unit']} ({bound})")
        count = sum(made.nodes.values())
        kind = dtype.value if weights is None else f"{dtype.value}, weights {weights.value}"
        typer.echo(f"saved {output} ({target.value}, {kind}, {count} nodes, {_size(made.bytes)})")


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
                fix="give --calibration FILE (some pages like what the model is used for), or leave out the fit",
            )


EXPRESSIBLE = ("group-heads", "page-kv", "split-projections")  # a Hugging Face model still computes the same


def _check_expressible(source: str | Transformed, recipe: Recipe) -> None:
    """Refuse what no Hugging Face config can say, before any weight is read."""
    from kvpass.capture import capture
    from kvpass.export.checkpoint import target_config
    from kvpass.ir.check import plan_of
    from kvpass.manager import make_plan

    with _hushed():
        program = capture(source, weights=False) if isinstance(source, str) else source.program
    before, after = plan_of(program), make_plan(program, recipe.passes)
    for step in (*(() if isinstance(source, str) else source.recipe.passes), *recipe.passes):
        if step.key() not in EXPRESSIBLE:
            raise UnsupportedError(
                f"a plain checkpoint cannot say what {step.describe()} does",
                where=f"{program.facts.family} config",
                fix="use --save kvpass, which keeps any plan",
            )
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
    backend: BackendOption = Backend.auto,
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
        sampling: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
        if temperature != 0 and (temperature, top_p, top_k) != (None, None, None):
            sampling = {"temperature": temperature or 1.0, "top_p": top_p or 1.0, "top_k": top_k or 0}
        streamer = None
        if not as_json and sys.stdout.isatty():
            from transformers import TextStreamer

            streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        if _is_onnx(model):
            made = _generate_onnx(model, ids, max_new_tokens, sampling, seed, streamer)
        else:
            decoder = _decoder(model, device, dtype, backend)
            made = _generate(decoder, ids, max_new_tokens, sampling, seed, streamer)
        tokens, seconds, held = made
        new = len(tokens) - int(ids.shape[1])
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        out.document = {
            "model": model,
            "prompt": text,
            "text": whole,
            "continuation": tokenizer.decode(tokens[ids.shape[1] :], skip_special_tokens=True),
            "tokens": tokens,
            "prompt_tokens": int(ids.shape[1]),
            "new_tokens": new,
            "seconds": seconds,
            "tokens_per_second": new / seconds,
            "cache_bytes": held,
            "seed": seed,
        }
        if not as_json and streamer is None:
            typer.echo(whole)


Generated = tuple[list[int], float, int | None]  # all tokens, seconds, bytes of the cache


def _generate(
    decoder: Transformed, ids: Tensor, count: int, sampling: dict[str, Any], seed: int, streamer: Any
) -> Generated:
    """Let a program continue token ids [1, S]."""
    import torch

    options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False}
    if sampling["temperature"]:
        options |= {"do_sample": True, **sampling}
    if streamer is not None:
        options["streamer"] = streamer
    torch.manual_seed(seed)
    began = time.perf_counter()
    tokens = decoder.generate(ids, **options)[0].tolist()
    seconds = time.perf_counter() - began
    length = int(ids.shape[1])
    return tokens, seconds, _cache_bytes(decoder.plan, length, len(tokens) - length)


def _generate_onnx(
    model: str, ids: Tensor, count: int, sampling: dict[str, Any], seed: int, streamer: Any
) -> Generated:
    """Let an exported model continue token ids [1, S]."""
    import torch

    from kvpass.export.onnx.runner import OnnxModel

    runner = OnnxModel.open(model)
    tokens = ids[0].tolist()
    if streamer is not None:
        streamer.put(ids)
    began = time.perf_counter()
    for (token,) in runner.stream(ids.numpy(), max_new_tokens=count, seed=seed, **sampling):
        assert token is not None  # one row: when it ends, so does the stream
        tokens.append(token)
        if streamer is not None:
            streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    return tokens, time.perf_counter() - began, runner.cache_bytes


def _cache_bytes(plan: CachePlan, prompt: int, new: int) -> int | None:
    """Bytes of the cache behind a prompt and what was generated; None where it depends on the data what stays."""
    if not plan.selective:
        return plan.bytes(1, prompt + new)
    held = {}
    for owner, count in plan.kept(prompt).items():
        keeps = plan.rule(owner)
        if keeps.then == "thin":
            return None
        held[owner] = min(count + new, keeps.capacity(prompt)) if keeps.bounded else count + new
    return plan.held_bytes(held, prompt)


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
    scan_sharing: Annotated[
        bool, typer.Option("--scan-sharing", help="Of one model: let one layer read another, pair by pair.")
    ] = False,
    max_distance: Annotated[
        int | None, typer.Option("--max-distance", min=1, metavar="N", help="Pairs at most so far apart.  [default: 2]")
    ] = None,
    upward: UpwardOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quality at measured cache bytes, side by side.

    Likelihood of held-out text whose beginning is in the cache, divergence from the first model, and retrieval; or,
    with --scan-sharing, what it costs that one layer reads another's keys and values, for each pair of layers.
    """
    with _session(as_json) as out:
        if scan_sharing:
            if len(models) > 1 or retrieval:
                other = "--retrieval" if retrieval else "a second model"
                raise RequestError(f"--scan-sharing and {other} exclude each other", fix="scan one model by itself")
            sizes = {"context": context, "continuation": continuation, "windows": windows}
            limits = {"upward": upward} | ({"max_distance": max_distance} if max_distance else {})
            out.document, edges = _scan_sharing(models[0], text, sizes | limits, device, dtype, as_json)
            if not as_json:
                _print_scan(out.document, edges)
            return
        if upward or max_distance is not None:
            option = "--upward" if upward else "--max-distance"
            raise RequestError(f"{option} belongs to --scan-sharing, which is not given", fix="give --scan-sharing too")

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


def _scan_sharing(
    model: str, text: Path, options: Mapping[str, Any], device: str | None, dtype: Dtype | None, as_json: bool
) -> tuple[dict[str, Any], Sequence[EdgeLoss]]:
    """The document and the edges of `kvpass eval --scan-sharing`."""
    from kvpass.calibration import read_text, token_stream

    _check_source(model)
    read_text(text)

    from kvpass.quality.sharing import scan_sharing

    began, tried = time.perf_counter(), 0
    with _working(as_json, "loading") as tell:

        def progress(done: int, total: int) -> None:
            nonlocal tried
            tried = total
            tell(f"pair {done + 1} of {total}")

        tokens = token_stream(text, model)
        decoder = _decoder(model, device, dtype)
        edges = scan_sharing(decoder, tokens, **options, progress=progress)
    document = {
        "text": str(text),
        "model": model,
        "dtype": str(decoder.program.facts.dtype).removeprefix("torch."),
        **options,
        "pairs": tried,
        "nll_original": edges[0].nll_original,
        "edges": [edge.to_dict() for edge in edges],
        "seconds": time.perf_counter() - began,
    }
    return document, edges


def _print_scan(document: Mapping[str, Any], edges: Sequence[EdgeLoss]) -> None:
    from rich.table import Table

    table = Table(box=_box())
    for heading in ("layer", "reads", "NLL", "Δ NLL", "KL", "top-1"):
        table.add_column(heading, justify="right")
    for edge in edges:
        table.add_row(
            str(edge.reader),
            str(edge.owner),
            f"{edge.nll:.4f}",
            f"{edge.loss:+.4f} ± {edge.loss_se:.4f}",
            f"{edge.kl:.4f}",
            f"{edge.top1:.1%}",
        )
    _console().print(table)
    typer.echo(f"{document['model']} by itself: NLL {document['nll_original']:.4f}; {document['seconds']:.0f} s")
    typer.echo("each pair by itself, without healing: the losses of several pairs do not simply add up")
    if document["pairs"] > len(edges):
        left = document["pairs"] - len(edges)
        typer.echo(f"{left} of {document['pairs']} pairs cannot share: other shapes, positions or windows")


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
            checks = verify_model(decoder, seed=seed, checkpoint=None if holds_program(model) else model)
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


def _is_onnx(model: str) -> bool:
    return (Path(model) / "kvpass-onnx.json").is_file()


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


def _source(model: str, device: str | None, dtype: Dtype | None, backend: Backend = Backend.auto) -> str | Transformed:
    """What `kvpass.transform` takes: the path of a Hugging Face model, or a loaded kvpass folder."""
    _check_source(model)
    if _is_onnx(model):
        raise RequestError(
            "an exported folder runs, and cannot be read back",
            where=model,
            fix="use `kvpass generate`, or give the model that it was made of",
        )
    if not holds_program(model):
        return model

    import kvpass

    loaded = kvpass.load(model, device=device, backend=backend.value)
    kind = loaded.program.facts.dtype
    if dtype is not None and _dtype(dtype) != kind:
        raise RequestError(
            f"the saved program computes in {str(kind).removeprefix('torch.')}, not in {dtype.value}",
            where=model,
            fix="leave --dtype out, or transform the original model again with it",
        )
    return loaded


def _decoder(model: str, device: str | None, dtype: Dtype | None, backend: Backend = Backend.auto) -> Transformed:
    """A model that runs: a kvpass folder, or a Hugging Face model as it is."""
    source = _source(model, device, dtype, backend)
    if not isinstance(source, str):
        return source

    import kvpass

    with _hushed():
        options: dict[str, Any] = {"device": device, "dtype": _dtype(dtype), "backend": backend.value}
        return kvpass.transform(source, verify="off", progress=False, **options)


def _summary(source: str | Transformed) -> ModelSummary:
    from kvpass import api

    with _hushed():
        return api.inspect(source) if isinstance(source, str) else api.summarize(source.program)


def _hidden_size(source: str | Transformed) -> int | None:
    """The width of what layers read and write, where the config says it."""
    if not isinstance(source, str):
        return source.program.facts.hidden_size

    from kvpass.capture.huggingface import read_config

    config = read_config(source)
    width: int | None = getattr(config.get_text_config(), "hidden_size", None)
    return width


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
def _working(as_json: bool, what: str) -> Iterator[Callable[[str], None]]:
    """A sign of life on a terminal; what is yielded changes its words."""
    if as_json or not sys.stderr.isatty():
        yield lambda words: None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield status.update


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


def _counted(plan: CachePlan, dtype: torch.dtype | None) -> CachePlan:
    """A plan whose numbers are of another dtype."""
    from kvpass.ir.plan import CachePlan

    return plan if dtype is None else CachePlan(tuple(replace(layer, dtype=dtype) for layer in plan))


def _rows(plan: CachePlan) -> list[dict[str, Any]]:
    """One row per run of equal layers."""
    return [{**row, "cache_positions": plan[int(str(row["first"]))].cache_positions} for row in plan.table()]


def _print_plan(plan: CachePlan) -> None:
    """The table of a plan; a column in which nothing is told is left out."""
    rows: list[dict[str, str]] = []
    for row in _rows(plan):
        cells = {
            "query heads": str(row["heads"]),
            "KV heads": str(row["kv_heads"]),
            "K x V": f"{row['key_dim']} x {row['value_dim']}",
            "keys and values": "own" if row["kv_source"] is None else f"reads {row['kv_source']}",
            "window": str(row["window"] or "all") + (f" + {row['sinks']} sinks" if row["sinks"] else ""),
            "positions": "cache" if row["cache_positions"] else "text",
            "stored": row["stored"],
            "page": str(row["page"] or ""),
            "bytes per token": f"{row['bytes_per_token']:,}",
        }
        rows += [cells] * (row["last"] - row["first"] + 1)
    _print_layers(rows, quiet={"keys and values": "own", "positions": "text", "page": ""})


def _print_prompt(prompt: PromptFigures) -> None:
    """What each layer computes and stores of a prompt, and what that comes to."""
    figures = zip(prompt.computed, prompt.stored, prompt.layer_bytes, strict=True)
    headings = ("tokens computed", "tokens stored", "cache bytes per layer")
    _print_layers([dict(zip(headings, (f"{n:,}" for n in row), strict=True)) for row in figures])
    for line in prompt.lines():
        typer.echo(line)


def _print_layers(rows: Sequence[Mapping[str, str]], quiet: Mapping[str, str] | None = None) -> None:
    """A table of layers, a line per run of equal ones; a column that says what is `quiet` alone is left out."""
    from rich.table import Table

    shown = [h for h in rows[0] if {row[h] for row in rows} != {(quiet or {}).get(h)}]
    table = Table(box=_box())
    table.add_column("layers")
    for heading in shown:
        table.add_column(heading, justify="right")
    runs: list[list[int]] = []
    for layer, row in enumerate(rows):
        if runs and rows[runs[-1][0]] == row:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    for first, last in runs:
        table.add_row(_range(first, last), *(rows[first][h] for h in shown))
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


def _stored(plan: CachePlan) -> str:
    """What the stores hold: dtypes and formats."""
    held = [plan[owner] for owner in plan.owners()]
    return ", ".join(sorted({str(c.format) or str(c.dtype).removeprefix("torch.") for c in held}))


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _change(what: str, before: int, after: int) -> str:
    if before == after:
        return f"{what}: {after:,}"
    return f"{what}: {before:,} -> {after:,} ({after / before:.1%})"


def _factor(before: int, after: int) -> str:
    return "" if before == after else f", {before / after:.1f}x smaller"


def _size(count: int) -> str:
    """Bytes for people, in decimal units."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


import kvpass.regression.cli  # noqa: E402  (its commands are made of what stands above)
import kvpass.report.cli  # noqa: E402, F401
