"""Steps that write a variant, and what its projections lose."""

from dataclasses import asdict, dataclass
from pathlib import Path

from lorc_core.decomposition.factors import slice_layer
from lorc_core.decomposition.projection_errors import projection_errors
from lorc_core.methods import Method
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import LayerKind
from lorc_core.model.stored.checkpoint import Checkpoint
from lorc_core.model.stored.locations import ModelLocation
from lorc_core.model.stored.weights import model_fingerprint
from lorc_core.ranks.schedule import Schedule
from lorc_core.variant import BaseModel, Variant, load_variant
from pipeline.steps.layers import LayerStep, TrainStep
from pipeline.steps.ranks import RanksStep
from pipeline.steps.step import FileStep, Input, Pin, Place, Recipe
from pipeline.steps.texts import CalibrateStep
from pipeline.storage.artifacts import (
    DIGEST_FILE,
    load_adapters,
    load_digest,
    load_layer,
    load_moments,
    load_ranks,
    moments_file,
)
from pipeline.storage.store import Store
from pipeline.storage.tables import write_table
from pipeline.zoo.sections import Dtype


@dataclass(frozen=True, kw_only=True)
class VariantStep(FileStep):
    """Slice every layer's factors to the scheduled ranks and write the variant."""

    name = "variant"
    revision = 6

    method: Recipe[Method]
    schedule: Recipe[Schedule]
    dtype: Recipe[Dtype]
    source: Recipe[str]
    commit: Recipe[str | None]
    content: Pin[str]
    outline: Place[str]
    architecture: Place[Architecture]
    ranks: Input[RanksStep]
    layers: Input[tuple[LayerStep, ...]]
    trained: Input[TrainStep | None] = None

    def run(self, output: Path, store: Store) -> None:
        from pipeline.evaluation.losses import DTYPES

        dtype, ranks = DTYPES[self.dtype], load_ranks(store.path(self.ranks))
        factors = tuple(
            slice_layer(load_layer(path), layer_idx, ranks, dtype)
            for layer_idx, path in enumerate(store.paths(self.layers))
        )
        adapters = load_adapters(store.path(self.trained)) if self.trained else {}
        adapters = {name: tensor.to(dtype) for name, tensor in adapters.items()}
        schedule = asdict(self.schedule)
        digests = [load_digest(store.path(layer.decomposed, DIGEST_FILE)) for layer in self.layers]
        base = BaseModel(self.source, self.commit, model_fingerprint(self.outline, digests))
        Variant(base, self.architecture, self.method, schedule, ranks, factors, adapters).save(output)


@dataclass(frozen=True, kw_only=True)
class ProjectionErrorsStep(FileStep):
    """What a variant's projections lose, layer by layer: at most, on the calibration text, and at the least.

    Nothing reads it but the table, so that scores do not depend on what was calibrated.
    """

    name = "projection_errors"
    revision = 3

    location: Place[ModelLocation]
    variant: Input[VariantStep]
    calibrated: Input[tuple[CalibrateStep, ...]] = ()

    def run(self, output: Path, store: Store) -> None:
        variant, checkpoint, rows = load_variant(store.path(self.variant)), Checkpoint(self.location.files()), []
        for layer_idx, layer in enumerate(variant.factors):
            moments = load_moments(store.paths(self.calibrated, moments_file(layer_idx)), layer_idx)
            for kind, factors in layer.items():
                place = LayerKind(layer_idx, kind)
                lost = projection_errors(checkpoint, variant.architecture, place, factors, moments)
                rows.append({"layer": layer_idx, "kind": kind, **asdict(lost)})
        write_table(output, "projection_errors", rows)
