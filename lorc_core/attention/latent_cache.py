"""The view of a cache that stores latents: states are projected down on their way in.

Shapes: B batch, G kv heads, D head_dim, Q new tokens, L latent heads, S cached and new tokens.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import Cache

from lorc_core.attention.call import AttentionCall
from lorc_core.attention.layer_projections import LayerProjections
from lorc_core.attention.positions import RowPositions
from lorc_core.caches.compatibility import check_fits
from lorc_core.model.kinds import KeysValues


class LatentCache:
    """A view of a model's cache, or of none, that stores latents: the attention module sees no difference.

    Args:
        cache: The real one; None where the model runs without.
        projections: The layer's.
        call: In progress; learns how many tokens were cached before it.
        positions: Checked where keys are cached before the rotation; else None.
    """

    def __init__(
        self, cache: Cache | None, projections: LayerProjections, call: AttentionCall, positions: RowPositions | None
    ) -> None:
        self._cache = cache
        self._projections = projections
        self._call = call
        self._positions = positions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(
        self,
        keys: Float[Tensor, "b g q d"],
        values: Float[Tensor, "b g q d"],
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Project down, and let the real cache append.

        Args:
            keys: Of the new tokens.
            values: Of the new tokens.
            layer_idx: Of the caller.
            args: Of the real cache's `update`.
            kwargs: Of the real cache's `update`.

        Returns:
            (B, L, S, _) latents of all tokens; states of a kind that is not compressed.

        Raises:
            ConfigError: The cache cannot take these latents, or positions have gaps where keys need them.
        """
        states = KeysValues(keys, values)
        latents = KeysValues.of(lambda kind: self._projections.project_down(states[kind], kind))
        if self._cache is None:
            return latents.keys, latents.values
        check_fits(self._cache, layer_idx, latents.keys, latents.values)
        call, num_cached = self._call, self._cache.get_query_offset(layer_idx)
        if self._positions is not None:
            self._positions.check(self._cache, layer_idx, call.position_ids, num_cached)
        # Asked before the update, which changes both. A clone, since static caches count in place.
        call.num_cached = num_cached.clone() if isinstance(num_cached, Tensor) else num_cached
        _, call.first_slot = self._cache.get_mask_sizes(keys.shape[-2], layer_idx)
        return self._cache.update(latents.keys, latents.values, layer_idx, *args, **kwargs)
