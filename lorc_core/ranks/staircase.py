"""Every rank step of one layer's keys or values, best first, so that a schedule only says how far to climb each."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lorc_core.model.blocks import Partition
from lorc_core.ranks.spectra import Energies


@dataclass(frozen=True)
class RankStep:
    """One step up a staircase: `block` (all blocks where their ranks are equal) gets to `rank` for `floats` more."""

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
    gains: Energies
    rank_multiple: int = 1
    always_full: bool = False
    steps: tuple[RankStep, ...] = field(init=False)

    def __post_init__(self) -> None:
        width, blocks = self.partition.width, self.partition.num_blocks
        if self.always_full:
            steps = [RankStep(math.inf, self.partition.kv_width, 0, width)]
        elif self.partition.equal_ranks:
            together = tuple(map(sum, zip(*self.gains, strict=True))) if self.gains else ()
            steps = self._ladder(0, together, blocks)
        else:
            steps = [step for block in range(blocks) for step in self._ladder(block, self._gains_of(block), 1)]
            steps.sort(key=lambda step: (-step.gain, step.rank, step.block))
        object.__setattr__(self, "steps", tuple(steps))

    def _gains_of(self, block: int) -> tuple[float, ...]:
        return self.gains[block] if self.gains else ()

    def _ladder(self, block: int, gains: Sequence[float], blocks_together: int) -> list[RankStep]:
        width = self.partition.width
        multiple = math.lcm(self.rank_multiple, self.partition.rank_step)
        steps: list[RankStep] = []
        for start in range(0, width, multiple):
            stop = min(start + multiple, width)
            gain = sum(gains[start:stop]) / ((stop - start) * blocks_together)
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

    def nearest(self, floats: int | float) -> int:
        """The number of steps, at least one, whose total is nearest."""
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


Climb = Callable[[float], list[int]]  # a share in [0, 1] to the steps of each staircase
