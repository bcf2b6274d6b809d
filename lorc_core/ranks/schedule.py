"""What every schedule does: from the spectra of all layers to a rank for each, within a budget."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from lorc_core.errors import ConfigError
from lorc_core.model.blocks import Partition
from lorc_core.model.kinds import KINDS, Kind
from lorc_core.ranks.budgets import check_kept_fraction, fit
from lorc_core.ranks.spectra import (
    Energies,
    KindSpectrum,
    LayerSpectrum,
    Probe,
    Probes,
    RankSchedule,
    energy_fractions,
)
from lorc_core.ranks.staircase import Climb, Staircase, climbed_ranks
from lorc_core.reprs import configuration_repr


@dataclass(frozen=True, repr=False)
class Schedule(ABC):
    """A rule that gives every layer its ranks. A frozen dataclass, whose fields are its configuration.

    Each rule is a family of ranks that grow with one number, the height, from 0 to 1. The member of the family that is
    nearest to the budget is taken. A rule of your own says in `climb` what the family is.

    Attributes:
        rank_multiple: Ranks are multiples of this, or the full width.
        skip_layers: Layers left uncompressed.
        name: In zoo files and tables.
        probe: What the schedule measures on calibration text; None where spectra are enough.
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
        height = fit(climb, stairs, kept_fraction, self.name)
        return climbed_ranks(stairs, climb(height), width, self.note(height, spectra, probes))

    def stairs(self, spectra: Sequence[LayerSpectrum], probes: Probes) -> list[Staircase]:
        """The ranks that each layer's keys and values can have, in the order of `layer_kinds`."""
        skipped = self.skipped(spectra)
        made: dict[tuple[Partition, Energies, bool], Staircase] = {}  # layers that are alike share theirs

        def stair(partition: Partition, gains: Energies, *, always_full: bool) -> Staircase:
            like = partition, gains, always_full
            if like not in made:
                made[like] = Staircase(partition, gains, self.rank_multiple, always_full=always_full)
            return made[like]

        return [
            stair(
                spectrum[kind].partition,
                self.gains(spectrum[kind], layer_idx, kind, probes),
                always_full=layer_idx in skipped,
            )
            for layer_idx, spectrum in enumerate(spectra)
            for kind in KINDS
        ]

    def skipped(self, spectra: Sequence[LayerSpectrum]) -> set[int]:
        """Layers left uncompressed; ConfigError where `skip_layers` names one that does not exist."""
        return checked_skips(self.skip_layers, len(spectra))

    def gains(self, spectrum: KindSpectrum, layer_idx: int, kind: Kind, probes: Probes) -> Energies:
        """What each direction of each block is worth. Decides how the blocks of one layer share its floats.

        Args:
            spectrum: Of one layer's keys or values.
            layer_idx: Of the layer.
            kind: Keys or values.
            probes: What the schedule asked for with `probe`; empty otherwise.
        """
        return energy_fractions(spectrum.read)

    @abstractmethod
    def climb(self, spectra: Sequence[LayerSpectrum], stairs: Sequence[Staircase], probes: Probes) -> Climb:
        """The family of ranks: at each height in [0, 1] the steps taken of each staircase.

        Args:
            spectra: One per layer.
            stairs: From `stairs`.
            probes: What the schedule asked for with `probe`; empty otherwise.

        Returns:
            A function in which no number of steps falls as the height rises; at least one step is taken of each.
        """

    def note(self, height: float, spectra: Sequence[LayerSpectrum], probes: Probes) -> str:
        """What a reader of the ranks should know: where they left the source's form, what was solved for.

        Args:
            height: At which the ranks were taken.
            spectra: One per layer.
            probes: What the schedule asked for with `probe`; empty otherwise.
        """
        return ""


def check_positive(**fields: int) -> None:
    """Raise ConfigError where a field of a schedule is below 1."""
    for name, value in fields.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def check_at_most(width: int, **fields: int) -> None:
    """Raise ConfigError where a field of a schedule is above the width of the model's keys."""
    for name, value in fields.items():
        if value > width:
            raise ConfigError(f"{name} must be in 1..{width}, the width of this model's keys, got {value}")


def checked_skips(skip_layers: Sequence[int], num_layers: int) -> set[int]:
    """The layers to skip; ConfigError where there is no such layer."""
    for layer_idx in skip_layers:
        if not 0 <= layer_idx < num_layers:
            raise ConfigError(f"skip_layers: layer {layer_idx} does not exist; layers are 0..{num_layers - 1}")
    return set(skip_layers)
