"""A simulated run as a table: each model's GPUs, work, and time from the start; and what the whole cluster does."""

from jobs.screen.console import duration, size
from jobs.screen.fitted_table import Column, FittedTable
from pipeline.simulation.forecast import Forecast, ModelForecast, busy_shares
from pipeline.zoo.sections import GIB

COLUMNS = (
    Column("GPUs"),
    Column("node", importance=3),
    Column("decompose", importance=4),
    Column("GPU time", importance=5),
    Column("reads", importance=1),
    Column("starts", importance=2),
    Column("ends"),
)


def forecast_table(forecast: Forecast) -> FittedTable:
    """A row for each model, in the order in which they end; those that cannot be run last, with the reason."""
    title = "simulated run, from nothing done; GPUs x GiB that the fullest holds"
    table = FittedTable("model", COLUMNS, title)
    for model in sorted(forecast.models, key=lambda model: model.ended):
        table.add_row(
            model.entry.name,
            gpus_line(model),
            model.placement.kind.name,
            duration(model.decompose_s),
            duration(model.gpu_s) if model.gpu_s else "",
            size(model.read_bytes),
            duration(model.started),
            duration(model.ended),
            note=offload_line(model),
        )
    for name, reason in forecast.refused.items():
        table.add_row(name, note=reason)
    return table


def gpus_line(model: ModelForecast) -> str:
    """How many GPUs, and the most that one of them holds."""
    held = model.placement.gpu_bytes
    return f"{len(held)} x {max(held) / GIB:.1f}" if held else "CPU"


def offload_line(model: ModelForecast) -> str:
    """What of the weights the GPUs cannot hold."""
    offloaded = model.placement.offloaded_bytes
    return (
        f"{size(offloaded)} of its weights stay in the node's memory and are copied at each pass" if offloaded else ""
    )


def totals(forecast: Forecast) -> str:
    """The whole run in a few lines."""
    schedule, (cpu_share, gpu_share) = forecast.schedule, busy_shares(forecast)
    gpus = f"; {schedule.gpu_s / 3600:.1f} GPU hours, GPUs busy {gpu_share:.0%}" if gpu_share is not None else ""
    return (
        f"wall time {duration(schedule.wall_s)}; longest chain of steps {duration(forecast.critical_s)}\n"
        f"{schedule.cpu_s / 3600:.1f} CPU hours, CPUs busy {cpu_share:.0%}{gpus}\n"
        f"{size(schedule.read_bytes)} of model files read; {len(schedule.intervals)} steps"
    )
