"""What schedules read and what they give: spectra and probes of all layers in, ranks out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lorc_core.errors import NumericsError
from lorc_core.model.blocks import Partition
from lorc_core.model.kinds import KINDS, KeysValues, Kind

Energies = tuple[tuple[float, ...], ...]  # of each block its directions, falling
Probe = Literal["fisher", "attention_errors", "curves"]  # a field of `Probes`


@dataclass(frozen=True)
class KindSpectrum:
    """What the schedules read of one layer's keys or values. Energies are of each direction of each block, falling.

    Attributes:
        partition: The blocks.
        log10_condition: Of the weight; infinite where it is rank-deficient.
        weights: Squared singular values of the block's rows of the weight.
        states: Eigenvalues of the states' second moment.
        read: What each direction saves of the error that the method minimises.
    """

    partition: Partition
    log10_condition: float
    weights: Energies = field(default=(), repr=False)
    states: Energies = field(default=(), repr=False)
    read: Energies = field(default=(), repr=False)

    @classmethod
    def of_flat(cls, partition: Partition, log10_condition: float, *energies: Sequence[float]) -> "KindSpectrum":
        """From flat sequences.

        Args:
            partition: The blocks.
            log10_condition: Of the weight.
            energies: Those of `weights`, `states` and `read`, each one block after another.
        """
        width = partition.width
        by_block = (
            tuple(tuple(flat[start : start + width]) for start in range(0, len(flat), width)) for flat in energies
        )
        return cls(partition, log10_condition, *by_block)


def energy_fractions(energies: Energies) -> Energies:
    """Each direction's share of the energy of all blocks; a weight of zeros has no direction worth a float."""
    whole = sum(map(sum, energies)) or 1.0
    return tuple(tuple(energy / whole for energy in block) for block in energies)


class LayerSpectrum(KeysValues[KindSpectrum]):
    """What the schedules read of one layer."""

    @property
    def kv_width(self) -> int:
        """Floats per token of the layer's keys, or values, uncompressed."""
        return self.keys.partition.kv_width


class LayerRanks(KeysValues[tuple[int, ...]]):
    """Ranks of each block of one layer: latent floats cached per token."""

    def floats(self, kind: Kind) -> int:
        """Floats cached per token, of all blocks."""
        return sum(self[kind])


@dataclass(frozen=True, repr=False)
class RankSchedule:
    """Ranks for every layer.

    Attributes:
        layers: First layer first.
        kv_width: Floats per token of one layer's keys, or values, uncompressed.
        note: Where the schedule left its source's form, or what it solved for; empty mostly.
        predicted_rise: Of the loss, in nats per token; None where energies are in another unit. See `predicted_rise`.
    """

    layers: tuple[LayerRanks, ...]
    kv_width: int
    note: str = ""
    predicted_rise: float | None = None

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "RankSchedule":
        """The inverse of `dataclasses.asdict`."""
        layers = tuple(LayerRanks(*(tuple(layer[kind]) for kind in KINDS)) for layer in saved["layers"])
        return cls(layers, saved["kv_width"], saved["note"], saved["predicted_rise"])

    def __repr__(self) -> str:
        note = f", {self.note}" if self.note else ""
        return f"RankSchedule({len(self.layers)} layers, {self.kept}{note})"

    @property
    def floats_per_token(self) -> int:
        """Floats that a compressed cache holds of each token."""
        return sum(layer.floats(kind) for layer in self.layers for kind in KINDS)

    @property
    def full_floats_per_token(self) -> int:
        """Floats that the untouched model's cache holds of each token."""
        return len(KINDS) * self.kv_width * len(self.layers)

    @property
    def kept_fraction(self) -> float:
        """Share of the untouched model's cached floats, in (0, 1]."""
        return self.floats_per_token / self.full_floats_per_token

    @property
    def kept(self) -> str:
        """What is kept of a token's floats, in words."""
        return f"{self.floats_per_token} of {self.full_floats_per_token} floats per token ({self.kept_fraction:.4f})"


@dataclass(frozen=True)
class Probes:
    """What a schedule may measure on calibration text beside the spectra.

    Attributes:
        fisher: Per layer and kind, for each channel, the mean over inputs of sqrt(E[(dL/dW)^2]).
        attention_errors: Per layer, levels of falling energy with the attention output's relative error at each.
        curves: Per layer and kind, the rise of the loss (nats per token) with that layer and kind alone compressed.
    """

    fisher: tuple[KeysValues[tuple[float, ...]], ...] = field(default=(), repr=False)
    attention_errors: tuple[tuple["ErrorLevel", ...], ...] = field(default=(), repr=False)
    curves: tuple[KeysValues[tuple["CurvePoint", ...]], ...] = field(default=(), repr=False)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Probes":
        """The inverse of `dataclasses.asdict`."""
        return cls(
            fisher=tuple(KeysValues(*(tuple(layer[kind]) for kind in KINDS)) for layer in saved["fisher"]),
            attention_errors=tuple(
                tuple(ErrorLevel(**level) for level in layer) for layer in saved["attention_errors"]
            ),
            curves=tuple(
                KeysValues(*(tuple(CurvePoint(**point) for point in layer[kind]) for kind in KINDS))
                for layer in saved["curves"]
            ),
        )

    def check_finite(self) -> None:
        """Raise NumericsError where a measurement is NaN or infinite, naming the layer."""
        measured = {
            f"layer {idx}: the attention error": [level.error for level in levels]
            for idx, levels in enumerate(self.attention_errors)
        }
        for kind in KINDS:
            for idx, channels in enumerate(self.fisher):
                measured[f"layer {idx} {kind}: the Fisher information"] = list(channels[kind])
            for idx, curves in enumerate(self.curves):
                measured[f"layer {idx} {kind}: the loss curve"] = [point.rise for point in curves[kind]]
        for what, numbers in measured.items():
            if not all(map(math.isfinite, numbers)):
                raise NumericsError(f"{what} measured on the calibration text holds NaN or infinity")


@dataclass(frozen=True)
class ErrorLevel:
    """Floats per token of keys and values, and the relative error of the layer's attention output."""

    keys: int
    values: int
    error: float


@dataclass(frozen=True)
class CurvePoint:
    """Floats per token of one layer and kind, and the rise of the loss in nats per token."""

    floats: int
    rise: float
