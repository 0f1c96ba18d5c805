"""Capture: a Hugging Face folder, a hub id or any `nn.Module` -> a verified `Program` with canonical attention.

`capture` is the one entry. It tries the ways there are (the attention interface of transformers, then the family's
eager attention) and accepts the first in which every layer's attention was found and proved.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvpass.capture import huggingface
from kvpass.capture.module import trace
from kvpass.capture.raise_attention import raise_attention
from kvpass.errors import CaptureError, KvpassError, SourceError
from kvpass.ir.program import ModelFacts, Program, Weight, merge_equal, output_node
from kvpass.ir.storage import SafetensorsStore

Source = str | Path | nn.Module


def capture(source: Source, dtype: torch.dtype | None = None, *, weights: bool = True) -> Program:
    """Capture a decoder as a `Program`.

    Args:
        source: a folder or hub id of a Hugging Face model, or a module that maps input_ids [B, S] to logits [B, S, V].
        dtype: what to compute in; the checkpoint's (or the module's) own where None.
        weights: False reads the config only; the program's weights then have shapes and no numbers.

    Raises:
        SourceError: nothing can be read there, or a shard is damaged.
        CaptureError: it is not a causal decoder that kvpass understands, with the reason.
    """
    if isinstance(source, nn.Module):
        return _capture_module(source)
    return _capture_folder(str(source), dtype, weights)


def _capture_module(module: nn.Module) -> Program:
    if any(p.dtype != next(module.parameters()).dtype for p in module.parameters() if p.is_floating_point()):
        pass  # mixed precision is the module's own business; the graph keeps its casts
    if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
        huggingface.check_decoder(module.config)
        original = module.config._attn_implementation
        huggingface.register()

        def attempt(implementation: str) -> tuple[nn.Module, Any]:
            module.set_attn_implementation(implementation)  # type: ignore[operator]
            return module, huggingface.call

        try:
            return _first_that_works(attempt, module.config, next(module.parameters()).dtype)
        finally:
            module.set_attn_implementation(original)  # type: ignore[operator]
    graph, weights = trace(module)
    parameter = next(module.parameters(), None)
    facts = ModelFacts(
        name=type(module).__name__,
        family=type(module).__name__,
        vocab_size=0,
        layers=0,
        dtype=parameter.dtype if parameter is not None else torch.float32,
    )
    return _finish(Program({"forward": graph}, weights, facts))


def _capture_folder(source: str, dtype: torch.dtype | None, weights: bool) -> Program:
    config = huggingface.read_config(source)
    stored = getattr(config, "dtype", None) or torch.float32
    compute = dtype or stored
    program = capture_config(config, compute)
    program.facts.name, program.facts.folder = Path(source).name, source
    program.facts.stored_dtype = stored
    if weights:
        attach_weights(program, source, config, compute)
    return program


def capture_config(config: Any, dtype: torch.dtype) -> Program:
    """Capture the model of a config; its weights have shapes and no numbers.

    The last few are remembered: saving a checkpoint captures what it wrote, which mostly is what was read.
    """

    def attempt(implementation: str) -> tuple[nn.Module, Any]:
        return huggingface.build(config, dtype, implementation), huggingface.call

    said = {k: v for k, v in config.to_dict().items() if k not in _NAMES_ONLY}
    key = (type(config).__name__, json.dumps(said, sort_keys=True, default=str), dtype)
    if key not in _recent:
        found = _first_that_works(attempt, config, dtype)
        while len(_recent) >= _REMEMBERED:
            _recent.pop(next(iter(_recent)))
        _recent[key] = found
    program = _recent[key].copy()
    program.facts.config = config.to_dict()
    return program


_NAMES_ONLY = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
_REMEMBERED = 2
_recent: dict[Any, Program] = {}


def _first_that_works(attempt: Any, config: Any, dtype: torch.dtype) -> Program:
    """Capture through the attention interface, else through the attention that the family itself would run."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    problems: list[KvpassError] = []
    for implementation in (huggingface.IMPLEMENTATION, "sdpa", "eager"):
        try:
            try:
                module, call = attempt(implementation)
            except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
                raise CaptureError(f"transformers refused attn_implementation={implementation!r}: {error}") from error
            graph, weights = trace(module, call)
            facts = ModelFacts(
                name=type(module).__name__,
                family=str(config.model_type),
                vocab_size=int(text.vocab_size),
                layers=int(text.num_hidden_layers),
                hidden_size=getattr(text, "hidden_size", None),
                max_positions=getattr(text, "max_position_embeddings", None),
                config=config.to_dict(),
                dtype=dtype,
                expected_sites=int(text.num_hidden_layers),
            )
            return _finish(Program({"forward": graph}, weights, facts))
        except KvpassError as error:
            problems.append(error)
    told = [p for p in problems if "refused attn_implementation" not in p.what] or problems
    raise told[-1] if "passes `" in told[0].what else told[0]


