"""A work directory in an object store, of which every machine keeps a mirror of what it writes and reads.

    steps/<key>/<attempt>/<file>   the files of an artifact; two attempts at a step never mix
    done/<key>.json                that it is done, by which attempt, at what cost; made once, last
    tables/ logs/ candidates/ ...  as in a directory

Whether something is done is asked of the object store; files are read from the mirror, and fetched where it lacks them.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec

from lorc_core.errors import ConfigError, first_line
from lorc_core.manifest import MANIFEST_FILE, read_manifest
from lorc_core.model.stored.files import STORE_ERRORS, cache_directory
from pipeline.storage.cost import Cost
from pipeline.storage.store import Keyed, Named, Store


@dataclass(frozen=True)
class MirroredStore(Store):
    """A store whose root is this machine's mirror.

    Attributes:
        remote: URL of the work directory.
        costs: What is known of finished artifacts, by their keys.
    """

    remote: str
    costs: dict[str, Cost] = field(default_factory=dict, compare=False, repr=False)

    @property
    def url(self) -> str | None:
        return self.remote

    @property
    def name(self) -> str:
        return self.remote

    @property
    def identity(self) -> str:
        return self.remote

    @cached_property
    def system(self) -> fsspec.AbstractFileSystem:
        """fsspec's file system; what it lists is never old."""
        try:
            return fsspec.core.url_to_fs(self.remote, use_listings_cache=False)[0]
        except (ValueError, ImportError) as error:
            raise ConfigError(f"work directory {self.remote}: {first_line(error)}") from error

    def at(self, *parts: str) -> str:
        """The URL of something in the work directory."""
        return "/".join((self.remote, *parts))

    def note(self, key: str) -> str:
        return self.at("done", f"{key}.json")

    def is_done(self, step: Keyed) -> bool:
        return bool(self.system.exists(self.note(step.key)))

    def finished(self, steps: Sequence[Keyed]) -> set[str]:
        """The keys of those that are done, of all by one look; their costs are known from then on."""
        try:
            notes = {Path(name).stem: name for name in self.system.ls(self.at("done"), detail=False)}
        except FileNotFoundError:  # the first run
            return set()
        done = {step.key for step in steps} & notes.keys()
        unknown = [notes[key] for key in done - self.costs.keys()]
        for name, content in (self.system.cat(unknown) if unknown else {}).items():
            self.costs[Path(name).stem] = Cost(**json.loads(content)["cost"])
        return done

    def cost(self, step: Keyed) -> Cost:
        if step.key not in self.costs:
            self.costs[step.key] = Cost(**self.read_note(step.key)["cost"])
        return self.costs[step.key]

    def read_note(self, key: str) -> dict[str, Any]:
        note: dict[str, Any] = json.loads(self.system.cat_file(self.note(key)))
        return note

    def path(self, step: Keyed, *files: str) -> Path:
        """See `Store.path`; what is not in the mirror is fetched."""
        path = self.steps / step.key
        wanted = [MANIFEST_FILE, *(files or (read_manifest(path) if (path / MANIFEST_FILE).is_file() else ()))]
        if len(wanted) > 1 and all((path / name).is_file() for name in wanted):
            return path
        try:
            folder = self.at("steps", step.key, self.read_note(step.key)["attempt"])
        except FileNotFoundError:  # it is not done
            return path
        path.mkdir(exist_ok=True)
        self.fetch(f"{folder}/{MANIFEST_FILE}", path / MANIFEST_FILE)
        for name in files or read_manifest(path):
            self.fetch(f"{folder}/{name}", path / name)
        return path

    def fetch(self, url: str, path: Path) -> None:
        """Copy a file to the mirror, whole from its first moment, unless it is there."""
        if path.is_file():
            return
        partial = path.with_name(f".{path.name}-{uuid4().hex}")
        try:
            self.system.get_file(url, str(partial))
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    def finish(self, path: Path) -> None:
        """Copy a new artifact to the object store; of two attempts at a step the first to be whole there counts."""
        cost, attempt = super().cost(Named(path.name)), uuid4().hex
        for file in path.iterdir():
            self.system.put_file(str(file), self.at("steps", path.name, attempt, file.name))
        note = json.dumps({"attempt": attempt, "cost": asdict(cost)}).encode()
        with suppress(FileExistsError):
            self.system.pipe_file(self.note(path.name), note, mode="create")

    def put_aside(self, key: str) -> Path:
        """See `Store.put_aside`; the object store's is moved too."""
        aside = self.place("damaged", f"{key}-{uuid4().hex[:8]}")
        if (self.steps / key).is_dir():
            (self.steps / key).rename(aside)
        with suppress(FileNotFoundError):
            self.system.rm_file(self.note(key))
        for url in self.system.find(self.at("steps", key)):
            self.system.mv(url, self.at("damaged", aside.name, Path(url).name))
        self.costs.pop(key, None)
        return aside

    def remove(self, key: str) -> None:
        """See `Store.remove`; the object store's is removed too."""
        with suppress(FileNotFoundError):
            self.system.rm_file(self.note(key))
        with suppress(FileNotFoundError):
            self.system.rm(self.at("steps", key), recursive=True)
        self.costs.pop(key, None)
        super().remove(key)

    def forget(self, key: str) -> None:
        shutil.rmtree(self.steps / key, ignore_errors=True)

    def known(self, *parts: str) -> Path:
        path = self.place(*parts)
        try:
            self.system.get_file(self.at(*parts), str(path))
        except FileNotFoundError:  # never published, or removed by another machine
            path.unlink(missing_ok=True)
        return path

    def publish(self, path: Path) -> None:
        if path.is_file():
            self.system.put_file(str(path), self.at(*path.relative_to(self.root).parts))
        else:
            with suppress(FileNotFoundError):
                self.system.rm_file(self.at(*path.relative_to(self.root).parts))


def open_store(workdir: Path | str) -> Store:
    """The store of a work directory, which is a directory, made if absent, or a URL.

    Raises:
        ConfigError: It cannot be written to, or the URL's scheme is unknown.
    """
    if "://" not in str(workdir):
        return Store(Path(workdir).resolve())
    url = str(workdir).rstrip("/")
    store = MirroredStore(cache_directory() / "work" / hashlib.sha256(url.encode()).hexdigest()[:20], url)
    probe = store.at(f".probe-{uuid4().hex}")
    try:
        store.system.pipe_file(probe, b"")
        store.system.rm_file(probe)
    except STORE_ERRORS + (ValueError,) as error:  # noqa: RUF005  mypy cannot read it unpacked
        raise ConfigError(f"work directory {url} cannot be written to: {first_line(error)}") from error
    return store
