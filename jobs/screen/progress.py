"""Progress of a run: a table that is drawn again as it changes, and failures and notes above it as they come."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from jobs.screen.status_table import StatusView
from pipeline.status.watch import Watch
from pipeline.steps.outcome import Outcome

A_SECOND = 2  # times that it is drawn


class StepProgress(Watch):
    """The table on a terminal; where the output goes elsewhere it is printed once, at the end."""

    def __init__(self, screen: Console) -> None:
        super().__init__("")
        self.screen = screen

    @contextmanager
    def shown(self) -> Iterator["StepProgress"]:
        """While the block runs."""
        if not self.screen.is_terminal:
            try:
                yield self
            finally:
                self.end(None)
                self.screen.print(self.view())
            return
        with Live(console=self.screen, get_renderable=self.view, refresh_per_second=A_SECOND):
            try:
                yield self
            finally:
                self.end(None)

    def view(self) -> StatusView:
        return StatusView(self.status(), time.time(), is_live=True)

    def note(self, line: str) -> None:
        """A line above the table, which stays."""
        super().note(line)
        self.screen.print(f"[yellow]note:[/yellow] {escape(line)}")

    def record(self, outcome: Outcome) -> None:
        """A failure is told above the table."""
        super().record(outcome)
        if outcome.status == "failed":
            failure = self.failures[-1]
            self.screen.print(f"[red]{failure.whose}[/red]: {failure.step}: {escape(failure.error)}")
