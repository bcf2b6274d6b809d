"""What each step does: plain functions from recipes and input directories to files in an output directory.

Nothing here knows where it runs; `artifacts` knows what the files look like.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lorc_core.attention.attach import attach
from lorc_core.caches.memory import planned_factor_floats
from lorc_core.compression import decompose_kind
from lorc_core.decomposition.factors import slice_layer
from lorc_core.decomposition.projection_errors import projection_errors
from lorc_core.errors import LorcError
from lorc_core.loading import check_base
from lorc_core.manifest import MANIFEST_FILE
from lorc_core.measurement.calibration import calibrate as core_calibrate
from lorc_core.measurement.calibration import load_tokenizer
from lorc_core.measurement.exchange import exchanged_ranks
from lorc_core.measurement.probes import probe as core_probe
from lorc_core.measurement.training import Trainer
from lorc_core.measurement.training import change_basis as core_change_basis
from lorc_core.methods import Axes, Reader, Training, method_from_dict
from lorc_core.model.architecture import Architecture
from lorc_core.model.checkpoint import Checkpoint
from lorc_core.model.kinds import KINDS, KeysValues, Kind, LayerKind
from lorc_core.ranks.budgets import fit_bytes
from lorc_core.ranks.schedules import Probe, Sensitivity, schedule_from_dict
from lorc_core.ranks.spectra import RankSchedule
from lorc_core.variant import BaseModel, Variant, load_variant
from pipeline.evaluation import DTYPES, loaded_model, window_losses
from pipeline.gates import fell, losses_of, paired_rise, standard_error
from pipeline.steps.step import Call, Milestone, Outcome
from pipeline.storage.artifacts import (
    load_adapters,
    load_bases,
    load_layer,
    load_moments,
    load_probes,
    load_ranks,
    load_spectra,
    load_windows,
    save_adapters,
    save_bases,
    save_layer,
    save_moments,
    save_probes,
    save_ranks,
    save_windows,
)
from pipeline.storage.store import Store
from pipeline.storage.tables import read_rows, write_table
from pipeline.zoo.schema import DocumentMarks, TextEntry
from pipeline.zoo.texts import pin_windows, text_tokens


def calibrate(
    output: Path,
    *,
    model: PreTrainedModel,
    batch_size: int,
    shard: int,
    num_shards: int,
    join_rotated_heads: bool,
    windows: Sequence[Path],
) -> None:
    """Second moments of every layer on one shard of the calibration windows."""
    rows = torch.from_numpy(load_windows(windows))[shard::num_shards]
    found = core_calibrate(model, rows.split(batch_size), join_rotated_heads=join_rotated_heads)
    save_moments(output, found)


def decompose(
    output: Path,
    *,
    axes: dict[Kind, dict[str, Any]],
    layer_idx: int,
    architecture: dict[str, Any],
    model_dir: str,
    calibrated: Sequence[Path] = (),
) -> None:
    """One layer's full-rank nested factors and spectra, from its weights and what calibration measured of it."""
    source, shape = Checkpoint(Path(model_dir)), Architecture.from_dict(architecture)
    moments = load_moments(calibrated, layer_idx)
    layer = KeysValues(
        *(decompose_kind(source, shape, LayerKind(layer_idx, kind), Axes(**axes[kind]), moments) for kind in KINDS)
    )
    save_layer(output, layer_idx, layer)


def train(
    output: Path,
    *,
    model: PreTrainedModel,
    training: dict[str, Any],
    checkpoint_dir: str,
    windows: Sequence[Path],
    layers: Sequence[Path],
) -> Iterator[tuple[int, int]]:
    """Train bases of a decomposed model's latents; yields steps done and to do. Goes on from its checkpoint."""
    checkpoint = Path(checkpoint_dir)
    text = torch.from_numpy(load_windows(windows))
    rows = []
    for state in Trainer(model, [load_layer(path) for path in layers], Training(**training)).train(text, checkpoint):
        rows.append({"step": state.step, "best": state.best, "last": state.last})
        yield state.step, state.num_steps
    save_bases(output, state.bases)
    save_adapters(output, state.adapters)
    write_table(output, "training", rows)


def change_basis(output: Path, *, layer_idx: int, readers: dict[Kind, Reader], layer: Path, trained: Path) -> None:
    """One layer's decomposition along its trained directions."""
    start, bases = load_layer(layer), load_bases(trained, layer_idx)
    changed = KeysValues(*(core_change_basis(start[kind], bases[kind], readers[kind]) for kind in KINDS))
    save_layer(output, layer_idx, changed)


def probe(
    output: Path,
    *,
    model: PreTrainedModel,
    kind: Probe,
    batch_size: int,
    num_windows: int,
    windows: Sequence[Path],
    layers: Sequence[Path] = (),
) -> None:
    """What one schedule measures on calibration text beside the spectra."""
    batches = probe_batches(windows, num_windows, batch_size)
    save_probes(output, core_probe(kind, model, [load_layer(path) for path in layers], batches))


