"""What a step took of the process that ran it."""

import contextlib
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what makes Linux forget the most memory that a process had, man 5 proc


@dataclass(frozen=True)
class Cost:
    """What an artifact took to make, kept with it, so that a run that finds it done can tell.

    Attributes:
        wall_s: From beginning to end.
        cpu_s: Of all threads of its process.
        peak_bytes: The most memory that its process had meanwhile, the model it shares with others included; None
            where the system does not tell.
        read_bytes: What its process asked to read meanwhile, of files, sockets and pipes, cached by the system or not;
            None where the system does not tell.
        host: On which it ran.
        attempts: How often it was begun, by workers that were lost, too.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int | None
    read_bytes: int | None
    host: str
    attempts: int


class Meter:
    """Begins to measure when it is made."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            CLEAR_REFS.write_text(RESET_PEAK)
        self.began_s, self.began_cpu_s, self.began_read = time.perf_counter(), time.process_time(), read_so_far()

    def cost(self, attempts: int) -> Cost:
        """Of all since then."""
        read = read_so_far()
        return Cost(
            wall_s=time.perf_counter() - self.began_s,
            cpu_s=time.process_time() - self.began_cpu_s,
            peak_bytes=peak_bytes(),
            read_bytes=None if read is None or self.began_read is None else read - self.began_read,
            host=socket.gethostname(),
            attempts=attempts,
        )


def read_so_far() -> int | None:
    """Bytes that this process asked to read; None where the system does not tell."""
    process = psutil.Process()
    return process.io_counters().read_chars if psutil.LINUX else None


def peak_bytes() -> int | None:
    """The most memory since the last reset; None where there is no such account."""
    try:
        told = STATUS.read_text()
    except OSError:
        return None
    line = next((line for line in told.splitlines() if line.startswith("VmHWM:")), None)
    return None if line is None else int(line.split()[1]) * 1024
