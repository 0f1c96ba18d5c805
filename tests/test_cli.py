"""The `kvpass` command: its results, its refusals, its exit status and what it leaves on stdout."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner, Result

import kvpass
from export_models import wide
from families import VOCAB, build
from kvpass import api, cli
from kvpass.ir.cost import prompt_cost
from kvpass.ir.plan import CachePlan
from kvpass.ir.sites import Refusal, SiteFinder
from kvpass.passes import (
    EvictKV,
    GroupHeads,
    PageKV,
    PrunePyramid,
    QuantizeKV,
    ShareLayers,
    SlideWindow,
    evict_kv,
    group_heads,
    head_merge,
)
from kvpass.recipe import PASSES

SELECTIVE = ("evict-kv", "prune-pyramid")  # which neither windows nor pages go with
PLAIN = "It was the best of times, it was the worst of times. " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with 8 KV heads and a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build("llama_mha").save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(VOCAB - 1)} | {"?!": VOCAB - 1}, "?!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(PLAIN)
    return str(path)


@pytest.fixture(scope="module")
def slim(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Llama with 2 KV heads, as a kvpass folder."""
    out = tmp_path_factory.mktemp("out") / "slim"
    done = run("transform", model, "--kv-heads", "2", "-o", str(out), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["bytes_per_token"] == {"before": 1024, "after": 256}
    assert [p["effect"] for p in found["report"]["passes"]] == ["layout", "lossy"]
    assert found["output"]["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    return str(out)


@pytest.fixture(scope="module")
def pyramid(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Llama that drops tokens behind its first layer, as a kvpass folder."""
    out = tmp_path_factory.mktemp("out") / "pyramid"
    done = run("transform", model, "--pyramid", "0.6", "--save", "kvpass", "-o", str(out))
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[-3].startswith("a prompt of 2,048 tokens takes 1.3 MB of cache: 60.0% of the 2.1 MB")
    assert lines[-2].startswith("prefill: ")
    assert "layers tokens computed tokens stored cache bytes per layer" in lines
    assert f"0 2,048 2,048 {2048 * (512 + 4):,}" in lines
    return str(out)


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def document(*words: str, status: int = 0) -> Any:
    done = run(*words, "--json")
    assert done.exit_code == status, done.output
    return json.loads(done.stdout)


def refusal(*words: str, status: int = 2) -> str:
    """The message of a refused request; stdout stays empty."""
    done = run(*words)
    assert (done.exit_code, done.stdout) == (status, ""), done.output
    assert done.stderr.startswith("kvpass: ")
    assert "Traceback" not in done.stderr
    return done.stderr


# ---------------------------------------------------------------------- results


def test_inspect_groups_equal_layers(model: str) -> None:
    done = run("inspect", model)
    assert done.exit_code == 0
    assert "0-1: 8 query heads, 8 KV heads x 8, causal, RoPE half 8 of 8" in done.stdout
    assert "1,024 bytes per token in float32" in done.stdout
    assert "group-heads: applies" in done.stdout
    found = document("inspect", model)
    assert (found["family"], len(found["layers"])) == ("llama", 2)
    assert found["passes"] == {"group-heads": "ok", "evict-kv": "ok", "prune-pyramid": "ok"}


@pytest.mark.parametrize(
    ("family", "reason"),
    [("mistral", "every layer keeps a window"), ("llama4_text", "the mask of layer 0 is kept as a table")],
)
def test_inspect_says_where_tokens_cannot_be_dropped(family: str, reason: str, tmp_path: Path) -> None:
    build(family, num_hidden_layers=2).save_pretrained(tmp_path)
    found = document("inspect", str(tmp_path))["passes"]
    assert found["evict-kv"].startswith(reason)
    assert found["prune-pyramid"].startswith(reason) or (family, found["prune-pyramid"]) == ("mistral", "ok")
    assert f"evict-kv: does not apply: {reason}" in run("inspect", str(tmp_path)).stdout


def test_inspect_asks_what_crosses_one_layer(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refusing(finder: SiteFinder, layer: int) -> None:
        asked.append(layer)
        raise Refusal("by design")

    monkeypatch.setattr(SiteFinder, "crossing", refusing)
    found = document("inspect", model)["passes"]
    assert (found["evict-kv"], found["prune-pyramid"], asked) == ("ok", "by design", [0])
    assert "PrunePyramid(keep=0.6) does not apply: by design" in refusal("plan", model, "--pyramid", "0.6")


def test_plan_counts_the_bytes_of_a_batch(model: str) -> None:
    found = document("plan", model, "--kv-heads", "4,2", "--batch", "3", "--length", "100")
    assert found["bytes_per_token"] == {"before": 1024, "after": 256 + 128}
    assert found["bytes"] == {"before": 3 * 100 * 1024, "after": 3 * 100 * 384}
    assert [row["kv_heads"] for row in found["layers"]] == [4, 2]
    assert "1,024 -> 384 (37.5%)" in run("plan", model, "--kv-heads", "4,2").stdout


def test_a_recipe_says_what_the_options_say(model: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[[pass]]\nname = "group-heads"\nkv_heads = 2\nmethod = "mean"\n')
    by_file = document("plan", model, "--recipe", str(path))
    assert by_file == document("plan", model, "--kv-heads", "2", "--method", "mean")


def test_passes_compose_in_one_order_whatever_the_flags_say(model: str) -> None:
    words = "--page 16 --kv-format fp8 --kv-bits 8 --sinks 2,0 --window 9,0 --share-init mean --share-layers 0_1 "
    found = document("plan", model, *(words + "--kv-heads 4 --cache-positions --upward").split())
    steps = (
        GroupHeads(kv_heads=4),
        ShareLayers("0_1", init="mean", upward=True),
        SlideWindow(window=(9, 0), sinks=(2, 0), positions="cache"),
        QuantizeKV(bits=8, kind="fp8"),
        PageKV(page=16),
    )
    assert found["recipe"] == json.loads(json.dumps([{"name": step.key(), **step.options()} for step in steps]))
    rows = [(r["window"], r["sinks"], r["cache_positions"], r["stored"], r["page"]) for r in found["layers"]]
    assert rows == [(9, 2, True, "fp8", 16), (0, 0, False, "fp8", 16)]
    for words, step in {
        "--kv-heads 2 --method mean": "GroupHeads(kv_heads=2, method='mean')",
        "--share-layers yoco": "ShareLayers(kv_source='yoco')",
        "--window 16": "SlideWindow(window=16)",
        "--kv-bits 4 --kv-format kivi": "QuantizeKV(bits=4, layout='kivi')",
        "--page 16": "PageKV()",
        "--evict h2o --evict-keep 0.5": "EvictKV(policy='h2o', keep=0.5)",
        "--evict tova --evict-budget 64 --evict-window 8": "EvictKV(policy='tova', budget=64, window=8)",
        "--pyramid 0.6 --pyramid-length 512": "PrunePyramid(keep=0.6, length=512)",
        "--pyramid 0.6 --pyramid-at 0": "PrunePyramid(keep=0.6, schedule='step', at=0)",
        "--pyramid 0.6 --pyramid-thin": "PrunePyramid(keep=0.6, thin=True)",
        "--pyramid 1.5MB": "PrunePyramid(bytes=1500000)",
        "--pyramid 1.5MiB": "PrunePyramid(bytes=1572864)",
        "--pyramid 1500kb": "PrunePyramid(bytes=1500000)",
        "--pyramid 1GB": "PrunePyramid(bytes=1000000000)",
    }.items():
        assert run("plan", model, *words.split()).stdout.startswith(f"tiny: {step}\n")


def test_tokens_are_dropped_last_so_that_bytes_count_all(model: str) -> None:
    words = "--pyramid 200kB --evict-keep 0.75 --evict snapkv --kv-bits 8 --share-layers 0_1 --kv-heads 4"
    found = document("plan", model, *words.split())
    order = ["group-heads", "share-layers", "quantize-kv", "evict-kv", "prune-pyramid"]
    assert [step["name"] for step in found["recipe"]] == order
    assert found["prompt"]["bytes"] == pytest.approx(200_000, rel=2e-3)


def unselective(plan: CachePlan) -> CachePlan:
    return CachePlan(tuple(replace(layer, keeps=None, passes=None) for layer in plan))


@pytest.mark.parametrize(
    ("words", "steps", "length"),
    [
        ("--pyramid 0.6", [PrunePyramid(0.6)], 2048),
        ("--pyramid 0.6 --length 300", [PrunePyramid(0.6)], 300),
        ("--pyramid 0.6 --pyramid-length 1024", [PrunePyramid(0.6, length=1024)], 1024),
        ("--pyramid 0.6 --pyramid-at 0", [PrunePyramid(0.6, schedule="step", at=0)], 128),
        ("--evict h2o --evict-keep 0.5", [EvictKV("h2o", 0.5)], 128),
        ("--kv-heads 4 --evict snapkv --evict-budget 50", [GroupHeads(4), EvictKV("snapkv", budget=50)], 128),
        (
            "--share-layers 0_0 --evict snapkv --evict-budget 50",
            [ShareLayers("0_0"), EvictKV("snapkv", budget=50)],
            128,
        ),
    ],
)
def test_plan_counts_what_is_computed_and_stored_of_a_prompt(
    words: str, steps: list[Any], length: int, model: str
) -> None:
    found = document("plan", model, *words.split(), "--batch", "2")
    plan = kvpass.plan(model, steps)
    slim = kvpass.transform(model, steps, verify="off", progress=False)
    cost = prompt_cost(slim.program)
    assert plan == slim.plan
    assert found["length"] == length
    assert found["prompt"] == {
        "length": length,
        "computed": plan.reached(length),
        "stored": [plan.kept(length).get(layer, 0) for layer in range(2)],
        "bytes": plan.bytes(1, length),
        "fraction": plan.fraction(length),
        "flops": {"before": cost.total(unselective(plan), length), "after": cost.total(plan, length)},
    }
    assert found["bytes"]["after"] == 2 * plan.bytes(1, length)
    assert found["bytes_per_token"]["after"] == plan.bytes_per_token()


def test_plan_shows_what_becomes_of_a_prompt(model: str) -> None:
    done = run("plan", model, "--pyramid", "0.6")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    plan = kvpass.plan(model, PrunePyramid(0.6))
    above, stored = plan.reached(2048)[1], plan.held_bytes({1: plan.kept(2048)[1]}, 2048)
    flops = document("plan", model, "--pyramid", "0.6")["prompt"]["flops"]
    ratio = flops["after"] / flops["before"]
    assert "0-1 8 8 8 x 8 all float32 512" in lines
    assert "cache: 1,024 bytes per token that all layers keep" in lines
    assert "2.1 MB -> 1.3 MB for 1 x 2,048 tokens of prompt (float32), 1.7x smaller" in lines
    assert lines[-5:-3] == [f"0 2,048 2,048 {2048 * 516:,}", f"1 {above:,} {above:,} {stored:,}"]
    assert lines[-2].endswith("1.3 MB of cache: 60.0% of the 2.1 MB that it takes where no token is dropped")
    said = f"{flops['before'] / 1e9:.1f} -> {flops['after'] / 1e9:.1f} GFLOPs per prompt of 2,048 tokens ({ratio:.2f}x)"
    assert lines[-1] == f"prefill: {said}"
    assert ratio < 0.7
    ranked = run("plan", model, "--evict", "h2o", "--evict-keep", "0.5").stdout
    assert "MFLOPs per prompt of 128 tokens (1." in ranked
    assert ranked.endswith("x, ranking tokens included)\n")
    assert document("plan", model)["prompt"] is None
    assert document("plan", model, "--pyramid", "1")["prompt"] is None
    assert "prompt" not in run("plan", model, "--kv-heads", "2").stdout


def test_figures_of_a_prompt_are_left_out_where_projections_are_not_known(model: str) -> None:
    found = api.inspect(model)
    grouped = kvpass.plan(model, [GroupHeads(2), EvictKV("snapkv", keep=0.5)])
    assert cli._cost(found, grouped, None) is None
    unknown = replace(found, layers=tuple(replace(layer, layout="unknown") for layer in found.layers))
    assert cli._cost(unknown, grouped, 64) is None
    assert cli._cost(unknown, kvpass.plan(model, EvictKV("snapkv", keep=0.5)), None) == found.cost
    figures = cli._prompt_figures(grouped, None, 100)
    assert figures is not None
    assert figures.to_dict()["flops"] is None
    assert len(figures.lines()) == 1


def test_plan_shows_who_reads_whom_and_what_it_costs(model: str) -> None:
    done = run("plan", model, "--share-layers", "lckv:0", "--kv-bits", "8", "--page", "16", "--batch", "2")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "0 8 8 8 x 8 reads 1 all int8 16 0" in lines
    assert "1 8 8 8 x 8 own all int8 16 160" in lines
    assert "cache: 1,024 -> 160 (15.6%) bytes per token, 6.4x smaller" in lines
    assert "262.1 kB -> 41.0 kB for 2 x 128 tokens (int8), 6.4x smaller" in lines
    assert any(line.startswith("keys and values of 1 of 2 layers are not computed") for line in lines)
    assert "their W_K and W_V hold 8,192 parameters" in done.stdout
    assert lines[-1].startswith("prefill repeats layers 0..1 of 2 until")
    assert lines[-1].endswith("(9 passes: 9.0x)")
    plain = run("plan", model).stdout
    assert not any(word in plain for word in ("reads", "smaller", "page", "prefill", "positions", "W_K"))


def test_plan_counts_in_another_dtype(model: str) -> None:
    found = document("plan", model, "--kv-bits", "8", "--dtype", "bfloat16")
    assert found["bytes_per_token"] == {"before": 512, "after": 2 * 160}
    assert (found["stored"], found["layers"][0]["dtype"]) == ("int8", "bfloat16")


def test_every_pass_is_saved_planned_and_run(model: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    words = "--kv-heads 4 --share-layers 0_0 --share-init mean --window 24 --kv-bits 8 --page 4 --verify off"
    found = document("transform", model, *words.split(), "-o", out)
    assert [step["name"] for step in found["recipe"]] == [n for n in cli.PASS_FLAGS if n not in SELECTIVE]
    assert found["layers"] == document("plan", out)["layers"]
    assert document("verify", out)["passed"]
    found = document("plan", out, "--length", "1000")
    assert found["bytes"]["before"] == found["bytes"]["after"] == (24 + 4) * 4 * 2 * (8 + 2)


def test_the_limit_of_passes_is_that_of_the_saved_recipe(model: str, tmp_path: Path) -> None:
    path, out = tmp_path / "r.toml", str(tmp_path / "out")
    path.write_text('[[pass]]\nname = "share-layers"\nkv_source = "lckv:0"\npasses = 3\nfallback = false\n')
    document("transform", model, "--recipe", str(path), "--verify", "off", "-o", out)
    for words in ([model, "--recipe", str(path)], [out]):
        found = document("plan", *words)["prefill"]
        assert (found["limit"], found["fallback"], found["cost"]) == (3, False, 3.0)


def test_a_saved_program_is_verified_and_inspected(slim: str) -> None:
    found = document("verify", slim)
    assert found["passed"]
    assert {c["name"] for c in found["checks"]} >= {"structure", "finite weights", "prefill and decode equal forward"}
    assert document("inspect", slim)["layers"][0]["kv_heads"] == 2


def test_a_checkpoint_is_compared_with_transformers(model: str, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    done = run("transform", model, "--kv-heads", "2", "-o", str(out), "--save", "hf")
    assert done.exit_code == 0, done.output
    assert "1,024 -> 256" in done.stdout
    assert f"saved {out}" in done.stdout
    assert json.loads((out / "config.json").read_text())["num_key_value_heads"] == 2
    last = document("verify", str(out))["checks"][-1]
    assert (last["name"], last["passed"]) == ("logits equal those of transformers", True)


def test_generation_is_greedy_unless_asked(slim: str) -> None:
    words = ("generate", slim, "--prompt", "It was", "--max-new-tokens", "8")
    greedy = document(*words)
    assert greedy["prompt_tokens"] == 6
    assert greedy["text"].startswith("It was")
    assert greedy["tokens"] == document(*words, "--temperature", "0")["tokens"]
    drawn = [document(*words, "--temperature", "3", "--seed", seed)["tokens"] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert run(*words).stdout == greedy["text"] + "\n"


def test_eval_puts_models_side_by_side(model: str, slim: str, text: str) -> None:
    sizes = ("--text", text, "--context", "80", "--continuation", "16", "--windows", "4", "--retrieval")
    found = document("eval", model, slim, *sizes)
    assert found["reference"] == "tiny"
    assert found["continuation"]["tiny"]["kl"] == 0 < found["continuation"]["slim"]["kl"]
    ratio = found["continuation"]["slim"]["bytes_per_token"] / found["continuation"]["tiny"]["bytes_per_token"]
    assert ratio == pytest.approx(0.25, rel=0.02)
    assert set(found["retrieval"]) == {"tiny", "slim"}
    assert list(document("eval", slim, slim, *sizes[:-1])["continuation"]) == [slim, f"{slim} (2)"]


def test_a_pyramid_is_planned_verified_run_and_scored(model: str, pyramid: str, text: str) -> None:
    plan = kvpass.load(pyramid).plan
    found = document("plan", pyramid)
    assert (found["length"], found["prompt"]["fraction"]) == (2048, plan.fraction(2048))
    assert found["prompt"] == document("plan", model, "--pyramid", "0.6")["prompt"]
    assert document("verify", pyramid)["passed"]
    said = run("inspect", pyramid).stdout
    assert "1,024 bytes per token that all layers keep in float32\n" in said
    assert "kB for a prompt of 128 tokens\n" in said
    words = ("generate", pyramid, "--prompt", PLAIN[:100], "--max-new-tokens", "4")
    grown = plan.held_bytes({owner: count + 4 for owner, count in plan.kept(100).items()}, 100)
    assert document(*words)["cache_bytes"] == grown < plan.bytes(1, 104) + 4 * 1024
    sizes = ("--text", text, "--context", "100", "--continuation", "8", "--windows", "4")
    scores = document("eval", model, pyramid, *sizes)["continuation"]
    assert scores["tiny"]["kl"] == 0 < scores["pyramid"]["kl"]
    assert scores["pyramid"]["used_bytes_per_token"] == pytest.approx(plan.bytes(1, 100) / 100)


def test_eviction_is_saved_run_and_scored(model: str, text: str, tmp_path: Path) -> None:
    out = str(tmp_path / "half")
    done = document("transform", model, "--evict", "h2o", "--evict-keep", "0.5", "-o", out)
    plan = kvpass.load(out).plan
    assert done["prompt"] == document("plan", model, "--evict", "h2o", "--evict-keep", "0.5")["prompt"]
    assert done["prompt"]["stored"] == [64, 64]
    found = document("generate", out, "--prompt", PLAIN[:60], "--max-new-tokens", "6")
    assert found["cache_bytes"] == plan.held_bytes({0: 30, 1: 30}, 60)
    scores = document("eval", model, out, "--text", text, "--context", "80", "--continuation", "8", "--windows", "2")
    assert scores["continuation"]["half"]["used_bytes_per_token"] == pytest.approx(plan.bytes(1, 80) / 80)


def test_thinned_text_has_no_bytes_of_its_own(model: str, tmp_path: Path) -> None:
    out = str(tmp_path / "thin")
    document("transform", model, "--pyramid", "0.7", "--pyramid-thin", "-o", out)
    assert document("generate", out, "--prompt", "It was", "--max-new-tokens", "20")["cache_bytes"] is None


def test_eval_scans_pairs_of_layers(model: str, text: str) -> None:
    words = ("eval", model, "--text", text, "--scan-sharing", "--context", "40", "--continuation", "8", "--windows")
    found = document(*words, "3", "--upward", "--max-distance", "1")
    assert {(e["reader"], e["owner"]) for e in found["edges"]} == {(0, 1), (1, 0)}
    losses = [e["loss"] for e in found["edges"]]
    assert losses == sorted(losses)
    assert all(e["nll"] - found["nll_original"] == e["loss"] and e["kl"] > 0 for e in found["edges"])
    assert (found["pairs"], found["upward"], found["max_distance"], found["windows"]) == (2, True, 1, 3)
    done = run(*words, "2")
    assert done.exit_code == 0, done.output
    assert "by itself: NLL" in done.stdout
    assert [line.split()[:2] for line in done.stdout.splitlines() if "±" in line] == [["1", "0"]]


def test_the_choices_are_those_of_the_pass() -> None:
    assert [m.value for m in cli.Method] == list(get_args(head_merge.Method))
    assert [r.value for r in cli.Refit] == list(get_args(group_heads.Refit))
    assert [i.value for i in cli.Init] == list(get_args(get_type_hints(ShareLayers)["init"]))
    assert [p.value for p in cli.Policy] == list(get_args(evict_kv.Policy))
    stored = get_type_hints(QuantizeKV)
    assert [f.value for f in cli.Format] == [*get_args(stored["layout"]), get_args(stored["kind"])[1]]


def test_every_flag_of_a_recipe_belongs_to_one_pass() -> None:
    named = [flag for flags in cli.PASS_FLAGS.values() for flag in flags]
    assert ["recipe", *named] == [f.name for f in fields(cli.Flags)]
    for name, flags in cli.PASS_FLAGS.items():
        knobs = {f.name for f in fields(PASSES[name])}  # type: ignore[arg-type]
        assert {cli.KNOBS.get(flag, flag) for flag in flags if flag != "cache_positions"} <= knobs


@pytest.mark.parametrize(
    ("numbers", "words"), [([0], "0"), ([0, 1, 2, 5], "0-2, 5"), (range(0, 20, 2), "0, 2, 4, 6, …, 18 (10 layers)")]
)
def test_layer_numbers_are_short(numbers: list[int], words: str) -> None:
    assert cli._ranges(numbers) == words


# ---------------------------------------------------------------------- refusals


BAD_SIZES = (
    "half",
    "",
    "64",
    "0",
    "-0.5",
    "1.01",
    "nan",
    "45%",
    "64MX",
    "64iB",
    "MB",
    "0MB",
    "-1MB",
    "1e3kB",
    "4 5kB",
    "9" * 400 + "MB",
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "{recipe}", "--kv-heads", "2"], "exclude each other"),
        (["--recipe", "{recipe}", "--method", "mean"], "exclude each other"),
        (["--recipe", "{recipe}", "--page", "16"], "--recipe and --page exclude each other"),
        (["--recipe", "{recipe}", "--cache-positions"], "--recipe and --cache-positions exclude each other"),
        (["--method", "mean"], "--method belongs to --kv-heads"),
        (["--share-init", "mean"], "--share-init belongs to --share-layers"),
        (["--kv-heads", "2", "--upward"], "--upward belongs to --share-layers"),
        (["--sinks", "4"], "--sinks belongs to --window"),
        (["--cache-positions"], "--cache-positions belongs to --window"),
        (["--kv-format", "kivi"], "--kv-format belongs to --kv-bits"),
        (["--kv-heads", "two"], "not 'two'"),
        (["--window", "8", "--sinks", "few"], "--sinks takes a number"),
        (["--window", "8,8,8"], "the model has 2"),
        (["--share-layers", "cake:2"], "no known word"),
        (["--share-layers", "1_1"], "upward=True"),
        (["--share-layers", "1_1", "--upward", "--window", "8"], "a ring cannot be written again"),
        (["--kv-bits", "4", "--kv-format", "fp8"], "has bits 8, not 4"),
        (["--recipe", "{recipe}", "--evict", "h2o"], "--recipe and --evict exclude each other"),
        (["--evict-keep", "0.5"], "--evict-keep belongs to --evict"),
        (["--evict-window", "0"], "--evict-window belongs to --evict"),
        (["--pyramid-at", "0"], "--pyramid-at belongs to --pyramid"),
        (["--evict", "h2o", "--pyramid-thin"], "--pyramid-thin belongs to --pyramid"),
        (["--evict", "h2o"], "how much is to stay"),
        (["--evict", "h2o", "--evict-keep", "0.5", "--evict-budget", "9"], "how much is to stay"),
        (["--evict", "tova", "--evict-keep", "1.5"], "not above 1"),
        (["--evict", "snapkv", "--evict-budget", "20"], "leaves nothing to choose"),
        (["--evict", "h2o", "--evict-keep", "0.5", "--window", "16"], "keeps a window"),
        (["--pyramid", "0.6", "--page", "16"], "pages are handed out for all layers alike"),
        (["--pyramid", "0.2"], "at least"),
        (["--pyramid", "0.6", "--pyramid-at", "1"], "behind layer 1 of 2"),
        *((["--pyramid", bad], f"or bytes with a unit, not {bad!r}") for bad in BAD_SIZES),
        (["--kv-heads", "3"], "choose from [1, 2, 4, 8]"),
        (["--kv-heads", "4,4,2"], "the model has 2"),
        (["--recipe", "{bad}"], "no key 'bogus'"),
        (["--recipe", "nowhere.toml"], "cannot be read"),
    ],
)
def test_plan_refuses_a_wrong_recipe(options: list[str], message: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "recipe").write_text('[[pass]]\nname = "group-heads"\nkv_heads = 2\n')
    (tmp_path / "bad").write_text('[[pass]]\nname = "group-heads"\nkv_heads = 2\nbogus = 1\n')
    places = {name: str(tmp_path / name) for name in ("recipe", "bad")}
    assert message in refusal("plan", model, *(o.format(**places) for o in options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing is to be done"),
        (["--kv-heads", "2", "--refit", "distill"], "--calibration"),
        (["--kv-heads", "2", "--calibration", "{folder}/none.txt"], "no such calibration file"),
        (["--kv-heads", "2", "--calibration", "{folder}/empty.txt"], "the text is empty"),
        (["--kv-heads", "4,2", "--save", "hf"], "different numbers of KV heads"),
        (["--share-layers", "0_0", "--save", "hf"], "cannot say what ShareLayers(kv_source='0_0') does"),
        (["--kv-heads", "2", "--kv-bits", "8", "--save", "hf"], "cannot say what QuantizeKV() does"),
        (["--pyramid", "0.6", "--save", "hf"], "cannot say what PrunePyramid(keep=0.6) does"),
        (["--evict", "h2o", "--save", "hf"], "how much is to stay"),
        (["--pyramid", "lots"], "a fraction above 0 and not above 1"),
        (["--kv-heads", "2", "-o", "{folder}/full"], "give --overwrite"),
        (["--kv-heads", "2", "-o", "{folder}/full", "--overwrite"], "does not hold a model"),
        (["--kv-heads", "2", "-o", "{folder}/empty.txt/out"], "inside a file"),
        (["--kv-heads", "2", "-o", "{folder}/empty.txt"], "a file stands there"),
        (["--kv-heads", "2", "-o", "{model}", "--overwrite"], "the model itself"),
    ],
)
def test_transform_refuses_before_it_starts(
    options: list[str], message: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr(api, "transform", started)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    words = [o.format(folder=tmp_path, model=model) for o in options]
    if "-o" not in words:
        words += ["-o", str(tmp_path / "new" / "out")]
    assert message in refusal("transform", model, *words)
    assert sorted(os.listdir(tmp_path)) == ["empty.txt", "full"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "--scan-sharing"], "a second model exclude each other"),
        (["--scan-sharing", "--retrieval"], "--retrieval exclude each other"),
        (["--upward"], "--upward belongs to --scan-sharing"),
        (["--max-distance", "3"], "--max-distance belongs to --scan-sharing"),
        (["--scan-sharing", "--context", "100000"], "100000 + 64 needs 100064"),
    ],
)
def test_eval_refuses_what_does_not_go_together(words: list[str], message: str, model: str, text: str) -> None:
    assert message in refusal("eval", model, "--text", text, *(w.format(model=model) for w in words))


def test_a_family_without_a_word_for_kv_heads_is_no_checkpoint(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    out = str(tmp_path / "out")
    message = refusal("transform", str(tmp_path / "gpt2"), "--kv-heads", "2", "-o", out, "--save", "hf")
    assert "no word for the number of KV heads" in message


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    small = {"num_attention_heads": 4, "vocab_size": 97}
    BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, intermediate_size=32, **small)).save_pretrained(
        tmp_path / "bert"
    )
    T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, vocab_size=97)).save_pretrained(
        tmp_path / "t5"
    )
    (tmp_path / "file").write_text("not a model")
    (tmp_path / "blank").mkdir()
    for name, message in {
        "bert": "not a causal language model",
        "t5": "encoder-decoder",
        "file": "this is a file",
        "blank": "no Hugging Face model",
        "nowhere": "no such folder",
    }.items():
        said = refusal("inspect", str(tmp_path / name))
        assert message in said
        error = document("inspect", str(tmp_path / name), status=2)["error"]
        assert set(error) == {"what", "where", "fix"}
        assert error["what"] in said
    assert "local Hugging Face cache" in refusal("inspect", "some/model")


def test_a_damaged_checkpoint_is_named(model: str, tmp_path: Path) -> None:
    cut, bad = tmp_path / "cut", tmp_path / "bad"
    for folder in (cut, bad):
        shutil.copytree(model, folder)
    shard = cut / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    out = str(tmp_path / "out")
    assert "truncated or damaged" in refusal("transform", str(cut), "--kv-heads", "2", "-o", out)
    weights = load_file(bad / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name][0, 0] = torch.nan
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    assert name in refusal("transform", str(bad), "--kv-heads", "2", "-o", out, status=1)
    found = document("verify", str(bad), status=1)
    assert [c["name"] for c in found["checks"] if not c["passed"]] == ["finite weights"]
    assert run("verify", str(bad)).exit_code == 1
    assert sorted(os.listdir(tmp_path)) == ["bad", "cut"]


def test_devices_and_prompts_are_checked(model: str) -> None:
    words = ("generate", model, "--max-new-tokens", "2", "--prompt")
    assert "the prompt is empty" in refusal(*words, "")
    assert "cannot be used here" in refusal(*words, "a", "--device", "cuda:99")


def test_what_export_prints_when_it_gives_up_is_left_out(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    build("llama", rope_parameters=rope).save_pretrained(tmp_path)
    message = refusal("inspect", str(tmp_path))
    assert message.count("\n") <= 4
    assert "seq_len" in message


def test_usage_errors_are_documents_too(model: str) -> None:
    assert "Missing option" in document("transform", model, status=2)["error"]["what"]
    assert "No such command" in document("frobnicate", status=2)["error"]["what"]
    done = run("transform", model)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Missing option" in done.stderr


# ---------------------------------------------------------------------- the process


def test_an_unexpected_error_shows_its_traceback(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: str) -> None:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr(api, "inspect", broken)
    done = run("inspect", model, "--json")
    assert done.exit_code == 1
    assert "ZeroDivisionError" in json.loads(done.stdout)["error"]["what"]
    assert "Traceback" in done.stderr


def test_an_interrupt_that_a_library_turns_into_an_error_is_one(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(source: str) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ModuleNotFoundError("could not import") from None

    monkeypatch.setattr(api, "inspect", importing)
    done = run("inspect", model)
    assert done.exit_code == 130
    assert done.stderr == "kvpass: interrupted; nothing was left behind\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, kvpass.cli; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_process_prints_nothing_but_its_document(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from kvpass.cli import main; main()", "transform", model, "--kv-heads", "1"]
    done = subprocess.run([*command, "-o", str(tmp_path / "out"), "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["bytes_per_token"]["after"] == 128
    assert os.listdir(tmp_path) == ["out"]


def test_ctrl_c_in_a_refit_leaves_nothing(model: str, text: str, tmp_path: Path) -> None:
    code = """
import sys
from kvpass import api, cli
run = api.run
def telling(*arguments):
    print("started", file=sys.stderr, flush=True)
    return run(*arguments)
api.run = telling
cli.main()
"""
    words = ["transform", model, "--kv-heads", "2", "--refit", "distill", "--steps", "1000000"]
    words += ["--calibration", text, "-o", str(tmp_path / "deep" / "out")]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline() == b"started\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    assert err == b"kvpass: interrupted; nothing was left behind\n"
    assert os.listdir(tmp_path) == []


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == f"kvpass {kvpass.__version__}\n"


def test_explain_says_what_computes_each_layer(model: str, slim: str) -> None:
    for source in (model, slim):
        found = document("explain", source, "--pass", "lower-attention", "--layer", "1")
        assert {c["layer"] for c in found["choices"]} == {1}
        assert {(c["entry"], c["op"], c["kernels"]) for c in found["choices"]} == {
            ("forward", "attention", "attention"),
            ("prefill", "attend", "append, attention"),
            ("decode", "attend", "append, attention"),
        }
    assert "append, attention" in run("explain", slim, "--pass", "lower-attention").stdout
    assert "has 2 layers" in run("explain", slim, "--pass", "lower-attention", "--layer", "9").output
    wrong = run("explain", slim, "--pass", "no-such-pass")
    assert wrong.exit_code == 2
    assert "lower-attention" in wrong.output


def test_generate_gives_the_same_text_from_kernels(slim: str) -> None:
    words = ("generate", slim, "--prompt", "ABC", "--max-new-tokens", "3")
    texts = [document(*words, "--backend", backend)["text"] for backend in ("reference", "triton")]
    assert texts[0] == texts[1]


def test_a_backend_that_cannot_run_here_is_refused(slim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    done = run("generate", slim, "--prompt", "ABC", "--backend", "triton", "--device", "cpu")
    assert done.exit_code == 2
    assert "TRITON_INTERPRET=1" in done.output


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny Llama with one KV head, sinks and a window in 8 bits: as a kvpass folder, and exported."""
    folder, out = tmp_path_factory.mktemp("wide") / "model", tmp_path_factory.mktemp("out") / "package"
    wide("llama").save_pretrained(folder)
    write_tokenizer(folder)
    text = folder / "some.txt"
    text.write_text("ABCDEFGHIJ KLMNOPQRST " * 60)
    flags = ("--kv-heads", "1", "--method", "first", "--window", "6", "--sinks", "2", "--kv-bits", "8")
    assert "needs calibration text" in run("export", str(folder), *flags, "-o", str(out)).output
    flags += ("--calibration", str(text))
    made = document("export", str(folder), *flags, "-o", str(out))
    assert made["target"] == "ort"
    assert all(check["measured"] <= check["allowed"] for check in made["checks"])
    slim = out.parent / "slim"
    document("transform", str(folder), *flags, "--kv-format", "static", "-o", str(slim))
    return str(slim), str(out)


def test_an_exported_package_writes_what_the_program_writes(package: tuple[str, str]) -> None:
    words = ("--prompt", "ABCDEFGHIJ", "--max-new-tokens", "12")
    ours, theirs = (document("generate", folder, *words) for folder in package)
    assert ours["text"] == theirs["text"]
    assert ours["new_tokens"] == theirs["new_tokens"]
    assert theirs["cache_bytes"] > 0
    sampled = [
        document("generate", package[1], *words, "--temperature", "0.9", "--seed", "4")["text"] for _ in range(2)
    ]
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize("target", ["onnx", "onnx-static"])
def test_a_package_of_standard_operators_writes_what_the_program_writes(
    package: tuple[str, str], tmp_path: Path, target: str
) -> None:
    made = document("export", package[0], "--target", target, "-o", str(tmp_path / "out"))
    assert made["target"] == target
    words = ("--prompt", "ABCDEFGHIJ", "--max-new-tokens", "12")
    ours, theirs = (document("generate", folder, *words) for folder in (package[0], str(tmp_path / "out")))
    assert ours["text"] == theirs["text"]
    assert ours["new_tokens"] == theirs["new_tokens"]


def test_an_export_with_weights_of_4_bits_tells_what_they_cost(tmp_path: Path) -> None:
    wide("llama").save_pretrained(tmp_path / "model")
    done = run("export", str(tmp_path / "model"), "--weights", "int4", "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "weights of 4 bits, against full ones: off by" in done.output
    assert "(not checked)" in done.output
    assert "fp32, weights int4" in done.output


def test_an_exported_package_is_not_taken_for_a_model(package: tuple[str, str], tmp_path: Path) -> None:
    for words in (("transform", package[1], "--kv-heads", "1", "-o", str(tmp_path / "x")), ("verify", package[1])):
        done = run(*words)
        assert done.exit_code == 2
        assert "cannot be read back" in done.output


def test_an_export_that_cannot_be_says_why_and_leaves_nothing(package: tuple[str, str], tmp_path: Path) -> None:
    done = run("export", package[0], "--page", "4", "-o", str(tmp_path / "x"))
    assert done.exit_code == 2
    assert "pages belong to a server" in done.output
    done = run("export", package[0], "-o", package[1])
    assert done.exit_code == 2
    assert "not empty" in done.output
    assert not any(tmp_path.iterdir())
