"""A work directory, held by one run at a time: the store that a run works in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.storage.lease import lease
from pipeline.storage.mirror import MirroredStore, open_store
from pipeline.storage.remote_lease import remote_lease
from pipeline.storage.store import Store


@contextmanager
def held_store(workdir: Path | str) -> Iterator[Store]:
    """The store of a work directory, held while the block runs; what dead runs left half-written in it is removed.

    Args:
        workdir: A directory, made if absent, or a URL.

    Raises:
        ConfigError: It is not writable, or another run holds it.
    """
    store = open_store(workdir)
    with remote_lease(store) if isinstance(store, MirroredStore) else lease(store.root):
        store.remove_scratch()
        yield store
