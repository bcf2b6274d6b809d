"""Curves of the loss over the ranks of one layer's keys or values alone. For the schedule `sensitivity`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from lorc_core.attention.attach import Attachment
from lorc_core.attention.call import AttentionStates
from lorc_core.decomposition.factors import UNTOUCHED, LayerDecomposition, LayerFactors, layer_spectrum
from lorc_core.errors import NumericsError
from lorc_core.measurement.losses import Batches, mean_loss
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import KINDS, KeysValues, LayerKind, by_layer, layer_kinds
from lorc_core.ranks.spectra import CurvePoint, energy_fractions
from lorc_core.ranks.staircase import Staircase

CURVE_FRACTIONS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # of a layer's width; 0 is its least rank


def loss_curves(
    model: PreTrainedModel, layers: Sequence[LayerDecomposition], batches: Batches
) -> tuple[KeysValues[tuple[CurvePoint, ...]], ...]:
    """The rise of the loss with one layer's keys or values alone compressed, at several ranks.

    Args:
        model: Without a variant attached.
        layers: Decomposed by one method.
        batches: Token ids of sequences of one length.

    Returns:
        For each layer and kind the full width, whose rise is zero, and what was measured.

    Raises:
        NumericsError: A loss is not finite; the message names the first layer whose inputs are not, or the one that
            was compressed.

    Source: LoRC, arXiv 2410.03111, Figure 3
    """
    try:
        baseline = mean_loss(model, batches)
    except NumericsError:
        _check_layers(model, batches)
        raise
    return by_layer([_loss_curve(model, layers, place, batches, baseline) for place in layer_kinds(len(layers))])


def max_curve_passes(num_layers: int) -> int:
    """How often `loss_curves` runs the model over all batches, at most."""
    return 1 + num_layers * len(KINDS) * len(CURVE_FRACTIONS)


def _loss_curve(
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
    stair = Staircase(spectrum.partition, energy_fractions(spectrum.read))
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


@torch.no_grad()
def _check_layers(model: PreTrainedModel, batches: Batches) -> None:
    """Raise NumericsError that names the first layer whose attention gets NaN or infinity, if any does."""
    architecture = architecture_of(model.config)
    observers = [partial(_check_layer, layer_idx) for layer_idx in range(architecture.num_layers)]
    untouched: list[LayerFactors] = [UNTOUCHED] * architecture.num_layers
    with Attachment(model, architecture, untouched, observers):
        for batch in batches:
            model.base_model(input_ids=batch.to(model.device), use_cache=False)


def _check_layer(layer_idx: int, states: AttentionStates) -> None:
    if not all(torch.isfinite(part).all() for part in (states.hidden_states, states.query, states.key, states.value)):
        raise NumericsError(f"layer {layer_idx}: the attention gets NaN or infinity on the calibration text")
