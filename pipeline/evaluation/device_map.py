"""Which module of a model goes to which device, so that weights, cache and activations of a batch of windows fit.

A layer computes, and caches, where its weights are; one whose weights are kept on the processor beside GPUs, or on the
disk, computes on the main device, which is the first: there its cache is, too, and a place for the largest such layer.
Factors of variants are not counted, and of a training that keeps the activations of all layers only those of one.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes, get_balanced_memory, get_max_layer_size
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lorc_core.errors import ArtifactError
from lorc_core.model.architecture import Architecture, architecture_of
from pipeline.zoo.sections import GIB

Device = int | str  # a GPU's number, "cpu", "disk"
FLOAT32_BYTES = 4  # norms, attention weights and losses are computed in it
CACHE = "cache_of_windows"  # the parameter that stands for it while devices are chosen


@dataclass(frozen=True)
class Held:
    """Bytes on one device: of weights, of the cache of a batch, and of what else is alive while it is scored."""

    weight_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0

    def __add__(self, other: "Held") -> "Held":
        return Held(
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
            self.activation_bytes + other.activation_bytes,
        )

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes


@dataclass(frozen=True)
class DevicePlan:
    """The device of each module, as `from_pretrained` takes it, and what each device will hold."""

    devices: dict[str, Device]
    held: dict[Device, Held]


@dataclass(frozen=True)
class Activations:
    """Bytes alive at once beside weights and cache.

    Attributes:
        layer: While a layer computes, on each device that does.
        logits: While losses are computed from the logits of all tokens, on the main device.
    """

    layer: int
    logits: int


def device_plan(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    max_memory: Mapping[Device, int],
    *,
    batch_size: int,
    window_tokens: int,
) -> DevicePlan:
    """Spread a model, balanced over the GPUs where they suffice, from the config alone; no weight is read.

    Args:
        config: Of a causal language model.
        dtype: That the weights will have.
        max_memory: Bytes per device, the main one first: GPU numbers, "cpu". What fits nowhere goes to the disk.
        batch_size: Windows that are scored at a time.
        window_tokens: Tokens of each.

    Raises:
        ArtifactError: A layer, with the cache and activations that must be beside it, does not fit the main device.
    """
    # Planning for GPUs that are not here is the point; accelerate would warn of each.
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)
    with torch.device("meta"):  # a third of the time of accelerate's `init_empty_weights`, for 126 layers
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    architecture = architecture_of(config)
    alive = activations(model, architecture, dtype.itemsize, batch_size, window_tokens)
    layer_cache_bytes = 2 * architecture.num_cached_heads * architecture.head_dim * dtype.itemsize
    layer_cache_bytes *= batch_size * window_tokens
    weights = compute_module_sizes(model, dtype=dtype)
    add_caches(model, architecture, layer_cache_bytes)
    sizes = compute_module_sizes(model, dtype=dtype)

    computing = computing_devices(max_memory)
    main, first = computing[0], next(name for name, _ in model.named_parameters())
    beside = {device: max(alive.layer, alive.logits if device == main else 0) for device in computing}
    far_cache_bytes = 0  # of layers whose weights are kept elsewhere
    while True:
        reserved = beside | {main: beside[main] + far_cache_bytes}
        room = {device: max(0, size - reserved.get(device, 0)) for device, size in max_memory.items()}
        devices = spread(model, dtype, room, computing)
        if device_of(first, devices) not in computing:  # the embedding, where the tokens go
            layer, _ = get_max_layer_size(list(model.named_children()), sizes, model._no_split_modules or [])
            needed = weights[first] + layer + reserved[main]
            raise ArtifactError(
                f"embedding, one layer and what {batch_size} windows of {window_tokens} tokens need beside them take "
                f"{needed / GIB:.3g} GiB, {named(main)} has {max_memory[main] / GIB:.3g} GiB; lower batch_size or "
                "window_tokens"
            )
        held = held_by_device(devices, beside, weights, sizes)
        far = sum(held[device].cache_bytes for device in held if device not in computing)
        if far <= far_cache_bytes:
            return DevicePlan(devices, with_far_caches(held, main, computing))
        far_cache_bytes = far


def activations(
    model: PreTrainedModel, architecture: Architecture, element_bytes: int, batch_size: int, window_tokens: int
) -> Activations:
    """Of windows whose first half is prefilled and whose second half reads it, as `window_losses` scores them.

    Attention weights are counted as written down, which some kernels do and others never; what a layer makes, as if all
    of it were alive at once. Measured on the CPU, that is 1.2 to 1.7 times what is, and 3.2 to 3.4 times where no
    attention weights are written (test_device_map.py).
    """
    config = model.config.get_text_config()
    hidden, heads_width = architecture.hidden_size, architecture.num_heads * architecture.head_dim
    all_tokens = batch_size * window_tokens
    tokens = all_tokens - batch_size * (window_tokens // 2)  # of the longer half
    intermediate = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    # The residual, its norm, and what attention returns; queries, attended values; what experts read and write, and
    # their gates, ups and products.
    widths = 4 * hidden + 2 * heads_width + experts * (2 * hidden + 3 * (intermediate or 4 * hidden))
    layer = tokens * (widths * element_bytes + hidden * FLOAT32_BYTES)  # the norm is computed in float32
    # Keys and values of all tokens, rebuilt from latents or copied for every query head.
    layer += 2 * all_tokens * heads_width * element_bytes
    # Scores and weights; of an eager pass weights in float32, too, before they are rounded.
    score_bytes = 2 * element_bytes + (FLOAT32_BYTES if config._attn_implementation == "eager" else 0)
    layer += tokens * window_tokens * architecture.num_heads * score_bytes
    # Of the head: the logits of both halves, then those in float32 and their logarithms after the softmax.
    layer += all_tokens * config.vocab_size * element_bytes
    return Activations(layer, logits=all_tokens * config.vocab_size * (element_bytes + 2 * FLOAT32_BYTES))


def add_caches(model: PreTrainedModel, architecture: Architecture, layer_cache_bytes: int) -> None:
    """Give each layer of a model without data a parameter as large as its cache, which accelerate counts with it."""
    for layer_idx in range(architecture.num_layers):
        attention = model.base_model.get_submodule(architecture.attention_module(layer_idx))
        cache = torch.empty(layer_cache_bytes, dtype=torch.uint8, device="meta")
        attention.register_parameter(CACHE, nn.Parameter(cache, requires_grad=False))


def computing_devices(max_memory: Mapping[Device, int]) -> list[Device]:
    """The devices that layers compute on, the main one first: the GPUs or, without any, the one that is there."""
    gpus: list[Device] = [device for device in max_memory if isinstance(device, int)]
    return gpus or [device for device in max_memory if device != "disk"][:1]


def spread(
    model: PreTrainedModel, dtype: torch.dtype, room: dict[Device, int], computing: Sequence[Device]
) -> dict[str, Device]:
    """Evenly over the devices that compute or, where that leaves out anything that would fit, one after another."""
    options = {"no_split_module_classes": model._no_split_modules, "dtype": dtype}
    infer = partial(infer_auto_device_map, offload_buffers=True, **options)  # it warns of few bytes of buffers else
    if len(computing) > 1:
        balanced: dict[str, Device] = infer(model, get_balanced_memory(model, dict(room), **options))
        if set(balanced.values()) <= set(computing):
            return balanced
    return dict(infer(model, dict(room)))


def device_of(parameter: str, devices: Mapping[str, Device]) -> Device:
    """Of the module in the map that has the parameter."""
    return next(device for name, device in devices.items() if not name or f"{parameter}.".startswith(f"{name}."))


def held_by_device(
    devices: Mapping[str, Device], beside: Mapping[Device, int], weights: Mapping[str, int], sizes: Mapping[str, int]
) -> dict[Device, Held]:
    """What each device would hold if every layer's cache were where its weights are kept.

    Args:
        devices: Of each module.
        beside: Bytes of activations on each device that computes.
        weights: Bytes of each module's weights.
        sizes: Bytes of its weights and cache.
    """
    held = {device: Held(activation_bytes=beside.get(device, 0)) for device in (*beside, *devices.values())}
    for module, device in devices.items():
        # accelerate counts eight booleans as one byte
        held[device] += Held(math.ceil(weights[module]), math.ceil(sizes[module] - weights[module]))
    return held


def with_far_caches(held: Mapping[Device, Held], main: Device, computing: Sequence[Device]) -> dict[Device, Held]:
    """The same with the caches where they are: of layers whose weights are kept elsewhere, on the main device."""
    far = sum(each.cache_bytes for device, each in held.items() if device not in computing)
    moved = {device: each if device in computing else Held(each.weight_bytes) for device, each in held.items()}
    return moved | {main: moved[main] + Held(cache_bytes=far)}


def named(device: Device) -> str:
    return f"GPU {device}" if isinstance(device, int) else f"the {device}"
