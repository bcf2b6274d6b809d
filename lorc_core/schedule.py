"""From the spectra of all layers to a rank for each: the aggregator.

A schedule is a frozen dataclass; its fields are its configuration. All meet a target share of cached floats
or say what they can reach.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from lorc_core.errors import ConfigError, NumericsError

KEPT_FRACTION_TOLERANCE = 0.01


@dataclass(frozen=True)
class KindSpectrum:
    """What the schedules read of one layer's keys or values.

    `log10_condition` is the weight's; the rest are energies, falling: squared singular values of the weight,
    eigenvalues of the states' second moment, and what each direction saves of the error that the method minimises.
    """

    log10_condition: float
    weights: tuple[float, ...] = ()
    states: tuple[float, ...] = ()
    read: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerSpectrum:
    """What the schedules read of one layer."""

    kv_width: int
    keys: KindSpectrum
    values: KindSpectrum


@dataclass(frozen=True)
class LayerRanks:
    """Latent floats cached per token by one layer."""

    keys: int
    values: int


@dataclass(frozen=True)
class RankSchedule:
    """Ranks for every layer. `note` says where the schedule left its source's form."""

    layers: tuple[LayerRanks, ...]
    kv_width: int
    note: str = ""

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "RankSchedule":
        """The inverse of `dataclasses.asdict`."""
        return cls(tuple(LayerRanks(**layer) for layer in saved["layers"]), saved["kv_width"], saved["note"])

    @property
    def floats_per_token(self) -> int:
        return sum(layer.keys + layer.values for layer in self.layers)

    @property
    def kept_fraction(self) -> float:
        return self.floats_per_token / (2 * self.kv_width * len(self.layers))


@dataclass(frozen=True)
class Uniform:
    """The same rank everywhere.

    Attributes:
        rank_multiple: Ranks are multiples of this, or the full width.
        skip_layers: Layers left uncompressed.
    """

    rank_multiple: int = 1
    skip_layers: tuple[int, ...] = ()
    name: str = field(default="uniform", init=False)

    def __post_init__(self) -> None:
        check_positive(rank_multiple=self.rank_multiple)

    def ranks(self, spectra: Sequence[LayerSpectrum], kept_fraction: float) -> RankSchedule:
        """Ranks whose kept fraction is within 0.01, or one rank step, of the target.

        Args:
            spectra: One per layer.
            kept_fraction: Target share of cached floats, in (0, 1].

        Raises:
            ConfigError: The target is out of reach; the message gives the range.
        """
        width = spectra[0].kv_width
        check_at_most(width, rank_multiple=self.rank_multiple)
        skipped = checked_skips(self.skip_layers, len(spectra))

        def ranks_at(share: float) -> list[int]:
            rank = round_rank(share * width, width, self.rank_multiple)
            return [width if layer_idx in skipped else rank for layer_idx in range(len(spectra))]

        ranks, _ = fit(ranks_at, width, kept_fraction, self.name)
        return RankSchedule(tuple(LayerRanks(rank, rank) for rank in ranks), width)