def probe_batches(windows: Sequence[Path], num_windows: int, batch_size: int) -> list[torch.Tensor]:
    """The first windows of each calibration text."""
    return list(torch.from_numpy(load_windows(windows, num_windows)).split(batch_size))


def schedule(
    output: Path,
    *,
    schedule: dict[str, Any],
    kept_fraction: float | None,
    budget: dict[str, Any] | None,
    architecture: dict[str, Any],
    layers: Sequence[Path],
    probes: Path | None = None,
) -> None:
    """The aggregator: ranks for every layer from the spectra of all."""
    chosen = schedule_from_dict(schedule)
    measured = None if probes is None else load_probes(probes)
    ranks_at = partial(chosen.ranks, load_spectra(layers), probes=measured)
    if kept_fraction is not None:
        ranks = ranks_at(kept_fraction)
    else:
        assert budget is not None
        method, shape = method_from_dict(budget["method"]), Architecture.from_dict(architecture)

        def needed_bytes(found: RankSchedule) -> int:
            floats = found.floats_per_token * budget["tokens"] + planned_factor_floats(found, method, shape)
            return floats * budget["element_bytes"]

        ranks = fit_bytes(ranks_at, needed_bytes, budget_bytes=budget["memory_bytes"], name=chosen.name)
    save_ranks(output, ranks)


def search(
    output: Path,
    *,
    model: PreTrainedModel,
    schedule: dict[str, Any],
    batch_size: int,
    num_windows: int,
    windows: Sequence[Path],
    layers: Sequence[Path],
    ranks: Path,
) -> None:
    """Exchange floats between layers and kinds while the loss on calibration text falls."""
    loaded = [load_layer(path) for path in layers]
    chosen = schedule_from_dict(schedule)
    assert isinstance(chosen, Sensitivity)
    batches = probe_batches(windows, num_windows, batch_size)
    save_ranks(output, exchanged_ranks(model, chosen, loaded, batches, load_ranks(ranks)))


def variant(
    output: Path,
    *,
    method: dict[str, Any],
    schedule: dict[str, Any],
    dtype: str,
    base: dict[str, Any],
    architecture: dict[str, Any],
    ranks: Path,
    layers: Sequence[Path],
    trained: Path | None = None,
) -> None:
    """Slice every layer's factors to the scheduled ranks and write the variant."""
    chosen, shape = load_ranks(ranks), Architecture.from_dict(architecture)
    factors = tuple(slice_layer(load_layer(path), idx, chosen, DTYPES[dtype]) for idx, path in enumerate(layers))
    made_by = method_from_dict(method)
    found_adapters = load_adapters(trained) if trained else {}
    adapters = {name: tensor.to(DTYPES[dtype]) for name, tensor in found_adapters.items()}
    Variant(BaseModel(**base), shape, made_by, schedule, chosen, factors, adapters).save(output)


def errors(output: Path, *, model_dir: str, variant: Path, calibrated: Sequence[Path] = ()) -> None:
    """What a variant's projections lose, layer by layer: at most, on the calibration text, and at the least."""
    found, source, rows = load_variant(variant), Checkpoint(Path(model_dir)), []
    for layer_idx, layer in enumerate(found.factors):
        moments = load_moments(calibrated, layer_idx)
        for kind, factors in layer.items():
            lost = projection_errors(source, found.architecture, LayerKind(layer_idx, kind), factors, moments)
            rows.append({"layer": layer_idx, "kind": kind, **asdict(lost)})
    write_table(output, "errors", rows)


def windows(
    output: Path,
    *,
    document_marks: DocumentMarks,
    window_tokens: int,
    num_windows: int,
    seed: int,
    entry: dict[str, Any],
    model_dir: str,
    trust_remote_code: bool,
    cache_dir: str,
) -> None:
    """Pin the tokens that every evaluation, or calibration, of this model on this text will use."""
    source = TextEntry.model_validate(entry)
    cut = load_tokenizer(Path(model_dir), trust_remote_code=trust_remote_code)
    stream = text_tokens(source, cut, document_marks, Path(cache_dir))
    pinned = pin_windows(stream, window_tokens=window_tokens, num_windows=num_windows, seed=seed, name=source.name)
    save_windows(output, pinned)


