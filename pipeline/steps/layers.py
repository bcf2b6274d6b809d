"""Steps that decompose a model's layers, as a method says, once for all budgets."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorc_core.methods import Axes, Reader, Training
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import KeysValues, LayerKind
from lorc_core.model.stored.checkpoint import Checkpoint
from lorc_core.model.stored.locations import ModelLocation
from lorc_core.model.stored.weights import ReadOnce, layer_digest
from pipeline.steps.step import FileStep, Input, ModelStep, Pin, Place, Progress, Recipe
from pipeline.steps.texts import CalibrateStep, GradientsStep, WindowsStep, longest, windows_of
from pipeline.storage.artifacts import (
    load_bases,
    load_layer,
    load_moments,
    moments_file,
    save_adapters,
    save_bases,
    save_digest,
    save_layer,
)
from pipeline.storage.store import Store
from pipeline.storage.tables import write_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@lru_cache(maxsize=1)
def layer_source(location: ModelLocation, content: str, layer_idx: int) -> ReadOnce:
    """What the methods of one layer, which run one after another in one task, read of it once."""
    return ReadOnce(Checkpoint(location.files()))


@dataclass(frozen=True, kw_only=True)
class DecomposeStep(FileStep):
    """One layer's full-rank nested factors and spectra, from its weights and what calibration measured of it."""

    name = "decompose"
    revision = 9

    axes: Recipe[KeysValues[Axes]]
    layer_idx: Recipe[int]
    context_tokens: Recipe[int | None]  # over which keys after the rotation are averaged; None where windows span them
    content: Pin[str]
    location: Place[ModelLocation]
    architecture: Place[Architecture]
    calibrated: Input[tuple[CalibrateStep, ...]] = ()
    gradients: Input[tuple[GradientsStep, ...]] = ()

    @property
    def group(self) -> str:
        """A layer is read once for all methods; those that measure less do not wait for what others measure."""
        measured = f"{' calibrated' if self.calibrated else ''}{' gradients' if self.gradients else ''}"
        return f"decompose {self.model} {self.layer_idx}{measured}"

    def run(self, output: Path, store: Store) -> None:
        from lorc_core.compression import decompose_kind
        from lorc_core.decomposition.position_average import over_positions

        source = layer_source(self.location, self.content, self.layer_idx)
        file = moments_file(self.layer_idx)
        moments = load_moments(store.paths(self.calibrated, file), self.layer_idx)
        of_loss = load_moments(store.paths(self.gradients, file), self.layer_idx)
        if self.context_tokens is not None and moments is not None:
            moments = over_positions(moments, self.architecture, self.layer_idx, self.context_tokens)
        if moments and of_loss:
            moments = moments.beside(of_loss)
        layer = KeysValues.of(
            lambda kind: decompose_kind(
                source, self.architecture, LayerKind(self.layer_idx, kind), self.axes[kind], moments
            )
        )
        save_layer(output, self.layer_idx, layer)
        save_digest(output, self.content, self.layer_idx, layer_digest(source, self.architecture, self.layer_idx))

    @property
    def decomposed(self) -> "DecomposeStep":
        return self


@dataclass(frozen=True, kw_only=True)
class TrainStep(ModelStep):
    """Train bases of a decomposed model's latents; goes on from its checkpoint after an interruption."""

    name = "train"
    revision = 1

    training: Recipe[Training]
    windows: Input[tuple[WindowsStep, ...]]
    layers: Input[tuple[DecomposeStep, ...]]

    def batch_shape(self, store: Store) -> tuple[int, int]:
        return self.training.batch_size, longest(self.windows)

    def run(self, output: Path, store: Store, model: "PreTrainedModel") -> Progress:
        from lorc_core.measurement.training.trainer import Trainer

        trainer = Trainer(model, [load_layer(path) for path in store.paths(self.layers)], self.training)
        text = torch.from_numpy(windows_of(self.windows, store, model))
        rows = []
        for state in trainer.train(text, self.resume_dir(store)):
            rows.append({"step": state.step, "best": state.best, "last": state.last})
            yield state.step, state.num_steps
        save_bases(output, state.bases)
        save_adapters(output, state.adapters)
        write_table(output, "training", rows)

    def resume_dir(self, store: Store) -> Path:
        return store.root / "training" / self.key


@dataclass(frozen=True, kw_only=True)
class ChangeBasisStep(FileStep):
    """One layer's decomposition along its trained directions."""

    name = "change_basis"
    revision = 1

    layer_idx: Recipe[int]
    readers: Recipe[KeysValues[Reader]]
    layer: Input[DecomposeStep]
    trained: Input[TrainStep]

    def run(self, output: Path, store: Store) -> None:
        from lorc_core.measurement.training.latent_bases import change_basis

        start, bases = load_layer(store.path(self.layer)), load_bases(store.path(self.trained), self.layer_idx)
        changed = KeysValues.of(lambda kind: change_basis(start[kind], bases[kind], self.readers[kind]))
        save_layer(output, self.layer_idx, changed)

    @property
    def decomposed(self) -> DecomposeStep:
        return self.layer


LayerStep = DecomposeStep | ChangeBasisStep  # leaves one layer's decomposition
