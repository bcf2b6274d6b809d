"""What each step does: plain functions from recipes and input directories to files in an output directory.

Nothing here knows where it runs. Keyword arguments that a function ignores stand in its recipe because they
decide the result (the content of the model behind `model_dir`, say).
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lorc_core.architecture import KINDS, Architecture
from lorc_core.checkpoint import Checkpoint
from lorc_core.compression import LayerDecomposition, decompose_layer, slice_layer
from lorc_core.errors import ConfigError, LorcError
from lorc_core.methods import known_method
from lorc_core.projection import Decomposition
from lorc_core.runtime import attach, check_base
from lorc_core.schedule import KindSpectrum, LayerSpectrum, RankSchedule, known_schedule
from lorc_core.variant import MANIFEST_FILE, BaseModel, Variant, load_variant
from pipeline.evaluation import DTYPES, loaded_model, window_losses
from pipeline.gates import fell, losses_of, paired_rise, standard_error
from pipeline.steps import Call, Outcome, Store
from pipeline.tables import read_rows, write_table
from pipeline.texts import load_rows, load_tokenizer, pin_windows, token_stream
from pipeline.zoo import TextEntry

SCHEDULE_FILE = "schedule.json"
WINDOWS_FILE = "windows.npy"
LAYER_FILE = "layer.safetensors"
SPECTRA = ("singular_values", "state_energies", "read_energies")


def decompose(
    output: Path,
    *,
    model_fingerprint: str,
    method: str,
    layer_idx: int,
    architecture: dict[str, Any],
    model_dir: str,
) -> None:
    """One layer's full-rank nested factors and spectra, from its weights alone."""
    source = Checkpoint(Path(model_dir))
    layer = decompose_layer(source, Architecture(**architecture), layer_idx, known_method(method))
    tensors: dict[str, torch.Tensor] = {}
    rows = []
    for kind, found in layer.items():
        full = found.factors(found.up.shape[0])
        tensors |= {f"{kind}.{name}": tensor.float() for name, tensor in full.tensors().items()}
        tensors |= {f"{kind}.{name}": getattr(found, name).clone() for name in SPECTRA}
        rows.append(
            {
                "layer": layer_idx,
                "kind": kind,
                "width": found.up.shape[0],
                "log10_condition": found.log10_condition,
                **{name: getattr(found, name).tolist() for name in SPECTRA},
            }
        )
    save_file(tensors, output / LAYER_FILE)
    write_table(output, "spectra", rows)


def load_layer(directory: Path) -> LayerDecomposition:
    """What `decompose` wrote."""
    tensors = load_file(directory / LAYER_FILE)
    return {
        kind: Decomposition(
            up=tensors[f"{kind}.up"],
            own_down=tensors.get(f"{kind}.own_down"),
            mean=tensors.get(f"{kind}.mean"),
            **{name: tensors[f"{kind}.{name}"] for name in SPECTRA},
        )
        for kind in KINDS
    }


def schedule(output: Path, *, schedule: dict[str, Any], kept_fraction: float, layers: Sequence[Path]) -> None:
    """The aggregator: ranks for every layer from the spectra of all."""
    spectra = []
    for directory in layers:
        keys, values = read_rows(directory, "spectra")
        spectra.append(LayerSpectrum(keys["width"], kind_spectrum_of(keys), kind_spectrum_of(values)))
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in schedule.items()}
    ranks = known_schedule(str(fields.pop("name")), **fields).ranks(spectra, kept_fraction)
    (output / SCHEDULE_FILE).write_text(json.dumps(asdict(ranks)))
    write_table(
        output,
        "ranks",
        [
            {"layer": idx, "kind": kind, "rank": getattr(layer, kind), "width": ranks.kv_width, "note": ranks.note}
            for idx, layer in enumerate(ranks.layers)
            for kind in KINDS
        ],
    )


def kind_spectrum_of(row: dict[str, Any]) -> KindSpectrum:
    """What the schedules need of a row of the table `spectra`."""
    return KindSpectrum(
        log10_condition=row["log10_condition"],
        weights=tuple(value**2 for value in row["singular_values"]),
        states=tuple(row["state_energies"]),
        read=tuple(row["read_energies"]),
    )


def variant(
    output: Path,
    *,
    method: str,
    schedule: dict[str, Any],
    dtype: str,
    base: dict[str, Any],
    architecture: dict[str, Any],
    ranks: Path,
    layers: Sequence[Path],
) -> None:
    """Slice every layer's factors to the scheduled ranks and write the variant."""
    chosen = RankSchedule.from_dict(json.loads((ranks / SCHEDULE_FILE).read_text()))
    factors = tuple(slice_layer(load_layer(path), idx, chosen, DTYPES[dtype]) for idx, path in enumerate(layers))
    Variant(BaseModel(**base), Architecture(**architecture), method, schedule, chosen, factors).save(output)


def windows(
    output: Path,
    *,
    text: dict[str, Any],
    tokenizer: str,
    window_tokens: int,
    num_windows: int,
    seed: int,
    entry: dict[str, Any],
    model_dir: str,
    trust_remote_code: bool,
    cache_dir: str,
) -> None:
    """Pin the tokens that every evaluation of this model on this text will use."""
    source = TextEntry.model_validate(entry)
    cut = load_tokenizer(Path(model_dir), trust_remote_code=trust_remote_code)
    stream = token_stream(load_rows(source, Path(cache_dir)), cut)
    pinned = pin_windows(stream, window_tokens=window_tokens, num_windows=num_windows, seed=seed, name=source.name)
    np.save(output / WINDOWS_FILE, pinned)


