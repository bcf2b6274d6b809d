"""Second moments of what a layer caches and of what reads it: the input of every projection.

From weights alone, with or without the input norm's gain (a normalised input is white before it), or from sums that
`calibration` streamed over text.

Shapes: N kv_width, I in_features, G kv heads, D head_dim, T tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from lorc_core.errors import ConfigError
from lorc_core.methods import Axes, Gqa
from lorc_core.model.architecture import Architecture
from lorc_core.model.checkpoint import WeightSource
from lorc_core.model.kinds import PROJECTION_OF, Kind, LayerKind, Projection
from lorc_core.model.rotation import rotary_pairs
from lorc_core.model.weights import read_bias, read_gain, read_output, read_weight

WIDE_GRAM = 512  # narrower products gain nothing from being split


@dataclass(frozen=True)
class Moments:
    """Of one layer's keys or values, in float64.

    Attributes:
        states: C = E[(s - m)(s - m)^T] of the states s to cache.
        readers: M, the second moment of what reads them, block-diagonal over kv heads.
        mean: m, the constant known for the states; None for zero.
    """

    states: Float[Tensor, "n n"]
    readers: Float[Tensor, "n n"]
    mean: Float[Tensor, " n"] | None


@dataclass(frozen=True)
class SecondMoment:
    """Sums over tokens, in float64: of x x^T and of x. They add up across batches, texts and workers."""

    total: Float[Tensor, "*batch i i"]
    sum: Float[Tensor, "*batch i"]
    num_tokens: int

    @classmethod
    def of(cls, tokens: Float[Tensor, "*batch t i"]) -> "SecondMoment":
        exact = tokens.double()
        return cls(gram(exact), exact.sum(dim=-2), tokens.shape[-2])

    def __add__(self, other: "SecondMoment") -> "SecondMoment":
        return SecondMoment(self.total + other.total, self.sum + other.sum, self.num_tokens + other.num_tokens)

    @property
    def mean(self) -> Float[Tensor, "*batch i"]:
        return self.sum / self.num_tokens

    def about(self, centre: Float[Tensor, " i"] | None) -> Float[Tensor, "*batch i i"]:
        """E[(x - centre)(x - centre)^T], with zero for no centre."""
        raw = self.total / self.num_tokens
        if centre is None:
            return raw
        cross = torch.outer(self.mean, centre)
        return raw - cross - cross.T + torch.outer(centre, centre)


def gram(tokens: Float[Tensor, "*batch t i"]) -> Float[Tensor, "*batch i i"]:
    """x^T x, computing the blocks below the diagonal once: five eighths of the work where it is wide."""
    width = tokens.shape[-1]
    if width < WIDE_GRAM:
        return tokens.mT @ tokens
    left, right = tokens[..., : width // 2], tokens[..., width // 2 :]
    corner = left.mT @ right
    upper = torch.cat([gram(left), corner], dim=-1)
    return torch.cat([upper, torch.cat([corner.mT, gram(right)], dim=-1)], dim=-2)


@dataclass(frozen=True)
class LayerMoments:
    """What calibration measured of one layer.

    Attributes:
        moments: By stage: `inputs`, the lengths of what the projections read (1); `keys` and `values` over all kv
            heads (N); `queries` (G, D), of the query heads that read each kv head taken as so many tokens; `summed`
            (G, D), of the sum of those query heads; and, where there is a rotation, `rotated_queries`,
            `rotated_summed` and `rotated_keys`, these of each head (G, D) or, where a method asks for it, over all
            (N).
    """

    moments: dict[str, SecondMoment]

    def __add__(self, other: "LayerMoments") -> "LayerMoments":
        return LayerMoments({stage: found + other.moments[stage] for stage, found in self.moments.items()})

    @property
    def num_tokens(self) -> int:
        return self.moments["values"].num_tokens

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored, by name; the inverse is `of_tensors`."""
        found: dict[str, Tensor] = {}
        for stage, moment in self.moments.items():
            parts = {"total": moment.total, "sum": moment.sum, "num_tokens": torch.tensor(moment.num_tokens)}
            found |= {f"{stage}.{name}": part.cpu().clone() for name, part in parts.items()}  # stages may share them
        return found

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "LayerMoments":
        stages = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        return cls(
            {
                stage: SecondMoment(
                    tensors[f"{stage}.total"], tensors[f"{stage}.sum"], int(tensors[f"{stage}.num_tokens"])
                )
                for stage in stages
            }
        )

    def stage(self, name: str, axes: Axes) -> SecondMoment:
        """Keys or queries where the method looks at them; complex blocks are the same before the rotation."""
        rotated = axes.space == "post_rope" and axes.block != "frequency" and f"rotated_{name}" in self.moments
        return self.moments[f"rotated_{name}" if rotated else name]


