"""Write a checkpoint beside its base: weights one file at a time, the tokenizer's files, the config last."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file
from torch import Tensor

from lorc_core.model.stored.checkpoint import Checkpoint
from lorc_core.model.stored.locations import TOKENIZER_FILES
from lorc_core.model.stored.shards import INDEX_FILE, SINGLE_FILE

# What stands beside the weights; never another checkpoint or pickles.
COPIED = (*TOKENIZER_FILES, "generation_config.json", "chat_template*", "LICENSE*", "USE_POLICY*")


@contextmanager
def new_checkpoint(base: Checkpoint, directory: Path) -> Iterator[Path]:
    """A place to write to, whose files move to `directory` with the tokenizer's when the block is done.

    Args:
        base: Whose tokenizer is copied.
        directory: Made if absent.

    Yields:
        A directory beside it; what an error left there is removed.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        yield Path(scratch)
        for pattern in COPIED:
            for file in base.directory.glob(pattern):
                if file.is_file():
                    shutil.copy(file, scratch)
        directory.mkdir(exist_ok=True)
        for file in sorted(Path(scratch).iterdir(), key=lambda path: path.name == "config.json"):  # config last
            file.rename(directory / file.name)


def write_weights(base: Checkpoint, tensors_of: Callable[[str], dict[str, Tensor]], directory: Path) -> int:
    """One file for each of the base's, and an index where there are more.

    Args:
        base: Whose tensors are gone through, so that only one file's are in memory.
        tensors_of: By the full name of a tensor of the base, the tensors that take its place.
        directory: To write to.

    Returns:
        Bytes of all tensors.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for file, header in base.headers.items():
        tensors: dict[str, Tensor] = {}
        for full_name in header:
            tensors |= tensors_of(full_name)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if not (directory / SINGLE_FILE).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


def write_config(base: Checkpoint, changes: Mapping[str, object], directory: Path) -> None:
    """The base's config with some fields changed or added.

    Args:
        base: Whose config it is.
        changes: By field.
        directory: To write to.
    """
    config = json.loads((base.directory / "config.json").read_text()) | dict(changes)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
