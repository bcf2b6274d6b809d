"""The sections of a zoo file but its variants: models, texts, calibration, evaluation, gates, where things run.

Each class checks its own fields; what must fit between sections is in `consistency`.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Dtype = Literal["float32", "bfloat16", "float16"]
DocumentMarks = Literal["both", "begin", "end", "none"]
MOST = 2**31 - 1  # of whatever is counted: what fits the libraries' own integers
MAX_PATH = 4096  # characters
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Source = Annotated[str, Field(min_length=1, max_length=MAX_PATH)]
Seed = Annotated[int, Field(ge=0, le=MOST)]

GIB = 1024**3
ELEMENT_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
REGRESSION_TOLERANCE = 1e-3  # nats per token, of a rise that may come from other hardware or library versions
# Endings of text files, and the builder of `datasets` that reads each; an array of token ids needs none.
TEXT_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".npy": "tokens"}


class Strict(BaseModel):
    """Unknown fields and infinite numbers are errors; nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Resources(Strict):
    """What one Ray task that runs the whole model may use."""

    num_cpus: Annotated[float, Field(gt=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    memory_gib: Annotated[float, Field(ge=0)] = 0

    @property
    def memory_bytes(self) -> int:
        return round(self.memory_gib * GIB)


class ModelEntry(Strict):
    """One base model.

    `source` is a directory, written with a leading `./`, `../`, `/` or `~` and relative to the zoo file, a URL that
    fsspec knows (`s3://bucket/model`), or a hub id.
    `config` is a local copy of a hub model's config.json, so that `lorc plan` needs no network. `document_marks` says
    which of the tokenizer's marks stood around each document when the model was trained.
    """

    name: Name
    source: Source
    revision: str | None = None
    dtype: Dtype = "bfloat16"
    config: Path | None = None
    trust_remote_code: bool = False
    document_marks: DocumentMarks = "both"
    resources: Resources = Resources()

    @property
    def element_bytes(self) -> int:
        """Bytes of one number in the model's dtype."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def is_directory(self) -> bool:
        return self.source.startswith("/")  # resolved when it was read

    @property
    def is_url(self) -> bool:
        return "://" in self.source

    @field_validator("source")
    @classmethod
    def resolve_source(cls, source: str, info: ValidationInfo) -> str:
        if source.startswith("/"):
            return source
        if source.rstrip("/") == "~":
            raise ValueError("the home directory is no model's")
        if source.startswith("~"):
            return str(expanded(source))
        if source.startswith(("./", "../")):
            return str((zoo_folder(info) / source).resolve())
        source = source.removeprefix("hf://")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?|[a-z][a-z0-9+.-]*://\S+", source):
            raise ValueError(
                "a directory starts with ./, ../, / or ~, a URL with its scheme; a hub id is name or owner/name"
            )
        return source

    @field_validator("config")
    @classmethod
    def resolve_config(cls, config: Path | None, info: ValidationInfo) -> Path | None:
        return None if config is None else (zoo_folder(info) / config).resolve()


class TextEntry(Strict):
    """A text: a .txt, .jsonl, .json or .parquet file beside the zoo file, token ids in a .npy file, or a hub data set.

    A .txt file is one document, or several between `separator`s. `part` takes the documents (of a .npy file the
    tokens) from one share of the text to another, so that calibration and evaluation can be kept apart.
    """

    name: Name
    source: Source
    config: str | None = None
    revision: str | None = None
    split: str = "test"
    column: str = "text"
    separator: Annotated[str, Field(min_length=1)] | None = None
    part: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)

    @property
    def file(self) -> Path | None:
        return Path(self.source) if Path(self.source).suffix in TEXT_FORMATS else None

    @field_validator("part")
    @classmethod
    def part_is_some(cls, part: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if part[0] >= part[1]:
            raise ValueError("part must go from a share of the text to a larger one")
        one_document = info.data.get("source", "").endswith(".txt") and info.data.get("separator") is None
        if one_document and part != (0.0, 1.0):
            raise ValueError("a .txt is one document, of which no part can be taken, unless it has a separator")
        return part

    @field_validator("source")
    @classmethod
    def resolve_file(cls, source: str, info: ValidationInfo) -> str:
        if Path(source).suffix in TEXT_FORMATS:
            path = (zoo_folder(info) / expanded(source)).resolve()
            try:
                if not path.is_file():
                    raise ValueError(f"text file {path} does not exist")
            except OSError as error:  # a name that the file system does not take
                raise ValueError(f"text file: {error.strerror}") from error
            return str(path)
        if source.startswith(("./", "../", "/", "~")):
            raise ValueError(f"a text file's name must end in one of {', '.join(TEXT_FORMATS)}")
        return source


class Calibration(Strict):
    """Text on which methods and schedules measure; never the evaluation's.

    Windows of each text are pinned by `seed` and spread over `shards` tasks. Schedules that measure use the first
    `probe_windows` of each text, 16 or as many as there are. `allow_rank_deficient` lets a text be shorter than a
    block is wide.
    """

    texts: Annotated[tuple[TextEntry, ...], Field(min_length=1)]
    window_tokens: Annotated[int, Field(ge=2, le=MOST)] = 2048
    num_windows: Annotated[int, Field(ge=1, le=MOST)] = 128
    probe_windows: Annotated[int, Field(ge=1, le=MOST, default_factory=lambda given: min(16, given["num_windows"]))]
    batch_size: Annotated[int, Field(ge=1, le=MOST)] = 4
    shards: Annotated[int, Field(ge=1, le=MOST)] = 1
    seed: Seed = 0
    allow_rank_deficient: bool = False

    @field_validator("probe_windows", "shards")
    @classmethod
    def windows_are_there(cls, count: int, info: ValidationInfo) -> int:
        num_windows = info.data.get("num_windows", count)
        if count > num_windows:
            raise ValueError(f"input should be at most num_windows, {num_windows}")
        return count

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.window_tokens * len(self.texts)


class Evaluation(Strict):
    """Perplexity on pinned, non-overlapping windows of each text."""

    texts: Annotated[tuple[TextEntry, ...], Field(min_length=1)]
    window_tokens: Annotated[int, Field(ge=2, le=MOST)] = 2048
    num_windows: Annotated[int, Field(ge=2, le=MOST)] = 64
    batch_size: Annotated[int, Field(ge=1, le=MOST)] = 8
    seed: Seed = 0


class Gates(Strict):
    """What a variant must hold, relative to the baseline of the same run, to be promoted.

    `max_perplexity_rise` is relative (0.05 is 5 %); `min_recovery` is baseline/variant perplexity;
    `regression_tolerance` is the rise in nats per token that `lorc regress` forgives beside the standard error.
    """

    max_perplexity_rise: Annotated[float, Field(ge=0)] | None = None
    min_recovery: Annotated[float, Field(gt=0, le=1)] | None = None
    regression_tolerance: Annotated[float, Field(ge=0)] = REGRESSION_TOLERANCE

    @model_validator(mode="after")
    def some_gate(self) -> "Gates":
        if self.max_perplexity_rise is None and self.min_recovery is None:
            raise ValueError("give max_perplexity_rise, min_recovery or both")
        return self


class Registry(Strict):
    """Where variants are registered: `tracking_uri` if given, else $MLFLOW_TRACKING_URI, else the work directory."""

    tracking_uri: str | None = None
    experiment: str | None = None


class Cluster(Strict):
    """The Ray cluster (`address`; absent: one is started here) and the devices that `lorc plan` plans for.

    Steps of `models_in_flight` models run at a time, so that a night that ends early has some models whole. A step
    whose worker is lost is run `lost_worker_retries` times more. What fails for a full disk, a locked database or an
    MLflow server that is away is done again for `wait_s` seconds, all in all.
    """

    address: str | None = None
    models_in_flight: Annotated[int, Field(ge=1, le=MOST)] = 16
    lost_worker_retries: Annotated[int, Field(ge=0, le=MOST)] = 2
    wait_s: Annotated[float, Field(ge=0)] = 300
    gpus: Annotated[int, Field(ge=0, le=MOST)] = 0
    gpu_memory_gib: Annotated[Annotated[float, Field(gt=0)] | None, Field(validate_default=True)] = None

    @field_validator("gpu_memory_gib")
    @classmethod
    def gpus_have_memory(cls, gpu_memory_gib: float | None, info: ValidationInfo) -> float | None:
        if info.data.get("gpus") and gpu_memory_gib is None:
            raise ValueError("gpus needs gpu_memory_gib")
        return gpu_memory_gib


class Serving(Strict):
    """The load whose cache `lorc plan` sizes."""

    batch_size: Annotated[int, Field(ge=1, le=MOST)] = 64
    context_tokens: Annotated[int, Field(ge=1, le=MOST)] = 2048


def zoo_folder(info: ValidationInfo) -> Path:
    return Path(info.context["folder"]) if info.context else Path.cwd()


def expanded(source: str) -> Path:
    """A path with the home directory in place of `~`."""
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{source[:50]}: no such home directory") from error