def measure(
    keys: Float[Tensor, "g t d"],
    queries: Float[Tensor, "g m t d"],
    prefix: Literal["", "rotated_"],
    *,
    join_heads: bool,
) -> dict[str, SecondMoment]:
    """The moments of keys and queries in one space; M queries read each kv head."""
    stacked = SecondMoment.of(queries.flatten(1, 2))
    return {
        f"{prefix}keys": SecondMoment.of(keys.transpose(0, 1).flatten(1) if join_heads else keys),
        f"{prefix}queries": stacked,
        f"{prefix}summed": stacked if queries.shape[1] == 1 else SecondMoment.of(queries.sum(dim=1)),
    }


def moments_of(
    source: WeightSource,
    architecture: Architecture,
    place: LayerKind,
    axes: Axes,
    calibrated: LayerMoments | None,
) -> Moments:
    """C, M and m as a method asks for them.

    With x white before the norm's gain g: RMSNorm gives C = W diag(g^2) W^T; LayerNorm C = W diag(g) (I - 11^T/I)
    diag(g) W^T and m = b + W beta. Keys are read by the queries of every query head of their group, values by W_o: M
    is the sum over those heads. After the rotation, or a norm of the keys, m is zero, the bias being no constant
    there; after the rotation C and M from weights are averaged over all positions of the model.

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
    layer_idx, kind = place
    if axes.statistics == "calibration":
        if calibrated is None:
            raise ConfigError("a method that calibrates needs calibration text")
        return calibrated_moments(source, architecture, place, axes, calibrated)
    gain = axes.statistics == "weights_with_gain"
    states, mean = projected_input(source, architecture, layer_idx, PROJECTION_OF[kind], gain=gain)
    if kind == "values":
        return Moments(states @ states.T, output_moment(source, architecture, layer_idx, axes.gqa), mean)
    queries = with_constant(*projected_input(source, architecture, layer_idx, "q", gain=gain))
    heads = queries.unflatten(0, (architecture.num_kv_heads, -1, architecture.head_dim))
    readers = torch.block_diag(*reader_blocks(heads.transpose(2, 3), axes.gqa))
    rotated = axes.rotated(architecture, layer_idx)
    if not rotated and not architecture.qk_norm:
        return Moments(states @ states.T, readers, mean)
    keys = with_constant(states, mean)
    if not rotated or axes.block == "frequency":
        return Moments(keys @ keys.T, readers, None)
    average = [position_average(moment, architecture, layer_idx) for moment in (keys @ keys.T, readers)]
    return Moments(average[0], average[1], None)


def calibrated_moments(
    source: WeightSource,
    architecture: Architecture,
    place: LayerKind,
    axes: Axes,
    calibrated: LayerMoments,
) -> Moments:
    """C, M and m from what was measured; the readers of values are weights, and known."""
    layer_idx, kind = place
    measured = calibrated.stage(kind, axes)
    if axes.mean == "measured":
        mean: Tensor | None = measured.mean
    else:
        known = axes.has_mean(architecture, layer_idx, kind)
        mean = known_mean(source, architecture, layer_idx, kind) if known else None
    states = over_all_heads(measured.about(mean))
    if kind == "values":
        return Moments(states, output_moment(source, architecture, layer_idx, axes.gqa), mean)
    found = calibrated.stage("queries" if axes.gqa == "stack" else "summed", axes)
    return Moments(states, torch.block_diag(*(found.total / measured.num_tokens)), mean)


def over_all_heads(moment: Float[Tensor, "*g i i"]) -> Float[Tensor, "n n"]:
    """The moment over all kv heads; zero between heads where each was measured alone, which nothing then reads."""
    return moment if moment.ndim == 2 else torch.block_diag(*moment)


def known_mean(
    source: WeightSource, architecture: Architecture, layer_idx: int, kind: Kind
) -> Float[Tensor, " n"] | None:
    """The projection's bias; also what the LayerNorm's bias adds."""
    gain = architecture.input_norm == "layer"
    return projected_input(source, architecture, layer_idx, PROJECTION_OF[kind], gain=gain)[1]


def output_moment(source: WeightSource, architecture: Architecture, layer_idx: int, gqa: Gqa) -> Float[Tensor, "n n"]:
    """sum_i W_o,i^T W_o,i over the query heads of each kv head, block-diagonal."""
    weight = read_output(source, architecture, layer_idx).double()
    heads = weight.unflatten(1, (architecture.num_kv_heads, -1, architecture.head_dim))
    return torch.block_diag(*reader_blocks(heads.permute(1, 2, 0, 3), gqa))


def reader_blocks(heads: Float[Tensor, "g m t d"], gqa: Gqa) -> Float[Tensor, "g d d"]:
    """Second moments of the M readers of each kv head: stacked, or of their sum."""
    stacked = heads.flatten(1, 2) if gqa == "stack" else heads.sum(dim=1)
    return stacked.mT @ stacked


def with_constant(weight: Float[Tensor, "n i"], constant: Float[Tensor, " n"] | None) -> Float[Tensor, "n _"]:
    """The weight that acts on the input and on a constant 1."""
    return weight if constant is None else torch.cat([weight, constant[:, None]], dim=1)


def projected_input(
    source: WeightSource, architecture: Architecture, layer_idx: int, projection: Projection, *, gain: bool
) -> tuple[Float[Tensor, "n i"], Float[Tensor, " n"] | None]:
    """The weight that acts on a white input, with the norm folded in if `gain`, and the constant it adds."""
    weight = read_weight(source, architecture, layer_idx, projection).double()
    stored = read_bias(source, architecture, layer_idx, projection)
    bias = None if stored is None else stored.double()
    if architecture.input_norm is None or not gain:
        return weight, bias
    scaled = weight * read_gain(source, architecture, layer_idx).double()
    if architecture.input_norm in ("rms", "rms_plus_one"):
        return scaled, bias
    centred = scaled - scaled.mean(dim=1, keepdim=True)
    if architecture.input_norm == "layer_unbiased":
        return centred, bias
    shift = weight @ source.read(architecture.norm_name(layer_idx, "bias")).double()
    return centred, shift if bias is None else bias + shift


def position_average(moment: Float[Tensor, "n n"], architecture: Architecture, layer_idx: int) -> Float[Tensor, "n n"]:
    """The mean over positions p = 0 .. max_tokens - 1 of R_p moment R_p^T, R_p being the rotation at p, in closed form.

    A pair of channels rotates as one complex number z = a + ib, so E[z z^H] and E[z z^T] are multiplied by the mean of
    exp(i p (theta_j -+ theta_k)), a geometric sum.
    """
    rotary = architecture.layer_rotary(layer_idx)
    assert rotary is not None
    heads, head_dim = architecture.num_kv_heads, architecture.head_dim
    channels, frequencies, scales = (part.to(moment.device) for part in rotary_pairs(rotary, head_dim))
    starts = torch.arange(heads, device=moment.device)[:, None] * head_dim
    a, b = ((starts + channels[part]).flatten() for part in (0, 1))
    theta, scale = frequencies.repeat(heads), scales.repeat(heads)
    aa, ab, ba, bb = (scale[:, None] * moment[rows][:, columns] * scale for rows in (a, b) for columns in (a, b))
    hermitian = torch.complex(aa + bb, ba - ab) * mean_phase(theta[:, None] - theta, architecture.max_tokens)
    plain = torch.complex(aa - bb, ba + ab) * mean_phase(theta[:, None] + theta, architecture.max_tokens)
    averaged = torch.empty_like(moment)
    averaged[a[:, None], a] = (hermitian + plain).real / 2
    averaged[b[:, None], b] = (hermitian - plain).real / 2
    averaged[b[:, None], a] = (hermitian + plain).imag / 2
    averaged[a[:, None], b] = (plain - hermitian).imag / 2
    return averaged


def mean_phase(angle: Float[Tensor, "j k"], num_positions: int) -> Complex[Tensor, "j k"]:
    """Mean of exp(i p angle) over p = 0 .. num_positions - 1."""
    half = angle / 2
    size = torch.where(
        half.sin().abs() < 1e-12, torch.ones_like(half), (num_positions * half).sin() / (num_positions * half.sin())
    )
    return torch.polar(size, half * (num_positions - 1))
