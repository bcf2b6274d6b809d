"""Bytes of a key-value cache: predicted from shapes, and measured from the tensors held."""

from transformers import Cache

from lorc_core.caches.compatibility import held_tensors
from lorc_core.methods import Method
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import KINDS
from lorc_core.ranks.spectra import RankSchedule


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory that a cache's states take, each piece of memory counted once.

    Scales, zero points and residual windows of quantized layers count. A sliding window may be a view of a longer
    tensor, which stays in memory with it until the next token: all of that tensor counts.

    Args:
        cache: `past_key_values` of a model output, of any layers that transformers has.
    """
    storages = {}
    for tensor in held_tensors(cache):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage
    return sum(storage.nbytes() for storage in storages.values())


def bytes_per_token(floats_per_token: int, element_bytes: int) -> int:
    """Cache bytes that one token of one sequence costs.

    Args:
        floats_per_token: Over all layers, keys and values.
        element_bytes: Of the cache's dtype.
    """
    return floats_per_token * element_bytes


def full_floats_per_token(architecture: Architecture) -> int:
    """Floats that the untouched model caches per token, over all layers, keys and values.

    Args:
        architecture: Of the model.
    """
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
