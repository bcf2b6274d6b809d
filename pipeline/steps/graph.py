"""From a zoo file to its steps: what is decomposed, scheduled, written, evaluated and registered, from what."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lorc_core.errors import ConfigError
from lorc_core.methods import Method
from lorc_core.model.kinds import KeysValues
from lorc_core.ranks.schedules import Sensitivity
from lorc_core.ranks.spectra import Probe
from pipeline.steps.layers import ChangeBasisStep, DecomposeStep, LayerStep, TrainStep
from pipeline.steps.ranks import ByteBudget, ProbeStep, RanksStep, ScheduleStep, SearchStep
from pipeline.steps.scores import EvaluateStep, RegisterStep
from pipeline.steps.step import ModelLoad, ModelSize, Need
from pipeline.steps.texts import CalibrateStep, GradientsStep, WindowsStep
from pipeline.steps.variants import ProjectionErrorsStep, VariantStep
from pipeline.zoo.limits import check_variant, check_window
from pipeline.zoo.models import ResolvedModel
from pipeline.zoo.schema import Zoo
from pipeline.zoo.sections import Calibration, Evaluation, TextEntry
from pipeline.zoo.texts import Text, text_identity
from pipeline.zoo.variants import Budget, VariantEntry, variant_label

# Float64 weight, Gram matrix, eigenvectors and workspace of one layer, over the bytes of its float64 weight and
# of its square block; generous, since Ray only counts it.
DECOMPOSE_COPIES = 6
MOMENT_COPIES = 12  # float64 moments of one layer, their roots, factors and a shard more, over one square block


Shard = TypeVar("Shard", CalibrateStep, GradientsStep)


@dataclass(frozen=True)
class VariantSteps:
    """The steps of one variant of one model; `schedule` is the last that gives ranks."""

    label: str
    method: str
    schedule: RanksStep
    variant: VariantStep
    projection_errors: ProjectionErrorsStep
    evaluate: EvaluateStep
    register: RegisterStep


@dataclass(frozen=True)
class ModelSteps:
    """The steps of one model; every budget shares the decompositions.

    `decompose` has each method's, by its name. `refused` has the labels of variants that the model cannot have, with
    the reason.
    """

    model: ResolvedModel
    decompose: dict[str, tuple[LayerStep, ...]]
    windows: tuple[WindowsStep, ...]
    baseline: EvaluateStep
    variants: tuple[VariantSteps, ...]
    refused: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Calibrated:
    """The pinned calibration texts of one model and the steps that measure its moments on them, one per shard.

    Attributes:
        context_tokens: Of the windows that are evaluated, where those here are shorter; else None.
        gradients: Measure those of the loss's gradient, for the methods that read them.
    """

    settings: Calibration
    context_tokens: int | None
    windows: tuple[WindowsStep, ...]
    shards: tuple[CalibrateStep, ...]
    gradients: tuple[GradientsStep, ...]


def model_steps(zoo: Zoo, model: ResolvedModel, tracking_uri: str) -> ModelSteps:
    """All steps for one model of a zoo.

    Raises:
        ConfigError: The windows are longer than the model's positions.
        ArtifactError: The model has no tokenizer.
    """
    check_window("evaluation", zoo.evaluation.window_tokens, model)
    windows = windows_steps(model, zoo.evaluation.texts, zoo.evaluation)
    calibrated = calibrated_steps(zoo, model)
    baseline = evaluate_step(zoo, model, windows, "baseline", None)
    decompositions: dict[str, tuple[LayerStep, ...]] = {}
    variants, refused = [], []
    for entry in zoo.variants:
        for budget in entry.budgets:
            label = variant_label(entry, budget)
            try:
                check_variant(zoo, model, entry)
            except ConfigError as error:
                refused.append((label, str(error)))
                continue
            layers = decompose_steps(model, entry.method, calibrated)
            decompositions.setdefault(entry.method.name, layers)
            ranks = ranks_step(model, entry, budget, layers, calibrated)
            variant = variant_step(model, entry, label, ranks, layers)
            lost = projection_errors_step(model, variant, calibrated)
            evaluation = evaluate_step(zoo, model, windows, label, variant)
            registration = register_step(zoo, model, variant, baseline, evaluation, tracking_uri)
            variants.append(VariantSteps(label, entry.method.name, ranks, variant, lost, evaluation, registration))
    return ModelSteps(model, decompositions, windows, baseline, tuple(variants), tuple(refused))


def calibrated_steps(zoo: Zoo, model: ResolvedModel) -> Calibrated | None:
    """Calibration is shared by every method and budget of a model."""
    settings = zoo.calibration
    if settings is None or settings.window_tokens > model.architecture.max_tokens:  # `check_variant` refuses those
        return None
    windows = windows_steps(model, settings.texts, settings)
    joins = any(entry.method.joins_rotated_heads for entry in zoo.variants)
    evaluated = zoo.evaluation.window_tokens
    return Calibrated(
        settings,
        evaluated if evaluated > settings.window_tokens else None,
        windows,
        shard_steps(CalibrateStep, model, settings, windows, join_rotated_heads=joins),
        shard_steps(GradientsStep, model, settings, windows, join_rotated_heads=joins),
    )


def shard_steps(
    kind: type[Shard],
    model: ResolvedModel,
    settings: Calibration,
    windows: tuple[WindowsStep, ...],
    *,
    join_rotated_heads: bool,
) -> tuple[Shard, ...]:
    return tuple(
        kind(
            model=model.entry.name,
            need=need_of(model),
            loads=loading(model),
            batch_size=settings.batch_size,
            shard=shard,
            num_shards=settings.shards,
            join_rotated_heads=join_rotated_heads,
            windows=windows,
        )
        for shard in range(settings.shards)
    )


def loading(model: ResolvedModel) -> ModelLoad:
    size = ModelSize(model.architecture, model.num_parameters)
    return ModelLoad(model.location, model.entry.dtype, model.entry.trust_remote_code, model.content, size=size)


def need_of(model: ResolvedModel) -> Need:
    """Of a step that runs the whole model."""
    resources = model.entry.resources
    return Need(resources.num_cpus, resources.num_gpus, resources.memory_bytes)


def decompose_steps(model: ResolvedModel, method: Method, calibrated: Calibrated | None) -> tuple[LayerStep, ...]:
    """Each layer's last decomposition: the method's own or, with training, that one rotated."""
    starts = tuple(
        decompose_step(model, method.at(layer_idx), layer_idx, calibrated)
        for layer_idx in range(model.architecture.num_layers)
    )
    if method.training is None:
        return starts
    assert calibrated is not None
    trained = TrainStep(
        model=model.entry.name,
        need=need_of(model),
        loads=loading(model),
        training=method.training,
        windows=calibrated.windows,
        layers=starts,
    )
    return tuple(
        ChangeBasisStep(
            model=model.entry.name,
            layer_idx=layer_idx,
            readers=KeysValues(method.axes(layer_idx, "keys").reader, method.axes(layer_idx, "values").reader),
            layer=start,
            trained=trained,
        )
        for layer_idx, start in enumerate(starts)
    )


def decompose_step(
    model: ResolvedModel, method: Method, layer_idx: int, calibrated: Calibrated | None
) -> DecomposeStep:
    architecture = model.architecture
    floats = architecture.kv_width * (architecture.hidden_size + architecture.kv_width)
    of_kinds = KeysValues(method.keys, method.values)
    measures = any(axes.statistics == "calibration" for axes in of_kinds)
    reads_gradients = any(axes.reader == "gradient" for axes in of_kinds)
    floats += MOMENT_COPIES * architecture.kv_width**2 if measures else 0
    return DecomposeStep(
        model=model.entry.name,
        need=Need(num_cpus=1, memory_bytes=DECOMPOSE_COPIES * 8 * floats),
        axes=of_kinds,
        layer_idx=layer_idx,
        context_tokens=calibrated.context_tokens if calibrated and method.keys.measures_rotated else None,
        content=model.content,
        location=model.location,
        architecture=architecture,
        calibrated=calibrated.shards if calibrated and measures else (),
        gradients=calibrated.gradients if calibrated and reads_gradients else (),
    )


def ranks_step(
    model: ResolvedModel,
    entry: VariantEntry,
    budget: float | Budget,
    layers: tuple[LayerStep, ...],
    calibrated: Calibrated | None,
) -> RanksStep:
    """The last step that gives ranks: the schedule or, for one that measures ranks, the search after it."""
    label, schedule, probes = variant_label(entry, budget), entry.schedule, None
    if schedule.probe is not None:
        assert calibrated is not None
        probes = probe_step(model, schedule.probe, layers, calibrated)
    scheduled = ScheduleStep(
        model=model.entry.name,
        label=label,
        schedule=schedule,
        kept_fraction=None if isinstance(budget, Budget) else budget,
        budget=byte_budget(model, entry.method, budget) if isinstance(budget, Budget) else None,
        architecture=model.architecture,
        layers=layers,
        probes=probes,
    )
    if not isinstance(schedule, Sensitivity) or calibrated is None or isinstance(budget, Budget):
        return scheduled
    return SearchStep(
        model=model.entry.name,
        label=label,
        need=need_of(model),
        loads=loading(model),
        batch_size=calibrated.settings.batch_size,
        num_windows=calibrated.settings.probe_windows,
        schedule=schedule,
        windows=calibrated.windows,
        layers=layers,
        ranks=scheduled,
    )


def byte_budget(model: ResolvedModel, method: Method, budget: Budget) -> ByteBudget:
    tokens = budget.batch_size * budget.context_tokens
    return ByteBudget(budget.memory_bytes, tokens, model.entry.element_bytes, method)


def probe_step(model: ResolvedModel, kind: Probe, layers: tuple[LayerStep, ...], calibrated: Calibrated) -> ProbeStep:
    return ProbeStep(
        model=model.entry.name,
        need=need_of(model),
        loads=loading(model),
        kind=kind,
        batch_size=calibrated.settings.batch_size,
        num_windows=calibrated.settings.probe_windows,
        windows=calibrated.windows,
        layers=() if kind == "fisher" else layers,  # Fisher information is the model's own, not a method's
    )


def variant_step(
    model: ResolvedModel, entry: VariantEntry, label: str, ranks: RanksStep, layers: tuple[LayerStep, ...]
) -> VariantStep:
    first = layers[0]
    return VariantStep(
        model=model.entry.name,
        label=label,
        method=entry.method,
        schedule=entry.schedule,
        dtype=model.entry.dtype,
        source=model.entry.source,
        commit=model.location.commit,
        content=model.content,
        outline=model.outline,
        architecture=model.architecture,
        ranks=ranks,
        layers=layers,
        trained=first.trained if isinstance(first, ChangeBasisStep) else None,
    )


def projection_errors_step(
    model: ResolvedModel, variant: VariantStep, calibrated: Calibrated | None
) -> ProjectionErrorsStep:
    shape = model.architecture
    floats = shape.kv_width * (shape.hidden_size + MOMENT_COPIES * shape.kv_width)
    return ProjectionErrorsStep(
        model=model.entry.name,
        label=variant.label,
        need=Need(num_cpus=1, memory_bytes=8 * floats),
        location=model.location,
        variant=variant,
        calibrated=calibrated.shards if calibrated else (),
    )


def windows_steps(
    model: ResolvedModel, texts: Sequence[TextEntry], pinning: Evaluation | Calibration
) -> tuple[WindowsStep, ...]:
    sources = [Text(**entry.model_dump()) for entry in texts]
    return tuple(
        WindowsStep(
            model=model.entry.name,
            document_marks=model.entry.document_marks,
            window_tokens=pinning.window_tokens,
            num_windows=pinning.num_windows,
            seed=pinning.seed,
            text=text_identity(source),
            tokenizer=model.tokenizer,
            source=source,
            location=model.location,
            trust_remote_code=model.entry.trust_remote_code,
        )
        for source in sources
    )


def evaluate_step(
    zoo: Zoo, model: ResolvedModel, windows: tuple[WindowsStep, ...], label: str, variant: VariantStep | None
) -> EvaluateStep:
    return EvaluateStep(
        model=model.entry.name,
        label=label,
        need=need_of(model),
        loads=loading(model),
        batch_size=zoo.evaluation.batch_size,
        text_names=tuple(text.name for text in zoo.evaluation.texts),
        windows=windows,
        variant=variant,
    )


def register_step(
    zoo: Zoo,
    model: ResolvedModel,
    variant: VariantStep,
    baseline: EvaluateStep,
    evaluation: EvaluateStep,
    tracking_uri: str,
) -> RegisterStep:
    assert evaluation.label is not None
    return RegisterStep(
        model=model.entry.name,
        tracking_uri=tracking_uri,
        experiment=zoo.registry.experiment or zoo.name,
        model_name=model.entry.name,
        label=evaluation.label,
        gates=zoo.gates.model_dump(mode="json") if zoo.gates else None,
        settings={"dtype": model.entry.dtype, "batch_size": zoo.evaluation.batch_size},
        text_names=evaluation.text_names,
        trust_remote_code=model.entry.trust_remote_code,
        resources=model.entry.resources.model_dump(mode="json"),
        variant=variant,
        baseline=baseline,
        evaluation=evaluation,
        windows=evaluation.windows,
    )
