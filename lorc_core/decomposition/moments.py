"""C, M and m: the moments that a method's projections are made from, of weights or of calibration text.

Shapes: N kv_width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.decomposition.position_average import position_average
from lorc_core.decomposition.rotation_scale import as_scored, channel_scales
from lorc_core.decomposition.second_moments import LayerMoments, over_all_heads
from lorc_core.decomposition.symmetric import gram
from lorc_core.decomposition.weight_moments import (
    known_mean,
    output_moment,
    projected_input,
    query_moment,
    with_constant,
)
from lorc_core.errors import ConfigError
from lorc_core.methods import Axes
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import PROJECTION_OF, LayerKind
from lorc_core.model.stored.checkpoint import WeightSource


@dataclass(frozen=True)
class Moments:
    """Of one layer's keys or values, in float64.

    Attributes:
        states: C = E[(s - m)(s - m)^T] of the states s to cache.
        readers: M, the second moment of what reads them, block-diagonal over kv heads unless it is the loss's. Of keys,
            what the rotation multiplies channels by is in it: reader and state give the product that is scored.
        mean: m, the constant known for the states; None for zero.
    """

    states: Float[Tensor, "n n"]
    readers: Float[Tensor, "n n"]
    mean: Float[Tensor, " n"] | None


def moments_of(
    source: WeightSource,
    architecture: Architecture,
    place: LayerKind,
    axes: Axes,
    calibrated: LayerMoments | None,
) -> Moments:
    """C, M and m as a method asks for them.

    Keys are read by the queries of every query head of their group, values by W_o: M is the sum over those heads. With
    the reader `gradient` M is the second moment of the loss's gradient with respect to the states.

    Args:
        source: Where the weights are.
        architecture: Of the model.
        place: Layer and kind.
        axes: The method's, for that kind.
        calibrated: What calibration measured of the layer; None where the method needs none.

    Raises:
        ArtifactError: A tensor is absent.
        ConfigError: The method calibrates and there is no calibration.
    """
    if axes.statistics != "calibration":
        return _moments_of_weights(source, architecture, place, axes)
    if calibrated is None:
        raise ConfigError("a method that calibrates needs calibration text")
    if axes.reader == "gradient" and "value_gradients" not in calibrated.moments:
        raise ConfigError("reader gradient needs the moments of `gradient_moments` beside those of `calibrate`")
    return _moments_of_text(source, architecture, place, axes, calibrated)


def _moments_of_weights(source: WeightSource, architecture: Architecture, place: LayerKind, axes: Axes) -> Moments:
    """For inputs that are white before the norm's gain or, without `gain`, after it."""
    layer_idx, kind = place
    gain = axes.statistics == "weights_with_gain"
    weight, mean = projected_input(source, architecture, layer_idx, PROJECTION_OF[kind], gain=gain)
    if kind == "values":
        return Moments(gram(weight), output_moment(source, architecture, layer_idx, axes.gqa), mean)
    readers = query_moment(source, architecture, layer_idx, axes.gqa, gain=gain)
    rotated = axes.rotated(architecture, layer_idx)
    scales = channel_scales(architecture, layer_idx)
    if not rotated and not architecture.qk_norm:
        return Moments(*as_scored(gram(weight), readers, scales, rotated=False), mean)
    # Behind a norm or the rotation the bias is no constant, so it counts as a part of the states.
    states = gram(with_constant(weight, mean))
    if not rotated or axes.block == "frequency":  # complex blocks are the same at all positions
        return Moments(*as_scored(states, readers, scales, rotated=rotated), None)
    states, readers = (
        position_average(moment, architecture, layer_idx, architecture.max_tokens) for moment in (states, readers)
    )
    return Moments(states, readers, None)


def _moments_of_text(
    source: WeightSource, architecture: Architecture, place: LayerKind, axes: Axes, calibrated: LayerMoments
) -> Moments:
    """From what was measured; the readers of values are weights, and known."""
    layer_idx, kind = place
    measured = calibrated.in_space(kind, axes)
    if axes.mean == "measured":
        mean: Tensor | None = measured.mean
    elif axes.has_mean(architecture, layer_idx, kind):
        mean = known_mean(source, architecture, layer_idx, kind)
    else:
        mean = None
    states = over_all_heads(measured.about(mean))
    if axes.reader == "gradient":
        gradients = calibrated.in_space("key_gradients" if kind == "keys" else "value_gradients", axes)
        return Moments(states, over_all_heads(gradients.about(None)), mean)
    if kind == "values":
        return Moments(states, output_moment(source, architecture, layer_idx, axes.gqa), mean)
    queries = calibrated.in_space("queries" if axes.gqa == "stack" else "summed", axes)
    # over the tokens of the text: stacked query heads count as so many more, and add up
    readers = torch.block_diag(*(queries.total / measured.num_tokens))
    if axes.measured_rotated(architecture, layer_idx):
        return Moments(states, readers, mean)
    scales = channel_scales(architecture, layer_idx)
    return Moments(*as_scored(states, readers, scales, rotated=axes.rotated(architecture, layer_idx)), mean)
