"""What a zoo file would do, from configs alone: cache sizes, net memory, devices, steps that are done."""

from collections import Counter
from dataclasses import dataclass

from transformers import PreTrainedConfig

from lorc_core.caches.memory import bytes_per_token, full_floats_per_token, planned_factor_floats
from lorc_core.errors import ConfigError, LorcError
from lorc_core.model.architecture import Architecture, architecture_of
from lorc_core.model.kinds import KINDS
from lorc_core.ranks.schedules import Uniform
from lorc_core.ranks.spectra import KindSpectrum, LayerSpectrum
from pipeline.evaluation import DTYPES, device_plan
from pipeline.registry.tracking import default_tracking_uri
from pipeline.steps.failures import logged_failure
from pipeline.steps.graph import model_steps
from pipeline.steps.step import distinct
from pipeline.storage.store import Store
from pipeline.zoo.models import config_for_planning, resolve
from pipeline.zoo.schema import Zoo
from pipeline.zoo.sections import GIB, ModelEntry
from pipeline.zoo.variants import VariantEntry, variant_label
from pipeline.zoo_run import wanted_steps


@dataclass(frozen=True)
class PlannedCache:
    """Memory of one model's cache at the zoo file's serving load, in bytes; `factors` stay loaded beside the base.

    Of a variant with a budget in bytes, cache and factors together at its own load, at most.
    """

    variant: str
    cache_bytes: int
    factor_bytes: int

    @property
    def net_bytes(self) -> int:
        return self.cache_bytes + self.factor_bytes


@dataclass(frozen=True)
class ModelPlan:
    """What would be done for one model; `error` instead if its config cannot be used."""

    name: str
    caches: tuple[PlannedCache, ...] = ()
    devices: str = ""
    steps: str = ""
    error: str | None = None


def plan_model(zoo: Zoo, entry: ModelEntry, store: Store) -> ModelPlan:
    """The plan for one model; reads its config, never its weights unless they are on disk to be hashed."""
    try:
        config = config_for_planning(entry)
        architecture = architecture_of(config)
        return ModelPlan(
            name=entry.name,
            caches=planned_caches(zoo, entry, architecture),
            devices=planned_devices(zoo, entry, config),
            steps=done_steps(zoo, entry, store),
        )
    except Exception as error:  # noqa: BLE001  one model must not cost the others their plan
        return ModelPlan(entry.name, error=logged_failure(error, store.log(f"plan-{entry.name}")))


def planned_caches(zoo: Zoo, entry: ModelEntry, architecture: Architecture) -> tuple[PlannedCache, ...]:
    """The baseline's cache and each variant's, at the zoo file's batch size and context."""
    tokens = zoo.serving.batch_size * zoo.serving.context_tokens
    element_bytes = entry.element_bytes
    full = full_floats_per_token(architecture)
    planned = [PlannedCache("baseline", tokens * bytes_per_token(full, element_bytes), 0)]
    for variant in zoo.variants:
        for kept_fraction in variant.kept_fraction:
            try:
                floats = factor_estimate(variant, architecture, kept_fraction)
            except ConfigError:  # this model cannot have it; `done_steps` says so
                continue
            cached = round(tokens * bytes_per_token(full, element_bytes) * kept_fraction)
            planned.append(PlannedCache(variant_label(variant, kept_fraction), cached, floats * element_bytes))
        if variant.budget is not None:
            load = variant.budget.batch_size * variant.budget.context_tokens
            most = min(variant.budget.memory_bytes, load * bytes_per_token(full, element_bytes))
            planned.append(PlannedCache(f"{variant_label(variant, variant.budget)} (its load)", most, 0))
    return tuple(planned)


def factor_estimate(variant: VariantEntry, architecture: Architecture, kept_fraction: float) -> int:
    """Factor floats if every layer had the mean rank.

    Exact for the uniform schedule; for others it is the most they can be where all layers have the same blocks, since
    a factor's size is its rank times the block's width, ranks add up to the same, and layers left at full width need
    none.
    """
    method = variant.method
    method.check(architecture)
    schedule = variant.schedule if isinstance(variant.schedule, Uniform) else Uniform()
    spectra = [
        LayerSpectrum(*(KindSpectrum(method.axes(idx, kind).partition(architecture), 0.0) for kind in KINDS))
        for idx in range(architecture.num_layers)
    ]
    return planned_factor_floats(schedule.ranks(spectra, kept_fraction), method, architecture)


def planned_devices(zoo: Zoo, entry: ModelEntry, config: PreTrainedConfig) -> str:
    """How accelerate would spread the evaluated model over the GPUs that the zoo file declares, in GiB."""
    gpus = min(zoo.cluster.gpus, round(entry.resources.num_gpus)) if entry.resources.num_gpus else 0
    if not gpus or zoo.cluster.gpu_memory_gib is None:
        return "on the CPU"
    capacity = int(zoo.cluster.gpu_memory_gib * GIB)
    _, held = device_plan(config, DTYPES[entry.dtype], dict.fromkeys(range(gpus), capacity))
    sizes = ", ".join(f"{device}: {size / GIB:.1f}" for device, size in held.items())
    return f"weights per GPU in GiB, of {zoo.cluster.gpu_memory_gib:g} each: {sizes}"


def done_steps(zoo: Zoo, entry: ModelEntry, store: Store) -> str:
    """How many of the model's steps are finished, if its files are here."""
    try:
        model = resolve(entry, store, fetch_missing=False)
    except LorcError as error:
        if entry.is_directory:
            raise
        return f"not fetched yet ({error})" if entry.config is None else "not fetched yet"
    planned = model_steps(zoo, model, default_tracking_uri(zoo, store.root))
    steps = distinct(wanted_steps([planned], "register"))
    left = Counter(step.name for step in steps if not store.is_done(step))
    todo = ", ".join(f"{count} {name}" for name, count in left.items())
    refused = "".join(f"; refused: {label}: {reason}" for label, reason in planned.refused)
    done = f"{len(steps) - left.total()} of {len(steps)} steps done"
    return done + (f"; to do: {todo}" if todo else "") + refused
