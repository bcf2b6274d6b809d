"""Steps that read texts: windows of tokens, and what a model's layers make of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int

from lorc_core.errors import ArtifactError
from lorc_core.model.stored.locations import ModelLocation
from pipeline.steps.step import FileStep, Input, ModelStep, Pin, Place, Recipe
from pipeline.storage.artifacts import load_windows, save_moments, save_windows
from pipeline.storage.store import Store
from pipeline.zoo.sections import DocumentMarks
from pipeline.zoo.texts import Text, pin_windows, text_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class WindowsStep(FileStep):
    """Pin the tokens that every evaluation, or calibration, of this model on this text will use."""

    name = "windows"
    revision = 2

    document_marks: Recipe[DocumentMarks]
    window_tokens: Recipe[int]
    num_windows: Recipe[int]
    seed: Recipe[int]
    text: Pin[dict[str, Any]]
    tokenizer: Pin[str]
    source: Place[Text]
    location: Place[ModelLocation]
    trust_remote_code: Place[bool]

    def run(self, output: Path, store: Store) -> None:
        from lorc_core.measurement.calibration_text import load_tokenizer

        tokenizer = load_tokenizer(self.location.directory(weights=False), trust_remote_code=self.trust_remote_code)
        stream = text_tokens(self.source, tokenizer, self.document_marks, store.root / "datasets")
        windows = pin_windows(
            stream,
            window_tokens=self.window_tokens,
            num_windows=self.num_windows,
            seed=self.seed,
            name=self.source.name,
        )
        save_windows(output, windows)


def windows_of(
    steps: Sequence[WindowsStep], store: Store, model: "PreTrainedModel", num_windows: int | None = None
) -> Int[np.ndarray, "windows tokens"]:
    """The windows of all texts, or the first so many of each, for a model to read.

    It is checked here and not where they are cut, because models of one tokenizer share them.

    Raises:
        ArtifactError: The tokenizer gives an id that the model has no embedding for.
    """
    windows, vocab_size = load_windows(store.paths(steps), num_windows), model.config.get_text_config().vocab_size
    if windows.max() >= vocab_size:
        raise ArtifactError(
            f"the tokenizer in {model.name_or_path} gives the id {windows.max()} in the texts "
            f"{', '.join(step.source.name for step in steps)}, the model's vocabulary has ids below {vocab_size}: "
            "it is not this model's tokenizer"
        )
    return windows


def longest(steps: Sequence[WindowsStep]) -> int:
    """Tokens of the longest windows."""
    return max(step.window_tokens for step in steps)


@dataclass(frozen=True, kw_only=True)
class ShardStep(ModelStep):
    """Moments of every layer on one shard of the calibration windows; those of all shards add up."""

    batch_size: Recipe[int]
    shard: Recipe[int]
    num_shards: Recipe[int]
    join_rotated_heads: Recipe[bool]
    windows: Input[tuple[WindowsStep, ...]]

    def batch_shape(self, store: Store) -> tuple[int, int]:
        return self.batch_size, longest(self.windows)

    def batches(self, store: Store, model: "PreTrainedModel") -> Sequence[Int[torch.Tensor, "_ _"]]:
        rows = torch.from_numpy(windows_of(self.windows, store, model))[self.shard :: self.num_shards]
        return rows.split(self.batch_size)


@dataclass(frozen=True, kw_only=True)
class CalibrateStep(ShardStep):
    """Second moments of what every layer caches and reads."""

    name = "calibrate"
    revision = 2

    def run(self, output: Path, store: Store, model: "PreTrainedModel") -> None:
        from lorc_core.measurement.calibration import calibrate

        save_moments(output, calibrate(model, self.batches(store, model), join_rotated_heads=self.join_rotated_heads))


@dataclass(frozen=True, kw_only=True)
class GradientsStep(ShardStep):
    """Second moments of the loss's gradient with respect to what every layer caches."""

    name = "gradients"
    revision = 1

    def run(self, output: Path, store: Store, model: "PreTrainedModel") -> None:
        from lorc_core.measurement.gradients import gradient_moments

        batches = self.batches(store, model)
        save_moments(output, gradient_moments(model, batches, join_rotated_heads=self.join_rotated_heads))
