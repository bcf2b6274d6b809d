"""Steps: units of work whose identity is the hash of their recipe and their inputs' identities.

The same recipe always has the same path in the store, so a second run finds what the first one finished, and a
changed field moves just what depends on it. Where a step runs is the runner's business.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.storage.store import Store

# Raised by one when a step's function changes what it writes for the same recipe.
REVISIONS = {
    "calibrate": 1,
    "decompose": 4,
    "train": 1,
    "change_basis": 1,
    "probe": 1,
    "schedule": 3,
    "search": 1,
    "variant": 4,
    "errors": 2,
    "windows": 2,
    "evaluate": 1,
    "register": 1,
    "regress": 1,
}


@dataclass(frozen=True)
class Need:
    """What a step asks of the cluster."""

    num_cpus: float = 1
    num_gpus: float = 0
    memory_bytes: int = 0


@dataclass(frozen=True)
class ModelLoad:
    """How to load a model."""

    model_dir: Path
    dtype: str
    trust_remote_code: bool


@dataclass(frozen=True)
class Step:
    """One unit of work.

    Attributes:
        name: Of the function in `pipeline.tasks` that does it.
        model: The zoo's name of the model it belongs to, for progress and outcomes.
        recipe: Keyword arguments that decide the result, JSON values; a part of the identity.
        pins: What else decides the result, as the content of the files at `places` does; a part of the identity.
        places: Keyword arguments that say where to find things; no part of the identity.
        loads: How to load the model that the function gets as `model`; None where it needs none.
        inputs: Steps whose artifacts are read, passed as directories under these names; a tuple as a list of them.
        need: Resources of its Ray task; None runs it in the driver.
        group: Steps of one group run in one task, after all of their inputs; evaluations share a loaded model so.
    """

    name: str
    model: str
    recipe: dict[str, Any]
    pins: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Any] = field(default_factory=dict)
    loads: "ModelLoad | None" = None
    inputs: dict[str, "Step | tuple[Step, ...]"] = field(default_factory=dict)
    need: Need | None = Need()
    group: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        inputs = {
            name: [step.fingerprint for step in found] if isinstance(found, tuple) else found.fingerprint
            for name, found in self.inputs.items()
        }
        identity = [self.name, REVISIONS[self.name], self.recipe, self.pins, inputs]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]

    @property
    def key(self) -> str:
        return f"{self.name}-{self.fingerprint}"

    def input_steps(self) -> Iterator["Step"]:
        for found in self.inputs.values():
            yield from found if isinstance(found, tuple) else (found,)


def kwargs_of(step: Step, store: Store) -> dict[str, Any]:
    """All keyword arguments of the step's function."""
    inputs = {
        name: [store.path(one) for one in found] if isinstance(found, tuple) else store.path(found)
        for name, found in step.inputs.items()
    }
    return {**step.recipe, **step.places, **inputs}


@dataclass(frozen=True)
class Call:
    """A step made ready to run anywhere: its function's name, arguments and output path."""

    key: str
    name: str
    model: str
    output: Path
    kwargs: dict[str, Any]
    loads: ModelLoad | None


@dataclass(frozen=True)
class Outcome:
    """What came of one step. `status` is "ran", "cached", "failed" or "skipped" (an input failed)."""

    key: str
    name: str
    model: str
    status: str
    error: str | None
    elapsed_s: float


@dataclass(frozen=True)
class Milestone:
    """How far a long step has come: `done` of `total` parts."""

    key: str
    label: str
    done: int
    total: int


def call_of(step: Step, store: Store) -> Call:
    return Call(step.key, step.name, step.model, store.path(step), kwargs_of(step, store), step.loads)


def distinct(steps: Sequence[Step]) -> list[Step]:
    """The steps and everything they need, once each, inputs before what reads them."""
    found: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.key not in found:
            for needed in step.input_steps():
                visit(needed)
            found[step.key] = step

    for step in steps:
        visit(step)
    return list(found.values())


def cached_outcomes(steps: Sequence[Step], store: Store) -> dict[str, Outcome]:
    """Outcomes by key of the steps whose artifacts are finished."""
    return {
        step.key: Outcome(step.key, step.name, step.model, "cached", None, 0.0) for step in steps if store.is_done(step)
    }
