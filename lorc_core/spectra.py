"""What schedules read and what they give: spectra of all layers in, ranks out.

A staircase orders the rank steps of one layer's keys or values, best first, so that every schedule only has to say how
far to climb each.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lorc_core.architecture import KINDS, Kind
from lorc_core.blocks import Partition
from lorc_core.errors import NumericsError

Energies = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class KindSpectrum:
    """What the schedules read of one layer's keys or values.

    `log10_condition` is the weight's; the rest are energies of each block, falling: squared singular values of its rows
    of the weight, eigenvalues of the states' second moment, and what each direction saves of the error that the method
    minimises.
    """

    partition: Partition
    log10_condition: float
    weights: Energies = ()
    states: Energies = ()
    read: Energies = ()

    @classmethod
    def of_flat(cls, partition: Partition, log10_condition: float, *energies: Sequence[float]) -> "KindSpectrum":
        """From the energies of one block after another: the weight's, the states' and those of what is read."""
        width = partition.width
        by_block = (tuple(tuple(one[at : at + width]) for at in range(0, len(one), width)) for one in energies)
        return cls(partition, log10_condition, *by_block)


@dataclass(frozen=True)
class LayerSpectrum:
    """What the schedules read of one layer."""

    keys: KindSpectrum
    values: KindSpectrum

    @property
    def kv_width(self) -> int:
        return self.keys.partition.kv_width

    def of(self, kind: Kind) -> KindSpectrum:
        return self.keys if kind == "keys" else self.values


@dataclass(frozen=True)
class LayerRanks:
    """Ranks of each block of one layer: latent floats cached per token."""

    keys: tuple[int, ...]
    values: tuple[int, ...]

    def of(self, kind: Kind) -> tuple[int, ...]:
        return self.keys if kind == "keys" else self.values

    def floats(self, kind: Kind) -> int:
        return sum(self.of(kind))


@dataclass(frozen=True)
class RankSchedule:
    """Ranks for every layer. `note` says where the schedule left its source's form, or what it solved for."""

    layers: tuple[LayerRanks, ...]
    kv_width: int
    note: str = ""

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "RankSchedule":
        """The inverse of `dataclasses.asdict`."""
        layers = tuple(LayerRanks(*(tuple(layer[kind]) for kind in KINDS)) for layer in saved["layers"])
        return cls(layers, saved["kv_width"], saved["note"])

    @property
    def floats_per_token(self) -> int:
        return sum(layer.floats(kind) for layer in self.layers for kind in KINDS)

    @property
    def kept_fraction(self) -> float:
        return self.floats_per_token / (len(KINDS) * self.kv_width * len(self.layers))


@dataclass(frozen=True)
class Probes:
    """What a schedule may measure on calibration text beside the spectra.

    Attributes:
        fisher: Per layer and kind, for each channel, the mean over inputs of sqrt(E[(dL/dW)^2]).
        errors: Per layer, levels of falling energy with the attention output's relative error at each.
        curves: Per layer and kind, the rise of the loss (nats per token) with that layer and kind alone compressed.
    """

    fisher: tuple[dict[Kind, tuple[float, ...]], ...] = ()
    errors: tuple[tuple["ErrorLevel", ...], ...] = ()
    curves: tuple[dict[Kind, tuple["CurvePoint", ...]], ...] = ()

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Probes":
        """The inverse of `dataclasses.asdict`."""
        return cls(
            fisher=tuple({kind: tuple(layer[kind]) for kind in KINDS} for layer in saved["fisher"]),
            errors=tuple(tuple(ErrorLevel(**level) for level in layer) for layer in saved["errors"]),
            curves=tuple(
                {kind: tuple(CurvePoint(**point) for point in layer[kind]) for kind in KINDS}
                for layer in saved["curves"]
            ),
        )

    def check_finite(self) -> None:
        """Raise NumericsError where a measurement is NaN or infinite, naming the layer."""
        measured = {
            f"layer {idx}: the attention error": [level.error for level in levels]
            for idx, levels in enumerate(self.errors)
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


@dataclass(frozen=True)
class RankStep:
    """One step up a staircase: `block` (all blocks where their ranks are equal) gets to `rank` for `floats` more."""

    gain: float
    floats: int
    block: int
    rank: int


@dataclass(frozen=True)
class Staircase:
    """Every rank step of one layer's keys or values, the most gain per float first; the first is always taken.

    Args:
        partition: The blocks.
        gains: Of each direction of each block; what a later step gains never counts for more than an earlier one's.
        rank_multiple: Ranks go up by this, or to the full width of a block.
        always_full: There is one step only, to the full width.
    """

    partition: Partition
    gains: Energies
    rank_multiple: int = 1
    always_full: bool = False
    steps: tuple[RankStep, ...] = field(init=False)

    def __post_init__(self) -> None:
        width, blocks = self.partition.width, self.partition.num_blocks
        if self.always_full:
            steps = [RankStep(math.inf, self.partition.kv_width, 0, width)]
        elif self.partition.equal_ranks:
            together = tuple(map(sum, zip(*self.gains, strict=True))) if self.gains else ()
            steps = self._ladder(0, together, blocks)
        else:
            steps = [step for block in range(blocks) for step in self._ladder(block, self._gains_of(block), 1)]
            steps.sort(key=lambda step: (-step.gain, step.rank, step.block))
        object.__setattr__(self, "steps", tuple(steps))

    def _gains_of(self, block: int) -> tuple[float, ...]:
        return self.gains[block] if self.gains else ()

    def _ladder(self, block: int, gains: Sequence[float], blocks_together: int) -> list[RankStep]:
        width = self.partition.width
        multiple = math.lcm(self.rank_multiple, self.partition.rank_step)
        steps: list[RankStep] = []
        for start in range(0, width, multiple):
            stop = min(start + multiple, width)
            gain = sum(gains[start:stop]) / ((stop - start) * blocks_together)
            gain = min(gain, steps[-1].gain) if steps else gain
            steps.append(RankStep(gain, (stop - start) * blocks_together, block, stop))
        return steps

    @cached_property
    def totals(self) -> list[int]:
        """Floats per token after 1, 2, ... steps."""
        totals, total = [], 0
        for step in self.steps:
            total += step.floats
            totals.append(total)
        return totals

    def nearest(self, floats: int | float) -> int:
        """The number of steps, at least one, whose total is nearest."""
        above = min(bisect_left(self.totals, floats), len(self.totals) - 1)
        candidates = [above] if above == 0 else [above - 1, above]
        return 1 + min(candidates, key=lambda idx: (abs(self.totals[idx] - floats), -idx))

    def ranks(self, num_steps: int) -> tuple[int, ...]:
        """The rank of each block after so many steps."""
        blocks = self.partition.num_blocks
        if self.always_full:
            return (self.partition.width,) * blocks
        ranks = [0] * blocks
        for step in self.steps[:num_steps]:
            ranks[step.block] = step.rank
        return (ranks[0],) * blocks if self.partition.equal_ranks else tuple(ranks)


Climb = Callable[[float], list[int]]  # a share in [0, 1] to the steps of each staircase
