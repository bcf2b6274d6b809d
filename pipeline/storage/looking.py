"""A work directory as it is seen from outside, while a run holds it or after: it is read, and nothing is changed."""

import json
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lorc_core.errors import ConfigError, first_line
from pipeline.storage.lease import LEASE_FILE, Holder


@dataclass(frozen=True)
class Held:
    """Who holds a work directory, or did until it was gone, and how many seconds ago its heart beat."""

    holder: Holder
    heartbeat_s: float

    @property
    def is_gone(self) -> bool:
        return self.holder.is_gone(self.heartbeat_s)


class Look:
    """A look at a work directory, which need not be there.

    Args:
        workdir: A directory, or a URL.

    Attributes:
        name: What people call it.

    Raises:
        ConfigError: The URL's scheme is unknown, or what can read it is not installed.
    """

    def __init__(self, workdir: str) -> None:
        self.is_local = "://" not in workdir
        self.name = str(Path(workdir).resolve()) if self.is_local else workdir.rstrip("/")
        try:
            remote = None if self.is_local else fsspec.core.url_to_fs(self.name, use_listings_cache=False)[0]
        except (ValueError, ImportError) as error:
            raise ConfigError(f"work directory {self.name}: {first_line(error)}") from error
        self.system: fsspec.AbstractFileSystem = remote or LocalFileSystem()

    def at(self, *parts: str) -> str:
        return "/".join((self.name, *parts))

    def read(self, *parts: str) -> bytes | None:
        """A file's content; None where there is none.

        Raises:
            ConfigError: It is there, and cannot be read.
        """
        try:
            content: bytes = self.system.cat_file(self.at(*parts))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ConfigError(f"{self.at(*parts)} cannot be read: {first_line(error)}") from error
        return content

    def names(self, *parts: str) -> list[str]:
        """Of the files in a folder, in order."""
        try:
            return sorted(PurePosixPath(path).name for path in self.system.ls(self.at(*parts), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def written(self, *parts: str) -> float:
        """When a file was written, in seconds since 1970, by the clock of what stores it."""
        return float(self.system.modified(self.at(*parts)).timestamp())

    def held(self) -> Held | None:
        """Who holds the directory; None where nobody does, or what says so cannot be understood."""
        place = (LEASE_FILE,) if self.is_local else ("lease", *self.names("lease")[-1:])
        try:
            content = self.read(*place)
            if content is None:
                return None
            return Held(Holder(**json.loads(content)), max(time.time() - self.written(*place), 0))
        except (FileNotFoundError, ValueError, TypeError):
            return None
