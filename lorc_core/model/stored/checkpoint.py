"""Read single tensors, or rows of them, of a safetensors checkpoint, never the whole; `weights` says what they mean.

Also the identity of its content, so that what was computed from one model is never taken for another's.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from lorc_core.errors import ArtifactError, first_line
from lorc_core.model.stored.files import ModelFiles
from lorc_core.model.stored.shards import ELEMENT_BYTES, read_header, weight_files

# Of every tensor, so that a fine-tune that left keys and values alone is told apart: a few places, since each is a
# request where the model is elsewhere.
NUM_SAMPLES, SAMPLE_BYTES = 4, 8192
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FP8 = ("F8_E4M3", "F8_E5M2")
SCALE_ENDINGS = ("_scale_inv", "_scale")  # of the tensors that 8-bit weights are multiplied by
FP8_BLOCK = (128, 128)  # rows and columns that share a scale, where the config does not say
Rows = Sequence[tuple[int, int]]  # each from its first row to before its last


@runtime_checkable
class WeightSource(Protocol):
    """Anything that hands out a model's tensors by their names below `model.base_model`."""

    def read(self, name: str, rows: Rows | None = None) -> Float[Tensor, "..."]:
        """The tensor of that name, or those of its rows, in the dtype that it has there."""
        ...

    def num_rows(self, name: str) -> int:
        """Of the tensor of that name."""
        ...


