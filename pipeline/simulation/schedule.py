"""The runner's policy on simulated nodes, event by event: what starts when, where, and when all is done.

What is given to Ray, and in what order, is decided by the runner's own functions, in `pipeline/running/waiting.py`.
Steps without a need run in the driver, which meanwhile neither hears of what has ended nor hands out tasks. Tasks that
Ray was given wait for the first node with room.
"""

import heapq
import itertools
import math
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.costs.seconds import StepSeconds
from pipeline.running.waiting import Batch, Room, WaitingBatches, batches_of, next_on_ray
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


AT_ONCE, UNLIMITED = Pace(), Bandwidths(math.inf)


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


def simulate(
    steps: Sequence[Step],
    nodes: Sequence[Node],
    seconds_on: Callable[[Step, str | None], StepSeconds],
    *,
    remaining: Mapping[str, float],
    pace: Pace = AT_ONCE,
    bandwidths: Bandwidths = UNLIMITED,
    models_in_flight: float = math.inf,
) -> Schedule:
    """Run steps on nodes.

    Args:
        steps: Each once; their inputs are among them or done.
        nodes: Unused ones.
        seconds_on: What a step takes on a kind of node, or in the driver (None).
        remaining: By the key of each step, the longest way to the end, which decides the order; where it is empty, the
            order of the steps does.
        pace: What takes time beside steps.
        bandwidths: Of model files.
        models_in_flight: Models that may have begun and not ended at a time.

    Raises:
        ValueError: A step asks for more than any node has.
    """
    for step in steps:
        if step.need is not None and not any(node.has_room(step.need) for node in nodes):
            raise ValueError(f"no node can give what {step.key} asks for")
    room = Room(sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes), models_in_flight)
    return Simulation(steps, remaining, Machines(list(nodes), seconds_on, pace, bandwidths), room).run()


class Simulation:
    """The driver, with its own clock: it hands out, runs steps of its own, and listens, as the runner's `Work` does."""

    def __init__(self, steps: Sequence[Step], remaining: Mapping[str, float], machines: "Machines", room: Room) -> None:
        keys = {step.key for step in steps}
        done = {needed.key for step in steps for needed in step.input_steps()} - keys
        self.waiting = WaitingBatches(batches_of(steps), done, remaining)
        self.here = self.in_driver(self.waiting.ready)  # places of ready batches that run in the driver, in order
        self.machines, self.room = machines, room
        self.clock = machines.pace.start_s
        self.worker = Worker(is_new=False)
        self.running: dict[str, Batch] = {}  # by the key of the last step
        self.begun: set[str] = set()
        self.left = Counter(step.model for step in steps)
        self.in_flight: set[str] = set()

    def run(self) -> Schedule:
        """Until no step is left."""
        while self.waiting or self.running:
            chosen = next_on_ray(self.waiting, self.running.values(), self.begun, self.in_flight, self.room)
            for batch in self.waiting.take(chosen):
                self.running[batch.steps[-1].key] = batch
                self.in_flight.add(batch.model)
                self.machines.give(self.clock, batch)
            here = self.here[:1]
            del self.here[:1]
            for batch in self.waiting.take(here):
                self.run_here(batch)
            assert here or self.running or not self.waiting, "a step needs one that is neither done nor to be run"
            if self.running:
                self.listen(wait=not here)
        return Schedule(
            tuple(self.machines.intervals),
            tuple(self.machines.tasks),
            self.machines.read_bytes,
            self.clock + self.machines.pace.end_s,
        )

    def run_here(self, batch: Batch) -> None:
        """In the driver, which does nothing else meanwhile."""
        for step in batch.steps:
            parts, started = self.machines.seconds_on(step, None), self.clock
            self.clock += parts.work_s + parts.load_s + first_s(parts, step, self.worker)
            self.machines.intervals.append(Interval(step, None, started, self.clock))
            self.record(step)

    def listen(self, *, wait: bool) -> None:
        """Hear what has been told by now or, to wait, until something is."""
        if wait:
            self.clock = max(self.clock, self.machines.first_told())
        for told in self.machines.told_by(self.clock):
            if told.ended:
                self.running.pop(told.step.key, None)
                self.record(told.step)
            else:
                self.begun.add(told.step.key)

    def record(self, step: Step) -> None:
        """That a step has ended."""
        self.left[step.model] -= 1
        if not self.left[step.model]:
            self.in_flight.discard(step.model)
        for place in self.in_driver(self.waiting.end(step.key)):
            insort(self.here, place)

    def in_driver(self, places: Sequence[int]) -> list[int]:
        return [place for place in places if self.waiting.batches[place].need is None]


