"""A model by its config alone, for steps that are planned and never run: nothing of it need be on any disk."""

import json
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lorc_core.model.architecture import architecture_of
from lorc_core.model.stored.locations import ModelLocation
from pipeline.zoo.models import ResolvedModel
from pipeline.zoo.sections import ModelEntry


def planned_model(entry: ModelEntry, config: PreTrainedConfig) -> ResolvedModel:
    """As `resolve` gives it, but that its name stands for its content; of a directory the tokenizer is read.

    Args:
        entry: Of the zoo file.
        config: Its own.

    Raises:
        LorcError: As `architecture_of` does.
    """
    return ResolvedModel(
        entry=entry,
        location=ModelLocation(entry.source, entry.revision),
        directory=Path(entry.source) if entry.is_directory and Path(entry.source).is_dir() else None,
        outline=entry.name,
        content=entry.name,
        architecture=architecture_of(config),
        num_parameters=num_parameters(config.to_json_string()),
    )


@lru_cache(maxsize=256)
def num_parameters(config: str) -> int:
    """Of a model of that config, tied weights once; no memory is taken for them.

    Args:
        config: As JSON: models of one shape are looked at once.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(config))
    return sum(parameter.numel() for parameter in model.parameters())


def config_of(config: str) -> PreTrainedConfig:
    """The config that was written as JSON."""
    return AutoConfig.for_model(**json.loads(config))
