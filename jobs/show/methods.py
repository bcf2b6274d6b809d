"""Print the methods that lorc knows: `lorc methods`."""

from jobs.screen.console import console
from jobs.screen.fitted_table import Column, FittedTable
from lorc_core.methods import METHODS, Method
from lorc_core.model.kinds import KINDS
from lorc_core.ranks.schedules import Energy

AXES = ("statistics", "reader", "block", "space")  # the others are as by default in every preset


def show_methods() -> int:
    """Print the presets. Returns the exit code."""
    screen = console()
    screen.print(methods_table())
    screen.print(
        "\nAny other combination of the axes can be written in a zoo file. Only methods of weights need no calibration "
        "text; where queries and keys are normed (Qwen3, Gemma 3) weights are no more than a proxy: calibrate."
    )
    return 0


def methods_table() -> FittedTable:
    """The axes of keys and of values below each preset's name and schedule, its source below them."""
    table = FittedTable("", [Column(axis, align_right=False) for axis in AXES])
    for method in METHODS.values():
        table.add_heading(f"{method.name}, schedule {schedule_text(method)}")
        for kind in KINDS:
            axes = method.axes(-1, kind)
            table.add_row(f"  {kind}", *(getattr(axes, axis) for axis in AXES))
        table.add_row("", note=method.source)
    return table


def schedule_text(method: Method) -> str:
    """The schedule that a preset has of itself, and whether its factors are trained."""
    spectrum = f", spectrum {method.schedule.spectrum}" if isinstance(method.schedule, Energy) else ""
    return f"{method.schedule.name}{spectrum}{', trained' if method.training else ''}"
