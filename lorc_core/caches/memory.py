"""Bytes of a key-value cache: predicted from shapes, and measured from the tensors held."""

from transformers import Cache

from lorc_core.caches.compatibility import held_tensors
from lorc_core.methods import Method
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import KINDS, LayerKind, layer_kinds
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
    """Floats of the factors, and adapters, that a variant will hold beside its base; a full rank has no factors."""
    return least_factor_floats(schedule, schedule, method, architecture)


def least_factor_floats(low: RankSchedule, high: RankSchedule, method: Method, architecture: Architecture) -> int:
    """The least that `planned_factor_floats` can be of any ranks between two.

    Args:
        low: No rank is smaller.
        high: No rank is larger. What is at full width here may have no factors.
        method: Whose factors they are.
        architecture: Of the model.
    """
    total = adapter_floats(method, architecture)
    for place in layer_kinds(architecture.num_layers):
        least, most = (ranks.layers[place.layer_idx].floats(place.kind) for ranks in (low, high))
        if most < high.kv_width:
            total += least * floats_per_rank(method, architecture, place) + mean_floats(method, architecture, place)
    return total


def floats_per_rank(method: Method, architecture: Architecture, place: LayerKind) -> int:
    """Of `up`, and of a `down` that is not its transpose, for each float that is cached per token."""
    axes = method.axes(*place)
    sides = 2 if axes.is_balanced else 1
    return sides * axes.partition(architecture).width


def mean_floats(method: Method, architecture: Architecture, place: LayerKind) -> int:
    """Of the mean beside the factors, where there is one."""
    return architecture.kv_width if method.axes(*place).has_mean(architecture, *place) else 0


def adapter_floats(method: Method, architecture: Architecture) -> int:
    """Of LoRA matrices into and out of q, k, v and o in every layer."""
    lora_rank = method.training.lora_rank if method.training else 0
    heads_width = architecture.num_heads * architecture.head_dim
    widths = 4 * architecture.hidden_size + 2 * heads_width + 2 * architecture.kv_width
    return lora_rank * widths * architecture.num_layers
