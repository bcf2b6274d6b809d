"""Promote a registered variant: `lorc promote NAME`, or `python -m jobs.promote NAME` in a scheduled job."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.command import run_command
from jobs.screen.console import console
from pipeline.registry.promotion import promote
from pipeline.registry.tracking import default_tracking_uri
from pipeline.zoo.file import load_zoo
from pipeline.zoo.schema import Zoo


def promote_variant(reference: str, alias: str, zoo: Zoo | None, workdir: str) -> int:
    """Move the alias if the gates accept the version.

    Returns:
        The exit code: 1 if it was refused, else 0.
    """
    gates = zoo.gates if zoo is not None else None
    version, reasons = promote(default_tracking_uri(zoo, workdir), reference, alias, gates)
    name = f"{version.name} version {version.version} ({version.tags['variant']})"
    if reasons:
        console().print(f"[red]refused[/red] {name}:")
        for reason in reasons:
            console().print(f"  {reason}")
        return 1
    console().print(f"[green]promoted[/green] {name} to {version.name}@{alias}")
    return 0


def main(
    reference: Annotated[str, typer.Argument(metavar="NAME")],
    to: str = "champion",
    zoo: Path | None = None,
    workdir: str = "lorc-work",
) -> None:
    """The form a Ray job submits."""
    raise typer.Exit(promote_variant(reference, to, load_zoo(zoo) if zoo else None, workdir))


if __name__ == "__main__":
    run_command(main)