@dataclass(frozen=True)
class Told:
    """What a worker tells: that a step has begun, or ended."""

    time: float
    step: Step
    ended: bool


class Machines:
    """Nodes and the tasks given to them, which start on the first node with room, first come first."""

    def __init__(
        self,
        nodes: list[Node],
        seconds_on: Callable[[Step, str | None], StepSeconds],
        pace: Pace,
        bandwidths: Bandwidths,
    ) -> None:
        self.nodes, self.seconds_on, self.pace, self.bandwidths = nodes, seconds_on, pace, bandwidths
        self.events: list[tuple[float, int, Callable[[float], None]]] = []  # to come, the next first
        self.numbers = itertools.count()
        self.told: deque[Told] = deque()  # that the driver has not heard of
        self.queued: dict[Need, deque[tuple[int, Batch]]] = {}  # tasks without a node, by their number
        self.intervals: list[Interval] = []
        self.tasks: list[tuple[Need, float]] = []
        self.read_bytes = 0

    def at(self, time: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (time, next(self.numbers), happen))

    def happen(self) -> None:
        time, _, happen = heapq.heappop(self.events)
        happen(time)

    def give(self, now: float, batch: Batch) -> None:
        """Take a batch from the driver."""
        self.at(now, partial(self.enqueue, batch))

    def first_told(self) -> float:
        """When something is told that the driver has not heard of."""
        while not self.told:
            self.happen()
        return self.told[0].time

    def told_by(self, now: float) -> Iterator[Told]:
        """What is told until a time."""
        while self.events and self.events[0][0] <= now:
            self.happen()
        while self.told:
            yield self.told.popleft()

    def enqueue(self, batch: Batch, now: float) -> None:
        """A task starts on the first node with room, or waits."""
        assert batch.need is not None
        node = next((node for node in self.nodes if node.has_room(batch.need)), None)
        if node is None:
            self.queued.setdefault(batch.need, deque()).append((next(self.numbers), batch))
        else:
            self.start(now, batch, batch.need, node)

    def start(self, now: float, batch: Batch, need: Need, node: Node) -> None:
        """Run the steps of a task one after another; each is told when it begins and when it ends."""
        worker = node.take(need)
        parts = [self.seconds_on(step, node.kind) for step in batch.steps]
        time = now + self.pace.task_s + (self.pace.worker_s if worker.is_new else 0.0)
        worker.is_new = False
        reading_s = self.reading_s(time, node, {name: size for part in parts for name, size in part.reads.items()})
        for idx, (step, part) in enumerate(zip(batch.steps, parts, strict=True)):
            started = time
            time += part.work_s + first_s(part, step, worker) + (0.0 if idx else part.load_s + reading_s)
            self.intervals.append(Interval(step, node.name, started, time))
            self.at(started, partial(self.tell, step, False))
            self.at(time, partial(self.tell, step, True))
        self.tasks.append((need, time - now))
        self.at(time, partial(self.leave, need, node, worker))

    def tell(self, step: Step, ended: bool, now: float) -> None:
        self.told.append(Told(now, step, ended))

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
        """Give back what a task took, and start there what waits for it, first come first."""
        node.give_back(need, worker)
        while True:
            fitting = [asked for asked, tasks in self.queued.items() if tasks and node.has_room(asked)]
            if not fitting:
                return
            first = min(fitting, key=lambda asked: self.queued[asked][0][0])
            self.start(now, self.queued[first].popleft()[1], first, node)


def first_s(parts: StepSeconds, step: Step, worker: Worker) -> float:
    """The seconds of imports, once in a process."""
    if step.name in worker.kinds:
        return 0.0
    worker.kinds.add(step.name)
    return parts.first_s
