"""Progress of a run: a bar for each kind of step, for long steps one of their own, and failures as they come."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pipeline.steps.outcome import Listener, Milestone, Outcome
from pipeline.steps.step import Step


class StepProgress(Listener):
    """Bars that count what is done; what failed or was skipped is told beside them and leaves them short."""

    def __init__(self, screen: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description:>17}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("[red]{task.fields[missed]}[/red]"),
            console=screen,
        )
        self.rows: dict[str, TaskID] = {}
        self.missed: dict[str, dict[str, int]] = {}  # by kind of step: how many failed, how many were skipped
        self.waiting: TaskID | None = None

    @contextmanager
    def shown(self) -> Iterator["StepProgress"]:
        """While the block runs."""
        with self.bars:
            yield self
            self.end_phase()

    def plan(self, steps: Sequence[Step]) -> None:
        """A bar for each kind of step."""
        for name, total in Counter(step.name for step in steps).items():
            self.rows[name] = self.bars.add_task(name, total=total, count=f"0/{total}", missed="")

    def advance(self, reached: Milestone) -> None:
        """A bar of its own for a step that tells how far it has come."""
        self.end_phase()
        if reached.key not in self.rows:
            self.rows[reached.key] = self.bars.add_task(reached.label, total=reached.total, count="", missed="")
        count = f"{reached.done}/{reached.total}"
        self.bars.update(self.rows[reached.key], completed=reached.done, total=reached.total, count=count)

    def phase(self, what: str) -> None:
        """What is waited for while no step runs, with a bar that moves; until something else comes."""
        self.end_phase()
        self.waiting = self.bars.add_task(what, total=None, count="", missed="")

    def note(self, line: str) -> None:
        """A line above the bars, which stays."""
        self.bars.console.print(f"[yellow]note:[/yellow] {escape(line)}")

    def end_phase(self) -> None:
        if self.waiting is not None:
            self.bars.remove_task(self.waiting)
            self.waiting = None

    def count(self, outcome: Outcome) -> None:
        """Move the bar of its kind if it is done."""
        if outcome.status != "cached":
            self.end_phase()
        if outcome.name not in self.rows:
            return
        row = self.rows[outcome.name]
        if outcome.status in ("ran", "cached"):
            self.bars.advance(row)
        else:
            missed = self.missed.setdefault(outcome.name, {"failed": 0, "skipped": 0})
            missed[outcome.status] += 1
            told = ", ".join(f"{count} {status}" for status, count in missed.items() if count)
            self.bars.update(row, missed=told)
        task = self.bars.tasks[self.bars.task_ids.index(row)]
        self.bars.update(row, count=f"{task.completed:.0f}/{task.total:.0f}")

    def record(self, outcome: Outcome) -> None:
        """Count it, and print a failure above the bars."""
        self.count(outcome)
        if outcome.status == "failed":
            whose = f"{outcome.model} {outcome.variant}" if outcome.variant else outcome.model
            self.bars.console.print(f"[red]{whose}[/red]: {outcome.name}: {escape(outcome.error or '')}")
