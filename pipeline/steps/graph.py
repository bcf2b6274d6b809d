"""From a zoo file to its steps: what is decomposed, scheduled, written, evaluated and registered, from what."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorc_core.errors import ConfigError
from lorc_core.methods import Method
from lorc_core.model.kinds import KINDS
from lorc_core.ranks.schedules import Probe
from pipeline.steps.step import ModelLoad, Need, Step
from pipeline.storage.store import Store
from pipeline.tracking import artifact_root
from pipeline.zoo.limits import check_variant, check_window
from pipeline.zoo.models import ResolvedModel
from pipeline.zoo.schema import Budget, Calibration, Evaluation, TextEntry, VariantEntry, Zoo, variant_label
from pipeline.zoo.texts import text_identity, tokenizer_identity

# Float64 weight, Gram matrix, eigenvectors and workspace of one layer, over the bytes of its float64 weight and
# of its square block; generous, since Ray only counts it.
DECOMPOSE_COPIES = 6
MOMENT_COPIES = 12  # float64 moments of one layer, their roots, factors and a shard more, over one square block


@dataclass(frozen=True)
class VariantSteps:
    """The steps of one variant of one model."""

    label: str
    method: str
    schedule: Step
    variant: Step
    errors: Step
    evaluate: Step
    register: Step


@dataclass(frozen=True)
class ModelSteps:
    """The steps of one model; every budget shares the decompositions.

    `decompose` has each method's, by its name. `refused` has the labels of variants that the model cannot have, with
    the reason.
    """

    model: ResolvedModel
    decompose: dict[str, tuple[Step, ...]]
    windows: tuple[Step, ...]
    baseline: Step
    variants: tuple[VariantSteps, ...]
    refused: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Calibrated:
    """The pinned calibration texts of one model and the steps that measure its moments on them, one per shard."""

    settings: Calibration
    windows: tuple[Step, ...]
    shards: tuple[Step, ...]


def model_steps(zoo: Zoo, model: ResolvedModel, store: Store, tracking_uri: str) -> ModelSteps:
    """All steps for one model of a zoo.

    Raises:
        ConfigError: The windows are longer than the model's positions.
        ArtifactError: The model has no tokenizer.
    """
    check_window("evaluation", zoo.evaluation.window_tokens, model)
    windows = windows_steps(model, zoo.evaluation.texts, zoo.evaluation, store)
    calibrated = calibrated_steps(zoo, model, store)
    baseline = evaluate_step(zoo, model, windows, None)
    decompositions: dict[str, tuple[Step, ...]] = {}
    variants, refused = [], []
    for entry in zoo.variants:
        for budget in entry.budgets:
            label = variant_label(entry, budget)
            try:
                check_variant(zoo, model, entry)
            except ConfigError as error:
                refused.append((label, f"{label}: {error}"))
                continue
            layers = decompose_steps(model, entry.method, calibrated, store)
            decompositions.setdefault(entry.method.name, layers)
            scheduled = schedule_steps(model, entry, budget, layers, calibrated)
            written = variant_step(model, entry, scheduled, layers)
            errors = errors_step(model, written, calibrated)
            evaluated = evaluate_step(zoo, model, windows, written)
            registered = register_step(zoo, model, label, (written, baseline, evaluated, windows), tracking_uri, store)
            variants.append(VariantSteps(label, entry.method.name, scheduled, written, errors, evaluated, registered))
    return ModelSteps(model, decompositions, windows, baseline, tuple(variants), tuple(refused))


def calibrated_steps(zoo: Zoo, model: ResolvedModel, store: Store) -> Calibrated | None:
    """Calibration is shared by every method and budget of a model."""
    settings = zoo.calibration
    if settings is None or settings.window_tokens > model.architecture.max_tokens:  # `check_variant` refuses those
        return None
    windows = windows_steps(model, settings.texts, settings, store)
    recipe = {
        "batch_size": settings.batch_size,
        "num_shards": settings.shards,
        "join_rotated_heads": any(entry.method.joins_rotated_heads for entry in zoo.variants),
    }
    shards = tuple(
        Step(
            name="calibrate",
            model=model.entry.name,
            recipe={**recipe, "shard": idx},
            pins=running(model),
            loads=loading(model),
            inputs={"windows": windows},
            need=need_of(model),
        )
        for idx in range(settings.shards)
    )
    return Calibrated(settings, windows, shards)


def running(model: ResolvedModel) -> dict[str, Any]:
    """What decides the result of every step that runs the model."""
    return {
        "model_fingerprint": model.base.fingerprint,
        "dtype": model.entry.dtype,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def loading(model: ResolvedModel) -> ModelLoad:
    return ModelLoad(model.directory, model.entry.dtype, model.entry.trust_remote_code)


def need_of(model: ResolvedModel) -> Need:
    resources = model.entry.resources
    return Need(resources.num_cpus, resources.num_gpus, resources.memory_bytes)


def decompose_steps(
    model: ResolvedModel, method: Method, calibrated: Calibrated | None, store: Store
) -> tuple[Step, ...]:
    """Each layer's last decomposition: the method's own or, with training, that one rotated."""
    starts = tuple(
        decompose_step(model, method.at(layer_idx), layer_idx, calibrated)
        for layer_idx in range(model.architecture.num_layers)
    )
    if method.training is None:
        return starts
    assert calibrated is not None
    trained = Step(
        name="train",
        model=model.entry.name,
        recipe={"training": asdict(method.training)},
        pins=running(model),
        loads=loading(model),
        inputs={"windows": calibrated.windows, "layers": starts},
        need=need_of(model),
    )
    trained = replace(trained, places={"checkpoint_dir": str(store.root / "training" / trained.key)})
    return tuple(
        Step(
            name="change_basis",
            model=model.entry.name,
            recipe={"layer_idx": idx, "readers": {kind: method.axes(idx, kind).reader for kind in KINDS}},
            inputs={"layer": start, "trained": trained},
        )
        for idx, start in enumerate(starts)
    )


def decompose_step(model: ResolvedModel, method: Method, layer_idx: int, calibrated: Calibrated | None) -> Step:
    architecture = model.architecture
    floats = architecture.kv_width * (architecture.hidden_size + architecture.kv_width)
    measures = any(axes.statistics == "calibration" for axes in (method.keys, method.values))
    floats += MOMENT_COPIES * architecture.kv_width**2 if measures else 0
    return Step(
        name="decompose",
        model=model.entry.name,
        recipe={"axes": {"keys": asdict(method.keys), "values": asdict(method.values)}, "layer_idx": layer_idx},
        pins={"model_fingerprint": model.base.fingerprint},
        places={"model_dir": str(model.directory), "architecture": architecture.to_dict()},
        inputs={"calibrated": calibrated.shards} if calibrated and measures else {},
        need=Need(num_cpus=1, memory_bytes=DECOMPOSE_COPIES * 8 * floats),
    )


def schedule_steps(
    model: ResolvedModel,
    entry: VariantEntry,
    budget: float | Budget,
    layers: tuple[Step, ...],
    calibrated: Calibrated | None,
) -> Step:
    """The last step that gives ranks: the schedule or, for one that measures ranks, the search after it."""
    inputs: dict[str, Step | tuple[Step, ...]] = {"layers": layers}
    if entry.schedule.probe is not None:
        assert calibrated is not None
        inputs["probes"] = probe_step(model, entry.schedule.probe, layers, calibrated)
    scheduled = Step(
        name="schedule",
        model=model.entry.name,
        recipe={
            "schedule": asdict(entry.schedule),
            "kept_fraction": None if isinstance(budget, Budget) else budget,
            "budget": byte_budget(model, entry.method, budget) if isinstance(budget, Budget) else None,
        },
        places={"architecture": model.architecture.to_dict()},
        inputs=inputs,
    )
    if entry.schedule.probe != "curves" or not calibrated or isinstance(budget, Budget):
        return scheduled
    return Step(
        name="search",
        model=model.entry.name,
        recipe={**probing(calibrated), "schedule": asdict(entry.schedule)},
        pins=running(model),
        loads=loading(model),
        inputs={"windows": calibrated.windows, "layers": layers, "ranks": scheduled},
        need=need_of(model),
    )


def byte_budget(model: ResolvedModel, method: Method, budget: Budget) -> dict[str, Any]:
    return {
        "memory_bytes": budget.memory_bytes,
        "tokens": budget.batch_size * budget.context_tokens,
        "element_bytes": model.entry.element_bytes,
        "method": method.to_dict(),
    }


def probing(calibrated: Calibrated) -> dict[str, Any]:
    return {"batch_size": calibrated.settings.batch_size, "num_windows": calibrated.settings.probe_windows}


def probe_step(model: ResolvedModel, kind: Probe, layers: tuple[Step, ...], calibrated: Calibrated) -> Step:
    """Fisher information is the model's own; the others belong to a method."""
    inputs: dict[str, Step | tuple[Step, ...]] = {"windows": calibrated.windows}
    if kind != "fisher":
        inputs["layers"] = layers
    return Step(
        name="probe",
        model=model.entry.name,
        recipe={**probing(calibrated), "kind": kind},
        pins=running(model),
        loads=loading(model),
        inputs=inputs,
        need=need_of(model),
    )


