"""What the benchmarks of a cache at work run: a model, and the ways to run it.

Weights and factors are random unless a model and a variant are given: speed and memory depend on their shapes alone.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from jobs.bench.timing import device, device_line
from lorc_core.attention.attach import Attachment
from lorc_core.decomposition.factors import UNTOUCHED, Factors, LayerFactors
from lorc_core.errors import ConfigError
from lorc_core.methods import METHODS, Method
from lorc_core.model.architecture import Architecture, architecture_of
from lorc_core.model.kinds import KINDS, KeysValues, Kind
from lorc_core.variant import load_variant
from pipeline.zoo.sections import ELEMENT_BYTES

LLAMA_3 = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072}
SHAPES: dict[str, dict[str, Any]] = {
    # LLaMA-3's 8 kv heads of 128 and its rotation, in layers as wide as TinyLlama's, with few tokens, for a laptop
    "small": {
        **LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 4096,
    },
    "llama-3-8b": {
        **LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
# Method, and the shares of the floats of keys and values that are kept.
CONTENDERS = (
    ("kq_svd", 0.5, 0.5),
    ("phasor_freq", 0.5, 0.5),
    ("kq_joint", 0.25, 0.75),
    ("lorc", 0.25, 0.75),
)
BASELINE = "untouched"


@dataclass(frozen=True)
class Subject:
    """The model that is run: one in a directory, perhaps with a variant of it, or a named shape with random weights.

    Attributes:
        num_layers: In place of the shape's.
        intermediate_size: Likewise, of the MLP.

    Raises:
        ConfigError: A shape or a dtype is not known, a variant has no model, or a model's sizes would be changed.
    """

    model: Path | None = None
    variant: Path | None = None
    shape: str = "small"
    num_layers: int | None = None
    intermediate_size: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_known("shape", [self.shape], SHAPES)
        check_known("dtype", [self.dtype], ELEMENT_BYTES)
        if self.variant is not None and self.model is None:
            raise ConfigError("a variant is measured on its base model; name its directory with --model")
        if self.model is not None and (self.num_layers or self.intermediate_size):
            raise ConfigError("--layers and --mlp change a named shape; a model in a directory has its own")

    def __str__(self) -> str:
        return f"{device_line()}, {self.model or f'{self.shape} with random weights'}, {self.dtype}"


def check_known(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError unless all that is given is known."""
    known = list(known)
    if unknown := [choice for choice in given if choice not in known]:
        raise ConfigError(f"{name} {unknown[0]!r} is not known; known are {', '.join(known)}")


@dataclass(frozen=True)
class Contender:
    """A way to run the model."""

    name: str
    factors: tuple[LayerFactors, ...]


def bench_model(subject: Subject) -> PreTrainedModel:
    """The model, on a GPU if there is one."""
    dtype = getattr(torch, subject.dtype)
    if subject.model is not None:
        return AutoModelForCausalLM.from_pretrained(subject.model, dtype=dtype, device_map=device())
    changed = {"num_hidden_layers": subject.num_layers, "intermediate_size": subject.intermediate_size}
    shape = SHAPES[subject.shape] | {name: size for name, size in changed.items() if size is not None}
    torch.manual_seed(0)
    with torch.device(device()):
        return LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=dtype).eval()


def contenders_of(model: PreTrainedModel, variant_dir: Path | None) -> list[Contender]:
    """The untouched model and a variant of it, or one of each method with random factors."""
    architecture = architecture_of(model.config)
    baseline = Contender(BASELINE, (UNTOUCHED,) * architecture.num_layers)
    if variant_dir is not None:
        variant = load_variant(variant_dir)
        return [baseline, Contender(f"{variant.method.name} {variant.kept_fraction:.2f}", variant.factors)]
    compressed = [
        random_contender(architecture, method, KeysValues(keys, values))
        for method, keys, values in CONTENDERS
        if applies(METHODS[method], architecture)
    ]
    return [baseline, *compressed]


def applies(method: Method, architecture: Architecture) -> bool:
    """Whether a model can be compressed so; one without rotation has no frequencies."""
    try:
        method.check(architecture)
    except ConfigError:
        return False
    return True


def random_contender(architecture: Architecture, method: str, kept: KeysValues[float]) -> Contender:
    """Random factors of a method's blocks and uniform ranks."""
    generator = torch.Generator().manual_seed(0)

    def factors(layer_idx: int, kind: Kind) -> Factors:
        axes = METHODS[method].axes(layer_idx, kind)
        partition = axes.partition(architecture)
        rank = round(kept[kind] * partition.width / partition.rank_step) * partition.rank_step
        total = rank * partition.num_blocks
        up = torch.randn(partition.width, total, generator=generator) / partition.width**0.5
        own_down = up.T.clone() if axes.is_balanced else None
        rotated = kind == "keys" and axes.rotated(architecture, layer_idx)
        return Factors(partition, (rank,) * partition.num_blocks, up, own_down, None, rotated)

    layers: tuple[LayerFactors, ...] = tuple(
        KeysValues(*(factors(layer_idx, kind) for kind in KINDS)) for layer_idx in range(architecture.num_layers)
    )
    shares = f"{kept.keys:g}" if kept.keys == kept.values else f"{kept.keys:g}/{kept.values:g}"
    return Contender(f"{method} {shares}", layers)


@contextmanager
def attached(model: PreTrainedModel, contender: Contender) -> Iterator[None]:
    """The contender's factors on the model, if it has any."""
    if not any(any(layer) for layer in contender.factors):
        yield
        return
    with Attachment(model, architecture_of(model.config), contender.factors):
        yield
