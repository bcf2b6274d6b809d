"""Wall-clock seconds of work on this device, and what the device is."""

import time
from collections.abc import Callable

import torch


def device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_line() -> str:
    """The device and the version of torch, as every benchmark prints them first."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}"


def seconds_of(work: Callable[[], object]) -> float:
    """Of one run, with all that it left to the GPU."""
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def best_seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Least of several runs: other load on the machine only adds."""
    return min(seconds_of(work) for _ in range(repeats))


def best_cpu_seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Least CPU seconds of all threads: of one thread that never waits, about what it takes on an idle machine."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def wait() -> None:
    """Until the GPU has done what was left to it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
