"""Steps that wait: which are ready, and in what order they are to run."""

from bisect import insort
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge

from pipeline.steps.step import Need, Step


@dataclass(frozen=True)
class Batch:
    """Steps of one group, which run in one task."""

    steps: tuple[Step, ...]

    @property
    def need(self) -> Need | None:
        return self.steps[0].need

    @property
    def model(self) -> str:
        return self.steps[0].model


def batches_of(steps: Sequence[Step]) -> list[Batch]:
    """Steps of the same group together, every other step alone, in their first steps' order."""
    groups: dict[str, list[Step]] = {}
    for step in steps:
        groups.setdefault(step.group, []).append(step)
    return [Batch(tuple(group)) for group in groups.values()]


class WaitingBatches:
    """Batches until they run, those that are ready in the order in which they are to.

    A night is as long as its longest chain of steps, so the batch with the longest chain behind it comes first.

    Args:
        batches: In the order in which they run where nothing else decides.
        known: Keys of the steps that need not run.
        remaining_s: By a step's key, about how long it and the longest chain behind it take.
    """

    def __init__(self, batches: Sequence[Batch], known: Collection[str], remaining_s: Mapping[str, float]) -> None:
        def longest_first(batch: Batch) -> float:
            return -max(remaining_s.get(step.key, 0.0) for step in batch.steps)

        self.batches: dict[int, Batch] = {}  # by their place in the order
        self.num_places = 0
        self.missing: dict[int, set[str]] = {}  # by place, inputs that have no outcome yet
        self.readers: dict[str, list[int]] = {}  # of an input that has none
        self.ready: list[int] = []
        self.ready_of: dict[str, list[int]] = defaultdict(list)  # the same, by model
        for batch in sorted(batches, key=longest_first):
            self.add(batch, known)

    def add(self, batch: Batch, known: Collection[str]) -> None:
        """One more, after all others."""
        place, self.num_places = self.num_places, self.num_places + 1
        self.batches[place] = batch
        missing = {needed.key for step in batch.steps for needed in step.input_steps() if needed.key not in known}
        if missing:
            self.missing[place] = missing
        else:
            self.ready.append(place)
            self.ready_of[batch.model].append(place)
        for key in missing:
            self.readers.setdefault(key, []).append(place)

    def __len__(self) -> int:
        return len(self.batches)

    def end(self, key: str) -> list[int]:
        """A step has an outcome; returns the places of batches that waited for it alone, and are ready now."""
        found = []
        for place in self.readers.pop(key, ()):
            if place in self.missing:
                self.missing[place].discard(key)
                if not self.missing[place]:
                    del self.missing[place]
                    insort(self.ready, place)
                    insort(self.ready_of[self.batches[place].model], place)
                    found.append(place)
        return found

    def keep(self, place: int, steps: Sequence[Step]) -> None:
        """Leave these steps alone of a batch that is ready."""
        if steps:
            self.batches[place] = Batch(tuple(steps))
        else:
            self.take([place])

    def take(self, places: Sequence[int]) -> list[Batch]:
        """Batches that wait no longer."""
        if gone := set(places):
            self.ready = [place for place in self.ready if place not in gone]
            for model in {self.batches[place].model for place in gone}:
                self.ready_of[model] = [place for place in self.ready_of[model] if place not in gone]
        for place in places:
            self.missing.pop(place, None)
        return [self.batches.pop(place) for place in places]


GIVEN_AHEAD = 2  # CPUs that Ray is given work for, over those there are: the next step is there when one ends


@dataclass(frozen=True)
class Room:
    """What there is room for: CPUs and GPUs of all nodes together, and models of which steps may be on their way."""

    num_cpus: float
    num_gpus: float
    models_in_flight: float


def next_on_ray(
    waiting: WaitingBatches, running: Collection[Batch], begun: Collection[str], in_flight: Collection[str], room: Room
) -> list[int]:
    """Places of the ready batches to give to Ray now, in order; never none while none runs.

    Ray is given little more than its nodes can begin at once, so that what is ready later and has more behind it can
    go before. Several GPUs, or CPUs, are one node's and are given at once. Until such a batch has begun, no other is
    given a GPU, and no more is given than the CPUs can begin, or small ones would keep it waiting for ever.

    Args:
        waiting: Batches that were not given yet.
        running: Batches that were.
        begun: Keys of steps that a worker has begun.
        in_flight: Models of which steps were given, and not all have ended.
        room: Of the cluster.
    """
    needs = [batch.need for batch in running if batch.need is not None]
    cpus, gpus = sum(need.num_cpus for need in needs), sum(need.num_gpus for need in needs)
    pending = needs_of_pending(running, begun)
    gpus_are_free = not any(need.num_gpus > 1 for need in pending)
    ahead = 1 if any(need.num_cpus > 1 for need in pending) else GIVEN_AHEAD
    models = set(in_flight)
    found: list[int] = []
    # Where no other model may begin, thousands of its batches need not be looked at.
    full = len(models) >= room.models_in_flight
    for place in merge(*(waiting.ready_of[model] for model in models)) if full else waiting.ready:
        batch = waiting.batches[place]
        if cpus >= ahead * room.num_cpus:
            break
        if batch.need is None:
            continue
        if batch.model not in models and len(models) >= room.models_in_flight:
            continue
        if batch.need.num_gpus:
            gpus_are_free = gpus_are_free and gpus + batch.need.num_gpus <= room.num_gpus
            if not gpus_are_free:
                continue
            gpus_are_free = batch.need.num_gpus <= 1
        cpus, gpus = cpus + batch.need.num_cpus, gpus + batch.need.num_gpus
        ahead = 1 if batch.need.num_cpus > 1 else ahead
        models.add(batch.model)
        found.append(place)
    if found or running:
        return found
    # Models in flight may all wait for a step that they share with one that is not.
    return [place for place in waiting.ready if waiting.batches[place].need is not None][:1]


def needs_of_pending(batches: Iterable[Batch], begun: Collection[str]) -> list[Need]:
    """Of the batches that wait for a worker."""
    pending = (batch for batch in batches if not any(step.key in begun for step in batch.steps))
    return [batch.need for batch in pending if batch.need is not None]