@dataclass(frozen=True)
class Progressive:
    """LoRC's ramp: layers are cut the more, the smaller their cumulative condition number (Eq. 12 and 13).

    d_max is the full width and d_min is solved for the target. Where d_min has reached `min_rank` and the target
    is lower still, d_max is lowered, which the paper does not do; the schedule's note then says so.

    Attributes:
        rank_multiple: Ranks are multiples of this, or the full width.
        min_rank: Least rank of any layer, rounded up to a multiple.
        skip_layers: Layers left uncompressed.
        skip_above_log10_condition: Layers whose cumulative log10 condition number is above are left uncompressed.

    Source: LoRC, arXiv 2410.03111, section 3.3
    """

    rank_multiple: int = 1
    min_rank: int = 1
    skip_layers: tuple[int, ...] = ()
    skip_above_log10_condition: float | None = None
    name: str = field(default="progressive", init=False)

    def __post_init__(self) -> None:
        check_positive(rank_multiple=self.rank_multiple, min_rank=self.min_rank)

    def ranks(self, spectra: Sequence[LayerSpectrum], kept_fraction: float) -> RankSchedule:
        """Ranks, the same for keys and values, within 0.01 or one rank step of the target.

        Args:
            spectra: One per layer, first layer first.
            kept_fraction: Target share of cached floats, in (0, 1].

        Raises:
            ConfigError: The target is out of reach; the message gives the range.
            NumericsError: A condition number is infinite; the message names the layer.
        """
        width = spectra[0].kv_width
        check_at_most(width, rank_multiple=self.rank_multiple, min_rank=self.min_rank)
        least = min(width, self.rank_multiple * math.ceil(self.min_rank / self.rank_multiple))
        cumulative = cumulative_log10_condition(spectra)
        skipped = checked_skips(self.skip_layers, len(spectra))
        if self.skip_above_log10_condition is not None:
            skipped |= {i for i, value in enumerate(cumulative) if value > self.skip_above_log10_condition}
        depths = ramp_depths(cumulative)

        def limits(share: float) -> tuple[float, float]:
            """(d_max, d_min): the lower half of the shares lowers d_max, the upper half raises d_min."""
            room = width - least
            return least + room * min(2 * share, 1.0), least + room * max(2 * share - 1, 0.0)

        def ranks_at(share: float) -> list[int]:
            d_max, d_min = limits(share)
            ramp = [d_max * (1 - depth * (1 - d_min / d_max)) for depth in depths]
            ranks = [max(round_rank(rank, width, self.rank_multiple), least) for rank in ramp]
            return [width if layer_idx in skipped else rank for layer_idx, rank in enumerate(ranks)]

        ranks, share = fit(ranks_at, width, kept_fraction, self.name)
        d_max, _ = limits(share)
        note = f"d_max lowered to {d_max:.0f}" if round(d_max) < width else ""
        return RankSchedule(tuple(LayerRanks(rank, rank) for rank in ranks), width, note)


@dataclass(frozen=True)
class Energy:
    """One water level over all layers and both kinds: the directions with the largest share of their layer's energy.

    Attributes:
        spectrum: Whose energies are levelled: the weights', the states', or those of what is read.
        rank_multiple: Ranks are multiples of this, or the full width.
        skip_layers: Layers left uncompressed.
    """

    spectrum: Literal["weights", "states", "read"] = "read"
    rank_multiple: int = 1
    skip_layers: tuple[int, ...] = ()
    name: str = field(default="energy", init=False)

    def __post_init__(self) -> None:
        check_positive(rank_multiple=self.rank_multiple)

    def ranks(self, spectra: Sequence[LayerSpectrum], kept_fraction: float) -> RankSchedule:
        """Ranks, of keys and values apart, within 0.01 or one rank step of the target.

        Args:
            spectra: One per layer.
            kept_fraction: Target share of cached floats, in (0, 1].

        Raises:
            ConfigError: The target is out of reach; the message gives the range.
        """
        check_kept_fraction(kept_fraction)
        width = spectra[0].kv_width
        check_at_most(width, rank_multiple=self.rank_multiple)
        skipped = checked_skips(self.skip_layers, len(spectra))
        ranks = {
            (idx, kind): width if idx in skipped else self.rank_multiple
            for idx in range(len(spectra))
            for kind in ("keys", "values")
        }
        target = kept_fraction * 2 * width * len(spectra)
        least = sum(ranks.values())
        if target < least - KEPT_FRACTION_TOLERANCE * 2 * width * len(spectra):
            raise ConfigError(
                f"energy: kept_fraction {kept_fraction} cannot be reached; "
                f"reachable is {least / (2 * width * len(spectra)):.3f}..1.000"
            )
        total = least
        for _, idx, kind, start, stop in self._steps(spectra, skipped):
            if total + (stop - start) / 2 > target:
                break
            ranks[idx, kind] = stop
            total += stop - start
        layers = tuple(LayerRanks(ranks[idx, "keys"], ranks[idx, "values"]) for idx in range(len(spectra)))
        return RankSchedule(layers, width)

    def _steps(self, spectra: Sequence[LayerSpectrum], skipped: set[int]) -> list[tuple[float, int, str, int, int]]:
        """Every further rank step of every layer and kind, the most energy per float first."""
        steps = []
        for idx, layer in enumerate(spectra):
            if idx in skipped:
                continue
            for kind, found in (("keys", layer.keys), ("values", layer.values)):
                energies = getattr(found, self.spectrum)
                whole = sum(energies) or 1.0  # a weight of zeros has no direction worth a float
                for start in range(self.rank_multiple, layer.kv_width, self.rank_multiple):
                    stop = min(start + self.rank_multiple, layer.kv_width)
                    steps.append((-sum(energies[start:stop]) / (whole * (stop - start)), idx, kind, start, stop))
        return sorted(steps, key=lambda step: (step[0], step[3]))


