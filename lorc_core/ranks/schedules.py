"""From the spectra of all layers to a rank for each: the aggregator.

A schedule is a frozen dataclass; its fields are its configuration. Each is a family of ranks that grows with one number
in [0, 1]; the member nearest to the target share of cached floats is chosen, or the reachable range is said.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, Literal

from lorc_core.errors import ConfigError, NumericsError
from lorc_core.model.kinds import KINDS, Kind, by_layer
from lorc_core.ranks.budgets import check_kept_fraction, fit
from lorc_core.ranks.curves import error_ramp, floats_at, lower_hull
from lorc_core.ranks.spectra import Energies, KindSpectrum, LayerRanks, LayerSpectrum, Probes, RankSchedule
from lorc_core.ranks.staircase import Climb, Staircase
from lorc_core.reprs import configuration_repr

Probe = Literal["fisher", "attention_errors", "curves"]


@dataclass(frozen=True, repr=False)
class Schedule(ABC):
    """What all schedules share.

    Attributes:
        rank_multiple: Ranks are multiples of this, or the full width.
        skip_layers: Layers left uncompressed.
    """

    rank_multiple: int = 1
    skip_layers: tuple[int, ...] = ()
    name: str = field(default="", init=False)
    probe: ClassVar[Probe | None] = None

    def __post_init__(self) -> None:
        check_positive(rank_multiple=self.rank_multiple)

    def __repr__(self) -> str:
        return configuration_repr(self)

    def ranks(
        self, spectra: Sequence[LayerSpectrum], kept_fraction: float, probes: Probes | None = None
    ) -> RankSchedule:
        """Ranks whose kept fraction is within 0.01, or one rank step, of the target.

        Args:
            spectra: One per layer, first layer first.
            kept_fraction: Target share of cached floats, in (0, 1].
            probes: What the schedule measures on calibration text, if it measures anything.

        Raises:
            ConfigError: The target is out of reach (the message gives the range), a field does not fit the model, or
                a measurement is absent.
            NumericsError: The schedule is undefined for these spectra, or a measurement is not finite; the message
                names the layer.
        """
        check_kept_fraction(kept_fraction)
        width = spectra[0].kv_width
        check_at_most(width, rank_multiple=self.rank_multiple)
        probes = probes or Probes()
        if self.probe is not None and not getattr(probes, self.probe):
            raise ConfigError(f"the {self.name} schedule needs calibration text")
        probes.check_finite()
        stairs = self.stairs(spectra, probes)
        climb = self.climb(spectra, stairs, probes)
        share = fit(climb, stairs, kept_fraction, self.name)
        return climbed_ranks(stairs, climb(share), width, self.note(share, spectra, probes))

    def stairs(self, spectra: Sequence[LayerSpectrum], probes: Probes) -> list[Staircase]:
        """The rank steps of each layer's keys and values in turn."""
        skipped = self.skipped(spectra)
        return [
            Staircase(
                spectrum[kind].partition,
                self.gains(spectrum[kind], idx, kind, probes),
                self.rank_multiple,
                always_full=idx in skipped,
            )
            for idx, spectrum in enumerate(spectra)
            for kind in KINDS
        ]

    def skipped(self, spectra: Sequence[LayerSpectrum]) -> set[int]:
        """Layers left uncompressed."""
        return checked_skips(self.skip_layers, len(spectra))

    def gains(self, spectrum: KindSpectrum, layer_idx: int, kind: Kind, probes: Probes) -> Energies:
        """What each direction of each block is worth; decides how blocks share a layer's floats."""
        return shares(spectrum.read)

    @abstractmethod
    def climb(self, spectra: Sequence[LayerSpectrum], stairs: Sequence[Staircase], probes: Probes) -> Climb:
        """The family of ranks."""

    def note(self, share: float, spectra: Sequence[LayerSpectrum], probes: Probes) -> str:
        return ""


@dataclass(frozen=True, repr=False)
class Uniform(Schedule):
    """The same share of every layer's keys and values."""

    name: str = field(default="uniform", init=False)

    def climb(self, spectra: Sequence[LayerSpectrum], stairs: Sequence[Staircase], probes: Probes) -> Climb:
        return lambda share: [stair.nearest(share * stair.totals[-1]) for stair in stairs]


