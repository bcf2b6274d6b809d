"""How far a run is: models by stages, what runs now, what failed, and about how long the rest will take."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

# What people see of the kinds of steps, in their order.
STAGES: dict[str, tuple[str, ...]] = {
    "texts": ("windows",),
    "calibrate": ("calibrate",),
    "decompose": ("decompose", "train", "change_basis"),
    "ranks": ("probe", "schedule", "search"),
    "variants": ("variant", "projection_errors"),
    "evaluate": ("evaluate", "regress"),
    "register": ("register",),
}
STAGE_OF = {kind: stage for stage, kinds in STAGES.items() for kind in kinds}
StepStatus = Literal["waiting", "running", "ran", "cached", "failed", "skipped"]
DONE = ("ran", "cached")


@dataclass
class StepState:
    """One step, of a run that goes on.

    Attributes:
        model: The zoo's name of the model it belongs to.
        variant: Its label, or "baseline"; None of a step that variants share.
        kind: Of step.
        status: "skipped" where an input failed.
        began_at: Seconds since 1970; None unless it was begun.
        host: Where it runs or ran.
        wall_s: That it took.
        done: Parts done of a long step.
        total: Parts of a long step; 0 of others.
        error: One line.
    """

    model: str
    variant: str | None
    kind: str
    status: StepStatus = "waiting"
    began_at: float | None = None
    host: str | None = None
    wall_s: float | None = None
    done: int = 0
    total: int = 0
    error: str | None = None

    @property
    def stage(self) -> str | None:
        return STAGE_OF.get(self.kind)


@dataclass
class RunState:
    """A whole run.

    Attributes:
        zoo: Its name.
        started_at: Seconds since 1970, as are the other times.
        updated_at: When this was last true.
        ended_at: None while it goes on.
        phase: What goes on that is no step, and takes a while.
        notes: What its user should know of.
        steps: By key, in the order that they are wanted.
    """

    zoo: str
    started_at: float = field(default_factory=time.time)
    updated_at: float = 0.0
    ended_at: float | None = None
    phase: str | None = None
    notes: list[str] = field(default_factory=list)
    steps: dict[str, StepState] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(step.model for step in self.steps.values()))

    def of(self, model: str | None = None, *statuses: StepStatus) -> list[StepState]:
        """The steps of one model, or of all, in any of these statuses, or in any at all."""
        return [
            step
            for step in self.steps.values()
            if model in (None, step.model) and (not statuses or step.status in statuses)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the inverse is `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "RunState":
        known = {spec.name: told[spec.name] for spec in fields(cls)}
        return cls(**known | {"steps": {key: StepState(**step) for key, step in known["steps"].items()}})


def remaining_s(state: RunState, now: float) -> float | None:
    """About how long the rest of a run will take; None where nothing of its kind has ended yet.

    What is left takes what the same kind took for the same model, else for the others, and as many steps go on at a
    time as until now.
    """
    ran = [step for step in state.of(None, "ran") if step.wall_s is not None]
    left = state.of(None, "waiting", "running")
    estimates = [mean_wall_s(step, ran) for step in left]
    elapsed_s = now - min((step.began_at for step in ran if step.began_at is not None), default=now)
    if not left or elapsed_s <= 0 or None in estimates:
        return None
    gone_s = sum(now - step.began_at for step in left if step.began_at is not None)
    at_a_time = max(1.0, (sum(step.wall_s or 0.0 for step in ran) + gone_s) / elapsed_s)
    return max(0.0, sum(estimate or 0.0 for estimate in estimates) - gone_s) / at_a_time


def mean_wall_s(step: StepState, ran: Iterable[StepState]) -> float | None:
    """What steps of the same kind took, of the same model if any did."""
    alike = [other for other in ran if other.kind == step.kind]
    alike = [other for other in alike if other.model == step.model] or alike
    return sum(other.wall_s or 0.0 for other in alike) / len(alike) if alike else None
