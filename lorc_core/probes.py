"""What schedules measure on calibration text beside spectra: Fisher information, output errors, curves of the loss."""

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorc_core.architecture import KINDS, PROJECTION_OF, Architecture, Kind, architecture_of
from lorc_core.errors import NumericsError
from lorc_core.latent_cache import LayerFactors, Observed, project_states
from lorc_core.projection import Factors, LayerDecomposition, layer_spectrum
from lorc_core.rotation import rotate
from lorc_core.runtime import Attachment
from lorc_core.schedule import climbed_ranks, shares
from lorc_core.spectra import CurvePoint, ErrorLevel, KindSpectrum, LayerRanks, RankSchedule, Staircase
from lorc_core.weights import projection_rows

CURVE_FRACTIONS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
NUM_ERROR_LEVELS = 24
FIRST_MOVE = 0.125  # of a layer's width, in the first round of exchanges

Batches = Sequence[Int[Tensor, "_ _"]]  # the last may be smaller


def fisher_information(model: PreTrainedModel, batches: Batches) -> tuple[dict[Kind, tuple[float, ...]], ...]:
    """Mean over inputs of sqrt(E[(dL/dW)^2]), for each key and value channel of each layer.

    Args:
        model: Without a variant attached. Gradients of W_k and W_v are held beside it.
        batches: Token ids; the expectation is over batches.

    Raises:
        NumericsError: A gradient holds NaN or infinity; the message names layer and kind.

    Source: Palu, arXiv 2407.21118, section 3.3
    """
    architecture = architecture_of(model.config)
    weights = [
        {kind: weight_parameter(model, architecture, layer_idx, kind) for kind in KINDS}
        for layer_idx in range(architecture.num_layers)
    ]
    watched = [weight for layer in weights for weight in layer.values()]
    squares = [torch.zeros_like(weight, dtype=torch.float32) for weight in watched]
    with only_gradients_of(model, watched):
        for batch in batches:
            gradients = torch.autograd.grad(next_token_loss(model, batch), watched)
            for square, gradient in zip(squares, gradients, strict=True):
                square += gradient.float().square()
    projections = [PROJECTION_OF[kind] for kind in KINDS] * architecture.num_layers
    rows = [projection_rows(architecture, *pair) for pair in zip(projections, squares, strict=True)]
    by_channel = [(square / len(batches)).sqrt().mean(dim=1) for square in rows]
    for idx, found in enumerate(by_channel):
        if not torch.isfinite(found).all():
            raise NumericsError(f"layer {idx // 2} {KINDS[idx % 2]}: a gradient holds NaN or infinity")
    numbers = [tuple(found.tolist()) for found in by_channel]
    return tuple(dict(zip(KINDS, pair, strict=True)) for pair in zip(numbers[::2], numbers[1::2], strict=True))


def weight_parameter(model: PreTrainedModel, architecture: Architecture, layer_idx: int, kind: Kind) -> nn.Parameter:
    """W_k or W_v, with W_q beside it where they are fused."""
    return model.base_model.get_parameter(architecture.projection_name(layer_idx, PROJECTION_OF[kind], "weight"))


@contextmanager
def only_gradients_of(model: PreTrainedModel, watched: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone; every parameter's own setting comes back."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        for parameter in watched:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, setting in before.items():
            parameter.requires_grad_(setting)


def next_token_loss(model: PreTrainedModel, batch: Int[Tensor, "b t"]) -> Tensor:
    """Mean loss in nats per token."""
    ids = batch.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:].to(logits.device))


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Batches) -> float:
    """Mean loss over batches of sequences of one length, in nats per token; NumericsError if it is not finite."""
    total = sum(next_token_loss(model, batch).item() * len(batch) for batch in batches)
    if not math.isfinite(total):
        raise NumericsError("the loss on the calibration text is NaN or infinite")
    return total / sum(len(batch) for batch in batches)


@torch.no_grad()
def attention_errors(
    model: PreTrainedModel, layers: Sequence[LayerDecomposition], batches: Batches
) -> tuple[tuple[ErrorLevel, ...], ...]:
    """For each layer, levels of falling energy and the relative error of the attention output at each.

    Every layer gets the uncompressed model's inputs. A level keeps, of keys and of values, the least ranks whose
    singular values add up to a threshold of all.

    Args:
        model: Without a variant attached.
        layers: Decomposed by one method.
        batches: Token ids.

    Source: Eigen Attention, arXiv 2408.05646, section 4
    """
    architecture = architecture_of(model.config)
    observers = [ErrorObserver(model, architecture, layer_idx, layer) for layer_idx, layer in enumerate(layers)]
    untouched: list[LayerFactors] = [dict.fromkeys(KINDS)] * len(layers)
    with Attachment(model, architecture, untouched, observers).start():
        for batch in batches:
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    return tuple(observer.levels() for observer in observers)


def error_levels(layer: LayerDecomposition) -> list[LayerRanks]:
    """The ranks of each level, the fullest first."""
    spectrum = layer_spectrum(layer)
    keys, values = (ranks_at_thresholds(spectrum.of(kind)) for kind in KINDS)
    return list(dict.fromkeys(LayerRanks(*ranks) for ranks in zip(keys, values, strict=True)))


