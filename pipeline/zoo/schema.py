"""The zoo file: which models, compressed how, evaluated on what, accepted by which gates.

Validated here once and trusted everywhere else; `zoo_file` reads one.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorc_core.methods import Method
from lorc_core.ranks.schedules import Schedule
from pipeline.zoo.methods import method_of, schedule_of

Dtype = Literal["float32", "bfloat16", "float16"]
DocumentMarks = Literal["both", "begin", "end", "none"]
KeptFraction = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


# Endings of text files, and the builder of `datasets` that reads each; an array of token ids needs none.
TEXT_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".npy": "tokens"}
# What a zoo file compresses by where it names no method: the best of docs/quality.md.
DEFAULT_METHOD, DEFAULT_CALIBRATED_METHOD = "lorc_q", "kq_joint"


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
    `config` is a local copy of a hub model's config.json, so that `lorc plan` needs no network. `document_marks` says
    which of the tokenizer's marks stood around each document when the model was trained.
    """

    name: Name
    source: str
    revision: str | None = None
    dtype: Dtype = "bfloat16"
    config: Path | None = None
    trust_remote_code: bool = False
    document_marks: DocumentMarks = "both"
    resources: Resources = Resources()

    @property
    def element_bytes(self) -> int:
        """Bytes of one number in the model's dtype."""
        return getattr(torch, self.dtype).itemsize

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


class Budget(Strict):
    """Memory for the cache and the factors beside it, at a serving load; the weights are not counted."""

    memory_gib: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(ge=1)]
    context_tokens: Annotated[int, Field(ge=1)]

    @property
    def memory_bytes(self) -> int:
        return round(self.memory_gib * 1024**3)


class VariantEntry(Strict):
    """One method and schedule at one budget or, with a list, at several.

    `method` is a preset's name, or a mapping: `preset` with changed axes of `keys` and `values`, or both written out,
    or `per_layer` with methods for single layers, or `training` of the factors; changed ones need a `name`. `schedule`
    is the method's own if absent.
    `name` is what tables and versions call it; the method's and the schedule's names if absent.
    """

    name: Name | None = None
    method: InstanceOf[Method]
    schedule: Annotated[InstanceOf[Schedule], Field(validate_default=True)] = None  # type: ignore[assignment]
    kept_fraction: tuple[KeptFraction, ...] = ()
    budget: Budget | None = None

    @field_validator("method", mode="before")
    @classmethod
    def build_method(cls, method: Any) -> Method:
        return method_of(method)

    @field_validator("schedule", mode="before")
    @classmethod
    def build_schedule(cls, schedule: Any, info: ValidationInfo) -> Schedule:
        if schedule is None and (method := info.data.get("method")) is not None:
            return method.schedule
        return schedule_of(schedule if schedule is not None else "uniform")  # the wrong method is the error to tell

    @field_validator("kept_fraction", mode="before")
    @classmethod
    def one_or_many(cls, kept_fraction: Any) -> Any:
        return kept_fraction if isinstance(kept_fraction, list | tuple) else (kept_fraction,)

    @model_validator(mode="after")
    def some_budget(self) -> "VariantEntry":
        if bool(self.kept_fraction) == (self.budget is not None):
            raise ValueError("give kept_fraction or budget, one of them")
        self.method.check_schedule(self.schedule)
        return self

    @property
    def budgets(self) -> tuple[float | Budget, ...]:
        """Each variant's: the share of floats to keep, or bytes."""
        return self.kept_fraction or ((self.budget,) if self.budget else ())

    @property
    def needs_calibration(self) -> bool:
        return self.method.needs_calibration or self.schedule.probe is not None


class TextEntry(Strict):
    """A text: a .txt, .jsonl, .json or .parquet file beside the zoo file, token ids in a .npy file, or a hub data set.

    A .txt file is one document, or several between `separator`s. `part` takes the documents (of a .npy file the
    tokens) from one share of the text to another, so that calibration and evaluation can be kept apart.
    """

    name: Name
    source: str
    config: str | None = None
    revision: str | None = None
    split: str = "test"
    column: str = "text"
    separator: str | None = None
    part: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)

    @property
    def file(self) -> Path | None:
        return Path(self.source) if Path(self.source).suffix in TEXT_FORMATS else None

    @field_validator("part")
    @classmethod
    def part_is_some(cls, part: tuple[float, float]) -> tuple[float, float]:
        if part[0] >= part[1]:
            raise ValueError("part must go from a share of the text to a larger one")
        return part

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


