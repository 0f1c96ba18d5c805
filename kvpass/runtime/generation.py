"""Hugging Face generation over a transformed model: its samplers, beams and stopping rules, our cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvpass.runtime.state import State

if TYPE_CHECKING:
    from kvpass.runtime.transformed import Transformed


class StateCache:
    """What generation carries from step to step: the state, and how many columns of its token matrix it has seen."""

    is_compileable = False

    def __init__(self, state: State, seen: int) -> None:
        self.state = state
        self.seen = seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the token matrix that are in the cache, padding included."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.state.select(beam_idx.to(self.state.lengths.device))


class DecoderForGeneration(PreTrainedModel, GenerationMixin):
    """The face that `generate` wants: padded prompts in, last logits out."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"
    _supports_cache_class = True

    def __init__(self, transformed: Transformed, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.anchor = torch.nn.Parameter(torch.zeros(1, device=transformed.device), requires_grad=False)
        self._transformed = [transformed]  # in a list, so that its weights are not this module's too
        self.room = 0

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes the cache

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The columns that the cache has not seen."""
        cache = kwargs.get("past_key_values")
        fresh = input_ids if cache is None else input_ids[:, cache.seen :]
        return {"input_ids": fresh, "attention_mask": kwargs.get("attention_mask"), "past_key_values": cache}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One step of generation; the first takes the whole prompt, padded on either side."""
        model = self._transformed[0]
        if past_key_values is None:
            ids, lengths = right_padded(input_ids, attention_mask)
            logits, state = model.prefill(ids, lengths, capacity=max(self.room, int(ids.shape[1])))
            cache = StateCache(state, int(input_ids.shape[1]))
            return CausalLMOutputWithPast(logits=logits.unsqueeze(1), past_key_values=cache)
        logits = model.decode(input_ids, past_key_values.state)
        past_key_values.seen += int(input_ids.shape[1])
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def right_padded(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows moved to the left edge, and their lengths; None when no row is padded."""
    if attention_mask is None or bool(attention_mask.bool().all()):
        return input_ids, None
    seen = attention_mask.bool()
    order = (~seen).long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), seen.sum(dim=1)


def config_for_generation(facts_config: dict[str, Any] | None, vocab_size: int) -> PretrainedConfig:
    """A config with what generation reads."""
    keep = ("bos_token_id", "eos_token_id", "pad_token_id")
    given = {k: v for k, v in (facts_config or {}).items() if k in keep}
    config = PretrainedConfig(**given)
    config.vocab_size = vocab_size
    return config


def generation_config(folder: str | None, config: PretrainedConfig) -> GenerationConfig:
    """The model's own generation config, where its folder has one."""
    if folder is not None:
        try:
            return GenerationConfig.from_pretrained(folder)
        except OSError:  # a model without one; the token ids of its config are what there is
            pass
    return GenerationConfig.from_model_config(config)
