"""What some rotations multiply channels by beside turning them (yarn, longrope), in moments from before the rotation.

With D the diagonal matrix of these scales, a score is (D R_p q) . (D R_j k). D commutes with every rotation R, so keys
that are cached before the rotation are read by D^2 q, and keys that are cached after it are D k, read by D q.

Shapes: N kv_width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.model.architecture import Architecture
from lorc_core.model.rotation import channel_pairs


def channel_scales(architecture: Architecture, layer_idx: int) -> Float[Tensor, " n"]:
    """D of one layer, over all kv heads, in float64; ones for channels that pass, and where nothing is rotated.

    Args:
        architecture: Of the model.
        layer_idx: Of the layer.

    Source: YaRN, arXiv 2309.00071, section 3.4 (its attention scaling, put into the rotary embedding)
    """
    scales = torch.ones(architecture.head_dim, dtype=torch.float64)
    rotary = architecture.layer_rotary(layer_idx)
    if rotary is not None:
        pairs = channel_pairs(rotary, architecture.head_dim)
        scales[pairs.channels] = pairs.scales.expand_as(pairs.channels)
    return scales.repeat(architecture.num_kv_heads)


def scaled(moment: Float[Tensor, "n n"], scales: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
    """The second moment of vectors whose channels are multiplied so."""
    scales = scales.to(moment.device)
    return scales[:, None] * moment * scales


def as_scored(
    states: Float[Tensor, "n n"], readers: Float[Tensor, "n n"], scales: Float[Tensor, " n"], *, rotated: bool
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """C and M of keys as the scores take them, from those measured before the rotation.

    Args:
        states: C of keys.
        readers: M, of queries.
        scales: From `channel_scales`.
        rotated: Whether what is cached are keys after the rotation.
    """
    if rotated:
        return scaled(states, scales), scaled(readers, scales)
    return states, scaled(readers, scales.square())
