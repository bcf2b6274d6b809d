"""What the spectra of a zoo's models say: conditions, effective ranks, ranks by schedule, which method fits where."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorc_core.decomposition.bounds import k_svd_gaps
from lorc_core.decomposition.moments import moments_of
from lorc_core.errors import ConfigError
from lorc_core.methods import METHODS, Axes
from lorc_core.model.kinds import KINDS, Kind, LayerKind, layer_kinds
from lorc_core.model.stored.checkpoint import Checkpoint
from lorc_core.ranks.curves import error_at
from lorc_core.ranks.spectra import Energies, LayerSpectrum, RankSchedule
from pipeline.steps.graph import ModelSteps, calibrated_steps, decompose_steps, probe_step
from pipeline.steps.outcome import Listener, Outcome
from pipeline.steps.ranks import ProbeStep
from pipeline.steps.step import Step
from pipeline.steps_run import StepsRun
from pipeline.storage.artifacts import SPECTRA_FILE, load_moments, load_probes, load_ranks, load_spectra
from pipeline.storage.holding import held_store
from pipeline.storage.store import Store
from pipeline.waiting import Patience
from pipeline.zoo.schema import Zoo
from pipeline.zoo_run import plan_steps


@dataclass(frozen=True)
class SpectrumRow:
    """One layer's keys or values under one method.

    Attributes:
        effective_ranks: exp of the entropy of the singular values of the weight, of the states, and of what is read.
        floats: Per token, by variant.
        gap: What projecting the states alone, over all kv heads before the rotation, loses beyond the best projection
            of the same rank, of all that is read; None without calibration.
    """

    method: str
    layer: int
    kind: Kind
    width: int
    log10_condition: float
    effective_ranks: tuple[float, float, float]
    floats: dict[str, int]
    gap: float | None


@dataclass(frozen=True)
class LayerChoice:
    """The relative error of one layer's attention output under each preset, at one share of its floats, least first."""

    layer: int
    errors: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ModelSpectrum:
    """What is known of one model.

    `kept_fraction` is the share of a layer's floats at which gaps and choices stand; None where no ranks are known.
    `choices` is empty without calibration.
    """

    name: str
    kept_fraction: float | None
    rows: tuple[SpectrumRow, ...]
    choices: tuple[LayerChoice, ...]


def model_spectra(
    zoo: Zoo, workdir: Path | str, listener: Listener | None = None
) -> tuple[list[ModelSpectrum], list[Outcome]]:
    """Decompose, schedule and, with calibration, compare all presets layer by layer; nothing is written but steps.

    Args:
        zoo: A checked zoo file.
        workdir: Holds the store.
        listener: Is told how it goes on.

    Returns:
        One for each model, of the steps that finished, and the failed outcomes.

    Raises:
        ConfigError: The work directory is not writable, or another run is using it.
    """
    listener = listener or Listener()
    patience = Patience(zoo.cluster.wait_s, listener.note)
    with held_store(workdir) as store:
        models, failed = plan_steps(zoo, store, listener, patience)
        compared = [preset_probes(zoo, model) for model in models]
        wanted: list[Step] = [variant.schedule for model in models for variant in model.variants]
        wanted += [step for probes in compared for step in probes.values()]

        def read(outcomes: list[Outcome]) -> tuple[list[ModelSpectrum], list[Outcome]]:
            pairs = zip(models, compared, strict=True)
            spectra = [model_spectrum(zoo, model, probes, store) for model, probes in pairs]
            return spectra, [outcome for outcome in (*failed, *outcomes) if outcome.status == "failed"]

        return StepsRun(zoo.cluster, store, wanted, listener, patience).then(read)


def preset_probes(zoo: Zoo, model: ModelSteps) -> dict[str, ProbeStep]:
    """The step that measures each possible preset's attention errors, by its name; none without calibration."""
    calibrated = calibrated_steps(zoo, model.model)
    probes: dict[str, ProbeStep] = {}
    for name, method in METHODS.items() if calibrated else ():
        try:
            method.check(model.model.architecture)
        except ConfigError:
            continue
        if method.training is None:
            assert calibrated is not None
            layers = decompose_steps(model.model, method, calibrated)
            probes[name] = probe_step(model.model, "attention_errors", layers, calibrated)
    return probes


