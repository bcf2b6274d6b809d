"""Print the methods that lorc knows: `lorc methods`."""

from dataclasses import fields

from rich.box import SIMPLE_HEAD
from rich.table import Table

from jobs.screen import console
from lorc_core.methods import METHODS, Axes
from lorc_core.ranks.schedules import Energy

DEFAULTS = {"gqa": "stack", "mean": "known"}


def show_methods() -> int:
    """Print one line per preset. Returns the exit code."""
    table = Table(title="presets; any other combination of the axes can be written in a zoo file", box=SIMPLE_HEAD)
    for name in ("method", "keys", "values", "schedule"):
        table.add_column(name, no_wrap=True)
    table.add_column("source", ratio=1)
    for method in METHODS.values():
        schedule = method.schedule.name
        schedule += f"\n{method.schedule.spectrum}" if isinstance(method.schedule, Energy) else ""
        schedule += "\ntrained" if method.training else ""
        table.add_row(method.name, axes_text(method.keys), axes_text(method.values), schedule, method.source)
    screen = console()
    screen.print(table)
    screen.print(
        "axes: statistics, reader, block, space. Only methods of weights need no calibration text; where queries and "
        "keys are normed (Qwen3, Gemma 3) weights are no more than a proxy: calibrate."
    )
    return 0


def axes_text(axes: Axes) -> str:
    """The axes in a line, without those that are as nearly always."""
    values = {field.name: getattr(axes, field.name) for field in fields(Axes)}
    return "\n".join(
        value if name not in DEFAULTS else f"{name} {value}"
        for name, value in values.items()
        if DEFAULTS.get(name) != value
    )
