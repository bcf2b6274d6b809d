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


def write_generated_zoo(
    directory: Path,
    name: str,
    shapes: Mapping[str, Mapping[str, int]],
    variants: Sequence[Mapping[str, Any]],
    **sections: Any,
) -> Path:
    """Write models, texts and the zoo file.

    Args:
        directory: A new one.
        name: Of the zoo.
        shapes: Fields of a `LlamaConfig`, by the name of the model.
        variants: As in a zoo file.
        sections: Fields of `calibration` and `evaluation` beside their texts.

    Returns:
        The zoo file.
    """
    directory.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, TEXT_TOKENS)
    np.save(directory / "text.npy", tokens)
    for seed, (model, shape) in enumerate(shapes.items()):
        write_model(directory / model, shape, seed)
    half = {"name": "numbers", "source": "text.npy"}
    zoo = {
        "name": name,
        "models": [{"name": model, "source": f"./{model}", "dtype": "float32"} for model in shapes],
        "variants": list(variants),
        "calibration": {"texts": [half | {"part": [0, 0.5]}], "allow_rank_deficient": True, **sections["calibration"]},
        "evaluation": {"texts": [half | {"part": [0.5, 1]}], **sections["evaluation"]},
    }
    path = directory / "zoo.yaml"
    path.write_text(yaml.safe_dump(zoo, sort_keys=False))
    return path


def write_model(directory: Path, shape: Mapping[str, int], seed: int) -> None:
    """A Llama of that shape with random weights, and a tokenizer whose words are numbers."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(seed)
    facts: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, **shape}
    config = LlamaConfig(**facts)
    LlamaForCausalLM(config).save_pretrained(directory)
    words = WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), bos_token="0", eos_token="1").save_pretrained(directory)
