"""What a variant's projections lose: at most, on calibration text, and at the least for their ranks.

Shapes: N kv_width. Everything is float64.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.decomposition.bounds import least_read_errors, projection_bound, read_error
from lorc_core.decomposition.factors import Factors
from lorc_core.decomposition.rotation_scale import as_scored, channel_scales
from lorc_core.decomposition.second_moments import LayerMoments, over_all_heads
from lorc_core.decomposition.weight_moments import output_moment
from lorc_core.model.architecture import Architecture
from lorc_core.model.channels import diagonal_blocks
from lorc_core.model.kinds import PROJECTION_OF, LayerKind
from lorc_core.model.stored.checkpoint import WeightSource
from lorc_core.model.stored.weights import read_bias, read_weight


@dataclass(frozen=True)
class ProjectionErrors:
    """Of one layer's keys or values, root mean square over tokens; None where it was not measured.

    Attributes:
        bound: LoRC's theorem 1 for any projection: `projection_bound` times the root mean square length of the input
            (length one, without calibration), and what is lost of the bias. None for keys after a norm, or after the
            rotation unless their projection commutes with it: they are no linear map of the input.
        error: Measured length of what the cache loses of the states.
        read_error: Measured root of tr(M R C R^T). Of keys: the error of the products q . k, before their scale and
            the softmax, squares summed over the query heads and averaged over all pairs of tokens, whichever is the
            earlier; keys from before the rotation as if read from their own position. It is not the error of the
            logits. Of values: the error of what the heads add to the attention's output where one token has all the
            weight, squares summed over the heads.
        least_read_error: The least `read_error` that a projection with as many floats, in the same blocks, can have.
            None for complex blocks, where it is not known.
    """

    bound: float | None
    error: float | None
    read_error: float | None
    least_read_error: float | None


def projection_errors(
    source: WeightSource,
    architecture: Architecture,
    place: LayerKind,
    factors: Factors | None,
    calibrated: LayerMoments | None,
) -> ProjectionErrors:
    """What a projection loses at most, and what it lost on the calibration text.

    Args:
        source: Where the weights are.
        architecture: Of the model.
        place: Layer and kind.
        factors: The projection; None where nothing is lost.
        calibrated: What calibration measured of the layer, if there was any.

    Returns:
        The bound always where there is one; the rest where there was calibration.

    Raises:
        ArtifactError: A tensor is absent.
        NumericsError: What reads the states holds NaN or infinity.
    """
    if factors is None:
        measured = None if calibrated is None else 0.0
        return ProjectionErrors(0.0, measured, measured, measured)
    exact = factors.to("cpu", torch.float64)
    identity = torch.eye(architecture.kv_width, dtype=torch.float64)
    rest = identity - exact.rebuild(exact.project_down(identity)).T
    # complex blocks commute with the rotation, so theirs are measured before it, where keys are linear in the input
    rotated = factors.rotated and not factors.partition.is_complex
    linear = not rotated and not (place.kind == "keys" and architecture.qk_norm)
    scales = channel_scales(architecture, place.layer_idx)
    lost = rest * scales if factors.rotated else rest  # R D: keys are scaled before they are projected
    bound = _bound(source, architecture, place, exact, lost, calibrated) if linear else None
    if calibrated is None:
        return ProjectionErrors(bound, None, None, None)
    prefix = "rotated_" if rotated else ""
    states = over_all_heads(calibrated.moments[prefix + place.kind].about(exact.mean))
    if place.kind == "values":
        readers = output_moment(source, architecture, place.layer_idx, "stack")
    else:
        queries = calibrated.moments[prefix + "queries"].total / calibrated.num_tokens
        readers = torch.block_diag(*queries)
        if not rotated:
            states, readers = as_scored(states, readers, scales, rotated=factors.rotated)
    return ProjectionErrors(
        bound=bound,
        error=read_error(states, identity, rest).clamp(min=0).sqrt().item(),
        read_error=read_error(states, readers, rest).clamp(min=0).sqrt().item(),
        least_read_error=_least_read_error(factors, states, readers),
    )


def _bound(
    source: WeightSource,
    architecture: Architecture,
    place: LayerKind,
    factors: Factors,
    rest: Float[Tensor, "n n"],
    calibrated: LayerMoments | None,
) -> float:
    """Root mean square of what is lost, at most: of W x, and of the constant; `rest` is R, or R D."""
    weight = read_weight(source, architecture, place.layer_idx, PROJECTION_OF[place.kind])
    bound = projection_bound(weight, rest)
    if calibrated is not None:
        bound *= calibrated.moments["inputs"].about(None).item() ** 0.5
    return bound + _lost_constant(source, architecture, place, factors, rest)


def _lost_constant(
    source: WeightSource,
    architecture: Architecture,
    place: LayerKind,
    factors: Factors,
    rest: Float[Tensor, "n n"],
) -> float:
    """Length of R (b - m): what is lost of the bias where another constant is kept, a LayerNorm's included."""
    stored = read_bias(source, architecture, place.layer_idx, PROJECTION_OF[place.kind])
    bias = torch.zeros(architecture.kv_width, dtype=torch.float64) if stored is None else stored.double()
    return (rest @ (bias if factors.mean is None else bias - factors.mean)).norm().item()


def _least_read_error(factors: Factors, states: Float[Tensor, "n n"], readers: Float[Tensor, "n n"]) -> float | None:
    """The best that projections of these ranks can do, block by block; not known for complex blocks."""
    partition = factors.partition
    if partition.rank_step != 1:
        return None
    blocks = zip(diagonal_blocks(states, partition), diagonal_blocks(readers, partition), factors.ranks, strict=True)
    return sum(least_read_errors(*moments)[rank].item() for *moments, rank in blocks) ** 0.5
