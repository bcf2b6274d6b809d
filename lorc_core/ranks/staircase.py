"""The ranks that one layer's keys or values can have, in the order in which they are worth their floats.

Every compromise between layers is then a number of steps for each: how far its staircase is climbed.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lorc_core.model.blocks import Partition
from lorc_core.model.kinds import by_layer
from lorc_core.ranks.spectra import Energies, LayerRanks, RankSchedule


@dataclass(frozen=True)
class RankStep:
    """One step up a staircase: `block` (all blocks where their ranks are equal) gets to `rank` for `floats` more.

    `gain` is what a float of this step is worth.
    """

    gain: float
    floats: int
    block: int
    rank: int


@dataclass(frozen=True)
class Staircase:
    """Every rank step of one layer's keys or values, the most gain per float first; the first is always taken.

    Args:
        partition: The blocks.
        gains: Of each direction of each block; what a later step gains never counts for more than an earlier one's.
        rank_multiple: Ranks go up by this, or to the full width of a block.
        always_full: There is one step only, to the full width.
    """

    partition: Partition
    gains: Energies = field(repr=False)
    rank_multiple: int = 1
    always_full: bool = False
    steps: tuple[RankStep, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        width, blocks = self.partition.width, self.partition.num_blocks
        if self.always_full:
            steps = [RankStep(math.inf, self.partition.kv_width, 0, width)]
        elif self.partition.equal_ranks:
            together = tuple(map(sum, zip(*self.gains, strict=True))) if self.gains else ()
            steps = self._block_steps(0, together, blocks)
        else:
            steps = [step for block in range(blocks) for step in self._block_steps(block, self._gains_of(block), 1)]
            # Equal gains: the lower rank first, so that blocks which are alike rise together.
            steps.sort(key=lambda step: (-step.gain, step.rank, step.block))
        object.__setattr__(self, "steps", tuple(steps))

    def _gains_of(self, block: int) -> tuple[float, ...]:
        return self.gains[block] if self.gains else ()

    def _block_steps(self, block: int, gains: Sequence[float], blocks_together: int) -> list[RankStep]:
        """The steps of one block, or of all together, by rising rank."""
        width = self.partition.width
        multiple = math.lcm(self.rank_multiple, self.partition.rank_step)
        steps: list[RankStep] = []
        for start in range(0, width, multiple):
            stop = min(start + multiple, width)
            gain = sum(gains[start:stop]) / ((stop - start) * blocks_together)
            # Rounding, and gains that are no spectrum, can rise. Sorted by gain, a step to rank 3 would then stand
            # before the step to rank 2; cut to its predecessor's, the gain leaves a block's steps in their order.
            gain = min(gain, steps[-1].gain) if steps else gain
            steps.append(RankStep(gain, (stop - start) * blocks_together, block, stop))
        return steps

    @cached_property
    def totals(self) -> list[int]:
        """Floats per token after 1, 2, ... steps."""
        totals, total = [], 0
        for step in self.steps:
            total += step.floats
            totals.append(total)
        return totals

    @cached_property
    def largest_step(self) -> int:
        """Floats per token of the largest step."""
        return max(step.floats for step in self.steps)

    def nearest(self, floats: int | float) -> int:
        """The number of steps, at least one, whose total is nearest; of two as near the larger."""
        above = min(bisect_left(self.totals, floats), len(self.totals) - 1)
        candidates = [above] if above == 0 else [above - 1, above]
        return 1 + min(candidates, key=lambda idx: (abs(self.totals[idx] - floats), -idx))

    def ranks(self, num_steps: int) -> tuple[int, ...]:
        """The rank of each block after so many steps."""
        blocks = self.partition.num_blocks
        if self.always_full:
            return (self.partition.width,) * blocks
        ranks = [0] * blocks
        for step in self.steps[:num_steps]:
            ranks[step.block] = step.rank
        return (ranks[0],) * blocks if self.partition.equal_ranks else tuple(ranks)


Climb = Callable[[float], list[int]]  # from a height in [0, 1] to the steps taken of each staircase


def best_first(stairs: Sequence[Staircase]) -> Climb:
    """The climb that takes steps in the order of their gain per float, whichever staircase they belong to.

    The first step of each staircase is not in that order: it is always taken.
    """
    later_steps = [(-step.gain, step.rank, idx) for idx, stair in enumerate(stairs) for step in stair.steps[1:]]
    order = [idx for *_, idx in sorted(later_steps, key=lambda step: step[:2])]

    def steps_at(height: float) -> list[int]:
        taken = Counter(order[: round(height * len(order))])
        return [1 + taken[idx] for idx in range(len(stairs))]

    return steps_at


def climbed_ranks(stairs: Sequence[Staircase], steps: Sequence[int], kv_width: int, note: str = "") -> RankSchedule:
    """The ranks after so many steps of each staircase.

    Args:
        stairs: In the order of `layer_kinds`.
        steps: Of each, how many are taken.
        kv_width: Floats per token of one layer's keys or values, uncompressed.
        note: For `RankSchedule.note`.
    """
    ranks = by_layer([stair.ranks(count) for stair, count in zip(stairs, steps, strict=True)])
    return RankSchedule(tuple(LayerRanks(*layer) for layer in ranks), kv_width, note)
