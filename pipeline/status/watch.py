"""A listener that knows how its run stands at any moment."""

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.costs.seconds import seconds_of
from pipeline.status.estimate import Left, Pace, seconds_left
from pipeline.status.status import STAGE_OF, STAGES, VERSION, Count, Failure, ModelStatus, Running, Status
from pipeline.steps.outcome import Listener, Milestone, Outcome, Started
from pipeline.steps.outcome import Status as OutcomeStatus
from pipeline.steps.step import Step

NOTES_KEPT = 5
State = Literal["waiting", "running", "done", "failed", "skipped"]
STATES: dict[OutcomeStatus, State] = {"ran": "done", "cached": "done", "failed": "failed", "skipped": "skipped"}


@dataclass(frozen=True)
class Known:
    """What was told of one step; `foreseen_s` of its shapes alone."""

    kind: str
    model: str
    variant: str | None
    foreseen_s: float = 0
    state: State = "waiting"
    since: float = 0
    host: str = ""
    parts_done: int | None = None
    parts: int | None = None

    @property
    def stage(self) -> str:
        return STAGE_OF[self.kind]


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
        self.paces: dict[str, Pace] = {}  # by kind, of steps that are done
        self.busy_s = 0.0  # of steps that ran in this run
        self.first_start: float | None = None
        self.changes = 0

    def plan(self, steps: Sequence[Step]) -> None:
        with self.lock:
            for step in steps:
                self.steps[step.key] = Known(step.name, step.model, step.label, seconds_of(step))
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
                self.steps[outcome.key] = Known(outcome.name, outcome.model, outcome.variant)
            state = STATES[outcome.status]
            self.change(outcome.key, state=state)
            if outcome.status != "cached":
                self.waits_for = None
                self.busy_s += outcome.cost.wall_s if outcome.cost else 0
            if state == "done" and outcome.cost is not None:
                known = self.steps[outcome.key]
                pace = Pace(known.foreseen_s, outcome.cost.wall_s)
                self.paces[known.kind] = self.paces.get(known.kind, Pace()) + pace
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
            left_s = None if self.ended is not None else self.seconds_left(now)
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

    def seconds_left(self, now: float) -> float | None:
        if self.first_start is None:
            return None
        left = [
            Left(known.kind, known.foreseen_s, max(now - known.since, 0) if known.state == "running" else 0)
            for known in self.steps.values()
            if known.state in ("waiting", "running")
        ]
        busy_s = self.busy_s + sum(step.age_s for step in left)
        return seconds_left(self.paces, left, busy_s / max(now - self.first_start, 1e-3))


def since(known: Known) -> float:
    return known.since


def running_status(known: Known) -> Running:
    return Running(known.kind, known.model, known.variant, known.host, known.since, known.parts_done, known.parts)


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
