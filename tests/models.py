"""A tiny random model of every supported family that feels its cache, its biases and its norms' gains."""

import shutil

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from lorc_core.model.families import FAMILIES
from tests.paths import DEMO

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# At transformers' default initializer_range of 0.02 a model does not feel its cache: removing half of the key
# space changes its logits by 0.3 %. At 0.1 it changes them by 23 %.
SIZES = {
    "initializer_range": 0.1,
    "vocab_size": 1024,  # the demo tokenizer's
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TINY = SIZES | SPECIAL
DENSE = TINY | {"intermediate_size": 96, "max_position_embeddings": 64}
GQA = DENSE | {"num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.2, 1.4, 1.5],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 32,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}

CONFIGS = {
    "llama-mha": LlamaConfig(**DENSE, attention_bias=True),
    "llama": LlamaConfig(**GQA),
    "llama-mqa": LlamaConfig(**DENSE, num_key_value_heads=1, head_dim=8),
    "llama-linear": LlamaConfig(**GQA, rope_parameters=LINEAR),
    "llama-dynamic": LlamaConfig(**GQA, rope_parameters=DYNAMIC),
    "llama-yarn": LlamaConfig(**GQA, rope_parameters=YARN),
    "llama-llama3": LlamaConfig(**DENSE, num_key_value_heads=1, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**GQA, sliding_window=12),
    "mixtral": MixtralConfig(**GQA, **EXPERTS, sliding_window=12),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**GQA, head_dim=8),
    "qwen3_moe": Qwen3MoeConfig(
        **GQA, head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, attention_bias=True
    ),
    "gemma": GemmaConfig(**GQA, head_dim=8),
    "gemma2": Gemma2Config(
        **GQA, **ALTERNATING, head_dim=8, query_pre_attn_scalar=12, attn_logit_softcapping=5.0, attention_bias=True
    ),
    "gemma3_text": Gemma3TextConfig(
        **GQA, **ALTERNATING, head_dim=8, query_pre_attn_scalar=12, rope_parameters=TWO_BASES
    ),
    "phi": PhiConfig(**GQA, rope_parameters=PARTIAL),
    "phi-qk-norm": PhiConfig(**DENSE, rope_parameters=PARTIAL, qk_layernorm=True),
    "phi3": Phi3Config(**GQA, sliding_window=12),
    "phi3-longrope": Phi3Config(**GQA, rope_parameters=LONGROPE, original_max_position_embeddings=32),
    "gpt2": GPT2Config(**TINY, n_positions=64),
    "gpt_neo": GPTNeoConfig(
        **(
            SPECIAL | {"initializer_range": 0.1, "vocab_size": 1024, "hidden_size": 64, "num_layers": 3, "num_heads": 4}
        ),
        attention_types=[[["global", "local", "global"], 1]],
        window_size=8,
        max_position_embeddings=64,
    ),
    "gpt_neox": GPTNeoXConfig(**DENSE, rope_parameters=PARTIAL),
    "gpt_neox-yarn": GPTNeoXConfig(**DENSE, rope_parameters=YARN | {"partial_rotary_factor": 0.5}),
    "gptj": GPTJConfig(**TINY, rotary_dim=8, n_positions=64),
    "opt": OPTConfig(
        **(SPECIAL | SIZES), ffn_dim=96, word_embed_proj_dim=64, dropout=0.0, max_position_embeddings=64, init_std=0.1
    ),
    "bloom": BloomConfig(**TINY),
    "falcon": FalconConfig(**TINY, ffn_hidden_size=96, max_position_embeddings=64),
    "falcon-yarn": FalconConfig(
        **TINY, ffn_hidden_size=96, max_position_embeddings=64, multi_query=False, bias=True, rope_parameters=YARN
    ),
    "falcon-alibi": FalconConfig(
        **TINY, ffn_hidden_size=96, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "falcon-new": FalconConfig(
        **TINY, ffn_hidden_size=96, max_position_embeddings=64, new_decoder_architecture=True, num_kv_heads=2
    ),
    "mpt": MptConfig(**TINY, max_seq_len=64),
    "mpt-clipped": MptConfig(**TINY, max_seq_len=64, attn_config={"clip_qkv": 1.0, "softmax_scale": 0.7}),
    "stablelm": StableLmConfig(**GQA, rope_parameters=PARTIAL, use_qkv_bias=True),
    "stablelm-qk-norm": StableLmConfig(**GQA, rope_parameters=PARTIAL, qk_layernorm=True, use_parallel_residual=True),
    "cohere": CohereConfig(**GQA, logit_scale=1.0),
    "cohere-qk-norm": CohereConfig(**GQA, logit_scale=1.0, use_qk_norm=True, attention_bias=True),
    "olmo2": Olmo2Config(**GQA),
    "starcoder2": Starcoder2Config(**GQA, sliding_window=12),
    "granite": GraniteConfig(**GQA, attention_multiplier=0.3, residual_multiplier=0.8, attention_bias=True),
    "smollm3": SmolLM3Config(**GQA, no_rope_layers=[1, 0, 1]),
}
# grouped heads, as many heads with biases, one kv head under scaled frequencies, a window, biases, no rotation
REPRESENTATIVES = ("llama", "llama-mha", "llama-llama3", "mistral", "qwen2", "opt")
WITHOUT_INTERFACE = tuple(name for name, config in CONFIGS.items() if not FAMILIES[config.model_type].interface)


def tiny_model(name, seed=0):
    """In float32; transformers makes biases zero and gains one (Gemma's zero), and here they are random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "norm" in parameter_name or ".ln_" in parameter_name:
                parameter.mul_(torch.randn_like(parameter).mul(0.3).exp())
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save_tiny_model(name, directory, seed=0):
    tiny_model(name, seed).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "stdlib-llama" / file, directory)
    return directory
