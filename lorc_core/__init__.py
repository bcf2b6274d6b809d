"""lorc_core: compress the key-value cache of a transformers model by low-rank projection, without retraining.

    >>> import lorc_core
    >>> from transformers import AutoModelForCausalLM
    >>> variant = lorc_core.compress("path/to/model", method="lorc_q", kept_fraction=0.5)
    >>> model = AutoModelForCausalLM.from_pretrained("path/to/model")
    >>> with lorc_core.attach(model, variant):
    ...     output = model(model.dummy_inputs["input_ids"], use_cache=True)
    >>> held_bytes = lorc_core.cache_bytes(output.past_key_values)

Names are imported when they are first used: transformers' modelling code takes seconds, and what only reads
configs and schedules does not need it. `AutoModelForCausalLM` knows exported variants from this import on.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from lorc_core.standalone.registration import register_with_transformers

if TYPE_CHECKING:
    from lorc_core.attention.attach import Attachment, attach
    from lorc_core.caches.growing import GrowingCache
    from lorc_core.caches.memory import cache_bytes
    from lorc_core.compression import compress
    from lorc_core.errors import ArtifactError, ConfigError, LorcError, NumericsError, UnsupportedModelError
    from lorc_core.loading import load
    from lorc_core.methods import METHODS, Axes, Method, Training
    from lorc_core.model.kinds import KeysValues
    from lorc_core.ranks.progressive import Progressive
    from lorc_core.ranks.schedule import Schedule
    from lorc_core.ranks.schedules import SCHEDULES, Energy, ErrorBudget, Fisher, Sensitivity, Uniform, WaterLevel
    from lorc_core.ranks.spectra import RankSchedule
    from lorc_core.standalone.export import export_variant
    from lorc_core.standalone.plain_export import export_plain
    from lorc_core.variant import Variant, load_variant

    __version__: str

__all__ = [
    "METHODS",
    "SCHEDULES",
    "ArtifactError",
    "Attachment",
    "Axes",
    "ConfigError",
    "Energy",
    "ErrorBudget",
    "Fisher",
    "GrowingCache",
    "KeysValues",
    "LorcError",
    "Method",
    "NumericsError",
    "Progressive",
    "RankSchedule",
    "Schedule",
    "Sensitivity",
    "Training",
    "Uniform",
    "UnsupportedModelError",
    "Variant",
    "WaterLevel",
    "__version__",
    "attach",
    "cache_bytes",
    "compress",
    "export_plain",
    "export_variant",
    "load",
    "load_variant",
]

_MODULES = {
    "attention.attach": ("Attachment", "attach"),
    "caches.growing": ("GrowingCache",),
    "caches.memory": ("cache_bytes",),
    "compression": ("compress",),
    "errors": ("ArtifactError", "ConfigError", "LorcError", "NumericsError", "UnsupportedModelError"),
    "loading": ("load",),
    "methods": ("METHODS", "Axes", "Method", "Training"),
    "model.kinds": ("KeysValues",),
    "ranks.progressive": ("Progressive",),
    "ranks.schedule": ("Schedule",),
    "ranks.schedules": ("SCHEDULES", "Energy", "ErrorBudget", "Fisher", "Sensitivity", "Uniform", "WaterLevel"),
    "ranks.spectra": ("RankSchedule",),
    "standalone.export": ("export_variant",),
    "standalone.plain_export": ("export_plain",),
    "variant": ("Variant", "load_variant"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("lorc")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register_with_transformers()
