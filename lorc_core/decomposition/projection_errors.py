"""What a variant's projections lose: at most, on calibration text, and at the least for their ranks."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.decomposition.bounds import least_read_errors
from lorc_core.decomposition.factors import Factors
from lorc_core.decomposition.moments import LayerMoments, output_moment, over_all_heads
from lorc_core.model.architecture import Architecture
from lorc_core.model.channels import diagonal_blocks
from lorc_core.model.checkpoint import WeightSource
from lorc_core.model.kinds import PROJECTION_OF, LayerKind
from lorc_core.model.weights import read_bias, read_weight


@dataclass(frozen=True)
class ProjectionErrors:
    """Of one layer's keys or values, root mean square over tokens; None where it was not measured.

    Attributes:
        bound: Theorem 1 of LoRC, for any projection: the spectral norm of (I - P) W times the length of the input (of
            length one, without calibration). None for keys after a norm, or after the rotation unless their projection
            commutes with it: they are no linear map of the input.
        error: Measured length of what the cache loses of the states.
        read_error: Measured root of tr(M (I - P) C (I - P)^T): of the logits, or of the attention output for weights
            of one.
        least_read_error: The least that a projection with as many floats, in the same blocks, can have.
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
    """
    if factors is None:
        return ProjectionErrors(0.0, *(None if calibrated is None else 0.0 for _ in range(3)))
    exact = factors.to("cpu", torch.float64)
    identity = torch.eye(architecture.kv_width, dtype=torch.float64)
    rest = identity - exact.rebuild(exact.project_down(identity)).T
    rotated = factors.rotated and not factors.partition.is_complex  # those commute with the rotation
    bound = None
    normalised = place.kind == "keys" and architecture.qk_norm
    if not rotated and not normalised:
        lost_weight = rest @ read_weight(source, architecture, place.layer_idx, PROJECTION_OF[place.kind]).double()
        bound = torch.linalg.eigvalsh(lost_weight @ lost_weight.T)[-1].clamp(min=0).sqrt().item()
        if calibrated is not None:
            bound *= calibrated.moments["inputs"].about(None).item() ** 0.5
        bound += lost_constant(source, architecture, place, exact, rest)
    if calibrated is None:
        return ProjectionErrors(bound, None, None, None)
    prefix = "rotated_" if rotated else ""
    states = over_all_heads(calibrated.moments[prefix + place.kind].about(exact.mean))
    if place.kind == "values":
        readers = output_moment(source, architecture, place.layer_idx, "stack")
    else:
        queries = calibrated.moments[prefix + "queries"].total / calibrated.num_tokens
        readers = torch.block_diag(*queries)
    lost = rest @ states @ rest.T
    return ProjectionErrors(
        bound=bound,
        error=torch.trace(lost).clamp(min=0).sqrt().item(),
        read_error=torch.trace(readers @ lost).clamp(min=0).sqrt().item(),
        least_read_error=least_read_error(factors, states, readers),
    )


def lost_constant(
    source: WeightSource,
    architecture: Architecture,
    place: LayerKind,
    factors: Factors,
    rest: Float[Tensor, "n n"],
) -> float:
    """Length of (I - P) (b - m): what is lost of the bias where another constant is kept, a LayerNorm's included."""
    stored = read_bias(source, architecture, place.layer_idx, PROJECTION_OF[place.kind])
    bias = torch.zeros(architecture.kv_width, dtype=torch.float64) if stored is None else stored.double()
    return (rest @ (bias if factors.mean is None else bias - factors.mean)).norm().item()


def least_read_error(factors: Factors, states: Float[Tensor, "n n"], readers: Float[Tensor, "n n"]) -> float | None:
    """The best that projections of these ranks can do, block by block; not known for complex blocks."""
    partition = factors.partition
    if partition.rank_step != 1:
        return None
    blocks = zip(diagonal_blocks(states, partition), diagonal_blocks(readers, partition), factors.ranks, strict=True)
    return sum(least_read_errors(*moments)[rank].item() for *moments, rank in blocks) ** 0.5
