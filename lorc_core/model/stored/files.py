"""The bytes of a model's files, by ranges: in a directory, on the hub, or wherever else fsspec reads.

Nothing here knows what the bytes mean. Reads are counted, since what is read of a model of 140 GB decides how long it
takes.
"""

import hashlib
import importlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError

from lorc_core.errors import ArtifactError, ConfigError, first_line

STORE_ERRORS: tuple[type[Exception], ...] = (OSError, HfHubHTTPError)
with suppress(ImportError):  # what S3's own library raises is no OSError: no credentials, say
    STORE_ERRORS += (importlib.import_module("botocore.exceptions").BotoCoreError,)

HUB = "hf://"
CONNECTIONS = 16  # ranges that are asked for at a time where each is a request
DIGEST_BYTES = 32  # of a sha256
# What tells that a file was written again, by the first that a file system has.
STAMPS = ("ETag", "etag", "oid", "blob_id", "md5Hash", "content_md5", "mtime", "LastModified", "created")


class ModelFiles:
    """The files of one model.

    Args:
        url: An absolute directory, or a URL that fsspec knows: `s3://bucket/model`, `hf://owner/name@commit`.

    Attributes:
        bytes_read: How much was read of them.
        fetched_bytes: How much this process read of all files that are elsewhere.
    """

    fetched_bytes: ClassVar[int] = 0

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.bytes_read = 0

    @property
    def is_local(self) -> bool:
        return self.url.startswith("/")

    @cached_property
    def system(self) -> fsspec.AbstractFileSystem:
        """fsspec's file system of the URL.

        Raises:
            ConfigError: The URL's scheme is unknown, or its package is not installed.
        """
        if self.is_local:
            return LocalFileSystem()
        if self.url.startswith(HUB):
            return HfFileSystem()
        try:
            return fsspec.core.url_to_fs(self.url)[0]
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{self.url}: {first_line(error)}") from error

    @cached_property
    def entries(self) -> dict[str, dict[str, Any]]:
        """What the file system tells of each file, by its name.

        Raises:
            ConfigError: There is no such directory.
        """
        try:
            listed = self.system.ls(self.url, detail=True)
        except STORE_ERRORS as error:
            what = "model directory" if self.is_local else "model"
            told = "does not exist" if isinstance(error, FileNotFoundError | NotADirectoryError) else first_line(error)
            raise ConfigError(f"{what} {self.url} {told}") from error
        return {Path(entry["name"]).name: entry for entry in listed if entry["type"] != "directory"}

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def num_bytes(self, name: str) -> int:
        return int(self.entries[name]["size"])

    def stamp(self, name: str) -> str:
        """Another one when the file was written again; what it says depends on where the file is.

        Raises:
            ConfigError: The file system does not tell.
        """
        entry = self.entries[name]
        told = [entry[key] for key in STAMPS if entry.get(key) is not None]
        if not told:
            raise ConfigError(f"{self.path(name)}: its file system does not tell when a file was written")
        return f"{entry['size']} {told[0]}"

    def read(self, name: str) -> bytes:
        """A whole file, a small one."""
        return self.read_ranges(name, [(0, self.num_bytes(name))])[0]

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Parts of a file, each from its first byte to before its last.

        Raises:
            ArtifactError: It cannot be read, or is shorter than that.
        """
        try:
            if self.is_local:
                parts = read_local(Path(self.path(name)), ranges)
            else:
                with ThreadPoolExecutor(CONNECTIONS) as threads:
                    parts = list(threads.map(lambda limits: self._fetched(name, *limits), ranges))
        except STORE_ERRORS as error:
            raise ArtifactError(f"{self.path(name)}: cannot be read: {first_line(error)}") from error
        self.bytes_read += (num_bytes := sum(map(len, parts)))
        if not self.is_local:
            ModelFiles.fetched_bytes += num_bytes
        for (start, stop), part in zip(ranges, parts, strict=True):
            if len(part) != stop - start:
                raise ArtifactError(f"{self.path(name)}: ends before byte {stop}")
        return parts

    def keep_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """`read_ranges` of what will be read again: of a model elsewhere a copy is kept on this machine.

        The copy ends with its hash; one that was damaged is fetched again.
        """
        if self.is_local:
            return self.read_ranges(name, ranges)
        identity = json.dumps([self.url, name, self.stamp(name), list(ranges)])
        copy = cache_directory() / "tensors" / hashlib.sha256(identity.encode()).hexdigest()
        kept = copy.read_bytes() if copy.is_file() else b""
        content, digest = kept[:-DIGEST_BYTES], kept[-DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            content = b"".join(self.read_ranges(name, ranges))
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = copy.with_suffix(f".{uuid4().hex}")
            partial.write_bytes(content + hashlib.sha256(content).digest())
            partial.rename(copy)
        return [content]

    def _fetched(self, name: str, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        exact = {"cache_type": "none"} if self.url.startswith(HUB) else {}  # its files would read ahead
        part: bytes = self.system.cat_file(self.path(name), start=start, end=stop, **exact)
        return part


def cache_directory() -> Path:
    """Where copies of what is elsewhere are kept: $LORC_CACHE, else a folder in the user's cache."""
    return Path(os.environ.get("LORC_CACHE") or Path.home() / ".cache" / "lorc")


def read_local(path: Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    with path.open("rb") as file:
        parts = []
        for start, stop in ranges:
            file.seek(start)
            parts.append(file.read(stop - start))
        return parts
