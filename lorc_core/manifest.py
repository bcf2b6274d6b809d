"""The files of a finished artifact and their sha256, in `manifest.json`, written last and renamed into place."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from lorc_core.errors import ArtifactError

MANIFEST_FILE = "manifest.json"


class DamagedArtifactError(ArtifactError):
    """An artifact is not what its manifest says; what made it can make it again.

    Attributes:
        directory: Of the artifact.
    """

    def __init__(self, directory: Path, message: str) -> None:
        super().__init__(message)
        self.directory = directory


def write_manifest(directory: Path) -> None:
    """Record the sha256 of every file of `directory`; until then the directory counts as unfinished."""
    partial = directory / f"{MANIFEST_FILE}.partial"
    files = sorted(path for path in directory.iterdir() if path.is_file())
    hashes = {path.name: file_sha256(path) for path in files if path.name not in (MANIFEST_FILE, partial.name)}
    partial.write_text(json.dumps(hashes, indent=2) + "\n")
    partial.rename(directory / MANIFEST_FILE)


def check_manifest(directory: Path, required: Sequence[str] = ()) -> None:
    """Look at every file of a finished artifact.

    Args:
        directory: Of the artifact.
        required: Files that must be among them.

    Raises:
        ArtifactError: There is no manifest.
        DamagedArtifactError: A file, or the manifest, is not as it was written.
    """
    hashes = read_manifest(directory)
    for name in (*required, *hashes):
        check_file(directory, name, hashes)


def checked_file(path: Path) -> Path:
    """The same path, after a look at the file's hash; each file is hashed once in a process, unless it changed since.

    Args:
        path: Of a file directly within a finished artifact.

    Raises:
        ArtifactError: There is no manifest beside it.
        DamagedArtifactError: The file is absent or not as it was written.
    """
    if path.is_file():
        stat = path.stat()
        check_version(path, stat.st_mtime_ns, stat.st_size)
    else:
        check_file(path.parent, path.name, read_manifest(path.parent))
    return path


@cache
def check_version(path: Path, modified_ns: int, size: int) -> None:
    """`check_file` of one version of a file; an error is not remembered."""
    check_file(path.parent, path.name, read_manifest(path.parent))


def read_manifest(directory: Path) -> dict[str, str]:
    """The sha256 of each file, by name; ArtifactError where there is no manifest, or none that can be read."""
    manifest = directory / MANIFEST_FILE
    if not manifest.is_file():
        raise ArtifactError(f"{directory}: no {MANIFEST_FILE}, so there is no finished artifact in it")
    try:
        hashes = dict(json.loads(manifest.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedArtifactError(directory, f"{manifest}: cannot be read ({error})") from error
    for name in hashes:
        if Path(name).name != name:
            raise DamagedArtifactError(directory, f"{manifest}: lists {name!r}, which is no file of this directory")
    return hashes


def check_file(directory: Path, name: str, hashes: Mapping[str, str]) -> None:
    """Raise DamagedArtifactError unless the manifest lists the file and the file is as it was written."""
    path = directory / name
    if name not in hashes:
        raise DamagedArtifactError(directory, f"{directory / MANIFEST_FILE}: does not list {name}")
    if not path.is_file():
        raise DamagedArtifactError(directory, f"{path}: listed in {MANIFEST_FILE} but absent")
    if file_sha256(path) != hashes[name]:
        raise DamagedArtifactError(
            directory, f"{path}: altered after it was written (its sha256 is not the one in {MANIFEST_FILE})"
        )


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
