"""Where a model is, by the name that a person gives it; and its files on this machine, as far as they are needed.

A model is a directory, a hub id, or a URL of an object store. Of the last two, single tensors are read by ranges from
where they are; what runs the model needs all of it here.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import tqdm, validate_repo_id

from lorc_core.errors import ArtifactError, ConfigError, first_line
from lorc_core.model.stored.files import HUB, STORE_ERRORS, ModelFiles, cache_directory
from lorc_core.model.stored.shards import has_weights, weight_files

# Config, tokenizer, a model's own code: all but weights. Never the original checkpoints that some repositories keep in
# a folder, nor pickles.
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.py")
HUB_FILES = (*SMALL_FILES, "model*.safetensors")
# All that decides how a text is cut, of any tokenizer that transformers reads: tekken is Mistral's.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.model", "tekken*"),
)


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is.

    Attributes:
        source: An absolute directory, a URL or a hub id.
        commit: Of a hub model.
    """

    source: str
    commit: str | None = None

    @property
    def is_directory(self) -> bool:
        return self.source.startswith("/")

    @property
    def is_url(self) -> bool:
        return "://" in self.source

    def files(self) -> ModelFiles:
        """What single tensors are read from: a copy on this machine that is whole, else from where the model is."""
        if self.is_directory:
            return ModelFiles(self.source)
        here = ModelFiles(str(self.directory(weights=False)))
        if has_weights(here):
            return here
        return ModelFiles(self.source if self.is_url else f"{HUB}{self.source}@{self.commit}")

    def directory(self, *, weights: bool) -> Path:
        """A directory on this machine with the model's files, fetched if they are not there yet.

        Args:
            weights: Whether tensors are needed too, and not just config and tokenizer.

        Raises:
            ConfigError: They cannot be fetched.
        """
        if self.is_directory:
            return Path(self.source)
        if self.is_url:
            return fetched_copy(ModelFiles(self.source), weights=weights)
        return snapshot_of_commit(self.source, self.commit, weights=weights)


def locate(source: str, revision: str | None = None, *, fetch_missing: bool = True) -> ModelLocation:
    """Where a model is; of a hub model the config and the tokenizer are fetched.

    Args:
        source: An absolute directory, a URL, or a hub id.
        revision: Of the hub model; its main branch if absent.
        fetch_missing: Whether what is not on disk may be fetched.

    Raises:
        ConfigError: There is no such directory or model, or it is not on disk and must not be fetched.
    """
    location = ModelLocation(source)
    if location.is_directory:
        check_directory(Path(source))
        return location
    if location.is_url:
        if not fetch_missing:
            raise ConfigError(f"model {source} is not on this machine")
        return location
    snapshot = hub_snapshot(source, revision, weights=False, fetch_missing=fetch_missing)
    return ModelLocation(source, snapshot.name)  # a snapshot's folder is called as its commit


def find_model(model: Path | str) -> ModelLocation:
    """Where a model is, by the name that a person gives it: a directory, `~` and relative ones too, a URL, a hub id.

    Raises:
        ConfigError: There is no such directory, and no such hub model.
    """
    if is_hub_id(model) or "://" in str(model):
        return locate(str(model))
    try:
        return locate(str(Path(model).expanduser().resolve()))
    except RuntimeError as error:  # of a user that there is not
        raise ConfigError(f"model directory {model}: {first_line(error)}") from error


def is_hub_id(model: Path | str) -> bool:
    """Whether a model's name means one on the hub: it has the form of an id, and no directory here is called so."""
    if isinstance(model, Path) or os.path.isdir(model):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def check_directory(directory: Path) -> None:
    """Raise ConfigError unless a model's directory is there."""
    if not os.path.isdir(directory):  # False too where the name is too long, of which `Path.is_dir` raises OSError
        raise ConfigError(f"model directory {directory} does not exist")


class SilentBar(tqdm):
    """For what takes a moment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})


@cache
def snapshot_of_commit(source: str, commit: str | None, *, weights: bool) -> Path:
    """`hub_snapshot` of what does not change; the hub is asked once."""
    return hub_snapshot(source, commit, weights=weights, fetch_missing=True)


def hub_snapshot(source: str, revision: str | None, *, weights: bool, fetch_missing: bool) -> Path:
    """The local snapshot of a hub model, with its weights or without."""
    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=list(HUB_FILES if weights else SMALL_FILES),
                local_files_only=not fetch_missing,
                tqdm_class=None if weights else SilentBar,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"hub model {source} could not be fetched ({first_line(error)}); a local directory is written ./{source}"
        ) from error


def fetched_copy(files: ModelFiles, *, weights: bool) -> Path:
    """The copy on this machine of a model in an object store, in a directory named by what is there now."""
    stamps = sorted((name, files.stamp(name)) for name in files.entries)
    name = hashlib.sha256(json.dumps([files.url, stamps]).encode()).hexdigest()[:20]
    directory = cache_directory() / "models" / name
    directory.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in files.entries if any(Path(name).match(pattern) for pattern in SMALL_FILES)]
    wanted += weight_files(files) if weights else []
    with FileLock(directory.with_suffix(".lock")):
        for name in wanted:
            if not (directory / name).is_file():
                fetch(files, name, directory)
    return directory


def fetch(files: ModelFiles, name: str, directory: Path) -> None:
    """Copy one file, whole from its first moment."""
    partial = directory / f".{name}-{uuid4().hex}"
    try:
        files.system.get_file(files.path(name), str(partial))
        partial.rename(directory / name)
    except STORE_ERRORS as error:
        raise ArtifactError(f"{files.path(name)}: cannot be fetched: {first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
