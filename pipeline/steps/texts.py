"""Steps that read texts: windows of tokens, and what a model's layers make of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.steps.step import FileStep, Input, ModelStep, Pin, Place, Recipe
from pipeline.storage.artifacts import load_windows, save_moments, save_windows
from pipeline.storage.store import Store
from pipeline.zoo.schema import DocumentMarks
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
    model_dir: Place[Path]
    trust_remote_code: Place[bool]

    def run(self, output: Path, store: Store) -> None:
        from lorc_core.measurement.calibration_text import load_tokenizer

        tokenizer = load_tokenizer(self.model_dir, trust_remote_code=self.trust_remote_code)
        stream = text_tokens(self.source, tokenizer, self.document_marks, store.root / "datasets")
        windows = pin_windows(
            stream,
            window_tokens=self.window_tokens,
            num_windows=self.num_windows,
            seed=self.seed,
            name=self.source.name,
        )
        save_windows(output, windows)


@dataclass(frozen=True, kw_only=True)
class CalibrateStep(ModelStep):
    """Second moments of every layer on one shard of the calibration windows."""

    name = "calibrate"
    revision = 1

    batch_size: Recipe[int]
    shard: Recipe[int]
    num_shards: Recipe[int]
    join_rotated_heads: Recipe[bool]
    windows: Input[tuple[WindowsStep, ...]]

    def run(self, output: Path, store: Store, model: "PreTrainedModel") -> None:
        from lorc_core.measurement.calibration import calibrate

        rows = torch.from_numpy(load_windows(store.paths(self.windows)))[self.shard :: self.num_shards]
        save_moments(output, calibrate(model, rows.split(self.batch_size), join_rotated_heads=self.join_rotated_heads))
