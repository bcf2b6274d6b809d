"""Rotary positions: refuse those that cannot be followed, rotate what arrives unrotated and the reverse.

Shapes: B batch, H heads, S tokens, D head_dim, R rotated channels of a head, Q new tokens, P pairs of channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from transformers import Cache

from lorc_core.architecture import Rotary
from lorc_core.errors import ConfigError


@dataclass(frozen=True)
class Rotation:
    """cos and sin for every token, as transformers' rotary modules give them; the channels past R are not rotated."""

    cos: Float[Tensor, "#b s r"]
    sin: Float[Tensor, "#b s r"]
    interleaved: bool

    def identity(self) -> tuple[Float[Tensor, "1 1 r"], Float[Tensor, "1 1 r"]]:
        """cos and sin that rotate nothing."""
        one = self.cos[:1, :1]
        return torch.ones_like(one), torch.zeros_like(one)

    def turns(self) -> Complex[Tensor, "#b s p"]:
        """One complex number for each pair of channels, in no less than float32."""
        dtype = torch.promote_types(self.cos.dtype, torch.float32)
        num_pairs = self.cos.shape[-1] // 2
        cos, sin = (
            (part[..., ::2] if self.interleaved else part[..., :num_pairs]).to(dtype) for part in (self.cos, self.sin)
        )
        return torch.complex(cos, sin)


@dataclass(frozen=True)
class LayerRotation:
    """How one layer rotates its keys.

    Attributes:
        rotary: The facts.
        module: The base model's own; None where the attention module rotates by itself.
    """

    rotary: Rotary
    module: nn.Module | None

    def __call__(self, like: Float[Tensor, "..."], positions: Int[Tensor, "#b s"]) -> Rotation:
        """The rotation at some positions, in the dtype and on the device of `like`."""
        interleaved, layer_type = self.rotary.interleaved, self.rotary.layer_type
        if self.module is not None:
            named = {"layer_type": layer_type} if layer_type else {}
            cos, sin = self.module(like, positions, **named)
            return Rotation(cos, sin, interleaved)
        frequencies = torch.tensor(self.rotary.frequencies, device=like.device)
        angles = positions.to(like.device)[..., None].float() * frequencies
        angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat([angles, angles], dim=-1)
        return Rotation(angles.cos().to(like.dtype), angles.sin().to(like.dtype), interleaved)

    @property
    def is_fixed(self) -> bool:
        """Whether the angles depend on the position alone, not on the length of the text."""
        if self.module is None:
            return True
        kind: Any = self.module.rope_type
        return (kind if isinstance(kind, str) else kind[self.rotary.layer_type]) not in ("dynamic", "longrope")

    def pair_order(self, head_dim: int) -> Int[Tensor, " d"] | None:
        """The channels of a head with those of a pair side by side; None where they stand so."""
        turned = torch.arange(self.rotary.num_channels)
        if self.rotary.interleaved:
            return None
        return torch.cat([turned.view(2, -1).T.flatten(), torch.arange(self.rotary.num_channels, head_dim)])

    def of_call(self, inputs: Float[Tensor, "b q i"], kwargs: Mapping[str, Any]) -> Rotation:
        """The rotation of the new tokens in a call of the attention module."""
        if self.module is not None:
            cos, sin = kwargs["position_embeddings"]
            return Rotation(cos, sin, self.rotary.interleaved)
        return self(inputs, kwargs["position_ids"])


