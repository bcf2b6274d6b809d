"""How far a run is, from any terminal: `lorc status`."""

from rich.console import Console
from rich.markup import escape

from jobs.run_table import RunTable, whose
from jobs.screen import console
from pipeline.status.looking import Look, look


def show_status(workdir: str) -> int:
    """Print the state of the run in a work directory.

    Returns:
        The exit code: 1 if something failed or the run died, else 0.
    """
    seen, screen = look(workdir), console()
    screen.print(RunTable(seen.state, at_work=seen.at_work))
    for note in seen.state.notes:
        screen.print(f"[yellow]note:[/yellow] {escape(note)}")
    show_failures(seen, screen)
    screen.print(what_became(seen))
    return 1 if seen.died or seen.state.of(None, "failed") else 0


def show_failures(seen: Look, screen: Console) -> None:
    failed = seen.state.of(None, "failed")
    for step in failed:
        screen.print(f"[red]{escape(whose(step))}[/red]: {step.kind}: {escape(step.error or '')}")
    if failed:
        screen.print(f"their logs: lorc logs WORKDIR {failed[0].model}")


def what_became(seen: Look) -> str:
    """Whether the run goes on, has ended, or died."""
    if seen.at_work:
        return f"runs: {seen.holder} (heartbeat {seen.heartbeat_s:.0f} s ago)"
    left = len(seen.state.of(None, "waiting", "running"))
    if seen.died:
        return f"[red]died with {left} steps left[/red]; the same command goes on from there"
    return f"stopped with {left} steps left; the same command goes on from there" if left else "ended"
