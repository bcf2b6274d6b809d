"""In which order steps that wait are best begun: those with the longest way to the end first."""

from collections.abc import Callable, Sequence

from pipeline.steps.step import Step


def remaining_seconds(steps: Sequence[Step], seconds_of: Callable[[Step], float]) -> dict[str, float]:
    """By the key of each step, seconds from its beginning to the end of the longest chain of steps that need it.

    The largest is the critical path: no cluster is faster.

    Args:
        steps: Each once, in any order; inputs that are not among them are done.
        seconds_of: What a step takes.
    """
    readers: dict[str, list[Step]] = {step.key: [] for step in steps}
    missing = {step.key: 0 for step in steps}  # readers whose remaining time is not known yet
    for step in steps:
        for needed in {needed.key: needed for needed in step.input_steps()}.values():
            if needed.key in readers:
                readers[needed.key].append(step)
                missing[needed.key] += 1
    by_key = {step.key: step for step in steps}
    remaining: dict[str, float] = {}
    ready = [key for key, count in missing.items() if not count]
    while ready:
        step = by_key[ready.pop()]
        after = max((remaining[reader.key] for reader in readers[step.key]), default=0.0)
        remaining[step.key] = seconds_of(step) + after
        for key in {needed.key for needed in step.input_steps()} & missing.keys():
            missing[key] -= 1
            if not missing[key]:
                ready.append(key)
    return remaining
