"""What came of a step, and how far a long one has come: all that a run tells of itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.steps.step import Step
from pipeline.storage.store import Cost, Store

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
        cost: Of its artifact, whichever run made it; None where there is none.
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
class Milestone:
    """How far a long step has come: `done` of `total` parts."""

    key: str
    label: str
    done: int
    total: int


class Listener:
    """Whoever wants to know how a run goes on, a screen say; a subclass has what it listens for do something."""

    def plan(self, steps: Sequence[Step]) -> None:
        """All steps, done or not, before any runs."""

    def record(self, outcome: Outcome) -> None:
        """What came of a step, as it comes; one for each."""

    def advance(self, reached: Milestone) -> None:
        """How far a long step has come."""

    def phase(self, what: str) -> None:
        """What begins now, takes a while and is no step, "starting Ray" say; it lasts until anything else is told."""

    def note(self, line: str) -> None:
        """What happened that its user should know of, an artifact that was damaged say."""
