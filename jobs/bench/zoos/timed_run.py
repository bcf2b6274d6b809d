"""One run of a zoo with the time of each step, in a process of its own: `python -m jobs.bench.zoos.timed_run`.

For the benchmarks of whole runs, which measure what comes before the first step and after the last one, too.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lorc_core.errors import ArtifactError


@dataclass(frozen=True)
class StepTime:
    """When a step ran, in seconds from the start of the process, and how long it took itself."""

    key: str
    name: str
    model: str
    variant: str | None
    started: float
    seconds: float
    cpu_s: float
    told: float  # when the driver heard of its end

    @property
    def ended(self) -> float:
        return self.started + self.seconds


@dataclass(frozen=True)
class TimedRun:
    """Steps in the order in which the driver heard of their ends, and seconds of the whole process."""

    steps: tuple[StepTime, ...]
    wall_s: float


def timed_run(zoo: Path, workdir: Path, num_cpus: int) -> TimedRun:
    """Run a zoo on a Ray node of its own.

    Args:
        zoo: The zoo file.
        workdir: A new directory.
        num_cpus: Of the node.

    Raises:
        ArtifactError: A step failed, or the process did.
    """
    times = workdir.with_suffix(".json")
    began = time.time()
    command = [sys.executable, "-m", "jobs.bench.zoos.timed_run", zoo, workdir, num_cpus, times]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    wall_s = time.time() - began
    if done.returncode or not times.is_file():
        raise ArtifactError(f"the run of {zoo} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    steps = [StepTime(**row) for row in json.loads(times.read_text())]
    return TimedRun(tuple(shifted(step, began) for step in steps), wall_s)


def shifted(step: StepTime, began: float) -> StepTime:
    return replace(step, started=step.started - began, told=step.told - began)


def main(zoo: str, workdir: str, num_cpus: str, times: str) -> None:
    """In the process of the run; `times` is written with seconds since 1970."""
    import ray

    from pipeline.running.connection import connected
    from pipeline.steps.outcome import Listener, Outcome, Started
    from pipeline.zoo.file import load_zoo
    from pipeline.zoo_run import run_zoo

    class Times(Listener):
        """Notes when steps begin and end."""

        def __init__(self) -> None:
            self.started: dict[str, float] = {}
            self.steps: list[StepTime] = []

        def start(self, started: Started) -> None:
            self.started[started.key] = started.at

        def record(self, outcome: Outcome) -> None:
            if outcome.key in self.started and outcome.cost is not None:
                row = outcome.key, outcome.name, outcome.model, outcome.variant
                took = outcome.cost.wall_s, outcome.cost.cpu_s
                self.steps.append(StepTime(*row, self.started[outcome.key], *took, time.time()))

    listener, checked = Times(), load_zoo(zoo)
    ray.init(address="local", num_cpus=int(num_cpus), include_dashboard=False, log_to_driver=False)
    try:
        with connected(None, listener):
            done = run_zoo(checked, workdir, listener=listener)
    finally:
        ray.shutdown()
    if done.failures:
        sys.exit("; ".join(f"{outcome.key}: {outcome.error}" for outcome in done.failures))
    Path(times).write_text(json.dumps([asdict(step) for step in listener.steps]))


if __name__ == "__main__":
    main(*sys.argv[1:])
