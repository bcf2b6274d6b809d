"""Rotary positions: refuse those that cannot be followed, rotate what arrives unrotated.

Shapes: B batch, H heads, S tokens, D head_dim, Q new tokens.
"""

from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from lorc_core.errors import ConfigError

Rotation = tuple[Float[Tensor, "#b s d"], Float[Tensor, "#b s d"]]


class RowPositions:
    """Refuses positions from which those of cached keys could not be told.

    Each row's positions must be contiguous, through all calls on one cache: its newest position minus its newest
    slot never changes. What falls below position 0, counted back from the newest token, must be padding.
    """

    def __init__(self) -> None:
        self._shifts: WeakKeyDictionary[Cache, Tensor] = WeakKeyDictionary()
        self._layer_idx: int | None = None

    def check(self, cache: Cache, layer_idx: int, position_ids: Int[Tensor, "#b q"] | None, past: int | Tensor) -> None:
        """Look at one call of the first layer that asks; the others have the same positions.

        Raises:
            ConfigError: Positions are absent, have a gap, or do not go on from the cached ones.
        """
        if self._layer_idx is None:
            self._layer_idx = layer_idx
        if layer_idx != self._layer_idx or torch.compiler.is_compiling():
            return
        if position_ids is None:
            raise ConfigError("keys compressed before the rotation need position_ids")
        q_len, slots_before = position_ids.shape[-1], int(past)
        shifts = position_ids[:, -1] - (slots_before + q_len - 1)
        if not rows_are_contiguous(position_ids):
            raise ConfigError("position_ids have gaps; keys compressed before the rotation need contiguous positions")
        known = self._shifts.get(cache)
        if slots_before == 0 or known is None:
            self._shifts[cache] = shifts
        elif not torch.isin(shifts, known).all():
            raise ConfigError(
                "position_ids do not go on from those of the cached tokens; keys compressed before the rotation need "
                "contiguous positions (pad on the left)"
            )


def rows_are_contiguous(position_ids: Int[Tensor, "#b q"]) -> bool:
    """Whether each row counts up by one to its last position, after constant padding if it has any."""
    steps = torch.arange(position_ids.shape[-1] - 1, -1, -1, device=position_ids.device)
    expected = position_ids[:, -1:] - steps
    padding = (expected < 0) & (position_ids == position_ids[:, :1])
    return bool(((position_ids == expected) | padding).all())


def rotate(states: Float[Tensor, "b h s d"], rotation: Rotation) -> Float[Tensor, "b h s d"]:
    """Rotary embedding in the half-split layout of Llama and its relatives."""
    cos, sin = (part.to(states.device).unsqueeze(1) for part in rotation)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin
