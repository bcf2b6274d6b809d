"""Fit a family of ranks to a budget: a share of the cached floats, or bytes."""

from collections.abc import Callable, Sequence

from lorc_core.errors import ConfigError
from lorc_core.ranks.spectra import RankSchedule
from lorc_core.ranks.staircase import Climb, Staircase

KEPT_FRACTION_TOLERANCE = 0.01


def check_kept_fraction(kept_fraction: float) -> None:
    """Raise ConfigError unless the share is in (0, 1]."""
    if not 0 < kept_fraction <= 1:
        raise ConfigError(f"kept_fraction must be in (0, 1], got {kept_fraction}")


def fit(climb: Climb, stairs: Sequence[Staircase], kept_fraction: float, name: str) -> float:
    """The height at which a family of ranks is nearest to the target.

    Args:
        climb: The family; see `Schedule.climb`.
        stairs: What it climbs.
        kept_fraction: The target, in (0, 1].
        name: Of the schedule, for errors.

    Raises:
        ConfigError: The target is out of the family's reach.
    """
    full = sum(stair.totals[-1] for stair in stairs)

    def kept_at(height: float) -> float:
        return sum(stair.totals[steps - 1] for stair, steps in zip(stairs, climb(height), strict=True)) / full

    least, most = kept_at(0.0), kept_at(1.0)
    if not least - KEPT_FRACTION_TOLERANCE <= kept_fraction <= most + KEPT_FRACTION_TOLERANCE:
        raise ConfigError(
            f"{name}: kept_fraction {kept_fraction} cannot be reached; reachable is {least:.3f}..{most:.3f}"
        )
    # The kept fraction rises with the height in jumps of one or more rank steps. Bisection closes in on the jump over
    # the target; the nearer of its two sides is the best that the family has.
    low, high = 0.0, 1.0
    for _ in range(60):  # past float64's resolution of the height
        middle = (low + high) / 2
        low, high = (middle, high) if kept_at(middle) < kept_fraction else (low, middle)
    return min(low, high, key=lambda height: abs(kept_at(height) - kept_fraction))


def fit_bytes(
    ranks_at: Callable[[float], RankSchedule],
    least_bytes: Callable[[RankSchedule, RankSchedule], int],
    *,
    budget_bytes: int,
    name: str,
) -> RankSchedule:
    """The largest ranks of a schedule whose cache and factors fit a budget.

    Bytes do not always rise with the ranks, as a layer at full width has no factors. So shares are halved into
    intervals, and those are left out of which `least_bytes` says that nothing in them fits. Ranks never fall as the
    share rises, so what lies in an interval lies between the ranks at its ends.

    Args:
        ranks_at: A schedule's, by the share of floats to keep.
        least_bytes: That any ranks between two, each no smaller than the first's and no larger than the second's, need
            for the cache and the factors that stay loaded beside the base model; of two that are the same exactly.
        budget_bytes: What there is.
        name: Of the schedule.

    Raises:
        ConfigError: Nothing that the schedule reaches fits.
    """
    largest = ranks_at(1.0)
    intervals: list[tuple[float, RankSchedule | None, float, RankSchedule]] = [(0.0, None, 1.0, largest)]
    while intervals:
        low, below, high, above = intervals.pop()
        if least_bytes(above, above) <= budget_bytes:
            return above
        # Members of the schedule are a float apart or more, so each is the nearest to half a float of shares at least.
        # A narrower interval has none to itself: those at its ends are all.
        if (high - low) * largest.full_floats_per_token < 0.5:
            continue
        if below is not None and least_bytes(below, above) > budget_bytes:
            continue
        middle = (low + high) / 2
        try:
            between = ranks_at(middle)
        except ConfigError:  # below what the schedule reaches
            intervals.append((middle, None, high, above))
            continue
        intervals += [(low, below, middle, between), (middle, between, high, above)]
    raise ConfigError(f"{name}: no ranks make cache and factors fit {budget_bytes:,} bytes")
