"""Tiny random causal decoders of the `transformers` library, one entry per attention mechanism.

`build(name)` gives a float32 model in eval mode whose parameters are all non-trivial, so that a wrong rewrite
of any of them shows in the logits (a key bias without rotary embedding excepted: the softmax cancels it).
Vocabulary 97, 128 positions, windows and chunks of 4 to 6 tokens. Each family's own cached decode equals its
forward to 1e-4. Where every layer has a window (mistral, starcoder2, phi3_window) token 0 reaches token 8 only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

ConfigT = TypeVar("ConfigT", bound=PretrainedConfig)


@dataclass(frozen=True)
class Family:
    """A tiny configuration and free-form labels of the mechanisms it exercises."""

    name: str
    config: Callable[[], PretrainedConfig]
    traits: frozenset[str]


FAMILIES: dict[str, Family] = {}

VOCAB = 97
POSITIONS = 128
IDS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA: dict[str, Any] = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
# For configurations that know no key/value heads of their own.
NEOX: dict[str, Any] = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GPT: dict[str, Any] = {
    **IDS,
    "n_positions": POSITIONS,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
WINDOW_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _add(name: str, traits: str, config: Callable[[], PretrainedConfig]) -> None:
    FAMILIES[name] = Family(name, config, frozenset(traits.split()))


def _like(base: dict[str, Any], cls: type[ConfigT], **changes: Any) -> Callable[[], ConfigT]:
    return lambda: cls(**{**base, **changes})


def _llama(cls: type[ConfigT], **changes: Any) -> Callable[[], ConfigT]:
    return _like(LLAMA, cls, **changes)


# --- the llama line: separate projections, half-split rotary, RMS norm -------------------------------------

_add("llama", "gqa rope", _llama(hf.LlamaConfig))
_add(
    "llama_mha",
    "mha rope bias",
    _llama(
        hf.LlamaConfig,
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=8,
        attention_bias=True,
        mlp_bias=True,
    ),
)
_add("llama_mqa", "mqa rope tied", _llama(hf.LlamaConfig, num_key_value_heads=1, tie_word_embeddings=True))
_add("mistral", "gqa rope window", _llama(hf.MistralConfig, sliding_window=5))
_add("mistral_full", "gqa rope", _llama(hf.MistralConfig, sliding_window=None))
_add(
    "ministral",
    "gqa rope window",
    _llama(hf.MinistralConfig, num_hidden_layers=4, head_dim=8, sliding_window=5, layer_types=WINDOW_FULL),
)
_add("qwen2", "gqa rope bias", _llama(hf.Qwen2Config))
_add(
    "qwen2_window",
    "gqa rope bias window",
    _llama(
        hf.Qwen2Config,
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    ),
)
_add("qwen3", "gqa rope qk_norm", _llama(hf.Qwen3Config, head_dim=16))
_add("seed_oss", "gqa rope bias", _llama(hf.SeedOssConfig, head_dim=16, attention_dropout=0.0, residual_dropout=0.0))
_add("arcee", "gqa rope", _llama(hf.ArceeConfig))
_add("bitnet", "gqa rope", _llama(hf.BitNetConfig))
_add("apertus", "gqa rope qk_norm", _llama(hf.ApertusConfig))
# The norms come after rotary here, not before it.
_add("hunyuan_v1_dense", "gqa rope qk_norm post_rope_norm", _llama(hf.HunYuanDenseV1Config, head_dim=8))
_add(
    "granite",
    "gqa rope scaled",
    _llama(
        hf.GraniteConfig,
        attention_multiplier=0.5,
        embedding_multiplier=1.5,
        residual_multiplier=0.7,
        logits_scaling=1.3,
    ),
)
_add("smollm3", "gqa rope nope tied", _llama(hf.SmolLM3Config, num_hidden_layers=4, no_rope_layer_interval=2))
_add(
    "exaone4",
    "gqa rope nope qk_norm window",
    _llama(hf.Exaone4Config, num_hidden_layers=4, sliding_window=5, sliding_window_pattern=2),
)
_add("olmo", "gqa rope clip", _llama(hf.OlmoConfig, clip_qkv=1.5))
_add("olmo2", "gqa rope qk_norm flat_qk_norm post_norm", _llama(hf.Olmo2Config))
_add(
    "olmo3",
    "gqa rope qk_norm flat_qk_norm post_norm window",
    _llama(hf.Olmo3Config, num_hidden_layers=4, sliding_window=5, layer_types=WINDOW_FULL),
)
_add(
    "starcoder2",
    "gqa rope bias window tied",
    _llama(hf.Starcoder2Config, sliding_window=5, residual_dropout=0.0, embedding_dropout=0.0),
)
_add("phi3", "gqa rope fused_qkv", _llama(hf.Phi3Config, original_max_position_embeddings=POSITIONS))
_add(
    "phi3_window",
    "gqa rope fused_qkv window partial_rope",
    _llama(
        hf.Phi3Config,
        original_max_position_embeddings=POSITIONS,
        sliding_window=5,
        partial_rotary_factor=0.5,
    ),
)

# --- adjacent-pair rotary ----------------------------------------------------------------------------------

_add("helium", "gqa interleaved_rope", _llama(hf.HeliumConfig, head_dim=8))
_add("ernie4_5", "gqa interleaved_rope tied bias", _llama(hf.Ernie4_5Config, head_dim=8, use_bias=True))
_add("cohere", "gqa interleaved_rope parallel tied", _llama(hf.CohereConfig, logit_scale=0.5))
_add(
    "cohere_qk_norm",
    "gqa interleaved_rope parallel tied qk_norm",
    _llama(hf.CohereConfig, logit_scale=0.5, use_qk_norm=True),
)
_add(
    "cohere2",
    "gqa interleaved_rope nope parallel tied window",
    _llama(hf.Cohere2Config, num_hidden_layers=4, logit_scale=0.5, sliding_window=5, layer_types=WINDOW_FULL),
)
_add("glm", "gqa interleaved_rope partial_rope bias", _llama(hf.GlmConfig, head_dim=8, attention_bias=True))
_add("gptj", "mha interleaved_rope partial_rope parallel", _like(GPT, hf.GPTJConfig, rotary_dim=4))
_add(
    "codegen",
    "mha interleaved_rope partial_rope parallel fused_qkv",
    _like(GPT, hf.CodeGenConfig, n_ctx=POSITIONS, n_embd=64, rotary_dim=8),
)

# --- gemma -------------------------------------------------------------------------------------------------

_add("gemma", "mqa rope tied", _llama(hf.GemmaConfig, head_dim=8, num_key_value_heads=1))
_add(
    "gemma2",
    "gqa rope tied softcap window post_norm",
    _llama(
        hf.Gemma2Config,
        num_hidden_layers=4,
        head_dim=16,
        query_pre_attn_scalar=12,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=10.0,
    ),
)
_add(
    "gemma3_text",
    "gqa rope tied qk_norm window post_norm",
    _llama(
        hf.Gemma3TextConfig,
        num_hidden_layers=4,
        head_dim=16,
        query_pre_attn_scalar=12,
        sliding_window=5,
        sliding_window_pattern=2,
    ),
)

# --- rotary on part of each head ---------------------------------------------------------------------------

_add("phi", "gqa rope partial_rope parallel bias", _llama(hf.PhiConfig, partial_rotary_factor=0.5))
_add(
    "phi_qk_norm",
    "mha rope partial_rope parallel bias qk_norm",
    _llama(hf.PhiConfig, num_key_value_heads=4, qk_layernorm=True),
)
_add("stablelm", "gqa rope partial_rope bias", _llama(hf.StableLmConfig, partial_rotary_factor=0.25, use_qkv_bias=True))
_add(
    "stablelm_qk_norm",
    "gqa rope partial_rope qk_norm parallel",
    _llama(
        hf.StableLmConfig,
        hidden_size=64,
        partial_rotary_factor=0.25,
        qk_layernorm=True,
        use_parallel_residual=True,
    ),
)
_add("persimmon", "mha rope partial_rope qk_norm bias fused_qkv", _like(NEOX, hf.PersimmonConfig, qk_layernorm=True))
_add("nemotron", "gqa rope partial_rope", _llama(hf.NemotronConfig, head_dim=8))
_add("gpt_neox", "mha rope partial_rope fused_qkv bias parallel", _like(NEOX, hf.GPTNeoXConfig, hidden_size=64))
_add(
    "gpt_neox_sequential",
    "mha rope fused_qkv bias",
    _like(NEOX, hf.GPTNeoXConfig, use_parallel_residual=False, rotary_pct=1.0),
)

# --- learned positions -------------------------------------------------------------------------------------

_add("gpt2", "mha learned_positions conv1d fused_qkv bias tied", _like(GPT, hf.GPT2Config))
_add(
    "gpt2_layer_scale",
    "mha learned_positions conv1d fused_qkv bias tied scaled",
    _like(GPT, hf.GPT2Config, n_layer=3, scale_attn_by_inverse_layer_idx=True),
)
_add(
    "gpt_bigcode",
    "mqa learned_positions fused_qkv bias tied",
    _like(GPT, hf.GPTBigCodeConfig, multi_query=True),
)
_add(
    "gpt_neo",
    "mha learned_positions window unscaled bias tied",
    lambda: hf.GPTNeoConfig(
        **IDS,
        hidden_size=32,
        intermediate_size=64,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
        max_position_embeddings=POSITIONS,
    ),
)
_add(
    "opt",
    "mha learned_positions bias tied",
    lambda: hf.OPTConfig(
        **IDS,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
    ),
)
_add(
    "biogpt",
    "mha learned_positions bias tied",
    lambda: hf.BioGptConfig(
        **IDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
)
_add(
    "xglm",
    "mha sinusoidal_positions bias tied",
    lambda: hf.XGLMConfig(
        **IDS,
        d_model=32,
        ffn_dim=64,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
    ),
)

# --- linear biases, falcon ---------------------------------------------------------------------------------

_add(
    "bloom",
    "mha alibi fused_qkv bias tied",
    lambda: hf.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4),
)
_add(
    "mpt",
    "mha alibi fused_qkv tied",
    lambda: hf.MptConfig(
        **IDS,
        d_model=32,
        n_heads=4,
        n_layers=2,
        expansion_ratio=2,
        max_seq_len=POSITIONS,
        use_cache=True,
    ),
)
FALCON: dict[str, Any] = {
    **IDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "max_position_embeddings": POSITIONS,
}
_add(
    "falcon",
    "gqa rope fused_qkv parallel tied",
    _like(FALCON, hf.FalconConfig, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=2),
)
_add(
    "falcon_mqa",
    "mqa rope fused_qkv parallel tied",
    _like(FALCON, hf.FalconConfig, new_decoder_architecture=False, multi_query=True, alibi=False),
)
# With attn_implementation="eager" the library adds the linear bias twice (to the scores and in the mask), so the
# logits differ from those of the default sdpa; each is consistent with its own cached decode.
_add(
    "falcon_mqa_alibi",
    "mqa alibi fused_qkv parallel bias tied",
    _like(FALCON, hf.FalconConfig, new_decoder_architecture=False, multi_query=True, alibi=True, bias=True),
)
_add(
    "falcon_mha_alibi",
    "mha alibi fused_qkv bias tied",
    _like(FALCON, hf.FalconConfig, multi_query=False, alibi=True, bias=True, parallel_attn=False),
)

# --- mixtures of experts -----------------------------------------------------------------------------------
# build(name, experts_implementation="batched_mm") exports to plain aten; the default "grouped_mm" exports to an
# operator of the library on CPU, "eager" does not export. llama4_text has one dense implementation only.

_add(
    "mixtral",
    "gqa rope moe",
    _llama(hf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
)
_add(
    "qwen3_moe",
    "gqa rope qk_norm moe",
    _llama(
        hf.Qwen3MoeConfig,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
)
_add("olmoe", "gqa rope qk_norm flat_qk_norm moe", _llama(hf.OlmoeConfig, num_experts=4, num_experts_per_tok=2))
_add(
    "gpt_oss",
    "gqa rope sinks window moe bias",
    _llama(
        hf.GptOssConfig,
        num_hidden_layers=4,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": POSITIONS // 4,
        },
    ),
)
_add(
    "llama4_text",
    "gqa interleaved_rope nope qk_norm chunked moe scaled",
    _llama(
        hf.Llama4TextConfig,
        num_hidden_layers=4,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=2,
        attention_chunk_size=6,
        floor_scale=4,
    ),
)
DEEPSEEK: dict[str, Any] = {
    **LLAMA,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
_add(
    "deepseek_v3",
    "mla interleaved_rope moe",
    _like(DEEPSEEK, hf.DeepseekV3Config, q_lora_rank=16, n_group=2, topk_group=1, routed_scaling_factor=1.5),
)
_add(
    "deepseek_v2",
    "mla interleaved_rope moe",
    _like(DEEPSEEK, hf.DeepseekV2Config, q_lora_rank=None, topk_method="greedy", n_group=None, topk_group=None),
)


# --- building ----------------------------------------------------------------------------------------------


def build(name: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """The family's model with random parameters; overrides are set on the configuration.

    `attn_implementation` and `experts_implementation` may be given too. Lists with one item per layer are
    repeated or cut to fit `num_hidden_layers`.
    """
    config = FAMILIES[name].config()
    options = {k: overrides.pop(k) for k in ("attn_implementation", "experts_implementation") if k in overrides}
    if "softcap" in FAMILIES[name].traits:  # some versions of transformers drop the soft-cap everywhere else
        options.setdefault("attn_implementation", "eager")
    for key, value in overrides.items():
        setattr(config, key, value)
    for key in ("layer_types", "no_rope_layers", "mlp_layer_types", "attention_layers"):
        per_layer = getattr(config, key, None)
        if isinstance(per_layer, list) and per_layer and key not in overrides:
            layers = config.num_hidden_layers
            setattr(config, key, [per_layer[i % len(per_layer)] for i in range(layers)])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew: gains 0.2 around their neutral value, biases and sinks off 0, sharp attention."""
    gen = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in model.modules():
        kind = type(module).__name__
        for name, p in module.named_parameters(recurse=False):
            if id(p) in done:
                continue
            done.add(id(p))
            noise = torch.randn(p.shape, generator=gen)
            if "Norm" in kind and name == "weight":
                # Some norms multiply by 1 + weight: their neutral weight is 0.
                neutral = 0.0 if kind.endswith("LayerNorm1P") else p.mean().round()
                p.copy_(neutral + 0.2 * noise)
            elif "bias" in name:
                p.copy_(0.1 * noise)
            elif "sinks" in name:
                p.copy_(noise)
            elif p.dim() == 1:
                p.copy_(p + 0.2 * noise)
            elif isinstance(module, nn.Embedding):
                p.copy_(0.6 * noise)
            else:
                fan_in = p.shape[0] if kind == "Conv1D" else p.shape[-1]
                p.copy_(noise * min(max(1.4 / math.sqrt(fan_in), 0.15), 0.3))
        for name, b in module.named_buffers(recurse=False):
            if name == "e_score_correction_bias":
                b.copy_(0.1 * torch.randn(b.shape, generator=gen))