def model_spectrum(zoo: Zoo, model: ModelSteps, probes: dict[str, ProbeStep], store: Store) -> ModelSpectrum:
    ranks = {
        variant.label: load_ranks(store.path(variant.schedule))
        for variant in model.variants
        if store.is_done(variant.schedule)
    }
    kept_fraction = compared_fraction(zoo, ranks)
    gaps = layer_gaps(zoo, model, kept_fraction, store) if kept_fraction is not None else {}
    choices = layer_choices(model, probes, kept_fraction, store) if kept_fraction is not None else ()
    rows = tuple(
        row
        for method, steps in model.decompose.items()
        if all(store.is_done(step) for step in steps)
        for row in method_rows(model, method, load_spectra(store.paths(steps, SPECTRA_FILE)), ranks, gaps)
    )
    return ModelSpectrum(model.model.entry.name, kept_fraction, rows, choices)


def compared_fraction(zoo: Zoo, ranks: Mapping[str, RankSchedule]) -> float | None:
    """The share of a layer's floats at which methods are compared.

    Args:
        zoo: The first share that it names is taken; it may have budgets in bytes alone.
        ranks: By variant; what the first budget in bytes came to is taken then.

    Returns:
        None where there is neither.
    """
    named = [kept_fraction for entry in zoo.variants for kept_fraction in entry.kept_fraction]
    return next(iter([*named, *(schedule.kept_fraction for schedule in ranks.values())]), None)


def method_rows(
    model: ModelSteps,
    method: str,
    spectra: Sequence[LayerSpectrum],
    ranks: Mapping[str, RankSchedule],
    gaps: Mapping[LayerKind, float],
) -> Iterator[SpectrumRow]:
    """Every layer's keys and values under one method, with the floats that its variants keep of them."""
    labels = [variant.label for variant in model.variants if variant.method == method and variant.label in ranks]
    for place in layer_kinds(len(spectra)):
        layer = spectra[place.layer_idx]
        spectrum = layer[place.kind]
        yield SpectrumRow(
            method=method,
            layer=place.layer_idx,
            kind=place.kind,
            width=layer.kv_width,
            log10_condition=spectrum.log10_condition,
            effective_ranks=(
                effective_rank(spectrum.weights),
                effective_rank(spectrum.states),
                effective_rank(spectrum.read),
            ),
            floats={label: ranks[label].layers[place.layer_idx].floats(place.kind) for label in labels},
            gap=gaps.get(place),
        )


def effective_rank(energies: Energies) -> float:
    """exp of the entropy of the singular values' shares, over all blocks.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality"
    """
    roots = [math.sqrt(max(value, 0.0)) for block in energies for value in block]
    whole = sum(roots)
    if whole == 0:
        return 0.0
    return math.exp(-sum(root / whole * math.log(root / whole) for root in roots if root > 0))


def layer_gaps(zoo: Zoo, model: ModelSteps, kept_fraction: float, store: Store) -> dict[LayerKind, float]:
    """KQ-SVD's gap as a share of what is read, for joint keys before the rotation and for values."""
    calibrated = calibrated_steps(zoo, model.model)
    if calibrated is None or not all(store.is_done(step) for step in calibrated.shards):
        return {}
    shape, source = model.model.architecture, Checkpoint(model.model.location.files())
    shards, axes = [store.path(step) for step in calibrated.shards], Axes("calibration", "interaction")
    rank = max(round(kept_fraction * shape.kv_width), 1)
    gaps = {}
    for layer_idx in range(shape.num_layers):
        measured = load_moments(shards, layer_idx)
        for place in (LayerKind(layer_idx, kind) for kind in KINDS):
            moments = moments_of(source, shape, place, axes, measured)
            gap = k_svd_gaps(moments.states, moments.readers)[rank]
            gaps[place] = (gap / torch.sum(moments.readers * moments.states)).item()
    return gaps


def layer_choices(
    model: ModelSteps, probes: dict[str, ProbeStep], kept_fraction: float, store: Store
) -> tuple[LayerChoice, ...]:
    """Every preset's attention error in every layer at one share of that layer's floats."""
    measured = {name: load_probes(store.path(step)) for name, step in probes.items() if store.is_done(step)}
    floats = kept_fraction * len(KINDS) * model.model.architecture.kv_width
    choices = []
    for layer_idx in range(model.model.architecture.num_layers if measured else 0):
        errors = {name: error_at(probe.attention_errors[layer_idx], floats) for name, probe in measured.items()}
        choices.append(LayerChoice(layer_idx, tuple(sorted(errors.items(), key=lambda pair: pair[1]))))
    return tuple(choices)
