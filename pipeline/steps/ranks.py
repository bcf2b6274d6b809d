"""Steps that decide ranks: what schedules measure, the schedules, and the search after one that measures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorc_core.caches.memory import least_factor_floats
from lorc_core.methods import Method
from lorc_core.model.architecture import Architecture
from lorc_core.ranks.budgets import fit_bytes
from lorc_core.ranks.prediction import predicted_rise
from lorc_core.ranks.schedule import Schedule
from lorc_core.ranks.schedules import Sensitivity
from lorc_core.ranks.spectra import Probe, RankSchedule
from pipeline.steps.layers import LayerStep
from pipeline.steps.step import FileStep, Input, ModelStep, Place, Recipe
from pipeline.steps.texts import WindowsStep, longest, windows_of
from pipeline.storage.artifacts import (
    SPECTRA_FILE,
    load_layer,
    load_probes,
    load_ranks,
    load_spectra,
    save_probes,
    save_ranks,
)
from pipeline.storage.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ProbeStep(ModelStep):
    """What one schedule measures on calibration text beside the spectra."""

    name = "probe"
    revision = 2

    kind: Recipe[Probe]
    batch_size: Recipe[int]
    num_windows: Recipe[int]
    windows: Input[tuple[WindowsStep, ...]]
    layers: Input[tuple[LayerStep, ...]] = ()

    def batch_shape(self, store: Store) -> tuple[int, int]:
        return self.batch_size, longest(self.windows)

    def run(self, output: Path, store: Store, model: "PreTrainedModel") -> None:
        from lorc_core.measurement.probes import probe

        layers = [load_layer(path) for path in store.paths(self.layers)]
        windows = torch.from_numpy(windows_of(self.windows, store, model, self.num_windows))
        save_probes(output, probe(self.kind, model, layers, windows.split(self.batch_size)))


@dataclass(frozen=True)
class ByteBudget:
    """Memory for the cache of so many tokens and the factors of a method beside it."""

    memory_bytes: int
    tokens: int
    element_bytes: int
    method: Method

    def least_bytes(self, low: RankSchedule, high: RankSchedule, architecture: Architecture) -> int:
        """That ranks between two need; of two that are the same exactly."""
        floats = low.floats_per_token * self.tokens + least_factor_floats(low, high, self.method, architecture)
        return floats * self.element_bytes


@dataclass(frozen=True, kw_only=True)
class ScheduleStep(FileStep):
    """The aggregator: ranks for every layer from the spectra of all, at a `kept_fraction` or in a `budget`."""

    name = "schedule"
    revision = 4

    schedule: Recipe[Schedule]
    kept_fraction: Recipe[float | None]
    budget: Recipe[ByteBudget | None]
    architecture: Place[Architecture]
    layers: Input[tuple[LayerStep, ...]]
    probes: Input[ProbeStep | None] = None

    def run(self, output: Path, store: Store) -> None:
        probes = None if self.probes is None else load_probes(store.path(self.probes))
        ranks_at = partial(self.schedule.ranks, load_spectra(store.paths(self.layers, SPECTRA_FILE)), probes=probes)
        if self.kept_fraction is not None:
            save_ranks(output, with_prediction(ranks_at(self.kept_fraction), self.layers, store))
            return
        assert self.budget is not None
        least_bytes = partial(self.budget.least_bytes, architecture=self.architecture)
        ranks = fit_bytes(ranks_at, least_bytes, budget_bytes=self.budget.memory_bytes, name=self.schedule.name)
        save_ranks(output, with_prediction(ranks, self.layers, store))


def with_prediction(ranks: RankSchedule, layers: Sequence[LayerStep], store: Store) -> RankSchedule:
    """Ranks with the rise of the loss that they say, where all readers are its gradient."""
    if any(axes.reader != "gradient" for layer in layers for axes in layer.decomposed.axes):
        return ranks
    return replace(ranks, predicted_rise=predicted_rise(load_spectra(store.paths(layers, SPECTRA_FILE)), ranks))


@dataclass(frozen=True, kw_only=True)
class SearchStep(ModelStep):
    """Exchange floats between layers and kinds while the loss on calibration text falls."""

    name = "search"
    revision = 2

    batch_size: Recipe[int]
    num_windows: Recipe[int]
    schedule: Recipe[Sensitivity]
    windows: Input[tuple[WindowsStep, ...]]
    layers: Input[tuple[LayerStep, ...]]
    ranks: Input[ScheduleStep]

    def batch_shape(self, store: Store) -> tuple[int, int]:
        return self.batch_size, longest(self.windows)

    def run(self, output: Path, store: Store, model: "PreTrainedModel") -> None:
        from lorc_core.measurement.exchange import exchanged_ranks

        layers = [load_layer(path) for path in store.paths(self.layers)]
        windows = torch.from_numpy(windows_of(self.windows, store, model, self.num_windows))
        start = load_ranks(store.path(self.ranks))
        ranks = exchanged_ranks(model, self.schedule, layers, windows.split(self.batch_size), start)
        save_ranks(output, with_prediction(ranks, self.layers, store))


RanksStep = ScheduleStep | SearchStep  # leaves a variant's ranks
