"""Write a variant as a checkpoint for transformers alone, whose attention runs and caches at a smaller head size.

For variants that project every kv head by itself, to one rank in the whole model. Values are folded into `v_proj` and
`o_proj`, keys without a rotation into `q_proj` and `k_proj`; rotated ones keep two small matrices per kv head.
`plain_model` is the code that runs it, copied beside the weights.

Shapes: H query heads, G kv heads, M = H / G, D head_dim, R head size of the cache, I hidden_size.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lorc_core.decomposition.factors import Factors
from lorc_core.errors import ConfigError, UnsupportedModelError
from lorc_core.model.kinds import KINDS, Kind, Projection
from lorc_core.standalone import plain_model
from lorc_core.standalone.export import Plan, adapted, new_checkpoint, open_variant, write_weights
from lorc_core.standalone.plain_model import BASE_MODELS, MODELS
from lorc_core.standalone.settings import PREFIX, auto_map, published_base
from lorc_core.variant import Variant

PLAIN_PREFIX = f"{PREFIX}plain_"
MODEL_FILE = "modeling_lorc_plain.py"
Part = Literal["weight", "bias"]


@dataclass(frozen=True)
class PlainExported:
    """What a plain export wrote: heads of `head_size` in cache and attention, the larger of the two ranks."""

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

    Raises:
        ConfigError: A rank differs between layers, blocks are not heads, keys are cached before the rotation, the
            directory is not empty, or the base model is not found.
        UnsupportedModelError: There is no plain model of that type.
        ArtifactError: The variant is unfinished or altered, or the base is another model.
    """
    plan = open_variant(variant_dir, Path(directory), base)
    variant, ranks = plan.variant, uniform_ranks(plan.variant)
    layers = [PlainLayer.of(plan, layer_idx, max(ranks.values())) for layer_idx in range(len(variant.factors))]
    output_bias = any(layer.has_output_bias for layer in layers)
    changes = {name: change for layer in layers for name, change in layer.changes(output_bias).items()}
    with new_checkpoint(plan, Path(directory)) as scratch:
        weight_bytes = write_weights(plan.checkpoint, partial(plain_tensors, plan, changes), scratch)
        write_plain_config(plan, ranks, output_bias, scratch)
    return PlainExported(Path(directory), weight_bytes, plan.checkpoint.file_bytes, max(ranks.values()), ranks)


def uniform_ranks(variant: Variant) -> dict[Kind, int]:
    """The one rank of the keys and that of the values; errors say which layer stands in the way of a plain export."""
    architecture = variant.architecture
    if f"{PLAIN_PREFIX}{architecture.model_type}" not in MODELS:
        known = ", ".join(sorted(name.removeprefix(PLAIN_PREFIX) for name in MODELS))
        raise UnsupportedModelError(f"{architecture.model_type}: no plain export of such models; there is for {known}")
    found: dict[Kind, int] = {}
    for layer_idx, layer in enumerate(variant.factors):
        for kind, factors in layer.items():
            place = f"layer {layer_idx} {kind}"
            check_per_head(variant, layer_idx, kind)
            ranks = {architecture.head_dim} if factors is None else set(factors.ranks)
            if factors is None or ranks != {found.setdefault(kind, min(ranks))}:
                held = "full width kept" if factors is None else f"rank {', '.join(map(str, sorted(ranks)))}"
                others = f"where others have {found[kind]}" if kind in found else f"{architecture.head_dim} per head"
                raise ConfigError(
                    f"{place}: {held}, {others}; a plain export has one smaller rank in all layers: compress with "
                    "schedule uniform and skip no layer"
                )
    return found


def check_per_head(variant: Variant, layer_idx: int, kind: Kind) -> None:
    """Raise ConfigError unless states are projected head by head, and rotated keys after the rotation."""
    axes, place = variant.method.axes(layer_idx, kind), f"layer {layer_idx} {kind}"
    cure = "a plain export is of per-head methods: kq_svd, k_svd, eigen, zack"
    partition = axes.partition(variant.architecture)
    if partition.is_complex or partition.heads_per_block > 1:
        raise ConfigError(f"{place}: {variant.method.name} projects them by block {axes.block}; {cure}")
    is_rotated = kind == "keys" and variant.architecture.layer_rotary(layer_idx) is not None
    if is_rotated and not axes.rotated(variant.architecture, layer_idx):
        raise ConfigError(f"{place}: {variant.method.name} projects them before the rotation; {cure}")


