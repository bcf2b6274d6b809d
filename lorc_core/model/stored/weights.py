"""A layer's projections, their biases and the norm before them, each read alone, also where a tensor holds several.

Weights come out as (out_features, in_features), as in `nn.Linear.weight`, whatever the model's own layout. Where the
tensors are is `Architecture`'s to say.

Shapes: H query heads, G kv heads, D head_dim, I hidden_size.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.errors import ConfigError
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import KINDS, PROJECTION_OF, Projection
from lorc_core.model.stored.checkpoint import Checkpoint, Rows, WeightSource

Part = Literal["weight", "bias"]


def projection_ranges(architecture: Architecture, projection: Projection) -> list[tuple[int, int]]:
    """The rows of W_q, W_k or W_v in the tensor that holds all three, one range after another."""
    num_heads, num_kv_heads, head_dim = architecture.num_heads, architecture.num_kv_heads, architecture.head_dim
    if architecture.family.fused == "stacked":  # all queries, all keys, all values
        sizes = {"q": num_heads * head_dim, "k": architecture.kv_width, "v": architecture.kv_width}
        starts = {"q": 0, "k": sizes["q"], "v": sizes["q"] + sizes["k"]}
        return [(starts[projection], starts[projection] + sizes[projection])]
    # of each kv head its query heads, its key, its value
    num_readers = num_heads // num_kv_heads
    heads = {"q": (0, num_readers), "k": (num_readers, num_readers + 1), "v": (num_readers + 1, num_readers + 2)}
    first, last = heads[projection]
    groups = range(0, num_kv_heads * (num_readers + 2), num_readers + 2)
    return [((group + first) * head_dim, (group + last) * head_dim) for group in groups]


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
    check_fused(architecture, len(rows))
    return torch.cat([rows[start:stop] for start, stop in projection_ranges(architecture, projection)])


def check_fused(architecture: Architecture, num_rows: int) -> None:
    """Raise ConfigError where a fused tensor has not the rows of queries, keys and values."""
    heads, kv_heads, head_dim = architecture.num_heads, architecture.num_kv_heads, architecture.head_dim
    if num_rows != (heads + 2 * kv_heads) * head_dim:
        raise ConfigError(
            f"{architecture.model_type}: the fused projection has {num_rows} rows, the config says "
            f"({heads} + 2 * {kv_heads}) * {head_dim}"
        )


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
    return read_projection(source, architecture, layer_idx, projection, "weight")


def read_bias(
    source: WeightSource, architecture: Architecture, layer_idx: int, projection: Projection
) -> Float[Tensor, " n"] | None:
    """The bias of W_q, W_k or W_v of one layer; None where it has none. Else as `read_weight`."""
    if not architecture.bias:
        return None
    return read_projection(source, architecture, layer_idx, projection, "bias")


def read_projection(
    source: WeightSource, architecture: Architecture, layer_idx: int, projection: Projection, part: Part
) -> Float[Tensor, "..."]:
    """A weight or bias, of whose tensor no other rows are read where they stand one after another."""
    name = architecture.projection_name(layer_idx, projection, part)
    family = architecture.family
    if family.fused is None or (family.transposed and part == "weight"):
        return projection_rows(architecture, projection, source.read(name))
    check_fused(architecture, source.num_rows(name))
    return source.read(name, projection_ranges(architecture, projection))


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


class ReadOnce:
    """A source that keeps what was read of another: one layer's tensors serve its keys, its values and its digest."""

    def __init__(self, source: WeightSource) -> None:
        self.source = source
        self.kept: dict[tuple[str, tuple[tuple[int, int], ...] | None], Float[Tensor, ...]] = {}

    def read(self, name: str, rows: Rows | None = None) -> Float[Tensor, "..."]:
        key = name, None if rows is None else tuple(rows)
        if key not in self.kept:
            self.kept[key] = self.source.read(name, rows)
        return self.kept[key]

    def num_rows(self, name: str) -> int:
        return self.source.num_rows(name)


def layer_digest(source: WeightSource, architecture: Architecture, layer_idx: int) -> str:
    """Hash of all that a decomposition of one layer's keys and values by their weights alone reads."""
    digest = hashlib.sha256()
    for kind in KINDS:
        projection = PROJECTION_OF[kind]
        weight = read_weight(source, architecture, layer_idx, projection)
        bias = read_bias(source, architecture, layer_idx, projection)
        for part in (weight, bias):
            if part is not None:
                digest.update(part.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_fingerprint(outline: str, layer_digests: Sequence[str]) -> str:
    """Identity of a checkpoint's content: keys and values whole, of all else the outline.

    Args:
        outline: Of the checkpoint.
        layer_digests: Of every layer.
    """
    return hashlib.sha256(" ".join([outline, *layer_digests]).encode()).hexdigest()


def checkpoint_fingerprint(checkpoint: Checkpoint, architecture: Architecture) -> str:
    """`model_fingerprint` of a checkpoint, whose keys and values are read for it.

    Args:
        checkpoint: Of the model.
        architecture: Of the model.

    Raises:
        ArtifactError: A tensor is absent.
        ConfigError: A fused tensor has not as many rows as the config says.
    """
    layers = range(architecture.num_layers)
    digests = [layer_digest(checkpoint, architecture, layer_idx) for layer_idx in layers]
    return model_fingerprint(checkpoint.outline, digests)
