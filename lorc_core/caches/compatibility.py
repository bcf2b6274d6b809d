"""What a cache of transformers (dynamic, static, sliding, quantized) must be to hold latents, and what it holds.

Shapes: B batch, L latent heads, Q new tokens, R latents of each.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

from lorc_core.errors import ConfigError


def check_fits(cache: Cache, layer_idx: int, keys: Float[Tensor, "b _ q _"], values: Float[Tensor, "b _ q _"]) -> None:
    """Refuse latents that a layer of a cache cannot take, before it fails or mixes them with something else.

    A `StaticCache` that was initialized early, for the states of the untouched model, is one that cannot.

    Args:
        cache: That is to take them.
        layer_idx: Of the caller.
        keys: (B, L, Q, R) latents of the new tokens, or states where keys are not compressed.
        values: The same of the values.

    Raises:
        ConfigError: The layer was filled or allocated for other states, or quantizes in groups that its latents
            cannot fill.
    """
    if layer_idx >= len(cache.layers):  # a cache without a config adds its layers in `update`
        return
    layer = cache.layers[layer_idx]
    for kind, latents in (("keys", keys), ("values", values)):
        held, num_heads, width = getattr(layer, kind, None), latents.shape[1], latents.shape[3]
        if held is not None and held.dim() == 4 and (held.shape[1], held.shape[3]) != (num_heads, width):
            raise ConfigError(
                f"layer {layer_idx} {kind}: the cache was made for {held.shape[1]} x {held.shape[3]} floats per token, "
                f"with this variant there are {num_heads} x {width}; begin with a new cache, not initialized early"
            )
        if isinstance(layer, QuantizedLayer) and (num_heads * width) % layer.q_group_size:
            raise ConfigError(
                f"layer {layer_idx} {kind}: {num_heads * width} floats per token cannot be quantized in groups of "
                f"{layer.q_group_size}; take a q_group_size that divides them, or compress with a rank_multiple of it"
            )


def held_tensors(cache: Cache) -> Iterator[Tensor]:
    """Every plain tensor that the layers of a cache hold, but positions and lengths, which are int64.

    Quantized states are taken apart: packed integers, scales and zero points.

    Args:
        cache: Of any layers that transformers has.
    """
    for layer in cache.layers:
        for tensor in plain_tensors(list(vars(layer).values())):
            if tensor.dtype != torch.int64:
                yield tensor


def plain_tensors(held: Any) -> Iterator[Tensor]:
    """The tensors within nested containers and within tensors that wrap others.

    Args:
        held: A tensor, a container, or anything else, which holds none.
    """
    if isinstance(held, dict):
        yield from plain_tensors(list(held.values()))
    elif isinstance(held, list | tuple):
        for part in held:
            yield from plain_tensors(part)
    elif isinstance(held, Tensor) and is_traceable_wrapper_subclass(held):
        yield from plain_tensors([getattr(held, name) for name in held.__tensor_flatten__()[0]])
    elif isinstance(held, Tensor):
        yield held
