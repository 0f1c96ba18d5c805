"""`write_genai_config`: what makes an exported folder one that onnxruntime-genai loads as it is.

The runtime finds the caches by the names of the graph's inputs and reads each layer's heads from their shapes, so
layers that read another one's cache need no word here. What it cannot see in the graph is told: how long texts may
grow, that past and present share a buffer, and which caches hold a window only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpass.export.program_folder import copy_companions

CONFIG = "genai_config.json"
LONGEST = 4096  # tokens that caches are made for where nothing else is asked; they are allocated at once


@dataclass(frozen=True)
class GenaiFacts:
    """What the runtime is told of a model.

    Attributes:
        context_length: tokens that the graph reads at most.
        vocab_size: token ids are below it.
        hidden_size: channels between layers.
        heads: query heads.
        layers: those that have keys and values of their own.
        kv_heads: KV heads; where layers differ, those of any: shapes in the graph come first.
        head_dim: channels per head; likewise.
        windows: per layer of `layers`, the window that its cache holds; 0 for all tokens.
        eos: ids that end a text; where there is none, the runtime takes 0 to be one.
        bos: the id that begins a text, if there is one.
        pad: the id that fills rows, if there is one.
        shared: whether past and present of a cache are one buffer.
        chunk: tokens of a prompt that the graph reads at a time; None for any number.
    """

    context_length: int
    vocab_size: int
    hidden_size: int
    heads: int
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None
    shared: bool = True
    chunk: int | None = None


def write_genai_config(folder: Path, facts: GenaiFacts, tokenizer_source: str | None = None) -> None:
    """Write `genai_config.json` beside `model.onnx`, and copy the tokenizer and the generation config of a model.

    Args:
        folder: the package.
        facts: of the model.
        tokenizer_source: a model folder or a name on the hub; None where the tokenizer is there already, or is none.
    """
    copy_companions(tokenizer_source, folder)
    (folder / CONFIG).write_text(json.dumps(genai_config(facts, _defaults(folder)), indent=1), encoding="utf-8")


def genai_config(facts: GenaiFacts, generation: dict[str, Any] | None = None) -> dict[str, Any]:
    """The document; `generation` is a Hugging Face generation config, whose sampling becomes the default."""
    generation = generation or {}
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": facts.head_dim,
        "hidden_size": facts.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": facts.heads,
        "num_hidden_layers": len(facts.layers),
        "num_key_value_heads": facts.kv_heads,
    }
    windowed = {layer: window for layer, window in zip(facts.layers, facts.windows, strict=False) if window}
    if windowed:
        # the runtime knows one size, and the CPU's operator takes caches that are longer than its window; a cache is
        # never longer than max_length, though, and the operator takes none that is shorter than its window
        decoder["sliding_window"] = {
            "window_size": max(windowed.values()),
            "layers": list(windowed),
            "slide_key_value_cache": False,
            "slide_inputs": False,
        }
    tokens = {
        "bos_token_id": facts.bos,
        "eos_token_id": facts.eos[0] if len(facts.eos) == 1 else list(facts.eos) or None,
        "pad_token_id": facts.pad,
    }
    return {
        "model": {
            "type": "decoder",
            **{name: value for name, value in tokens.items() if value is not None},
            "context_length": facts.context_length,
            "vocab_size": facts.vocab_size,
            "decoder": decoder,
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "max_length": max(min(facts.context_length, LONGEST), *facts.windows, 0),
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            **({} if facts.chunk is None else {"chunk_size": facts.chunk}),
            "past_present_share_buffer": facts.shared,
            "repetition_penalty": generation.get("repetition_penalty") or 1.0,
            "temperature": generation.get("temperature") or 1.0,
            "top_k": 50 if generation.get("top_k") is None else generation["top_k"],
            "top_p": generation.get("top_p") or 1.0,
        },
    }


def _defaults(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
