"""The table at the end of a run, and its columns: what each variant costs, whether it passed, what became of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from jobs.screen.console import size
from jobs.screen.fitted_table import Cell, Column, FittedTable
from pipeline.results import Result, Unscored

TITLE = "loss in nats per token, its rise over the baseline ± paired standard error"
VERDICT_STYLES = {"candidate": "bold green", "passed": "green", "failed": "red"}


def many_texts(results: Sequence[Result]) -> bool:
    return len({result.text for result in results}) > 1


def any_verdict(results: Sequence[Result]) -> bool:
    return any(result.verdict for result in results)


def any_version(results: Sequence[Result]) -> bool:
    return any(result.version for result in results)


def rise(result: Result) -> str:
    return "" if result.is_baseline else f"{result.loss_rise:+.4f} ±{result.loss_rise_standard_error:.4f}"


def factors(result: Result) -> str:
    return "" if result.is_baseline else size(result.factor_bytes)


def verdict(result: Result) -> Text:
    return Text(result.verdict, style=VERDICT_STYLES.get(result.verdict, ""))


@dataclass(frozen=True)
class ResultColumn:
    """A column, what stands in it, and whether there is anything to show."""

    column: Column
    cell: Callable[[Result], Cell]
    is_needed: Callable[[Sequence[Result]], bool] = lambda results: True


# In the order in which they stand. Where there is no room the least important go; a column without a number stays.
COLUMNS = (
    ResultColumn(Column("text", align_right=False), lambda result: result.text, many_texts),
    ResultColumn(Column("kept"), lambda result: f"{result.kept_fraction:.3f}"),
    ResultColumn(Column("loss", importance=4), lambda result: f"{result.loss:.4f}"),
    ResultColumn(Column("rise"), rise),
    ResultColumn(Column("perplexity", importance=3), lambda result: f"{result.perplexity:.3f}"),
    ResultColumn(Column("B/token", importance=5), lambda result: f"{result.bytes_per_token:,.0f}"),
    ResultColumn(Column("factors", importance=2), factors),
    ResultColumn(Column("seconds", importance=1), lambda result: f"{result.eval_s:.1f}"),
    ResultColumn(Column("gates", align_right=False), verdict, any_verdict),
    ResultColumn(
        Column("v.", importance=6),
        lambda result: result.version,
        any_version,
    ),
)


def results_table(results: Sequence[Result], unscored: Sequence[Unscored] = ()) -> FittedTable:
    """A line per variant and text below the name of its model; the reason where a variant has no scores."""
    columns = [column for column in COLUMNS if column.is_needed(results)]
    table = FittedTable("", [column.column for column in columns], title=TITLE)
    for model in dict.fromkeys([*(result.model for result in results), *(missing.model for missing in unscored)]):
        table.add_heading(model)
        for result in results:
            if result.model == model:
                table.add_row(f"  {result.variant}", *(column.cell(result) for column in columns), note=result.note)
        for missing in unscored:
            if missing.model == model:
                table.add_row(f"  {missing.variant}", note=missing.reason)
    return table
