"""One run at a time in a work directory of an object store, by its one promise: of two that make an object, one does.

Leases are numbered. Who finds none, or the last one's holder gone, makes the next; its heartbeat writes it again. Ages
are by the object store's clock.
"""

import _thread
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

from lorc_core.errors import ConfigError
from pipeline.storage.lease import HEARTBEAT_S, STOP, Holder, stoppable
from pipeline.storage.mirror import MirroredStore


@contextmanager
def remote_lease(store: MirroredStore) -> Iterator[None]:
    """Hold a work directory in an object store while the block runs.

    Args:
        store: Of the work directory.

    Raises:
        ConfigError: Another run holds it, or took it over while this process did not run; the message names its process
            and host.
    """
    holder = Holder.this_process()
    while (number := taken(store, holder)) is None:
        pass
    stopped = threading.Event()
    heartbeat = threading.Thread(target=renew, args=(store, number, holder, stopped), daemon=True)
    heartbeat.start()
    try:
        with stoppable():
            yield
    except KeyboardInterrupt:
        if last(store) > number:
            other = read_holder(store, last(store))
            raise ConfigError(
                f"work directory {store.remote} was taken over by {other} while this process stood still"
            ) from None
        raise
    finally:
        stopped.set()
        heartbeat.join()
        with suppress(FileNotFoundError):
            store.system.rm_file(lease_url(store, number))


def taken(store: MirroredStore, holder: Holder) -> int | None:
    """The number of the lease that was made for the holder; None where another process was faster.

    Raises:
        ConfigError: Its holder is not gone.
    """
    before = last(store)
    if before:
        try:
            other, age_s = read_holder(store, before), age(store, lease_url(store, before))
        except FileNotFoundError:  # given back meanwhile
            return None
        if other is not None and not other.is_gone(age_s):
            raise ConfigError(
                f"work directory {store.remote} is in use by {other} (heartbeat {max(age_s, 0):.0f} s ago); wait for "
                "it, or take another --workdir"
            )
    try:
        store.system.pipe_file(lease_url(store, before + 1), content(holder), mode="create")
    except FileExistsError:
        return None
    if before:
        with suppress(FileNotFoundError):
            store.system.rm_file(lease_url(store, before))
    return before + 1


def renew(store: MirroredStore, number: int, holder: Holder, stopped: threading.Event) -> None:
    """The heartbeat; it stops the main thread where the lease is another's."""
    while not stopped.wait(HEARTBEAT_S):
        with suppress(OSError):  # of an object store that is away for a moment
            if last(store) > number:
                _thread.interrupt_main(STOP)
                return
            store.system.pipe_file(lease_url(store, number), content(holder))


def last(store: MirroredStore) -> int:
    """The highest number of a lease; 0 where there is none."""
    with suppress(FileNotFoundError):
        return max((int(Path(name).stem) for name in store.system.ls(store.at("lease"), detail=False)), default=0)
    return 0


def lease_url(store: MirroredStore, number: int) -> str:
    return store.at("lease", f"{number:08}.json")


def content(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def read_holder(store: MirroredStore, number: int) -> Holder | None:
    """Who holds a lease; None where it cannot be understood."""
    try:
        return Holder(**json.loads(store.system.cat_file(lease_url(store, number))))
    except (ValueError, TypeError):
        return None


def age(store: MirroredStore, url: str) -> float:
    """Seconds since an object was written."""
    clock = store.at(f".clock-{uuid4().hex}")
    store.system.pipe_file(clock, b"")
    try:
        return float((store.system.modified(clock) - store.system.modified(url)).total_seconds())
    finally:
        store.system.rm_file(clock)
