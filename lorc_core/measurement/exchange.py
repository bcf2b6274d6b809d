"""Exchanges of floats between layers and kinds, as long as the loss on calibration text falls."""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from lorc_core.attention.attach import Attachment
from lorc_core.decomposition.factors import LayerDecomposition, layer_spectrum, slice_layer
from lorc_core.measurement.losses import Batches, mean_loss
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import KINDS
from lorc_core.ranks.schedules import Sensitivity
from lorc_core.ranks.spectra import Probes, RankSchedule
from lorc_core.ranks.staircase import Staircase, climbed_ranks

FIRST_MOVE = 0.125  # of a layer's width, in the first round of exchanges


def exchanged_ranks(
    model: PreTrainedModel,
    schedule: Sensitivity,
    layers: Sequence[LayerDecomposition],
    batches: Batches,
    start: RankSchedule,
) -> RankSchedule:
    """The ranks after the schedule's rounds of exchanges.

    Args:
        model: Without a variant attached.
        schedule: Says how many rounds, and in which steps ranks go.
        layers: Decomposed by one method.
        batches: Token ids of sequences of one length.
        start: The ranks that are improved.

    Raises:
        NumericsError: A loss is NaN or infinite.
    """
    stairs = schedule.stairs([layer_spectrum(layer) for layer in layers], Probes())
    return Exchange(stairs, partial(_loss_at_ranks, model, layers, batches)).improve(start, schedule.num_rounds)


def max_exchange_passes(schedule: Sensitivity, num_layers: int) -> int:
    """How often `exchanged_ranks` runs the model over all batches, at most."""
    num_stairs = num_layers * len(KINDS)
    halvings = num_stairs.bit_length()  # of the pairs that exchange
    return 1 + schedule.num_rounds * (2 * num_stairs + halvings)


def _loss_at_ranks(
    model: PreTrainedModel, layers: Sequence[LayerDecomposition], batches: Batches, ranks: RankSchedule
) -> float:
    """The loss of a model compressed to these ranks, in nats per token."""
    factors = [slice_layer(layer, idx, ranks, torch.float32) for idx, layer in enumerate(layers)]
    with Attachment(model, architecture_of(model.config), factors):
        return mean_loss(model, batches)


@dataclass
class Exchange:
    """Moves floats between layers and kinds while the measured loss falls; the total never grows.

    In each round every layer's keys and values give up, and get, the same small number of floats alone; those to whom
    they bring most then get them from those who miss them least, all such pairs at once or, where that does not help,
    the better half of them, and so on. Rounds halve the number of floats.

    Attributes:
        stairs: Rank steps of each layer's keys and values in turn. Ranks are given as the number of steps climbed on
            each.
        loss_of: Measures ranks on calibration text, in nats per token.
    """

    stairs: Sequence[Staircase]
    loss_of: Callable[[RankSchedule], float]

    def improve(self, start: RankSchedule, num_rounds: int) -> RankSchedule:
        """The best ranks of so many rounds.

        Args:
            start: The ranks that are improved; its note is kept.
            num_rounds: In the first, an eighth of a layer's width moves at a time.
        """
        steps = [
            stair.nearest(layer.floats(kind))
            for (layer, kind), stair in zip(itertools.product(start.layers, KINDS), self.stairs, strict=True)
        ]
        loss = self.loss_of(start)
        for round_idx in range(num_rounds):
            floats = max(round(FIRST_MOVE * start.kv_width / 2**round_idx), 1)
            steps, loss = self._round(steps, loss, floats, start)
        return climbed_ranks(self.stairs, steps, start.kv_width, start.note)

    def _round(self, steps: list[int], loss: float, floats: int, start: RankSchedule) -> tuple[list[int], float]:
        """The steps after one round and their loss; those before it where no exchange lowers the loss."""
        loss_after_giving: dict[int, float] = {}
        loss_after_getting: dict[int, float] = {}
        for idx in range(len(steps)):
            for losses, change in ((loss_after_giving, -floats), (loss_after_getting, floats)):
                moved = self._moved(steps, {idx: change})
                if moved != steps:
                    losses[idx] = self._loss(moved, start)
        pairs = _exchange_pairs(loss_after_giving, loss_after_getting, loss)
        # What single moves cost does not quite add up, the less so the more of them there are: measure, or halve.
        while pairs:
            changes = {giver: -floats for giver, _ in pairs} | {getter: floats for _, getter in pairs}
            moved = self._moved(steps, changes)
            if self._total(moved) <= self._total(steps) and (moved_loss := self._loss(moved, start)) < loss:
                return moved, moved_loss
            pairs = pairs[: len(pairs) // 2]
        return steps, loss

    def _loss(self, steps: Sequence[int], start: RankSchedule) -> float:
        return self.loss_of(climbed_ranks(self.stairs, steps, start.kv_width, start.note))

    def _moved(self, steps: Sequence[int], changes: Mapping[int, int]) -> list[int]:
        """Steps after some staircases give or get floats: at least as many are given, at most as many got.

        Only one that gets down to its first step gives less.
        """
        moved = list(steps)
        for idx, floats in changes.items():
            totals = self.stairs[idx].totals
            moved[idx] = max(bisect_right(totals, totals[steps[idx] - 1] + floats), 1)
        return moved

    def _total(self, steps: Sequence[int]) -> int:
        """Floats per token."""
        return sum(stair.totals[count - 1] for stair, count in zip(self.stairs, steps, strict=True))


def _exchange_pairs(
    loss_after_giving: Mapping[int, float], loss_after_getting: Mapping[int, float], loss: float
) -> list[tuple[int, int]]:
    """Who gives to whom, by index of the staircase, the best pair first; each takes part once.

    The givers that are missed least are paired with the getters that gain most, as long as giving and getting together
    promise a fall: (giving - loss) + (getting - loss) < 0.
    """
    givers = sorted((giving, idx) for idx, giving in loss_after_giving.items())
    getters = sorted((getting, idx) for idx, getting in loss_after_getting.items())
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()
    for giving, giver in givers:
        best = next(((getting, idx) for getting, idx in getters if idx not in used and idx != giver), None)
        if giver in used or best is None or giving + best[0] >= 2 * loss:
            continue
        getter = best[1]
        used |= {giver, getter}
        pairs.append((giver, getter))
    return pairs
