"""A variant on disk: the factors that compress one model's cache, kept beside an untouched base model.

A directory with `lorc_config.json`, `factors.safetensors`, `README.md` and `manifest.json` (the sha256 of each
other file, written last). Nothing is pickled.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorc_core.decomposition.factors import Factors, LayerFactors
from lorc_core.errors import ArtifactError
from lorc_core.manifest import MANIFEST_FILE, check_manifest, write_manifest
from lorc_core.methods import Method, method_from_dict
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import KINDS, KeysValues, LayerKind
from lorc_core.ranks.spectra import RankSchedule

SCHEMA_VERSION = 4
CONFIG_FILE = "lorc_config.json"
FACTORS_FILE = "factors.safetensors"
ADAPTERS = "adapters"
FACTOR_TENSORS = ("up", "own_down", "mean")


@dataclass(frozen=True)
class BaseModel:
    """The model that a variant was made for.

    Attributes:
        source: Its directory or hub id; empty for a model in memory that was not loaded from anywhere.
        revision: Its commit on the hub; None for a directory.
        fingerprint: Of its checkpoint; None for a model in memory, which may differ from its files.
    """

    source: str
    revision: str | None
    fingerprint: str | None


@dataclass(frozen=True)
class Variant:
    """One base model compressed by one method to one budget.

    Attributes:
        base: What was compressed.
        architecture: Its facts.
        method: How projections were chosen.
        schedule: How ranks were chosen, as `dataclasses.asdict` gives it.
        ranks: Of every layer.
        factors: For each layer, of its keys and of its values; None where they keep their full width.
        adapters: LoRA matrices trained with the factors, by name; empty for most variants. See
            `lorc_core.attention.adapters`.
    """

    base: BaseModel
    architecture: Architecture
    method: Method
    schedule: dict[str, Any]
    ranks: RankSchedule
    factors: tuple[LayerFactors, ...]
    adapters: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def kept_fraction(self) -> float:
        """Share of the base model's cached floats that the variant caches."""
        return self.ranks.kept_fraction

    def __repr__(self) -> str:
        source = self.base.source or "a model in memory"
        return f"Variant({source}, {self.method.name}, {self.schedule['name']}, {self.ranks.kept})"

    def save(self, directory: Path | str) -> None:
        """Write the variant; the manifest last, so that a broken write is never taken for a variant.

        Args:
            directory: Made if absent; files of an earlier variant in it are replaced.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
        save_file(self._tensors(), directory / FACTORS_FILE)
        (directory / CONFIG_FILE).write_text(json.dumps(self._config(), indent=2, sort_keys=True) + "\n")
        (directory / "README.md").write_text(model_card(self))
        write_manifest(directory)

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"{ADAPTERS}.{name}": tensor.contiguous() for name, tensor in self.adapters.items()}
        for layer_idx, layer in enumerate(self.factors):
            for kind, factors in layer.items():
                if factors is not None:
                    tensors |= {f"layers.{layer_idx}.{kind}.{name}": part for name, part in factors.tensors().items()}
        return tensors

    @property
    def factor_floats(self) -> int:
        """Floats held beside the base model while the variant is attached."""
        return sum(tensor.numel() for tensor in self._tensors().values())

    def _config(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "base": asdict(self.base),
            "architecture": self.architecture.to_dict(),
            "method": self.method.to_dict(),
            "schedule": self.schedule,
            "ranks": asdict(self.ranks),
            "kept_fraction": self.kept_fraction,
            "floats_per_token": self.ranks.floats_per_token,
        }


def load_variant(directory: Path | str) -> Variant:
    """Read a variant and check that its files are whole and of this schema.

    Args:
        directory: As `Variant.save` wrote it.

    Raises:
        ArtifactError: No variant is there, a file was altered, or the schema is another.
    """
    directory = Path(directory)
    check_manifest(directory, required=(CONFIG_FILE, FACTORS_FILE))
    config = json.loads((directory / CONFIG_FILE).read_text())
    if (schema := config.get("schema_version")) != SCHEMA_VERSION:
        raise ArtifactError(
            f"{directory}: variant schema {schema}, this lorc reads {SCHEMA_VERSION}; compress the model again"
        )
    tensors = load_file(directory / FACTORS_FILE)
    try:
        ranks = RankSchedule.from_dict(config["ranks"])
        architecture, method = Architecture.from_dict(config["architecture"]), method_from_dict(config["method"])
        return Variant(
            base=BaseModel(**config["base"]),
            architecture=architecture,
            method=method,
            schedule=config["schedule"],
            ranks=ranks,
            factors=tuple(
                KeysValues(
                    *(
                        read_factors(
                            directory, tensors, layer[kind], LayerKind(layer_idx, kind), (method, architecture)
                        )
                        for kind in KINDS
                    )
                )
                for layer_idx, layer in enumerate(ranks.layers)
            ),
            adapters={
                name.removeprefix(f"{ADAPTERS}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{ADAPTERS}.")
            },
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{directory / CONFIG_FILE}: not a variant's config ({error})") from error


def read_factors(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    ranks: tuple[int, ...],
    place: LayerKind,
    made_by: tuple[Method, Architecture],
) -> Factors | None:
    """The factors of one layer's keys or values, of the shapes that ranks and method say.

    Args:
        directory: Of the variant, for errors.
        tensors: All of its tensors, by name.
        ranks: Of each block.
        place: Which layer, and keys or values.
        made_by: Method and architecture of the variant.

    Returns:
        The factors; None where the full width is kept.

    Raises:
        ArtifactError: A tensor is absent or of another shape.
    """
    method, architecture = made_by
    axes, prefix = method.axes(*place), f"layers.{place.layer_idx}.{place.kind}"
    if sum(ranks) == architecture.kv_width:
        return None
    partition = axes.partition(architecture)
    expected: dict[str, tuple[int, ...]] = {"up": (partition.width, sum(ranks))}
    if axes.is_balanced:
        expected["own_down"] = (sum(ranks), partition.width)
    if axes.has_mean(architecture, *place):
        expected["mean"] = (architecture.kv_width,)
    for name, shape in expected.items():
        tensor = tensors.get(f"{prefix}.{name}")
        if tensor is None or tuple(tensor.shape) != shape:
            stored = "absent" if tensor is None else f"{tuple(tensor.shape)}"
            raise ArtifactError(f"{directory / FACTORS_FILE}: {prefix}.{name} must be {shape}, it is {stored}")
    up, own_down, mean = (tensors[f"{prefix}.{name}"] if name in expected else None for name in FACTOR_TENSORS)
    assert up is not None
    return Factors(partition, ranks, up, own_down, mean, axes.rotated(architecture, place.layer_idx))


def model_card(variant: Variant) -> str:
    """Markdown: what the variant is, what it saves, how to load it."""
    ranks = variant.ranks
    note = f" ({ranks.note})" if ranks.note else ""
    predicted = "" if ranks.predicted_rise is None else f", predicted rise {ranks.predicted_rise:.4f} nats per token"
    rows = "\n".join(
        f"| {idx} | {layer.floats('keys')} | {layer.floats('values')} |" for idx, layer in enumerate(ranks.layers)
    )
    floats, full = ranks.floats_per_token, ranks.full_floats_per_token
    return f"""# {variant.base.source}, KV cache compressed by {variant.method.name}

Keeps {variant.kept_fraction:.4f} of the cached floats: {floats:,} of {full:,} per token
({floats * 2:,} bytes per token at 16 bit instead of {full * 2:,}).
Method `{variant.method.name}` ({variant.method.source}),
schedule `{variant.schedule["name"]}`{note}{predicted}, of {ranks.kv_width} floats per kind and layer:

| layer | key floats | value floats |
|---|---|---|
{rows}

The base model is untouched and loaded from where it is:

```python
import lorc_core
model = lorc_core.load("this directory")
```
"""
