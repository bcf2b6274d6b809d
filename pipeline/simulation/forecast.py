"""What a zoo would take on a declared cluster, from nothing done to everything registered."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from lorc_core.errors import ConfigError, LorcError
from pipeline.costs.order import remaining_seconds
from pipeline.costs.seconds import StepSeconds, seconds_parts
from pipeline.simulation.cluster import DeclaredCluster
from pipeline.simulation.nodes import Node
from pipeline.simulation.placement import Placement, placements
from pipeline.simulation.planned import planned_model
from pipeline.simulation.schedule import Pace, Schedule, simulate
from pipeline.steps.graph import ModelSteps, model_steps
from pipeline.steps.step import ModelStep, Step, distinct
from pipeline.zoo.models import config_for_planning
from pipeline.zoo.schema import Zoo
from pipeline.zoo.sections import ModelEntry
from pipeline.zoo_run import wanted_steps


@dataclass(frozen=True)
class ModelForecast:
    """Of one model.

    Attributes:
        decompose_s: Seconds of one CPU that its decompositions take.
        gpu_s: GPUs times seconds of all steps that run it.
        started: Seconds from the beginning of the run.
    """

    entry: ModelEntry
    placement: Placement
    decompose_s: float
    gpu_s: float
    read_bytes: int
    started: float
    ended: float


@dataclass(frozen=True)
class Forecast:
    """Of a whole zoo.

    Attributes:
        refused: By the name of a model, why it cannot be run there.
        critical_s: Of the longest chain of steps: no cluster is faster with these unit costs.
        num_cpus: Of all nodes.
    """

    models: tuple[ModelForecast, ...]
    refused: dict[str, str]
    schedule: Schedule
    critical_s: float
    num_cpus: float
    num_gpus: float


class Costs:
    """Seconds of a zoo's steps on the kinds of nodes of a cluster, each counted once."""

    def __init__(self, cluster: DeclaredCluster, places: Mapping[str, Mapping[str, Placement]]) -> None:
        self.units = {kind.name: cluster.units_of(kind) for kind in cluster.nodes}
        self.cluster, self.places = cluster, places
        self.known: dict[tuple[str, str | None], StepSeconds] = {}

    def on(self, step: Step, kind: str | None) -> StepSeconds:
        """Of a step on a kind of node, or in the driver."""
        place = (step.key, kind if isinstance(step, ModelStep) else None)  # the rest runs on CPUs, which are alike
        if place not in self.known:
            of_model = self.places[step.model].get(kind or "")
            units = self.units[kind] if kind else self.cluster.units
            self.known[place] = seconds_parts(step, units, of_model.copy_s if of_model else 0.0)
        return self.known[place]

    def alone(self, step: Step) -> float:
        """Where its model can lie, in a process that has begun, with all bandwidths to itself."""
        parts = self.on(step, next(iter(self.places[step.model])))
        return parts.load_s + parts.work_s + parts.read_bytes / self.cluster.bandwidths.share(1, 1)


def forecast(zoo: Zoo, cluster: DeclaredCluster) -> Forecast:
    """Simulate the run of a zoo file; of its models nothing but the configs is read.

    Args:
        zoo: A checked zoo file.
        cluster: That is declared.

    Raises:
        ConfigError: There is no rate for the GPUs that a model asks for, or no model can be run.
    """
    planned: list[ModelSteps] = []
    places: dict[str, dict[str, Placement]] = {}
    refused: dict[str, str] = {}
    for entry in zoo.models:
        try:
            config = config_for_planning(entry)
            model = planned_model(entry, config)
            places[entry.name] = placements(cluster, model, config, zoo.evaluation)
            planned.append(model_steps(zoo, model, tracking_uri=""))
        except LorcError as error:
            refused[entry.name] = str(error)
            continue
        check_rates(cluster, entry, places[entry.name])
    if not planned:
        raise ConfigError("no model can be run: " + "; ".join(f"{name}: {why}" for name, why in refused.items()))
    costs = Costs(cluster, places)
    steps = distinct(wanted_steps(planned, "register"))
    remaining = remaining_seconds(steps, costs.alone)
    units = cluster.units
    schedule = simulate(
        steps,
        nodes_of(cluster),
        costs.on,
        remaining=remaining,
        pace=Pace(units.start_s, units.end_s, units.worker_s, units.task_s),
        bandwidths=cluster.bandwidths,
        models_in_flight=zoo.cluster.models_in_flight,
    )
    return Forecast(
        models=tuple(model_forecast(steps.model.entry, places, schedule, costs) for steps in planned),
        refused=refused,
        schedule=schedule,
        critical_s=max(remaining.values()),
        num_cpus=sum(kind.count * kind.num_cpus for kind in cluster.nodes),
        num_gpus=sum(kind.count * kind.num_gpus for kind in cluster.nodes),
    )


def check_rates(cluster: DeclaredCluster, entry: ModelEntry, places: Mapping[str, Placement]) -> None:
    """Raise ConfigError where a model would run on GPUs of which no one said how fast they are."""
    for placement in places.values():
        if entry.resources.num_gpus and entry.dtype not in cluster.units_of(placement.kind).gpu_flops_per_s:
            raise ConfigError(
                f"nodes {placement.kind.name}: no gpu_flops_per_s for {entry.dtype}, which {entry.name} is run in; "
                "give it there, or take units that `lorc bench units` measured on such a GPU"
            )


def nodes_of(cluster: DeclaredCluster) -> list[Node]:
    return [
        Node(f"{kind.name}-{number}", kind.name, kind.num_cpus, kind.num_gpus, kind.memory_bytes)
        for kind in cluster.nodes
        for number in range(kind.count)
    ]


def model_forecast(
    entry: ModelEntry, places: Mapping[str, Mapping[str, Placement]], schedule: Schedule, costs: Costs
) -> ModelForecast:
    """What of the schedule is this model's."""
    own = [interval for interval in schedule.intervals if interval.step.model == entry.name]
    assert own, "a model has an evaluation at least"
    kinds = places[entry.name]
    reads: dict[str, int] = {}
    for interval in own:
        parts = costs.on(interval.step, next(iter(kinds)) if interval.step.need else None)
        task = interval.step.group
        reads |= {f"{task} {name}": size for name, size in parts.reads.items()}
    return ModelForecast(
        entry=entry,
        placement=next(iter(kinds.values())),
        decompose_s=sum(interval.seconds for interval in own if interval.step.name == "decompose"),
        gpu_s=sum(interval.seconds * interval.step.need.num_gpus for interval in own if interval.step.need),
        read_bytes=sum(reads.values()),
        started=min(interval.started for interval in own),
        ended=max(interval.ended for interval in own),
    )


def busy_shares(forecast: Forecast) -> tuple[float, float | None]:
    """Of the CPUs' and the GPUs' time, how much tasks hold; None without GPUs."""
    wall_s = forecast.schedule.wall_s
    gpus = forecast.schedule.gpu_s / (forecast.num_gpus * wall_s) if forecast.num_gpus else None
    return forecast.schedule.cpu_s / (forecast.num_cpus * wall_s), gpus


def step_seconds(schedule: Schedule) -> dict[str, float]:
    """By kind of step, seconds of all of them."""
    total: defaultdict[str, float] = defaultdict(float)
    for interval in schedule.intervals:
        total[interval.step.name] += interval.seconds
    return dict(total)
