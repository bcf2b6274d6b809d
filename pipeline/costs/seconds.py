"""Seconds of a step, from its work and unit costs, on a CPU or a GPU."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.costs.operations import Operation
from pipeline.costs.units import Fixed, UnitCosts, default_units, rate_at
from pipeline.costs.work import Work, work_of
from pipeline.steps.step import ModelStep, Need, Step

# Kinds of steps that the bench does not run, by one that does the same around its own work.
LIKE = {
    "search": "evaluate",
    "train": "evaluate",
    "regress": "evaluate",
    "change_basis": "decompose",
    "gradients": "calibrate",
}
NOTHING = Fixed()
MOMENTS_ON_GPU = 0.4  # of a forward pass, at most; measured on a CPU: `lorc bench calibrate` in docs/benchmarks.md


@dataclass(frozen=True)
class StepSeconds:
    """Where the time of a step goes.

    Attributes:
        first_s: More, where its kind is the first in its process.
        load_s: Of opening the model, which steps of a batch share, without reading it.
        work_s: Everything else but reading.
        reads: Bytes of model files, by what they are; see `Work`.
    """

    first_s: float
    load_s: float
    work_s: float
    reads: dict[str, int] = field(default_factory=dict)

    @property
    def read_bytes(self) -> int:
        return sum(self.reads.values())


def seconds_parts(step: Step, units: UnitCosts, copy_s: float = 0.0) -> StepSeconds:
    """What a step takes where unit costs hold.

    Args:
        step: Of any kind.
        units: Of the machine; with a GPU's rate if the step asks for one, else a CPU's is taken.
        copy_s: Of each pass of the model, for weights that do not fit the GPUs.
    """
    work, need = work_of(step), step.need or Need()
    fixed = fixed_of(step, units)
    work_s = fixed.step_s + fixed.layer_s * work.layers + work.artifact_bytes / units.artifact_bytes_per_s
    dtype = step.loads.dtype if isinstance(step, ModelStep) else "float32"
    if need.num_gpus and dtype in units.gpu_flops_per_s:
        extra = MOMENTS_ON_GPU if work.operations else 0.0
        # accelerate spreads layers over GPUs, which work one after another: several have one's speed
        rate = units.gpu_flops_per_s[dtype]
        work_s += work.forward_flops * (1 + extra) / rate + work.passes * copy_s
    else:
        threads = max(1, math.floor(need.num_cpus))
        work_s += (algebra_s(work.operations, units) + forward_s(work, step, units)) / threads
    load_s = units.load_s if isinstance(step, ModelStep) else 0.0
    return StepSeconds(fixed.first_s, load_s, work_s, dict(work.reads))


def fixed_of(step: Step, units: UnitCosts) -> Fixed:
    return units.steps.get(step.name) or units.steps.get(LIKE.get(step.name, ""), NOTHING)


def algebra_s(operations: Sequence[Operation], units: UnitCosts) -> float:
    """On one thread."""
    rates = units.algebra_flops_per_s
    return sum(op.flops / rate_at(rates[op.algebra], op.width) for op in operations)


def forward_s(work: Work, step: Step, units: UnitCosts) -> float:
    """On one thread."""
    if not work.forward_flops or not isinstance(step, ModelStep):
        return 0.0
    assert step.loads.size is not None  # else there is no work
    rates = units.cpu_flops_per_s
    by_width = rates.get(step.loads.dtype) or rates["float32"]  # type: ignore[call-overload]
    return work.forward_flops / rate_at(by_width, step.loads.size.architecture.hidden_size)


def seconds_of(step: Step, units: UnitCosts | None = None) -> float:
    """About how long a step takes alone in a process that has begun, its model's loading included.

    Args:
        step: Of any kind; only its shapes are looked at.
        units: Of the machine; some machine's if absent, which serves to tell longer steps from shorter ones.
    """
    units = units or default_units()
    parts = seconds_parts(step, units)
    return parts.load_s + parts.work_s + parts.read_bytes / units.read_bytes_per_s
