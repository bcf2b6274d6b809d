"""Load a variant with the base model that it was made for."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from lorc_core.attention.attach import attach
from lorc_core.errors import ArtifactError, ConfigError
from lorc_core.model.stored.integrity import check_model
from lorc_core.model.stored.locations import ModelLocation, find_model, locate
from lorc_core.model.stored.weights import checkpoint_fingerprint
from lorc_core.variant import Variant, load_variant


def load(variant_dir: Path | str, *, base: Path | str | None = None, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Load a variant's base model and attach the variant to it, for good.

    Args:
        variant_dir: A variant's directory.
        base: Directory or hub id of the base model, if it is not where it was when the variant was made.
        from_pretrained_kwargs: Passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, ...).

    Returns:
        The model, in evaluation mode; its caches hold latents.

    Raises:
        ArtifactError: The variant is unfinished, altered or of another schema, or the base is another model.
        ConfigError: The base model is not there, or the variant does not know where it is and `base` is absent.
    """
    variant, location = variant_and_base(variant_dir, base)
    directory = location.directory(weights=True)
    check_base(directory, variant, trust_remote_code=from_pretrained_kwargs.get("trust_remote_code", False))
    model = AutoModelForCausalLM.from_pretrained(directory, **from_pretrained_kwargs)
    attach(model, variant)
    return model


def variant_and_base(variant_dir: Path | str, base: Path | str | None = None) -> tuple[Variant, ModelLocation]:
    """A variant and where its base model is, as `load` has them. Whether it is that model is `check_base`'s.

    Args:
        variant_dir: A variant's directory.
        base: Directory or hub id of the base model, if it is not where it was.

    Raises:
        ArtifactError: The variant is unfinished, altered or of another schema.
        ConfigError: The base model is not there, or the variant does not know where it is and `base` is absent.
    """
    variant = load_variant(variant_dir)
    if base is not None:
        return variant, find_model(base)
    if not variant.base.source:
        raise ConfigError(f"{variant_dir}: made from a model in memory, so name its base model with base=")
    return variant, locate(variant.base.source, variant.base.revision)


def check_base(directory: Path, variant: Variant, *, trust_remote_code: bool = False) -> None:
    """Raise ArtifactError unless the directory holds the model that the variant was made for, and all of it."""
    checkpoint = check_model(directory, trust_remote_code=trust_remote_code)
    if variant.base.fingerprint is None:
        return
    if checkpoint_fingerprint(checkpoint, variant.architecture) != variant.base.fingerprint:
        raise ArtifactError(f"{directory}: not the base model this variant was made for ({variant.base.source})")
