"""Unit costs of this machine, for `lorc plan --cluster`: `lorc bench units`.

Rates of float64 linear algebra, of running models and of reading and writing, with one thread; and what steps take
however small their model is, from the run of a zoo of tiny models. What one thread computes is measured in CPU seconds,
which other load on the machine moves least.
"""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.bench.timing import best_cpu_seconds_of, best_seconds_of, device_line, seconds_of
from jobs.bench.zoos.generated_zoo import write_generated_zoo
from jobs.bench.zoos.timed_run import StepTime, TimedRun, timed_run
from jobs.screen.console import console
from jobs.screen.fitted_table import Column, FittedTable
from lorc_core.decomposition import symmetric
from lorc_core.manifest import file_sha256
from lorc_core.model.architecture import architecture_of
from pipeline.costs import operations
from pipeline.costs.operations import ALGEBRA, Algebra, Operation
from pipeline.costs.units import Fixed, UnitCosts
from pipeline.costs.work import forward_flops
from pipeline.evaluation.losses import window_losses
from pipeline.steps.step import ModelSize
from pipeline.zoo.sections import Dtype

WIDTHS = (64, 128, 256, 512, 1024, 2048)
INNER = 4  # columns over rows of what is multiplied
LARGE = 1024  # timed once from here on: the widest take seconds
HIDDEN_SIZES = (64, 256, 1024)
GPU_HIDDEN_SIZE = 4096
WINDOW_TOKENS, WINDOWS = 256, 8
ARTIFACT_FLOATS = 1 << 24
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# The first run of a kind of step imports; the second and the third differ in their layers.
DEPTHS = {"first": 2, "shallow": 2, "deep": 18}
TINY_VARIANTS: tuple[dict[str, Any], ...] = (
    {"method": "lorc", "schedule": "uniform", "kept_fraction": [0.5, 0.25]},
    {"method": "kq_joint", "schedule": "fisher", "kept_fraction": 0.5},
)
TINY_TEXT = {"window_tokens": 32, "num_windows": 4, "batch_size": 4}
RANK_DEFICIENT = {"allow_rank_deficient": True}  # so short a text
# What a worker imports before its first step.
WORKER_IMPORTS = "import ray, torch; from pipeline.running import work"


def algebra_rates(widths: Sequence[int] = WIDTHS) -> dict[Algebra, dict[int, float]]:
    """Nominal float64 operations per second of each kind at several widths."""
    return {algebra: {width: algebra_rate(algebra, width) for width in widths} for algebra in ALGEBRA}


