"""What kvpress's presses cost a model: likelihood of the tokens that follow a compressed context, and cache bytes.

    python benchmarks/kvpress_runner.py TASKS.json OUT.json [--threads 2] [--check]

Run it with the Python of an environment of its own (`pip install kvpress`: it pins transformers below 5.3). It imports
torch, transformers, kvpress and the standard library only, and computes on the CPU in float32.

TASKS.json: {"runs": [RUN, ...]}, each RUN with

    name, task          free words, repeated in the results
    model               a folder with a causal language model
    tokens              rows of token ids, all of one length L
    context             so many first tokens are read, and compressed, in one prefill
    press               none, random, knorm, streaming_llm, snapkv, pyramidkv, tova, observed_attention,
                        expected_attention or adakv_snapkv
    compression_ratio   the fraction of the entries to drop (0 where the press is none)
    options             further arguments of the press, such as {"window_size": 16}; may be left out

OUT.json: {"machine": {...}, "runs": [...]}: per run its name, task, press, compression_ratio (and options) and

    nll        per row the negative log likelihood of every token from `context` on, teacher-forced [N, L - context]
    choice     the most likely token at the same positions
    bytes      of the tensors that hold keys and values right after compression: mean over rows
    kept       the fraction of the entries (layer, KV head, position) that later tokens can attend to
    fake       the press only masks entries: its `bytes` are those of the whole cache
    stepwise   the continuation was read one token at a time (see `follow`)
    seconds    for all rows
    check      with --check, unless stepwise: the largest difference of a logit if the first row is read stepwise

or, where the library refuses, "error". As in kvpress's pipeline, rows are read one by one, and positions after the
context continue at its original length. The prefill, which no press changes, predicts the first token after it: that
one is the same in all runs. Random draws are seeded by the row: equal in all runs, different in all layers and heads.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PRESSES = {
    "random": "RandomPress",
    "knorm": "KnormPress",
    "streaming_llm": "StreamingLLMPress",
    "snapkv": "SnapKVPress",
    "pyramidkv": "PyramidKVPress",
    "tova": "TOVAPress",
    "observed_attention": "ObservedAttentionPress",
    "expected_attention": "ExpectedAttentionPress",
    "adakv_snapkv": "SnapKVPress",
}
NEED_WEIGHTS = {"observed_attention"}  # attention weights, which only eager attention returns
FAKE = {"adakv_snapkv"}  # nothing is dropped: masked entries get keys that no query attends to


def main() -> int:
    """All runs of a file, into another."""
    parser = argparse.ArgumentParser(description="Likelihood after a context that kvpress compressed.")
    parser.add_argument("tasks", type=Path, metavar="TASKS.json")
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with")
    parser.add_argument("--check", action="store_true", help="compare with decoding one token at a time")
    arguments = parser.parse_args()
    import torch
    from transformers import logging

    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    runs = json.loads(arguments.tasks.read_text(encoding="utf-8"))["runs"]
    models: dict[str, Any] = {}
    results = []
    for index, run in enumerate(runs):
        result = {key: run.get(key) for key in ("name", "task", "press", "compression_ratio")}
        if run.get("options"):
            result["options"] = run["options"]
        try:
            result |= measure(models, run, arguments.check)
            line = (
                f"NLL {mean(result['nll']):.4f}, {result['bytes']:,.0f} bytes, {100 * result['kept']:.1f} % kept, "
                f"{result['seconds']:.1f} s"
            )
            if "check" in result:
                line += f", check {result['check']:.1e}"
        except Exception as error:  # whatever the library raises belongs to this run alone
            traceback.print_exc(limit=-1)
            line = result["error"] = f"{type(error).__name__}: {error}"
        words = [str(result[key]) for key in ("name", "task", "press", "compression_ratio")]
        print(f"[{index + 1}/{len(runs)}]", *words, line, file=sys.stderr, flush=True)
        results.append(result)
    write(arguments.out, {"machine": describe(arguments.threads), "runs": results})
    return 0


def describe(threads: int) -> dict[str, Any]:
    """The libraries that the figures come from."""
    from importlib.metadata import version

    found: dict[str, Any] = {name: version(name) for name in ("torch", "transformers", "kvpress")}
    return found | {"python": platform.python_version(), "threads": threads, "date": datetime.date.today().isoformat()}


def measure(models: dict[str, Any], run: dict[str, Any], check: bool) -> dict[str, Any]:
    """One run: likelihoods, choices and bytes."""
    import torch

    rows, context = torch.tensor(run["tokens"], dtype=torch.long), int(run["context"])
    if rows.ndim != 2 or len(rows) == 0 or not 0 < context < rows.shape[1]:
        raise ValueError(f"tokens of shape {list(rows.shape)} with a context of {context}")
    press = build(run["press"], float(run["compression_ratio"]), run.get("options") or {})
    model = load(models, run["model"], "eager" if run["press"] in NEED_WEIGHTS else "sdpa")
    fake = run["press"] in FAKE
    start = time.perf_counter()
    scores = [score(model, press, row[None], context, seed, fake) for seed, row in enumerate(rows)]
    found: dict[str, Any] = {
        "nll": [one.nll for one in scores],
        "choice": [one.choice for one in scores],
        "bytes": sum(one.held for one in scores) / len(scores),
        "kept": sum(one.kept for one in scores) / len(scores),
        "fake": fake,
        "stepwise": any(one.stepwise for one in scores),
        "seconds": time.perf_counter() - start,
    }
    if not all(math.isfinite(value) for row in found["nll"] for value in row):
        raise ValueError("a likelihood is not finite")
    if check and not found["stepwise"]:
        again = score(model, press, rows[:1], context, 0, fake, stepwise=True)
        found["check"] = (again.logits - scores[0].logits).abs().max().item()
    return found


def build(name: str, ratio: float, options: dict[str, Any]) -> Any:
    """A press with the library's defaults but for the options; None for none."""
    import kvpress  # type: ignore[import-not-found]

    if name == "none":
        if ratio or options:
            raise ValueError("the press none takes no compression_ratio but 0 and no options")
        return None
    if name not in PRESSES:
        raise ValueError(f"unknown press {name!r}: none, {', '.join(PRESSES)}")
    outer = {key: value for key, value in options.items() if name == "adakv_snapkv" and key == "alpha_safeguard"}
    inner = {key: value for key, value in options.items() if key not in outer}
    press = getattr(kvpress, PRESSES[name])(compression_ratio=ratio, **inner)
    return kvpress.AdaKVPress(press, **outer) if name == "adakv_snapkv" else press


