"""What came of a step, and how far a long one has come: all that a run tells of itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.steps.step import Step
from pipeline.storage.store import Store

Status = Literal["ran", "cached", "failed", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """What came of one step.

    Attributes:
        key: Of the step, as its artifact is called.
        name: Of the kind of step.
        model: The zoo's name of the model it belongs to.
        variant: Its label; None of a step that variants share.
        status: "skipped" where an input failed.
        error: One line; of a skipped step, that of the input.
        elapsed_s: None of a step that did not run.
    """

    key: str
    name: str
    model: str
    variant: str | None
    status: Status
    error: str | None = None
    elapsed_s: float | None = None

    @classmethod
    def of(cls, step: Step, status: Status, error: str | None = None, elapsed_s: float | None = None) -> "Outcome":
        return cls(step.key, step.name, step.model, step.label, status, error, elapsed_s)


@dataclass(frozen=True)
class Milestone:
    """How far a long step has come: `done` of `total` parts."""

    key: str
    label: str
    done: int
    total: int


def cached_outcomes(steps: Sequence[Step], store: Store) -> dict[str, Outcome]:
    """Outcomes by key of the steps whose artifacts are finished."""
    return {step.key: Outcome.of(step, "cached", elapsed_s=0.0) for step in steps if store.is_done(step)}
