"""lorc_core: compress the key-value cache of a transformers model by low-rank projection, without retraining.

    variant = lorc_core.compress("path/to/model", method="lorc", kept_fraction=0.5)
    with lorc_core.attach(model, variant):
        output = model(**inputs)
    lorc_core.cache_bytes(output.past_key_values)

Names are imported when they are first used: transformers' modelling code takes seconds, and what only reads
configs and schedules does not need it. `AutoModelForCausalLM` knows exported variants from this import on.
"""

import importlib
from typing import Any

from lorc_core.registration import register_with_transformers

_MODULES = {
    "compression": ("compress",),
    "errors": ("ArtifactError", "ConfigError", "LorcError", "NumericsError", "UnsupportedModelError"),
    "export": ("export_variant",),
    "growing_cache": ("GrowingCache",),
    "loading": ("load",),
    "memory": ("cache_bytes",),
    "methods": ("METHODS", "Method"),
    "plain_export": ("export_plain",),
    "runtime": ("Attachment", "attach"),
    "schedule": ("SCHEDULES", "Progressive", "RankSchedule", "Uniform"),
    "variant": ("Variant", "load_variant"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register_with_transformers()