class Calibration(Strict):
    """Text on which methods and schedules measure; never the evaluation's.

    Windows of each text are pinned by `seed` and spread over `shards` tasks. Schedules that measure use the first
    `probe_windows` of each text. `allow_rank_deficient` lets a text be shorter than a block is wide.
    """

    texts: Annotated[tuple[TextEntry, ...], Field(min_length=1)]
    window_tokens: Annotated[int, Field(ge=2)] = 2048
    num_windows: Annotated[int, Field(ge=1)] = 128
    probe_windows: Annotated[int, Field(ge=1)] = 16
    batch_size: Annotated[int, Field(ge=1)] = 4
    shards: Annotated[int, Field(ge=1)] = 1
    seed: int = 0
    allow_rank_deficient: bool = False

    @model_validator(mode="after")
    def shards_have_windows(self) -> "Calibration":
        for name, value in (("shards", self.shards), ("probe_windows", self.probe_windows)):
            if value > self.num_windows:
                raise ValueError(f"{name} is {value}, of {self.num_windows} num_windows")
        return self

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.window_tokens * len(self.texts)


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
    calibration: Calibration | None = None
    evaluation: Evaluation
    gates: Gates
    registry: Registry = Registry()
    cluster: Cluster = Cluster()
    serving: Serving = Serving()

    @model_validator(mode="before")
    @classmethod
    def choose_methods(cls, content: Any) -> Any:
        """A variant without a method gets the best one that there is data for."""
        if not isinstance(content, dict) or not isinstance(content.get("variants"), list):
            return content
        method = DEFAULT_CALIBRATED_METHOD if content.get("calibration") else DEFAULT_METHOD
        variants = [{"method": method} | one if isinstance(one, dict) else one for one in content["variants"]]
        return content | {"variants": variants}

    @model_validator(mode="after")
    def calibration_is_there(self) -> "Zoo":
        for entry in self.variants:
            if self.calibration is None and entry.needs_calibration:
                what = entry.method.name if entry.method.needs_calibration else f"schedule {entry.schedule.name}"
                raise ValueError(f"variants: {what} measures on text, but there is no calibration")
        return self

    @model_validator(mode="after")
    def calibration_is_not_evaluated(self) -> "Zoo":
        for text in self.calibration.texts if self.calibration else ():
            for other in self.evaluation.texts:
                same = (text.source, text.config, text.split) == (other.source, other.config, other.split)
                if same and max(text.part[0], other.part[0]) < min(text.part[1], other.part[1]):
                    raise ValueError(
                        f"calibration.texts: {text.name} is also evaluated, as {other.name}; give each its part"
                    )
        return self

    @model_validator(mode="after")
    def names_differ(self) -> "Zoo":
        calibrated = self.calibration.texts if self.calibration else ()
        for field, names in (
            ("models", [model.name for model in self.models]),
            ("evaluation.texts", [text.name for text in self.evaluation.texts]),
            ("calibration.texts", [text.name for text in calibrated]),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{field}: the name {twice[0]!r} is used twice")
        methods: dict[str, Method] = {}
        for variant in self.variants:
            if methods.setdefault(variant.method.name, variant.method) != variant.method:
                raise ValueError(f"variants: two methods are called {variant.method.name!r}")
        labels = [variant_label(variant, budget) for variant in self.variants for budget in variant.budgets]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"variants: two are called {twice[0]}; give one of them a name")
        return self


def cautions(zoo: Zoo) -> list[str]:
    """What a zoo file may do but its author should know."""
    if zoo.calibration is None or zoo.calibration.window_tokens >= zoo.evaluation.window_tokens:
        return []
    rotated = [
        entry.method.name
        for entry in zoo.variants
        for method in (entry.method, *entry.method.layers.values())
        if method.keys.statistics == "calibration" and method.keys.space == "post_rope"
    ]
    if not rotated:
        return []
    names = ", ".join(dict.fromkeys(rotated))
    caution = (
        f"{names}: rotated keys are calibrated on positions below {zoo.calibration.window_tokens} and evaluated on up "
        f"to {zoo.evaluation.window_tokens}; let calibration.window_tokens span the positions that will be used"
    )
    return [caution]


def zoo_folder(info: ValidationInfo) -> Path:
    return Path(info.context["folder"]) if info.context else Path.cwd()


def variant_label(entry: VariantEntry, budget: float | Budget) -> str:
    """How tables, runs and registered versions call a variant: `lorc-progressive-0.5`, `kq_joint-energy-16GiB`."""
    size = f"{budget.memory_gib:g}GiB" if isinstance(budget, Budget) else f"{budget:g}"
    return f"{entry.name or f'{entry.method.name}-{entry.schedule.name}'}-{size}"
