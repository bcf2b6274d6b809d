"""Re-evaluate the champions: `lorc regress`, or `python -m jobs.regression_eval` on a schedule."""

from typing import Annotated

import typer
from rich.text import Text

from jobs.command import run_command
from jobs.screen.console import console
from jobs.screen.fitted_table import Column, FittedTable
from jobs.screen.progress import StepProgress
from jobs.stopping import stoppable
from pipeline.registry.tracking import default_tracking_uri
from pipeline.regression import ChampionVerdict, label, regress
from pipeline.zoo.sections import Cluster


def regress_champions(names: list[str], address: str | None, workdir: str) -> int:
    """Evaluate, print the verdicts.

    Returns:
        The exit code: 1 if a champion fell or could not be evaluated, else 0.
    """
    screen = console()
    with stoppable(screen, workdir), StepProgress(screen).shown() as progress:
        uri = default_tracking_uri(None, workdir)
        verdicts = regress(uri, names, Cluster(address=address), workdir, progress)
    if any(verdict.rows for verdict in verdicts):
        screen.print(verdict_table(verdicts))
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def verdict_table(verdicts: list[ChampionVerdict]) -> FittedTable:
    """A line for each text that a champion was evaluated on again."""
    columns = (
        Column("text", align_right=False),
        Column("registered", importance=2),
        Column("now", importance=3),
        Column("rise"),
        Column("B/token", importance=1),
        Column("verdict", align_right=False),
    )
    table = FittedTable("champion", columns, "champions against their registered scores, loss in nats per token")
    for verdict in verdicts:
        for row in verdict.rows:
            table.add_row(
                label(verdict.version),
                row["text"],
                f"{row['registered_loss']:.4f}",
                f"{row['loss']:.4f}",
                f"{row['loss'] - row['registered_loss']:+.5f} ±{row['loss_rise_standard_error']:.5f}",
                f"{row['bytes_per_token']:,.0f}",
                Text("fell", style="red") if row["fell"] else Text("passed", style="green"),
            )
    return table


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None,
    address: str | None = None,
    workdir: str = "lorc-work",
) -> None:
    """The form a scheduled Ray job submits."""
    raise typer.Exit(regress_champions(names or [], address, workdir))


if __name__ == "__main__":
    run_command(main)
