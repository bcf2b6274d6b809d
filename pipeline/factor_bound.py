"""How large a variant's factors can get, from a model's config alone: exact for uniform ranks, at most for all others.

Other schedules spread a known number of floats by spectra or measurements that are not there yet. Factors are largest
where those floats fall to the layers and kinds in which a float of rank costs most.
"""

import math
from collections.abc import Sequence

from lorc_core.caches.memory import adapter_floats, floats_per_rank, mean_floats, planned_factor_floats
from lorc_core.methods import Method
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import KINDS, LayerKind, layer_kinds
from lorc_core.ranks.budgets import KEPT_FRACTION_TOLERANCE
from lorc_core.ranks.schedules import Energy, Fisher, Progressive, Schedule, Uniform
from lorc_core.ranks.spectra import KindSpectrum, LayerSpectrum, Probes
from lorc_core.ranks.staircase import Staircase


def most_factor_floats(method: Method, schedule: Schedule, architecture: Architecture, kept_fraction: float) -> int:
    """The most floats of factors and adapters that a variant can have.

    Args:
        method: One that the model can have.
        schedule: Of the ranks.
        architecture: Of the model.
        kept_fraction: Share of the cached floats that is asked for.

    Raises:
        ConfigError: The model cannot have the schedule, or uniform ranks cannot reach the share.
    """
    spectra = [
        LayerSpectrum(*(KindSpectrum(method.axes(layer_idx, kind).partition(architecture), 0.0) for kind in KINDS))
        for layer_idx in range(architecture.num_layers)
    ]
    if isinstance(schedule, Uniform):
        return planned_factor_floats(schedule.ranks(spectra, kept_fraction), method, architecture)
    stairs = Uniform(schedule.rank_multiple, schedule.skip_layers).stairs(spectra, Probes())
    compressed = [
        place
        for place, stair in zip(layer_kinds(architecture.num_layers), stairs, strict=True)
        if not stair.always_full
    ]
    left = most_cached_floats(schedule, stairs, kept_fraction)
    left -= architecture.kv_width * (len(stairs) - len(compressed))

    def cost(place: LayerKind) -> int:
        return floats_per_rank(method, architecture, place)

    total = adapter_floats(method, architecture)
    total += sum(mean_floats(method, architecture, place) for place in compressed)
    for place in sorted(compressed, key=cost, reverse=True):
        rank = max(min(left, architecture.kv_width - 1), 0)  # at full width there are no factors
        total += rank * cost(place)
        left -= rank
    return total


def most_cached_floats(schedule: Schedule, stairs: Sequence[Staircase], kept_fraction: float) -> int:
    """The most floats per token, over all layers, that a schedule's ranks can come to.

    It takes the nearest that it reaches. Wherever its ranks jump, each staircase climbs one step, so that they are off
    by half of all these steps at most; or, below the least that it reaches, by the tolerance.
    """
    full = sum(stair.totals[-1] for stair in stairs)
    jump = sum(stair.largest_step for stair in stairs if not stair.always_full)
    least = (kept_fraction + KEPT_FRACTION_TOLERANCE) * full
    if isinstance(schedule, Energy | Fisher):
        least = min(least, sum(stair.totals[0] for stair in stairs))
    if isinstance(schedule, Progressive) and schedule.skip_above_log10_condition is None:
        floors = [min(stair.totals[-1], schedule.min_rank + schedule.rank_multiple) for stair in stairs]
        least = min(least, sum(floors) + jump)
    return math.ceil(max(kept_fraction * full + jump / 2, least))
