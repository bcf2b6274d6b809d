"""A listener that knows how its run stands at any moment."""

import math
import os
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.status.estimate import Kind, seconds_left
from pipeline.status.status import STAGE_OF, STAGES, VERSION, Count, Failure, ModelStatus, Running, Status
from pipeline.steps.layers import DecomposeStep
from pipeline.steps.outcome import Listener, Milestone, Outcome, Started
from pipeline.steps.outcome import Status as OutcomeStatus
from pipeline.steps.step import Step

NOTES_KEPT = 5
State = Literal["waiting", "running", "done", "failed", "skipped"]
STATES: dict[OutcomeStatus, State] = {"ran": "done", "cached": "done", "failed": "failed", "skipped": "skipped"}


@dataclass(frozen=True)
class Known:
    """What was told of one step."""

    kind: Kind
    model: str
    variant: str | None
    state: State = "waiting"
    since: float = 0
    host: str = ""
    parts_done: int | None = None
    parts: int | None = None

    @property
    def stage(self) -> str:
        return STAGE_OF[self.kind[0]]


class Watch(Listener):
    """Keeps what is told by one thread; `status` may be asked for by any.

    Args:
        zoo: The name of what is run.
    """

    def __init__(self, zoo: str) -> None:
        self.lock = threading.Lock()
        self.zoo = zoo
        self.started = time.time()
        self.ended: float | None = None
        self.error: str | None = None
        self.waits_for: str | None = None
        self.notes: tuple[str, ...] = ()
        self.steps: dict[str, Known] = {}
        self.failures: list[Failure] = []
        self.took: dict[Kind, list[float]] = defaultdict(list)  # seconds, of steps that are done
        self.busy_s = 0.0  # of steps that ran in this run
        self.first_start: float | None = None
        self.changes = 0

    def plan(self, steps: Sequence[Step]) -> None:
        sizes = size_classes(steps)
        with self.lock:
            for step in steps:
                self.steps[step.key] = Known((step.name, sizes.get(step.model, 0)), step.model, step.label)
            self.changes += 1

    def start(self, started: Started) -> None:
        with self.lock:
            self.waits_for = None
            self.first_start = self.first_start or started.at
            self.change(started.key, state="running", since=started.at, host=started.host, parts_done=None, parts=None)

    def advance(self, reached: Milestone) -> None:
        with self.lock:
            self.change(reached.key, parts_done=reached.done, parts=reached.total)

    def postpone(self, outcome: Outcome) -> None:
        with self.lock:
            self.change(outcome.key, state="waiting")

    def record(self, outcome: Outcome) -> None:
        with self.lock:
            if outcome.key not in self.steps:  # it is no step
                self.steps[outcome.key] = Known((outcome.name, 0), outcome.model, outcome.variant)
            state = STATES[outcome.status]
            self.change(outcome.key, state=state)
            if outcome.status != "cached":
                self.waits_for = None
                self.busy_s += outcome.cost.wall_s if outcome.cost else 0
            if state == "done" and outcome.cost is not None:
                self.took[self.steps[outcome.key].kind].append(outcome.cost.wall_s)
            if outcome.status == "failed":
                host = outcome.cost.host if outcome.cost else None
                error = outcome.error or ""
                self.failures.append(Failure(outcome.key, outcome.name, outcome.model, outcome.variant, error, host))

    def phase(self, what: str) -> None:
        with self.lock:
            self.waits_for = what
            self.changes += 1

    def note(self, line: str) -> None:
        with self.lock:
            self.notes = (*self.notes, line)[-NOTES_KEPT:]
            self.changes += 1

    def end(self, error: str | None) -> None:
        """The run is over; with an error, if one line says why before its last step."""
        with self.lock:
            self.ended, self.error, self.waits_for = time.time(), error, None
            self.changes += 1

    def change(self, key: str, **changed: object) -> None:
        self.steps[key] = replace(self.steps[key], **changed)  # type: ignore[arg-type]
        self.changes += 1

    def status(self) -> Status:
        """As of now."""
        with self.lock:
            now = time.time()
            running = sorted((known for known in self.steps.values() if known.state == "running"), key=since)
            left_s = None if self.ended is not None else self.seconds_left(running, now)
            return Status(
                version=VERSION,
                zoo=self.zoo,
                host=socket.gethostname(),
                pid=os.getpid(),
                started=self.started,
                updated=now,
                ended=self.ended,
                error=self.error,
                ends_at=None if left_s is None else now + left_s,
                waits_for=self.waits_for,
                notes=self.notes,
                models=model_statuses(self.steps.values()),
                running=tuple(running_status(known) for known in running) if self.ended is None else (),
                failures=tuple(self.failures),
            )

    def seconds_left(self, running: Sequence[Known], now: float) -> float | None:
        if self.first_start is None:
            return None
        ages = [(known.kind, max(now - known.since, 0)) for known in running]
        busy_s = self.busy_s + sum(age for _, age in ages)
        waiting = Counter(known.kind for known in self.steps.values() if known.state == "waiting")
        return seconds_left(self.took, waiting, ages, busy_s / max(now - self.first_start, 1e-3))


def since(known: Known) -> float:
    return known.since


def size_classes(steps: Sequence[Step]) -> dict[str, int]:
    """By the model's name: sizes of one class differ by less than two times, or little more."""
    shapes = {step.model: step.architecture for step in steps if isinstance(step, DecomposeStep)}
    return {name: round(math.log2(shape.num_layers * shape.hidden_size**2)) for name, shape in shapes.items()}


def running_status(known: Known) -> Running:
    step = known.kind[0]
    return Running(step, known.model, known.variant, known.host, known.since, known.parts_done, known.parts)


def model_statuses(steps: Iterable[Known]) -> dict[str, ModelStatus]:
    """By the model's name, in the order in which they were told."""
    states: dict[str, dict[str, Counter[State]]] = {}
    variants: dict[str, dict[str, None]] = {}
    for known in steps:
        states.setdefault(known.model, {}).setdefault(known.stage, Counter())[known.state] += 1
        variants.setdefault(known.model, {}).update({known.variant: None} if known.variant else {})
    return {
        model: ModelStatus(
            tuple(variants[model]),
            {stage: count_of(of_model[stage]) for stage in STAGES if stage in of_model},
        )
        for model, of_model in states.items()
    }


def count_of(states: Counter[State]) -> Count:
    return Count(states.total(), states["done"], states["running"], states["failed"], states["skipped"])
