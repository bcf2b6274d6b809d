"""A training that was interrupted: where it was, kept in a file and read back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from lorc_core.attention.adapters import AdapterTensors
from lorc_core.measurement.training.latent_bases import Bases
from lorc_core.model.kinds import KeysValues

CHECKPOINT_FILE = "training.pt"


@dataclass(frozen=True)
class Trained:
    """What is trained, as plain tensors on the CPU."""

    bases: Bases
    adapters: AdapterTensors


@dataclass(frozen=True)
class TrainingProgress:
    """Where training is.

    Attributes:
        step: Steps done.
        stale_looks: Looks at the held-out text since the best one.
        least: The divergence of the best look, in nats per token.
        best: What was trained then.
    """

    step: int
    stale_looks: int
    least: float
    best: Trained

    def after_look(self, step: int, divergence: float, trained: Trained) -> "TrainingProgress":
        """Where training is after another look at the held-out text."""
        if divergence < self.least:
            return TrainingProgress(step, 0, divergence, trained)
        return TrainingProgress(step, self.stale_looks + 1, self.least, self.best)


@runtime_checkable
class Stateful(Protocol):
    """A module, an optimizer or its scheduler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class TrainingCheckpoint:
    """Everything that training goes on from, as plain tensors and numbers in one file.

    Attributes:
        directory: Of the file.
        parts: What has a state besides the progress, by name.
        generator: Of all draws.
    """

    directory: Path
    parts: Mapping[str, Stateful]
    generator: torch.Generator

    def save(self, progress: TrainingProgress) -> None:
        """Write the file, or keep the one before until the new one is whole."""
        self.directory.mkdir(parents=True, exist_ok=True)
        bases = [dict(layer.items()) for layer in progress.best.bases]
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        state["generator"] = self.generator.get_state()
        state["progress"] = (progress.step, progress.stale_looks, progress.least, bases, progress.best.adapters)
        partial = self.directory / f"{CHECKPOINT_FILE}.partial"
        torch.save(state, partial)
        partial.rename(self.directory / CHECKPOINT_FILE)

    def load(self) -> TrainingProgress | None:
        """Put every part into its state, and say where training was; None where there is no file."""
        if not (self.directory / CHECKPOINT_FILE).is_file():
            return None
        state = torch.load(self.directory / CHECKPOINT_FILE, weights_only=True, map_location="cpu")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        step, stale_looks, least, bases, adapters = state["progress"]
        return TrainingProgress(step, stale_looks, least, Trained([KeysValues(**layer) for layer in bases], adapters))
