"""The zoo file: which models, compressed how, evaluated on what, accepted by which gates.

Validated here once and trusted everywhere else; every error names the file, the field and what is allowed.
"""

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorc_core.errors import ConfigError
from lorc_core.methods import known_method
from lorc_core.schedule import SCHEDULES, Energy, Progressive, Schedule, Uniform, known_schedule

Dtype = Literal["float32", "bfloat16", "float16"]
KeptFraction = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


# Endings of text files, and the builder of `datasets` that reads each.
TEXT_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Strict(BaseModel):
    """Unknown fields are errors; nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Resources(Strict):
    """What one Ray task that runs the whole model may use."""

    num_cpus: Annotated[float, Field(gt=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    memory_gib: Annotated[float, Field(ge=0)] = 0

    @property
    def memory_bytes(self) -> int:
        return round(self.memory_gib * 1024**3)


class ModelEntry(Strict):
    """One base model.

    `source` is a directory, written with a leading `./`, `../`, `/` or `~` and relative to the zoo file, or a hub id.
    `config` is a local copy of a hub model's config.json, so that `lorc plan` needs no network.
    """

    name: Name
    source: str
    revision: str | None = None
    dtype: Dtype = "bfloat16"
    config: Path | None = None
    trust_remote_code: bool = False
    resources: Resources = Resources()

    @property
    def is_directory(self) -> bool:
        return self.source.startswith("/")  # resolved when it was read

    @field_validator("source")
    @classmethod
    def resolve_source(cls, source: str, info: ValidationInfo) -> str:
        if source.startswith("/"):
            return source
        if source.startswith("~"):
            return str(Path(source).expanduser())
        if source.startswith(("./", "../")):
            return str((zoo_folder(info) / source).resolve())
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
            raise ValueError("a directory starts with ./, ../, / or ~; a hub id is name or owner/name")
        return source

    @field_validator("config")
    @classmethod
    def resolve_config(cls, config: Path | None, info: ValidationInfo) -> Path | None:
        return None if config is None else (zoo_folder(info) / config).resolve()


class VariantEntry(Strict):
    """One method and schedule at one budget or, with a list, at several.

    `name` is what tables and versions call it; the method's and the schedule's names if absent.
    """

    name: Name | None = None
    method: str = "lorc"
    schedule: InstanceOf[Uniform] | InstanceOf[Progressive] | InstanceOf[Energy]
    kept_fraction: Annotated[tuple[KeptFraction, ...], Field(min_length=1)]

    @field_validator("method")
    @classmethod
    def know_method(cls, method: str) -> str:
        return known_method(method).name

    @field_validator("schedule", mode="before")
    @classmethod
    def build_schedule(cls, schedule: Any) -> Schedule:
        settings = dict(schedule) if isinstance(schedule, dict) else {"name": schedule}
        name = settings.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f"a schedule is a name, or a mapping with a name and fields; known are {known_names()}")
        schedule_class = type(known_schedule(name))
        allowed = [field.name for field in fields(schedule_class) if field.init]
        if unknown := sorted(set(settings) - set(allowed)):
            raise ValueError(f"unknown field {unknown[0]}; {schedule_class.name} allows {', '.join(allowed)}")
        try:
            return TypeAdapter(schedule_class).validate_python(settings)
        except ValidationError as error:
            problem = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error

    @field_validator("kept_fraction", mode="before")
    @classmethod
    def one_or_many(cls, kept_fraction: Any) -> Any:
        return kept_fraction if isinstance(kept_fraction, list | tuple) else (kept_fraction,)


class TextEntry(Strict):
    """An evaluation text: a .txt, .jsonl, .json or .parquet file beside the zoo file, or a hub data set."""

    name: Name
    source: str
    config: str | None = None
    revision: str | None = None
    split: str = "test"
    column: str = "text"

    @property
    def file(self) -> Path | None:
        return Path(self.source) if Path(self.source).suffix in TEXT_FORMATS else None

    @field_validator("source")
    @classmethod
    def resolve_file(cls, source: str, info: ValidationInfo) -> str:
        if Path(source).suffix in TEXT_FORMATS:
            path = (zoo_folder(info) / Path(source).expanduser()).resolve()
            if not path.is_file():
                raise ValueError(f"text file {path} does not exist")
            return str(path)
        if source.startswith(("./", "../", "/", "~")):
            raise ValueError(f"a text file's name must end in one of {', '.join(TEXT_FORMATS)}")
        return source


class Evaluation(Strict):
    """Perplexity on pinned, non-overlapping windows of each text."""

    texts: Annotated[tuple[TextEntry, ...], Field(min_length=1)]
    window_tokens: Annotated[int, Field(ge=2)] = 2048
    num_windows: Annotated[int, Field(ge=2)] = 64
    batch_size: Annotated[int, Field(ge=1)] = 8
    seed: int = 0


class Gates(Strict):
    """What a variant must hold, relative to the baseline of the same run, to be promoted.

    `max_perplexity_rise` is relative (0.05 is 5 %); `min_recovery` is baseline/variant perplexity;
    `regression_tolerance` is the rise in nats per token that `lorc regress` forgives beside the standard error.
    """

    max_perplexity_rise: Annotated[float, Field(ge=0)] | None = None
    min_recovery: Annotated[float, Field(gt=0, le=1)] | None = None
    regression_tolerance: Annotated[float, Field(ge=0)] = 1e-3

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
    """The Ray cluster (`address`; absent: one is started here) and the devices that `lorc plan` plans for."""

    address: str | None = None
    gpus: Annotated[int, Field(ge=0)] = 0
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def gpus_have_memory(self) -> "Cluster":
        if self.gpus and self.gpu_memory_gib is None:
            raise ValueError("gpus needs gpu_memory_gib")
        return self


class Serving(Strict):
    """The load whose cache `lorc plan` sizes."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    context_tokens: Annotated[int, Field(ge=1)] = 2048