@dataclass(frozen=True)
class HeadFactors:
    """One layer's keys or values, head by head in float64, padded with zeros to one size."""

    down: Float[Tensor, "g r d"]
    up: Float[Tensor, "g d r"]
    mean: Float[Tensor, "g d"] | None

    @classmethod
    def of(cls, factors: Factors, head_size: int) -> "HeadFactors":
        exact = factors.to("cpu", torch.float64)
        num_heads = len(factors.ranks)
        short = head_size - factors.ranks[0]
        down = pad(exact.down.unflatten(0, (num_heads, -1)), (0, 0, 0, short))
        up = pad(exact.up.unflatten(1, (num_heads, -1)).transpose(0, 1), (0, short))
        return cls(down, up, None if exact.mean is None else exact.mean.unflatten(0, (num_heads, -1)))

    def fold_down(self, rows: Float[Tensor, "n *i"]) -> Float[Tensor, "k *i"]:
        """What makes latents, from the rows of a weight or bias that makes states."""
        return torch.einsum("grd,gd...->gr...", self.down, by_head(rows, len(self.down))).flatten(0, 1)

    def fold_queries(self, rows: Float[Tensor, "h *i"]) -> Float[Tensor, "k *i"]:
        """What makes queries for latents, from the rows of a weight or bias that makes queries for states."""
        rows = by_head(rows, len(self.up)).unflatten(1, (-1, self.up.shape[1]))
        return torch.einsum("gdr,gmd...->gmr...", self.up, rows).flatten(0, 2)

    def fold_output(self, weight: Float[Tensor, "i n"]) -> Float[Tensor, "i k"]:
        """What reads attended latents, from what reads attended states."""
        num_heads, head_dim, _ = self.up.shape
        columns = weight.unflatten(1, (num_heads, -1, head_dim))
        return torch.einsum("igmd,gdr->igmr", columns, self.up).flatten(1)


def by_head(rows: Float[Tensor, "n *i"], num_kv_heads: int) -> Float[Tensor, "g m *i"]:
    """Rows by the kv head that they belong to, or that is read by their query heads."""
    return rows.unflatten(0, (num_kv_heads, -1))


