"""The runner's policy on simulated nodes, event by event: what starts when, where, and when all is done.

As `pipeline/running/runner.py`: steps of one group are a task, which starts when all of its inputs are done; steps
without a need run in the driver, which meanwhile neither hears of what has ended nor hands out tasks; tasks that are
handed out wait for the first node with room, those with the longest way to the end first.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.costs.seconds import StepSeconds
from pipeline.simulation.cluster import Bandwidths
from pipeline.simulation.nodes import Node, Worker
from pipeline.steps.step import Need, Step


@dataclass(frozen=True)
class Pace:
    """What takes time beside steps, in seconds; see `UnitCosts`."""

    start_s: float = 0.0
    end_s: float = 0.0
    worker_s: float = 0.0
    task_s: float = 0.0


@dataclass(frozen=True)
class Interval:
    """One step, done.

    Attributes:
        node: Where; None in the driver.
        started: Seconds from the beginning of the run.
    """

    step: Step
    node: str | None
    started: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.started


@dataclass(frozen=True)
class Schedule:
    """What ran when.

    Attributes:
        tasks: What each took, and for how many seconds, its worker's start included.
        read_bytes: Of model files.
    """

    intervals: tuple[Interval, ...]
    tasks: tuple[tuple[Need, float], ...]
    read_bytes: int
    wall_s: float

    @property
    def cpu_s(self) -> float:
        """CPUs times seconds that tasks held them."""
        return sum(need.num_cpus * seconds for need, seconds in self.tasks)

    @property
    def gpu_s(self) -> float:
        return sum(need.num_gpus * seconds for need, seconds in self.tasks)


@dataclass(frozen=True)
class Batch:
    """Steps that run in one task, and the place among those that wait: the least is begun first."""

    steps: tuple[Step, ...]
    priority: tuple[float, int]

    @property
    def need(self) -> Need | None:
        return self.steps[0].need

    @property
    def models(self) -> set[str]:
        return {step.model for step in self.steps}


def simulate(
    steps: Sequence[Step],
    nodes: Sequence[Node],
    seconds_on: Callable[[Step, str | None], StepSeconds],
    *,
    remaining: Mapping[str, float] | None = None,
    pace: Pace = Pace(),
    bandwidths: Bandwidths = Bandwidths(float("inf")),
    models_in_flight: int = 0,
) -> Schedule:
    """Run steps on nodes.

    Args:
        steps: Each once; their inputs are among them or done.
        nodes: Unused ones.
        seconds_on: What a step takes on a kind of node, or in the driver (None).
        remaining: By the key of each step, the longest way to the end, which decides the order; without it tasks are
            begun in the order of the steps.
        pace: What takes time beside steps.
        bandwidths: Of model files.
        models_in_flight: Models that may have begun and not ended at a time; 0 for any number.

    Raises:
        ValueError: A step asks for more than any node has.
    """
    batches = batches_of(steps, remaining)
    for batch in batches:
        if batch.need is not None and not any(node.has_room(batch.need) for node in nodes):
            raise ValueError(f"no node can give what {batch.steps[0].key} asks for")
    return Simulation(list(nodes), seconds_on, pace, bandwidths, models_in_flight, batches).run()


def batches_of(steps: Sequence[Step], remaining: Mapping[str, float] | None) -> list[Batch]:
    """Steps of the same group together, every other step alone."""
    groups: dict[str, list[Step]] = {}
    for step in steps:
        groups.setdefault(step.group, []).append(step)
    return [
        Batch(tuple(group), (-max(remaining[step.key] for step in group) if remaining else 0.0, place))
        for place, group in enumerate(groups.values())
    ]


class Simulation:
    """Two clocks: events of the cluster come in order of their time, the driver hears of them when it listens."""

    def __init__(
        self,
        nodes: list[Node],
        seconds_on: Callable[[Step, str | None], StepSeconds],
        pace: Pace,
        bandwidths: Bandwidths,
        models_in_flight: int,
        batches: Sequence[Batch],
    ) -> None:
        self.nodes, self.seconds_on, self.pace, self.bandwidths = nodes, seconds_on, pace, bandwidths
        self.models_in_flight = models_in_flight
        self.clock = pace.start_s  # the driver's
        self.driver = Worker(is_new=False)
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.numbers = itertools.count()
        self.told: deque[tuple[float, Step]] = deque()  # that the driver has not heard of
        self.queued: dict[Need, list[tuple[tuple[float, int], Batch]]] = {}  # heaps of tasks that wait for a node
        self.intervals: list[Interval] = []
        self.tasks: list[tuple[Need, float]] = []
        self.read_bytes = 0
        self.ready: list[Batch] = []
        self.in_flight: set[str] = set()
        self.steps_left: dict[str, int] = {}  # of each model
        self.inputs_left: dict[int, int] = {}  # of each batch, by its place
        self.readers: dict[str, list[Batch]] = {}  # of each step
        keys = {step.key for batch in batches for step in batch.steps}
        for batch in batches:
            for step in batch.steps:
                self.steps_left[step.model] = self.steps_left.get(step.model, 0) + 1
            own = {step.key for step in batch.steps}
            needed = {read.key for step in batch.steps for read in step.input_steps()} & keys - own
            self.inputs_left[batch.priority[1]] = len(needed)
            for key in needed:
                self.readers.setdefault(key, []).append(batch)
            if not needed:
                self.ready.append(batch)
        self.batches_left = len(batches)

    def run(self) -> Schedule:
        """As the runner does it: hand out all that is ready, else listen for one step's end."""
        while True:
            started = self.hand_out()
            if started:
                continue
            while not self.told and self.events:
                time, _, happen = heapq.heappop(self.events)
                happen(time)
            if not self.told:
                break
            time, step = self.told.popleft()
            self.clock = max(self.clock, time)
            self.done(step)
        assert not self.batches_left, "a step needs one that is neither done nor to be run"
        ended = max([self.clock, *(interval.ended for interval in self.intervals)])
        return Schedule(tuple(self.intervals), tuple(self.tasks), self.read_bytes, ended + self.pace.end_s)

    def hand_out(self) -> bool:
        """Begin what is ready and may begin, the most urgent first; whether there was any."""
        ready, self.ready = sorted(self.ready, key=lambda batch: batch.priority), []
        started = False
        for batch in ready:
            if self.models_in_flight and not batch.models <= self.in_flight:
                if len(self.in_flight | batch.models) > self.models_in_flight:
                    self.ready.append(batch)
                    continue
            self.in_flight |= batch.models
            self.batches_left -= 1
            started = True
            if batch.need is None:
                self.run_here(batch)
            else:
                self.at(self.clock, partial(self.enqueue, batch))
        return started

    def run_here(self, batch: Batch) -> None:
        """In the driver, which does nothing else meanwhile."""
        for step in batch.steps:
            parts, started = self.seconds_on(step, None), self.clock
            self.clock += parts.work_s + parts.load_s + self.first_s(parts, step, self.driver)
            self.intervals.append(Interval(step, None, started, self.clock))
            self.done(step)

    def done(self, step: Step) -> None:
        """What waited for the step alone is ready."""
        for batch in self.readers.get(step.key, ()):
            place = batch.priority[1]
            self.inputs_left[place] -= 1
            if not self.inputs_left[place]:
                self.ready.append(batch)
        self.steps_left[step.model] -= 1
        if not self.steps_left[step.model]:
            self.in_flight.discard(step.model)

    def at(self, time: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (time, next(self.numbers), happen))

    def enqueue(self, batch: Batch, now: float) -> None:
        """A task that was handed out starts on the first node with room, or waits."""
        assert batch.need is not None
        node = next((node for node in self.nodes if node.has_room(batch.need)), None)
        if node is None:
            heapq.heappush(self.queued.setdefault(batch.need, []), (batch.priority, batch))
        else:
            self.start(now, batch, batch.need, node)

    def start(self, now: float, batch: Batch, need: Need, node: Node) -> None:
        """Run the steps of a task one after another; each is told when it ends."""
        worker = node.take(need)
        parts = [self.seconds_on(step, node.kind) for step in batch.steps]
        time = now + self.pace.task_s + (self.pace.worker_s if worker.is_new else 0.0)
        worker.is_new = False
        reading_s = self.reading_s(time, node, {name: size for part in parts for name, size in part.reads.items()})
        for idx, (step, part) in enumerate(zip(batch.steps, parts, strict=True)):
            started = time
            time += part.work_s + self.first_s(part, step, worker) + (0.0 if idx else part.load_s + reading_s)
            self.intervals.append(Interval(step, node.name, started, time))
            self.at(time, partial(self.tell, step))
        self.tasks.append((need, time - now))
        self.at(time, partial(self.leave, need, node, worker))

    def tell(self, step: Step, now: float) -> None:
        """The driver will hear of it when it listens."""
        self.told.append((now, step))

    def first_s(self, parts: StepSeconds, step: Step, worker: Worker) -> float:
        """The seconds of imports, once in a process."""
        if step.name in worker.kinds:
            return 0.0
        worker.kinds.add(step.name)
        return parts.first_s

    def reading_s(self, now: float, node: Node, reads: Mapping[str, int]) -> float:
        """A task keeps the share of the bandwidths that it gets when it begins."""
        num_bytes = sum(reads.values())
        self.read_bytes += num_bytes
        if not num_bytes:
            return 0.0
        here = node.readers(now) + 1
        everywhere = 1 + sum(other.readers(now) for other in self.nodes)
        seconds = num_bytes / self.bandwidths.share(here, everywhere)
        node.reading_until.append(now + seconds)
        return seconds

    def leave(self, need: Need, node: Node, worker: Worker, now: float) -> None:
        """Give back what a task took, and start what waits for it, the most urgent first."""
        node.give_back(need, worker)
        while True:
            fitting = [need for need, heap in self.queued.items() if heap and node.has_room(need)]
            if not fitting:
                return
            chosen = min(fitting, key=lambda need: self.queued[need][0][0])
            _, batch = heapq.heappop(self.queued[chosen])
            self.start(now, batch, chosen, node)
