"""Steps at work, in a Ray worker or in the driver: each writes a scratch directory that becomes its artifact."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorc_core.errors import LorcError
from pipeline.steps.outcome import Milestone, Outcome
from pipeline.steps.step import FileStep, ModelStep, Progress, Step
from pipeline.storage.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_group(steps: Sequence[Step], store: Store) -> Iterator[Outcome | Milestone]:
    """Run steps of one group in turn, yielding outcomes, and progress, as they come; they share one loaded model.

    A LorcError is an outcome. Any other exception is a bug or a broken machine, and rises.
    """
    try:
        with shared_model(steps[0]) as model:
            for step in steps:
                yield from run_step(step, store, model)
    except LorcError as error:
        for step in steps:
            yield Outcome.of(step, "failed", str(error))


def shared_model(step: Step) -> "AbstractContextManager[PreTrainedModel | None]":
    """The model that a step's group runs, loaded; None where it runs none."""
    if not isinstance(step, ModelStep):
        return nullcontext()
    from pipeline.evaluation import loaded_model

    return loaded_model(step.loads.model_dir, step.loads.dtype, trust_remote_code=step.loads.trust_remote_code)


def run_step(step: Step, store: Store, model: "PreTrainedModel | None") -> Iterator[Outcome | Milestone]:
    if store.is_done(step):  # by an earlier attempt whose worker was lost
        yield Outcome.of(step, "ran", elapsed_s=0.0)
        return
    started = time.perf_counter()
    error: str | None = None
    try:
        with store.writing(store.path(step)) as scratch:
            for done, total in started_step(step, scratch, store, model) or ():
                yield Milestone(step.key, f"{step.name} {step.model}", done, total)
        if (resume_dir := step.resume_dir(store)) is not None:
            shutil.rmtree(resume_dir, ignore_errors=True)
    except LorcError as failure:
        error = str(failure)
    except torch.OutOfMemoryError as failure:
        error = f"out of device memory; lower the batch_size or give more GPUs ({failure})"
    yield Outcome.of(step, "failed" if error else "ran", error, time.perf_counter() - started)


def started_step(step: Step, output: Path, store: Store, model: "PreTrainedModel | None") -> Progress | None:
    """Run a step to its end or, of one that tells its progress, begin it."""
    if isinstance(step, FileStep):
        return step.run(output, store)
    assert isinstance(step, ModelStep)
    assert model is not None
    return step.run(output, store, model)
