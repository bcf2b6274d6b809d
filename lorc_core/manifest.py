"""The files of a finished artifact and their sha256, in `manifest.json`, written last and renamed into place."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lorc_core.errors import ArtifactError

MANIFEST_FILE = "manifest.json"


def write_manifest(directory: Path) -> None:
    """Record the sha256 of every file of `directory`; until then the directory counts as unfinished."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != MANIFEST_FILE)
    hashes = {path.name: file_sha256(path) for path in files}
    partial = directory / f"{MANIFEST_FILE}.partial"
    partial.write_text(json.dumps(hashes, indent=2) + "\n")
    partial.rename(directory / MANIFEST_FILE)


def check_manifest(directory: Path, required: Sequence[str] = ()) -> None:
    """Raise ArtifactError unless the directory is finished and every file, the required ones too, is as written."""
    manifest = directory / MANIFEST_FILE
    if not manifest.is_file():
        raise ArtifactError(f"{directory}: no {MANIFEST_FILE}, so there is no finished artifact in it")
    try:
        hashes = dict(json.loads(manifest.read_text()))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{manifest}: cannot be read ({error})") from error
    if unlisted := [name for name in required if name not in hashes]:
        raise ArtifactError(f"{manifest}: does not list {unlisted[0]}")
    for name, sha256 in hashes.items():
        path = directory / name
        if not path.is_file():
            raise ArtifactError(f"{path}: listed in {MANIFEST_FILE} but absent")
        if file_sha256(path) != sha256:
            raise ArtifactError(f"{path}: altered after it was written (its sha256 is not the one in {MANIFEST_FILE})")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
