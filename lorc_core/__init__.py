"""lorc_core: compress the key-value cache of a transformers model by low-rank projection, without retraining.

variant = lorc_core.compress("path/to/model", method="lorc", kept_fraction=0.5)
with lorc_core.attach(model, variant):
    output = model(**inputs)
lorc_core.cache_bytes(output.past_key_values)
"""

from lorc_core.compression import METHODS, Method, compress
from lorc_core.errors import ArtifactError, ConfigError, LorcError, NumericsError, UnsupportedModelError
from lorc_core.memory import cache_bytes
from lorc_core.runtime import Attachment, attach, load
from lorc_core.schedule import SCHEDULES, Progressive, RankSchedule, Uniform
from lorc_core.variant import Variant, load_variant

__all__ = [
    "METHODS",
    "SCHEDULES",
    "ArtifactError",
    "Attachment",
    "ConfigError",
    "LorcError",
    "Method",
    "NumericsError",
    "Progressive",
    "RankSchedule",
    "Uniform",
    "UnsupportedModelError",
    "Variant",
    "attach",
    "cache_bytes",
    "compress",
    "load",
    "load_variant",
]