def variant_step(model: ResolvedModel, entry: VariantEntry, scheduled: Step, layers: tuple[Step, ...]) -> Step:
    inputs: dict[str, Step | tuple[Step, ...]] = {"ranks": scheduled, "layers": layers}
    if entry.method.training:
        inputs["trained"] = layers[0].inputs["trained"]
    return Step(
        name="variant",
        model=model.entry.name,
        recipe={
            "method": entry.method.to_dict(),
            "schedule": asdict(entry.schedule),
            "dtype": model.entry.dtype,
            "base": asdict(model.base),
        },
        places={"architecture": model.architecture.to_dict()},
        inputs=inputs,
    )


def errors_step(model: ResolvedModel, variant: Step, calibrated: Calibrated | None) -> Step:
    """What the projections lose; nothing else reads it, so that scores do not depend on what was calibrated."""
    shape = model.architecture
    floats = shape.kv_width * (shape.hidden_size + MOMENT_COPIES * shape.kv_width)
    return Step(
        name="errors",
        model=model.entry.name,
        recipe={},
        places={"model_dir": str(model.directory)},
        inputs={"variant": variant} | ({"calibrated": calibrated.shards} if calibrated else {}),
        need=Need(num_cpus=1, memory_bytes=8 * floats),
    )


def windows_steps(
    model: ResolvedModel, texts: Sequence[TextEntry], pinning: Evaluation | Calibration, store: Store
) -> tuple[Step, ...]:
    return tuple(
        Step(
            name="windows",
            model=model.entry.name,
            recipe={
                "document_marks": model.entry.document_marks,
                "window_tokens": pinning.window_tokens,
                "num_windows": pinning.num_windows,
                "seed": pinning.seed,
            },
            pins={
                "text": text_identity(text),
                "tokenizer": tokenizer_identity(model.directory, model.architecture.model_type),
            },
            places={
                "entry": text.model_dump(mode="json"),
                "model_dir": str(model.directory),
                "trust_remote_code": model.entry.trust_remote_code,
                "cache_dir": str(store.root / "datasets"),
            },
        )
        for text in texts
    )


