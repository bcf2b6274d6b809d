"""From a zoo entry to a model on disk, its identity and its architecture."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from transformers import PreTrainedConfig
from transformers import __version__ as transformers_version

from lorc_core.errors import ConfigError
from lorc_core.model.architecture import Architecture, architecture_of
from lorc_core.model.stored.checkpoint import Checkpoint, read_config
from lorc_core.model.stored.locations import ModelLocation, locate
from lorc_core.model.stored.weights import layer_digest
from pipeline.storage.artifacts import known_digests
from pipeline.storage.store import Store
from pipeline.zoo.sections import ModelEntry
from pipeline.zoo.texts import tokenizer_identity


@dataclass(frozen=True)
class ResolvedModel:
    """A zoo entry whose files were found and checked, or whose config alone was read, to plan what it would take.

    Attributes:
        location: Where all of its files are.
        directory: On this machine, with its config and tokenizer; None of a model that is planned by its config alone.
        outline: Of its checkpoint.
        content: Identity of its weights for the steps that read them; see `content_of`.
    """

    entry: ModelEntry
    location: ModelLocation
    directory: Path | None
    outline: str
    content: str
    architecture: Architecture
    num_parameters: int

    @property
    def tokenizer(self) -> str:
        """Identity of how it cuts a text; of a model without files it is taken to be its own.

        Raises:
            ArtifactError: The directory has no tokenizer.
        """
        if self.directory is None:
            return self.entry.source
        return tokenizer_identity(self.directory, self.architecture.model_type)


def resolve(entry: ModelEntry, store: Store, *, fetch_missing: bool = True) -> ResolvedModel:
    """`find` a model and `check_whole`."""
    return check_whole(find(entry, store, fetch_missing=fetch_missing), store)


@dataclass(frozen=True)
class FoundModel:
    """A model of which nobody has said yet that it is whole."""

    model: ResolvedModel
    checkpoint: Checkpoint
    config: PreTrainedConfig


def find(entry: ModelEntry, store: Store, *, fetch_missing: bool = True) -> FoundModel:
    """Read what there is to know of a model before its weights; of one elsewhere, and by threads, several at a time.

    Args:
        entry: From the zoo file.
        store: Remembers which models were found whole.
        fetch_missing: Whether what is not on disk may be fetched.

    Raises:
        LorcError: As `Checkpoint` and `architecture_of` do.
        ConfigError: There is no such model.
    """
    location = locate(entry.source, entry.revision, fetch_missing=fetch_missing)
    directory = location.directory(weights=False)
    checkpoint = Checkpoint(location.files())
    config = read_config(directory, trust_remote_code=entry.trust_remote_code)
    architecture = architecture_of(config)
    outline, content = content_of(checkpoint, architecture, store)
    model = ResolvedModel(
        entry=entry,
        location=location,
        directory=directory,
        outline=outline,
        content=content,
        architecture=architecture,
        num_parameters=checkpoint.num_parameters,
    )
    return FoundModel(model, checkpoint, config)


def check_whole(found: FoundModel, store: Store) -> ResolvedModel:
    """Refuse a model that is not whole, unless the store remembers that it was.

    Raises:
        LorcError: As `check_checkpoint` does.
    """
    note = store.known("whole", f"{found.model.outline}-transformers-{transformers_version}")
    if not note.exists():  # the look imports the model's class, for which a run that finds all done need not wait
        from lorc_core.model.stored.integrity import check_checkpoint

        check_checkpoint(found.checkpoint, found.config, trust_remote_code=found.model.entry.trust_remote_code)
        note.touch()
        store.publish(note)
    return found.model


def content_of(checkpoint: Checkpoint, architecture: Architecture, store: Store) -> tuple[str, str]:
    """A checkpoint's outline, and its identity for the steps that read its weights.

    The two are the same unless the files were written again in place since the store first saw them: an edit between
    the outline's samples would not move it. So then all layers that were decomposed are hashed again; where one is
    another now, or none was decomposed, the identity tells when the files were written, too.
    """
    files = checkpoint.files
    note = store.known("models", f"{hashlib.sha256(files.url.encode()).hexdigest()[:20]}.json")
    stamps = {name: files.stamp(name) for name in ("config.json", *checkpoint.headers)}
    known = json.loads(note.read_text()) if note.is_file() else {}
    if known.get("stamps") == stamps:
        return known["outline"], known["content"]
    content = outline = checkpoint.outline
    if known.get("outline") == outline:
        digests = known_digests(store.steps, known["content"])
        same = (layer_digest(checkpoint, architecture, layer_idx) == digest for layer_idx, digest in digests.items())
        rewritten = hashlib.sha256(json.dumps([outline, stamps], sort_keys=True).encode()).hexdigest()
        content = known["content"] if digests and all(same) else rewritten
    partial = note.with_suffix(f".{uuid4().hex}")
    partial.write_text(json.dumps({"url": files.url, "outline": outline, "content": content, "stamps": stamps}))
    partial.rename(note)
    store.publish(note)
    return outline, content


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
    if entry.is_url:
        return read_config(ModelLocation(entry.source).directory(weights=False))
    if entry.is_directory:
        if not Path(entry.source).is_dir():
            raise ConfigError(f"model directory {entry.source} does not exist")
        return read_config(Path(entry.source), trust_remote_code=entry.trust_remote_code)
    return read_config(entry.source, revision=entry.revision or "main")
