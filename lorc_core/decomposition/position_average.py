"""Moments of rotated keys and queries, averaged over positions in closed form, from moments before the rotation.

For weights, which know no text, and for text in windows that are shorter than what will be served: what stands at a
position is then taken not to depend on it.

Shapes: N kv_width, G kv heads, D head_dim, W channels of one head or several, J their pairs of channels (W / 2).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from lorc_core.decomposition.second_moments import LayerMoments, SecondMoment
from lorc_core.model.architecture import Architecture
from lorc_core.model.rotation import channel_pairs

ROTATED = ("keys", "queries", "summed")  # moments that are measured after the rotation too


def over_positions(
    calibrated: LayerMoments, architecture: Architecture, layer_idx: int, num_positions: int
) -> LayerMoments:
    """Measured moments, those after the rotation replaced by averages over positions of those before it.

    Measured on windows of w tokens, moments after the rotation know the first w positions alone: at a later one keys
    point where the projection keeps nothing. `kq_svd` at half of the cache of stdlib-llama-gqa4, calibrated on windows
    of 32 tokens, raises the loss on 1,024 tokens by 0.88 nats; averaged over 1,024 positions by 0.18; calibrated on
    windows of 1,024 by 0.17. Positions that are never used cost: averaged over 32,768 it is 0.40.

    Args:
        calibrated: What was measured of the layer.
        architecture: Of the model.
        layer_idx: Of the layer.
        num_positions: The average is over 0 .. num_positions - 1.

    Returns:
        The same where the layer has no rotation.
    """
    moments = dict(calibrated.moments)
    for name in ROTATED:
        if (measured := moments.get(f"rotated_{name}")) is None:
            continue
        plain = moments[name]
        total, sums = plain.total, plain.sum
        if total.ndim == 2 and measured.total.ndim == 3:  # keys: over all heads before the rotation, of each after it
            total = torch.stack([_of_head(total, head, architecture) for head in range(architecture.num_kv_heads)])
            sums = sums.unflatten(0, (architecture.num_kv_heads, -1))
        moments[f"rotated_{name}"] = _averaged(
            replace(plain, total=total, sum=sums), architecture, layer_idx, num_positions
        )
    return LayerMoments(moments)


def _of_head(total: Float[Tensor, "n n"], head: int, architecture: Architecture) -> Float[Tensor, "d d"]:
    own = slice(head * architecture.head_dim, (head + 1) * architecture.head_dim)
    return total[own, own]


def _averaged(moment: SecondMoment, architecture: Architecture, layer_idx: int, num_positions: int) -> SecondMoment:
    """Of states over all heads, or of each head alone."""
    if moment.total.ndim == 3:
        heads = [replace(moment, total=total, sum=sums) for total, sums in zip(moment.total, moment.sum, strict=True)]
        averaged = [_averaged(head, architecture, layer_idx, num_positions) for head in heads]
        total, sums = torch.stack([head.total for head in averaged]), torch.stack([head.sum for head in averaged])
    else:
        total = position_average(moment.total, architecture, layer_idx, num_positions)
        sums = mean_rotated(moment.sum, architecture, layer_idx, num_positions)
    return replace(moment, total=total, sum=sums)


class _Pairs(NamedTuple):
    """The two channels of each pair, head after head, and how it rotates."""

    a: Int[Tensor, " j"]
    b: Int[Tensor, " j"]
    theta: Float[Tensor, " j"]
    scale: Float[Tensor, " j"]


def _pairs(like: Float[Tensor, "... w"], architecture: Architecture, layer_idx: int) -> _Pairs:
    """The pairs of as many heads as `like` is wide, on its device."""
    rotary = architecture.layer_rotary(layer_idx)
    assert rotary is not None
    head_dim = architecture.head_dim
    heads = like.shape[-1] // head_dim
    channels, frequencies, scales = (part.to(like.device) for part in channel_pairs(rotary, head_dim))
    starts = torch.arange(heads, device=like.device)[:, None] * head_dim
    a, b = ((starts + channels[part]).flatten() for part in (0, 1))
    return _Pairs(a, b, frequencies.repeat(heads), scales.repeat(heads))


def mean_rotated(
    state: Float[Tensor, " w"], architecture: Architecture, layer_idx: int, num_positions: int
) -> Float[Tensor, " w"]:
    """The mean of R_p state over the positions p = 0 .. num_positions - 1; see `position_average`."""
    a, b, theta, scale = _pairs(state, architecture, layer_idx)
    turned = torch.complex(scale * state[a], scale * state[b]) * _mean_turn(theta, num_positions)
    averaged = torch.empty_like(state)
    averaged[a], averaged[b] = turned.real, turned.imag
    return averaged


def position_average(
    moment: Float[Tensor, "w w"], architecture: Architecture, layer_idx: int, num_positions: int
) -> Float[Tensor, "w w"]:
    """The mean of R_p moment R_p^T over the positions p = 0 .. num_positions - 1, R_p being the rotation at p.

    In closed form: a pair of channels (a, b) rotates as one complex number z = a + ib, by exp(i p theta). So
    E[z_j conj(z_k)] and E[z_j z_k] are multiplied by exp(i p (theta_j - theta_k)) and exp(i p (theta_j + theta_k)),
    whose means over p are geometric sums; and the moments of a and b are halves of sums of these two.

    Args:
        moment: E[s s^T] of the states s before the rotation, over whole heads, all or some.
        architecture: Of the model; the layer has a rotation.
        layer_idx: Of the layer.
        num_positions: How many positions are averaged.

    Returns:
        E[s s^T] after the rotation, in float64 like `moment`; channels that do not rotate have theta = 0.

    Source: derived here; the tests rotate at every position.
    """
    a, b, theta, scale = _pairs(moment, architecture, layer_idx)
    # E[a_j a_k], E[a_j b_k], E[b_j a_k] and E[b_j b_k]
    aa, ab, ba, bb = (scale[:, None] * moment[rows][:, columns] * scale for rows in (a, b) for columns in (a, b))
    # z_j conj(z_k) = a_j a_k + b_j b_k + i (b_j a_k - a_j b_k)
    hermitian = torch.complex(aa + bb, ba - ab) * _mean_turn(theta[:, None] - theta, num_positions)
    # z_j z_k = a_j a_k - b_j b_k + i (b_j a_k + a_j b_k)
    plain = torch.complex(aa - bb, ba + ab) * _mean_turn(theta[:, None] + theta, num_positions)
    averaged = torch.empty_like(moment)
    averaged[a[:, None], a] = (hermitian + plain).real / 2
    averaged[b[:, None], b] = (hermitian - plain).real / 2
    averaged[b[:, None], a] = (hermitian + plain).imag / 2
    averaged[a[:, None], b] = (plain - hermitian).imag / 2
    return averaged


def _mean_turn(angle: Float[Tensor, "*j"], num_positions: int) -> Complex[Tensor, "*j"]:
    """Mean of exp(i p angle) over p = 0 .. num_positions - 1: a geometric sum."""
    half = angle / 2
    # sin(n h) / (n sin h), which is 1 at h = 0; no other zero of sin h is met, as no pair turns by 2 pi a position
    size = torch.where(
        half.sin().abs() < 1e-12, torch.ones_like(half), (num_positions * half).sin() / (num_positions * half.sin())
    )
    return torch.polar(size, half * (num_positions - 1))
