"""From a zoo entry to a model on disk, its identity and its architecture."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig
from transformers import __version__ as transformers_version

from lorc_core.errors import ConfigError
from lorc_core.model.architecture import Architecture, architecture_of
from lorc_core.model.checkpoint import Checkpoint, model_directory, read_config
from lorc_core.variant import BaseModel
from pipeline.storage.store import Store
from pipeline.zoo.sections import ModelEntry


@dataclass(frozen=True)
class ResolvedModel:
    """A zoo entry whose files are on disk and were checked."""

    entry: ModelEntry
    directory: Path
    base: BaseModel
    architecture: Architecture
    num_parameters: int


def resolve(entry: ModelEntry, store: Store, *, fetch_missing: bool = True) -> ResolvedModel:
    """Fetch a model if it is a hub id, check that it is whole, read its architecture.

    Args:
        entry: From the zoo file.
        store: Remembers which models were found whole.
        fetch_missing: Whether a hub model that is not on disk may be downloaded.

    Raises:
        LorcError: As `Checkpoint`, `architecture_of` and `check_checkpoint` do.
        ConfigError: The hub has no such model.
    """
    directory = model_directory(entry.source, entry.revision, fetch_missing=fetch_missing)
    checkpoint = Checkpoint(directory)
    config = read_config(directory, trust_remote_code=entry.trust_remote_code)
    architecture = architecture_of(config)
    fingerprint = checkpoint.fingerprint(architecture.tensor_names())
    note = store.root / "whole" / f"{fingerprint}-transformers-{transformers_version}"
    if not note.exists():  # the look imports the model's class, for which a run that finds all done need not wait
        from lorc_core.model.integrity import check_checkpoint

        check_checkpoint(checkpoint, config, trust_remote_code=entry.trust_remote_code)
        note.parent.mkdir(exist_ok=True)
        note.touch()
    return ResolvedModel(
        entry=entry,
        directory=directory,
        base=BaseModel(entry.source, None if entry.is_directory else directory.name, fingerprint),
        architecture=architecture,
        num_parameters=checkpoint.num_parameters,
    )


def config_for_planning(entry: ModelEntry) -> PreTrainedConfig:
    """The config alone: the local copy named in the zoo file, the directory's, or the hub's.

    Raises:
        ConfigError: The named file does not exist.
        ArtifactError: It cannot be read.
    """
    if entry.config is not None:
        if not entry.config.is_file():
            raise ConfigError(f"model {entry.name}: config file {entry.config} does not exist")
        return read_config(entry.config)
    if entry.is_directory:
        if not Path(entry.source).is_dir():
            raise ConfigError(f"model directory {entry.source} does not exist")
        return read_config(Path(entry.source), trust_remote_code=entry.trust_remote_code)
    return read_config(entry.source, revision=entry.revision or "main")
