"""A look at a run from outside: its state, whether it still goes on, its logs. Nothing of it is changed."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorc_core.errors import ArtifactError, ConfigError
from pipeline.status.state import RunState
from pipeline.storage.lease import LEASE_FILE, Holder, read_holder

STATUS_FILE = "status.json"
LOGS = "logs"


@dataclass(frozen=True)
class Look:
    """What a work directory tells of the run that has it, or had it last.

    Attributes:
        state: Of the run.
        holder: The process that has the directory; None where no run has it.
        heartbeat_s: How old the holder's last sign of life is.
    """

    state: RunState
    holder: Holder | None
    heartbeat_s: float

    @property
    def at_work(self) -> bool:
        return self.holder is not None and not self.holder.is_gone(self.heartbeat_s)

    @property
    def died(self) -> bool:
        """Whether the run neither goes on nor ended by itself."""
        return not self.at_work and self.state.ended_at is None


def look(workdir: str) -> Look:
    """Look at a work directory.

    Args:
        workdir: A directory, or a URL.

    Raises:
        ConfigError: There is no run in it.
        ArtifactError: Its state cannot be understood.
    """
    read, name = reader(workdir)
    told = read(STATUS_FILE)
    if told is None:
        raise ConfigError(f"work directory {name}: no run was here, it has no {STATUS_FILE}")
    try:
        state = RunState.from_dict(json.loads(told))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{name}/{STATUS_FILE}: not the state of a run of this version of lorc ({error!r})"
        ) from error
    holder, age_s = remote_holder(workdir) if "://" in workdir else local_holder(Path(workdir))
    return Look(state, holder, age_s)


def log_of(workdir: str, key: str) -> str | None:
    """The log of a step that failed; None where there is none."""
    read, _ = reader(workdir)
    return read(f"{LOGS}/{key}.log")


def reader(workdir: str) -> tuple[Callable[[str], str | None], str]:
    """What reads a file of a work directory, None where it is absent; and the directory as anyone would find it."""
    if "://" in workdir:
        from pipeline.storage.mirror import mirrored  # it imports what takes a second

        store = mirrored(workdir)

        def read_remote(name: str) -> str | None:
            try:
                content: bytes = store.system.cat_file(store.at(name))
            except FileNotFoundError:
                return None
            return content.decode()

        return read_remote, store.name
    root = Path(workdir).resolve()

    def read_local(name: str) -> str | None:
        path = root / name
        return path.read_text() if path.is_file() else None

    return read_local, str(root)


def local_holder(root: Path) -> tuple[Holder | None, float]:
    """Who holds a directory, and how old the heartbeat is by this machine's clock."""
    path = root / LEASE_FILE
    holder = read_holder(path)
    return holder, max(time.time() - path.stat().st_mtime, 0.0) if holder else 0.0


def remote_holder(workdir: str) -> tuple[Holder | None, float]:
    """Who holds a work directory in an object store, likewise."""
    from pipeline.storage import remote_lease
    from pipeline.storage.mirror import mirrored

    store = mirrored(workdir)
    number = remote_lease.last(store)
    if not number:
        return None, 0.0
    written = store.system.modified(remote_lease.lease_url(store, number))
    return remote_lease.read_holder(store, number), max(time.time() - written.timestamp(), 0.0)
