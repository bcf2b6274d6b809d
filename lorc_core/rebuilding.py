"""The view of a cache for attention modules that attend by themselves, outside transformers' attention interface.

BLOOM, Falcon, GPT-J and MPT get whole keys and values back: slower than attending over latents, with the same memory
and the same numbers.

Shapes: B batch, H cached heads, G kv heads, D head_dim, Q new tokens, S cached and new tokens.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import Cache

from lorc_core.latent_attention import LatentCache, LayerState, key_rotation, rebuild
from lorc_core.rotation import rotate, unrotate


class RebuildingCache(LatentCache):
    """Stores latents and hands whole states back.

    `num_copies` heads in a row that the module caches are one kv head; it is stored once. Keys arrive rotated: where
    they were compressed before the rotation it is taken off them, and put on the rebuilt ones by their positions.
    """

    def __init__(self, cache: Cache | None, state: LayerState, num_copies: int) -> None:
        super().__init__(cache, state)
        self._num_copies = num_copies

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Tokens cached; MPT asks, and there may be no cache behind the view."""
        return 0 if self._cache is None else self._cache.get_seq_length(layer_idx)

    def update(
        self,
        keys: Float[Tensor, "b h q d"],
        values: Float[Tensor, "b h q d"],
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "b h s d"], Float[Tensor, "b h s d"]]:
        """Project down, let the real cache append, rebuild all it holds."""
        state = self._state
        call = state.call
        assert call is not None
        new_keys, new_values = keys[:, :: self._num_copies], values[:, :: self._num_copies]
        if call.rotation is not None:
            new_keys = unrotate(new_keys, call.rotation)
        latents = super().update(new_keys, new_values, layer_idx, *args, **kwargs)
        all_keys, all_values = rebuild(latents[0], state, "keys"), rebuild(latents[1], state, "values")
        if call.rotation is not None:
            all_keys = rotate(all_keys, key_rotation(state, call, all_keys, keys.shape[-2]))
        state.call = None
        return all_keys.repeat_interleave(self._num_copies, dim=1), all_values.repeat_interleave(
            self._num_copies, dim=1
        )
