"""Ctrl-C and SIGTERM end a run in order: Ray is ended, the work directory given back, and a line says how to go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

STOPPED = 130  # the exit code of a command that was interrupted, as shells have it


@contextmanager
def stoppable(screen: Console, workdir: str) -> Iterator[None]:
    """A run that may be stopped while the block runs.

    Args:
        screen: Where the line goes.
        workdir: Of the run.

    Raises:
        Exit: It was stopped.
    """
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        screen.print(f"stopped; what is finished stays in {named(workdir)}, and the same command goes on from there")
        raise typer.Exit(STOPPED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def named(workdir: str) -> str:
    """A work directory as anyone would find it."""
    return workdir if "://" in workdir else str(Path(workdir).resolve())


def interrupt(number: int, frame: Any) -> None:
    """SIGTERM, as a scheduler sends it, ends a run like Ctrl-C."""
    raise KeyboardInterrupt
