"""Zoos of generated models, for benchmarks of whole runs: random weights, a tokenizer of numbers, random text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

VOCABULARY = 512
TEXT_TOKENS = 1 << 16
PARTS = {"calibration": [0, 0.5], "evaluation": [0.5, 1]}  # of the text


def write_generated_zoo(
    directory: Path,
    name: str,
    shapes: Mapping[str, Mapping[str, int]],
    variants: Sequence[Mapping[str, Any]],
    **sections: Mapping[str, Any],
) -> Path:
    """Write models, their text and the zoo file.

    Args:
        directory: Made.
        name: Of the zoo.
        shapes: Fields of a `LlamaConfig`, by the name of the model.
        variants: As in a zoo file.
        sections: See `write_zoo`.

    Returns:
        The zoo file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for seed, (model, shape) in enumerate(shapes.items()):
        write_model(directory / model, shape, seed)
    models = [{"name": model, "source": f"./{model}", "dtype": "float32"} for model in shapes]
    return write_zoo(directory, name, models, variants, **sections)


def write_zoo(
    directory: Path,
    name: str,
    models: Sequence[Mapping[str, Any]],
    variants: Sequence[Mapping[str, Any]],
    **sections: Mapping[str, Any],
) -> Path:
    """Write a text of numbers and the zoo file of models that are there.

    Args:
        directory: That exists.
        name: Of the zoo.
        models: As in a zoo file.
        variants: As in a zoo file.
        sections: By name, as in a zoo file; `calibration` and `evaluation` without their texts.

    Returns:
        The zoo file.
    """
    np.save(directory / "text.npy", np.random.default_rng(0).integers(0, VOCABULARY, TEXT_TOKENS))
    zoo: dict[str, Any] = {"name": name, "models": list(models), "variants": list(variants), **sections}
    for section, part in PARTS.items():
        if section in zoo:
            text = {"name": "numbers", "source": "text.npy", "part": part}
            zoo[section] = {"texts": [text]} | dict(sections[section])
    path = directory / "zoo.yaml"
    path.write_text(yaml.safe_dump(zoo, sort_keys=False))
    return path


def write_model(directory: Path, shape: Mapping[str, int], seed: int) -> None:
    """A Llama of that shape with random weights, and its tokenizer."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(seed)
    facts: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, **shape}
    LlamaForCausalLM(LlamaConfig(**facts)).save_pretrained(directory)
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """One whose words are numbers."""
    words = WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), bos_token="0", eos_token="1").save_pretrained(directory)
