"""Following a run: its state in memory, and in the work directory's `status.json` for other terminals."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress

from pipeline.status.looking import STATUS_FILE
from pipeline.status.state import RunState, StepState
from pipeline.steps.outcome import Began, Listener, Milestone, Outcome
from pipeline.steps.step import Step
from pipeline.storage.store import Store

WRITE_EVERY_S = 1.0


class Following(Listener):
    """Keeps the state of a run up to date, and passes on what it is told.

    Attributes:
        state: Of the run.
    """

    def __init__(self, zoo: str, listener: Listener) -> None:
        self.state, self.listener = RunState(zoo), listener

    def plan(self, steps: Sequence[Step]) -> None:
        self.state.steps |= {step.key: StepState(step.model, step.label, step.name) for step in steps}
        self.changed()
        self.listener.plan(steps)

    def begin(self, began: Began) -> None:
        step = self.state.steps[began.key]
        step.status, step.began_at, step.host = "running", began.at, began.host
        self.changed()
        self.listener.begin(began)

    def advance(self, reached: Milestone) -> None:
        step = self.state.steps[reached.key]
        step.done, step.total = reached.done, reached.total
        self.changed()
        self.listener.advance(reached)

    def record(self, outcome: Outcome) -> None:
        new = StepState(outcome.model, outcome.variant, outcome.name)  # of something that is no step, a model not found
        step = self.state.steps.setdefault(outcome.key, new)
        step.status, step.error = outcome.status, outcome.error
        if outcome.cost is not None:
            step.wall_s, step.host = outcome.cost.wall_s, outcome.cost.host
        self.changed()
        self.listener.record(outcome)

    def phase(self, what: str) -> None:
        self.changed(what)
        self.listener.phase(what)

    def note(self, line: str) -> None:
        self.state.notes.append(line)
        self.changed()
        self.listener.note(line)

    def changed(self, phase: str | None = None) -> None:
        """The state is another now; a phase lasts until anything else is told."""
        self.state.phase, self.state.updated_at = phase, time.time()


class StatusFile(Following):
    """A run that everyone can look at, in `status.json`; it ends with the `with` block.

    It is written at most once in `WRITE_EVERY_S`, since on a cluster a thousand steps may end in one.
    """

    def __init__(self, zoo: str, store: Store, listener: Listener) -> None:
        super().__init__(zoo, listener)
        self.store, self.written_at = store, 0.0

    def __enter__(self) -> "StatusFile":
        self.write()
        return self

    def __exit__(self, *error: object) -> None:
        self.state.ended_at = self.state.updated_at = time.time()
        self.state.phase = None
        self.write()

    def changed(self, phase: str | None = None) -> None:
        super().changed(phase)
        if time.time() - self.written_at >= WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Whole from its first moment; a full disk must not stop what it tells of."""
        self.written_at = time.time()
        path = self.store.place(STATUS_FILE)
        partial = path.with_suffix(".partial")
        with suppress(OSError):
            partial.write_text(json.dumps(self.state.to_dict()))
            partial.rename(path)
            self.store.publish(path)
