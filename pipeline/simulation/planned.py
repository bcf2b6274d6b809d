"""A model by its config alone, for steps that are planned and never run: nothing of it need be on any disk."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lorc_core.model.architecture import architecture_of
from lorc_core.model.stored.locations import ModelLocation
from pipeline.zoo.models import ResolvedModel
from pipeline.zoo.sections import ModelEntry


def planned_model(entry: ModelEntry, config: PreTrainedConfig) -> ResolvedModel:
    """As `resolve` gives it, but that its name stands for the content that no one has seen.

    Args:
        entry: Of the zoo file.
        config: Its own.

    Raises:
        LorcError: As `architecture_of` does.
    """
    return ResolvedModel(
        entry=entry,
        location=ModelLocation(entry.source, entry.revision),
        directory=None,
        outline=entry.name,
        content=entry.name,
        architecture=architecture_of(config),
        num_parameters=num_parameters(config),
    )


def num_parameters(config: PreTrainedConfig) -> int:
    """Of a model of that config, tied weights once; no memory is taken for them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
