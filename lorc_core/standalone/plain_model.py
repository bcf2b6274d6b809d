"""Models whose attention runs at a smaller head size than their own, and whose caches hold heads of that size.

`lorc export --plain` copies this file beside such a model's weights. It needs torch and transformers alone:
`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`. In the config, `head_dim` is the size of cached
heads, R; `lorc_plain` has the size of the heads that are rotated, D, and says whether `o_proj` has a bias.

Shapes: B batch, H query heads, G kv heads, Q new tokens, I hidden size.
"""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2Model,
    OPTConfig,
    OPTForCausalLM,
    OPTModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SmolLM3Model,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.granite.modeling_granite import GraniteAttention
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as olmo2_rotary_pos_emb
from transformers.models.opt.modeling_opt import OPTAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention


def full_size(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with the head size that queries and keys are rotated at."""
    full = copy.copy(config)
    full.head_dim = config.lorc_plain["rotated_head_dim"]
    return full


class PlainAttention(nn.Module):
    """Mixed into an attention class with rotary embedding: queries and keys are projected after the rotation.

    A cached key is k @ key_down, which the query q @ query_up reads; `v_proj` gives heads of R, `o_proj` takes them.
    """

    rotate: ClassVar[Callable[..., tuple[Tensor, Tensor]]] = staticmethod(apply_rotary_pos_emb)
    norms_all_heads: ClassVar[bool] = False  # in one, not each head
    use_rope: Any = True
    sliding_window: Any = None
    # typed anew, for the classes that this is mixed into differ
    config: Any
    layer_idx: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(full_size(config), layer_idx)  # its scaling is that of D too
        self.config = config
        num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * config.head_dim, self.v_proj.bias is not None)
        self.o_proj = nn.Linear(num_heads * config.head_dim, config.hidden_size, config.lorc_plain["output_bias"])
        shape = (self.num_kv_heads, config.lorc_plain["rotated_head_dim"], config.head_dim)
        self.query_up = nn.Parameter(torch.empty(shape))
        self.key_down = nn.Parameter(torch.empty(shape))

    def forward(
        self,
        hidden_states: Tensor,  # (B, Q, I)
        position_embeddings: Any = None,  # cosines and sines, (B, Q, D) each
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers' own, but for the two products and the size of heads from there on."""
        query = self._heads(self.q_proj(hidden_states), "q_norm")  # (B, H, Q, D)
        key = self._heads(self.k_proj(hidden_states), "k_norm")  # (B, G, Q, D)
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)  # (B, G, Q, R)
        if self.use_rope:
            query, key = self.rotate(query, key, *position_embeddings)
        query = (query.unflatten(1, (self.num_kv_heads, -1)) @ self.query_up[:, None]).flatten(1, 2)  # (B, H, Q, R)
        key = key @ self.key_down  # (B, G, Q, R)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def _heads(self, states: Tensor, norm_name: str) -> Tensor:
        """Queries or keys by head, normalised where the model does that."""
        norm = getattr(self, norm_name, nn.Identity())
        if self.norms_all_heads:
            return norm(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return norm(states.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)


class PlainModel(PreTrainedModel):
    """Mixed into a model class, with or without a language model's head: its attention is `attention_class`."""

    config_class: type[PreTrainedConfig]
    attention_class: ClassVar[type[nn.Module]]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        decoder = self.get_decoder()
        for layer_idx, layer in enumerate(decoder.layers):
            layer.self_attn = self.attention_class(config, layer_idx)
        if hasattr(decoder, "rotary_emb"):
            decoder.rotary_emb = type(decoder.rotary_emb)(full_size(config))


def plain_config(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of a plain model.

    Its plan for tensor parallelism is empty: the model's own splits heads, but not `query_up` and `key_down`.
    """
    names = {"model_type": f"lorc_plain_{base.model_type}", "base_model_tp_plan": {}, "__module__": __name__}
    return type(f"Plain{base.__name__}", (base,), names)


PlainGraniteConfig = plain_config(GraniteConfig)
PlainLlamaConfig = plain_config(LlamaConfig)
PlainMistralConfig = plain_config(MistralConfig)
PlainOlmo2Config = plain_config(Olmo2Config)
PlainOPTConfig = plain_config(OPTConfig)
PlainQwen2Config = plain_config(Qwen2Config)
PlainQwen3Config = plain_config(Qwen3Config)
PlainSmolLM3Config = plain_config(SmolLM3Config)


def plain_attention(base: type[nn.Module]) -> type[nn.Module]:
    """The attention class of a plain model that differs from others in its base alone."""
    return type(f"Plain{base.__name__}", (PlainAttention, base), {"__module__": __name__})


PlainGraniteAttention = plain_attention(GraniteAttention)
PlainLlamaAttention = plain_attention(LlamaAttention)
PlainQwen2Attention = plain_attention(Qwen2Attention)
PlainQwen3Attention = plain_attention(Qwen3Attention)
PlainSmolLM3Attention = plain_attention(SmolLM3Attention)


class PlainMistralAttention(PlainAttention, MistralAttention):
    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window


class PlainOlmo2Attention(PlainAttention, Olmo2Attention):
    rotate = staticmethod(olmo2_rotary_pos_emb)
    norms_all_heads = True


class PlainOPTAttention(OPTAttention):
    """Nothing is rotated, so the weights take in everything, and the attention is transformers' own."""

    def __init__(self, config: OPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # its scaling is that of D
        self.head_dim = config.head_dim
        width = self.num_heads * self.head_dim
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(self.embed_dim, width, config.enable_bias))
        self.out_proj = nn.Linear(width, self.embed_dim, config.lorc_plain["output_bias"])


def plain_model(
    base: type[PreTrainedModel], config: type[PreTrainedConfig], attention: type[nn.Module]
) -> type[PlainModel]:
    """The class of a plain model; a checkpoint's `auto_map` finds it, and its config's, by name in this file."""
    names = {"config_class": config, "attention_class": attention, "__module__": __name__}
    return type(f"Plain{base.__name__}", (PlainModel, base), names)


PlainGraniteModel = plain_model(GraniteModel, PlainGraniteConfig, PlainGraniteAttention)
PlainGraniteForCausalLM = plain_model(GraniteForCausalLM, PlainGraniteConfig, PlainGraniteAttention)
PlainLlamaModel = plain_model(LlamaModel, PlainLlamaConfig, PlainLlamaAttention)
PlainLlamaForCausalLM = plain_model(LlamaForCausalLM, PlainLlamaConfig, PlainLlamaAttention)
PlainMistralModel = plain_model(MistralModel, PlainMistralConfig, PlainMistralAttention)
PlainMistralForCausalLM = plain_model(MistralForCausalLM, PlainMistralConfig, PlainMistralAttention)
PlainOlmo2Model = plain_model(Olmo2Model, PlainOlmo2Config, PlainOlmo2Attention)
PlainOlmo2ForCausalLM = plain_model(Olmo2ForCausalLM, PlainOlmo2Config, PlainOlmo2Attention)
PlainOPTModel = plain_model(OPTModel, PlainOPTConfig, PlainOPTAttention)
PlainOPTForCausalLM = plain_model(OPTForCausalLM, PlainOPTConfig, PlainOPTAttention)
PlainQwen2Model = plain_model(Qwen2Model, PlainQwen2Config, PlainQwen2Attention)
PlainQwen2ForCausalLM = plain_model(Qwen2ForCausalLM, PlainQwen2Config, PlainQwen2Attention)
PlainQwen3Model = plain_model(Qwen3Model, PlainQwen3Config, PlainQwen3Attention)
PlainQwen3ForCausalLM = plain_model(Qwen3ForCausalLM, PlainQwen3Config, PlainQwen3Attention)
PlainSmolLM3Model = plain_model(SmolLM3Model, PlainSmolLM3Config, PlainSmolLM3Attention)
PlainSmolLM3ForCausalLM = plain_model(SmolLM3ForCausalLM, PlainSmolLM3Config, PlainSmolLM3Attention)


def by_model_type(*models: type[PlainModel]) -> dict[str, type[PlainModel]]:
    """Models by the `model_type` of their configs."""
    return {model.config_class.model_type: model for model in models}


MODELS = by_model_type(
    PlainGraniteForCausalLM,
    PlainLlamaForCausalLM,
    PlainMistralForCausalLM,
    PlainOlmo2ForCausalLM,
    PlainOPTForCausalLM,
    PlainQwen2ForCausalLM,
    PlainQwen3ForCausalLM,
    PlainSmolLM3ForCausalLM,
)
# What `AutoModel` builds: engines such as vLLM take these, and put their own head on them.
BASE_MODELS = by_model_type(
    PlainGraniteModel,
    PlainLlamaModel,
    PlainMistralModel,
    PlainOlmo2Model,
    PlainOPTModel,
    PlainQwen2Model,
    PlainQwen3Model,
    PlainSmolLM3Model,
)
