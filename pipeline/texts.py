"""Evaluation texts: loaded through `datasets`, tokenized, cut into pinned windows."""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from lorc_core.errors import ArtifactError, ConfigError
from lorc_core.variant import file_sha256
from pipeline.zoo import TEXT_FORMATS, TextEntry

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "tekken*",
)


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


def tokenizer_identity(model_dir: Path, model_type: str) -> str:
    """Hash of all that decides how a model's tokenizer cuts a text.

    Raises:
        ArtifactError: There are no tokenizer files; transformers would make an empty tokenizer for some types.
    """
    files = sorted({path for pattern in TOKENIZER_FILES for path in model_dir.glob(pattern)})
    if not any(path.name != "special_tokens_map.json" for path in files):
        raise ArtifactError(f"{model_dir}: no tokenizer files; an evaluation needs the model's tokenizer")
    digest = hashlib.sha256(model_type.encode())
    for path in files:
        digest.update(f"{path.name} {file_sha256(path)} ".encode())
    return digest.hexdigest()


def load_rows(text: TextEntry, cache_dir: Path) -> list[str]:
    """The documents of a text.

    Raises:
        ConfigError: The data set has no such column; the message names those it has.
    """
    from datasets import disable_progress_bars, load_dataset  # imported where used: it takes a second
    from datasets.exceptions import DatasetsError

    disable_progress_bars()
    try:
        if text.file is not None:
            builder = TEXT_FORMATS[text.file.suffix]
            options = {"sample_by": "document"} if builder == "text" else {}
            data = load_dataset(builder, data_files=str(text.file), split="train", cache_dir=str(cache_dir), **options)
        else:
            data = load_dataset(
                text.source, text.config, split=text.split, revision=text.revision, cache_dir=str(cache_dir)
            )
    except (DatasetsError, OSError, ValueError, RuntimeError, StopIteration) as error:  # StopIteration: an empty file
        raise ConfigError(f"text {text.name}: cannot be read from {text.source}: {one_line(error)}") from error
    if text.column not in data.column_names:
        raise ConfigError(f"text {text.name}: no column {text.column!r}; it has {', '.join(data.column_names)}")
    rows = list(data[text.column])
    if not all(isinstance(row, str) for row in rows):
        raise ConfigError(f"text {text.name}: column {text.column!r} holds something that is not text")
    return rows


def one_line(error: BaseException) -> str:
    """The first line of an error or, where it only wraps another, of that one."""
    cause = error.__cause__ or error
    return (str(cause).splitlines() or [type(cause).__name__])[0]


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

    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{model_dir}: the tokenizer cannot be loaded: {one_line(error)}") from error
