"""Benchmark of the plan: `lorc bench plan`.

Measures the unit costs of this machine, predicts the run of a zoo of generated models on it, and then runs that zoo on
a Ray node of its own: simulated over measured seconds, of the whole and of each kind of step. Nothing of the run that is
predicted is measured before.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from jobs.bench.generated_zoo import write_generated_zoo
from jobs.bench.timed_run import TimedRun, timed_run
from jobs.bench.units import measure_units
from jobs.fitted_table import Column, FittedTable
from jobs.screen import console
from pipeline.costs.units import UnitCosts
from pipeline.simulation.cluster import DeclaredCluster, NodeKind
from pipeline.simulation.forecast import forecast, step_seconds
from pipeline.simulation.schedule import Schedule
from pipeline.zoo.file import load_zoo
from pipeline.zoo.sections import GIB

NUM_CPUS = 2
COMMON = {"max_position_embeddings": 512}
SHAPES: dict[str, dict[str, int]] = {
    "wide": COMMON
    | {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "middle": COMMON
    | {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "deep": COMMON
    | {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
}
VARIANTS: Sequence[dict[str, Any]] = (
    {"method": "lorc", "schedule": "progressive", "kept_fraction": [0.75, 0.5]},
    {"method": "lorc_q", "kept_fraction": [0.5, 0.25]},
    {"method": "kq_joint", "kept_fraction": [0.5, 0.25]},
)
CALIBRATION = {"window_tokens": 256, "num_windows": 16, "batch_size": 4}
EVALUATION = {"window_tokens": 256, "num_windows": 16, "batch_size": 4}


def this_machine(units: UnitCosts, num_cpus: int = NUM_CPUS) -> DeclaredCluster:
    """One node with so many of this machine's CPUs."""
    memory = psutil.virtual_memory().total / GIB
    return DeclaredCluster(nodes=(NodeKind(name="here", num_cpus=num_cpus, memory_gib=memory),), units=units)


def comparison(schedule: Schedule, run: TimedRun) -> FittedTable:
    """By kind of step, seconds simulated and measured."""
    kinds = list(dict.fromkeys(step.name for step in run.steps))
    simulated = step_seconds(schedule, kinds)
    table = FittedTable("step", [Column("simulated, s"), Column("measured, s"), Column("ratio")])
    for kind in kinds:
        measured = sum(step.seconds for step in run.steps if step.name == kind)
        table.add_row(kind, f"{simulated[kind]:.2f}", f"{measured:.2f}", f"{simulated[kind] / measured:.2f}")
    table.add_row("whole run", f"{schedule.wall_s:.2f}", f"{run.wall_s:.2f}", f"{schedule.wall_s / run.wall_s:.2f}")
    return table


def main() -> None:
    """Print both sides."""
    screen = console()
    with TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "units").mkdir()
        with screen.status("measuring unit costs"):
            units = measure_units(place / "units")
        zoo = write_generated_zoo(
            place / "zoo", "planned", SHAPES, VARIANTS, calibration=CALIBRATION, evaluation=EVALUATION
        )
        schedule = forecast(load_zoo(zoo), this_machine(units)).schedule
        with screen.status(f"running for about {schedule.wall_s:.0f} s"):
            run = timed_run(zoo, place / "work", NUM_CPUS)
    screen.print(f"{units.measured_on}; {len(run.steps)} steps on {NUM_CPUS} CPUs")
    screen.print(comparison(schedule, run))
