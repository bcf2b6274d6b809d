"""Benchmark of a zoo at scale: `lorc bench scale`.

What is read of a model of 70B, and the memory that takes; what a step costs beside its own work; what a second worker
is worth. Everything is real but the models: large ones have the shapes of keys and values and holes elsewhere.
"""

import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

import psutil
import pyarrow.parquet as pq
import ray
from rich.console import Console
from transformers import AutoModelForCausalLM

from jobs.bench.timing import device_line
from jobs.bench.zoos.checkpoints import save_with_holes
from jobs.bench.zoos.generated_zoo import write_generated_zoo, write_zoo
from jobs.bench.zoos.hub import Hub
from jobs.screen.console import console, size
from pipeline.running.runner import run_steps
from pipeline.running.work import run_group
from pipeline.steps.outcome import Listener, Outcome, Started
from pipeline.steps.step import Step, distinct
from pipeline.storage.store import Store
from pipeline.waiting import Patience
from pipeline.zoo.file import load_zoo
from pipeline.zoo_run import ZooRun, plan_steps, run_zoo

LAYERS = (2, 10)  # of the large model; what grows from one to the other grows with its layers
MODELS, KEPT = 40, (0.75, 0.5, 0.25)
STAGE_LAYERS = 36  # a stage of half a minute for one worker

VARIANTS = [{"method": "lorc", "schedule": "uniform", "kept_fraction": list(KEPT)}]
EVALUATION = {"window_tokens": 64, "num_windows": 8}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def zoo_of_large(directory: Path, source: str) -> Path:
    """A zoo file of one large model."""
    model = {"name": "large", "source": source, "dtype": "bfloat16"}
    return write_zoo(directory, "scale", [model], VARIANTS, evaluation=EVALUATION)


@dataclass(frozen=True)
class Reading:
    """What compressing a large model of a hub took.

    Attributes:
        needed_bytes: Of keys and values.
        sent_bytes: Of weights that the hub gave out.
        step_bytes: Read by a decomposition, the median of all, over those of its layer.
        worker_bytes: The most memory that a worker held while it decomposed.
        driver_bytes: The most that the driver held.
    """

    needed_bytes: int
    sent_bytes: int
    step_bytes: float
    worker_bytes: int
    driver_bytes: int


def reading(directory: Path, num_layers: int) -> Reading:
    """Run `lorc compress` on a model that is on a hub, in a process of its own."""
    needed = save_with_holes(directory / "large", num_layers)
    zoo_file = zoo_of_large(directory, "lab/large")
    with Hub({"lab/large": directory / "large"}) as hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(directory / "hf"),
            "LORC_CACHE": str(directory / "cache"),
            "RAY_ADDRESS": "",
        }
        command = [sys.executable, "-m", "jobs.cli", "compress", str(zoo_file), "--workdir", str(directory / "work")]
        driver = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
        peak = peak_of(driver)
        if driver.returncode:
            raise RuntimeError(f"{' '.join(command)} failed")
    rows = pq.read_table(directory / "work" / "tables" / "outcomes" / "scale.parquet").to_pylist()
    steps = [row for row in rows if row["step"].startswith("decompose-")]
    return Reading(
        needed_bytes=needed,
        sent_bytes=hub.weight_bytes_sent,
        step_bytes=median(row["read_bytes"] for row in steps) / (needed / num_layers),
        worker_bytes=max(row["peak_bytes"] for row in steps),
        driver_bytes=peak,
    )


def peak_of(process: subprocess.Popen[bytes]) -> int:
    """The most memory that was seen in use by a process, in bytes, when it has ended."""
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    process.wait()
    return peak


class Clock(Listener):
    """Notes when the first step began and the last one ended."""

    def __init__(self) -> None:
        self.first, self.last = float("inf"), 0.0
        self.costs: list[float] = []

    def start(self, started: Started) -> None:
        self.first = min(self.first, started.at)

    def record(self, outcome: Outcome) -> None:
        self.last = time.time()
        assert outcome.error is None, outcome.error
        assert outcome.cost is not None
        self.costs.append(outcome.cost.wall_s)


@dataclass(frozen=True)
class Scheduling:
    """What many small models took.

    Attributes:
        num_steps: That ran.
        num_workers: That ran them.
        wall_s: From the first step's begin to the last one's end.
        idle_s: For each step, how long a worker ran none.
        loads: Of one base model, for it and its variants.
    """

    num_steps: int
    num_workers: int
    wall_s: float
    idle_s: float
    loads: int


