"""Bytes of a key-value cache: predicted from shapes, and measured from the tensors held."""

from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from lorc_core.architecture import KINDS, Architecture
from lorc_core.errors import UnsupportedModelError
from lorc_core.methods import Method
from lorc_core.spectra import RankSchedule


def cache_bytes(cache: Cache) -> int:
    """Bytes of the key and value tensors that a cache holds.

    Args:
        cache: `past_key_values` of a model output, of dynamic or static layers (sliding windows included).

    Raises:
        UnsupportedModelError: A layer keeps its states in another form (quantized, linear attention).
    """
    total = 0
    for layer_idx, layer in enumerate(cache.layers):
        if type(layer).__name__.endswith("QuantizedLayer") or not isinstance(layer, DynamicLayer | StaticLayer):
            raise UnsupportedModelError(
                f"layer {layer_idx}: cannot measure the bytes of a {type(layer).__name__}; dynamic and static are known"
            )
        if layer.keys is not None and layer.values is not None:
            total += layer.keys.nbytes + layer.values.nbytes
    return total


def bytes_per_token(floats_per_token: int, element_bytes: int) -> int:
    """Cache bytes that one token of one sequence costs."""
    return floats_per_token * element_bytes


def full_floats_per_token(architecture: Architecture) -> int:
    """Floats that the untouched model caches per token, over all layers, keys and values."""
    return len(KINDS) * architecture.kv_width * architecture.num_layers


def planned_factor_floats(schedule: RankSchedule, method: Method, architecture: Architecture) -> int:
    """Floats of the factors that a variant will hold beside its base.

    `up`, a `down` unless it is the transpose of `up`, and a mean where there is one; a full rank has no factors.
    """
    lora_rank = method.training.lora_rank if method.training else 0
    heads_width = architecture.num_heads * architecture.head_dim
    widths = 4 * architecture.hidden_size + 2 * heads_width + 2 * architecture.kv_width  # in and out of q, k, v and o
    total = lora_rank * widths * architecture.num_layers
    for layer_idx, layer in enumerate(schedule.layers):
        for kind in KINDS:
            if layer.floats(kind) < schedule.kv_width:
                axes = method.axes(layer_idx, kind)
                sides = 2 if axes.reader == "interaction" else 1
                total += sides * layer.floats(kind) * axes.partition(architecture).width
                total += schedule.kv_width if axes.has_mean(architecture, layer_idx, kind) else 0
    return total
