"""Steps: units of work whose identity is the hash of their recipe and their inputs' identities.

A kind of step is one class: its fields are what its result depends on, its `run` does the work. The same recipe always
has the same path in the store, so a second run finds what the first one finished, and a changed field moves just what
depends on it. Where a step runs is the runner's business.
"""

import hashlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from lorc_core.model.architecture import Architecture
from lorc_core.model.stored.locations import ModelLocation
from pipeline.storage.store import Store

if TYPE_CHECKING:  # steps are built where few of them run, and what loads models takes seconds to import
    from transformers import PreTrainedModel

T = TypeVar("T")
Role = Literal["recipe", "pin", "place", "input"]
Recipe = Annotated[T, "recipe"]  # decides the result; a part of the identity
Pin = Annotated[T, "pin"]  # decides it too, as the content of a file does; a part of the identity
Place = Annotated[T, "place"]  # where to find things; no part of the identity
Input = Annotated[T, "input"]  # steps whose artifacts are read; a part of the identity unless None or empty

Progress = Iterator[tuple[int, int]]  # parts done, and all parts, each time that a long step tells


@dataclass(frozen=True)
class Need:
    """What a step asks of the cluster."""

    num_cpus: float = 1
    num_gpus: float = 0
    memory_bytes: int = 0


@cache
def library_versions() -> dict[str, str]:
    """Of those that decide what a model computes."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


@dataclass(frozen=True)
class ModelSize:
    """What running a model costs depends on: its shapes, and the numbers in all of its tensors."""

    architecture: Architecture
    num_parameters: int


@dataclass(frozen=True)
class ModelLoad:
    """How to load a model, and what decides the results of all that run it.

    Attributes:
        size: None where no one asks what the steps will take.
    """

    location: ModelLocation
    dtype: str
    trust_remote_code: bool
    content: str | None
    versions: dict[str, str] = field(default_factory=lambda: dict(library_versions()))
    size: ModelSize | None = None

    @property
    def pins(self) -> dict[str, Any]:
        return {"content": self.content, "dtype": self.dtype, "versions": self.versions}


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """One unit of work. Every kind is a frozen dataclass that derives from `FileStep` or `ModelStep`.

    A kind has a `name` and a `revision`, which is raised by one when `run` changes what it writes for the same recipe.
    Its fields are annotated by their roles: `Recipe[int]`, `Pin[str]`, `Place[Path]`, `Input[OtherStep]`.

    Attributes:
        model: The zoo's name of the model it belongs to, for progress and outcomes.
        label: Of the variant it belongs to, likewise; None where variants share it.
        need: Resources of its Ray task; None runs it in the driver.
    """

    name: ClassVar[str]
    revision: ClassVar[int]

    model: str
    label: str | None = None
    need: Need | None = Need()

    def of_role(self, role: Role) -> dict[str, Any]:
        """The fields annotated with a role."""
        return {
            spec.name: getattr(self, spec.name)
            for spec in fields(self)
            if role in getattr(spec.type, "__metadata__", ())
        }

    @property
    def pins(self) -> dict[str, Any]:
        return self.of_role("pin")

    @cached_property
    def fingerprint(self) -> str:
        inputs = {
            name: [step.fingerprint for step in read] if isinstance(read, tuple) else read.fingerprint
            for name, read in self.of_role("input").items()
            if read
        }
        identity = [self.name, self.revision, self.of_role("recipe"), self.pins, inputs]
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=json_value).encode()).hexdigest()[:20]

    @property
    def key(self) -> str:
        return f"{self.name}-{self.fingerprint}"

    @property
    def group(self) -> str:
        """Steps of one group run in one task, after all of their inputs."""
        return self.key

    def input_steps(self) -> Iterator["Step"]:
        for read in self.of_role("input").values():
            if read:
                yield from read if isinstance(read, tuple) else (read,)

    @property
    def log_key(self) -> str:
        """By which the trace of a failure is found."""
        return self.key

    @property
    def parts(self) -> tuple["Step", ...]:
        """Steps that did its work beside each other: their costs are its own, their artifacts go when it is done."""
        return ()

    def resume_dir(self, store: Store) -> Path | None:
        """What an interrupted step goes on from, removed once its artifact is there; None of one that begins again."""
        return None


@dataclass(frozen=True, kw_only=True)
class FileStep(Step):
    """A step that reads files and writes files."""

    @abstractmethod
    def run(self, output: Path, store: Store) -> None:
        """Write the artifact into the directory `output`, from what the store has of the inputs."""


@dataclass(frozen=True, kw_only=True)
class ModelStep(Step):
    """A step that runs a model, which all steps of its group share."""

    loads: ModelLoad

    @property
    def pins(self) -> dict[str, Any]:
        return self.loads.pins | super().pins

    @abstractmethod
    def batch_shape(self, store: Store) -> tuple[int, int]:
        """Windows, and tokens of each, of the largest batch that it gives to the model."""

    @abstractmethod
    def run(self, output: Path, store: Store, model: "PreTrainedModel") -> Progress | None:
        """Write the artifact into the directory `output`; a long step yields how far it has come."""


def json_value(value: Any) -> Any:
    """A dataclass as JSON has it: by its own `to_dict`, else field by field."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return {spec.name: getattr(value, spec.name) for spec in fields(value)}


def distinct(steps: Sequence[Step]) -> list[Step]:
    """The steps and everything they need, once each, inputs before what reads them."""
    by_key: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.key not in by_key:
            for needed in step.input_steps():
                visit(needed)
            by_key[step.key] = step

    for step in steps:
        visit(step)
    return list(by_key.values())