def scheduling(directory: Path) -> Scheduling:
    """Evaluate variants of many small models on a Ray of this process."""
    shapes = {f"small-{number}": SMALL for number in range(MODELS)}
    cluster = {"models_in_flight": MODELS}
    zoo = load_zoo(write_generated_zoo(directory, "scale", shapes, VARIANTS, evaluation=EVALUATION, cluster=cluster))
    clock = Clock()
    with workers(os.cpu_count() or 1) as num_workers:
        run = run_zoo(zoo, directory / "work", until="evaluate", listener=clock)
    wall_s = clock.last - clock.first
    idle_s = (num_workers * wall_s - sum(clock.costs)) / len(clock.costs)
    return Scheduling(len(clock.costs), num_workers, wall_s, idle_s, base_loads(run))


def base_loads(run: ZooRun) -> int:
    """How often a model is loaded when it and all of its variants are evaluated, as a worker does it."""
    model = run.models[0]
    evaluations = [model.baseline, *(variant.evaluate for variant in model.variants)]
    for step in evaluations:
        run.store.put_aside(step.key)
    with patch.object(AutoModelForCausalLM, "from_pretrained", wraps=AutoModelForCausalLM.from_pretrained) as loads:
        told = [told for told in run_group(evaluations, run.store) if isinstance(told, Outcome)]
    assert [outcome.error for outcome in told] == [None] * len(evaluations)
    return loads.call_count


def stage_seconds(steps: list[Step], directory: Path, num_workers: int) -> float:
    """Of decomposing, by so many workers with a thread each, whose start counts."""
    with workers(num_workers), tempfile.TemporaryDirectory(dir=directory) as work:
        store = Store(Path(work))
        started = time.perf_counter()
        outcomes = run_steps(steps, {}, store, load_zoo(directory / "zoo.yaml").cluster, Listener())
        seconds = time.perf_counter() - started
    assert all(outcome.error is None for outcome in outcomes)
    return seconds


@contextmanager
def workers(number: int) -> Iterator[int]:
    """A Ray of this process, with so many CPUs."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray writes one to the home directory
    ray.init("local", num_cpus=number, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield number
    finally:
        ray.shutdown()


def decompositions(directory: Path) -> list[Step]:
    """The steps that decompose a model in a directory, of more layers."""
    save_with_holes(directory / "large", STAGE_LAYERS)
    zoo = load_zoo(zoo_of_large(directory, "./large"))
    (model,), _ = plan_steps(zoo, Store(directory / "planned"), Listener(), Patience(0))
    return distinct(model.decompose["lorc"])


def show_reading(screen: Console, directory: Path) -> None:
    for num_layers in LAYERS:
        (directory / str(num_layers)).mkdir()
        with screen.status(f"compressing {num_layers} layers of 70B"):
            read = reading(directory / str(num_layers), num_layers)
        over = read.sent_bytes / read.needed_bytes
        screen.print(f"{num_layers} layers of 70B shapes on a hub, {len(KEPT)} variants")
        screen.print(
            f"  keys and values {size(read.needed_bytes)}; the hub sent {size(read.sent_bytes)}, {over:.3f} times"
        )
        screen.print(f"  a decomposition read {read.step_bytes:.3f} times its layer's, the median of all")
        screen.print(f"  memory at most: a worker {size(read.worker_bytes)}, the driver {size(read.driver_bytes)}")


def show_scheduling(screen: Console, directory: Path) -> None:
    with screen.status(f"evaluating {MODELS} small models"):
        found = scheduling(directory)
    screen.print(f"{MODELS} small models, {len(KEPT)} variants each, {found.num_workers} workers")
    screen.print(f"  {found.num_steps} steps in {found.wall_s:.0f} s")
    screen.print(f"  beside its steps a worker took {found.idle_s * 1e3:.0f} ms for each")
    screen.print(f"  base loads of a model, for it and its variants: {found.loads}")


def show_workers(screen: Console, directory: Path, repeats: int) -> None:
    steps = decompositions(directory)
    one, two = [], []
    for turn in range(repeats):
        with screen.status(f"decomposing {STAGE_LAYERS} layers with one worker and with two, turn {turn + 1}"):
            one.append(stage_seconds(steps, directory, 1))
            two.append(stage_seconds(steps, directory, 2))
    gains = ", ".join(f"{alone / both:.2f}" for alone, both in zip(one, two, strict=True))
    screen.print(f"{STAGE_LAYERS} layers of 70B shapes decomposed, one thread a worker, medians of {repeats}")
    screen.print(f"  one worker {median(one):.1f} s, two {median(two):.1f} s: {median(one) / median(two):.2f} times")
    screen.print(f"  turn by turn {gains} times")


def main(repeats: int) -> None:
    """Print all figures."""
    screen = console()
    screen.print(device_line())
    with tempfile.TemporaryDirectory(prefix="lorc-bench-") as scratch:
        for name in ("reading", "scheduling", "workers"):
            (Path(scratch) / name).mkdir()
        show_reading(screen, Path(scratch) / "reading")
        show_scheduling(screen, Path(scratch) / "scheduling")
        show_workers(screen, Path(scratch) / "workers", repeats)
