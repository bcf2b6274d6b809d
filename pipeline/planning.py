"""What a zoo file would do, from configs alone: cache sizes, net memory, devices, steps that are done."""

from collections import Counter
from dataclasses import dataclass

from transformers import PreTrainedConfig

from lorc_core.caches.memory import bytes_per_token, full_floats_per_token
from lorc_core.errors import ArtifactError, ConfigError, LorcError
from lorc_core.model.architecture import Architecture, architecture_of
from pipeline.evaluation.device_map import Device, Held, device_plan
from pipeline.evaluation.losses import DTYPES
from pipeline.factor_bound import most_factor_floats
from pipeline.registry.tracking import default_tracking_uri
from pipeline.steps.failures import logged_failure
from pipeline.steps.graph import model_steps
from pipeline.steps.step import distinct
from pipeline.storage.store import Store
from pipeline.zoo.models import config_for_planning, resolve
from pipeline.zoo.schema import Zoo
from pipeline.zoo.sections import GIB, ModelEntry
from pipeline.zoo.variants import Budget, variant_label
from pipeline.zoo_run import wanted_steps


@dataclass(frozen=True)
class PlannedCache:
    """Bytes of a cache at the zoo file's serving load, and of factors, at most, that stay loaded beside the base model.

    Attributes:
        at_own_load: Of a variant with a budget in bytes: `cache_bytes` are those of cache and factors together, at the
            load that the budget names.
    """

    variant: str
    cache_bytes: int
    factor_bytes: int
    at_own_load: bool = False

    @property
    def net_bytes(self) -> int:
        return self.cache_bytes + self.factor_bytes


@dataclass(frozen=True)
class ModelPlan:
    """What would be done for one model; `error` instead if its config cannot be used.

    `refused` has the labels of variants that the model cannot have, with the reason.
    """

    name: str
    caches: tuple[PlannedCache, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    devices: str = ""
    steps: str = ""
    error: str | None = None


def plan_model(zoo: Zoo, entry: ModelEntry, store: Store, *, with_devices: bool = True) -> ModelPlan:
    """The plan for one model; reads its config, never its weights unless they are on disk to be hashed.

    Args:
        zoo: A checked zoo file.
        entry: The model's.
        store: Where its finished steps are.
        with_devices: Whether it is spread over the GPUs that the zoo file declares.
    """
    try:
        config = config_for_planning(entry)
        architecture = architecture_of(config)
        caches, refused = planned_caches(zoo, entry, architecture)
        steps, refused_here = planned_steps(zoo, entry, store)
        return ModelPlan(
            name=entry.name,
            caches=tuple(planned for planned in caches if planned.variant not in refused_here),
            refused=tuple((refused | refused_here).items()),
            devices=planned_devices(zoo, entry, config) if with_devices else "",
            steps=steps,
        )
    except Exception as error:  # noqa: BLE001  one model must not cost the others their plan
        return ModelPlan(entry.name, error=logged_failure(error, f"plan-{entry.name}", store))


def planned_caches(
    zoo: Zoo, entry: ModelEntry, architecture: Architecture
) -> tuple[list[PlannedCache], dict[str, str]]:
    """The baseline's cache and each variant's at the zoo file's load, and by label why the model cannot have others."""
    full_bytes = bytes_per_token(full_floats_per_token(architecture), entry.element_bytes)
    tokens = zoo.serving.batch_size * zoo.serving.context_tokens
    planned, refused = [PlannedCache("baseline", tokens * full_bytes, 0)], {}
    for variant in zoo.variants:
        for budget in variant.budgets:
            label = variant_label(variant, budget)
            try:
                variant.method.check(architecture)
                if isinstance(budget, Budget):
                    load = budget.batch_size * budget.context_tokens
                    most = min(budget.memory_bytes, load * full_bytes)
                    planned.append(PlannedCache(label, most, 0, at_own_load=True))
                else:
                    floats = most_factor_floats(variant.method, variant.schedule, architecture, budget)
                    cached = round(tokens * full_bytes * budget)
                    planned.append(PlannedCache(label, cached, floats * entry.element_bytes))
            except ConfigError as error:
                refused[label] = str(error)
    return planned, refused


def planned_devices(zoo: Zoo, entry: ModelEntry, config: PreTrainedConfig) -> str:
    """How the evaluated model would be spread over the GPUs that the zoo file declares, in GiB."""
    gpus = min(zoo.cluster.gpus, round(entry.resources.num_gpus)) if entry.resources.num_gpus else 0
    if not gpus or zoo.cluster.gpu_memory_gib is None:
        return "on the CPU"
    max_memory: dict[Device, int] = dict.fromkeys(range(gpus), int(zoo.cluster.gpu_memory_gib * GIB))
    batch_size, window_tokens = zoo.evaluation.batch_size, zoo.evaluation.window_tokens
    try:
        plan = device_plan(config, DTYPES[entry.dtype], max_memory, batch_size=batch_size, window_tokens=window_tokens)
    except ArtifactError as error:
        return f"does not fit: {error}"
    each = ", ".join(f"{gpu}: {gib_of(plan.held[gpu])}" for gpu in max_memory)
    left = sum(held.weight_bytes for device, held in plan.held.items() if device not in max_memory)
    told = f"weights + cache + activations per GPU in GiB, of {zoo.cluster.gpu_memory_gib:g} each: {each}"
    return told + (f"; weights of {left / GIB:.1f} do not fit" if left else "")


def gib_of(held: Held) -> str:
    return " + ".join(f"{size / GIB:.1f}" for size in (held.weight_bytes, held.cache_bytes, held.activation_bytes))


def planned_steps(zoo: Zoo, entry: ModelEntry, store: Store) -> tuple[str, dict[str, str]]:
    """How many of the model's steps are finished, if its files are here, and the variants that these refuse."""
    try:
        model = resolve(entry, store, fetch_missing=False)
    except LorcError as error:
        if entry.is_directory:
            raise
        return (f"not fetched yet ({error})" if entry.config is None else "not fetched yet"), {}
    planned = model_steps(zoo, model, default_tracking_uri(zoo, store.name))
    steps = distinct(wanted_steps([planned], "register"))
    finished = store.finished(steps)
    left = Counter(step.name for step in steps if step.key not in finished)
    todo = ", ".join(f"{count} {name}" for name, count in left.items())
    done = f"{len(steps) - left.total()} of {len(steps)} steps done"
    return done + (f"; to do: {todo}" if todo else ""), dict(planned.refused)
