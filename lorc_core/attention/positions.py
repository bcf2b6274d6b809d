"""Positions of cached keys: refuse those that cannot be followed, and the rotation of every slot from the newest one.

Shapes: B batch, G kv heads, D head_dim, Q new tokens, S cached and new tokens.
"""

from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from lorc_core.attention.call import AttentionCall
from lorc_core.errors import ConfigError
from lorc_core.model.rotation import LayerRotation, Rotation


def key_rotation(
    rotary: LayerRotation | None, call: AttentionCall, keys: Float[Tensor, "b g s d"], q_len: int
) -> Rotation:
    """cos and sin for every key that the cache handed back.

    Positions are contiguous along a row, so a slot's position follows from the newest one; that holds under left
    padding, beams, static and sliding caches and needs no storage.

    Args:
        rotary: How the layer rotates; needed where something was cached before.
        call: In progress, after the cache was updated.
        keys: Rebuilt; gives the number of slots, the dtype and the device.
        q_len: New tokens, which have the last slots.
    """
    kv_len = keys.shape[-2]
    if kv_len == q_len:  # nothing cached: the positions are those of the call, contiguous or not
        assert call.rotation is not None
        return call.rotation
    assert rotary is not None
    assert call.position_ids is not None
    slots = torch.arange(kv_len, device=keys.device) + call.first_slot
    newest_position, newest_slot = call.position_ids[:, -1:].to(keys.device), call.num_cached + q_len - 1
    return rotary(keys, newest_position - (newest_slot - slots))


class RowPositions:
    """Refuses positions from which those of cached keys could not be told.

    Each row's positions must be contiguous, through all calls on one cache: its newest position minus its newest
    slot, the shift, never changes. What falls below position 0, counted back from the newest token, must be padding.
    """

    def __init__(self) -> None:
        # Weak: a cache is not kept for having been looked at.
        self._shifts: WeakKeyDictionary[Cache, Tensor] = WeakKeyDictionary()
        self._layer_idx: int | None = None

    def check(
        self, cache: Cache, layer_idx: int, position_ids: Int[Tensor, "#b q"] | None, num_cached: int | Tensor
    ) -> None:
        """Look at one call of the first layer that asks; the others have the same positions.

        Args:
            cache: That the call will append to.
            layer_idx: Of the caller.
            position_ids: Of the new tokens.
            num_cached: Tokens in the cache before this call.

        Raises:
            ConfigError: Positions are absent, have a gap, or do not go on from the cached ones.
        """
        if self._layer_idx is None:
            self._layer_idx = layer_idx
        if layer_idx != self._layer_idx or torch.compiler.is_compiling():
            return
        if position_ids is None:
            raise ConfigError("keys compressed before the rotation need position_ids")
        q_len, slots_before = position_ids.shape[-1], int(num_cached)
        shifts = position_ids[:, -1] - (slots_before + q_len - 1)
        if not rows_are_contiguous(position_ids):
            raise ConfigError("position_ids have gaps; keys compressed before the rotation need contiguous positions")
        cached_shifts = self._shifts.get(cache)
        if slots_before == 0 or cached_shifts is None:
            self._shifts[cache] = shifts
        elif not rows_go_on(shifts, cached_shifts):
            raise ConfigError(
                "position_ids do not go on from those of the cached tokens; keys compressed before the rotation need "
                "contiguous positions (pad on the left)"
            )


def rows_go_on(shifts: Int[Tensor, " b"], cached_shifts: Int[Tensor, " c"]) -> bool:
    """Whether every row goes on from its own cached tokens.

    Beams change places among those of one text, which have one shift; where rows were added or dropped since, it must
    be that of some row.
    """
    if len(shifts) == len(cached_shifts) or 1 in (len(shifts), len(cached_shifts)):
        return bool((shifts == cached_shifts).all())
    return bool(torch.isin(shifts, cached_shifts).all())


def rows_are_contiguous(position_ids: Int[Tensor, "#b q"]) -> bool:
    """Whether each row counts up by one to its last position, after constant padding if it has any."""
    steps = torch.arange(position_ids.shape[-1] - 1, -1, -1, device=position_ids.device)
    expected = position_ids[:, -1:] - steps
    padding = (expected < 0) & (position_ids == position_ids[:, :1])
    return bool(((position_ids == expected) | padding).all())
