"""Texts to evaluate or calibrate on: loaded through `datasets`, tokenized, cut into pinned windows."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from lorc_core.errors import ArtifactError, ConfigError, first_line
from lorc_core.manifest import file_sha256
from lorc_core.model.stored.locations import TOKENIZER_FILES
from pipeline.zoo.sections import TEXT_FORMATS, DocumentMarks


@dataclass(frozen=True)
class Text:
    """A `TextEntry` of a checked zoo file, without the means of checking it."""

    name: str
    source: str
    config: str | None = None
    revision: str | None = None
    split: str = "test"
    column: str = "text"
    separator: str | None = None
    part: tuple[float, float] = (0.0, 1.0)

    @property
    def file(self) -> Path | None:
        """None of a hub data set."""
        return Path(self.source) if Path(self.source).suffix in TEXT_FORMATS else None


def text_identity(text: Text) -> dict[str, Any]:
    """What pins a text: a file's content, or a hub data set's id and revision."""
    cut = {"column": text.column, "separator": text.separator, "part": list(text.part)}
    if text.file is not None:
        return {"sha256": file_sha256(text.file), "format": TEXT_FORMATS[text.file.suffix], **cut}
    return {
        "source": text.source,
        "config": text.config,
        "revision": text.revision,
        "split": text.split,
        **cut,
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


def text_tokens(
    text: Text, tokenizer: PreTrainedTokenizerBase, marks: DocumentMarks, cache_dir: Path
) -> Int[np.ndarray, " tokens"]:
    """All token ids of the part of a text that is asked for.

    Raises:
        ConfigError: It cannot be read, or a .npy file does not hold token ids.
    """
    if text.file is None or TEXT_FORMATS[text.file.suffix] != "tokens":
        return token_stream(part_of(load_rows(text, cache_dir), text.part), tokenizer, marks)
    try:
        ids = np.load(text.file, allow_pickle=False).ravel()
    except (OSError, ValueError) as error:
        raise ConfigError(f"text {text.name}: cannot be read from {text.file}: {one_line(error)}") from error
    if ids.dtype.kind not in "iu" or (len(ids) and not 0 <= ids.min() <= ids.max() < len(tokenizer)):
        raise ConfigError(f"text {text.name}: {text.file} must hold token ids below {len(tokenizer)} of this tokenizer")
    return part_of(ids.astype(np.int64), text.part)


def part_of(whole: Any, part: tuple[float, float]) -> Any:
    """The documents, or tokens, from one share of all to another."""
    start, stop = (round(share * len(whole)) for share in part)
    return whole[start:stop]


def load_rows(text: Text, cache_dir: Path) -> list[str]:
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
    if text.separator is None:
        return rows
    return [part for row in rows for part in map(str.strip, row.split(text.separator)) if part]


def one_line(error: BaseException) -> str:
    """The first line of an error or, where it only wraps another, of that one."""
    cause = error.__cause__ or error
    return first_line(cause)


def token_stream(
    rows: list[str], tokenizer: PreTrainedTokenizerBase, marks: DocumentMarks
) -> Int[np.ndarray, " tokens"]:
    """All documents in one row of token ids, each with those of the tokenizer's marks that the model was trained on."""
    begin = [tokenizer.bos_token_id] if marks in ("both", "begin") and tokenizer.bos_token_id is not None else []
    end = [tokenizer.eos_token_id] if marks in ("both", "end") and tokenizer.eos_token_id is not None else []
    cut = tokenizer(rows, add_special_tokens=False, verbose=False)["input_ids"] if rows else []
    documents = [[*begin, *ids, *end] for ids in cut] or [[]]
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
            "lower num_windows or window_tokens, or give a longer text"
        )
    windows = stream[: available * window_tokens].reshape(available, window_tokens)
    return windows[np.sort(np.random.default_rng(seed).permutation(available)[:num_windows])]
