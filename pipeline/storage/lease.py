"""One run at a time in a work directory: a lease with a heartbeat, which expires when its holder is gone.

A file made exclusively says who holds the directory; its time stamp is renewed while the run goes on. A holder on this
machine loses the lease when its process is gone, one elsewhere when its heartbeat is `EXPIRES_S` old.
"""

import _thread
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import psutil

from lorc_core.errors import ConfigError

LEASE_FILE = "lease.json"
HEARTBEAT_S = 5.0
EXPIRES_S = 60.0
STOP = signal.SIGUSR1  # by which the heartbeat stops the main thread; no process sends it


@dataclass(frozen=True)
class Holder:
    """A process that runs in a work directory; `token` tells it from any other."""

    host: str
    pid: int
    process_started: float
    since: str
    token: str

    @classmethod
    def this_process(cls) -> "Holder":
        pid = os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), pid, psutil.Process(pid).create_time(), since, uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_gone(self, age_s: float) -> bool:
        """Whether it runs no more. Of another machine its heartbeat tells; here its number may be a new process's."""
        if self.host != socket.gethostname():
            return age_s >= EXPIRES_S
        try:
            return abs(psutil.Process(self.pid).create_time() - self.process_started) > 1
        except psutil.NoSuchProcess:
            return True


@contextmanager
def lease(root: Path) -> Iterator[None]:
    """Hold a work directory while the block runs.

    Args:
        root: The work directory, which is there.

    Raises:
        ConfigError: Another run holds it, or took it over while this process did not run; the message names its process
            and host.
    """
    path, holder = root / LEASE_FILE, Holder.this_process()
    while not created(path, holder):
        take_over_expired(path)
    stopped = threading.Event()
    heartbeat = threading.Thread(target=renew, args=(path, holder, stopped), daemon=True)
    heartbeat.start()
    try:
        with stoppable():
            yield
    except KeyboardInterrupt:
        if (other := read_holder(path)) not in (holder, None):
            raise ConfigError(
                f"work directory {root} was taken over by {other} while this process stood still"
            ) from None
        raise
    finally:
        stopped.set()
        heartbeat.join()
        if read_holder(path) == holder:
            path.unlink(missing_ok=True)


@contextmanager
def stoppable() -> Iterator[None]:
    """While the block runs, `_thread.interrupt_main(STOP)` raises KeyboardInterrupt in it.

    That of SIGINT does nothing where SIGINT is ignored, as it is of what a script or nohup runs in the background.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(STOP, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(STOP, before)


def created(path: Path, holder: Holder) -> bool:
    """Make the lease, whole from the first moment; False where there is one already."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-") as written:
        json.dump(asdict(holder), written)
        written.flush()
        try:
            os.link(written.name, path)
        except FileExistsError:
            return False
    return True


def take_over_expired(path: Path) -> None:
    """Put a lease aside whose holder is gone; ConfigError where it is not."""
    holder = read_holder(path)
    try:
        age_s = now_on(path.parent) - path.stat().st_mtime
    except FileNotFoundError:  # given back meanwhile
        return
    if holder is not None and not holder.is_gone(age_s):
        raise ConfigError(
            f"work directory {path.parent} is in use by {holder} (heartbeat {max(age_s, 0):.0f} s ago); wait for it, "
            "or take another --workdir"
        )
    aside = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:  # another process was faster
        return
    if read_holder(aside) != holder:  # a lease made between the look and the rename: give it back
        with suppress(FileExistsError):  # a third was faster; who lost its lease sees so at its next heartbeat
            os.link(aside, path)
    aside.unlink()


def read_holder(path: Path) -> Holder | None:
    """Who holds the lease; None where nobody does or the file cannot be understood."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def renew(path: Path, holder: Holder, stopped: threading.Event) -> None:
    """The heartbeat; it stops the main thread where the lease is another's."""
    while not stopped.wait(HEARTBEAT_S):
        with suppress(OSError):  # of storage that is away for a moment
            if read_holder(path) not in (holder, None):
                _thread.interrupt_main(STOP)
                return
            os.utime(path)


def now_on(directory: Path) -> float:
    """The time by the clock that stamps files there, which may be another machine's."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".clock-") as probe:
        return os.stat(probe.name).st_mtime
