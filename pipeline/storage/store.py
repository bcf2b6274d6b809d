"""Finished artifacts under one work directory, each with its manifest."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from lorc_core.errors import ConfigError
from lorc_core.manifest import MANIFEST_FILE, write_manifest


class Keyed(Protocol):
    """Whatever has a place of its own in the store: a step."""

    @property
    def key(self) -> str: ...


@dataclass(frozen=True)
class Store:
    """Finished artifacts under one work directory: `steps/<name>-<fingerprint>/`, each with its manifest."""

    root: Path

    def __post_init__(self) -> None:
        try:
            self.steps.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.steps):
                pass
        except OSError as error:
            raise ConfigError(f"work directory {self.root} is not writable: {error.strerror}") from error

    @property
    def steps(self) -> Path:
        return self.root / "steps"

    def path(self, step: Keyed) -> Path:
        return self.steps / step.key

    def paths(self, steps: Sequence[Keyed]) -> list[Path]:
        return [self.path(step) for step in steps]

    def is_done(self, step: Keyed) -> bool:
        return (self.path(step) / MANIFEST_FILE).is_file()

    def log(self, key: str) -> Path:
        """Where the trace of a step that failed goes, or of what there was to do before steps."""
        return self.root / "logs" / f"{key}.log"

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """A scratch directory that becomes `path`, whole and with its manifest, if the block does not raise."""
        scratch = path.parent / f".{path.name}-{uuid4().hex}"
        scratch.mkdir()
        try:
            yield scratch
            write_manifest(scratch)
            if not (path / MANIFEST_FILE).is_file():  # else another worker was faster: what is finished stays
                shutil.rmtree(path, ignore_errors=True)
                scratch.rename(path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
