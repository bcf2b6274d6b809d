"""The text that a model is calibrated on: token ids as they are, or texts cut into windows by the model's tokenizer."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorc_core.errors import ArtifactError, ConfigError, first_line
from lorc_core.model.architecture import architecture_of

MAX_WINDOW_TOKENS = 2048
CHARS_PER_TOKEN = 16  # four times what a text has, so that its first cut is nearly always long enough

Calibration = Int[Tensor, "sequences tokens"] | Sequence[Sequence[int]] | Sequence[str] | Path | str


@dataclass(frozen=True)
class CalibrationText:
    """Token ids of sequences of one length; `is_beginning` says that the text they are from goes on."""

    sequences: Int[Tensor, "s t"]
    is_beginning: bool

    def __str__(self) -> str:
        return f"{'the first ' if self.is_beginning else ''}{self.sequences.numel():,} tokens"


def calibration_text(calibration: Calibration, model: PreTrainedModel, max_tokens: int) -> CalibrationText:
    """What to calibrate on: the given token ids, or the beginning of the given text in windows.

    A window has as many tokens as the model reads, 2,048 at most.

    Args:
        calibration: Token ids (sequences, tokens), the path of a text file, or a list of texts.
        model: Whose token ids they are. Texts are cut by the tokenizer that lies where the model was loaded from.
        max_tokens: Of a text; token ids are taken whole.

    Raises:
        ConfigError: There is no such file or it is no text; the text or `max_tokens` is less than one window; the ids
            are not (sequences, tokens), or one is not in the model's vocabulary.
        ArtifactError: There is no tokenizer.
    """
    if isinstance(calibration, str | Path):
        return windows_of_texts([read_text(calibration)], f"calibration text {calibration}", model, max_tokens)
    if is_texts(calibration):
        return windows_of_texts(calibration, "calibration texts", model, max_tokens)
    try:
        sequences = torch.as_tensor(calibration)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"calibration must be token ids (sequences, tokens), all as long: {first_line(error)}"
        ) from error
    shape = tuple(sequences.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2 or sequences.dtype.is_floating_point:
        raise ConfigError(
            f"calibration must be token ids (sequences, tokens), 2 tokens or more, got {shape} {sequences.dtype}"
        )
    check_vocabulary(sequences, model, "calibration")
    return CalibrationText(sequences.long(), is_beginning=False)


def is_texts(calibration: object) -> TypeGuard[Sequence[str]]:
    """Whether these are texts, not token ids."""
    return isinstance(calibration, Sequence) and all(isinstance(text, str) for text in calibration)


def read_text(path: Path | str) -> str:
    """A text file's content; ConfigError where there is no such file, or what is in it is no text."""
    if not os.path.isfile(path):  # False for a text in place of a path too, of which `Path.is_file` raises OSError
        raise ConfigError(
            f"calibration text file {str(path)!r:.160} does not exist; a str is the path of a text file, "
            "to calibrate on a text itself pass [text]"
        )
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"calibration text file {path} is not UTF-8 text ({error})") from error


def windows_of_texts(texts: Sequence[str], source: str, model: PreTrainedModel, max_tokens: int) -> CalibrationText:
    """The first tokens of texts one after another; see `calibration_text`. `source` names the texts in errors."""
    window = min(architecture_of(model.config).max_tokens, MAX_WINDOW_TOKENS)
    if max_tokens < window:
        raise ConfigError(
            f"calibration_tokens must be at least {window}, which is one window of this model, got {max_tokens}"
        )
    if not model.name_or_path:
        raise ConfigError("calibration text needs the model's tokenizer: compress a directory, or give token ids")
    tokenizer = load_tokenizer(model.name_or_path)
    ids = torch.tensor(first_tokens(texts, tokenizer, max_tokens + 1), dtype=torch.long)  # one tells that text is left
    if len(ids) < window:
        raise ConfigError(f"{source}: {len(ids)} tokens are fewer than one window of {window}")
    check_vocabulary(ids, model, f"the tokenizer of {model.name_or_path}")
    num_windows = min(len(ids), max_tokens) // window
    return CalibrationText(ids[: num_windows * window].view(-1, window), is_beginning=len(ids) > max_tokens)


def first_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[int]:
    """So many tokens of texts one after another, or all; what comes after them is not tokenized."""
    tokens: list[int] = []
    for text in texts:
        missing = num_tokens - len(tokens)
        num_chars = CHARS_PER_TOKEN * missing
        while len(beginning := text_tokens(text[:num_chars], tokenizer)) < missing and num_chars < len(text):
            num_chars *= 2
        tokens += beginning[:missing]
        if len(tokens) == num_tokens:
            break
    return tokens


def text_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]


def check_vocabulary(ids: Int[Tensor, "..."], model: PreTrainedModel, source: str) -> None:
    """Raise ConfigError that names `source` where a token id has no row in the model's embedding."""
    embedding: Any = model.get_input_embeddings()
    vocab_size = embedding.num_embeddings
    for token_id in (int(ids.max()), int(ids.min())) if ids.numel() else ():
        if not 0 <= token_id < vocab_size:
            raise ConfigError(f"{source} has token id {token_id}, the model's vocabulary has 0..{vocab_size - 1}")


def load_tokenizer(model_dir: Path | str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's own tokenizer.

    Raises:
        ArtifactError: transformers cannot load it.
    """
    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except Exception as error:  # of damaged files anything; the library in Rust raises Exception itself
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ArtifactError(f"{model_dir}: the tokenizer cannot be loaded ({told})") from error