def evaluate(
    output: Path,
    *,
    model: PreTrainedModel,
    batch_size: int,
    text_names: Sequence[str],
    windows: Sequence[Path],
    variant: Path | None = None,
) -> None:
    """Score the baseline (no `variant`) or a variant on every text."""
    found = None if variant is None else load_variant(variant)
    factors = 0 if found is None else found.factor_floats
    scores, losses = [], []
    with nullcontext() if found is None else attach(model, found):
        for name, directory in zip(text_names, windows, strict=True):
            pinned = load_windows([directory])
            started = time.perf_counter()
            per_window, bytes_per_token = window_losses(model, pinned, batch_size)
            elapsed_s = time.perf_counter() - started
            losses += [{"text": name, "window": idx, "loss": loss} for idx, loss in enumerate(per_window.tolist())]
            scores.append(
                {
                    "text": name,
                    "loss": float(per_window.mean()),
                    "loss_standard_error": standard_error(per_window),
                    "perplexity": float(np.exp(per_window.mean())),
                    "scored_tokens": pinned.shape[0] * (pinned.shape[1] - 1),
                    "bytes_per_token": bytes_per_token,
                    "factor_bytes": factors * model.dtype.itemsize,
                    "eval_s": elapsed_s,
                }
            )
    write_table(output, "scores", scores)
    write_table(output, "window_losses", losses)


def register(output: Path, **details: Any) -> None:
    """Log and register a variant in MLflow. Runs in the driver, the only process that writes to the store."""
    from pipeline.registry import register_variant

    version = register_variant(**details)
    (output / "registration.json").write_text(json.dumps(version))


def regress(
    output: Path,
    *,
    model: PreTrainedModel,
    name: str,
    version: str,
    started_at: str,
    model_dir: str,
    variant_dir: str,
    evaluation_dir: str,
    batch_size: int,
    text_names: Sequence[str],
    tolerance: float,
) -> None:
    """Score a registered variant again on its pinned tokens and compare with its registered scores."""
    found = load_variant(variant_dir)
    check_base(Path(model_dir), found)
    scores = {row["text"]: row for row in read_rows(Path(evaluation_dir), "scores")}
    rows = []
    with attach(model, found):
        for text in text_names:
            pinned = np.load(Path(evaluation_dir) / f"{text}.npy")
            per_window, bytes_per_token = window_losses(model, pinned, batch_size)
            rise = paired_rise(losses_of(Path(evaluation_dir), text), per_window)
            registered_bytes = scores[text]["bytes_per_token"]
            rows.append(
                {
                    "name": name,
                    "version": version,
                    "started_at": started_at,
                    "text": text,
                    "registered_loss": rise.reference_loss,
                    "loss": rise.loss,
                    "loss_rise_standard_error": rise.standard_error,
                    "registered_bytes_per_token": registered_bytes,
                    "bytes_per_token": bytes_per_token,
                    "fell": fell(rise, tolerance) or bytes_per_token > registered_bytes,
                }
            )
    write_table(output, "regressions", rows)


TASKS: dict[str, Callable[..., Iterator[tuple[int, int]] | None]] = {
    function.__name__: function
    for function in (
        calibrate,
        decompose,
        train,
        change_basis,
        probe,
        schedule,
        search,
        variant,
        errors,
        windows,
        evaluate,
        register,
        regress,
    )
}


def run_calls(calls: Sequence[Call], store: Store) -> Iterator[Outcome | Milestone]:
    """Run calls of one kind in turn, yielding outcomes, and progress, as they come; calls share one loaded model.

    A LorcError is an outcome. Any other exception is a bug or a broken machine, and rises.
    """
    try:
        with shared_arguments(calls[0]) as shared:
            for call in calls:
                yield from run_call(call, store, shared)
    except LorcError as error:
        for call in calls:
            yield Outcome(call.key, call.name, call.model, "failed", str(error), 0.0)


@contextmanager
def shared_arguments(call: Call) -> Iterator[dict[str, Any]]:
    """What the calls of one group share, opened once: the model that they run."""
    if call.loads is None:
        yield {}
        return
    with loaded_model(call.loads.model_dir, call.loads.dtype, trust_remote_code=call.loads.trust_remote_code) as model:
        yield {"model": model}


def run_call(call: Call, store: Store, shared: dict[str, Any]) -> Iterator[Outcome | Milestone]:
    started = time.perf_counter()
    if (call.output / MANIFEST_FILE).is_file():  # by an earlier attempt whose worker was lost
        yield Outcome(call.key, call.name, call.model, "ran", None, 0.0)
        return
    error: str | None = None
    try:
        with store.writing(call.output) as scratch:
            for done, total in TASKS[call.name](scratch, **call.kwargs, **shared) or ():
                yield Milestone(call.key, f"{call.name} {call.model}", done, total)
    except LorcError as found:
        error = str(found)
    except torch.OutOfMemoryError as found:
        error = f"out of device memory; lower the batch_size or give more GPUs ({found})"
    if error is None and "checkpoint_dir" in call.kwargs:
        shutil.rmtree(call.kwargs["checkpoint_dir"], ignore_errors=True)
    yield Outcome(call.key, call.name, call.model, "failed" if error else "ran", error, time.perf_counter() - started)
