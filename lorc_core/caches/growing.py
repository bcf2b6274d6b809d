"""A dynamic cache that appends in place: no copy of everything cached for each new token.

Shapes: B batch, G heads of the keys, L of the values, Q new tokens, S cached and new tokens, D and R their sizes.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """`keys` and `values` are views of larger tensors, which grow by `BLOCK` tokens when they are full."""

    BLOCK = 256

    def __init__(self) -> None:
        super().__init__()
        self.rooms: dict[str, Tensor] = {}

    def update(
        self, key_states: Float[Tensor, "b g q d"], value_states: Float[Tensor, "b l q r"], *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "b g s d"], Float[Tensor, "b l s r"]]:
        """Append new tokens.

        Args:
            key_states: Of the new tokens.
            value_states: Of the new tokens.
            args: As `Cache.update` passes them on.
            kwargs: As `Cache.update` passes them on.

        Returns:
            Keys and values of all tokens: views of the larger tensors.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything, the room too."""
        super().reset()
        self.rooms = {}

    def _appended(self, name: str, held: Tensor, new: Float[Tensor, "b g q d"]) -> Float[Tensor, "b g s d"]:
        """What is held may be a shorter view after `crop`, or another tensor after beams were reordered."""
        if torch.is_grad_enabled() and (held.requires_grad or new.requires_grad):
            return torch.cat([held, new], dim=-2)  # what autograd has saved must not be written to
        past = held.shape[-2] if held.numel() else 0
        length, room = past + new.shape[-2], self.rooms.get(name)
        own = room is not None and held.data_ptr() == room.data_ptr() and len(held) == len(room)
        locked = room is not None and room.is_inference() and not torch.is_inference_mode_enabled()
        if room is None or not own or locked or length > room.shape[-2]:
            room = new.new_empty(*new.shape[:2], -(-length // self.BLOCK) * self.BLOCK, new.shape[-1])
            if past:
                room[:, :, :past] = held
            self.rooms[name] = room
        room[:, :, past:length] = new
        return room[:, :, :length]


class GrowingCache(DynamicCache):
    """`DynamicCache` whose layers that keep every token append in place.

    Args:
        config: Of the model; layers with a sliding window keep transformers' own form. Without it no layer has one.
    """

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__(config=config)
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
