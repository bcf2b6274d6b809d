"""Config and model classes of exported variants: `lorc_<type>`, those of <type> with the factors inside.

Light to import: a model class, which takes seconds, is only made once a config of its kind is read.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorc_core.model.families import FAMILIES
from lorc_core.standalone.settings import PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StandaloneConfig(PreTrainedConfig):
    """Mixed into a config class of transformers: once read, its models are known to the auto classes."""

    base_type: ClassVar[str]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        from transformers import AutoModel, AutoModelForCausalLM

        AutoModel.register(type(self), base_model_class(self.base_type), exist_ok=True)
        AutoModelForCausalLM.register(type(self), model_class(self.base_type), exist_ok=True)


@cache
def config_class(base_type: str) -> type[PreTrainedConfig]:
    """The config class of `lorc_<base_type>`.

    Args:
        base_type: A model type that lorc knows, such as "llama".
    """
    base = CONFIG_MAPPING[base_type]
    names = {"model_type": f"{PREFIX}{base_type}", "base_type": base_type, "__module__": __name__}
    return type(f"Lorc{base.__name__}", (StandaloneConfig, base), names)


@cache
def model_class(base_type: str) -> "type[PreTrainedModel]":
    """The causal language model of `lorc_<base_type>`.

    Args:
        base_type: A model type that lorc knows, such as "llama".
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING  # here, since transformers' modelling code takes seconds

    return standalone_class(base_type, MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base_type]])


@cache
def base_model_class(base_type: str) -> "type[PreTrainedModel]":
    """The model of `lorc_<base_type>` without a head, whose output is hidden states.

    Args:
        base_type: A model type that lorc knows, such as "llama".
    """
    from transformers import MODEL_MAPPING

    return standalone_class(base_type, MODEL_MAPPING[CONFIG_MAPPING[base_type]])


def standalone_class(base_type: str, base: Any) -> "type[PreTrainedModel]":
    """A model class of transformers with the factors inside; what it renames in checkpoints it renames in ours too.

    Args:
        base_type: The model type of the base.
        base: Its class.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    from lorc_core.standalone.model import StandaloneModel

    conversion = get_checkpoint_conversion_mapping(base_type)
    if conversion is not None:
        register_checkpoint_conversion_mapping(f"{PREFIX}{base_type}", conversion, overwrite=True)
    names = {"base_class": base, "config_class": config_class(base_type), "__module__": __name__}
    return type(f"Lorc{base.__name__}", (StandaloneModel, base), names)


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
