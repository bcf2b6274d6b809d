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
    """A foreseen error is one line on standard error and an exit code."""
    try:
        command()
    except LorcError as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
