"""Ranks for the steps of training: drawn at random, so that the factors stay nested and serve every budget."""

from collections.abc import Sequence

import torch

from lorc_core.ranks.budgets import fit
from lorc_core.ranks.schedules import Energy
from lorc_core.ranks.spectra import LayerSpectrum, Probes, RankSchedule
from lorc_core.ranks.staircase import climbed_ranks

CENTRE = Energy(spectrum="weights")  # around whose ranks those of a step are drawn
JITTER = 1.25  # floats are drawn between those of the centre over this and times this


class RankDraws:
    """Ranks at a kept fraction, as a schedule gives them or drawn around those.

    Args:
        spectra: Of all layers.
        generator: Of all draws.
    """

    def __init__(self, spectra: Sequence[LayerSpectrum], generator: torch.Generator) -> None:
        self.stairs = CENTRE.stairs(spectra, Probes())
        self.climb = CENTRE.climb(spectra, self.stairs, Probes())
        self.kv_width, self.generator = spectra[0].kv_width, generator

    def at(self, kept_fraction: float) -> RankSchedule:
        """The ranks of the schedule itself, the same every time."""
        return climbed_ranks(self.stairs, self._steps(kept_fraction), self.kv_width)

    def draw(self, least: float, most: float) -> RankSchedule:
        """Ranks at a kept fraction drawn between two, each layer's and kind's floats drawn around the schedule's."""
        steps = self._steps(least + self._uniform() * (most - least))
        for idx, stair in enumerate(self.stairs):
            factor = JITTER ** (2 * self._uniform() - 1)
            steps[idx] = stair.nearest(stair.totals[steps[idx] - 1] * factor)
        return climbed_ranks(self.stairs, steps, self.kv_width)

    def _steps(self, kept_fraction: float) -> list[int]:
        return self.climb(fit(self.climb, self.stairs, kept_fraction, CENTRE.name))

    def _uniform(self) -> float:
        """In [0, 1)."""
        return torch.rand((), generator=self.generator).item()
