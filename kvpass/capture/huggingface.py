"""Hugging Face decoders: a folder, a hub id or a model object -> a module whose attention calls the dialect's op.

transformers lets a library register an attention function and a mask function. Ours emit `kvpass::attention` with a
mask built by the model's own mask code, as a subgraph that is proved afterwards like any other
(`kvpass.capture.probe`). Families without that interface are captured with their eager attention and raised from there.
The model is built with fake parameters and real buffers, so a 70B model costs no more than its layers' Python objects.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvpass.errors import CaptureError, SourceError

IMPLEMENTATION = "kvpass"

_IGNORED_ARGUMENTS = {
    # what transformers passes along for other implementations; none changes the result here
    "is_causal", "dropout", "sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "past_key_value", "past_key_values", "output_router_logits",
    "num_items_in_batch", "layer_idx", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
    "max_length_k", "deterministic", "target_dtype", "implementation", "layer_head_mask", "head_mask",
}  # fmt: skip


def _attention(
    module: nn.Module,
    query: Tensor,  # [B, H, S, D]
    key: Tensor,  # [B, Hkv, S, D]
    value: Tensor,  # [B, Hkv, S, Dv]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that capture registers with transformers; layout as transformers wants it back:
    [B,S,H,Dv]."""
    for name, given in kwargs.items():
        if name not in _IGNORED_ARGUMENTS and given is not None and not isinstance(given, bool):
            raise CaptureError(
                f"{type(module).__name__} passes `{name}` to its attention, and kvpass does not know what it means",
                where=type(module).__name__,
                fix="capture it with attn_implementation='eager'",
            )
    if attention_mask is None and not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise CaptureError(f"{type(module).__name__} attends in both directions", fix="kvpass needs a causal decoder")
    out = torch.ops.kvpass.attention(
        query,
        key,
        value,
        s_aux,
        None,
        attention_mask,
        scale=float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        causal=attention_mask is None,
        softcap=float(softcap or 0.0),
        layer=int(getattr(module, "layer_idx", None) or 0),
    )
    return out.transpose(1, 2), None


def _mask(*args: Any, allow_is_causal_skip: bool = True, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """The mask function: the model's own mask, always as a boolean tensor. The capture has no padding, so none
    enters."""
    from transformers.masking_utils import sdpa_mask

    kwargs.pop("allow_is_bidirectional_skip", None)
    return sdpa_mask(*args, allow_is_causal_skip=False, attention_mask=None, **kwargs)


def register() -> None:
    """Make `attn_implementation="kvpass"` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    import kvpass.ir.ops  # noqa: F401

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


@contextlib.contextmanager
def _fake_parameters() -> Iterator[None]:
    """Modules made inside have parameters without storage (fake tensors on the CPU) and real buffers."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from transformers.initialization import no_init_weights

    original = nn.Module.register_parameter
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())

    def fake(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not isinstance(param, FakeTensor):
            with mode:
                empty = torch.empty(param.shape, dtype=param.dtype)
            param = nn.Parameter(empty, requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = fake  # type: ignore[method-assign]
    try:
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def read_config(source: str) -> Any:
    """The config of a model folder or hub id.

    Raises:
        SourceError: there is no config, or no causal language model for it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    looks_like_a_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_a_path and not Path(source).is_dir():
        raise SourceError(
            f"there is no folder {str(Path(source).absolute())!r}",
            where=source,
            fix="give a folder with config.json and *.safetensors; relative ones are looked up from where you are",
        )
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        told = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise SourceError(
            f"no Hugging Face model can be read from {source!r}: {told}",
            where=str(source),
            fix="give a folder with config.json and *.safetensors, or the id of a model that `hf download` has fetched",
        ) from error
    return config


def build(config: Any, dtype: torch.dtype, implementation: str) -> nn.Module:
    """A model of that config: parameters without storage, buffers real.

    Raises:
        CaptureError: the config is not of a causal decoder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    check_decoder(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CaptureError(
            f"transformers has no causal language model for model_type {config.model_type!r}",
            where="config.json",
            fix="kvpass rewrites decoder-only language models; an encoder has no KV cache to shrink",
        )
    register()
    options: dict[str, Any] = {"attn_implementation": implementation, "dtype": dtype}
    if _has_experts(config):
        options["experts_implementation"] = "grouped_mm"
    with _fake_parameters():
        try:
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
        except ValueError as error:
            if "experts implementation" not in str(error):
                raise
            del options["experts_implementation"]  # its experts are spelled in one way only
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
    model.tie_weights()
    return model.eval()


def check_decoder(config: Any) -> None:
    """Refuse encoders and encoder-decoders by name."""
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(
            f"{config.model_type} is an encoder-decoder; its cross-attention cache is not what kvpass rewrites",
            where="config.json: is_encoder_decoder",
            fix="give a decoder-only causal language model",
        )
    names = getattr(config, "architectures", None) or []
    decodes = any("CausalLM" in n or "LMHead" in n or "ForConditionalGeneration" in n for n in names)
    other = all("Masked" in n or n.endswith("Model") or "Classification" in n or "Encoder" in n for n in names)
    if names and not decodes and other:
        raise CaptureError(
            f"{names[0]} is not a causal language model",
            where="config.json: architectures",
            fix="give a decoder-only causal language model, with its language-model head",
        )


def _has_experts(config: Any) -> bool:
    return any(getattr(config, n, None) for n in ("num_local_experts", "num_experts", "n_routed_experts"))


def call(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits of a Hugging Face model without cache; the attention mask of ones says that nothing is padded."""
    logits: Tensor = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
    return logits
