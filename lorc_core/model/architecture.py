"""What lorc must know of a model, from its config alone.

Shapes of the cache, how keys are rotated, and where the projections live, by the model type's row in
`families`; nothing here reads a weight.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorc_core.model.families import FAMILIES, Family, NormKind, family_of
from lorc_core.model.kinds import Projection
from lorc_core.model.rotary import Rotary, rotaries_of
from lorc_core.model.sizes import check_sizes

if TYPE_CHECKING:
    import transformers  # named in strings alone: a zoo file is read without it, which takes seconds to import


@dataclass(frozen=True)
class Architecture:
    """The facts of one model that decide the shape and the statistics of its cache.

    Attributes:
        model_type: Of the config; its row in `FAMILIES`.
        num_layers: Layers with attention.
        hidden_size: Width of the hidden states, which the projections read.
        num_heads: Query heads.
        num_kv_heads: Key heads, as many as value heads.
        num_cached_heads: Heads that the untouched module caches: more than `num_kv_heads` where it caches copies.
        head_dim: Channels of a head.
        bias: Whether the projections of queries, keys and values have one.
        qk_norm: Whether queries and keys pass a norm of their own after the projection.
        input_norm: The kind of the norm before the attention; None where there is none, or none with a gain.
        norm: Path of that norm below `model.base_model`, to be filled with the layer's number.
        max_tokens: Tokens of the longest input.
        rotaries: Every kind of rotation in the model.
        rotary_of_layer: For each layer, which of them; None where its keys are not rotated.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    num_cached_heads: int
    head_dim: int
    bias: bool
    qk_norm: bool
    input_norm: NormKind | None
    norm: str
    max_tokens: int
    rotaries: tuple[Rotary, ...]
    rotary_of_layer: tuple[int | None, ...]

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Architecture":
        """The inverse of `to_dict`, also after JSON, which has lists for tuples."""
        rotaries = tuple(
            Rotary(**(rotary | {"frequencies": tuple(rotary["frequencies"])})) for rotary in saved["rotaries"]
        )
        tuples = {"rotaries": rotaries, "rotary_of_layer": tuple(saved["rotary_of_layer"])}
        return cls(**(dict(saved) | tuples))

    @property
    def family(self) -> Family:
        """Where the model type keeps its attention."""
        return FAMILIES[self.model_type]

    @property
    def kv_width(self) -> int:
        """Different floats per token, layer and kind that the untouched model caches."""
        return self.num_kv_heads * self.head_dim

    @property
    def rotary(self) -> bool:
        """Whether any layer rotates its keys."""
        return any(idx is not None for idx in self.rotary_of_layer)

    def layer_rotary(self, layer_idx: int) -> Rotary | None:
        """How a layer's keys are rotated; None where they are not."""
        idx = self.rotary_of_layer[layer_idx]
        return None if idx is None else self.rotaries[idx]

    def attention_module(self, layer_idx: int) -> str:
        """Path of a layer's attention module below `model.base_model`."""
        return self.family.attention.format(layer_idx)

    def projection_name(self, layer_idx: int, projection: Projection, part: Literal["weight", "bias"]) -> str:
        """Name below `model.base_model` of the tensor that holds a projection.

        Args:
            layer_idx: Of the layer.
            projection: W_q, W_k or W_v; where they are fused, the tensor holds all three.
            part: Its weight or its bias.
        """
        return f"{self.attention_module(layer_idx)}.{self.family.projection.format(projection)}.{part}"

    def output_name(self, layer_idx: int) -> str:
        """Name of the (hidden_size, num_heads * head_dim) weight that reads the attended values."""
        return f"{self.attention_module(layer_idx)}.{self.family.output}.weight"

    def norm_name(self, layer_idx: int, part: Literal["weight", "bias"]) -> str:
        """Name of the weight or bias of the norm before the attention."""
        return f"{self.norm.format(layer_idx)}.{part}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the inverse is `from_dict`."""
        return asdict(self)


def architecture_of(config: "transformers.PreTrainedConfig") -> Architecture:
    """Read the facts from a transformers config.

    Args:
        config: Config of a causal language model.

    Raises:
        UnsupportedModelError: The model type, its attention or its rotary scaling is not one lorc knows.
        ArtifactError: A size is impossible; see `check_sizes`.
    """
    family = family_of(config)
    check_sizes(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = num_kv_heads_of(config)
    rotaries, rotary_of_layer = rotaries_of(config, family, head_dim)
    return Architecture(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        num_cached_heads=config.num_attention_heads if caches_repeated_heads(config) else num_kv_heads,
        head_dim=head_dim,
        bias=config_fact(config, family.bias),
        qk_norm=config_fact(config, family.qk_norm),
        input_norm=input_norm_of(config, family),
        norm="h.{}.ln_attn" if has_norm_for_attention(config) else family.norm,
        max_tokens=family.max_tokens if isinstance(family.max_tokens, int) else getattr(config, family.max_tokens),
        rotaries=rotaries,
        rotary_of_layer=rotary_of_layer,
    )


def config_fact(config: "transformers.PreTrainedConfig", named: str | bool) -> bool:
    """A fact of a family's row: the value of the config field that the row names, or the row's own."""
    return named if isinstance(named, bool) else bool(getattr(config, named))


def caches_repeated_heads(config: "transformers.PreTrainedConfig") -> bool:
    """Falcon's newer decoder repeats each kv head for its query heads before it caches them."""
    return config.model_type == "falcon" and config.new_decoder_architecture


def has_norm_for_attention(config: "transformers.PreTrainedConfig") -> bool:
    """Falcon's newer decoder has, unless told otherwise, one norm for the attention and one for the MLP."""
    return caches_repeated_heads(config) and config.num_ln_in_parallel_attn in (None, 2)


def num_kv_heads_of(config: "transformers.PreTrainedConfig") -> int:
    """Different kv heads of a layer; Falcon's configs say it in three ways."""
    if config.model_type == "falcon":
        if config.new_decoder_architecture:
            return config.num_kv_heads
        return 1 if config.multi_query else config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def input_norm_of(config: "transformers.PreTrainedConfig", family: Family) -> NormKind | None:
    """The kind of the norm whose gain the projections' input carries; None where there is none.

    OPT-350m has its norms after the attention, Galactica has them without a gain.
    """
    before = getattr(config, "do_layer_norm_before", True)
    return family.norm_kind if before and getattr(config, "layer_norm_elementwise_affine", True) else None
