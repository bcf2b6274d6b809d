"""LoRC's progressive rule: the more a layer's errors are amplified by those after it, the more it keeps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from lorc_core.errors import ConfigError, NumericsError
from lorc_core.model.kinds import KINDS
from lorc_core.ranks.schedule import Schedule, check_at_most, check_positive
from lorc_core.ranks.spectra import LayerSpectrum, Probes
from lorc_core.ranks.staircase import Climb, Staircase


@dataclass(frozen=True, repr=False)
class Progressive(Schedule):
    """LoRC's ramp: layers are cut the more, the smaller their cumulative condition number (Eq. 12 and 13).

    Keys and values of a layer get the same (Algorithm 1). d_max is the full width, d_min is solved for the target
    (section 6.2). Where d_min has reached the floor and the target is lower still, d_max is lowered, which the paper
    does not do. Where d_max has reached the floor too, the floor is lowered. The schedule's note says either.

    Without a floor d_min falls to 1 at half of the cache, and the deepest layers are lost: of `lorc` at 0.5 the loss
    rises by 0.47, 0.50, 1.79 and 0.19 on stories260K, babyllama-tok361, TinyStories-656K and stdlib-llama-d64; with
    the default floor by 0.36, 0.39, 0.62 and 0.01, with `uniform` by 0.38, 0.50, 0.56 and 0.00. The paper's Table 2
    keeps 0.4 or 0.5 of the width at least (its dim_c).

    Attributes:
        min_rank: Least rank of any layer, rounded up to a multiple; it is never lowered.
        floor_kept_fraction: Share of the width that every layer keeps while the target allows it, in [0, 1].
        skip_above_log10_condition: Layers whose cumulative log10 condition number is above are left uncompressed, the
            first ones, as in Algorithm 1. They count in the ramp's ends and in the kept fraction. The paper's 30 and
            90 (section 6.2) are logarithms of a base that it does not say.

    Source: LoRC, arXiv 2410.03111, section 4.2: equations 12 and 13, Algorithm 1; the floor is lorc's own
    """

    min_rank: int = 1
    floor_kept_fraction: float = 0.35
    skip_above_log10_condition: float | None = None
    name: str = field(default="progressive", init=False)

    def __post_init__(self) -> None:
        check_positive(rank_multiple=self.rank_multiple, min_rank=self.min_rank)
        if not 0 <= self.floor_kept_fraction <= 1:
            raise ConfigError(f"floor_kept_fraction must be in [0, 1], got {self.floor_kept_fraction}")

    def skipped(self, spectra: Sequence[LayerSpectrum]) -> set[int]:
        check_at_most(spectra[0].kv_width, min_rank=self.min_rank)
        skipped = super().skipped(spectra)
        if self.skip_above_log10_condition is not None:
            cumulative = cumulative_log10_condition(spectra)
            skipped |= {layer for layer, value in enumerate(cumulative) if value > self.skip_above_log10_condition}
        return skipped

    def limits(self, height: float, width: int) -> tuple[float, float]:
        """d_max and d_min. They rise one after another, in thirds of the heights: both to the floor, d_max, d_min.

        So at height 1 both are the full width, at 2/3 the ramp is the steepest (d_max full, d_min at the floor), at 1/3
        both are at the floor, and at 0 at `min_rank`.
        """
        least, floor = self.least_rank(width), self.floor(width)
        third = 3 * height
        lowered = least + (floor - least) * min(third, 1.0)
        room = width - floor
        return lowered + room * min(max(third - 1, 0.0), 1.0), lowered + room * max(third - 2, 0.0)

    def least_rank(self, width: int) -> int:
        """`min_rank`, as a multiple."""
        return self.at_least(float(self.min_rank), width)

    def floor(self, width: int) -> int:
        """The least rank while the target allows it."""
        return max(self.at_least(self.floor_kept_fraction * width, width), self.least_rank(width))

    def at_least(self, floats: float, width: int) -> int:
        """The first rank that is no smaller, at most the full width."""
        return min(width, self.rank_multiple * math.ceil(floats / self.rank_multiple))

    def climb(self, spectra: Sequence[LayerSpectrum], stairs: Sequence[Staircase], probes: Probes) -> Climb:
        width = spectra[0].kv_width
        depths = ramp_depths(cumulative_log10_condition(spectra))

        def steps_at(height: float) -> list[int]:
            d_max, d_min = self.limits(height, width)
            # Eq. 13 for each layer. At the deepest layer it is d_min, which rounding may fall below.
            ramp = [max(d_max * (1 - depth * (1 - d_min / d_max)), d_min) for depth in depths]
            return [stair.nearest(ramp[idx // len(KINDS)]) for idx, stair in enumerate(stairs)]

        return steps_at

    def note(self, height: float, spectra: Sequence[LayerSpectrum], probes: Probes) -> str:
        width = spectra[0].kv_width
        d_max, d_min = self.limits(height, width)
        if round(d_min) < self.floor(width):
            return f"d_max and the floor of {self.floor(width)} lowered to {d_min:.0f}"
        return f"d_max lowered to {d_max:.0f}" if round(d_max) < width else ""


def cumulative_log10_condition(spectra: Sequence[LayerSpectrum]) -> list[float]:
    """log10 of Eq. 12 for each layer: the product over this and all deeper layers of kappa(W_k) kappa(W_v).

    In logarithms, because the product of 80 layers overflows.

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
    """Eq. 13's bracket: 0 at the layer with the largest cumulative condition number, 1 at the smallest.

    All zeros, so all layers alike, where every layer has the same.
    """
    highest, lowest = max(cumulative), min(cumulative)
    spread = highest - lowest
    return [(highest - value) / spread if spread > 0 else 0.0 for value in cumulative]
