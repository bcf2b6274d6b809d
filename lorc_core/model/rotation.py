"""Rotary positions: refuse those that cannot be followed, rotate what arrives unrotated and the reverse.

Shapes: B batch, H heads, S tokens, D head_dim, R rotated channels of a head, Q new tokens, P pairs of channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from lorc_core.model.rotary import Rotary


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
