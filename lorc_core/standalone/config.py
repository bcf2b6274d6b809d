"""Configs of exported variants: `lorc_<type>`, that of <type> with a field that says what was compressed, and how.

Light to import: a config's model class, which takes seconds, is only made known once such a config is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorc_core.errors import ArtifactError
from lorc_core.model.architecture import Architecture
from lorc_core.model.families import FAMILIES
from lorc_core.model.kinds import KINDS, KeysValues

PREFIX = "lorc_"
SCHEMA_VERSION = 1
SETTINGS = "lorc"  # the field


@dataclass(frozen=True)
class StoredFactors:
    """What a checkpoint holds of the factors of one layer's keys or values.

    `own_down` and `constant` say whether there are such tensors.
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
    """A standalone checkpoint's `lorc` field."""

    architecture: Architecture
    layers: tuple[KeysValues[StoredFactors | None], ...]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Settings":
        """Read from a config.

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


class StandaloneConfig(PreTrainedConfig):
    """Mixed into a config class of transformers: once read, its model is known to `AutoModelForCausalLM`."""

    base_type: ClassVar[str]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        from transformers import AutoModelForCausalLM

        from lorc_core.standalone.model import model_class

        AutoModelForCausalLM.register(type(self), model_class(self.base_type), exist_ok=True)


@cache
def config_class(base_type: str) -> type[PreTrainedConfig]:
    """The config class of `lorc_<base_type>`."""
    base = CONFIG_MAPPING[base_type]
    names = {"model_type": f"{PREFIX}{base_type}", "base_type": base_type, "__module__": __name__}
    return type(f"Lorc{base.__name__}", (StandaloneConfig, base), names)


class LazyConfigClass:
    """Stands for a config class in transformers' list until something is asked of it.

    The list is loaded while the config classes themselves are being imported, so ours cannot be made then.
    """

    def __init__(self, base_type: str) -> None:
        self._base_type = base_type

    def __getattr__(self, name: str) -> Any:
        return getattr(config_class(self._base_type), name)


def register() -> None:
    """Make `AutoConfig` know every family's standalone config."""
    for base_type in FAMILIES:
        stand_in: Any = LazyConfigClass(base_type)
        CONFIG_MAPPING.register(f"{PREFIX}{base_type}", stand_in, exist_ok=True)