class SlotTurns:
    """The rotations of all slots of a cache, as if slots were positions, kept from call to call.

    Dot products of rotated queries and keys depend on the distance of their positions alone, and that is the distance
    of their slots, so one table serves all layers, rows and calls. Each rotation has its own, told apart by its module
    too, since `Rotary` does not compare frequencies; without a module they follow from what it does compare.
    """

    BLOCK = 1024  # slots; a table is computed anew when it has grown by so many

    def __init__(self) -> None:
        self._tables: dict[tuple[LayerRotation, torch.device, torch.dtype], Complex[Tensor, "1 s p"]] = {}

    def at(self, rotation: LayerRotation, like: Float[Tensor, "b h q d"], num_slots: int) -> Complex[Tensor, "1 s p"]:
        """The turns of slots 0 .. `num_slots` - 1 and some more."""
        key = (rotation, like.device, torch.promote_types(like.dtype, torch.float32))
        table = self._tables.get(key)
        if table is None or table.shape[1] < num_slots:
            length = -(-num_slots // self.BLOCK) * self.BLOCK
            with torch.inference_mode(mode=False):  # it may serve training later
                positions = torch.arange(length, device=like.device)[None]
                self._tables[key] = table = rotation(torch.empty(0, device=key[1], dtype=key[2]), positions).turns()
        return table


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
        elif not go_on(shifts, known):
            raise ConfigError(
                "position_ids do not go on from those of the cached tokens; keys compressed before the rotation need "
                "contiguous positions (pad on the left)"
            )


def go_on(shifts: Int[Tensor, " b"], known: Int[Tensor, " c"]) -> bool:
    """Whether every row goes on from its own cached tokens.

    Beams change places among those of one text, which have one shift; where rows were added or dropped since, it must
    be that of some row.
    """
    if len(shifts) == len(known) or 1 in (len(shifts), len(known)):
        return bool((shifts == known).all())
    return bool(torch.isin(shifts, known).all())


def rows_are_contiguous(position_ids: Int[Tensor, "#b q"]) -> bool:
    """Whether each row counts up by one to its last position, after constant padding if it has any."""
    steps = torch.arange(position_ids.shape[-1] - 1, -1, -1, device=position_ids.device)
    expected = position_ids[:, -1:] - steps
    padding = (expected < 0) & (position_ids == position_ids[:, :1])
    return bool(((position_ids == expected) | padding).all())


def rotate(states: Float[Tensor, "b h s d"], rotation: Rotation) -> Float[Tensor, "b h s d"]:
    """Rotary embedding."""
    cos, sin = (part.to(states.device).unsqueeze(1) for part in (rotation.cos, rotation.sin))
    turned, passed = states.split([cos.shape[-1], states.shape[-1] - cos.shape[-1]], dim=-1)
    rotated = turned * cos + quarter_turn(turned, interleaved=rotation.interleaved) * sin
    return torch.cat([rotated, passed], dim=-1) if passed.shape[-1] else rotated


def unrotate(states: Float[Tensor, "b h s d"], rotation: Rotation) -> Float[Tensor, "b h s d"]:
    """The inverse of `rotate`, in float32; a scaled rotation (yarn, longrope) is scaled back."""
    cos, sin = (part.to(states.device).float() for part in (rotation.cos, rotation.sin))
    square = cos.square() + sin.square()
    return rotate(states.float(), Rotation(cos / square, -sin / square, rotation.interleaved)).to(states.dtype)


def quarter_turn(states: Float[Tensor, "... r"], *, interleaved: bool) -> Float[Tensor, "... r"]:
    """Each pair of channels (a, b) becomes (-b, a)."""
    if interleaved:
        return torch.stack((-states[..., 1::2], states[..., ::2]), dim=-1).flatten(-2)
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotary_pairs(rotary: Rotary, head_dim: int) -> tuple[Int[Tensor, "2 p"], Float[Tensor, " p"], Float[Tensor, " p"]]:
    """The channels of a head that rotate as pairs, their frequencies and scales; what passes has frequency zero."""
    turned, passed = torch.arange(rotary.num_channels), torch.arange(rotary.num_channels, head_dim)
    pairs = turned.view(-1, 2).T if rotary.interleaved else turned.view(2, -1)
    frequencies = torch.zeros(head_dim // 2, dtype=torch.float64)
    frequencies[: len(rotary.frequencies)] = torch.tensor(rotary.frequencies, dtype=torch.float64)
    scales = torch.ones_like(frequencies)
    scales[: len(rotary.frequencies)] = rotary.scale
    return torch.cat([pairs, passed.view(2, -1)], dim=1), frequencies, scales
