"""The rotary embedding at work: angles at positions, rotating states and taking the rotation back.

Shapes: B batch, H heads, S tokens, D head_dim, R rotated channels of a head, Q new tokens, P pairs of channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from lorc_core.model.rotary import Rotary


@dataclass(frozen=True)
class Rotation:
    """The rotation at the position of every token, as transformers' rotary modules give it.

    Attributes:
        cos: Of the angle of each channel; the channels past R are not rotated.
        sin: Likewise.
        interleaved: Whether neighbouring channels rotate as pairs; see `rotating_pairs`.
    """

    cos: Float[Tensor, "#b s r"]
    sin: Float[Tensor, "#b s r"]
    interleaved: bool

    def identity(self) -> tuple[Float[Tensor, "1 1 r"], Float[Tensor, "1 1 r"]]:
        """cos and sin that rotate nothing."""
        first_token = self.cos[:1, :1]
        return torch.ones_like(first_token), torch.zeros_like(first_token)

    def turns(self) -> Complex[Tensor, "#b s p"]:
        """cos + i sin for each pair of channels, in no less than float32.

        A pair (a, b) as the complex number a + ib is rotated by one multiplication.
        """
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
        rotary: What the config says of it.
        module: The base model's rotary module; None where the attention module rotates by itself.
    """

    rotary: Rotary
    module: nn.Module | None

    def __call__(self, like: Float[Tensor, "..."], positions: Int[Tensor, "#b s"]) -> Rotation:
        """The rotation at some positions.

        Args:
            like: Has the dtype and the device that it shall have.
            positions: Of the tokens; one row where all sequences have the same.
        """
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
        """An order of a head's channels with the two of each pair side by side; None where they stand so."""
        if self.rotary.interleaved:
            return None
        return torch.cat([rotating_pairs(self.rotary).T.flatten(), torch.arange(self.rotary.num_channels, head_dim)])

    def of_call(self, inputs: Float[Tensor, "b q i"], kwargs: Mapping[str, Any]) -> Rotation:
        """The rotation of the new tokens in a call of the attention module, from what the model passes it.

        Args:
            inputs: Hidden states of the new tokens.
            kwargs: The call's keyword arguments.
        """
        if self.module is not None:
            cos, sin = kwargs["position_embeddings"]
            return Rotation(cos, sin, self.rotary.interleaved)
        return self(inputs, kwargs["position_ids"])


def rotate(states: Float[Tensor, "b h s d"], rotation: Rotation) -> Float[Tensor, "b h s d"]:
    """Rotary embedding: pairs of channels are turned by the angle of their token, the channels past R pass."""
    cos, sin = (part.to(states.device).unsqueeze(1) for part in (rotation.cos, rotation.sin))
    rotating, passing = states.split([cos.shape[-1], states.shape[-1] - cos.shape[-1]], dim=-1)
    rotated = rotating * cos + quarter_turn(rotating, interleaved=rotation.interleaved) * sin
    return torch.cat([rotated, passing], dim=-1) if passing.shape[-1] else rotated


def unrotate(states: Float[Tensor, "b h s d"], rotation: Rotation) -> Float[Tensor, "b h s d"]:
    """The inverse of `rotate`, computed in float32."""
    cos, sin = (part.to(states.device).float() for part in (rotation.cos, rotation.sin))
    square = cos.square() + sin.square()  # not 1 where cos and sin are scaled (yarn, longrope): that is undone too
    return rotate(states.float(), Rotation(cos / square, -sin / square, rotation.interleaved)).to(states.dtype)


def quarter_turn(states: Float[Tensor, "... r"], *, interleaved: bool) -> Float[Tensor, "... r"]:
    """Each pair of channels (a, b) becomes (-b, a): a rotation by 90 degrees."""
    if interleaved:
        return torch.stack((-states[..., 1::2], states[..., ::2]), dim=-1).flatten(-2)
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotating_pairs(rotary: Rotary) -> Int[Tensor, "2 p"]:
    """The first and the second channel of each pair that rotates: neighbours, or half the rotated channels apart."""
    channels = torch.arange(rotary.num_channels)
    return channels.view(-1, 2).T if rotary.interleaved else channels.view(2, -1)


class ChannelPairs(NamedTuple):
    """All channels of a head in pairs, with how each pair rotates.

    Attributes:
        channels: The first and the second channel of each pair.
        frequencies: Radians per position; zero for channels that pass.
        scales: What a rotated pair is multiplied by.
    """

    channels: Int[Tensor, "2 p"]
    frequencies: Float[Tensor, " p"]
    scales: Float[Tensor, " p"]


def channel_pairs(rotary: Rotary, head_dim: int) -> ChannelPairs:
    """The pairs that rotate and, behind them, the channels that pass, paired too; in float64."""
    passing = torch.arange(rotary.num_channels, head_dim).view(2, -1)
    frequencies = torch.zeros(head_dim // 2, dtype=torch.float64)
    frequencies[: len(rotary.frequencies)] = torch.tensor(rotary.frequencies, dtype=torch.float64)
    scales = torch.ones_like(frequencies)
    scales[: len(rotary.frequencies)] = rotary.scale
    return ChannelPairs(torch.cat([rotating_pairs(rotary), passing], dim=1), frequencies, scales)
