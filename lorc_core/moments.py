"""Second moments of what a layer caches and of what reads it: the input of every projection.

From the weights alone, the input norm's gain folded in: a normalised input has unit second moment before its gain.

Shapes: N kv_width, I in_features, G kv heads, D head_dim, H query heads.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.architecture import Architecture, Kind
from lorc_core.checkpoint import WeightSource


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


def weight_moments(source: WeightSource, architecture: Architecture, layer_idx: int, kind: Kind) -> Moments:
    """Moments for inputs that are white before the input norm's gain.

    RMSNorm: C = W diag(g^2) W^T. LayerNorm: C = W diag(g) (I - 11^T/I) diag(g) W^T and m = b + W beta. Keys are read
    by the queries of every query head of their group, values by W_o: M is the sum over those heads.

    Args:
        source: Where the weights are; W_q or W_o is read beside W_k or W_v.
        architecture: Of the model.
        layer_idx: Of the layer.
        kind: Keys or values.

    Raises:
        ArtifactError: A tensor is absent.
    """
    states, mean = projected_input(source, architecture, layer_idx, kind[0])
    if kind == "keys":
        queries, offset = projected_input(source, architecture, layer_idx, "q")
        read = queries if offset is None else torch.cat([queries, offset[:, None]], dim=1)
        heads = read.unflatten(0, (architecture.num_kv_heads, -1, architecture.head_dim))
        blocks = torch.einsum("ghdi,ghei->gde", heads, heads)
    else:
        weight = source.read(architecture.output_name(layer_idx)).double()
        heads = weight.unflatten(1, (architecture.num_kv_heads, -1, architecture.head_dim))
        blocks = torch.einsum("oghd,oghe->gde", heads, heads)
    return Moments(states @ states.T, torch.block_diag(*blocks), mean)


def projected_input(
    source: WeightSource, architecture: Architecture, layer_idx: int, projection: str
) -> tuple[Float[Tensor, "n i"], Float[Tensor, " n"] | None]:
    """The weight that acts on a white input, with the norm folded in, and the constant it adds."""
    weight = source.read(architecture.projection_name(layer_idx, projection, "weight")).double()
    bias = (
        source.read(architecture.projection_name(layer_idx, projection, "bias")).double() if architecture.bias else None
    )
    if architecture.input_norm is None:
        return weight, bias
    gain = source.read(architecture.norm_name(layer_idx, "weight")).double()
    scaled = weight * gain
    if architecture.input_norm == "layer":
        shift = weight @ source.read(architecture.norm_name(layer_idx, "bias")).double()
        return scaled - scaled.mean(dim=1, keepdim=True), shift if bias is None else bias + shift
    return scaled, bias
