"""Capture: a Hugging Face folder, a hub id or any `nn.Module` -> a verified `Program` with canonical attention.

`capture` is the one entry. It tries the ways there are (the attention interface of transformers, then the family's
eager attention) and accepts the first in which every layer's attention was found and proved.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from kvpass.capture import huggingface
from kvpass.capture.module import layer_of, trace
from kvpass.capture.raise_attention import raise_attention
from kvpass.errors import CaptureError, KvpassError, SourceError
from kvpass.ir.program import ATTENTION, ModelFacts, Program, Weight, merge_equal, output_node
from kvpass.ir.sites import source_of
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


@dataclass(frozen=True)
class Survey:
    """A model with layers that capture refuses, to be looked at and not to be run.

    Attributes:
        program: all layers; a plain causal attention stands in where one is refused.
        refused: per layer of the model, the error.
        layers: the model's number of each of the program's layers.
    """

    program: Program
    refused: dict[int, CaptureError]
    layers: tuple[int, ...]


def survey(source: Source, dtype: torch.dtype | None = None) -> Survey:
    """Capture what can be captured of a model, without reading a weight: every layer is asked, whatever others are.

    Raises:
        SourceError: nothing can be read there.
        CaptureError: there is no graph, or no attention in it; the error tells the layer where that can be told.
    """
    refused: dict[int, CaptureError] = {}
    if isinstance(source, nn.Module):
        program = _capture_module(source, refused)
    else:
        config = huggingface.read_config(str(source))
        compute = dtype or torch.float32
        program = _first_that_works(_builder(config, compute), config, compute, refused)
        program.facts.name, program.facts.folder = Path(str(source)).name, str(source)
    without = _without_attention(program)
    layers = tuple(n for n in range(program.facts.layers + len(without)) if n not in without)
    # what the program numbers without gaps, the model numbers with them
    found = {layers[n]: error for n, error in refused.items()} | without
    return Survey(program, found, layers)


def _without_attention(program: Program) -> dict[int, CaptureError]:
    """Per layer of the model that has no attention of its own, that this is so."""
    missing = _layers_missing(program)
    if program.facts.layers != program.facts.expected_sites and program.facts.expected_sites and not missing:
        raise _miscounted(program, program.facts.layers)
    found = {}
    for layer, node in missing.items():
        error = CaptureError(
            f"layer {layer} has no attention: nothing in it keeps keys and values",
            where=f"layer {layer}: {node.meta['module']}",
            fix="kvpass rewrites models whose layers all attend; a state-space or a convolution layer has no KV cache",
            near=f"{program.facts.layers} of {program.facts.expected_sites} layers attend",
        )
        error.layer, error.node, error.source = layer, node.name, source_of(node)
        found[layer] = error
    return found


def _layers_missing(program: Program) -> dict[int, fx.Node]:
    """Layers in whose modules no attention stands, where modules are numbered as layers: with the node that mixes
    their tokens, where it is a convolution or a cumulative sum, else their first."""
    first: dict[int, fx.Node] = {}
    for node in program.forward.nodes:
        layer = layer_of(str(node.meta.get("module", "")))
        if layer is not None and (layer not in first or (_mixes(node) and not _mixes(first[layer]))):
            first[layer] = node
    sites = {layer_of(str(n.meta.get("module", ""))) for n in program.forward.nodes if n.target is ATTENTION}
    expected = program.facts.expected_sites
    if expected is None or set(first) != set(range(expected)) or not sites <= set(first):
        return {}
    return {layer: node for layer, node in sorted(first.items()) if layer not in sites}


def _mixes(node: fx.Node) -> bool:
    return any(word in str(node.target) for word in ("conv", "cumsum"))


def _capture_module(module: nn.Module, refused: dict[int, CaptureError] | None = None) -> Program:
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
            return _first_that_works(attempt, module.config, next(module.parameters()).dtype, refused)
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
    return _finish(Program({"forward": graph}, weights, facts), refused)


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
    said = {k: v for k, v in config.to_dict().items() if k not in _NAMES_ONLY}
    key = (type(config).__name__, json.dumps(said, sort_keys=True, default=str), dtype)
    if key not in _recent:
        found = _first_that_works(_builder(config, dtype), config, dtype)
        while len(_recent) >= _REMEMBERED:
            _recent.pop(next(iter(_recent)))
        _recent[key] = found
    program = _recent[key].copy()
    program.facts.config = config.to_dict()
    return program


def _builder(config: Any, dtype: torch.dtype) -> Any:
    def attempt(implementation: str) -> tuple[nn.Module, Any]:
        return huggingface.build(config, dtype, implementation), huggingface.call

    return attempt


_NAMES_ONLY = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
_REMEMBERED = 2
_recent: dict[Any, Program] = {}


def _first_that_works(
    attempt: Any, config: Any, dtype: torch.dtype, refused: dict[int, CaptureError] | None = None
) -> Program:
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
            return _finish(Program({"forward": graph}, weights, facts), refused)
        except KvpassError as error:
            problems.append(error)
            if refused is not None:
                refused.clear()
    told = [p for p in problems if "refused attn_implementation" not in p.what] or problems
    raise told[-1] if "passes `" in told[0].what else told[0]


def _finish(program: Program, refused: dict[int, CaptureError] | None = None) -> Program:
    """Raise attention, then hold the whole against what the model is known to have.

    With `refused`, layers that are refused are written there, and ones without attention left to the caller.
    """
    _check_logits(program)
    merge_equal(program.forward)
    found = raise_attention(program, refused)
    merge_equal(program.forward)
    expected = program.facts.expected_sites
    if expected is not None and found != expected and (refused is None or found == 0):
        raise _miscounted(program, found)
    if found == 0:
        raise CaptureError(
            "the model has no attention", where=program.facts.family, fix="there is no KV cache to rewrite"
        )
    program.facts.layers = found
    shapes = program.shapes()
    logits = shapes[output_node(program.forward)]
    program.facts.vocab_size = int(logits.shape[-1])
    return program


def _miscounted(program: Program, found: int) -> CaptureError:
    error = CaptureError(
        f"{found} attention sites were found in a model of {program.facts.expected_sites} layers",
        where=program.facts.family,
        fix="a layer's attention is spelled in a way that kvpass does not recognise, or has none; "
        "please report the family",
    )
    error.captured = found > 0
    return error


def _check_logits(program: Program) -> None:
    for batch, length in ((2, 5), (1, 1), (3, 8)):
        try:
            value = program.shapes("forward", batch, length)[output_node(program.forward)]
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            refused = CaptureError(
                f"the captured graph does not run on a batch of {batch} and a length of {length}: {error}",
                where=notes,
                fix="the model's code fixes a size; look for Python numbers made from a tensor's shape",
            )
            node = next((n for n in program.forward.nodes if f"%{n.name} :" in notes), None)
            if node is not None:
                refused.layer = layer_of(str(node.meta.get("module", "")))
                refused.node, refused.source = node.name, source_of(node)
            raise refused from error
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
