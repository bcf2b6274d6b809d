"""An exception as an outcome: one line for the screen and the tables, and a log with all that is known of it."""

import traceback

from lorc_core.errors import LorcError, first_line
from lorc_core.manifest import DamagedArtifactError
from pipeline.steps.outcome import Outcome
from pipeline.steps.step import Step
from pipeline.storage.store import Store
from pipeline.waiting import passing_obstacle

LONGEST = 300  # characters of an error that is not ours; some libraries tell everything in one line


def step_failure(step: Step, error: Exception, store: Store) -> Outcome:
    """Of a step; a damaged artifact that it found in the store, or what may pass by itself, is named."""
    damaged = None
    if isinstance(error, DamagedArtifactError) and error.directory.parent == store.steps:
        damaged = error.directory.name
        store.forget(damaged)
    return Outcome.failed(step, logged_failure(error, step.log_key, store), damaged, passing_obstacle(error))


def model_failure(name: str, model: str, error: Exception, store: Store) -> Outcome:
    """Of something that is done for each model but is no step."""
    key = f"{name}-{model}"
    told = logged_failure(error, key, store)
    return Outcome(key, name, model, None, "failed", told, obstacle=passing_obstacle(error))


def logged_failure(error: Exception, key: str, store: Store) -> str:
    """Write the trace of an exception to the log of `key` and say in one line what went wrong.

    A LorcError's message is that line. Of any other exception the line has its type and names the log, since who reads
    it will have to look there.
    """
    where = f"trace in {store.log(key)}"
    try:
        log = store.place("logs", f"{key}.log")
        log.write_text("".join(traceback.format_exception(error)))
        store.publish(log)
    except OSError as refused:  # a full disk may be what failed
        where = f"its trace cannot be written: {refused.strerror}"
    if isinstance(error, LorcError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported to say so
        return f"out of device memory; lower the batch_size or give more GPUs ({where})"
    return f"{type(error).__name__}: {first_line(error)[:LONGEST]} ({where})"
