"""Compress, evaluate and register a zoo: `lorc run ZOO`, or `python -m jobs.compress_zoo ZOO` in a Ray job."""

from collections import Counter
from pathlib import Path

import typer

from jobs.screen.console import console
from jobs.screen.progress import StepProgress
from jobs.screen.results_table import results_table
from jobs.stopping import stoppable
from pipeline.candidates import candidates
from pipeline.results import results, unscored
from pipeline.zoo.consistency import cautions
from pipeline.zoo.file import load_zoo
from pipeline.zoo.schema import Zoo
from pipeline.zoo_run import Until, ZooRun, run_zoo


def compress_zoo(zoo: Zoo, workdir: str, until: Until) -> int:
    """Run a zoo up to a kind of step, with progress bars and a table.

    Returns:
        The exit code: 1 if any model failed, else 0.
    """
    screen = console()
    for caution in cautions(zoo.parts):
        screen.print(f"[yellow]caution:[/yellow] {caution}")
    with stoppable(screen, workdir), StepProgress(screen).shown() as progress:
        done = run_zoo(zoo, workdir, until=until, listener=progress)
    scored, missing = results(done), unscored(done)
    if scored or missing:
        screen.print(results_table(scored, missing))
        screen.print()
    if until == "register":
        screen.print(candidate_line(done))
    screen.print(summary(done))
    return 1 if done.failures else 0


def candidate_line(done: ZooRun) -> str:
    """Which version this zoo file's last run made each model's candidate."""
    if done.zoo.gates is None:
        return "no candidates: the zoo file has no gates"
    chosen = candidates(done.zoo, done.store)
    told = [f"{model}/{version}" if version else f"none of {model}" for model, version in chosen.items()]
    return f"candidates: {', '.join(told) or 'none'}"


def summary(done: ZooRun) -> str:
    """What ran, what had been done, what failed, and where it all is."""
    count = Counter(outcome.status for outcome in done.outcomes)
    lines = [f"{count['ran']} steps ran, {count['cached']} were done before; everything is in {done.store.name}"]
    if count["failed"]:
        failed = ", ".join(dict.fromkeys(outcome.model for outcome in done.failures))
        lines.append(
            f"[red]steps failed: {count['failed']}, skipped since they need those: {count['skipped']}; {failed}[/red]"
        )
    return "\n".join(lines)


def main(zoo: Path, workdir: str = "lorc-work") -> None:
    """The form a Ray job submits."""
    raise typer.Exit(compress_zoo(load_zoo(zoo), workdir, until="register"))


if __name__ == "__main__":
    from jobs.command import run_command

    run_command(main)