def algebra_rate(algebra: Algebra, width: int) -> float:
    rows = torch.randn(width, INNER * width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = symmetric.gram(rows)
    timed: dict[Algebra, tuple[Operation, Callable[[], object]]] = {
        "product": (operations.product(width, INNER * width, width), lambda: rows @ rows.T),
        "gram": (operations.gram(width, INNER * width), lambda: symmetric.gram(rows)),
        "eigh": (operations.spectral("eigh", width), lambda: symmetric.eigh(square)),
        "eigvalsh": (operations.spectral("eigvalsh", width), lambda: symmetric.eigvalsh(square)),
        "svd": (operations.spectral("svd", width), lambda: torch.linalg.svd(square)),
        "qr": (operations.reduced(width, INNER * width), lambda: torch.linalg.qr(rows.T, mode="r")),
    }
    operation, work = timed[algebra]
    return operation.flops / best_cpu_seconds_of(work, 1 if width >= LARGE else 5)


def forward_rate(hidden_size: int, dtype: Dtype, device: str) -> float:
    """Operations per second of scoring windows as an evaluation does."""
    config = LlamaConfig(
        vocab_size=4 * hidden_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=max(hidden_size // 64, 1),
    )
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()
    windows = np.random.default_rng(0).integers(0, config.vocab_size, (WINDOWS, WINDOW_TOKENS))
    size = ModelSize(architecture_of(config), sum(parameter.numel() for parameter in model.parameters()))
    best = best_seconds_of if device == "cuda" else best_cpu_seconds_of
    best_s = best(lambda: window_losses(model, windows, batch_size=4), 3)
    return forward_flops(size, windows.size, WINDOW_TOKENS) / best_s


def file_rates(directory: Path) -> tuple[float, float]:
    """Bytes per second of reading a file from the disk, and of writing one and its hash."""
    path = directory / "artifact.safetensors"
    tensors = {"up": torch.randn(ARTIFACT_FLOATS)}

    def write() -> None:
        save_file(tensors, path)
        file_sha256(path)

    write_s = best_seconds_of(write, 3)
    read_s = [seconds_of(path.read_bytes) for _ in range(3) if leave_cache(path)]
    return 4 * ARTIFACT_FLOATS / median(read_s), 4 * ARTIFACT_FLOATS / write_s


def leave_cache(path: Path) -> bool:
    """Have the system's cache forget a file, so that it is read from the disk; always true."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def worker_seconds() -> float:
    """CPU seconds of a new process with what a worker imports, the least of three."""
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-c", WORKER_IMPORTS], check=True)
        after = os.times()
        used = after.children_user - before.children_user + after.children_system - before.children_system
        seconds.append(used)
    return min(seconds)


def tiny_runs(directory: Path) -> list[TimedRun]:
    """Two runs of a zoo of tiny models on one worker: what is left is what no model is too small for."""
    shapes = {name: TINY | {"num_hidden_layers": depth} for name, depth in DEPTHS.items()}
    zoo = write_generated_zoo(
        directory / "zoo", "tiny", shapes, TINY_VARIANTS, calibration=TINY_TEXT | RANK_DEFICIENT, evaluation=TINY_TEXT
    )
    return [timed_run(zoo, directory / f"work-{number}", num_cpus=1) for number in range(2)]


def model_load_s(run: TimedRun) -> float:
    """Of opening a tiny model: what the first step of an evaluation takes beyond its others."""
    baseline = median(times_of(run, "evaluate", "shallow", baseline=True))
    return max(baseline - median(times_of(run, "evaluate", "shallow", baseline=False)), 0.0)


def times_of(run: TimedRun, kind: str, model: str, *, baseline: bool = False) -> list[float]:
    """CPU seconds of one kind of step of one model."""
    same = (step for step in run.steps if (step.name, step.model) == (kind, model))
    return [step.cpu_s for step in same if (step.variant == "baseline") == baseline]


def fixed_costs(run: TimedRun, load_s: float) -> dict[str, Fixed]:
    """By kind of step, from the second models' steps; what the first one of all took more is imports."""
    fixed: dict[str, Fixed] = {}
    for kind in dict.fromkeys(step.name for step in run.steps):
        shallow, deep = (median(times_of(run, kind, model) or [0.0]) for model in ("shallow", "deep"))
        shared = load_s if kind in ("calibrate", "probe") else 0.0
        layer_s = max(deep - shallow, 0.0) / (DEPTHS["deep"] - DEPTHS["shallow"])
        if kind == "decompose":  # of one layer each
            layer_s = 0.0
        step_s = max(shallow - layer_s * DEPTHS["shallow"] - shared, 0.0)
        first = min((step for step in run.steps if step.name == kind), key=lambda step: step.started)
        opened = load_s if kind == "evaluate" else shared
        first_s = max(first.cpu_s - step_s - layer_s * DEPTHS["first"] - opened, 0.0)
        fixed[kind] = Fixed(first_s=first_s, step_s=step_s, layer_s=layer_s)
    return fixed


def task_seconds(run: TimedRun) -> float:
    """Between the end of one task and the start of the next, where the worker had nothing to wait for."""
    decompositions = sorted((step for step in run.steps if step.name == "decompose"), key=lambda step: step.started)
    return median(gaps(decompositions))


def gaps(steps: Sequence[StepTime]) -> Iterator[float]:
    for before, after in itertools.pairwise(steps):
        if before.model == after.model:
            yield max(after.started - before.ended, 0.0)


def measure_units(directory: Path) -> UnitCosts:
    """All unit costs of this machine.

    Args:
        directory: For files that are of no use afterwards.
    """
    threads = torch.get_num_threads()
    runs, worker_s = tiny_runs(directory), worker_seconds()
    run = min(runs, key=lambda run: run.wall_s)
    load_s = model_load_s(run)
    torch.set_num_threads(1)
    try:
        read_rate, artifact_rate = file_rates(directory)
        dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
        cpu: dict[Dtype, dict[int, float]] = {
            dtype: {size: forward_rate(size, dtype, "cpu") for size in HIDDEN_SIZES} for dtype in dtypes
        }
        gpu: dict[Dtype, float] = {}
        if torch.cuda.is_available():
            gpu = {dtype: forward_rate(GPU_HIDDEN_SIZE, dtype, "cuda") for dtype in (*dtypes, "float16")}
        return UnitCosts(
            measured_on=f"{device_line()}, {time.strftime('%Y-%m-%d')}",
            algebra_flops_per_s=algebra_rates(),
            cpu_flops_per_s=cpu,
            gpu_flops_per_s=gpu,
            read_bytes_per_s=read_rate,
            artifact_bytes_per_s=artifact_rate,
            start_s=max(min(step.started for run in runs for step in run.steps) - worker_s, 0.0),
            end_s=min(run.wall_s - max(step.told for step in run.steps) for run in runs),
            worker_s=worker_s,
            task_s=task_seconds(run),
            load_s=load_s,
            steps=fixed_costs(run, load_s),
        )
    finally:
        torch.set_num_threads(threads)


def rates_table(units: UnitCosts) -> FittedTable:
    """Rates by width."""
    widths = sorted({width for rates in units.algebra_flops_per_s.values() for width in rates})
    title = "GFLOP/s of one thread by width or hidden size; of decompositions in cubes of the width"
    table = FittedTable("", [Column(str(width)) for width in widths], title)
    named = {f"{name}, float64": rates for name, rates in units.algebra_flops_per_s.items()}
    named |= {f"model, {name}": rates for name, rates in units.cpu_flops_per_s.items()}
    for name, rates in named.items():
        table.add_row(name, *(f"{rates[width] / 1e9:.2f}" if width in rates else "" for width in widths))
    return table


def fixed_table(units: UnitCosts) -> FittedTable:
    """What steps take however small the model is."""
    table = FittedTable("step", [Column("first, s"), Column("each, s"), Column("layer, ms")])
    for name, fixed in units.steps.items():
        table.add_row(name, f"{fixed.first_s:.2f}", f"{fixed.step_s:.3f}", f"{1e3 * fixed.layer_s:.2f}")
    return table


def write_units(units: UnitCosts, path: Path) -> None:
    """As YAML, which `read_units` reads, with four digits."""
    path.write_text(yaml.safe_dump(rounded(units.model_dump(mode="json")), sort_keys=False))


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(output: Path | None) -> None:
    """Print both tables, and write the file if one is named."""
    screen = console()
    with screen.status("measuring"), TemporaryDirectory() as directory:
        elapsed: list[UnitCosts] = []
        took_s = seconds_of(lambda: elapsed.append(measure_units(Path(directory))))
    (units,) = elapsed
    screen.print(f"{units.measured_on}; measured in {took_s:.0f} s")
    screen.print(rates_table(units))
    screen.print(fixed_table(units))
    screen.print(
        f"start {units.start_s:.1f} s, worker {units.worker_s:.1f} s, end {units.end_s:.1f} s, task "
        f"{1e3 * units.task_s:.0f} ms, model {1e3 * units.load_s:.0f} ms; reading weights "
        f"{units.read_bytes_per_s / 1e9:.2f} GB/s, artifacts {units.artifact_bytes_per_s / 1e9:.2f} GB/s"
    )
    if output is not None:
        write_units(units, output)
        screen.print(f"written to {output}")
