"""When a run will end: what its steps that are left were foreseen to take, at the pace of those that ended."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Steps that ended: what they were foreseen to take, and took, in seconds."""

    foreseen_s: float = 0.0
    took_s: float = 0.0

    def __add__(self, other: "Pace") -> "Pace":
        return Pace(self.foreseen_s + other.foreseen_s, self.took_s + other.took_s)

    @property
    def ratio(self) -> float | None:
        """Of what is foreseen, how much it takes; None where nothing tells."""
        return self.took_s / self.foreseen_s if self.foreseen_s else None


@dataclass(frozen=True)
class Left:
    """A step that has not ended: its kind, what it was foreseen to take and, where it runs, for how long it has."""

    kind: str
    foreseen_s: float
    age_s: float = 0.0


def seconds_left(ended: Mapping[str, Pace], left: Iterable[Left], parallelism: float) -> float | None:
    """About how long it takes until all steps are done.

    Args:
        ended: By kind of step.
        left: Steps that have not ended. Of a kind of which none has ended they go at the pace of all that ended.
        parallelism: How many steps ran at a time so far, in the mean.

    Returns:
        Seconds; None while nothing tells how fast it goes.
    """
    overall = sum(ended.values(), Pace()).ratio
    if overall is None or parallelism <= 0:
        return None
    ratios = {kind: pace.ratio for kind, pace in ended.items()}
    work = sum(max(step.foreseen_s * (ratios.get(step.kind) or overall) - step.age_s, 0) for step in left)
    return work / parallelism
