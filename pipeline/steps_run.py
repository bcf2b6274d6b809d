"""Steps on the way to one final outcome each: what was damaged is made again, what may pass is waited for."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from lorc_core.manifest import DamagedArtifactError
from pipeline.steps.outcome import Listener, Milestone, Outcome, Started
from pipeline.steps.step import Step, distinct
from pipeline.storage.store import Store
from pipeline.waiting import Patience
from pipeline.zoo.sections import Cluster

T = TypeVar("T")


class StepsRun(Listener):
    """Runs steps, and all they need, that are not done yet.

    What failed for a damaged artifact is run again once that was made anew, which is done once for each; what failed
    for what may pass by itself, while there is patience. Who listens is told of each step once, and again when it was
    made again.

    Args:
        cluster: Of the zoo file.
        store: Where artifacts are and go.
        wanted: The last steps.
        listener: Is told how it goes on.
        patience: For what may pass.
    """

    def __init__(
        self, cluster: Cluster, store: Store, wanted: Sequence[Step], listener: Listener, patience: Patience
    ) -> None:
        self.cluster, self.store, self.listener, self.patience = cluster, store, listener, patience
        self.steps = distinct(wanted)
        self.ended: dict[str, Outcome] = {}  # final outcomes, by the step's key
        self.told: set[str] = set()
        self.remade: set[str] = set()  # what was damaged; damaged again, the storage is not sound
        listener.plan(self.steps)

    def then(self, use: Callable[[list[Outcome]], T]) -> T:
        """What `use` makes of all outcomes; it is called again where it finds an artifact damaged.

        Raises:
            ConfigError: There is no Ray cluster at the address.
            DamagedArtifactError: What `use` finds damaged was made again before.
        """
        while True:
            try:
                outcomes = self.patience.until_possible(self.attempt, first_obstacle)
                damaged = {outcome.damaged for outcome in outcomes if outcome.damaged is not None} - self.remade
                if not damaged:
                    for outcome in outcomes:
                        self.tell(outcome)
                    return use(outcomes)
            except DamagedArtifactError as damage:
                damaged = {damage.directory.name} - self.remade
                if damage.directory.parent != self.store.steps or not damaged:
                    raise
            for key in damaged:
                self.put_aside(key)

    def attempt(self) -> list[Outcome]:
        """Run the steps that have not ended; returns the outcomes of all."""
        finished = self.store.finished([step for step in self.steps if step.key not in self.ended])
        for step in self.steps:
            if step.key in finished:
                self.record(Outcome.done(step, self.store, "cached"))
        left = [step for step in self.steps if step.key not in self.ended]
        if not left:
            return [self.ended[step.key] for step in self.steps]
        from pipeline.running.runner import run_steps

        latest = {outcome.key: outcome for outcome in run_steps(left, self.ended, self.store, self.cluster, self)}
        return [latest.get(step.key) or self.ended[step.key] for step in self.steps]

    def put_aside(self, key: str) -> None:
        """Make room for an artifact that must be made again, and say so."""
        self.listener.note(f"{key} was damaged; it is now {self.store.put_aside(key)} and is made again")
        self.ended.pop(key, None)
        self.told.discard(key)
        self.remade.add(key)

    def record(self, outcome: Outcome) -> None:
        if outcome.is_final:
            self.ended[outcome.key] = outcome
            self.tell(outcome)
        else:
            self.listener.postpone(outcome)

    def start(self, started: Started) -> None:
        self.listener.start(started)

    def tell(self, outcome: Outcome) -> None:
        """Pass it on, unless the step's was."""
        if outcome.key not in self.told:
            self.told.add(outcome.key)
            self.listener.record(outcome)

    def advance(self, reached: Milestone) -> None:
        self.listener.advance(reached)

    def phase(self, what: str) -> None:
        self.listener.phase(what)


def first_obstacle(outcomes: Sequence[Outcome]) -> str | None:
    """What may pass by itself of what was in the way."""
    return next((outcome.obstacle for outcome in outcomes if outcome.obstacle is not None), None)
