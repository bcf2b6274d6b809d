"""What the commands print: progress bars, the table of results, sizes."""

import sys
from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipeline.results import Result
from pipeline.steps.outcome import Milestone, Outcome
from pipeline.steps.step import Step

WIDTH_OF_FILES = 140  # where the output is no terminal


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES, highlight=False)


class StepProgress:
    """One bar per kind of step; `record` also prints failures, above the bars, as they come."""

    def __init__(self, screen: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=screen
        )
        self.rows: dict[str, TaskID] = {}

    def plan(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if step.name not in self.rows:
                total = sum(one.name == step.name for one in steps)
                self.rows[step.name] = self.bars.add_task(step.name, total=total)

    def advance(self, reached: Milestone) -> None:
        """A bar of its own for a step that tells how far it has come."""
        if reached.key not in self.rows:
            self.rows[reached.key] = self.bars.add_task(reached.label, total=reached.total)
        self.bars.update(self.rows[reached.key], completed=reached.done, total=reached.total)

    def count(self, outcome: Outcome) -> None:
        if outcome.name in self.rows:
            self.bars.advance(self.rows[outcome.name])

    def record(self, outcome: Outcome) -> None:
        self.count(outcome)
        if outcome.status == "failed":
            subject = outcome.model if outcome.variant is None else f"{outcome.model} {outcome.variant}"
            self.bars.console.print(f"[red]{subject}[/red]: {outcome.name}: {escape(outcome.error or '')}")


def results_table(results: Sequence[Result]) -> Table:
    """One line per model, variant and text; rises are paired with their standard errors."""
    many_texts = len({result.text for result in results}) > 1
    table = Table(title="loss in nats per token, its rise over the baseline ± paired standard error", box=SIMPLE_HEAD)
    for name in ("", *(("text",) if many_texts else ())):
        table.add_column(name, no_wrap=True)
    for name in ("kept", "loss", "rise", "perplexity", "B/token", "factors", "seconds", "version"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note")
    for model, rows in groupby(results, key=lambda result: result.model):
        table.add_row(f"[bold]{model}[/bold]")
        for row in rows:
            table.add_row(*result_cells(row, many_texts))
        table.add_section()
    return table


def result_cells(result: Result, many_texts: bool) -> list[str]:
    is_baseline = result.variant == "baseline"
    return [
        f"  {result.variant}",
        *([result.text] if many_texts else []),
        f"{result.kept_fraction:.3f}",
        f"{result.loss:.4f}",
        "" if is_baseline else f"{result.loss_rise:+.4f} ±{result.loss_rise_standard_error:.4f}",
        f"{result.perplexity:.3f}",
        f"{result.bytes_per_token:,.0f}",
        "" if is_baseline else size(result.factor_bytes),
        f"{result.eval_s:.1f}",
        result.version,
        result.note,
    ]


def size(num_bytes: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
