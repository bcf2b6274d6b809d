"""Steps at work, in a Ray worker or in the driver: each writes a scratch directory that becomes its artifact."""

import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.steps.failures import step_failure
from pipeline.steps.outcome import Milestone, Outcome, Started
from pipeline.steps.step import FileStep, ModelStep, Progress, Step
from pipeline.storage.cost import Meter
from pipeline.storage.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SharedModel:
    """The model that a group's steps run, loaded when the first of them begins and closed with `opened`."""

    def __init__(self, opened: ExitStack) -> None:
        self.opened = opened
        self.model: PreTrainedModel | None = None
        self.failure: Exception | None = None

    def loaded(self, step: ModelStep, store: Store) -> "PreTrainedModel":
        """What loading it raised once, it raises for every step."""
        from pipeline.evaluation.losses import loaded_model

        if self.failure is not None:
            raise self.failure
        if self.model is None:
            try:
                directory = step.loads.location.directory(weights=True)
                batch_size, window_tokens = step.batch_shape(store)
                loading = loaded_model(
                    directory,
                    step.loads.dtype,
                    batch_size=batch_size,
                    window_tokens=window_tokens,
                    trust_remote_code=step.loads.trust_remote_code,
                )
                self.model = self.opened.enter_context(loading)
            except Exception as error:
                self.failure = error
                raise
        return self.model


def run_group(steps: Sequence[Step], store: Store) -> Iterator[Started | Milestone | Outcome]:
    """Run steps of one group in turn, yielding what there is to tell as it comes; they share one loaded model.

    Whatever a step raises, foreseen or not, is its outcome: one model must not cost the others their night. This is
    where broad excepts are right; what the runner itself raises is a bug, and stops the job.
    """
    with ExitStack() as opened:
        model = SharedModel(opened)
        for step in steps:
            yield from run_step(step, store, model)


def run_step(step: Step, store: Store, model: SharedModel) -> Iterator[Started | Milestone | Outcome]:
    """Run a step, yielding that it began, its progress and last its outcome."""
    yield Started(step.key, socket.gethostname(), time.time())
    if store.is_done(step):  # by an earlier attempt whose worker was lost
        store.end(step.key)
        yield Outcome.done(step, store)
        return
    meter = Meter()
    try:
        meter.parts = [store.cost(part) for part in step.parts]
        with store.writing(step, meter) as scratch:
            for done, total in started_step(step, scratch, store, model) or ():
                yield Milestone(step.key, done, total)
        store.log(step.key).unlink(missing_ok=True)  # of an earlier attempt
        if (resume_dir := step.resume_dir(store)) is not None:
            shutil.rmtree(resume_dir, ignore_errors=True)
        for part in step.parts:
            store.remove(part.key)
        outcome = Outcome.done(step, store)
    except Exception as error:  # noqa: BLE001  see `run_group`
        outcome = replace(step_failure(step, error, store), cost=meter.cost())
    yield outcome


def started_step(step: Step, output: Path, store: Store, model: SharedModel) -> Progress | None:
    """Run a step to its end or, of one that tells its progress, begin it."""
    if isinstance(step, FileStep):
        return step.run(output, store)
    assert isinstance(step, ModelStep)
    return step.run(output, store, model.loaded(step, store))
