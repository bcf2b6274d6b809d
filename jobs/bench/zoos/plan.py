"""Benchmark of the plan: `lorc bench plan`.

Measures the unit costs of this machine, or takes those of a file, predicts the run of a zoo of generated models on it,
and then runs that zoo on a Ray node of its own: simulated over measured seconds, of the whole and of each kind of step.
Nothing of the predicted run is measured before.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from jobs.bench.zoos.generated_zoo import write_generated_zoo
from jobs.bench.zoos.timed_run import TimedRun, timed_run
from jobs.bench.zoos.units import measure_units
from jobs.screen.console import console
from jobs.screen.fitted_table import Column, FittedTable
from pipeline.costs.order import remaining_seconds
from pipeline.costs.seconds import StepSeconds
from pipeline.costs.units import UnitCosts, read_units
from pipeline.simulation.cluster import DeclaredCluster, NodeKind
from pipeline.simulation.forecast import forecast, nodes_of, step_seconds
from pipeline.simulation.schedule import Pace, Schedule, simulate
from pipeline.steps.step import Step
from pipeline.zoo.file import load_zoo
from pipeline.zoo.sections import GIB

NUM_CPUS = 2
WIDE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 512,
}
SHAPES = {
    "wide": WIDE,
    "grouped": WIDE | {"num_hidden_layers": 10, "num_attention_heads": 12, "num_key_value_heads": 6},
    "deep": WIDE
    | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}
VARIANTS: Sequence[dict[str, Any]] = (
    {"method": "lorc", "schedule": "progressive", "kept_fraction": 0.5},
    {"method": "lorc_q", "kept_fraction": 0.5},
    {"method": "kq_joint", "kept_fraction": [0.5, 0.25]},
)
CALIBRATION = {"window_tokens": 256, "num_windows": 8, "batch_size": 4, "allow_rank_deficient": True}
EVALUATION = {"window_tokens": 256, "num_windows": 8, "batch_size": 4}


def this_machine(units: UnitCosts, num_cpus: int = NUM_CPUS) -> DeclaredCluster:
    """One node with so many of this machine's CPUs."""
    memory = psutil.virtual_memory().total / GIB
    return DeclaredCluster(nodes=(NodeKind(name="here", num_cpus=num_cpus, memory_gib=memory),), units=units)


def comparison(schedule: Schedule, run: TimedRun) -> FittedTable:
    """By kind of step, seconds simulated and measured; CPU seconds say how much of the time others had the CPUs."""
    simulated = step_seconds(schedule)
    titles = "simulated, s", "measured, s", "of them CPU, s", "simulated / measured"
    table = FittedTable("step", [Column(title) for title in titles])
    rows = [(kind, simulated[kind], [step for step in run.steps if step.name == kind]) for kind in simulated]
    for kind, seconds, steps in [*rows, ("all steps", sum(simulated.values()), list(run.steps))]:
        measured, cpu_s = sum(step.seconds for step in steps), sum(step.cpu_s for step in steps)
        table.add_row(kind, f"{seconds:.1f}", f"{measured:.1f}", f"{cpu_s:.1f}", f"{seconds / measured:.2f}")
    table.add_row("whole run", f"{schedule.wall_s:.1f}", f"{run.wall_s:.1f}", "", f"{schedule.wall_s / run.wall_s:.2f}")
    return table


def rescheduled(schedule: Schedule, cluster: DeclaredCluster, run: TimedRun) -> float:
    """Seconds of the simulated run if each step took what steps of its kind, model and variant were measured to take.

    What is left of the difference to the measured run is the schedule's, not that of the steps' seconds.
    """
    measured: dict[tuple[str, str, str | None], list[float]] = defaultdict(list)
    for each in run.steps:
        measured[each.name, each.model, each.variant].append(each.seconds)

    def seconds_on(step: Step, kind: str | None) -> StepSeconds:
        return StepSeconds(0.0, 0.0, mean(measured[step.name, step.model, step.label]))

    steps = [interval.step for interval in schedule.intervals]  # the same as were run: models lie in directories
    units = cluster.units
    return simulate(
        steps,
        nodes_of(cluster),
        seconds_on,
        remaining=remaining_seconds(steps, lambda step: seconds_on(step, None).work_s),
        pace=Pace(units.start_s, units.end_s, units.worker_s, units.task_s),
    ).wall_s


def main(units_file: Path | None) -> None:
    """Print both sides."""
    screen = console()
    with TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "units").mkdir()
        with screen.status("measuring unit costs"):
            units = read_units(units_file) if units_file else measure_units(place / "units")
        zoo = write_generated_zoo(
            place / "zoo", "planned", SHAPES, VARIANTS, calibration=CALIBRATION, evaluation=EVALUATION
        )
        cluster = this_machine(units)
        schedule = forecast(load_zoo(zoo), cluster).schedule
        with screen.status(f"running for about {schedule.wall_s:.0f} s"):
            run = timed_run(zoo, place / "work", NUM_CPUS)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    screen.print(
        f"{units.measured_on}; {len(run.steps)} steps on {NUM_CPUS} CPUs; load of the machine at the end {load}"
    )
    screen.print(comparison(schedule, run))
    with_measured_s = rescheduled(schedule, cluster, run)
    screen.print(
        f"the simulated schedule with the measured seconds of the steps takes {with_measured_s:.1f} s, "
        f"{with_measured_s / run.wall_s:.2f} of the measured run"
    )
