"""Evaluation texts: loaded through `datasets`, tokenized, cut into pinned windows."""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from lorc_core.errors import ConfigError
from lorc_core.variant import file_sha256
from pipeline.zoo import TEXT_FORMATS, TextEntry

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")


def text_identity(text: TextEntry) -> dict[str, str | None]:
    """What pins a text: a file's content, or a hub data set's id and revision."""
    if text.file is not None:
        return {"sha256": file_sha256(text.file), "format": TEXT_FORMATS[text.file.suffix], "column": text.column}
    return {
        "source": text.source,
        "config": text.config,
        "revision": text.revision,
        "split": text.split,
        "column": text.column,
    }


def tokenizer_identity(model_dir: Path) -> str:
    """Hash of the files that decide how a model's tokenizer cuts a text."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (model_dir / name).is_file():
            digest.update(f"{name} {file_sha256(model_dir / name)} ".encode())
    return digest.hexdigest()


def load_rows(text: TextEntry, cache_dir: Path) -> list[str]:
    """The documents of a text.

    Raises:
        ConfigError: The data set has no such column; the message names those it has.
    """
    from datasets import disable_progress_bars, load_dataset  # imported where used: it takes a second

    disable_progress_bars()
    if text.file is not None:
        builder = TEXT_FORMATS[text.file.suffix]
        options = {"sample_by": "document"} if builder == "text" else {}
        data = load_dataset(builder, data_files=str(text.file), split="train", cache_dir=str(cache_dir), **options)
    else:
        data = load_dataset(
            text.source, text.config, split=text.split, revision=text.revision, cache_dir=str(cache_dir)
        )
    if text.column not in data.column_names:
        raise ConfigError(f"text {text.name}: no column {text.column!r}; it has {', '.join(data.column_names)}")
    return list(data[text.column])


def token_stream(rows: list[str], tokenizer: PreTrainedTokenizerBase) -> Int[np.ndarray, " tokens"]:
    """All documents in one row of token ids, each between the tokenizer's own begin and end marks, if it has them."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = [[*begin, *ids, *end] for ids in tokenizer(rows, add_special_tokens=False)["input_ids"]]
    return np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])


def pin_windows(
    stream: Int[np.ndarray, " tokens"], *, window_tokens: int, num_windows: int, seed: int, name: str
) -> Int[np.ndarray, "windows tokens"]:
    """Choose non-overlapping windows at random, because long texts hold long repetitive parts.

    Raises:
        ConfigError: The text is too short; the message says how many windows it gives.
    """
    available = len(stream) // window_tokens
    if available < num_windows:
        raise ConfigError(
            f"text {name}: {len(stream)} tokens give {available} windows of {window_tokens}, {num_windows} are asked; "
            "lower evaluation.num_windows or evaluation.window_tokens, or give a longer text"
        )
    windows = stream[: available * window_tokens].reshape(available, window_tokens)
    return windows[np.sort(np.random.default_rng(seed).permutation(available)[:num_windows])]


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
