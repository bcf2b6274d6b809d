"""How a command ends: a foreseen error is one line on standard error and an exit code."""

import sys
from collections.abc import Callable

import typer
from rich.console import Console
from rich.markup import escape

from lorc_core.errors import ConfigError, LorcError


def run_command(command: Callable[..., None]) -> None:
    """Run one function as a command line of its own, as `python -m jobs.<name>` does."""
    single = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    single.command()(command)
    guarded(single)


def guarded(command: typer.Typer) -> None:
    """A foreseen error, as what may pass by itself is, is one line on standard error and an exit code."""
    try:
        command()
    except Exception as error:
        message = str(error) if isinstance(error, LorcError) else obstacle_of(error)
        if message is None or "--debug" in sys.argv:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(message)}", highlight=False)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def obstacle_of(error: Exception) -> str | None:
    """What was in the way, if it may pass by itself."""
    from pipeline.waiting import passing_obstacle  # it imports what few commands need

    return passing_obstacle(error)