def ranks_at_thresholds(spectrum: KindSpectrum) -> list[tuple[int, ...]]:
    """Least ranks whose singular values, not their squares, add up to a threshold of all; thresholds fall from 1."""
    roots = tuple(tuple(value**0.5 for value in block) for block in spectrum.read)
    stair = Staircase(spectrum.partition, roots)
    kept = list(itertools.accumulate(step.gain * step.floats for step in stair.steps))
    whole = kept[-1] * (1 - 1e-9)
    thresholds = (1 - step / NUM_ERROR_LEVELS for step in range(NUM_ERROR_LEVELS))
    return [stair.ranks(min(bisect_left(kept, threshold * whole) + 1, len(kept))) for threshold in thresholds]


class ErrorObserver:
    """Compares one layer's attention output with and without compression, at several levels."""

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, layer_idx: int, layer: LayerDecomposition
    ) -> None:
        self.output = model.base_model.get_submodule(architecture.output_name(layer_idx).removesuffix(".weight"))
        self.layer_idx, self.layer = layer_idx, layer
        self.ranks = error_levels(layer)
        self.errors = [0.0] * len(self.ranks)
        self.energy = 0.0

    def __call__(self, seen: Observed) -> None:
        exact = self.output(seen.attend(seen.rotated_key, seen.value).flatten(2))
        self.energy += exact.double().square().sum().item()
        for idx, ranks in enumerate(self.ranks):
            factors: LayerFactors = {kind: self.layer[kind].factors(ranks.of(kind)) for kind in KINDS}
            found = self.output(seen.attend(*compressed(seen, factors)).flatten(2))
            self.errors[idx] += (found - exact).double().square().sum().item()

    def levels(self) -> tuple[ErrorLevel, ...]:
        """What was measured.

        Raises:
            NumericsError: The attention output is not finite.
        """
        if not all(map(math.isfinite, (self.energy, *self.errors))):
            raise NumericsError(f"layer {self.layer_idx}: the attention output holds NaN or infinity")
        energy = self.energy or 1.0  # an output of zeros loses nothing
        return tuple(
            ErrorLevel(ranks.floats("keys"), ranks.floats("values"), (error / energy) ** 0.5)
            for ranks, error in zip(self.ranks, self.errors, strict=True)
        )


def compressed(seen: Observed, factors: LayerFactors) -> tuple[Tensor, Tensor]:
    """The rotated keys and the values that a cache of latents would give back."""
    keys, values = (placed(factors[kind], seen.value) for kind in KINDS)
    value = project_states(seen.value, values)
    if keys.rotated or seen.rotation is None:
        return project_states(seen.rotated_key, keys), value
    return rotate(project_states(seen.key, keys), seen.rotation), value


def placed(factors: Factors | None, like: Tensor) -> Factors:
    assert factors is not None
    return factors.to(like.device, like.dtype)


def loss_curves(
    model: PreTrainedModel, layers: Sequence[LayerDecomposition], batches: Batches
) -> tuple[dict[Kind, tuple[CurvePoint, ...]], ...]:
    """The rise of the loss with one layer's keys or values alone compressed, at several ranks.

    Args:
        model: Without a variant attached.
        layers: Decomposed by one method.
        batches: Token ids of sequences of one length.

    Raises:
        NumericsError: A loss is not finite; the message names the first layer whose inputs are not, or the one that
            was compressed.

    Source: LoRC, arXiv 2410.03111, Figure 3
    """
    try:
        baseline = mean_loss(model, batches)
    except NumericsError:
        check_layers(model, batches)
        raise
    return tuple(
        {kind: loss_curve(model, layers, (layer_idx, kind), batches, baseline) for kind in KINDS}
        for layer_idx in range(len(layers))
    )


@torch.no_grad()
def check_layers(model: PreTrainedModel, batches: Batches) -> None:
    """Raise NumericsError that names the first layer whose attention gets NaN or infinity, if any does."""
    architecture = architecture_of(model.config)
    observers = [partial(check_layer, layer_idx) for layer_idx in range(architecture.num_layers)]
    untouched: list[LayerFactors] = [dict.fromkeys(KINDS)] * architecture.num_layers
    with Attachment(model, architecture, untouched, observers).start():
        for batch in batches:
            model.base_model(input_ids=batch.to(model.device), use_cache=False)


def check_layer(layer_idx: int, seen: Observed) -> None:
    if not all(torch.isfinite(states).all() for states in (seen.inputs, seen.query, seen.key, seen.value)):
        raise NumericsError(f"layer {layer_idx}: the attention gets NaN or infinity on the calibration text")


def loss_curve(
    model: PreTrainedModel,
    layers: Sequence[LayerDecomposition],
    place: tuple[int, Kind],
    batches: Batches,
    baseline: float,
) -> tuple[CurvePoint, ...]:
    layer_idx, kind = place
    architecture = architecture_of(model.config)
    spectrum = layer_spectrum(layers[layer_idx]).of(kind)
    stair = Staircase(spectrum.partition, shares(spectrum.read))
    points = [CurvePoint(architecture.kv_width, 0.0)]
    for steps in dict.fromkeys(stair.nearest(share * architecture.kv_width) for share in CURVE_FRACTIONS):
        if stair.totals[steps - 1] == architecture.kv_width:
            continue
        factors: list[LayerFactors] = [dict.fromkeys(KINDS) for _ in layers]
        factors[layer_idx][kind] = layers[layer_idx][kind].factors(stair.ranks(steps))
        with Attachment(model, architecture, factors).start():
            try:
                loss = mean_loss(model, batches)
            except NumericsError as error:
                raise NumericsError(f"layer {layer_idx} {kind}, compressed alone: {error}") from error
        points.append(CurvePoint(stair.totals[steps - 1], loss - baseline))
    return tuple(points)


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
