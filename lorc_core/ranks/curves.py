"""Curves measured on calibration text, over the floats kept: one layer's attention error, the rise of the loss."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence

from lorc_core.ranks.spectra import CurvePoint, ErrorLevel

MIN_ERROR_RISE = 1e-9  # between levels, so that the floats between two of one error can be reached


def error_ramp(levels: Sequence[ErrorLevel], kv_width: int) -> list[ErrorLevel]:
    """Levels by rising error, from full width and no error; every cut raises it, by a little at least."""
    ramp = [ErrorLevel(kv_width, kv_width, 0.0)]
    for level in sorted(levels, key=lambda level: -(level.keys + level.values)):
        ramp.append(ErrorLevel(level.keys, level.values, max(level.error, ramp[-1].error + MIN_ERROR_RISE)))
    return ramp


def floats_at(ramp: Sequence[ErrorLevel], epsilon: float) -> tuple[float, float]:
    """Least floats of keys and values whose error is at most epsilon, on straight lines between levels."""
    above = bisect_right(ramp, epsilon, key=lambda level: level.error)
    if above == len(ramp):
        return float(ramp[-1].keys), float(ramp[-1].values)
    within, beyond = ramp[above - 1], ramp[above]
    part = (epsilon - within.error) / (beyond.error - within.error)
    return within.keys + part * (beyond.keys - within.keys), within.values + part * (beyond.values - within.values)


def error_at(levels: Sequence[ErrorLevel], floats: float) -> float:
    """The error where keys and values have so many floats together, on straight lines between levels."""
    width = max(max(level.keys, level.values) for level in levels)
    ramp = error_ramp(levels, width)
    for within, beyond in itertools.pairwise(ramp):
        held, less = within.keys + within.values, beyond.keys + beyond.values
        if less <= floats:
            part = (held - floats) / (held - less) if held > less else 1.0
            return within.error + max(part, 0.0) * (beyond.error - within.error)
    return ramp[-1].error


def lower_hull(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """The convex curve below the points, by rising floats."""
    hull: list[CurvePoint] = []
    for point in sorted(points, key=lambda point: (point.floats, point.rise)):
        if hull and hull[-1].floats == point.floats:
            continue
        while len(hull) > 1 and rise_per_float(hull[-2], point) <= rise_per_float(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def rise_per_float(left: CurvePoint, right: CurvePoint) -> float:
    return (right.rise - left.rise) / (right.floats - left.floats)
