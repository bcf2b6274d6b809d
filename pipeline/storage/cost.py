"""What a step took: time, memory, bytes read, and how often it was begun."""

import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from lorc_core.model.stored.files import ModelFiles


@dataclass(frozen=True)
class Cost:
    """What a step took, kept with its artifact, so that a run that finds it done can tell.

    Attributes:
        wall_s: Seconds that passed.
        cpu_s: User and system time of all threads of the process; of processes that it started it is not counted.
        peak_bytes: The most memory that the process held while the step ran, what it had loaded before included;
            without that of GPUs. None where the system does not tell it for a part of a process's life.
        read_bytes: What the system's read calls returned, whether from storage or from its cache, code that was
            imported included, and what was read of models elsewhere; not what was read by mapping a file into memory,
            nor whole models that were fetched. None where the system does not tell.
        host: Where it ran.
        attempts: How often it was begun, by workers that were lost and in earlier runs too.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int | None
    read_bytes: int | None
    host: str
    attempts: int


class Meter:
    """Measures from when it is made.

    Attributes:
        attempts: How often what it measures was begun; 0 until that is known.
        parts: What parts of it cost that were done elsewhere, beside each other.
    """

    def __init__(self) -> None:
        self.attempts = 0
        self.parts: Sequence[Cost] = ()
        self.peak_is_known = forget_peak()
        self.read_before = read_so_far()
        self.cpu_before, self.wall_before = time.process_time(), time.perf_counter()

    def cost(self) -> Cost:
        """Up to now, with that of the parts."""
        own = self.own_cost()
        return with_parts(own, self.parts) if self.parts else own

    def own_cost(self) -> Cost:
        read = read_so_far()
        return Cost(
            wall_s=time.perf_counter() - self.wall_before,
            cpu_s=time.process_time() - self.cpu_before,
            peak_bytes=peak() if self.peak_is_known else None,
            read_bytes=None if read is None or self.read_before is None else read - self.read_before,
            host=socket.gethostname(),
            attempts=self.attempts,
        )


def with_parts(own: Cost, parts: Sequence[Cost]) -> Cost:
    """Of something whose parts were done beside each other: the longest counts, and the largest; the work of all."""
    peaks, reads = [part.peak_bytes for part in parts], [part.read_bytes for part in (own, *parts)]
    return Cost(
        wall_s=own.wall_s + max(part.wall_s for part in parts),
        cpu_s=own.cpu_s + sum(part.cpu_s for part in parts),
        peak_bytes=None if None in peaks else max(peak for peak in peaks if peak is not None),
        read_bytes=None if None in reads else sum(read for read in reads if read is not None),
        host=", ".join(dict.fromkeys(part.host for part in parts)),
        attempts=max(part.attempts for part in parts),
    )


def forget_peak() -> bool:
    """Have the process's peak memory begin again from what it holds; False where no system call does that.

    Source: `clear_refs` in https://docs.kernel.org/filesystems/proc.html; a process may do it to itself.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    """The most memory held since the process began or forgot, in bytes."""
    kibibytes = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert kibibytes is not None
    return int(kibibytes[1]) * 1024


def read_so_far() -> int | None:
    """Bytes that the process's read calls returned, which those of sockets are not, and those of models elsewhere."""
    try:
        return int(psutil.Process().io_counters().read_chars) + ModelFiles.fetched_bytes
    except (AttributeError, psutil.AccessDenied):  # macOS has no such count; a container may hide it
        return None
