"""The view of a cache that stores latents: states are projected down on their way in.

Shapes: B batch, G kv heads, D head_dim, Q new tokens.
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
        """Project down, let the real cache append, return all latents (or states, where a kind is not compressed)."""
        states = KeysValues(keys, values)
        latents = KeysValues.of(lambda kind: self._projections.project_down(states[kind], kind))
        if self._cache is None:
            return latents.keys, latents.values
        check_fits(self._cache, layer_idx, latents.keys, latents.values)
        call, past = self._call, self._cache.get_query_offset(layer_idx)
        if self._positions is not None:
            self._positions.check(self._cache, layer_idx, call.position_ids, past)
        call.past = past.clone() if isinstance(past, Tensor) else past  # static caches count in place
        _, call.first_slot = self._cache.get_mask_sizes(keys.shape[-2], layer_idx)
        return self._cache.update(latents.keys, latents.values, layer_idx, *args, **kwargs)
