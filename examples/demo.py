"""The main job, from end to end, on the model in this repository: `make demo`, or `python -m examples.demo`.

bookworm (8 query heads, 8 KV heads) becomes a grouped-query model of 4 and of 2 KV heads with every method and refit of
`GroupHeads`. One table shows what each costs on held-out text; the best is saved as a plain Hugging Face checkpoint,
loaded with transformers alone, and writes a few lines.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import kvpass
from kvpass.calibration import token_stream
from kvpass.passes import GroupHeads
from kvpass.quality import Score, continuation
from kvpass.runtime.transformed import Transformed

MODEL = Path(__file__).parent / "bookworm"
METHODS = ("mean", "first", "procrustes", "pca")
REFITS = ("none", "o_proj", "distill")
CALIBRATION_TOKENS = 32 * 256
STEPS = 40  # of distillation per layer; the default of GroupHeads is 150
PROMPT = "It is a truth universally acknowledged, that"


def main() -> None:
    """Run the demo and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo/bookworm-gqa"), help="where the best one goes")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="distillation steps per layer")
    options = parser.parse_args()
    console = Console(width=None if Console().is_terminal else 110)
    began = time.perf_counter()
    original = kvpass.transform(MODEL)
    layer = original.plan.layers[0]
    console.print(
        f"[bold]{MODEL.name}[/]: {len(original.plan)} layers, {layer.heads} query heads, {layer.kv_heads} KV heads of "
        f"{layer.key_dim}; {original.plan.bytes_per_token():,} bytes of KV cache per token"
    )
    stream = token_stream(MODEL / "calibration.txt", str(MODEL))[:CALIBRATION_TOKENS]
    models, seconds = convert(original, options.kv_heads, stream, options.steps, console)
    held_out = token_stream(MODEL / "heldout.txt", str(MODEL))
    scores = continuation(models, held_out, windows=32, batch=16)
    console.print(quality_table(scores, seconds, options.steps))
    best = min((n for n in scores if n != "original"), key=lambda n: scores[n].nll)
    console.print(layer_table(best, models[best]))
    folder = models[best].save_pretrained(options.out, overwrite=True)
    console.print(f"\nthe best, [bold]{best}[/], is a plain Hugging Face checkpoint now: {folder}")
    console.print(generate(folder, models[best], console))
    console.print(f"\n{time.perf_counter() - began:.0f} s, {torch.get_num_threads()} threads")


def convert(
    original: Transformed, kv_heads: list[int], stream: torch.Tensor, steps: int, console: Console
) -> tuple[dict[str, Transformed], dict[str, float]]:
    """Every method and refit; the models and how long each took."""
    models, seconds = {"original": original}, {}
    runs = list(itertools.product(kv_heads, METHODS, REFITS))
    with Progress(console=Console(stderr=True), transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("converting", total=len(runs))
        for heads, method, refit in runs:
            name = f"{heads} {method} + {refit}" if refit != "none" else f"{heads} {method}"
            progress.update(task, description=name)
            began = time.perf_counter()
            step = GroupHeads(kv_heads=heads, method=method, refit=refit, steps=steps)  # type: ignore[arg-type]
            models[name] = kvpass.transform(original, [step], calibration=[stream], progress=False)
            seconds[name] = time.perf_counter() - began
            progress.advance(task)
    return models, seconds


def quality_table(scores: dict[str, Score], seconds: dict[str, float], steps: int) -> Table:
    """What each conversion costs on text that neither training nor calibration saw."""
    first = scores["original"]
    table = Table(
        title=f"held-out text: {first.windows} windows of {first.context} tokens read, {first.continuation} scored; "
        f"{CALIBRATION_TOKENS:,} tokens of calibration, {steps} steps of distillation per layer"
    )
    table.add_column("KV heads, method")
    for heading in ("KV B/token", "NLL", "NLL vs original", "KL", "top-1", "seconds"):
        table.add_column(heading, justify="right")
    for name, score in scores.items():
        if name != "original" and name.endswith(METHODS[0]):
            table.add_section()
        table.add_row(
            name,
            f"{score.used_bytes_per_token:,.0f}",
            f"{score.nll:.4f}",
            "" if name == "original" else f"{100 * (score.nll / first.nll - 1):+.2f} %",
            f"{score.kl:.4f}",
            f"{100 * score.top1:.1f} %",
            f"{seconds[name]:.1f}" if name in seconds else "",
        )
    return table


def layer_table(name: str, model: Transformed) -> Table:
    """What the report of a conversion says per layer."""
    table = Table(title=f"{name}, layer by layer")
    for heading in ("layer", "heads that share", "keys lost", "values lost", "KL if only this layer", "block error"):
        table.add_column(heading, justify="left" if heading == "heads that share" else "right")
    for row in model.report.passes[-1].details:
        table.add_row(
            str(row["layer"]),
            " ".join("+".join(map(str, group)) for group in row["groups"]),
            f"{100 * row['key_residual']:.1f} %",
            f"{100 * row['value_residual']:.1f} %",
            f"{row['swap_kl']:.4f}",
            f"{row['block_error_before']:.4f} -> {row['block_error_after']:.4f}" if "block_error_after" in row else "",
        )
    return table


def generate(folder: Path, model: Transformed, console: Console) -> str:
    """Text from the saved folder, by transformers alone, and whether kvpass agrees token by token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    greedy = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        theirs = plain.generate(ids, **greedy)
        ours = model.generate(ids, **greedy)
        torch.manual_seed(0)
        sampled = plain.generate(ids, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=0)
    same = int((theirs[0, : ours.shape[1]] == ours[0, : theirs.shape[1]]).sum()) - ids.shape[1]
    console.print(
        f"AutoModelForCausalLM reads num_key_value_heads = {plain.config.num_key_value_heads}. Greedy, "
        f"{same} of {theirs.shape[1] - ids.shape[1]} new tokens are those of the program in memory. Sampled:\n"
    )
    return str(tokenizer.decode(sampled[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
