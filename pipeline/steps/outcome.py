"""That a step began, how far a long one has come, and what came of it: all that a run tells of itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.steps.step import Step
from pipeline.storage.cost import Cost
from pipeline.storage.store import Store

Status = Literal["ran", "cached", "failed", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """What came of one step.

    Attributes:
        key: Of the step, as its artifact is called.
        name: Of the kind of step.
        model: The zoo's name of the model it belongs to.
        variant: Its label, or "baseline"; None of a step that variants share.
        status: "skipped" where an input failed.
        error: One line; of a skipped step, that of the input.
        cost: Of its artifact, whichever run made it, or of the attempt that failed; None where nothing was begun, or
            its worker was lost.
        damaged: The artifact that was not what its manifest says, where that is why the step failed or was skipped; it
            can be made again.
        obstacle: What was in the way, where that is why and it may pass by itself.
    """

    key: str
    name: str
    model: str
    variant: str | None
    status: Status
    error: str | None = None
    cost: Cost | None = None
    damaged: str | None = None
    obstacle: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether another attempt would come to the same."""
        return self.damaged is None and self.obstacle is None

    @classmethod
    def failed(cls, step: Step, error: str, damaged: str | None = None, obstacle: str | None = None) -> "Outcome":
        return cls(step.key, step.name, step.model, step.label, "failed", error, None, damaged, obstacle)

    @classmethod
    def skipped(cls, step: Step, broken: "Outcome") -> "Outcome":
        """For what happened to an input of the step."""
        trouble = broken.damaged, broken.obstacle
        return cls(step.key, step.name, step.model, step.label, "skipped", broken.error, None, *trouble)

    @classmethod
    def done(cls, step: Step, store: Store, status: Literal["ran", "cached"] = "ran") -> "Outcome":
        """Of a step whose artifact is in the store."""
        return cls(step.key, step.name, step.model, step.label, status, cost=store.cost(step))


@dataclass(frozen=True)
class Started:
    """That a step began: on which host, and when, in seconds since 1970."""

    key: str
    host: str
    at: float


@dataclass(frozen=True)
class Milestone:
    """How far a long step has come: `done` of `total` parts."""

    key: str
    done: int
    total: int


class Listener:
    """Whoever wants to know how a run goes on, a screen say; a subclass has what it listens for do something."""

    def plan(self, steps: Sequence[Step]) -> None:
        """All steps, done or not, before any runs."""

    def start(self, started: Started) -> None:
        """That a step began; again, where its worker was lost or something was in the way."""

    def record(self, outcome: Outcome) -> None:
        """What came of a step, as it comes; one for each, and another where it was damaged and made again."""

    def postpone(self, outcome: Outcome) -> None:
        """What came of a step that will be run again: something was in the way, or what it reads is damaged."""

    def advance(self, reached: Milestone) -> None:
        """How far a long step has come."""

    def phase(self, what: str) -> None:
        """What begins now, takes a while and is no step, "starting Ray" say; it lasts until anything else is told."""

    def note(self, line: str) -> None:
        """What happened that its user should know of, an artifact that was damaged say."""


class Listeners(Listener):
    """Several that listen as one."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners

    def plan(self, steps: Sequence[Step]) -> None:
        for listener in self.listeners:
            listener.plan(steps)

    def start(self, started: Started) -> None:
        for listener in self.listeners:
            listener.start(started)

    def record(self, outcome: Outcome) -> None:
        for listener in self.listeners:
            listener.record(outcome)

    def postpone(self, outcome: Outcome) -> None:
        for listener in self.listeners:
            listener.postpone(outcome)

    def advance(self, reached: Milestone) -> None:
        for listener in self.listeners:
            listener.advance(reached)

    def phase(self, what: str) -> None:
        for listener in self.listeners:
            listener.phase(what)

    def note(self, line: str) -> None:
        for listener in self.listeners:
            listener.note(line)
