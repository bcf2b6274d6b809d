"""Checkpoints of their own: variants that transformers loads without their base model, and the classes that run them.

What reads a variant beside its base is in `lorc_core.loading`. Exported checkpoints import the class
functions from here, so this name must stay; they are imported when they are used, since transformers takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorc_core.standalone.classes import base_model_class, config_class, model_class

__all__ = ["base_model_class", "config_class", "model_class"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.classes"), name)
