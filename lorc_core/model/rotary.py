"""How a model rotates its keys, from its config alone: channels, pairing, frequencies."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorc_core.errors import UnsupportedModelError
from lorc_core.model.families import Family

if TYPE_CHECKING:
    import transformers

# `dynamic` and `longrope` change their frequencies past the original length; those here are the ones within it.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class Rotary:
    """How the keys of one layer, or of several, are rotated by their position.

    Attributes:
        num_channels: How many channels of each head rotate, the first ones; the others pass.
        interleaved: Whether neighbouring channels rotate as pairs; else channel i goes with channel i + half.
        layer_type: The name that the model's rotary module has for this rotation, where it has several; else None.
        frequencies: Radians per position of each pair, not compared, since their last bits depend on the machine.
        scale: What the rotated channels are multiplied by (yarn, longrope).
    """

    num_channels: int
    interleaved: bool
    layer_type: str | None
    frequencies: tuple[float, ...] = field(compare=False, repr=False)
    scale: float = field(compare=False)


def rotaries_of(
    config: "transformers.PreTrainedConfig", family: Family, head_dim: int
) -> tuple[tuple[Rotary, ...], tuple[int | None, ...]]:
    """The rotations of a model.

    Args:
        config: Of the model.
        family: Its row.
        head_dim: Channels of a head.

    Returns:
        Every kind of rotation, and for each layer the index of its own; None where its keys are not rotated.

    Raises:
        UnsupportedModelError: Its rope type is not one of `ROPE_TYPES`.
    """
    num_layers = config.num_hidden_layers
    if family.rotary == "none" or getattr(config, "alibi", False):
        return (), (None,) * num_layers
    if family.rotary == "inside":
        frequencies = plain_frequencies(10000.0, config.rotary_dim)
        return (Rotary(config.rotary_dim, family.interleaved, None, frequencies, 1.0),), (0,) * num_layers
    layer_types = config.layer_types if family.rotary == "layer_type" else [None] * num_layers
    kinds = list(dict.fromkeys(layer_types))
    rotates = getattr(config, family.rotary_layers) if family.rotary_layers else [True] * num_layers
    rotaries = tuple(rotary_of(config, family, head_dim, layer_type) for layer_type in kinds)
    return rotaries, tuple(
        kinds.index(layer_type) if rotated else None for layer_type, rotated in zip(layer_types, rotates, strict=True)
    )


def rotary_of(config: "transformers.PreTrainedConfig", family: Family, head_dim: int, layer_type: str | None) -> Rotary:
    """One kind of rotation, as transformers computes it.

    Args:
        config: Of the model.
        family: Its row.
        head_dim: Channels of a head.
        layer_type: Which of the config's rotations; None where it has one.

    Raises:
        UnsupportedModelError: Its rope type is not one of `ROPE_TYPES`.

    Source: `ROPE_INIT_FUNCTIONS` of transformers, which has no function for the default kind
    """
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    rope_type = parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{config.model_type}: rope type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    scale = 1.0
    if rope_type == "default":
        factor = parameters.get("partial_rotary_factor", 1.0) if family.partial else 1.0
        frequencies = plain_frequencies(parameters["rope_theta"], int(head_dim * factor))
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # here alone: it takes seconds

        named = {"layer_type": layer_type} if layer_type else {}
        inverse_frequencies, scale = ROPE_INIT_FUNCTIONS[rope_type](config, **named)
        frequencies = tuple(inverse_frequencies.tolist())
    return Rotary(2 * len(frequencies), family.interleaved, layer_type, frequencies, float(scale))


def plain_frequencies(theta: float, num_channels: int) -> tuple[float, ...]:
    """Radians per position of each pair i: theta^(-2i / num_channels), in float32 as the models have it.

    Source: RoFormer, arXiv 2104.09864, section 3.2.2
    """
    import torch

    exponents = torch.arange(0, num_channels, 2, dtype=torch.float) / num_channels
    return tuple((theta**-exponents).tolist())
