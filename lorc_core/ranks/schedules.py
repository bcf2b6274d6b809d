"""The schedules by name, and all of them but `progressive`, which has a file of its own."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lorc_core.errors import ConfigError
from lorc_core.model.kinds import KINDS, Kind
from lorc_core.ranks.curves import error_ramp, floats_at, lower_hull, rise_per_float
from lorc_core.ranks.progressive import Progressive
from lorc_core.ranks.schedule import Schedule
from lorc_core.ranks.spectra import Energies, KindSpectrum, LayerSpectrum, Probe, Probes, energy_fractions
from lorc_core.ranks.staircase import Climb, Staircase, best_first


@dataclass(frozen=True, repr=False)
class Uniform(Schedule):
    """The same share of every layer's keys and values."""

    name: str = field(default="uniform", init=False)

    def climb(self, spectra: Sequence[LayerSpectrum], stairs: Sequence[Staircase], probes: Probes) -> Climb:
        return lambda height: [stair.nearest(height * stair.totals[-1]) for stair in stairs]


@dataclass(frozen=True, repr=False)
class Energy(Schedule):
    """One water level over all layers and both kinds: the directions with the largest share of their layer's energy.

    Attributes:
        spectrum: Whose energies are levelled: the weights', the states', or those of what is read.
    """

    spectrum: Literal["weights", "states", "read"] = "read"
    name: str = field(default="energy", init=False)

    def gains(self, spectrum: KindSpectrum, layer_idx: int, kind: Kind, probes: Probes) -> Energies:
        return energy_fractions(getattr(spectrum, self.spectrum))

    def climb(self, spectra: Sequence[LayerSpectrum], stairs: Sequence[Staircase], probes: Probes) -> Climb:
        # As the height rises the level falls: steps are taken by falling energy, whatever their layer and kind.
        return best_first(stairs)


@dataclass(frozen=True, repr=False)
class WaterLevel(Schedule):
    """One water level over all layers, kinds and blocks: the directions with the most energy, whosever they are.

    Unlike `Energy` it takes what is read as it is, not as a share of its layer's, so energies must be in one unit
    everywhere. Those of the reader `gradient` are: half of what is cut is the rise of the loss in nats.
    """

    name: str = field(default="water_level", init=False)

    def gains(self, spectrum: KindSpectrum, layer_idx: int, kind: Kind, probes: Probes) -> Energies:
        return spectrum.read

    def climb(self, spectra: Sequence[LayerSpectrum], stairs: Sequence[Staircase], probes: Probes) -> Climb:
        return best_first(stairs)


@dataclass(frozen=True, repr=False)
class Fisher(Schedule):
    """Ranks proportional to the root Fisher information of each block's channels, up to its width.

    Where blocks are equally wide, as Palu's, that is to their mean.

    Source: Palu, arXiv 2407.21118, section 3.3; its rounding of proportions is replaced by highest averages.
    """

    name: str = field(default="fisher", init=False)
    probe: ClassVar[Probe | None] = "fisher"

    def gains(self, spectrum: KindSpectrum, layer_idx: int, kind: Kind, probes: Probes) -> Energies:
        import torch  # here alone: a zoo file is read without torch, which takes seconds to import

        from lorc_core.model.channels import split_blocks

        by_channel = torch.tensor(probes.fisher[layer_idx][kind], dtype=torch.float64)
        by_block = split_blocks(by_channel, spectrum.partition).sum(dim=-1).tolist()
        # Highest averages (D'Hondt): the next rank goes to the block with the most information per rank, this one
        # counted. Ranks taken in that order are proportional to the information, as near as whole numbers can be.
        return tuple(
            tuple(information / rank for rank in range(1, spectrum.partition.width + 1)) for information in by_block
        )

    def climb(self, spectra: Sequence[LayerSpectrum], stairs: Sequence[Staircase], probes: Probes) -> Climb:
        return best_first(stairs)


