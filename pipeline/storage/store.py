"""Finished artifacts under one work directory, each with its manifest, and the other files of runs."""

import json
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from lorc_core.errors import ConfigError
from lorc_core.manifest import MANIFEST_FILE, DamagedArtifactError, checked_file, write_manifest
from pipeline.storage.cost import Cost, Meter

COST_FILE = "cost.json"


class Keyed(Protocol):
    """Whatever has a place of its own in the store: a step."""

    @property
    def key(self) -> str: ...


@dataclass(frozen=True)
class Named:
    """An artifact, by its key alone."""

    key: str


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
    def url(self) -> str | None:
        """Where it is, if not in a directory."""
        return None

    @property
    def name(self) -> str:
        """What people call it."""
        return str(self.root)

    @property
    def identity(self) -> str:
        """Another one for every work directory in the world."""
        return f"{socket.gethostname()}:{self.root}"

    @property
    def steps(self) -> Path:
        return self.root / "steps"

    def path(self, step: Keyed, *files: str) -> Path:
        """A step's artifact on this machine: all of it or, if any are named, with those files of it."""
        return self.steps / step.key

    def paths(self, steps: Sequence[Keyed], *files: str) -> list[Path]:
        return [self.path(step, *files) for step in steps]

    def is_done(self, step: Keyed) -> bool:
        return (self.steps / step.key / MANIFEST_FILE).is_file()

    def finished(self, steps: Sequence[Keyed]) -> set[str]:
        """The keys of those that are done."""
        return {step.key for step in steps if self.is_done(step)}

    def cost(self, step: Keyed) -> Cost:
        """Of a finished artifact.

        Raises:
            DamagedArtifactError: It is another step's, put in its place, or says something else than costs.
        """
        file = checked_file(self.path(step, COST_FILE) / COST_FILE)
        kept = json.loads(file.read_text())
        if (key := kept.pop("step")) != step.key:
            raise DamagedArtifactError(self.steps / step.key, f"{file.parent}: is the artifact of {key}")
        try:
            return Cost(**kept)
        except TypeError as error:
            raise DamagedArtifactError(self.steps / step.key, f"{file}: is of another schema ({error})") from error

    def place(self, *parts: str) -> Path:
        """Where another file of the work directory is, or goes; its folder is made."""
        path = self.root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def known(self, *parts: str) -> Path:
        """A `place` with what was last published there."""
        return self.place(*parts)

    def publish(self, path: Path) -> None:
        """Let everyone see what was written to a `place`; no need where all read the same directory."""

    def log(self, key: str) -> Path:
        """Where the trace of a step that failed goes, or of what there was to do before steps."""
        return self.root / "logs" / f"{key}.log"

    def begin(self, key: str) -> int:
        """Note that a step begins; returns how often it did, by workers that were lost and in earlier runs too."""
        note = self.known("begun", f"{key}.log")
        with note.open("a") as begun:
            begun.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} on {socket.gethostname()}\n")
        self.publish(note)
        return len(note.read_text().splitlines())

    def end(self, key: str) -> None:
        """Remove the note of a step that is done."""
        note = self.place("begun", f"{key}.log")
        note.unlink(missing_ok=True)
        self.publish(note)

    def forget(self, key: str) -> None:
        """Drop this machine's copy of an artifact; there is none where all read the same directory."""

    def put_aside(self, key: str) -> Path:
        """Move a damaged artifact out of the way, so that its step is run again; returns where it is now."""
        aside = self.root / "damaged" / f"{key}-{uuid4().hex[:8]}"
        aside.parent.mkdir(exist_ok=True)
        (self.steps / key).rename(aside)
        return aside

    def remove(self, key: str) -> None:
        """Remove an artifact that nothing reads any more."""
        doomed = self.steps / f".{key}-{uuid4().hex}"
        with suppress(FileNotFoundError):  # an earlier attempt had removed it
            (self.steps / key).rename(doomed)  # at once, so that no half of it is ever taken for the whole
            shutil.rmtree(doomed, ignore_errors=True)

    def finish(self, path: Path) -> None:
        """Let everyone see a new artifact; no need where all read the same directory."""

    def remove_scratch(self) -> None:
        """Remove what steps were writing when their run died; only while no other run uses the directory."""
        for scratch in self.steps.glob(".*"):
            shutil.rmtree(scratch, ignore_errors=True)
        begun = [Named(note.stem) for note in self.root.glob("begun/*.log")]
        for key in self.finished(begun) if begun else ():  # their worker was lost in the moment between
            self.end(key)

    @contextmanager
    def writing(self, step: Keyed, meter: Meter | None = None) -> Iterator[Path]:
        """A scratch directory that becomes the step's artifact, with cost and manifest, if the block does not raise.

        Args:
            step: That is run in the block; it is noted as begun until its artifact is there.
            meter: Of who wants to know what it took if it fails, too.
        """
        path = self.steps / step.key
        scratch = path.parent / f".{path.name}-{uuid4().hex}"
        meter = meter or Meter()
        meter.attempts = self.begin(step.key)
        scratch.mkdir()
        try:
            yield scratch
            (scratch / COST_FILE).write_text(json.dumps({"step": path.name, **asdict(meter.cost())}))
            write_manifest(scratch)
            if not self.is_done(step):  # else another worker was faster: what is finished stays
                shutil.rmtree(path, ignore_errors=True)
                scratch.rename(path)
                self.finish(path)
            self.end(step.key)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