class Checkpoint:
    """The tensors of a transformers directory with safetensors, sharded or single, here or elsewhere.

    Args:
        files: The directory's, with `config.json` and `model.safetensors` or shards with their index.

    Raises:
        ConfigError: The directory does not exist.
        ArtifactError: A file is missing, truncated, or only pickles are there.
    """

    def __init__(self, files: ModelFiles | Path) -> None:
        self.files = files if isinstance(files, ModelFiles) else ModelFiles(str(files))
        if "config.json" not in self.files.entries:
            raise ArtifactError(f"{self.url}: no config.json; a model directory holds one beside its safetensors")
        self.headers = {name: read_header(self.files, name) for name in weight_files(self.files)}
        self.file_of = {name: file for file, header in self.headers.items() for name in header}

    @property
    def url(self) -> str:
        """Where it is."""
        return self.files.url

    @property
    def directory(self) -> Path:
        """On this machine, where it is here."""
        assert self.files.is_local
        return Path(self.url)

    @property
    def stored(self) -> dict[str, dict[str, Any]]:
        """What the headers say of all tensors."""
        return {name: entry for header in self.headers.values() for name, entry in header.items()}

    def read(self, name: str, rows: Rows | None = None) -> Float[Tensor, "..."]:
        """The tensor called `name` below the base model, in the checkpoint's dtype; in float32 what has 8 bits.

        Args:
            name: Of the tensor.
            rows: That are wanted, one range after another; all if absent.

        Raises:
            ArtifactError: No tensor, or more than one, has that name; or torch has no such numbers.
        """
        full_name = self.full_name(name)
        stored = self.read_stored(full_name, rows)
        if self.entry(full_name)["dtype"] not in FP8:
            return stored
        return stored.float() * self.scale_of(full_name, rows)

    def read_stored(self, full_name: str, rows: Rows | None = None) -> Float[Tensor, "..."]:
        """A tensor by its full name, as it is stored; else as `read`."""
        entry = self.entry(full_name)
        if entry["dtype"] not in TORCH_DTYPES:
            raise ArtifactError(f"{self.url}: tensor {full_name} is stored as {entry['dtype']}, which torch has not")
        shape, (begin, _) = entry["shape"], entry["data_offsets"]
        ranges = [(0, shape[0] if shape else 1)] if rows is None else rows
        row_bytes = math.prod(shape[1:]) * ELEMENT_BYTES[entry["dtype"]]
        if shape and max(stop for _, stop in ranges) > shape[0]:
            raise ArtifactError(f"{self.url}: tensor {full_name} has {shape[0]} rows, {ranges[-1][1]} are needed")
        parts = self.files.keep_ranges(
            self.file_of[full_name], [(begin + start * row_bytes, begin + stop * row_bytes) for start, stop in ranges]
        )
        joined = bytearray().join(parts)  # torch would warn of memory that it must not write to
        num_rows = sum(stop - start for start, stop in ranges)
        read_shape, dtype = [num_rows, *shape[1:]] if shape else [], TORCH_DTYPES[entry["dtype"]]
        return (
            torch.frombuffer(joined, dtype=dtype).view(read_shape) if joined else torch.empty(read_shape, dtype=dtype)
        )

    def scale_of(self, full_name: str, rows: Rows | None) -> Float[Tensor, "..."]:
        """What the rows of an 8-bit weight are multiplied by: one number, one for each row, or one for each block.

        Raises:
            ArtifactError: There is no scale.

        Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2; transformers' FineGrainedFP8Config
        """
        scale, shape = self.read_stored(self.scale_name(full_name)).float(), self.entry(full_name)["shape"]
        if scale.numel() == 1:
            return scale.reshape(())
        wanted = torch.cat([torch.arange(*limits) for limits in rows or [(0, shape[0])]])
        if len(scale) == shape[0]:
            return scale.view(shape[0], -1)[wanted]
        block_rows, block_columns = self.fp8_block
        return scale[wanted // block_rows].repeat_interleave(block_columns, dim=1)[:, : shape[1]]

    def scale_name(self, full_name: str) -> str:
        """Of the tensor with the scales of an 8-bit weight; ArtifactError where there is none."""
        for ending in SCALE_ENDINGS:
            if full_name + ending in self.file_of:
                return full_name + ending
        raise ArtifactError(f"{self.url}: tensor {full_name} has 8 bits and no {full_name}{SCALE_ENDINGS[0]}")

    @cached_property
    def fp8_block(self) -> tuple[int, int]:
        """Rows and columns of an 8-bit weight that share a scale."""
        quantization = json.loads(self.files.read("config.json")).get("quantization_config") or {}
        rows, columns = quantization.get("weight_block_size") or FP8_BLOCK
        return rows, columns

    def num_rows(self, name: str) -> int:
        """Of the tensor called `name` below the base model."""
        rows: int = self.entry(self.full_name(name))["shape"][0]
        return rows

    def entry(self, full_name: str) -> dict[str, Any]:
        """What the header says of a tensor: dtype, shape, data_offsets."""
        return self.headers[self.file_of[full_name]][full_name]

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors of all files."""
        return sum(math.prod(entry["shape"]) for entry in self.stored.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(self.files.num_bytes(name) for name in self.headers)

    @cached_property
    def outline(self) -> str:
        """Hash of the config, all headers and samples of every tensor; of a large model that is a hundredth of it.

        An edit between the samples is not seen. `model_fingerprint` hashes keys and values whole.
        """
        digest = hashlib.sha256(self.files.read("config.json"))
        for file, header in sorted(self.headers.items()):
            digest.update(json.dumps([file, header], sort_keys=True).encode())
            ranges = [part for name in sorted(header) for part in sample_ranges(*header[name]["data_offsets"])]
            for part in self.files.read_ranges(file, ranges):
                digest.update(part)
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
            raise ArtifactError(f"{self.url}: tensor {name}: {problem}")
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


def sample_ranges(begin: int, end: int) -> list[tuple[int, int]]:
    """Evenly spaced byte ranges, first and last included; the whole range where it is short."""
    if end - begin <= NUM_SAMPLES * SAMPLE_BYTES:
        return [(begin, end)]
    last = end - SAMPLE_BYTES
    starts = [begin + (last - begin) * index // (NUM_SAMPLES - 1) for index in range(NUM_SAMPLES)]
    return [(start, start + SAMPLE_BYTES) for start in starts]