def evaluate_step(zoo: Zoo, model: ResolvedModel, windows: tuple[Step, ...], variant: Step | None) -> Step:
    return Step(
        name="evaluate",
        model=model.entry.name,
        recipe={
            "batch_size": zoo.evaluation.batch_size,
            "text_names": [text.name for text in zoo.evaluation.texts],
        },
        pins=running(model),
        loads=loading(model),
        inputs={"windows": windows} if variant is None else {"windows": windows, "variant": variant},
        need=need_of(model),
        group=f"evaluate {model.entry.name}",
    )


def register_step(
    zoo: Zoo,
    model: ResolvedModel,
    label: str,
    inputs: tuple[Step, Step, Step, tuple[Step, ...]],
    tracking_uri: str,
    store: Store,
) -> Step:
    variant, baseline, evaluated, windows = inputs
    return Step(
        name="register",
        model=model.entry.name,
        recipe={
            "tracking_uri": tracking_uri,
            "experiment": zoo.registry.experiment or zoo.name,
            "model_name": model.entry.name,
            "label": label,
            "gates": zoo.gates.model_dump(mode="json"),
            "settings": {"dtype": model.entry.dtype, "batch_size": zoo.evaluation.batch_size},
            "text_names": [text.name for text in zoo.evaluation.texts],
        },
        places={
            "trust_remote_code": model.entry.trust_remote_code,
            "resources": model.entry.resources.model_dump(mode="json"),
            "artifact_root": artifact_root(tracking_uri, store),
        },
        inputs={"variant": variant, "baseline": baseline, "evaluation": evaluated, "windows": windows},
        need=None,
    )
