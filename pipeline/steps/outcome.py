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
    """

    key: str
    name: str
    model: str
    variant: str | None
    status: Status
    error: str | None = None
    cost: Cost | None = None
    damaged: str | None = None

    @classmethod
    def failed(cls, step: Step, error: str, damaged: str | None = None) -> "Outcome":
        return cls(step.key, step.name, step.model, step.label, "failed", error, damaged=damaged)

    @classmethod
    def skipped(cls, step: Step, broken: "Outcome") -> "Outcome":
        """For what happened to an input of the step."""
        return cls(step.key, step.name, step.model, step.label, "skipped", broken.error, damaged=broken.damaged)

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


def cached_outcomes(steps: Sequence[Step], store: Store) -> dict[str, Outcome]:
    """Outcomes by key of the steps whose artifacts are finished."""
    return {step.key: Outcome.done(step, store, "cached") for step in steps if store.is_done(step)}
