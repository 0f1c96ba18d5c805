"""An exported folder is loaded by onnxruntime-genai as it is, and its greedy text is torch's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import kvpass
from export_models import captured, greedy, served, wide
from kvpass.export.onnx.genai import CONFIG, LONGEST, GenaiFacts, genai_config, write_genai_config
from kvpass.export.onnx.runner import OnnxModel
from kvpass.passes import GroupHeads, QuantizeKV, ShareLayers, SlideWindow

POSITIONS = 64
FACTS = GenaiFacts(
    context_length=8192, vocab_size=97, hidden_size=64, heads=4, layers=(0, 2), kv_heads=2, head_dim=16, eos=(2,)
)
RECIPES = {
    "as it is": [],
    "shared layers": [ShareLayers("cla:2")],
    "heads that differ from layer to layer": [GroupHeads((2, 1, 1, 2), method="first")],
    "windows": [SlideWindow((8, 0, 6, 6), (0, 0, 0, 0))],
    "shared windows": [ShareLayers("cla:2"), SlideWindow(8, 0)],
    "sinks and shorter windows above": [SlideWindow((20, 14, 10, 4), 4)],
    "likewise, fewer heads in 8 bits": [
        GroupHeads((2, 1, 1, 2), method="first"),
        SlideWindow((20, 14, 10, 4), (4, 2, 2, 4)),
        QuantizeKV(8, layout="static"),
    ],
    "layers that read one above them": [ShareLayers("lckv:2")],
    "8 bits": [QuantizeKV(8, layout="static")],
    "8 bits, shared layers of fewer heads": [
        GroupHeads(1, method="first"),
        ShareLayers("cla:2"),
        QuantizeKV(8, layout="static"),
    ],
    "8 bits in windows": [SlideWindow(8, 0), QuantizeKV(8, layout="static")],
    "4 bits": [QuantizeKV(4, layout="static")],
}
TEXT = [torch.randint(0, 97, (8, 128), generator=torch.Generator().manual_seed(1))]


def package(model, folder: Path, end: int, **options: Any) -> None:
    """Export a model whose texts end at a certain id."""
    model.export_onnx(folder, positions=POSITIONS, **options)
    config = json.loads((folder / CONFIG).read_text())
    config["model"]["eos_token_id"] = end
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("recipe", RECIPES)
def test_genai_writes_the_text_of_torch(tmp_path: Path, recipe: str) -> None:
    decoder = wide("llama", num_hidden_layers=4)
    model = kvpass.transform(decoder, RECIPES[recipe], calibration=TEXT, progress=False, verify="off")
    prompts = [[5, 9, 33, 21, 60, 7, 11, 40, 8, 3], [8, 8, 3, 40, 22, 11, 90, 91, 17, 4]]
    right = [greedy(model, ids, 40) for ids in prompts]
    never = next(i for i in range(97) if i not in {*right[0], *right[1]})  # so that texts have one length
    package(model, tmp_path / "out", end=never)
    assert served(tmp_path / "out", prompts[:1], 40) == right[:1]
    if model.plan.upward:  # it appends tokens one by one to a single row only
        with pytest.raises(RuntimeError):
            served(tmp_path / "out", prompts, 40)
    else:
        assert served(tmp_path / "out", prompts, 40) == right


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("tied", [False, True])
def test_genai_writes_the_text_of_onnxruntime_with_weights_of_4_bits(tmp_path: Path, tied: bool, dtype: str) -> None:
    decoder = wide("llama", num_hidden_layers=4, tie_word_embeddings=tied)
    model = kvpass.transform(decoder, progress=False, verify="off")
    package(model, tmp_path / "out", end=96, weights="int4", dtype=dtype)
    prompts = [[5, 9, 33, 21, 60, 7, 11, 40, 8, 3], [8, 8, 3, 40, 22, 11, 90, 91, 17, 4]]
    for prompt in prompts:
        (right,) = OnnxModel.open(tmp_path / "out").generate([prompt], max_new_tokens=40, eos=(96,))
        assert served(tmp_path / "out", [prompt], 40) == [right[: right.index(96)] if 96 in right else right]


def test_a_text_ends_where_the_model_ends_it(tmp_path: Path) -> None:
    model = captured("llama")
    right = greedy(model, [5, 9, 33], 20)
    package(model, tmp_path / "out", end=right[7])
    assert served(tmp_path / "out", [[5, 9, 33]], 20) == [right[: right.index(right[7])]]


def test_texts_may_be_as_long_as_the_graph_reads_and_caches_are_not_made_longer_than_that_unasked() -> None:
    assert genai_config(FACTS)["search"]["max_length"] == LONGEST
    short = GenaiFacts(**{**vars(FACTS), "context_length": 100})
    assert genai_config(short)["search"]["max_length"] == 100
    wide_window = GenaiFacts(**{**vars(FACTS), "windows": (0, 5000)})
    assert genai_config(wide_window)["search"]["max_length"] == 5000


def test_only_layers_with_a_window_are_named() -> None:
    assert "sliding_window" not in genai_config(FACTS)["model"]["decoder"]
    some = GenaiFacts(**{**vars(FACTS), "layers": (0, 2, 3), "windows": (8, 0, 6)})
    told = genai_config(some)["model"]["decoder"]["sliding_window"]
    assert (told["window_size"], told["layers"]) == (8, [0, 3])


def test_ids_that_a_model_does_not_have_are_left_out() -> None:
    bare = GenaiFacts(**{**vars(FACTS), "eos": ()})
    assert not {"eos_token_id", "bos_token_id", "pad_token_id"} & genai_config(bare)["model"].keys()
    several = GenaiFacts(**{**vars(FACTS), "eos": (2, 7), "bos": 0, "pad": 0})
    told = genai_config(several)["model"]
    assert (told["eos_token_id"], told["bos_token_id"], told["pad_token_id"]) == ([2, 7], 0, 0)


def test_the_tokenizer_comes_along_and_the_generation_config_gives_the_defaults(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    vocabulary = {f"w{i}": i for i in range(97)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w3")))
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20}))
    out.mkdir()
    write_genai_config(out, FACTS, str(source))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {f.name for f in out.iterdir()}
    search = json.loads((out / "genai_config.json").read_text())["search"]
    assert (search["do_sample"], search["temperature"], search["top_k"], search["top_p"]) == (True, 0.6, 20, 1.0)
