"""What schedules measure on calibration text beside spectra: Fisher information, output errors, curves of the loss."""

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorc_core.attention.attach import Attachment
from lorc_core.attention.call import Observed
from lorc_core.attention.layer_projections import project_states
from lorc_core.decomposition.factors import UNTOUCHED, Factors, LayerDecomposition, LayerFactors, layer_spectrum
from lorc_core.errors import NumericsError
from lorc_core.model.architecture import Architecture, architecture_of
from lorc_core.model.kinds import KINDS, PROJECTION_OF, KeysValues, LayerKind, by_layer, layer_kinds
from lorc_core.model.rotation import rotate
from lorc_core.model.weights import projection_rows
from lorc_core.ranks.schedules import Probe, shares
from lorc_core.ranks.spectra import CurvePoint, ErrorLevel, KindSpectrum, LayerRanks, Probes
from lorc_core.ranks.staircase import Staircase

CURVE_FRACTIONS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
NUM_ERROR_LEVELS = 24

Batches = Sequence[Int[Tensor, "_ _"]]  # the last may be smaller


def probe(kind: Probe, model: PreTrainedModel, layers: Sequence[LayerDecomposition], batches: Batches) -> Probes:
    """What the schedules that ask for this kind of probe read.

    Args:
        kind: Which measurement.
        model: Without a variant attached.
        layers: Decomposed by one method; `fisher` does not look at them.
        batches: Token ids of sequences of one length.

    Raises:
        NumericsError: A measurement is NaN or infinite; the message names the layer.
    """
    if kind == "fisher":
        return Probes(fisher=fisher_information(model, batches))
    if kind == "errors":
        return Probes(errors=attention_errors(model, layers, batches))
    return Probes(curves=loss_curves(model, layers, batches))


def max_passes(kind: Probe, num_layers: int) -> int:
    """How often `probe` runs the model over all batches, at most."""
    return 1 + num_layers * len(KINDS) * len(CURVE_FRACTIONS) if kind == "curves" else 1


def fisher_information(model: PreTrainedModel, batches: Batches) -> tuple[KeysValues[tuple[float, ...]], ...]:
    """Mean over inputs of sqrt(E[(dL/dW)^2]), for each key and value channel of each layer.

    Args:
        model: Without a variant attached. Gradients of W_k and W_v are held beside it.
        batches: Token ids; the expectation is over batches.

    Raises:
        NumericsError: A gradient holds NaN or infinity; the message names layer and kind.

    Source: Palu, arXiv 2407.21118, section 3.3
    """
    architecture = architecture_of(model.config)
    places = layer_kinds(architecture.num_layers)
    watched = [weight_parameter(model, architecture, place) for place in places]
    squares = [torch.zeros_like(weight, dtype=torch.float32) for weight in watched]
    with only_gradients_of(model, watched):
        for batch in batches:
            gradients = torch.autograd.grad(next_token_loss(model, batch), watched)
            for square, gradient in zip(squares, gradients, strict=True):
                square += gradient.float().square()
    channels: list[tuple[float, ...]] = []
    for place, square in zip(places, squares, strict=True):
        rows = projection_rows(architecture, PROJECTION_OF[place.kind], square)
        by_channel = (rows / len(batches)).sqrt().mean(dim=1)
        if not torch.isfinite(by_channel).all():
            raise NumericsError(f"{place}: a gradient holds NaN or infinity")
        channels.append(tuple(by_channel.tolist()))
    return by_layer(channels)


def weight_parameter(model: PreTrainedModel, architecture: Architecture, place: LayerKind) -> nn.Parameter:
    """W_k or W_v, with W_q beside it where they are fused."""
    projection = PROJECTION_OF[place.kind]
    return model.base_model.get_parameter(architecture.projection_name(place.layer_idx, projection, "weight"))


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
    untouched: list[LayerFactors] = [UNTOUCHED] * len(layers)
    with Attachment(model, architecture, untouched, observers):
        for batch in batches:
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    return tuple(observer.levels() for observer in observers)


def error_levels(layer: LayerDecomposition) -> list[LayerRanks]:
    """The ranks of each level, the fullest first."""
    spectrum = layer_spectrum(layer)
    keys, values = spectrum.map(ranks_at_thresholds)
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
            factors = KeysValues(*(self.layer[kind].factors(ranks[kind]) for kind in KINDS))
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


def compressed(seen: Observed, factors: KeysValues[Factors]) -> tuple[Tensor, Tensor]:
    """The rotated keys and the values that a cache of latents would give back."""
    keys, values = factors.map(lambda one: one.to(seen.value.device, seen.value.dtype))
    value = project_states(seen.value, values)
    if keys.rotated or seen.rotation is None:
        return project_states(seen.rotated_key, keys), value
    return rotate(project_states(seen.key, keys), seen.rotation), value


def loss_curves(
    model: PreTrainedModel, layers: Sequence[LayerDecomposition], batches: Batches
) -> tuple[KeysValues[tuple[CurvePoint, ...]], ...]:
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
    return by_layer([loss_curve(model, layers, place, batches, baseline) for place in layer_kinds(len(layers))])


@torch.no_grad()
def check_layers(model: PreTrainedModel, batches: Batches) -> None:
    """Raise NumericsError that names the first layer whose attention gets NaN or infinity, if any does."""
    architecture = architecture_of(model.config)
    observers = [partial(check_layer, layer_idx) for layer_idx in range(architecture.num_layers)]
    untouched: list[LayerFactors] = [UNTOUCHED] * architecture.num_layers
    with Attachment(model, architecture, untouched, observers):
        for batch in batches:
            model.base_model(input_ids=batch.to(model.device), use_cache=False)


def check_layer(layer_idx: int, seen: Observed) -> None:
    if not all(torch.isfinite(states).all() for states in (seen.inputs, seen.query, seen.key, seen.value)):
        raise NumericsError(f"layer {layer_idx}: the attention gets NaN or infinity on the calibration text")


def loss_curve(
    model: PreTrainedModel,
    layers: Sequence[LayerDecomposition],
    place: LayerKind,
    batches: Batches,
    baseline: float,
) -> tuple[CurvePoint, ...]:
    """The rise of the loss at several ranks of one layer's keys or values, the others left whole."""
    layer_idx, kind = place
    architecture = architecture_of(model.config)
    spectrum = layer_spectrum(layers[layer_idx])[kind]
    stair = Staircase(spectrum.partition, shares(spectrum.read))
    points = [CurvePoint(architecture.kv_width, 0.0)]
    for steps in dict.fromkeys(stair.nearest(share * architecture.kv_width) for share in CURVE_FRACTIONS):
        if stair.totals[steps - 1] == architecture.kv_width:
            continue
        cut = layers[layer_idx][kind].factors(stair.ranks(steps))
        factors = [UNTOUCHED for _ in layers]
        factors[layer_idx] = replace(UNTOUCHED, **{kind: cut})
        with Attachment(model, architecture, factors):
            try:
                loss = mean_loss(model, batches)
            except NumericsError as error:
                raise NumericsError(f"{place}, compressed alone: {error}") from error
        points.append(CurvePoint(stair.totals[steps - 1], loss - baseline))
    return tuple(points)
