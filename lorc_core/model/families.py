"""One row per model type: where it keeps its attention and how that computes; and why others cannot be compressed.

Data, for `architecture` to read with a config in hand.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorc_core.errors import UnsupportedModelError

if TYPE_CHECKING:
    import transformers

# `rms_plus_one`: RMSNorm whose stored weight is its gain less one (Gemma); `layer_unbiased`: LayerNorm without a bias.
NormKind = Literal["rms", "rms_plus_one", "layer", "layer_unbiased"]
# One tensor for all three: whole W_q, W_k, W_v one after another, or for each kv head its query heads, key, value.
Fused = Literal["stacked", "grouped"]
# `model`: by the base model's rotary module; `layer_type`: by that, which has one basis per type of layer;
# `inside`: by the attention module itself, with GPT-J's fixed basis.
RotaryKind = Literal["model", "layer_type", "inside", "none"]


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its attention, relative to `model.base_model`, and how its modules compute.

    Attributes:
        attention: Path of a layer's attention module.
        norm: Path of the module whose output the projections read.
        norm_kind: Of that norm; None where there is none.
        projection: Name of a projection within the attention module; of the one tensor where they are fused.
        fused: How the rows of a fused tensor stand.
        transposed: Whether weights are stored (in, out), as by GPT-2's Conv1D.
        output: Name of W_o within the attention module.
        bias: Whether the projections have one: a config field, or the fact itself.
        qk_norm: Whether queries and keys are normalised after the projection: a config field, or the fact itself.
        rotary: What rotates queries and keys.
        interleaved: Whether neighbouring channels rotate as pairs; else channel i goes with channel i + half.
        partial: Whether only the first channels rotate, as `partial_rotary_factor` says.
        rotary_layers: Config list, true for the layers that rotate; None where all do.
        interface: Whether the module dispatches through transformers' attention interface.
        cache_argument: The keyword under which the module gets the cache.
        scaled: Whether a module without the interface scales its logits by head_dim ** -0.5.
        max_tokens: Config field of the longest input; the number itself where the config has none.
    """

    attention: str = "layers.{}.self_attn"
    norm: str = "layers.{}.input_layernorm"
    norm_kind: NormKind | None = "rms"
    projection: str = "{}_proj"
    fused: Fused | None = None
    transposed: bool = False
    output: str = "o_proj"
    bias: str | bool = False
    qk_norm: str | bool = False
    rotary: RotaryKind = "model"
    interleaved: bool = False
    partial: bool = False
    rotary_layers: str | None = None
    interface: bool = True
    cache_argument: str = "past_key_values"
    scaled: bool = True
    max_tokens: str | int = "max_position_embeddings"


