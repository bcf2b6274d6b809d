"""The second moment of rotated keys or queries, averaged over all positions of a model.

Shapes: N kv_width, J pairs of channels of all heads (N / 2).
"""

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from lorc_core.model.architecture import Architecture
from lorc_core.model.rotation import channel_pairs


def position_average(moment: Float[Tensor, "n n"], architecture: Architecture, layer_idx: int) -> Float[Tensor, "n n"]:
    """The mean of R_p moment R_p^T over the positions p = 0 .. max_tokens - 1, R_p being the rotation at p.

    In closed form: a pair of channels (a, b) rotates as one complex number z = a + ib, by exp(i p theta). So
    E[z_j conj(z_k)] and E[z_j z_k] are multiplied by exp(i p (theta_j - theta_k)) and exp(i p (theta_j + theta_k)),
    whose means over p are geometric sums; and the moments of a and b are halves of sums of these two.

    Args:
        moment: E[s s^T] of the states s before the rotation, over all kv heads.
        architecture: Of the model; the layer has a rotation.
        layer_idx: Of the layer.

    Returns:
        E[s s^T] after the rotation, in float64 like `moment`; channels that do not rotate have theta = 0.

    Source: derived here; the tests rotate at every position.
    """
    rotary = architecture.layer_rotary(layer_idx)
    assert rotary is not None
    heads, head_dim = architecture.num_kv_heads, architecture.head_dim
    channels, frequencies, scales = (part.to(moment.device) for part in channel_pairs(rotary, head_dim))
    starts = torch.arange(heads, device=moment.device)[:, None] * head_dim
    a, b = ((starts + channels[part]).flatten() for part in (0, 1))  # the two channels of each pair, head after head
    theta, scale = frequencies.repeat(heads), scales.repeat(heads)
    # E[a_j a_k], E[a_j b_k], E[b_j a_k] and E[b_j b_k]
    aa, ab, ba, bb = (scale[:, None] * moment[rows][:, columns] * scale for rows in (a, b) for columns in (a, b))
    # z_j conj(z_k) = a_j a_k + b_j b_k + i (b_j a_k - a_j b_k)
    hermitian = torch.complex(aa + bb, ba - ab) * _mean_turn(theta[:, None] - theta, architecture.max_tokens)
    # z_j z_k = a_j a_k - b_j b_k + i (b_j a_k + a_j b_k)
    plain = torch.complex(aa - bb, ba + ab) * _mean_turn(theta[:, None] + theta, architecture.max_tokens)
    averaged = torch.empty_like(moment)
    averaged[a[:, None], a] = (hermitian + plain).real / 2
    averaged[b[:, None], b] = (hermitian - plain).real / 2
    averaged[b[:, None], a] = (hermitian + plain).imag / 2
    averaged[a[:, None], b] = (plain - hermitian).imag / 2
    return averaged


def _mean_turn(angle: Float[Tensor, "j k"], num_positions: int) -> Complex[Tensor, "j k"]:
    """Mean of exp(i p angle) over p = 0 .. num_positions - 1: a geometric sum."""
    half = angle / 2
    # sin(n h) / (n sin h), which is 1 at h = 0; no other zero of sin h is met, as no pair turns by 2 pi a position
    size = torch.where(
        half.sin().abs() < 1e-12, torch.ones_like(half), (num_positions * half).sin() / (num_positions * half.sin())
    )
    return torch.polar(size, half * (num_positions - 1))
