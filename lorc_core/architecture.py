"""What lorc must know of a model, from its config alone.

Shapes of the cache, whether keys are rotated, and where the key and value projections live. One row of
`FAMILIES` per model type; nothing here reads a weight.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorc_core.errors import ConfigError, UnsupportedModelError

Kind = Literal["keys", "values"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NormKind = Literal["rms", "layer"]

# Rotary kinds whose angles depend on the position alone; `dynamic` and `longrope` also depend on the length.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its attention, relative to `model.base_model`.

    `bias` is the config field that says whether projections have one, or the fact itself. `norm` is the module whose
    output the projections read.
    """

    attention: str
    rotary: bool
    bias: str | bool
    norm: str
    norm_kind: NormKind = "rms"
    output: str = "o_proj"


FAMILIES = {
    "llama": Family("layers.{}.self_attn", rotary=True, bias="attention_bias", norm="layers.{}.input_layernorm"),
    "mistral": Family("layers.{}.self_attn", rotary=True, bias=False, norm="layers.{}.input_layernorm"),
    "opt": Family(
        "decoder.layers.{}.self_attn",
        rotary=False,
        bias="enable_bias",
        norm="decoder.layers.{}.self_attn_layer_norm",
        norm_kind="layer",
        output="out_proj",
    ),
    "qwen2": Family("layers.{}.self_attn", rotary=True, bias=True, norm="layers.{}.input_layernorm"),
}


@dataclass(frozen=True)
class Architecture:
    """The facts of one model that decide the shape and the statistics of its cache.

    `rotary_frequencies` are radians per position, one per pair of channels of a head; they are not compared, since
    their last bits depend on the machine.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: bool
    bias: bool
    input_norm: NormKind | None
    max_tokens: int
    rotary_frequencies: tuple[float, ...] = field(default=(), compare=False)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Architecture":
        """The inverse of `to_dict`, also after JSON, which has lists for tuples."""
        return cls(**(dict(saved) | {"rotary_frequencies": tuple(saved["rotary_frequencies"])}))

    @property
    def kv_width(self) -> int:
        """Floats cached per token, layer and kind by the untouched model."""
        return self.num_kv_heads * self.head_dim

    def attention_module(self, layer_idx: int) -> str:
        """Path of a layer's attention module below `model.base_model`."""
        return FAMILIES[self.model_type].attention.format(layer_idx)

    def weight_name(self, layer_idx: int, kind: Kind) -> str:
        """Name of the (kv_width, hidden_size) projection weight, below `model.base_model`."""
        return self.projection_name(layer_idx, kind[0], "weight")

    def bias_name(self, layer_idx: int, kind: Kind) -> str | None:
        """Name of the (kv_width,) bias, or None where the projection has none."""
        return self.projection_name(layer_idx, kind[0], "bias") if self.bias else None

    def projection_name(self, layer_idx: int, projection: str, part: str) -> str:
        """Name of the weight or bias of the projection "q", "k" or "v"."""
        return f"{self.attention_module(layer_idx)}.{projection}_proj.{part}"

    def output_name(self, layer_idx: int) -> str:
        """Name of the (hidden_size, num_heads * head_dim) weight that reads the attended values."""
        return f"{self.attention_module(layer_idx)}.{FAMILIES[self.model_type].output}.weight"

    def norm_name(self, layer_idx: int, part: str) -> str:
        """Name of the weight or bias of the norm before the attention."""
        return f"{FAMILIES[self.model_type].norm.format(layer_idx)}.{part}"

    def tensor_names(self) -> list[str]:
        """Every tensor that a weights-only decomposition reads."""
        names = []
        for layer_idx in range(self.num_layers):
            for kind in KINDS:
                names.append(self.weight_name(layer_idx, kind))
                bias = self.bias_name(layer_idx, kind)
                names += [bias] if bias else []
        return names

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Read the facts from a transformers config.

    Args:
        config: Config of a causal language model.

    Raises:
        UnsupportedModelError: The model type or its rotary scaling is not one lorc knows.
        ConfigError: A size is not positive.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    if family.rotary:
        rope_type = config.rope_parameters["rope_type"]
        if rope_type not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"{config.model_type}: rope type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
            )
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if not getattr(config, name, 0) >= 1:
            raise ConfigError(f"{config.model_type}: config field {name} must be at least 1")
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return Architecture(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=head_dim,
        rotary=family.rotary,
        bias=family.bias if isinstance(family.bias, bool) else bool(getattr(config, family.bias)),
        input_norm=input_norm(config, family),
        max_tokens=config.max_position_embeddings,
        rotary_frequencies=rotary_frequencies(config, head_dim) if family.rotary else (),
    )


def rotary_frequencies(config: PreTrainedConfig, head_dim: int) -> tuple[float, ...]:
    """As transformers computes them; the plain kind has no function of its own there."""
    if config.rope_parameters["rope_type"] == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return tuple((config.rope_parameters["rope_theta"] ** -exponents).tolist())
    found, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    return tuple(found.tolist())


def input_norm(config: PreTrainedConfig, family: Family) -> NormKind | None:
    """The norm whose gain the projections' input carries; OPT-350m has its norms elsewhere, Galactica without gain."""
    before = getattr(config, "do_layer_norm_before", True)
    return family.norm_kind if before and getattr(config, "layer_norm_elementwise_affine", True) else None