FAMILIES = {
    "bloom": Family(
        "h.{}.self_attention",
        "h.{}.input_layernorm",
        "layer",
        "query_key_value",
        fused="grouped",
        output="dense",
        bias=True,
        rotary="none",
        interface=False,
        cache_argument="layer_past",
        max_tokens=2048,  # of the training; ALiBi itself has no end
    ),
    "cohere": Family(norm_kind="layer_unbiased", bias="attention_bias", qk_norm="use_qk_norm", interleaved=True),
    "falcon": Family(
        "h.{}.self_attention",
        "h.{}.input_layernorm",
        "layer",
        "query_key_value",
        fused="grouped",
        output="dense",
        bias="bias",
        interface=False,
        cache_argument="layer_past",
    ),
    "gemma": Family(norm_kind="rms_plus_one", bias="attention_bias"),
    "gemma2": Family(norm_kind="rms_plus_one", bias="attention_bias"),
    "gemma3_text": Family(norm_kind="rms_plus_one", bias="attention_bias", qk_norm=True, rotary="layer_type"),
    "gpt2": Family(
        "h.{}.attn",
        "h.{}.ln_1",
        "layer",
        "c_attn",
        fused="stacked",
        transposed=True,
        output="c_proj",
        bias=True,
        rotary="none",
    ),
    "gpt_neo": Family(
        "h.{}.attn.attention",
        "h.{}.ln_1",
        "layer",
        output="out_proj",
        rotary="none",
        interface=False,
        cache_argument="layer_past",
        scaled=False,
    ),
    "gpt_neox": Family(
        "layers.{}.attention",
        norm_kind="layer",
        projection="query_key_value",
        fused="grouped",
        output="dense",
        bias="attention_bias",
        partial=True,
        cache_argument="layer_past",
    ),
    "gptj": Family(
        "h.{}.attn",
        "h.{}.ln_1",
        "layer",
        output="out_proj",
        rotary="inside",
        interleaved=True,
        interface=False,
        cache_argument="layer_past",
    ),
    "granite": Family(bias="attention_bias"),
    "llama": Family(bias="attention_bias"),
    "mistral": Family(),
    "mixtral": Family(),
    "mpt": Family(
        "blocks.{}.attn",
        "blocks.{}.norm_1",
        "layer_unbiased",
        "Wqkv",
        fused="stacked",
        output="out_proj",
        rotary="none",
        interface=False,
        max_tokens="max_seq_len",
    ),
    "olmo2": Family(norm_kind=None, bias="attention_bias", qk_norm=True),
    "opt": Family(
        "decoder.layers.{}.self_attn",
        "decoder.layers.{}.self_attn_layer_norm",
        "layer",
        output="out_proj",
        bias="enable_bias",
        rotary="none",
    ),
    "phi": Family(norm_kind="layer", output="dense", bias=True, qk_norm="qk_layernorm", partial=True),
    "phi3": Family(projection="qkv_proj", fused="stacked", partial=True),
    "qwen2": Family(bias=True),
    "qwen3": Family(bias="attention_bias", qk_norm=True),
    "qwen3_moe": Family(bias="attention_bias", qk_norm=True),
    "smollm3": Family(bias="attention_bias", rotary_layers="no_rope_layers"),
    "stablelm": Family(norm_kind="layer", bias="use_qkv_bias", qk_norm="qk_layernorm", partial=True),
    "starcoder2": Family(norm_kind="layer", bias="use_bias"),
}

MLA = "multi-head latent attention caches low-rank latents already"
LINEAR = "layers with linear attention or a recurrent state have no keys and values to project"
SHARED = "layers share one cache across the model, which lorc would project twice"
SINKS = "learned attention sinks take part in the softmax, which lorc does not handle"
ENCODER_DECODER = "encoder-decoder models cache cross-attention too; lorc compresses decoders alone"
MULTIMODAL = "multimodal models hold their language model inside; compress that one alone"
CROSS_ATTENTION = "cross-attention has a cache of its own, which lorc does not handle"
BIDIRECTIONAL = "its attention is bidirectional, so there is no cache of past tokens"

REASONS = {
    MLA: "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa longcat_flash "
    "minicpm3 mistral4 youtu",
    LINEAR: "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba mamba2 "
    "minimax nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm zamba zamba2",
    SHARED: "gemma3n gemma3n_text gemma4 gemma4_text",
    SINKS: "deepseek_v4 flint gpt_oss granite_swa granitemoe_swa mimo_v2_flash",
}

RECURRENT_LAYERS = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}


def reason_unsupported(config: "transformers.PreTrainedConfig") -> str | None:
    """Why lorc cannot compress such a model, as far as it is known; None for what is merely not in `FAMILIES`."""
    for reason, model_types in REASONS.items():
        if config.model_type in model_types.split():
            return reason
    signs = {
        ENCODER_DECODER: getattr(config, "is_encoder_decoder", False),
        MLA: getattr(config, "kv_lora_rank", None),
        SHARED: getattr(config, "num_kv_shared_layers", None),
        MULTIMODAL: getattr(config, "text_config", None) is not None,
        CROSS_ATTENTION: getattr(config, "add_cross_attention", False),
        BIDIRECTIONAL: getattr(config, "use_bidirectional_attention", False),
        LINEAR: RECURRENT_LAYERS & set(getattr(config, "layer_types", None) or ()),
    }
    return next((reason for reason, sign in signs.items() if sign), None)


def family_of(config: "transformers.PreTrainedConfig") -> Family:
    """The row of a config's model type.

    Raises:
        UnsupportedModelError: It has none, or cannot have one; the message says why.
    """
    if reason := reason_unsupported(config):
        raise UnsupportedModelError(f"model type {config.model_type!r} is not supported: {reason}")
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is not supported: nobody has told lorc where it keeps its projections; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[config.model_type]
