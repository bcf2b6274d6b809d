"""What weights alone tell of a layer's states and of what reads them.

A normalised input x is taken to be white before the norm's gain g. Behind an RMSNorm W reads g x, so that
C = W diag(g^2) W^T. A LayerNorm centres its input first and adds beta: C = W diag(g) (I - 11^T/I) diag(g) W^T and
m = b + W beta.

Shapes: N kv_width, I in_features, G kv heads, M query heads of a kv head, D head_dim.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.decomposition.symmetric import gram
from lorc_core.methods import Gqa
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import PROJECTION_OF, Kind, Projection
from lorc_core.model.stored.checkpoint import WeightSource
from lorc_core.model.stored.weights import read_bias, read_norm_gain, read_output, read_weight


def projected_input(
    source: WeightSource, architecture: Architecture, layer_idx: int, projection: Projection, *, gain: bool
) -> tuple[Float[Tensor, "n i"], Float[Tensor, " n"] | None]:
    """The weight that acts on a white input, and the constant that it adds.

    Args:
        source: Where the weights are.
        architecture: Of the model.
        layer_idx: Of the layer.
        projection: Queries, keys or values.
        gain: Whether the norm is folded in; without, its output counts as white and the constant is the bias alone.

    Returns:
        In float64; the constant is None where there is none.

    Raises:
        ArtifactError: A tensor is absent.
    """
    weight = read_weight(source, architecture, layer_idx, projection).double()
    stored = read_bias(source, architecture, layer_idx, projection)
    bias = None if stored is None else stored.double()
    if architecture.input_norm is None or not gain:
        return weight, bias
    scaled = weight * read_norm_gain(source, architecture, layer_idx).double()
    if architecture.input_norm in ("rms", "rms_plus_one"):
        return scaled, bias
    centred = scaled - scaled.mean(dim=1, keepdim=True)  # W diag(g) (I - 11^T/I)
    if architecture.input_norm == "layer_unbiased":
        return centred, bias
    shift = weight @ source.read(architecture.norm_name(layer_idx, "bias")).double()
    return centred, shift if bias is None else bias + shift


def with_constant(weight: Float[Tensor, "n i"], constant: Float[Tensor, " n"] | None) -> Float[Tensor, "n _"]:
    """The weight that acts on the input and on a constant 1: its Gram matrix holds the constant's part too.

    Args:
        weight: Acts on the input.
        constant: What is added to every output; None for zero, which leaves the weight as it is.
    """
    return weight if constant is None else torch.cat([weight, constant[:, None]], dim=1)


def known_mean(
    source: WeightSource, architecture: Architecture, layer_idx: int, kind: Kind
) -> Float[Tensor, " n"] | None:
    """The constant that weights tell of the states: the projection's bias, and what a LayerNorm's bias adds.

    Args:
        source: Where the weights are.
        architecture: Of the model.
        layer_idx: Of the layer.
        kind: Keys or values.

    Returns:
        In float64; None where there is none.

    Raises:
        ArtifactError: A tensor is absent.
    """
    gain = architecture.input_norm == "layer"
    return projected_input(source, architecture, layer_idx, PROJECTION_OF[kind], gain=gain)[1]


def query_moment(
    source: WeightSource, architecture: Architecture, layer_idx: int, gqa: Gqa, *, gain: bool
) -> Float[Tensor, "n n"]:
    """M of keys before the rotation: the second moment of the queries of each kv head, block-diagonal.

    Args:
        source: Where the weights are.
        architecture: Of the model.
        layer_idx: Of the layer.
        gqa: Whether the query heads of a kv head are stacked or summed.
        gain: See `projected_input`.

    Raises:
        ArtifactError: A tensor is absent.
    """
    queries = with_constant(*projected_input(source, architecture, layer_idx, "q", gain=gain))
    heads = queries.unflatten(0, (architecture.num_kv_heads, -1, architecture.head_dim))
    return torch.block_diag(*_reader_blocks(heads.transpose(2, 3), gqa))


def output_moment(source: WeightSource, architecture: Architecture, layer_idx: int, gqa: Gqa) -> Float[Tensor, "n n"]:
    """M of values: the sum of W_o,i^T W_o,i over the query heads i of each kv head, block-diagonal.

    Args:
        source: Where the weights are.
        architecture: Of the model.
        layer_idx: Of the layer.
        gqa: Whether the query heads of a kv head are stacked or summed.

    Raises:
        ArtifactError: A tensor is absent.
    """
    weight = read_output(source, architecture, layer_idx).double()
    heads = weight.unflatten(1, (architecture.num_kv_heads, -1, architecture.head_dim))
    return torch.block_diag(*_reader_blocks(heads.permute(1, 2, 0, 3), gqa))


def _reader_blocks(heads: Float[Tensor, "g m i d"], gqa: Gqa) -> Float[Tensor, "g d d"]:
    """Second moments over I rows of the M readers of each kv head: stacked, or of their sum."""
    rows = heads.flatten(1, 2) if gqa == "stack" else heads.sum(dim=1)
    return gram(rows.mT)