@dataclass(frozen=True, repr=False)
class ErrorBudget(Schedule):
    """The least ranks with which no layer's attention output is off by more than epsilon, on calibration text.

    Keys and values of a layer fall together along a threshold of energy. Epsilon is solved for the target and noted.

    Source: Eigen Attention, arXiv 2408.05646, section 4; there epsilon is given and the size follows.
    """

    name: str = field(default="error_budget", init=False)
    probe: ClassVar[Probe | None] = "attention_errors"

    def epsilon(self, height: float, probes: Probes) -> float:
        """The relative error allowed: none at height 1, the largest that was measured at height 0."""
        return (1 - height) * max(level.error for levels in probes.attention_errors for level in levels)

    def climb(self, spectra: Sequence[LayerSpectrum], stairs: Sequence[Staircase], probes: Probes) -> Climb:
        ramps = [error_ramp(levels, spectra[0].kv_width) for levels in probes.attention_errors]

        def steps_at(height: float) -> list[int]:
            epsilon = self.epsilon(height, probes)
            wanted = [floats for ramp in ramps for floats in floats_at(ramp, epsilon)]
            return [stair.nearest(floats) for stair, floats in zip(stairs, wanted, strict=True)]

        return steps_at

    def note(self, height: float, spectra: Sequence[LayerSpectrum], probes: Probes) -> str:
        return f"epsilon {self.epsilon(height, probes):.3g}"


@dataclass(frozen=True, repr=False)
class Sensitivity(Schedule):
    """The ranks that measured curves of the loss say are best, then exchanged while the calibration loss falls.

    Each layer's keys and values are compressed alone, to several ranks; the lower convex hulls of those curves are
    climbed where the loss falls most per float.

    Attributes:
        num_rounds: Of exchanges, each of which measures every layer and kind twice.

    Source: the curves are those of LoRC's Figure 3, arXiv 2410.03111, at several ranks instead of one.
    """

    num_rounds: int = 3
    name: str = field(default="sensitivity", init=False)
    probe: ClassVar[Probe | None] = "curves"

    def climb(self, spectra: Sequence[LayerSpectrum], stairs: Sequence[Staircase], probes: Probes) -> Climb:
        hulls = [lower_hull(layer[kind]) for layer in probes.curves for kind in KINDS]
        # Along a convex curve the loss falls ever less per float. So taking the steepest segments of all curves first
        # takes those of each curve from left to right, and no allocation has a lower sum of the curves.
        segments = sorted(
            (rise_per_float(left, right), left.floats, right.floats, idx)
            for idx, hull in enumerate(hulls)
            for left, right in itertools.pairwise(hull)
        )
        least = [hull[0].floats for hull in hulls]

        def steps_at(height: float) -> list[int]:
            wanted: list[float] = list(least)
            remaining = height * sum(stop - start for _, start, stop, _ in segments)
            for _, start, stop, idx in segments:
                wanted[idx] += min(remaining, stop - start)
                remaining = max(remaining - (stop - start), 0)
            return [stair.nearest(floats) for stair, floats in zip(stairs, wanted, strict=True)]

        return steps_at


SCHEDULES: dict[str, type[Schedule]] = {
    "uniform": Uniform,
    "progressive": Progressive,
    "energy": Energy,
    "water_level": WaterLevel,
    "fisher": Fisher,
    "error_budget": ErrorBudget,
    "sensitivity": Sensitivity,
}


def known_schedule(name: str, **fields: Any) -> Schedule:
    """The schedule of that name with the given fields.

    Raises:
        ConfigError: There is none; the message has the known names. Or a field is out of range.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule {name!r} is not known; known are {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[name](**fields)


def schedule_from_dict(saved: Mapping[str, Any]) -> Schedule:
    """The inverse of `dataclasses.asdict`, also after JSON, which has lists for tuples."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return known_schedule(str(fields.pop("name")), **fields)