def load(models: dict[str, Any], folder: str, attention: str) -> Any:
    """The model in a folder, read once, with the attention that a press needs."""
    import torch
    from transformers import AutoModelForCausalLM

    if folder not in models:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        )
        models[folder] = model.eval()
    models[folder].set_attn_implementation(attention)
    return models[folder]


@dataclass
class Score:
    """One row.

    Attributes:
        logits: [T, vocabulary] that predict the tokens after the context.
        nll: negative log likelihoods of those tokens.
        choice: the most likely ones.
        held: bytes of the cache after compression.
        kept: the fraction of its entries that can be attended to.
        stepwise: the continuation was read one token at a time.
    """

    logits: Tensor
    nll: list[float]
    choice: list[int]
    held: int
    kept: float
    stepwise: bool


def score(
    model: Any, press: Any, tokens: Tensor, context: int, seed: int, fake: bool, *, stepwise: bool = False
) -> Score:
    """Compress the context of one row [1, L], then read the rest."""
    import torch
    from transformers import DynamicCache

    torch.manual_seed(seed)
    cache = DynamicCache()
    with torch.no_grad():
        with contextlib.nullcontext() if press is None else press(model):
            first = model(input_ids=tokens[:, :context], past_key_values=cache, logits_to_keep=1).logits
        bytes_held, masked = held(cache), hidden(model) if fake else 0
        entries = [layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers]
        whole = sum(layer.keys.shape[1] for layer in cache.layers) * context
        stepwise = stepwise or masked > 0 or len({layer.keys.shape[2] for layer in cache.layers}) > 1
        logits = torch.cat([first, *follow(model, cache, tokens[:, context:-1], context, stepwise)], dim=1)[0]
    targets = tokens[0, context:]
    likelihood = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return Score(
        logits=logits,
        nll=(-likelihood).tolist(),
        choice=logits.argmax(-1).tolist(),
        held=bytes_held,
        kept=(sum(entries) - masked) / whole,
        stepwise=stepwise,
    )


def follow(model: Any, cache: Any, tokens: Tensor, start: int, stepwise: bool) -> list[Tensor]:
    """Logits of the tokens [1, T] after a compressed cache, at the positions they have in the whole text.

    One forward pass where every layer holds equally many entries: transformers makes one mask, for the length of the
    first layer, which lets new tokens see all entries and one another causally. Where layers differ (PyramidKV) that
    mask does not fit, and where entries are masked (AdaKV) one key must be found that all queries of a pass ignore:
    there one token at a time.
    """
    import torch

    step = 1 if stepwise else max(1, tokens.shape[1])
    positions = torch.arange(start, start + tokens.shape[1])[None]
    return [
        model(input_ids=part, past_key_values=cache, position_ids=where).logits
        for part, where in zip(tokens.split(step, dim=1), positions.split(step, dim=1), strict=True)
        if part.shape[1]
    ]


def held(cache: Any) -> int:
    """Bytes of the storages behind the keys and values of all layers; a view counts as all that it keeps alive."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def hidden(model: Any) -> int:
    """Entries that a press has marked as masked."""
    found = [getattr(module, "masked_key_indices", None) for module in model.modules()]
    return sum(len(indices[-1]) for indices in found if indices is not None)


def mean(rows: Sequence[Sequence[float]]) -> float:
    """Over all tokens of all rows."""
    return sum(sum(row) for row in rows) / sum(len(row) for row in rows)


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file that is whole whenever it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(document) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
