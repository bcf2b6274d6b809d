"""Read single tensors from a local safetensors checkpoint, never the whole model; `weights` says what they mean.

Also where a model's files are, and the identity of their content, so that what was computed from one model is never
taken for another's.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from lorc_core.errors import ArtifactError, ConfigError, first_line

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Of every tensor that is not hashed whole, so that a fine-tune that left keys and values alone is told apart.
NUM_SAMPLES, SAMPLE_BYTES = 32, 1024
# Never the original checkpoints that some repositories keep in a folder, nor pickles.
HUB_FILES = ("*.json", "model*.safetensors", "*.model", "*.txt")
# All that decides how a text is cut, of any tokenizer that transformers reads: tekken is Mistral's.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.model", "tekken*"),
)


@runtime_checkable
class WeightSource(Protocol):
    """Anything that hands out a model's tensors by their names below `model.base_model`."""

    def read(self, name: str) -> Float[Tensor, "..."]:
        """The tensor of that name, in the dtype that it has there."""
        ...


class Checkpoint:
    """The tensors of a transformers directory with safetensors, sharded or single.

    Args:
        directory: Holds `config.json` and `model.safetensors` or shards with their index.

    Raises:
        ConfigError: The directory does not exist.
        ArtifactError: A file is missing, truncated, or only pickles are there.
    """

    def __init__(self, directory: Path) -> None:
        check_directory(directory)
        if not (directory / "config.json").is_file():
            raise ArtifactError(f"{directory}: no config.json; a model directory holds one beside its safetensors")
        self.directory = directory
        self.headers = {path: read_header(path) for path in weight_files(directory)}
        self.file_of = {name: path for path, header in self.headers.items() for name in header}

    def read(self, name: str) -> Float[Tensor, "..."]:
        """The tensor called `name` below the base model, in the checkpoint's dtype.

        Raises:
            ArtifactError: No tensor, or more than one, has that name.
        """
        full_name = self.full_name(name)
        with safe_open(self.file_of[full_name], framework="pt") as file:
            return file.get_tensor(full_name)

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors of all files."""
        return sum(math.prod(entry["shape"]) for header in self.headers.values() for entry in header.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(path.stat().st_size for path in self.headers)

    def fingerprint(self, names: Iterable[str]) -> str:
        """Hash of the config, all headers, samples spread over every tensor and all bytes of `names`.

        An edit of other tensors between the samples is not seen; reading all of a 70B model would take minutes.

        Args:
            names: Of the tensors that count whole, below the base model; `Architecture.tensor_names` for a variant.

        Raises:
            ArtifactError: There is no such tensor.
        """
        whole = {self.full_name(name) for name in names}
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for path, header in sorted(self.headers.items()):
            digest.update(json.dumps([path.name, header], sort_keys=True).encode())
            with path.open("rb") as file:
                data_start = 8 + int.from_bytes(file.read(8), "little")
                for name in sorted(header):
                    begin, end = header[name]["data_offsets"]
                    for start, stop in [(begin, end)] if name in whole else sample_ranges(begin, end):
                        file.seek(data_start + start)
                        digest.update(file.read(stop - start))
        return digest.hexdigest()

    def full_name(self, name: str) -> str:
        """The name in the files of the tensor called `name` below the base model.

        Checkpoints differ in what stands before it ("model.", "transformer.", nothing), so the end is matched.

        Raises:
            ArtifactError: No tensor, or more than one, has that name.
        """
        matches = [full for full in self.file_of if full == name or full.endswith(f".{name}")]
        if len(matches) != 1:
            problem = f"{len(matches)} tensors match: {matches}" if matches else "no tensor has that name"
            raise ArtifactError(f"{self.directory}: tensor {name}: {problem}")
        return matches[0]


def read_config(source: Path | str, **kwargs: bool | str) -> PreTrainedConfig:
    """The transformers config of a local directory, of a config.json file or of a hub id.

    Raises:
        ArtifactError: The file is absent or is not a config that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(source, **kwargs)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError, StrictDataclassError) as error:
        raise ArtifactError(f"{source}: config cannot be read: {first_line(error)}") from error


def is_hub_id(model: Path | str) -> bool:
    """Whether a model's name means one on the hub: it has the form of an id, and no directory here is called so."""
    if isinstance(model, Path) or os.path.isdir(model):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def find_model(model: Path | str) -> Path:
    """A model's files, by the name that a person gives it: a directory, `~` and relative ones too, or a hub id.

    Raises:
        ConfigError: There is no such directory, and no such hub model.
    """
    if is_hub_id(model):
        return model_directory(str(model), None)
    try:
        return model_directory(str(Path(model).expanduser().resolve()), None)
    except RuntimeError as error:  # of a user that there is not
        raise ConfigError(f"model directory {model}: {first_line(error)}") from error


def check_directory(directory: Path) -> None:
    """Raise ConfigError unless a model's directory is there."""
    if not os.path.isdir(directory):  # False too where the name is too long, of which `Path.is_dir` raises OSError
        raise ConfigError(f"model directory {directory} does not exist")


def model_directory(source: str, revision: str | None, *, fetch_missing: bool = True) -> Path:
    """A model's files: the directory itself, or the local snapshot of a hub id, named by its commit.

    Args:
        source: An absolute path, or a hub id.
        revision: Of the hub model; its main branch if absent.
        fetch_missing: Whether what is not on disk may be downloaded.

    Raises:
        ConfigError: There is no such directory or hub model, or it is not on disk and must not be fetched.
    """
    if source.startswith("/"):
        check_directory(Path(source))
        return Path(source)
    try:
        snapshot = snapshot_download(
            source, revision=revision, allow_patterns=list(HUB_FILES), local_files_only=not fetch_missing
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"hub model {source} could not be fetched ({first_line(error)}); a local directory is written ./{source}"
        ) from error
    return Path(snapshot)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint; ArtifactError where one is absent, or there are only pickles."""
    if (directory / SINGLE_FILE).is_file():  # before the index, as transformers does
        paths = [directory / SINGLE_FILE]
    elif (directory / INDEX_FILE).is_file():
        paths = [directory / name for name in shard_names(directory / INDEX_FILE)]
    elif pickles := sorted(path.name for path in directory.glob("pytorch_model*")):
        raise ArtifactError(
            f"{directory}: only pickled weights ({pickles[0]}); loading a pickle runs code from the file, so it is "
            "refused. Convert once where you trust it: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    else:
        raise ArtifactError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE}")
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ArtifactError(f"{directory}: shard {missing[0]} is named in {INDEX_FILE} but absent")
    return paths


def shard_names(index: Path) -> list[str]:
    """The files that a sharded checkpoint's index names; ArtifactError where it is no index."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{index}: not an index of safetensors shards ({error!r})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{index}: not an index of safetensors shards: {name!r} is no file of this directory")
    return sorted(names)


def sample_ranges(begin: int, end: int) -> list[tuple[int, int]]:
    """Evenly spaced byte ranges, first and last included; the whole range where it is short."""
    if end - begin <= NUM_SAMPLES * SAMPLE_BYTES:
        return [(begin, end)]
    last = end - SAMPLE_BYTES
    starts = [begin + (last - begin) * index // (NUM_SAMPLES - 1) for index in range(NUM_SAMPLES)]
    return [(start, start + SAMPLE_BYTES) for start in starts]


def read_header(path: Path) -> dict[str, dict]:
    """Of each tensor its dtype, shape and data_offsets; ArtifactError where the file is not whole."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ArtifactError(f"{path}: not a whole safetensors file ({error})") from error
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return header