Schedule = Uniform | Progressive | Energy
SCHEDULES: dict[str, type[Uniform] | type[Progressive] | type[Energy]] = {
    "uniform": Uniform,
    "progressive": Progressive,
    "energy": Energy,
}


def known_schedule(name: str, **fields: Any) -> Schedule:
    """The schedule of that name with the given fields; ConfigError with the known names otherwise."""
    if name not in SCHEDULES:
        raise ConfigError(f"schedule {name!r} is not known; known are {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[name](**fields)


def cumulative_log10_condition(spectra: Sequence[LayerSpectrum]) -> list[float]:
    """log10 of Eq. 12 for each layer: the product over this and all deeper layers of kappa(W_k) kappa(W_v).

    Raises:
        NumericsError: A condition number is infinite (a rank-deficient weight); the message names the layer.
    """
    for layer_idx, layer in enumerate(spectra):
        for kind, spectrum in (("keys", layer.keys), ("values", layer.values)):
            if math.isinf(spectrum.log10_condition):
                raise NumericsError(
                    f"layer {layer_idx} {kind}: the weight is rank-deficient, its condition number infinite, so the "
                    "progressive schedule is undefined; use the uniform schedule for this model"
                )
    logs = [layer.keys.log10_condition + layer.values.log10_condition for layer in spectra]
    return list(accumulate(reversed(logs)))[::-1]


def ramp_depths(cumulative: Sequence[float]) -> list[float]:
    """Eq. 13's bracket: 0 at the layer with the largest cumulative condition number, 1 at the smallest."""
    highest, lowest = max(cumulative), min(cumulative)
    spread = highest - lowest
    return [(highest - value) / spread if spread > 0 else 0.0 for value in cumulative]


def round_rank(rank: float, width: int, multiple: int) -> int:
    """The nearest allowed rank: a multiple of `multiple`, at least one multiple, or the full width."""
    rounded = max(multiple, multiple * round(rank / multiple))
    return width if rounded >= width or rank >= width else rounded


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


def check_kept_fraction(kept_fraction: float) -> None:
    """Raise ConfigError unless the share is in (0, 1]."""
    if not 0 < kept_fraction <= 1:
        raise ConfigError(f"kept_fraction must be in (0, 1], got {kept_fraction}")


def fit(ranks_at: Callable[[float], list[int]], width: int, kept_fraction: float, name: str) -> tuple[list[int], float]:
    """The member of a family of ranks, growing with a share in [0, 1], that is nearest to the target; and its share."""
    check_kept_fraction(kept_fraction)

    def kept_at(share: float) -> float:
        ranks = ranks_at(share)
        return sum(ranks) / (width * len(ranks))

    least, most = kept_at(0.0), kept_at(1.0)
    if not least - KEPT_FRACTION_TOLERANCE <= kept_fraction <= most + KEPT_FRACTION_TOLERANCE:
        raise ConfigError(
            f"{name}: kept_fraction {kept_fraction} cannot be reached; reachable is {least:.3f}..{most:.3f}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):  # past float64's resolution of the share
        middle = (low + high) / 2
        low, high = (middle, high) if kept_at(middle) < kept_fraction else (low, middle)
    share = min(low, high, key=lambda found: abs(kept_at(found) - kept_fraction))
    return ranks_at(share), share