@dataclass(frozen=True)
class PlainLayer:
    """What one layer's tensors of the base become."""

    plan: Plan
    layer_idx: int
    keys: HeadFactors
    values: HeadFactors
    rotated: bool

    @classmethod
    def of(cls, plan: Plan, layer_idx: int, head_size: int) -> "PlainLayer":
        factors = cast(dict[Kind, Factors], plan.variant.factors[layer_idx])  # `uniform_ranks` left none full
        keys, values = (HeadFactors.of(factors[kind], head_size) for kind in KINDS)
        return cls(plan, layer_idx, keys, values, plan.variant.architecture.rotary)

    @property
    def has_output_bias(self) -> bool:
        return self.values.mean is not None or self._stored_output_bias is not None

    @property
    def _output_name(self) -> str:
        return self.plan.checkpoint.full_name(self.plan.variant.architecture.output_name(self.layer_idx))

    @property
    def _stored_output_bias(self) -> str | None:
        name = f"{self._output_name.removesuffix('weight')}bias"
        return name if name in self.plan.checkpoint.file_of else None

    def name(self, projection: Projection, part: Part) -> str:
        """Full name of a tensor of the base."""
        architecture = self.plan.variant.architecture
        return self.plan.checkpoint.full_name(architecture.projection_name(self.layer_idx, projection, part))

    def read(self, full_name: str) -> Float[Tensor, "..."]:
        """A tensor of the base in float64."""
        return self.plan.checkpoint.read(full_name).double()

    def changes(self, output_bias: bool) -> dict[str, Callable[[Tensor], dict[str, Tensor]]]:
        """By the full name of a base's tensor, what it becomes."""
        folds: dict[Projection, Callable[[Tensor], Tensor]] = {"v": self.values.fold_down}
        if not self.rotated:
            folds |= {"q": self.keys.fold_queries, "k": self.keys.fold_down}
        parts: tuple[Part, ...] = ("weight", "bias") if self.plan.variant.architecture.bias else ("weight",)
        found: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
            self.name(projection, part): partial(folded, self.name(projection, part), fold)
            for projection, fold in folds.items()
            for part in parts
        }
        found[self._output_name] = partial(self._output, output_bias)
        if self._stored_output_bias:
            found[self._stored_output_bias] = lambda _: {}  # written with the weight
        if self.rotated:
            found[self.name("k", "weight")] = self._with_products
        return found

    def _with_products(self, weight: Float[Tensor, "n i"]) -> dict[str, Tensor]:
        """W_k as it was, and what rotated queries and keys are multiplied by."""
        architecture, name = self.plan.variant.architecture, self.name("k", "weight")
        prefix = name.removesuffix(architecture.projection_name(self.layer_idx, "k", "weight"))
        module = f"{prefix}{architecture.attention_module(self.layer_idx)}"
        products = {f"{module}.query_up": self.keys.up, f"{module}.key_down": self.keys.down.mT}
        return {name: weight} | {key: tensor.to(weight.dtype) for key, tensor in products.items()}

    def _output(self, output_bias: bool, weight: Float[Tensor, "i n"]) -> dict[str, Tensor]:
        """W_o for latents, and its bias: with m the values' mean, W_o m less what W_o as stored makes of m's latents.

        Attention weights sum to one, so every query head gets the whole mean of its kv head.
        """
        folded_weight = self.values.fold_output(weight.double()).to(weight.dtype)
        found = {self._output_name: folded_weight}
        if not output_bias:
            return found
        stored = self._stored_output_bias
        bias = torch.zeros(len(weight), dtype=torch.float64) if stored is None else self.read(stored)
        if (mean := self.values.mean) is not None:
            per_query = weight.shape[1] // mean.numel()
            bias = bias + weight.double() @ mean.repeat_interleave(per_query, dim=0).flatten()
            latents = self._latents_of(mean.flatten(), weight.dtype).unflatten(0, (len(mean), -1))
            bias = bias - folded_weight.double() @ latents.repeat_interleave(per_query, dim=0).flatten()
        return found | {f"{self._output_name.removesuffix('weight')}bias": bias.to(weight.dtype)}

    def _latents_of(self, mean: Float[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, " k"]:
        """Latents of the values' mean, of which the bias's part is as `v_proj` has it stored."""
        if not self.plan.variant.architecture.bias:
            return self.values.fold_down(mean)
        bias = self.read(self.name("v", "bias"))
        return self.values.fold_down(mean - bias) + self.values.fold_down(bias).to(dtype).double()


def folded(full_name: str, fold: Callable[[Tensor], Tensor], tensor: Float[Tensor, "n *i"]) -> dict[str, Tensor]:
    """A projection's weight or bias after the fold; computed in float64, kept in the tensor's dtype."""
    return {full_name: fold(tensor.double()).to(tensor.dtype)}


def plain_tensors(
    plan: Plan, changes: dict[str, Callable[[Tensor], dict[str, Tensor]]], full_name: str
) -> dict[str, Tensor]:
    """What one tensor of the base becomes."""
    tensor = adapted(plan, full_name, plan.checkpoint.read(full_name))
    found = changes[full_name](tensor) if full_name in changes else {full_name: tensor}
    return {name: one.contiguous() for name, one in found.items()}


def write_plain_config(plan: Plan, ranks: dict[Kind, int], output_bias: bool, directory: Path) -> None:
    """The base's config at the smaller head size, and the file with the model's code."""
    variant, config = plan.variant, json.loads((plan.checkpoint.directory / "config.json").read_text())
    model_type = f"{PLAIN_PREFIX}{variant.architecture.model_type}"
    model, base_model = MODELS[model_type], BASE_MODELS[model_type]
    config |= {
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
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.copy(plain_model.__file__, directory / MODEL_FILE)