def evaluate(
    output: Path,
    *,
    model: PreTrainedModel,
    model_fingerprint: str,
    dtype: str,
    versions: dict[str, str],
    batch_size: int,
    text_names: Sequence[str],
    model_dir: str,
    trust_remote_code: bool,
    windows: Sequence[Path],
    variant: Path | None = None,
) -> None:
    """Score the baseline (no `variant`) or a variant on every text."""
    found = None if variant is None else load_variant(variant)
    factors = 0 if found is None else found.factor_floats
    scores, losses = [], []
    with nullcontext() if found is None else attach(model, found):
        for name, directory in zip(text_names, windows, strict=True):
            pinned = np.load(directory / WINDOWS_FILE)
            started = time.perf_counter()
            per_window, bytes_per_token = window_losses(model, pinned, batch_size)
            elapsed = time.perf_counter() - started
            losses += [{"text": name, "window": idx, "loss": loss} for idx, loss in enumerate(per_window.tolist())]
            scores.append(
                {
                    "text": name,
                    "loss": float(per_window.mean()),
                    "loss_standard_error": standard_error(per_window),
                    "perplexity": float(np.exp(per_window.mean())),
                    "scored_tokens": pinned.shape[0] * (pinned.shape[1] - 1),
                    "bytes_per_token": bytes_per_token,
                    "factor_bytes": factors * DTYPES[dtype].itemsize,
                    "eval_s": elapsed,
                }
            )
    write_table(output, "scores", scores)
    write_table(output, "window_losses", losses)


def register(output: Path, **details: Any) -> None:
    """Log and register a variant in MLflow. Runs in the driver, the only process that writes to the store."""
    from pipeline.registry import register_variant  # MLflow takes seconds to import and workers never need it

    version = register_variant(**details)
    (output / "registration.json").write_text(json.dumps(version))


def regress(
    output: Path,
    *,
    model: PreTrainedModel,
    name: str,
    version: str,
    started_at: str,
    dtype: str,
    model_dir: str,
    trust_remote_code: bool,
    variant_dir: str,
    evaluation_dir: str,
    batch_size: int,
    text_names: Sequence[str],
    tolerance: float,
) -> None:
    """Score a registered variant again on its pinned tokens and compare with its registered scores."""
    found = load_variant(variant_dir)
    check_base(Path(model_dir), found)
    rows = []
    with attach(model, found):
        for text in text_names:
            pinned = np.load(Path(evaluation_dir) / f"{text}.npy")
            per_window, bytes_per_token = window_losses(model, pinned, batch_size)
            registered = next(row for row in read_rows(Path(evaluation_dir), "scores") if row["text"] == text)
            rise = paired_rise(losses_of(Path(evaluation_dir), text), per_window)
            grew = bytes_per_token > registered["bytes_per_token"]
            rows.append(
                {
                    "name": name,
                    "version": version,
                    "started_at": started_at,
                    "text": text,
                    "registered_loss": rise.reference_loss,
                    "loss": rise.loss,
                    "loss_rise_standard_error": rise.standard_error,
                    "registered_bytes_per_token": registered["bytes_per_token"],
                    "bytes_per_token": bytes_per_token,
                    "fell": fell(rise, tolerance) or grew,
                }
            )
    write_table(output, "regressions", rows)


TASKS: dict[str, Callable[..., None]] = {
    function.__name__: function for function in (decompose, schedule, variant, windows, evaluate, register, regress)
}


def run_calls(calls: Sequence[Call], store: Store) -> Iterator[Outcome]:
    """Run calls of one kind in turn, yielding each outcome as it comes; evaluations share one loaded model.

    A LorcError is an outcome. Any other exception is a bug or a broken machine, and rises.
    """
    try:
        with shared_arguments(calls[0]) as shared:
            for call in calls:
                yield run_call(call, store, shared)
    except LorcError as error:
        for call in calls:
            yield Outcome(call.key, call.name, call.model, "failed", str(error), 0.0)


@contextmanager
def shared_arguments(call: Call) -> Iterator[dict[str, Any]]:
    """What the calls of one group share, opened once: for evaluations of one model, that model."""
    if call.name not in ("evaluate", "regress"):
        yield {}
        return
    directory, dtype = Path(call.kwargs["model_dir"]), call.kwargs["dtype"]
    with loaded_model(directory, dtype, trust_remote_code=call.kwargs["trust_remote_code"]) as model:
        yield {"model": model}


def run_call(call: Call, store: Store, shared: dict[str, Any]) -> Outcome:
    started = time.perf_counter()
    if (call.output / MANIFEST_FILE).is_file():  # by an earlier attempt whose worker was lost
        return Outcome(call.key, call.name, call.model, "ran", None, 0.0)
    try:
        with store.writing(call.output) as scratch:
            TASKS[call.name](scratch, **call.kwargs, **shared)
    except LorcError as error:
        return Outcome(call.key, call.name, call.model, "failed", str(error), time.perf_counter() - started)
    except torch.OutOfMemoryError as error:
        reason = ConfigError(f"out of device memory; lower evaluation.batch_size or give more GPUs ({error})")
        return Outcome(call.key, call.name, call.model, "failed", str(reason), time.perf_counter() - started)
    return Outcome(call.key, call.name, call.model, "ran", None, time.perf_counter() - started)
