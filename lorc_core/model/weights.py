"""A layer's projections, their biases and the norm before them, each read alone, also where a tensor holds several.

Weights come out as (out_features, in_features), as in `nn.Linear.weight`, whatever the model's own layout. Where the
tensors are is `Architecture`'s to say.

Shapes: H query heads, G kv heads, D head_dim, I hidden_size.
"""

from jaxtyping import Float
from torch import Tensor

from lorc_core.errors import ConfigError
from lorc_core.model.architecture import Architecture
from lorc_core.model.checkpoint import WeightSource
from lorc_core.model.kinds import Projection


def projection_rows(
    architecture: Architecture, projection: Projection, stored: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """The rows of W_q, W_k or W_v, or of its bias, in the tensor that holds it.

    Args:
        architecture: Of the model.
        projection: Which of the three.
        stored: The tensor as the checkpoint has it.

    Raises:
        ConfigError: A fused tensor has not as many rows as the config says.
    """
    family = architecture.family
    rows = stored.T if family.transposed and stored.ndim == 2 else stored
    if family.fused is None:
        return rows
    heads, kv_heads, head_dim = architecture.num_heads, architecture.num_kv_heads, architecture.head_dim
    if len(rows) != (heads + 2 * kv_heads) * head_dim:
        raise ConfigError(
            f"{architecture.model_type}: the fused projection has {len(rows)} rows, the config says "
            f"({heads} + 2 * {kv_heads}) * {head_dim}"
        )
    if family.fused == "stacked":
        query, key, value = rows.split([heads * head_dim, architecture.kv_width, architecture.kv_width])
        return {"q": query, "k": key, "v": value}[projection]
    groups = rows.unflatten(0, (kv_heads, heads // kv_heads + 2, head_dim))
    parts = {"q": groups[:, :-2], "k": groups[:, -2:-1], "v": groups[:, -1:]}
    return parts[projection].flatten(0, 2)


def read_weight(
    source: WeightSource, architecture: Architecture, layer_idx: int, projection: Projection
) -> Float[Tensor, "n i"]:
    """W_q, W_k or W_v of one layer, (heads or kv heads * head_dim, hidden_size).

    Args:
        source: Of the model's tensors.
        architecture: Of the model.
        layer_idx: Of the layer.
        projection: Which of the three.

    Raises:
        ArtifactError: The checkpoint has no such tensor.
        ConfigError: A fused tensor has not as many rows as the config says.
    """
    stored = source.read(architecture.projection_name(layer_idx, projection, "weight"))
    return projection_rows(architecture, projection, stored)


def read_bias(
    source: WeightSource, architecture: Architecture, layer_idx: int, projection: Projection
) -> Float[Tensor, " n"] | None:
    """The bias of W_q, W_k or W_v of one layer; None where it has none. Else as `read_weight`."""
    if not architecture.bias:
        return None
    stored = source.read(architecture.projection_name(layer_idx, projection, "bias"))
    return projection_rows(architecture, projection, stored)


def read_output(source: WeightSource, architecture: Architecture, layer_idx: int) -> Float[Tensor, "i n"]:
    """W_o of one layer, (hidden_size, heads * head_dim), which reads the attended values. Else as `read_weight`."""
    stored = source.read(architecture.output_name(layer_idx))
    return stored.T if architecture.family.transposed else stored


def read_norm_gain(source: WeightSource, architecture: Architecture, layer_idx: int) -> Float[Tensor, " i"]:
    """The gain of the norm before the attention: what it multiplies its normalised input by.

    Args:
        source: Of the model's tensors.
        architecture: Of the model.
        layer_idx: Of the layer.

    Raises:
        ArtifactError: The checkpoint has no such tensor.
    """
    stored = source.read(architecture.norm_name(layer_idx, "weight"))
    return stored + 1 if architecture.input_norm == "rms_plus_one" else stored  # Gemma stores its gain less one
