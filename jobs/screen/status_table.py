"""How a run stands, drawn: models down, stages across, then the time it took and takes, and what runs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from jobs.screen.console import duration
from jobs.screen.fitted_table import Column, FittedTable
from pipeline.status.status import STAGES, Count, ModelStatus, Running, Status

LEGEND = "✓ done  ▸ runs  ✗ failed  - cannot run, since what it needs failed"
# Where there is no room the least important go; a stage that took seconds tells less than one that takes hours.
IMPORTANCE = {"texts": 1, "ranks": 2, "register": 3, "variants": 4, "calibrate": 5, "decompose": 6}
MARKS = {"failed": "✗", "running": "▸", "done": "✓", "waiting": " "}
RUNNING_SHOWN = 3
AROUND_ROWS = 8 + RUNNING_SHOWN  # lines of a screen that are not a model's
STATES = ("failed", "running", "done", "waiting")


@dataclass(frozen=True)
class StatusView:
    """The table at a time; `is_live` says that it must not be higher than the screen."""

    status: Status
    now: float
    is_live: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = console.height - AROUND_ROWS if self.is_live and console.is_terminal else None
        if self.status.models:
            yield from self.table_lines(room, options.max_width)
        yield from (Text(line, overflow="ellipsis", no_wrap=True) for line in time_lines(self.status, self.now))

    def table_lines(self, room: int | None, width: int) -> Iterator[FittedTable | Text]:
        """Those that failed or run, if there is no room for all, and one line for the others."""
        models = self.status.models
        table = models_table(models, list(models))
        if room is not None and table.layout(width).name_width == 0:
            room //= 2  # names stand on lines of their own
        if room is None or len(models) <= room:
            yield table
            return
        shown = [name for state in ("failed", "running") for name in models if models[name].state == state]
        kept = set(shown[: max(room - 1, 1)])
        yield models_table(models, [name for name in models if name in kept])
        others = [model for name, model in models.items() if name not in kept]
        yield Text(others_line(others, "others" if kept else "models"), style="dim")


def models_table(models: dict[str, ModelStatus], names: Sequence[str]) -> FittedTable:
    stages = [stage for stage in STAGES if any(stage in model.stages for model in models.values())]
    table = FittedTable("", [Column(stage, IMPORTANCE.get(stage)) for stage in stages])
    table.legend.append(LEGEND)
    for name in names:
        table.add_row(
            f"{MARKS[models[name].state]} {name}", *(cell(models[name].stages.get(stage, Count())) for stage in stages)
        )
    return table


def cell(count: Count) -> Text:
    """How many are done of how many, and a mark; empty where there is nothing to do."""
    if not count.total:
        return Text()
    figures = f"{count.done}/{count.total}"
    if count.failed:
        return Text(f"{figures}✗", style="red")
    if count.running:
        return Text(f"{figures}▸", style="bold")
    if count.done == count.total:
        return Text(f"{figures}✓", style="green")
    return Text(f"{figures}-" if count.skipped else f"{figures} ")


def others_line(others: Sequence[ModelStatus], what: str) -> str:
    count = Counter(model.state for model in others)
    return f"{len(others)} {what}: " + ", ".join(f"{count[state]} {state}" for state in STATES if count[state])


def time_lines(status: Status, now: float) -> Iterator[str]:
    """How long it took and will take, and the steps that have run longest."""
    told = [duration((status.ended or now) - status.started)]
    if status.ended is None:
        if status.ends_at is not None:
            told.append(f"about {duration(max(status.ends_at - now, 0))} left")
        if status.running:
            told.append(f"{counted(len(status.running), 'step')} running")
        if status.waits_for is not None:
            told.append(status.waits_for)
    failed = len(status.failures)
    yield ", ".join([*told, f"{counted(failed, 'failure')}"] if failed else told)
    if status.ended is None:
        yield from (running_line(running, now) for running in status.running[:RUNNING_SHOWN])


def running_line(running: Running, now: float) -> str:
    whose = f"{running.model} {running.variant}" if running.variant else running.model
    parts = f"{running.parts_done}/{running.parts}, " if running.parts else ""
    return f"  {running.step} {whose}: {parts}{duration(max(now - running.since, 0))} on {running.host}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
