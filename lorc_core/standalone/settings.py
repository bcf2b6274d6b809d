"""What a standalone checkpoint's config says beside the model's own fields: what was compressed, and how."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from lorc_core.errors import ArtifactError
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import KINDS, KeysValues
from lorc_core.variant import BaseModel

PREFIX = "lorc_"
SCHEMA_VERSION = 1
SETTINGS = "lorc"  # the field


def published_base(base: BaseModel) -> dict[str, str | None]:
    """What an export's config says of its base model: of a directory, the name and not the path on this machine.

    Args:
        base: As the variant knows it.
    """
    if base.source.startswith("/"):
        return {"source": Path(base.source).name, "fingerprint": base.fingerprint}
    return asdict(base)


def auto_map(module_file: str, **classes: type) -> dict[str, str]:
    """Where transformers' auto classes find those of a checkpoint.

    Args:
        module_file: The file beside the weights that defines them.
        classes: By the auto class.
    """
    return {auto: f"{module_file.removesuffix('.py')}.{its_class.__name__}" for auto, its_class in classes.items()}


@dataclass(frozen=True)
class StoredFactors:
    """What a checkpoint holds of the factors of one layer's keys or values.

    Attributes:
        block: Of the partition.
        ranks: Of each block.
        rotated: Whether keys are projected after the rotation.
        folded: Whether the down-projection is folded into the projection.
        own_down: Whether there is a tensor of that name.
        constant: Whether there is a tensor of that name.
    """

    block: str
    ranks: tuple[int, ...]
    rotated: bool
    folded: bool
    own_down: bool
    constant: bool

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "StoredFactors":
        """The inverse of `asdict`, also after JSON, which has lists for tuples."""
        return cls(**(dict(saved) | {"ranks": tuple(saved["ranks"])}))


@dataclass(frozen=True)
class Settings:
    """A standalone checkpoint's `lorc` field.

    Attributes:
        architecture: Of the base model.
        layers: What is stored of each; None where the full width is kept.
    """

    architecture: Architecture
    layers: tuple[KeysValues[StoredFactors | None], ...]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Settings":
        """Read from a config.

        Args:
            config: Of a standalone checkpoint.

        Raises:
            ArtifactError: The field is absent, or of another schema.
        """
        saved = getattr(config, SETTINGS, None)
        if not isinstance(saved, dict):
            raise ArtifactError(f"config of model type {config.model_type}: no field {SETTINGS!r}; made by lorc export")
        if (schema := saved.get("schema_version")) != SCHEMA_VERSION:
            raise ArtifactError(f"standalone schema {schema}, this lorc reads {SCHEMA_VERSION}; export the model again")
        layers = tuple(
            KeysValues(*(None if layer[kind] is None else StoredFactors.from_dict(layer[kind]) for kind in KINDS))
            for layer in saved["layers"]
        )
        return cls(Architecture.from_dict(saved["architecture"]), layers)
