"""Progress of a run on the screen: one live table, and failures and notes above it as they come."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from jobs.run_table import RunTable
from pipeline.status.following import Following
from pipeline.steps.outcome import Listener, Outcome

REFRESHES_PER_S = 2


class ShownProgress(Following):
    """Follows a run and shows it.

    Args:
        screen: To show it on; where that is no terminal, the table comes once, at the end.
        title: Of the table.
    """

    def __init__(self, screen: Console, title: str) -> None:
        super().__init__(title, Listener())
        self.screen = screen

    @contextmanager
    def shown(self) -> Iterator["ShownProgress"]:
        """While the block runs."""
        at_work = True
        live = Live(
            get_renderable=lambda: RunTable(self.state, at_work=at_work),
            console=self.screen,
            refresh_per_second=REFRESHES_PER_S,
            vertical_overflow="crop",
        )
        live.start()
        try:
            yield self
        finally:
            at_work = False
            live.stop()
            if not self.screen.is_interactive:  # rich ends the table without a new line there
                self.screen.print()

    def note(self, line: str) -> None:
        """A line above the table, which stays."""
        self.screen.print(f"[yellow]note:[/yellow] {escape(line)}")
        super().note(line)

    def record(self, outcome: Outcome) -> None:
        """Print a failure above the table."""
        super().record(outcome)
        if outcome.status == "failed":
            whose = f"{outcome.model} {outcome.variant}" if outcome.variant else outcome.model
            self.screen.print(f"[red]{whose}[/red]: {outcome.name}: {escape(outcome.error or '')}")
