"""Which safetensors files make up a checkpoint, and what their headers say of the tensors in them."""

import json
import math
from pathlib import Path
from typing import Any

from lorc_core.errors import ArtifactError
from lorc_core.model.stored.files import ModelFiles

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit
# safetensors' names of numbers, and their bytes.
ELEMENT_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
Header = dict[str, dict[str, Any]]  # by tensor: dtype, shape and data_offsets, from the beginning of the file


def weight_files(files: ModelFiles) -> list[str]:
    """Names of the safetensors files of a checkpoint; ArtifactError where one is absent, or there are only pickles."""
    if SINGLE_FILE in files.entries:  # before the index, as transformers does
        return [SINGLE_FILE]
    if INDEX_FILE in files.entries:
        names = shard_names(files)
        if missing := [name for name in names if name not in files.entries]:
            raise ArtifactError(f"{files.url}: shard {missing[0]} is named in {INDEX_FILE} but absent")
        return names
    if pickles := sorted(name for name in files.entries if name.startswith("pytorch_model")):
        raise ArtifactError(
            f"{files.url}: only pickled weights ({pickles[0]}); loading a pickle runs code from the file, so it is "
            "refused. Convert once where you trust it: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise ArtifactError(f"{files.url}: neither {SINGLE_FILE} nor {INDEX_FILE}")


def has_weights(files: ModelFiles) -> bool:
    """Whether all files with weights are there."""
    try:
        return bool(weight_files(files))
    except ArtifactError:
        return False


def shard_names(files: ModelFiles) -> list[str]:
    """The files that a sharded checkpoint's index names; ArtifactError where it is no index."""
    index = files.path(INDEX_FILE)
    try:
        names = set(json.loads(files.read(INDEX_FILE))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{index}: not an index of safetensors shards ({error!r})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ArtifactError(f"{index}: not an index of safetensors shards: {name!r} is no file of this directory")
    return sorted(names)


def read_header(files: ModelFiles, name: str) -> Header:
    """What a safetensors file says of its tensors; ArtifactError where the file is not whole."""
    num_bytes = files.num_bytes(name)
    if num_bytes < 8:
        raise not_whole(files, name, "it has no header")
    header_bytes = int.from_bytes(files.read_ranges(name, [(0, 8)])[0], "little")
    data_start = 8 + header_bytes
    if header_bytes > MOST_HEADER_BYTES or data_start > num_bytes:
        raise not_whole(files, name, f"its header would take {header_bytes} bytes")
    try:
        header: Header = json.loads(files.read_ranges(name, [(8, data_start)])[0])
        header.pop("__metadata__", None)
        ends = sorted((*entry["data_offsets"], tensor) for tensor, entry in header.items())
        wrong = [tensor for tensor, entry in header.items() if tensor_bytes(entry) != length_of(entry)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise not_whole(files, name, f"its header cannot be read: {error!r}") from error
    if wrong:
        raise not_whole(files, name, f"tensor {wrong[0]} has not the bytes of its shape")
    reached = 0
    for begin, end, tensor in ends:
        if begin != reached:
            raise not_whole(files, name, f"tensor {tensor} does not begin where another ends")
        reached = end
    if data_start + reached != num_bytes:
        raise not_whole(files, name, f"it has {num_bytes} bytes, its header tells of {data_start + reached}")
    return {
        tensor: entry | {"data_offsets": [data_start + offset for offset in entry["data_offsets"]]}
        for tensor, entry in header.items()
    }


def tensor_bytes(entry: dict[str, Any]) -> int:
    return math.prod(entry["shape"]) * ELEMENT_BYTES[entry["dtype"]]


def length_of(entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end) - int(begin)


def not_whole(files: ModelFiles, name: str, why: str) -> ArtifactError:
    return ArtifactError(f"{files.path(name)}: not a whole safetensors file ({why})")
