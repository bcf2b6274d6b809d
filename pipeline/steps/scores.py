"""Steps that score a model, untouched or with a variant attached, register what was scored, and score it again."""

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from lorc_core.manifest import checked_file
from lorc_core.variant import load_variant
from pipeline.evaluation.gates import fell, losses_of, paired_rise, standard_error
from pipeline.registry.tracking import artifact_root
from pipeline.steps.step import FileStep, Input, ModelStep, Need, Place, Recipe
from pipeline.steps.texts import WindowsStep, longest, windows_of
from pipeline.steps.variants import VariantStep
from pipeline.storage.store import Store
from pipeline.storage.tables import read_rows, write_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TextLosses:
    """What was measured on windows of one text; those of the windows that follow are added.

    Attributes:
        text: Its name.
        losses: Of each window, in nats per token.
        num_tokens: Of all windows, those that are not scored included.
        held_bytes: Of the caches of all batches together.
        factor_bytes: Of the variant's factors in memory.
        eval_s: Seconds that a model was at work.
    """

    text: str
    losses: Float[np.ndarray, " windows"]
    num_tokens: int
    held_bytes: int
    factor_bytes: int
    eval_s: float

    def __add__(self, following: "TextLosses") -> "TextLosses":
        return replace(
            self,
            losses=np.concatenate([self.losses, following.losses]),
            num_tokens=self.num_tokens + following.num_tokens,
            held_bytes=self.held_bytes + following.held_bytes,
            eval_s=self.eval_s + following.eval_s,
        )

    @property
    def score(self) -> dict[str, Any]:
        """Its row of the table `scores`."""
        return {
            "text": self.text,
            "loss": float(self.losses.mean()),
            "loss_standard_error": standard_error(self.losses),
            "perplexity": float(np.exp(self.losses.mean())),
            "scored_tokens": self.num_tokens - len(self.losses),
            "bytes_per_token": self.held_bytes / self.num_tokens,
            "factor_bytes": self.factor_bytes,
            "eval_s": self.eval_s,
        }


def write_scores(output: Path, texts: Sequence[TextLosses]) -> None:
    write_table(output, "scores", [text.score for text in texts])
    rows = [
        {"text": text.text, "window": idx, "loss": loss}
        for text in texts
        for idx, loss in enumerate(text.losses.tolist())
    ]
    write_table(output, "window_losses", rows)


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

    @property
    def num_batches(self) -> int:
        """Of the text that has fewest."""
        return min(math.ceil(step.num_windows / self.batch_size) for step in self.windows)

    def batch_shape(self, store: Store) -> tuple[int, int]:
        return self.batch_size, longest(self.windows)

    def run(self, output: Path, store: Store, model: "PreTrainedModel") -> None:
        write_scores(output, self.scored(store, model))

    def scored(self, store: Store, model: "PreTrainedModel", share: int = 0, num_shares: int = 1) -> list[TextLosses]:
        """Every text, or one of the equal shares of its batches."""
        from lorc_core.attention.attach import attach
        from pipeline.evaluation.losses import losses_and_bytes

        variant = None if self.variant is None else load_variant(store.path(self.variant))
        factor_bytes = 0 if variant is None else variant.factor_floats * model.dtype.itemsize
        texts = []
        with nullcontext() if variant is None else attach(model, variant):
            for text, pinned in zip(self.text_names, self.windows, strict=True):
                windows = windows_of([pinned], store, model)
                first, last = share_bounds(len(windows), self.batch_size, share, num_shares)
                started = time.perf_counter()
                losses, held_bytes = losses_and_bytes(model, windows[first:last], self.batch_size, first)
                eval_s = time.perf_counter() - started
                texts.append(TextLosses(text, losses, windows[first:last].size, held_bytes, factor_bytes, eval_s))
        return texts


def share_bounds(num_windows: int, batch_size: int, share: int, num_shares: int) -> tuple[int, int]:
    """The first window of a share and that of the next one: whole batches, as many as in any other share, or one more.

    Args:
        num_windows: Of the text.
        batch_size: Windows at a time; the last batch may have fewer.
        share: In 0..`num_shares` - 1.
        num_shares: At most as many as there are batches.
    """
    num_batches = math.ceil(num_windows / batch_size)
    first, last = (num_batches * part // num_shares * batch_size for part in (share, share + 1))
    return first, min(last, num_windows)


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
        from pipeline.evaluation.losses import window_losses

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
