"""Unit costs: what `lorc bench units` measured on one machine, as a file that `lorc plan --cluster` reads."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from pipeline.costs.operations import ALGEBRA, Algebra
from pipeline.zoo.file import load_checked
from pipeline.zoo.sections import Dtype, Strict

Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Width = Annotated[int, Field(ge=1)]
Rates = Annotated[dict[Width, Positive], Field(min_length=1)]  # per second, by the width that they depend on
DEFAULT_UNITS = Path(__file__).with_name("default_units.yaml")
GPU_FLOPS_PER_S = 2e14  # of `default_units` alone, which orders steps: any figure far above a CPU's gives one order


class Fixed(Strict):
    """What a kind of step takes however small its model is.

    Attributes:
        first_s: More, the first time in a process: what it imports.
        step_s: Each time.
        layer_s: For each layer of the model.
    """

    first_s: Seconds = 0
    step_s: Seconds = 0
    layer_s: Seconds = 0


class UnitCosts(Strict):
    """Of one machine, with one thread, and of its GPU where it has one.

    Attributes:
        measured_on: Which.
        algebra_flops_per_s: Nominal float64 operations, by kind of operation and width.
        cpu_flops_per_s: Of running a model on one thread, by its dtype and hidden size.
        gpu_flops_per_s: Of running a model on one GPU, by its dtype; empty where none was measured.
        read_bytes_per_s: Of loading weights that are on the disk.
        artifact_bytes_per_s: Of writing an artifact and its hash, or reading it and looking at its hash.
        start_s: From the start of the process to its first task's.
        end_s: From the last step to the end of the process.
        worker_s: Of a new worker process, until its imports are done.
        task_s: Of handing a task to a worker that is there.
        load_s: Of opening a model, beside reading its weights.
        steps: By kind of step.
    """

    measured_on: str
    algebra_flops_per_s: dict[Algebra, Rates]
    cpu_flops_per_s: dict[Dtype, Rates]
    gpu_flops_per_s: dict[Dtype, Positive] = Field(default_factory=dict)
    read_bytes_per_s: Positive
    artifact_bytes_per_s: Positive
    start_s: Seconds
    end_s: Seconds
    worker_s: Seconds
    task_s: Seconds
    load_s: Seconds
    steps: dict[str, Fixed]

    @field_validator("algebra_flops_per_s")
    @classmethod
    def all_algebra(cls, rates: dict[Algebra, Rates]) -> dict[Algebra, Rates]:
        if missing := [name for name in ALGEBRA if name not in rates]:
            raise ValueError(f"has no {', '.join(missing)}")
        return rates

    @field_validator("cpu_flops_per_s")
    @classmethod
    def some_dtype(cls, rates: dict[Dtype, Rates]) -> dict[Dtype, Rates]:
        if "float32" not in rates:
            raise ValueError("has no float32")
        return rates


def read_units(path: Path) -> UnitCosts:
    """Unit costs from a file.

    Raises:
        ConfigError: It cannot be read, or something in it is wrong.
    """
    return load_checked(path, UnitCosts, "unit costs file")


@cache
def default_units() -> UnitCosts:
    """Those of the machine that this project was measured on: to say which of two steps is longer, anywhere."""
    gpu: dict[Dtype, float] = dict.fromkeys(("float32", "bfloat16", "float16"), GPU_FLOPS_PER_S)
    return read_units(DEFAULT_UNITS).model_copy(update={"gpu_flops_per_s": gpu})


def rate_at(rates: Mapping[int, float], width: float) -> float:
    """The rate at a width: a power law between the widths measured, and the nearest one's outside of them.

    Args:
        rates: At least one.
        width: At least 1.
    """
    widths = sorted(rates)
    after = bisect_left(widths, width)
    if after == 0 or after == len(widths):
        return rates[widths[min(after, len(widths) - 1)]]
    low, high = widths[after - 1], widths[after]
    share = math.log(width / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(rates[low]) + share * math.log(rates[high]))
