"""How far a run is, as a table that fits the screen: models down, stages across, and what goes on below it."""

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from jobs.fitted_table import Column, FittedTable
from pipeline.status.state import DONE, STAGES, RunState, StepState, remaining_s

TITLES = {"calibrate": "calib", "decompose": "layers", "evaluate": "eval", "register": "reg"}  # short ones of stages
# Stages that are left out where there is no room, the first first.
LEAST_TELLING = ("texts", "ranks", "calibrate", "variants")
LONGEST_NAME = 30  # characters of a model's
ROOM_BELOW = 10  # lines of a screen that are no models'
MOST_RUNNING = 3  # steps that are told of
LEGEND = "steps done / steps; > runs now, ! failed or lacks what failed"


class RunTable:
    """A run's state, laid out for the screen that prints it.

    Args:
        state: Of the run.
        now: Seconds since 1970; the present if absent.
        at_work: Whether the run goes on.
    """

    def __init__(self, state: RunState, now: float | None = None, *, at_work: bool = True) -> None:
        self.state, self.now, self.at_work = state, now, at_work

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = time.time() if self.now is None else self.now
        if self.state.steps:
            yield from state_table(self.state, options.height or console.height).__rich_console__(console, options)
        for line in lines_below(self.state, now, at_work=self.at_work):
            yield Text(line, no_wrap=True, overflow="ellipsis")


def state_table(state: RunState, height: int) -> FittedTable:
    """Models by stages; of more models than there is room for, those that nothing can be said of are summed up."""
    stages = [stage for stage in STAGES if any(step.stage == stage for step in state.steps.values())]
    importance = {stage: rank for rank, stage in enumerate(LEAST_TELLING)}
    columns = [Column(TITLES.get(stage, stage), importance.get(stage)) for stage in stages]
    table = FittedTable("", columns, f"{state.zoo}: {LEGEND}")
    shown = most_telling(state, max(height - ROOM_BELOW, 3))
    for model in shown:
        steps = state.of(model)
        table.add_row(shortened(model), *(cell([step for step in steps if step.stage == stage]) for stage in stages))
    if rest := [model for model in state.models if model not in shown]:
        cells = (cell([step for model in rest for step in state.of(model) if step.stage == stage]) for stage in stages)
        table.add_row(f"{len(rest)} others", *cells)
    return table


def most_telling(state: RunState, room: int) -> list[str]:
    """Models that fit, in their order: first those with failures, then those at work, then those that wait."""

    def urgency(model: str) -> int:
        statuses = {step.status for step in state.of(model)}
        ranks = [{"failed", "skipped"}, {"running"}, {"waiting"}]
        return next((rank for rank, told in enumerate(ranks) if statuses & told), len(ranks))

    models = state.models
    if len(models) <= room:
        return models
    chosen = sorted(models, key=urgency)[: room - 1]
    return [model for model in models if model in chosen]


def cell(steps: Sequence[StepState]) -> Text:
    """Of one model and stage."""
    if not steps:
        return Text("")
    statuses = [step.status for step in steps]
    told = f"{sum(status in DONE for status in statuses)}/{len(steps)}"
    if "failed" in statuses or "skipped" in statuses:
        return Text(f"{told}!", style="red")
    if "running" in statuses:
        return Text(f"{told}>", style="yellow")
    return Text(f"{told} ", style="green" if all(status in DONE for status in statuses) else "dim")


def lines_below(state: RunState, now: float, *, at_work: bool) -> Iterator[str]:
    """How long, how much longer, and what runs now."""
    left = remaining_s(state, now) if at_work else None
    about = "" if left is None else f", about {clock(left)} left"
    yield (
        f"{clock((now if at_work else state.updated_at) - state.started_at)} so far{about}"
        if at_work
        else (f"ran for {clock(state.updated_at - state.started_at)}")
    )
    running = state.of(None, "running") if at_work else []
    for step in running[:MOST_RUNNING]:
        since = "" if step.began_at is None else f" for {clock(now - step.began_at)}"
        parts = f", {step.done} of {step.total}" if step.total else ""
        yield f"  {step.kind} {whose(step)}{parts}{since} on {step.host}"
    if len(running) > MOST_RUNNING:
        yield f"  and {len(running) - MOST_RUNNING} more steps"
    if at_work and state.phase is not None:
        yield f"  {state.phase}"


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def whose(step: StepState) -> str:
    return f"{step.model} {step.variant}" if step.variant else step.model


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(max(seconds, 0))))
