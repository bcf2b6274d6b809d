"""Steps that score a model, untouched or with a variant attached, register what was scored, and score it again."""

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorc_core.manifest import checked_file
from lorc_core.variant import load_variant
from pipeline.gates import fell, losses_of, paired_rise, standard_error
from pipeline.registry.tracking import artifact_root
from pipeline.steps.step import FileStep, Input, ModelStep, Need, Place, Recipe
from pipeline.steps.texts import WindowsStep, longest, windows_of
from pipeline.steps.variants import VariantStep
from pipeline.storage.store import Store
from pipeline.storage.tables import read_rows, write_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class EvaluateStep(ModelStep):
    """Score the baseline (no `variant`) or a variant on every text."""

    name = "evaluate"
    revision = 1

    batch_size: Recipe[int]
    text_names: Recipe[tuple[str, ...]]
    windows: Input[tuple[WindowsStep, ...]]
    variant: Input[VariantStep | None] = None

    @property
    def group(self) -> str:
        """A model is loaded once for all of its variants."""
        return f"evaluate {self.model}"

    def batch_shape(self, store: Store) -> tuple[int, int]:
        return self.batch_size, longest(self.windows)

    def run(self, output: Path, store: Store, model: "PreTrainedModel") -> None:
        from lorc_core.attention.attach import attach
        from pipeline.evaluation import window_losses

        variant = None if self.variant is None else load_variant(store.path(self.variant))
        factor_floats = 0 if variant is None else variant.factor_floats
        scores, losses = [], []
        with nullcontext() if variant is None else attach(model, variant):
            for text, pinned in zip(self.text_names, self.windows, strict=True):
                windows = windows_of([pinned], store, model)
                started = time.perf_counter()
                per_window, bytes_per_token = window_losses(model, windows, self.batch_size)
                elapsed_s = time.perf_counter() - started
                losses += [{"text": text, "window": idx, "loss": loss} for idx, loss in enumerate(per_window.tolist())]
                scores.append(
                    {
                        "text": text,
                        "loss": float(per_window.mean()),
                        "loss_standard_error": standard_error(per_window),
                        "perplexity": float(np.exp(per_window.mean())),
                        "scored_tokens": windows.shape[0] * (windows.shape[1] - 1),
                        "bytes_per_token": bytes_per_token,
                        "factor_bytes": factor_floats * model.dtype.itemsize,
                        "eval_s": elapsed_s,
                    }
                )
        write_table(output, "scores", scores)
        write_table(output, "window_losses", losses)


@dataclass(frozen=True, kw_only=True)
class RegisterStep(FileStep):
    """Log and register a variant in MLflow. Runs in the driver, the only process that writes to the store."""

    name = "register"
    revision = 1

    need: Need | None = None
    tracking_uri: Recipe[str]
    experiment: Recipe[str]
    model_name: Recipe[str]
    label: Recipe[str]
    gates: Recipe[dict[str, Any] | None]
    settings: Recipe[dict[str, Any]]
    text_names: Recipe[tuple[str, ...]]
    trust_remote_code: Place[bool]
    resources: Place[dict[str, Any]]
    variant: Input[VariantStep]
    baseline: Input[EvaluateStep]
    evaluation: Input[EvaluateStep]
    windows: Input[tuple[WindowsStep, ...]]

    def run(self, output: Path, store: Store) -> None:
        from pipeline.registry.registration import register_variant

        version = register_variant(
            tracking_uri=self.tracking_uri,
            artifact_root=artifact_root(self.tracking_uri),
            workdir=store.identity,
            experiment=self.experiment,
            model_name=self.model_name,
            label=self.label,
            gates=self.gates,
            settings=self.settings,
            text_names=self.text_names,
            trust_remote_code=self.trust_remote_code,
            resources=self.resources,
            variant=store.path(self.variant),
            baseline=store.path(self.baseline),
            evaluation=store.path(self.evaluation),
            windows=store.paths(self.windows),
        )
        (output / "registration.json").write_text(json.dumps(version))


@dataclass(frozen=True, kw_only=True)
class RegressStep(ModelStep):
    """Score a registered variant again on its pinned tokens and compare with its registered scores.

    `started_at` makes every one new, so that none is taken from the store.
    """

    name = "regress"
    revision = 1

    registered_name: Recipe[str]
    version: Recipe[str]
    started_at: Recipe[str]
    batch_size: Recipe[int]
    text_names: Recipe[tuple[str, ...]]
    tolerance: Recipe[float]
    variant_dir: Place[Path]
    evaluation_dir: Place[Path]

    def batch_shape(self, store: Store) -> tuple[int, int]:
        pinned = (np.load(self.evaluation_dir / f"{text}.npy", mmap_mode="r") for text in self.text_names)
        return self.batch_size, max(windows.shape[1] for windows in pinned)

    def run(self, output: Path, store: Store, model: "PreTrainedModel") -> None:
        from lorc_core.attention.attach import attach
        from lorc_core.loading import check_base
        from pipeline.evaluation import window_losses

        variant = load_variant(self.variant_dir)
        check_base(self.loads.location.directory(weights=True), variant)
        scores = {row["text"]: row for row in read_rows(self.evaluation_dir, "scores")}
        rows = []
        with attach(model, variant):
            for text in self.text_names:
                windows = np.load(checked_file(self.evaluation_dir / f"{text}.npy"))
                per_window, bytes_per_token = window_losses(model, windows, self.batch_size)
                rise = paired_rise(losses_of(self.evaluation_dir, text), per_window)
                registered_bytes = scores[text]["bytes_per_token"]
                rows.append(
                    {
                        "name": self.registered_name,
                        "version": self.version,
                        "started_at": self.started_at,
                        "text": text,
                        "registered_loss": rise.reference_loss,
                        "loss": rise.loss,
                        "loss_rise_standard_error": rise.standard_error,
                        "registered_bytes_per_token": registered_bytes,
                        "bytes_per_token": bytes_per_token,
                        "fell": fell(rise, self.tolerance) or bytes_per_token > registered_bytes,
                    }
                )
        write_table(output, "regressions", rows)
