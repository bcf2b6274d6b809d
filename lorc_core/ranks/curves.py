"""Curves measured on calibration text, over the floats kept: one layer's attention error, the rise of the loss."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence

from lorc_core.ranks.spectra import CurvePoint, ErrorLevel

MIN_ERROR_RISE = 1e-9  # between levels, so that the floats between two of one error can be reached


def error_ramp(levels: Sequence[ErrorLevel], kv_width: int) -> list[ErrorLevel]:
    """Levels by rising error, from full width and no error; each is above the one before, by a little at least.

    Args:
        levels: Measured, in any order.
        kv_width: Floats of keys, or of values, that are uncompressed.
    """
    ramp = [ErrorLevel(kv_width, kv_width, 0.0)]
    for level in sorted(levels, key=lambda level: -(level.keys + level.values)):
        ramp.append(ErrorLevel(level.keys, level.values, max(level.error, ramp[-1].error + MIN_ERROR_RISE)))
    return ramp


def floats_at(ramp: Sequence[ErrorLevel], epsilon: float) -> tuple[float, float]:
    """Least floats of keys, and of values, whose error is at most epsilon, on straight lines between levels.

    Args:
        ramp: From `error_ramp`.
        epsilon: Relative error of the attention output.
    """
    above = bisect_right(ramp, epsilon, key=lambda level: level.error)
    if above == len(ramp):
        return float(ramp[-1].keys), float(ramp[-1].values)
    within, beyond = ramp[above - 1], ramp[above]
    way = (epsilon - within.error) / (beyond.error - within.error)
    return within.keys + way * (beyond.keys - within.keys), within.values + way * (beyond.values - within.values)


def error_at(levels: Sequence[ErrorLevel], floats: float) -> float:
    """The error where keys and values have so many floats together, on straight lines between levels.

    Args:
        levels: Measured, in any order.
        floats: Of keys and values of the layer together.
    """
    width = max(max(level.keys, level.values) for level in levels)
    ramp = error_ramp(levels, width)
    for within, beyond in itertools.pairwise(ramp):
        more, less = within.keys + within.values, beyond.keys + beyond.values
        if less <= floats:
            way = (more - floats) / (more - less) if more > less else 1.0
            return within.error + max(way, 0.0) * (beyond.error - within.error)
    return ramp[-1].error


def lower_hull(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """The highest convex curve below the points, by rising floats.

    Where the loss was measured above its neighbours' line, by noise or by a bad rank, the point is left out.
    """
    hull: list[CurvePoint] = []
    for point in sorted(points, key=lambda point: (point.floats, point.rise)):
        if hull and hull[-1].floats == point.floats:
            continue
        while len(hull) > 1 and rise_per_float(hull[-2], point) <= rise_per_float(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def rise_per_float(left: CurvePoint, right: CurvePoint) -> float:
    """The slope between two points of a curve, in nats per token and float; negative where floats help."""
    return (right.rise - left.rise) / (right.floats - left.floats)
