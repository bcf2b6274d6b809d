"""Print how a run stands, from any terminal, while it runs and after: `lorc status WORKDIR`."""

import time

from rich.live import Live
from rich.markup import escape

from jobs.screen.console import console, duration
from jobs.screen.status_table import StatusView
from lorc_core.errors import ConfigError
from pipeline.status.status import STATUS_FILE, Status, read_status
from pipeline.storage.looking import Held, Look

EVERY_S = 1.0


def show_status(workdir: str, *, watch: bool) -> int:
    """Print the table, where its run is, and what failed; while it runs, again and again if that is to be watched.

    Returns:
        The exit code: 1 if something failed, or the run died or was stopped, else 0.

    Raises:
        ConfigError: No run was there.
    """
    look, screen = Look(workdir), console()
    status, held = seen(look)
    if watch and is_running(status, held):
        with Live(console=screen, auto_refresh=False, transient=True) as live:
            while is_running(status, held):
                live.update(StatusView(status, time.time(), is_live=True), refresh=True)
                time.sleep(EVERY_S)
                status, held = seen(look)
    screen.print(StatusView(status, time.time()))
    for failure in status.failures:
        screen.print(f"[red]{failure.whose}[/red]: {failure.step}: {escape(failure.error)}")
    for note in status.notes:
        screen.print(f"[yellow]note:[/yellow] {escape(note)}")
    screen.print(condition(status, held), markup=False)
    return 0 if not status.failures and (is_running(status, held) or is_whole(status)) else 1


def seen(look: Look) -> tuple[Status, Held | None]:
    """What the run last told, and who holds the work directory."""
    held = look.held()
    content = look.read(STATUS_FILE)
    if content is None:
        raise ConfigError(f"no run was in {look.name}; give the work directory of one")
    return read_status(content.decode()), held


def is_running(status: Status, held: Held | None) -> bool:
    if held is None or status.ended is not None or held.is_gone:
        return False
    return (held.holder.pid, held.holder.host) == (status.pid, status.host)


def is_whole(status: Status) -> bool:
    """Whether it came to its last step."""
    return status.ended is not None and status.error is None


def condition(status: Status, held: Held | None) -> str:
    """One line: whether the run goes on, ended or died, and who else has the work directory."""
    whose = f"zoo {status.zoo}, process {status.pid} on {status.host}"
    if held is not None and is_running(status, held):
        return f"runs: {whose}, heartbeat {duration(held.heartbeat_s)} ago"
    if status.ended is None:
        told = f"died: {whose}, last heard of at {clock(status.updated)}; the same command goes on from there"
    elif status.error is None:
        told = f"ended at {clock(status.ended)}: {whose}"
    else:
        told = f"ended at {clock(status.ended)} before its last step: {whose}: {status.error}"
    other = held is not None and not held.is_gone
    return f"{told}; now in use by {held.holder}" if held is not None and other else told


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
