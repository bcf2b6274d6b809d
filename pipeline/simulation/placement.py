"""Where a model would be evaluated: how it lies on the GPUs of a node, and what is left for the node's memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedConfig

from lorc_core.errors import ArtifactError, ConfigError
from pipeline.evaluation.device_map import Device, Held, device_plan
from pipeline.evaluation.losses import DTYPES
from pipeline.simulation.cluster import DeclaredCluster, NodeKind
from pipeline.simulation.planned import config_of
from pipeline.zoo.models import ResolvedModel
from pipeline.zoo.sections import GIB, Dtype, Evaluation, ModelEntry


@dataclass(frozen=True)
class Placement:
    """On one node.

    Attributes:
        kind: Of the node.
        gpu_bytes: Of weights, cache and activations on each GPU; empty on the CPU.
        offloaded_bytes: Of the weights in the node's memory, which come to the GPUs at each pass.
    """

    kind: NodeKind
    gpu_bytes: tuple[int, ...] = ()
    offloaded_bytes: int = 0

    @property
    def copy_s(self) -> float:
        """Seconds of each pass of the model for weights that do not fit the GPUs."""
        return self.offloaded_bytes / self.kind.gpu_copy_bytes_per_s


def placements(
    cluster: DeclaredCluster, model: ResolvedModel, config: PreTrainedConfig, evaluation: Evaluation
) -> dict[str, Placement]:
    """By the kind of node, where the model would lie; Ray may choose any that has the CPUs and GPUs.

    Args:
        cluster: That is declared.
        model: Of the zoo.
        config: Its own.
        evaluation: What it will score.

    Raises:
        ConfigError: No node has what the model asks for, or one that has it cannot hold the model.
    """
    kinds = list(kinds_with_room(cluster, model.entry))
    if not kinds:
        asked = model.entry.resources
        has = "; ".join(f"{kind.name}: {has_line(kind)}" for kind in cluster.nodes)
        raise ConfigError(
            f"asks for {asked.num_cpus:g} CPUs, {asked.num_gpus:g} GPUs and {asked.memory_gib:g} GiB; nodes have {has}"
        )
    return {kind.name: placed(kind, model, config, evaluation) for kind in kinds}


def kinds_with_room(cluster: DeclaredCluster, entry: ModelEntry) -> Iterator[NodeKind]:
    asked = entry.resources
    for kind in cluster.nodes:
        fits = asked.num_cpus <= kind.num_cpus and asked.num_gpus <= kind.num_gpus
        if fits and asked.memory_bytes <= kind.memory_bytes:
            yield kind


def has_line(kind: NodeKind) -> str:
    gpus = f"{kind.num_gpus} GPUs of {kind.gpu_memory_gib:g} GiB" if kind.num_gpus else "no GPU"
    return f"{kind.num_cpus:g} CPUs, {gpus}, {kind.memory_gib:g} GiB"


def placed(kind: NodeKind, model: ResolvedModel, config: PreTrainedConfig, evaluation: Evaluation) -> Placement:
    """How the model lies on a node of that kind."""
    weights = model.num_parameters * model.entry.element_bytes
    gpus = round(model.entry.resources.num_gpus)
    if not gpus:
        if weights > kind.memory_bytes:
            raise too_large(weights, f"the memory of a node {kind.name}, {kind.memory_gib:g} GiB")
        return Placement(kind)
    load = evaluation.batch_size, evaluation.window_tokens
    try:
        held = held_by_device(
            config.to_json_string(), model.entry.dtype, gpus, kind.gpu_memory_bytes, kind.memory_bytes, *load
        )
    except ArtifactError as error:
        raise ConfigError(f"on a node {kind.name}: {error}") from error
    if "disk" in held:
        room = f"{gpus} GPUs of {kind.gpu_memory_gib:g} GiB and {kind.memory_gib:g} GiB of memory of a node {kind.name}"
        raise too_large(weights, room)
    offloaded = held["cpu"].weight_bytes if "cpu" in held else 0
    return Placement(kind, tuple(held[gpu].total_bytes if gpu in held else 0 for gpu in range(gpus)), offloaded)


@lru_cache(maxsize=256)
def held_by_device(
    config: str, dtype: Dtype, gpus: int, gpu_bytes: int, memory_bytes: int, batch_size: int, window_tokens: int
) -> dict[Device, Held]:
    """What lies where; models of one shape lie alike.

    Args:
        config: As JSON.
        dtype: Of the weights.
        gpus: How many there are.
        gpu_bytes: Of each.
        memory_bytes: Of the node, for what the GPUs do not hold.
        batch_size: Windows that are scored at a time.
        window_tokens: Tokens of each.

    Raises:
        ArtifactError: As `device_plan` does.
    """
    memory: dict[Device, int] = {**dict.fromkeys(range(gpus), gpu_bytes), "cpu": memory_bytes}
    load = {"batch_size": batch_size, "window_tokens": window_tokens}
    return device_plan(config_of(config), DTYPES[dtype], memory, **load).held


def too_large(weights: int, room: str) -> ConfigError:
    return ConfigError(f"its weights take {weights / GIB:.1f} GiB, which {room} do not hold")
