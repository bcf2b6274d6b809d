"""Steps that wait: which are ready, and in what order they are to run."""

from bisect import insort
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

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
        gone = set(places)
        self.ready = [place for place in self.ready if place not in gone]
        for place in places:
            self.missing.pop(place, None)
        return [self.batches.pop(place) for place in places]
