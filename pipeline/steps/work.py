"""Steps at work, in a Ray worker or in the driver: each writes a scratch directory that becomes its artifact."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.steps.failures import step_failure
from pipeline.steps.outcome import Milestone, Outcome
from pipeline.steps.step import FileStep, ModelStep, Progress, Step
from pipeline.storage.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_group(steps: Sequence[Step], store: Store) -> Iterator[Outcome | Milestone]:
    """Run steps of one group in turn, yielding outcomes, and progress, as they come; they share one loaded model.

    Whatever a step raises, foreseen or not, is its outcome: one model must not cost the others their night. This is
    where broad excepts are right; what the runner itself raises is a bug, and stops the job.
    """
    with ExitStack() as opened:
        try:
            model = opened.enter_context(shared_model(steps[0]))
        except Exception as error:  # noqa: BLE001
            for step in steps:
                yield step_failure(step, error, store)
            return
        for step in steps:
            yield from run_step(step, store, model)


def shared_model(step: Step) -> "AbstractContextManager[PreTrainedModel | None]":
    """The model that a step's group runs, loaded; None where it runs none."""
    if not isinstance(step, ModelStep):
        return nullcontext()
    from pipeline.evaluation import loaded_model

    directory = step.loads.location.directory(weights=True)
    return loaded_model(directory, step.loads.dtype, trust_remote_code=step.loads.trust_remote_code)


def run_step(step: Step, store: Store, model: "PreTrainedModel | None") -> Iterator[Outcome | Milestone]:
    """Run a step, yielding its progress and last its outcome."""
    if store.is_done(step):  # by an earlier attempt whose worker was lost
        yield Outcome.done(step, store)
        return
    try:
        with store.writing(step) as scratch:
            for done, total in started_step(step, scratch, store, model) or ():
                yield Milestone(step.key, f"{step.name} {step.model}", done, total)
        store.log(step.key).unlink(missing_ok=True)  # of an earlier attempt
        if (resume_dir := step.resume_dir(store)) is not None:
            shutil.rmtree(resume_dir, ignore_errors=True)
        outcome = Outcome.done(step, store)
    except Exception as error:  # noqa: BLE001  see `run_group`
        outcome = step_failure(step, error, store)
    yield outcome


def started_step(step: Step, output: Path, store: Store, model: "PreTrainedModel | None") -> Progress | None:
    """Run a step to its end or, of one that tells its progress, begin it."""
    if isinstance(step, FileStep):
        return step.run(output, store)
    assert isinstance(step, ModelStep)
    assert model is not None
    return step.run(output, store, model)
