"""Sizes that a config may give: whole numbers within the bounds of models that exist, heads that divide.

Checked before a model is built from them: one with a thousand million layers would never be finished.
"""

from typing import TYPE_CHECKING

from lorc_core.errors import ArtifactError

if TYPE_CHECKING:
    import transformers  # named in strings alone: a zoo file is read without it, which takes seconds to import

# Far above any model that was published, far below what a machine cannot even describe.
BOUNDS = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 31,
    "num_experts": 1 << 16,
    "num_local_experts": 1 << 16,
    "sliding_window": 1 << 31,
}
REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def check_sizes(config: "transformers.PreTrainedConfig") -> None:
    """Raise ArtifactError where a size is no whole number within its bounds, or heads do not divide.

    Args:
        config: Of a causal language model; where transformers knows a field by another name, that name counts too.
    """
    for field, most in BOUNDS.items():
        value = getattr(config, field, None)
        if value is None and field not in REQUIRED:
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise ArtifactError(f"{config.model_type}: config field {field} must be in 1..{most:,}, got {value!r}")
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads is not None and heads % kv_heads:
        raise ArtifactError(
            f"{config.model_type}: config field num_key_value_heads is {kv_heads}, which does not divide the {heads} "
            "of num_attention_heads"
        )
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise ArtifactError(
            f"{config.model_type}: config field num_attention_heads is {heads}, which does not divide the hidden_size "
            f"{config.hidden_size}, and there is no head_dim"
        )