@dataclass(frozen=True, repr=False)
class Progressive(Schedule):
    """LoRC's ramp: layers are cut the more, the smaller their cumulative condition number (Eq. 12 and 13).

    d_max is the full width and d_min is solved for the target (section 6.2). Where d_min has reached `min_rank` and the
    target is lower still, d_max is lowered, which the paper does not do; the schedule's note then says so. Keys and
    values of a layer get the same (Algorithm 1).

    Attributes:
        min_rank: Least rank of any layer, rounded up to a multiple.
        skip_above_log10_condition: Layers whose cumulative log10 condition number is above are left uncompressed, the
            first ones, as in Algorithm 1. They count in the ramp's ends and in the kept fraction. The paper's 30 and
            90 (section 6.2) are logarithms of a base that it does not say.

    Source: LoRC, arXiv 2410.03111, section 4.2: equations 12 and 13, Algorithm 1
    """

    min_rank: int = 1
    skip_above_log10_condition: float | None = None
    name: str = field(default="progressive", init=False)

    def __post_init__(self) -> None:
        check_positive(rank_multiple=self.rank_multiple, min_rank=self.min_rank)

    def skipped(self, spectra: Sequence[LayerSpectrum]) -> set[int]:
        check_at_most(spectra[0].kv_width, min_rank=self.min_rank)
        skipped = super().skipped(spectra)
        if self.skip_above_log10_condition is not None:
            cumulative = cumulative_log10_condition(spectra)
            skipped |= {idx for idx, value in enumerate(cumulative) if value > self.skip_above_log10_condition}
        return skipped

    def limits(self, share: float, width: int) -> tuple[float, float]:
        """(d_max, d_min): the lower half of the shares lowers d_max, the upper half raises d_min."""
        least = min(width, self.rank_multiple * math.ceil(self.min_rank / self.rank_multiple))
        room = width - least
        return least + room * min(2 * share, 1.0), least + room * max(2 * share - 1, 0.0)

    def climb(self, spectra: Sequence[LayerSpectrum], stairs: Sequence[Staircase], probes: Probes) -> Climb:
        width = spectra[0].kv_width
        least, _ = self.limits(0.0, width)
        depths = ramp_depths(cumulative_log10_condition(spectra))

        def climbed(share: float) -> list[int]:
            d_max, d_min = self.limits(share, width)
            ramp = [max(d_max * (1 - depth * (1 - d_min / d_max)), least) for depth in depths]
            return [stair.nearest(ramp[idx // len(KINDS)]) for idx, stair in enumerate(stairs)]

        return climbed

    def note(self, share: float, spectra: Sequence[LayerSpectrum], probes: Probes) -> str:
        width = spectra[0].kv_width
        d_max, _ = self.limits(share, width)
        return f"d_max lowered to {d_max:.0f}" if round(d_max) < width else ""


@dataclass(frozen=True, repr=False)
class Energy(Schedule):
    """One water level over all layers and both kinds: the directions with the largest share of their layer's energy.

    Attributes:
        spectrum: Whose energies are levelled: the weights', the states', or those of what is read.
    """

    spectrum: Literal["weights", "states", "read"] = "read"
    name: str = field(default="energy", init=False)

    def gains(self, spectrum: KindSpectrum, layer_idx: int, kind: Kind, probes: Probes) -> Energies:
        return shares(getattr(spectrum, self.spectrum))

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
        return tuple(tuple(value / rank for rank in range(1, spectrum.partition.width + 1)) for value in by_block)

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

    def epsilon(self, share: float, probes: Probes) -> float:
        return (1 - share) * max(level.error for levels in probes.attention_errors for level in levels)

    def climb(self, spectra: Sequence[LayerSpectrum], stairs: Sequence[Staircase], probes: Probes) -> Climb:
        ramps = [error_ramp(levels, spectra[0].kv_width) for levels in probes.attention_errors]

        def climbed(share: float) -> list[int]:
            epsilon = self.epsilon(share, probes)
            wanted = [floats for ramp in ramps for floats in floats_at(ramp, epsilon)]
            return [stair.nearest(floats) for stair, floats in zip(stairs, wanted, strict=True)]

        return climbed

    def note(self, share: float, spectra: Sequence[LayerSpectrum], probes: Probes) -> str:
        return f"epsilon {self.epsilon(share, probes):.3g}"


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
        segments = sorted(
            ((right.rise - left.rise) / (right.floats - left.floats), left.floats, right.floats, idx)
            for idx, hull in enumerate(hulls)
            for left, right in itertools.pairwise(hull)
        )
        least = [hull[0].floats for hull in hulls]

        def climbed(share: float) -> list[int]:
            wanted: list[float] = list(least)
            left = share * sum(stop - start for _, start, stop, _ in segments)
            for _, start, stop, idx in segments:
                wanted[idx] += min(left, stop - start)
                left = max(left - (stop - start), 0)
            return [stair.nearest(floats) for stair, floats in zip(stairs, wanted, strict=True)]

        return climbed


SCHEDULES: dict[str, type[Schedule]] = {
    "uniform": Uniform,
    "progressive": Progressive,
    "energy": Energy,
    "fisher": Fisher,
    "error_budget": ErrorBudget,
    "sensitivity": Sensitivity,
}


def known_schedule(name: str, **fields: Any) -> Schedule:
    """The schedule of that name with the given fields; ConfigError with the known names otherwise."""
    if name not in SCHEDULES:
        raise ConfigError(f"schedule {name!r} is not known; known are {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[name](**fields)


def schedule_from_dict(saved: Mapping[str, Any]) -> Schedule:
    """The inverse of `dataclasses.asdict`."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return known_schedule(str(fields.pop("name")), **fields)


def climbed_ranks(stairs: Sequence[Staircase], steps: Sequence[int], kv_width: int, note: str = "") -> RankSchedule:
    """The ranks after so many steps of each staircase, keys and values of a layer in turn."""
    ranks = by_layer([stair.ranks(count) for stair, count in zip(stairs, steps, strict=True)])
    return RankSchedule(tuple(LayerRanks(*layer) for layer in ranks), kv_width, note)


def shares(energies: Energies) -> Energies:
    """Of the whole of all blocks; a weight of zeros has no direction worth a float."""
    whole = sum(map(sum, energies)) or 1.0
    return tuple(tuple(value / whole for value in block) for block in energies)


def best_first(stairs: Sequence[Staircase]) -> Climb:
    """The steps of all staircases past their first, in the order of their gain per float."""
    later = [(-step.gain, step.rank, idx) for idx, stair in enumerate(stairs) for step in stair.steps[1:]]
    order = [idx for *_, idx in sorted(later, key=lambda step: step[:2])]

    def climbed(share: float) -> list[int]:
        taken = Counter(order[: round(share * len(order))])
        return [1 + taken[idx] for idx in range(len(stairs))]

    return climbed


def cumulative_log10_condition(spectra: Sequence[LayerSpectrum]) -> list[float]:
    """log10 of Eq. 12 for each layer: the product over this and all deeper layers of kappa(W_k) kappa(W_v).

    W_k and W_v are whole, of all heads. The paper's text before the equation says "all preceding layers"; equation and
    Algorithm 1 multiply this and the deeper ones.

    Raises:
        NumericsError: A condition number is infinite (a rank-deficient weight); the message names the layer.

    Source: LoRC, arXiv 2410.03111, equation 12
    """
    for layer_idx, layer in enumerate(spectra):
        for kind in KINDS:
            if math.isinf(layer[kind].log10_condition):
                raise NumericsError(
                    f"layer {layer_idx} {kind}: the weight is rank-deficient, its condition number infinite, so the "
                    "progressive schedule is undefined; use another schedule for this model"
                )
    logs = [sum(layer[kind].log10_condition for kind in KINDS) for layer in spectra]
    return list(accumulate(reversed(logs)))[::-1]


def ramp_depths(cumulative: Sequence[float]) -> list[float]:
    """LoRC's Eq. 13, the round bracket: 0 at the largest cumulative condition number of all layers, 1 at the least."""
    highest, lowest = max(cumulative), min(cumulative)
    spread = highest - lowest
    return [(highest - value) / spread if spread > 0 else 0.0 for value in cumulative]


def check_positive(**fields: int) -> None:
    for name, value in fields.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def check_at_most(width: int, **fields: int) -> None:
    for name, value in fields.items():
        if value > width:
            raise ConfigError(f"{name} must be in 1..{width}, the width of this model's keys, got {value}")


def checked_skips(skip_layers: Sequence[int], num_layers: int) -> set[int]:
    for layer_idx in skip_layers:
        if not 0 <= layer_idx < num_layers:
            raise ConfigError(f"skip_layers: layer {layer_idx} does not exist; layers are 0..{num_layers - 1}")
    return set(skip_layers)
