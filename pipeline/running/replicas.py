"""Evaluations spread over the GPUs that are free: which are, on how many, and what is told of them.

A replica is one of several loaded copies of a model, each on a GPU of its own, that score a share of the windows.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.steps.outcome import Milestone, Outcome, Started
from pipeline.steps.scores import EvaluateStep
from pipeline.steps.shares import EvaluateShareStep, joining, shared
from pipeline.steps.step import Step

Resources = Mapping[str, float]  # "CPU", "GPU", "memory" and others, as Ray names them


def can_spread(steps: Sequence[Step]) -> bool:
    """Whether they are evaluations of more than one batch, of a model that takes one whole GPU."""
    return all(
        type(step) is EvaluateStep and step.need is not None and step.need.num_gpus == 1 and step.num_batches > 1
        for step in steps
    )


def spread(groups: Sequence[Sequence[Step]], free_gpus: float, whole: Resources) -> list[Step]:
    """Steps with evaluations as shares where more GPUs are free than all groups ask for; first come, first served.

    Args:
        groups: Steps that run in one task each.
        free_gpus: That no task has, nor waits for.
        whole: What the cluster has, free or not. Nothing is spread over several kinds of GPUs: they round differently.

    Returns:
        The same steps, those that are spread replaced by their shares and what joins them.
    """
    spare = math.floor(free_gpus - sum(gpus_of(steps) for steps in groups))
    alike = sum(name.startswith("accelerator_type:") for name in whole) <= 1
    found: list[Step] = []
    for steps in groups:
        more = min(spare, most_replicas(steps, whole) - 1) if alike and can_spread(steps) else 0
        spare -= max(0, more)
        found += in_shares(steps, 1 + more) if more > 0 else steps
    return found


def gpus_of(steps: Sequence[Step]) -> float:
    """What the task of a group takes."""
    return 0 if steps[0].need is None else steps[0].need.num_gpus


def most_replicas(steps: Sequence[Step], whole: Resources) -> int:
    """How many can be at work at once on a cluster without other tasks, each with a batch at least."""
    need = steps[0].need
    assert need is not None
    asked = {"CPU": need.num_cpus, "memory": need.memory_bytes}
    places = [math.floor(whole.get(name, 0) / amount) for name, amount in asked.items() if amount]
    return min(*places, *(step.num_batches for step in steps if isinstance(step, EvaluateStep)))


def in_shares(steps: Sequence[Step], num_shares: int) -> list[Step]:
    """The shares of evaluations, and what joins those of each."""
    found: list[Step] = []
    for step in steps:
        assert isinstance(step, EvaluateStep)
        shares = shared(step, num_shares)
        found += [*shares, joining(step, shares)]
    return found


@dataclass
class Replicas:
    """Has shares told as what they are parts of: whoever listens knows whole evaluations alone."""

    shares: dict[str, EvaluateShareStep] = field(default_factory=dict)  # by their keys
    wholes: dict[str, EvaluateStep] = field(default_factory=dict)  # that have shares, by their keys, as all below
    started: set[str] = field(default_factory=set)
    ended: Counter[str] = field(default_factory=Counter)  # how many of its shares are done
    broken: dict[str, Outcome] = field(default_factory=dict)  # what came of the first share that was not

    def spread(self, groups: Sequence[Sequence[Step]], free_gpus: float, whole: Resources) -> list[Step]:
        """See `spread`."""
        steps = spread(groups, free_gpus, whole)
        self.shares |= {step.key: step for step in steps if isinstance(step, EvaluateShareStep)}
        self.wholes |= {share.whole.key: share.whole for share in self.shares.values()}
        return steps

    def told(self, told: Started | Milestone | Outcome) -> Started | Milestone | Outcome | None:
        """What there is to tell of the whole when this is told of a part, or of any step; None if nothing."""
        share, whole = self.shares.get(told.key), self.wholes.get(told.key)
        match told:
            case Started() if share is not None or whole is not None:
                key = told.key if share is None else share.whole.key
                news = key not in self.started
                self.started.add(key)
                return replace(told, key=key) if news else None
            case Outcome() if share is not None and told.error is not None:
                self.broken.setdefault(share.whole.key, told)
                return None
            case Outcome() if share is not None:
                self.ended[share.whole.key] += 1
                return Milestone(share.whole.key, self.ended[share.whole.key], share.num_shares)
            case Outcome() if whole is not None:
                cause = self.broken.get(told.key) if told.status == "skipped" else None
                return replace(cause or told, key=told.key, name=whole.name)
        return told
