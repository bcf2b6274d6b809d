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
    """
    stairs = schedule.stairs([layer_spectrum(layer) for layer in layers], Probes())
    return Exchange(stairs, partial(loss_at_ranks, model, layers, batches)).improve(start, schedule.num_rounds)


def max_exchange_passes(schedule: Sensitivity, num_layers: int) -> int:
    """How often `exchanged_ranks` runs the model over all batches, at most."""
    num_stairs = num_layers * len(KINDS)
    halvings = num_stairs.bit_length()  # of the pairs that exchange
    return 1 + schedule.num_rounds * (2 * num_stairs + halvings)


def loss_at_ranks(
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
        stairs: Rank steps of each layer's keys and values in turn.
        loss_of: Measures ranks on calibration text, in nats per token.
    """

    stairs: Sequence[Staircase]
    loss_of: Callable[[RankSchedule], float]

    def improve(self, start: RankSchedule, num_rounds: int) -> RankSchedule:
        """The best ranks found after so many rounds."""
        steps = [
            stair.nearest(layer.floats(kind))
            for (layer, kind), stair in zip(itertools.product(start.layers, KINDS), self.stairs, strict=True)
        ]
        loss = self.loss_of(start)
        for round_idx in range(num_rounds):
            move = max(round(FIRST_MOVE * start.kv_width / 2**round_idx), 1)
            steps, loss = self._round(steps, loss, move, start)
        return climbed_ranks(self.stairs, steps, start.kv_width, start.note)

    def _round(self, steps: list[int], loss: float, move: int, start: RankSchedule) -> tuple[list[int], float]:
        losses = {
            (idx, sign): self._loss(moved, start)
            for idx in range(len(steps))
            for sign in (-1, 1)
            if (moved := self._moved(steps, {idx: sign * move})) != steps
        }
        givers = sorted((found, idx) for (idx, sign), found in losses.items() if sign < 0)
        takers = sorted((found, idx) for (idx, sign), found in losses.items() if sign > 0)
        pairs: list[tuple[int, int]] = []
        used: set[int] = set()
        for given, giver in givers:
            partner = next(((taken, idx) for taken, idx in takers if idx not in used and idx != giver), None)
            if giver in used or partner is None or given + partner[0] >= 2 * loss:
                continue
            used |= {giver, partner[1]}
            pairs.append((giver, partner[1]))
        while pairs:
            moves = {giver: -move for giver, _ in pairs} | {taker: move for _, taker in pairs}
            moved = self._moved(steps, moves)
            if self._total(moved) <= self._total(steps) and (found := self._loss(moved, start)) < loss:
                return moved, found
            pairs = pairs[: len(pairs) // 2]
        return steps, loss

    def _loss(self, steps: Sequence[int], start: RankSchedule) -> float:
        return self.loss_of(climbed_ranks(self.stairs, steps, start.kv_width, start.note))

    def _moved(self, steps: Sequence[int], moves: Mapping[int, int]) -> list[int]:
        """Steps after giving or taking floats; takers round down, givers too, so that the total does not grow."""
        moved = list(steps)
        for idx, floats in moves.items():
            totals = self.stairs[idx].totals
            moved[idx] = max(bisect_right(totals, totals[steps[idx] - 1] + floats), 1)
        return moved

    def _total(self, steps: Sequence[int]) -> int:
        return sum(stair.totals[count - 1] for stair, count in zip(self.stairs, steps, strict=True))