def _finish(program: Program) -> Program:
    """Raise attention, then hold the whole against what the model is known to have."""
    _check_logits(program)
    merge_equal(program.forward)
    found = raise_attention(program)
    merge_equal(program.forward)
    expected = program.facts.expected_sites
    if expected is not None and found != expected:
        raise CaptureError(
            f"{found} attention sites were found in a model of {expected} layers",
            where=program.facts.family,
            fix="a layer's attention is spelled in a way that kvpass does not recognise, or has none; "
            "please report the family",
        )
    if found == 0:
        raise CaptureError(
            "the model has no attention", where=program.facts.family, fix="there is no KV cache to rewrite"
        )
    program.facts.layers = found
    shapes = program.shapes()
    logits = shapes[output_node(program.forward)]
    program.facts.vocab_size = int(logits.shape[-1])
    return program


def _check_logits(program: Program) -> None:
    for batch, length in ((2, 5), (1, 1), (3, 8)):
        try:
            value = program.shapes("forward", batch, length)[output_node(program.forward)]
        except Exception as error:
            raise CaptureError(
                f"the captured graph does not run on a batch of {batch} and a length of {length}: {error}",
                where="\n".join(getattr(error, "__notes__", [])),
                fix="the model's code fixes a size; look for Python numbers made from a tensor's shape",
            ) from error
        if not isinstance(value, Tensor) or value.dim() != 3 or tuple(value.shape[:2]) != (batch, length):
            raise CaptureError(
                f"the model maps input_ids [{batch}, {length}] to {tuple(getattr(value, 'shape', ()))}, "
                "not to logits [batch, length, vocabulary]",
                fix="give a causal language model with its head, not an encoder, a classifier or a backbone",
            )


def attach_weights(program: Program, source: str, config: Any, dtype: torch.dtype) -> None:
    """Point the program's weights at the checkpoint's tensors; nothing is read yet.

    Where the checkpoint's names are not the model's (families that transformers converts while loading), the model is
    loaded by transformers instead, and its tensors are held in memory.

    Raises:
        SourceError: no safetensors, or a shard is damaged.
    """
    folder = resolve_folder(source)
    store = SafetensorsStore(folder)
    names = set(store.names())
    parameters = {n: w for n, w in program.weights.items() if not w.constant}
    prefix = _common_prefix(parameters, names)
    if prefix is None:
        _load_all(program, source, config, dtype)
        return
    for name, weight in parameters.items():
        stored = _stored_name(name, prefix, names)
        assert stored is not None
        if tuple(store.shape(stored)) != weight.shape:
            raise SourceError(
                f"{stored} has shape {tuple(store.shape(stored))} in the checkpoint, {weight.shape} in the config",
                where=str(folder),
                fix="config.json and the safetensors files do not belong together",
            )
        program.weights[name] = Weight(weight.shape, weight.dtype, _reader(store, stored), False)
    for name, weight in program.weights.items():
        stored = _stored_name(name, prefix, names) if weight.persistent else None
        if stored is not None and tuple(store.shape(stored)) == weight.shape:
            program.weights[name] = replace(weight, read=_reader(store, stored))


def _reader(store: SafetensorsStore, name: str) -> Any:
    return lambda: store.load(name)


def _common_prefix(parameters: dict[str, Weight], names: set[str]) -> str | None:
    """How the checkpoint's names differ from the model's: by a leading word, or not at all; None if otherwise."""
    candidates = {""}
    for name in parameters:
        head, _, rest = name.partition(".")
        if rest:
            candidates.add(f"-{head}.")
    for candidate in sorted(candidates):
        if all(_stored_name(n, candidate, names) is not None for n in parameters):
            return candidate
    return None


def _stored_name(name: str, prefix: str, names: set[str]) -> str | None:
    if name in names:
        return name
    if prefix.startswith("-") and name.startswith(prefix[1:]) and name[len(prefix) - 1 :] in names:
        return name[len(prefix) - 1 :]
    return None


def resolve_folder(source: str) -> Path:
    """The local folder of a model: itself, or the snapshot of a hub id in the local cache."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{source!r} is no folder, and no model of the local Hugging Face cache",
            where=source,
            fix=f"give a folder with config.json and *.safetensors, or run `hf download {source}` first",
        ) from error


def _load_all(program: Program, source: str, config: Any, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(f"transformers cannot load the weights: {error}", where=source) from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would draw them at random
        raise SourceError(
            f"the checkpoint does not hold {len(missing)} of the model's tensors: {', '.join(missing[:3])}",
            where=source,
            fix="download it again, or give the checkpoint of a language model with its head",
        )
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, weight in list(program.weights.items()):
        if not weight.constant or weight.persistent:
            program.weights[name] = Weight.of(tensors[name], constant=weight.constant, persistent=weight.persistent)
