"""From a zoo file to its steps: what is decomposed, scheduled, written, evaluated and registered, from what."""

import importlib.metadata
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from lorc_core.errors import ConfigError
from pipeline.models import ResolvedModel
from pipeline.steps import Need, Step, Store
from pipeline.texts import text_identity, tokenizer_identity
from pipeline.zoo import VariantEntry, Zoo, variant_label

GIB = 1024**3
# Float64 weight, Gram matrix, eigenvectors and workspace of one layer, over the bytes of its float64 weight and
# of its square block; generous, since Ray only counts it.
DECOMPOSE_COPIES = 6


@dataclass(frozen=True)
class VariantSteps:
    """The steps of one variant of one model."""

    label: str
    schedule: Step
    variant: Step
    evaluate: Step
    register: Step


@dataclass(frozen=True)
class ModelSteps:
    """The steps of one model; every budget shares the decompositions."""

    model: ResolvedModel
    decompose: tuple[Step, ...]
    windows: tuple[Step, ...]
    baseline: Step
    variants: tuple[VariantSteps, ...]


def model_steps(zoo: Zoo, model: ResolvedModel, store: Store, tracking_uri: str) -> ModelSteps:
    """All steps for one model of a zoo.

    Raises:
        ConfigError: The evaluation windows are longer than the model's positions.
        ArtifactError: The model has no tokenizer.
    """
    if zoo.evaluation.window_tokens > model.max_tokens:
        raise ConfigError(
            f"evaluation.window_tokens is {zoo.evaluation.window_tokens}, the model takes at most {model.max_tokens}"
        )
    decompositions = {
        method: tuple(decompose_step(model, method, layer_idx) for layer_idx in range(model.architecture.num_layers))
        for method in dict.fromkeys(entry.method for entry in zoo.variants)
    }
    windows = windows_steps(zoo, model, store)
    baseline = evaluate_step(zoo, model, windows, None)
    variants = []
    for entry in zoo.variants:
        for kept_fraction in entry.kept_fraction:
            scheduled = schedule_step(model, entry, kept_fraction, decompositions[entry.method])
            written = variant_step(model, entry, scheduled, decompositions[entry.method])
            evaluated = evaluate_step(zoo, model, windows, written)
            label = variant_label(entry, kept_fraction)
            registered = register_step(zoo, model, label, (written, baseline, evaluated, windows), tracking_uri, store)
            variants.append(VariantSteps(label, scheduled, written, evaluated, registered))
    return ModelSteps(
        model, tuple(step for steps in decompositions.values() for step in steps), windows, baseline, tuple(variants)
    )


def decompose_step(model: ResolvedModel, method: str, layer_idx: int) -> Step:
    architecture = model.architecture
    floats = architecture.kv_width * (architecture.hidden_size + architecture.kv_width)
    return Step(
        name="decompose",
        model=model.entry.name,
        recipe={
            "model_fingerprint": model.base.fingerprint,
            "method": method,
            "layer_idx": layer_idx,
            "architecture": architecture.to_dict(),
        },
        places={"model_dir": str(model.directory)},
        need=Need(num_cpus=1, memory_bytes=DECOMPOSE_COPIES * 8 * floats),
    )


def schedule_step(model: ResolvedModel, entry: VariantEntry, kept_fraction: float, layers: tuple[Step, ...]) -> Step:
    return Step(
        name="schedule",
        model=model.entry.name,
        recipe={"schedule": asdict(entry.schedule), "kept_fraction": kept_fraction},
        inputs={"layers": layers},
    )


def variant_step(model: ResolvedModel, entry: VariantEntry, scheduled: Step, layers: tuple[Step, ...]) -> Step:
    return Step(
        name="variant",
        model=model.entry.name,
        recipe={
            "method": entry.method,
            "schedule": asdict(entry.schedule),
            "dtype": model.entry.dtype,
            "base": asdict(model.base),
            "architecture": model.architecture.to_dict(),
        },
        inputs={"ranks": scheduled, "layers": layers},
    )


def windows_steps(zoo: Zoo, model: ResolvedModel, store: Store) -> tuple[Step, ...]:
    evaluation = zoo.evaluation
    return tuple(
        Step(
            name="windows",
            model=model.entry.name,
            recipe={
                "text": text_identity(text),
                "tokenizer": tokenizer_identity(model.directory, model.architecture.model_type),
                "window_tokens": evaluation.window_tokens,
                "num_windows": evaluation.num_windows,
                "seed": evaluation.seed,
            },
            places={
                "entry": text.model_dump(mode="json"),
                "model_dir": str(model.directory),
                "trust_remote_code": model.entry.trust_remote_code,
                "cache_dir": str(store.root / "datasets"),
            },
        )
        for text in evaluation.texts
    )


def evaluate_step(zoo: Zoo, model: ResolvedModel, windows: tuple[Step, ...], variant: Step | None) -> Step:
    resources = model.entry.resources
    return Step(
        name="evaluate",
        model=model.entry.name,
        recipe={
            "model_fingerprint": model.base.fingerprint,
            "dtype": model.entry.dtype,
            "batch_size": zoo.evaluation.batch_size,
            "text_names": [text.name for text in zoo.evaluation.texts],
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
        places={"model_dir": str(model.directory), "trust_remote_code": model.entry.trust_remote_code},
        inputs={"windows": windows} if variant is None else {"windows": windows, "variant": variant},
        need=Need(resources.num_cpus, resources.num_gpus, resources.memory_bytes),
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


def default_tracking_uri(zoo: Zoo | None, workdir: Path) -> str:
    """The zoo file's MLflow, else $MLFLOW_TRACKING_URI, else a sqlite file in the work directory."""
    named = zoo.registry.tracking_uri if zoo is not None else None
    return named or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workdir / 'mlflow.db'}"


def artifact_root(tracking_uri: str, store: Store) -> str | None:
    """Artifacts of a sqlite store go into the work directory; a server has its own place."""
    return (store.root / "mlartifacts").as_uri() if tracking_uri.startswith("sqlite:") else None
