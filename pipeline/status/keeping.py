"""The file that says how a run stands, written while it goes on, at most once a second, and at its end."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lorc_core.errors import first_line
from pipeline.status.status import STATUS_FILE, status_json
from pipeline.status.watch import Watch
from pipeline.storage.store import Store
from pipeline.waiting import passing_obstacle

EVERY_S = 1.0


@contextmanager
def kept_status(store: Store, zoo: str) -> Iterator[Watch]:
    """A listener; what it is told while the block runs is in the file about a second later.

    Args:
        store: Of the work directory that has the file.
        zoo: The zoo's name.
    """
    watch, stopped = Watch(zoo), threading.Event()
    write(watch, store)
    writer = threading.Thread(target=write_often, args=(watch, store, stopped), daemon=True)
    writer.start()
    error: str | None = "it was stopped"
    try:
        yield watch
        error = None
    except Exception as raised:
        error = first_line(raised)
        raise
    finally:
        stopped.set()
        writer.join()
        watch.end(error)
        write(watch, store)


def write_often(watch: Watch, store: Store, stopped: threading.Event) -> None:
    written = 0
    while not stopped.wait(EVERY_S):
        if watch.changes != written:
            written = watch.changes
            write(watch, store)


def write(watch: Watch, store: Store) -> None:
    """Replace the file at once; where storage is full or away the next time will do."""
    path = store.place(STATUS_FILE)
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(status_json(watch.status()))
        partial.rename(path)
        store.publish(path)
    except Exception as error:
        if not isinstance(error, OSError) and passing_obstacle(error) is None:
            raise
