"""An exception as one line, for the screen and the tables, and as a log with all that is known of it."""

import traceback
from pathlib import Path

import torch

from lorc_core.errors import LorcError
from pipeline.steps.outcome import Outcome
from pipeline.storage.store import Store

LONGEST = 300  # characters of an error that is not ours; some libraries tell everything in one line


def model_failure(name: str, model: str, error: Exception, store: Store) -> Outcome:
    """Of something that is done for each model but is no step."""
    key = f"{name}-{model}"
    return Outcome(key, name, model, None, "failed", logged_failure(error, store.log(key)))


def logged_failure(error: Exception, log: Path) -> str:
    """Write the trace of an exception to `log` and say in one line what went wrong.

    A LorcError's message is that line. Of any other exception the line has its type and names the log, since who reads
    it will have to look there.
    """
    where = f"trace in {log}"
    try:
        log.parent.mkdir(exist_ok=True)
        log.write_text("".join(traceback.format_exception(error)))
    except OSError as refused:  # a full disk may be what failed
        where = f"its trace cannot be written: {refused.strerror}"
    if isinstance(error, LorcError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of device memory; lower the batch_size or give more GPUs ({where})"
    first_line = (str(error).strip().splitlines() or [""])[0][:LONGEST]
    return f"{type(error).__name__}: {first_line} ({where})"