class Zoo(Strict):
    """A whole zoo file."""

    name: Name
    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)]
    variants: Annotated[tuple[VariantEntry, ...], Field(min_length=1)]
    evaluation: Evaluation
    gates: Gates
    registry: Registry = Registry()
    cluster: Cluster = Cluster()
    serving: Serving = Serving()

    @model_validator(mode="after")
    def names_differ(self) -> "Zoo":
        for field, names in (
            ("models", [model.name for model in self.models]),
            ("evaluation.texts", [text.name for text in self.evaluation.texts]),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{field}: the name {twice[0]!r} is used twice")
        labels = [variant_label(variant, kept) for variant in self.variants for kept in variant.kept_fraction]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"variants: two are called {twice[0]}; give one of them a name")
        return self


def known_names() -> str:
    return ", ".join(sorted(SCHEDULES))


def zoo_folder(info: ValidationInfo) -> Path:
    return Path(info.context["folder"]) if info.context else Path.cwd()


def load_zoo(path: Path | str) -> Zoo:
    """Read and check a zoo file.

    Raises:
        ConfigError: The file is absent, is not YAML, or a field is wrong; one line per wrong field.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"zoo file {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping with the fields {', '.join(Zoo.model_fields)}")
    try:
        return Zoo.model_validate(content, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise ConfigError("\n".join(describe(path, Zoo, problem) for problem in root_problems(error))) from error


def root_problems(error: ValidationError) -> list[Any]:
    """pydantic's errors without those of a list that is only too short because its entries are wrong."""
    problems = error.errors()

    def follows(problem: Any) -> bool:
        inside = (other["loc"][: len(problem["loc"])] == problem["loc"] for other in problems if other is not problem)
        return problem["type"] == "too_short" and any(inside)

    return [problem for problem in problems if not follows(problem)]


def describe(path: Path, root: type[BaseModel], problem: Any) -> str:
    """One pydantic error as one line: file, field, what was found, what is allowed."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        allowed = ", ".join(fields_at(root, problem["loc"][:-1]))
        return f"{path}: {where}: unknown field; allowed here are {allowed}"
    found = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ").removesuffix(".")
    if len(found) > 100:
        found = ""
    return f"{path}: {where + ': ' if where else ''}{message[0].lower() + message[1:]}{found}"


def fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the (nested) model that a pydantic error location points into."""
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = nested_model(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside a type such as Annotated[tuple[Model, ...], ...] or Model | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := nested_model(argument):
            return found
    return None


def variant_label(entry: VariantEntry, kept_fraction: float) -> str:
    """How tables, runs and registered versions call a variant: `lorc-progressive-0.5`."""
    return f"{entry.name or f'{entry.method}-{entry.schedule.name}'}-{kept_fraction:g}"
