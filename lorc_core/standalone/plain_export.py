"""Write a variant as a checkpoint for transformers alone, whose attention runs and caches at a smaller head size.

For variants that project every kv head by itself, to one rank in the whole model. `plain_folding` makes the weights;
`plain_model` is the code that runs them, copied beside them.
"""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from lorc_core.errors import ConfigError, UnsupportedModelError
from lorc_core.model.kinds import Kind, LayerKind
from lorc_core.standalone import plain_model
from lorc_core.standalone.plain_folding import Change, PlainLayer
from lorc_core.standalone.plain_model import BASE_MODELS, MODELS
from lorc_core.standalone.plan import Plan, open_variant
from lorc_core.standalone.settings import PREFIX, auto_map, published_base
from lorc_core.standalone.writing import new_checkpoint, write_config, write_weights
from lorc_core.variant import Variant

PLAIN_PREFIX = f"{PREFIX}plain_"
MODEL_FILE = "modeling_lorc_plain.py"


@dataclass(frozen=True)
class PlainExported:
    """What a plain export wrote.

    Attributes:
        directory: Of the checkpoint.
        weight_bytes: Of its tensors.
        base_weight_bytes: Of the base's files.
        head_size: Of the heads in attention and cache: the larger of the two ranks.
        ranks: Of the keys and of the values.
    """

    directory: Path
    weight_bytes: int
    base_weight_bytes: int
    head_size: int
    ranks: dict[Kind, int]


def export_plain(variant_dir: Path | str, directory: Path | str, *, base: Path | str | None = None) -> PlainExported:
    """Write a checkpoint that transformers runs without lorc, at one smaller head size for keys and values.

    Where the ranks of keys and values differ, the smaller is padded with zeros, in the cache too.

    Args:
        variant_dir: A variant's directory.
        directory: Made if absent; must be empty.
        base: Directory of the base model now, if not where it was when the variant was made.

    Returns:
        What was written.

    Raises:
        ConfigError: A rank differs between layers, blocks are not heads, keys are cached before the rotation, the
            directory is not empty, or the base model is not found.
        UnsupportedModelError: There is no plain model of that type.
        ArtifactError: The variant is unfinished or altered, or the base is another model.
    """
    plan = open_variant(variant_dir, Path(directory), base)
    ranks = uniform_ranks(plan.variant)
    num_layers, head_size = len(plan.variant.factors), max(ranks.values())
    layers = [PlainLayer.of(plan, layer_idx, head_size) for layer_idx in range(num_layers)]
    output_bias = any(layer.has_output_bias for layer in layers)
    changes = {name: change for layer in layers for name, change in layer.changes(output_bias).items()}
    with new_checkpoint(plan.checkpoint, Path(directory)) as scratch:
        weight_bytes = write_weights(plan.checkpoint, partial(plain_tensors, plan, changes), scratch)
        write_plain_config(plan, ranks, output_bias, scratch)
    return PlainExported(Path(directory), weight_bytes, plan.checkpoint.file_bytes, head_size, ranks)


def uniform_ranks(variant: Variant) -> dict[Kind, int]:
    """The one rank of the keys and that of the values.

    Raises:
        ConfigError: A rank differs between layers, or a layer is not projected as a plain export needs it; the message
            names the layer.
        UnsupportedModelError: There is no plain model of that type.
    """
    architecture = variant.architecture
    if f"{PLAIN_PREFIX}{architecture.model_type}" not in MODELS:
        known = ", ".join(sorted(name.removeprefix(PLAIN_PREFIX) for name in MODELS))
        raise UnsupportedModelError(f"{architecture.model_type}: no plain export of such models; there is for {known}")
    rank_of: dict[Kind, int] = {}
    for layer_idx, layer in enumerate(variant.factors):
        for kind, factors in layer.items():
            place = LayerKind(layer_idx, kind)
            check_per_head(variant, place)
            ranks = {architecture.head_dim} if factors is None else set(factors.ranks)
            if factors is None or ranks != {rank_of.setdefault(kind, min(ranks))}:
                held = "full width kept" if factors is None else f"rank {', '.join(map(str, sorted(ranks)))}"
                others = (
                    f"where others have {rank_of[kind]}" if kind in rank_of else f"{architecture.head_dim} per head"
                )
                raise ConfigError(
                    f"{place}: {held}, {others}; a plain export has one smaller rank in all layers: compress with "
                    "schedule uniform and skip no layer"
                )
    return rank_of


def check_per_head(variant: Variant, place: LayerKind) -> None:
    """Raise ConfigError unless states are projected head by head, and rotated keys after the rotation."""
    axes = variant.method.axes(*place)
    cure = "a plain export is of per-head methods: kq_svd, k_svd, eigen, zack"
    partition = axes.partition(variant.architecture)
    if partition.is_complex or partition.heads_per_block > 1:
        raise ConfigError(f"{place}: {variant.method.name} projects them by block {axes.block}; {cure}")
    is_rotated = place.kind == "keys" and variant.architecture.layer_rotary(place.layer_idx) is not None
    if is_rotated and not axes.rotated(variant.architecture, place.layer_idx):
        raise ConfigError(f"{place}: {variant.method.name} projects them before the rotation; {cure}")


def plain_tensors(plan: Plan, changes: dict[str, Change], full_name: str) -> dict[str, Tensor]:
    """What one tensor of the base becomes.

    Args:
        plan: Of the export.
        changes: Of the tensors that change, by their full names.
        full_name: Of the tensor.
    """
    tensor = plan.read(full_name)
    tensors = changes[full_name](tensor) if full_name in changes else {full_name: tensor}
    return {name: part.contiguous() for name, part in tensors.items()}


def write_plain_config(plan: Plan, ranks: dict[Kind, int], output_bias: bool, directory: Path) -> None:
    """The base's config at the smaller head size, and the file with the model's code.

    Args:
        plan: Of the export.
        ranks: Of the keys and of the values.
        output_bias: Whether `o_proj` has a bias.
        directory: To write to.
    """
    variant = plan.variant
    model_type = f"{PLAIN_PREFIX}{variant.architecture.model_type}"
    model, base_model = MODELS[model_type], BASE_MODELS[model_type]
    changes = {
        "model_type": model_type,
        "architectures": [model.__name__],
        "auto_map": auto_map(
            MODEL_FILE, AutoConfig=model.config_class, AutoModel=base_model, AutoModelForCausalLM=model
        ),
        "head_dim": max(ranks.values()),
        "lorc_plain": {
            "rotated_head_dim": variant.architecture.head_dim,
            "output_bias": output_bias,
            "ranks": ranks,
            "base": published_base(variant.base),
            "method": variant.method.name,
        },
    }
    write_config(plan.checkpoint, changes, directory)
    shutil.copy(plain_model.__file__, directory / MODEL_FILE)
