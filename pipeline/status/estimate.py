"""When a run will end: what its steps that are left will take, by those of the same kind and model size that ended."""

from collections.abc import Mapping, Sequence

Kind = tuple[str, int]  # of steps that take about as long: a kind of step, and the size class of its model


def seconds_left(
    ended: Mapping[Kind, Sequence[float]],
    waiting: Mapping[Kind, int],
    running: Sequence[tuple[Kind, float]],
    parallelism: float,
) -> float | None:
    """About how long it takes until all steps are done.

    Args:
        ended: What steps took, in seconds, by their kind.
        waiting: How many steps of a kind have not begun.
        running: The kind of each step that runs, and for how many seconds it has.
        parallelism: How many steps ran at a time so far, in the mean.

    Returns:
        Seconds; None while of a kind that is left no step has ended.
    """
    left = {kind for kind, number in waiting.items() if number} | {kind for kind, _ in running}
    if parallelism <= 0 or not all(ended.get(kind) for kind in left):
        return None
    mean = {kind: sum(ended[kind]) / len(ended[kind]) for kind in left}
    work = sum(number * mean[kind] for kind, number in waiting.items() if number)
    work += sum(max(mean[kind] - age, 0) for kind, age in running)
    return work / parallelism
