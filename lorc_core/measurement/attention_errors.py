"""Errors of a layer's attention output over the ranks of its keys and values. For the schedule `error_budget`."""

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorc_core.attention.attach import Attachment
from lorc_core.attention.call import AttentionStates
from lorc_core.attention.layer_projections import project_states
from lorc_core.decomposition.factors import UNTOUCHED, Factors, LayerDecomposition, LayerFactors, layer_spectrum
from lorc_core.errors import NumericsError
from lorc_core.measurement.losses import Batches
from lorc_core.model.architecture import Architecture, architecture_of
from lorc_core.model.kinds import KINDS, KeysValues
from lorc_core.model.rotation import rotate
from lorc_core.ranks.spectra import ErrorLevel, KindSpectrum, LayerRanks
from lorc_core.ranks.staircase import Staircase

NUM_LEVELS = 24


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

    Returns:
        The fullest level first. Errors are root sums of squares over all tokens, over those of the exact output.

    Raises:
        NumericsError: An attention output holds NaN or infinity; the message names the layer.

    Source: Eigen Attention, arXiv 2408.05646, section 4
    """
    architecture = architecture_of(model.config)
    observers = [_LayerErrors(model, architecture, layer_idx, layer) for layer_idx, layer in enumerate(layers)]
    untouched: list[LayerFactors] = [UNTOUCHED] * len(layers)
    with Attachment(model, architecture, untouched, observers):
        for batch in batches:
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    return tuple(observer.levels() for observer in observers)


class _LayerErrors:
    """Adds up, over calls, the squared error of one layer's attention output at every level."""

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, layer_idx: int, layer: LayerDecomposition
    ) -> None:
        self.output = model.base_model.get_submodule(architecture.output_name(layer_idx).removesuffix(".weight"))
        self.layer_idx, self.layer = layer_idx, layer
        self.ranks = _level_ranks(layer)
        self.squared_errors = [0.0] * len(self.ranks)
        self.squared_output = 0.0

    def __call__(self, states: AttentionStates) -> None:
        exact = self.output(states.attend(states.rotated_key, states.value).flatten(2))
        self.squared_output += exact.double().square().sum().item()
        for idx, ranks in enumerate(self.ranks):
            factors = KeysValues(*(self.layer[kind].factors(ranks[kind]) for kind in KINDS))
            output = self.output(states.attend(*_compressed(states, factors)).flatten(2))
            self.squared_errors[idx] += (output - exact).double().square().sum().item()

    def levels(self) -> tuple[ErrorLevel, ...]:
        """What was measured; NumericsError where it is not finite."""
        if not all(map(math.isfinite, (self.squared_output, *self.squared_errors))):
            raise NumericsError(f"layer {self.layer_idx}: the attention output holds NaN or infinity")
        whole = self.squared_output or 1.0  # an output of zeros loses nothing
        return tuple(
            ErrorLevel(ranks.floats("keys"), ranks.floats("values"), (squared_error / whole) ** 0.5)
            for ranks, squared_error in zip(self.ranks, self.squared_errors, strict=True)
        )


def _level_ranks(layer: LayerDecomposition) -> list[LayerRanks]:
    """The ranks of each level, the fullest first."""
    spectrum = layer_spectrum(layer)
    keys, values = spectrum.map(_ranks_at_thresholds)
    return list(dict.fromkeys(LayerRanks(*ranks) for ranks in zip(keys, values, strict=True)))


def _ranks_at_thresholds(spectrum: KindSpectrum) -> list[tuple[int, ...]]:
    """Least ranks whose singular values, not their squares, add up to a threshold of all; thresholds fall from 1."""
    roots = tuple(tuple(value**0.5 for value in block) for block in spectrum.read)
    stair = Staircase(spectrum.partition, roots)
    kept = list(itertools.accumulate(step.gain * step.floats for step in stair.steps))
    whole = kept[-1] * (1 - 1e-9)  # so that rounding in the sum does not take a step more
    thresholds = (1 - level / NUM_LEVELS for level in range(NUM_LEVELS))
    return [stair.ranks(min(bisect_left(kept, threshold * whole) + 1, len(kept))) for threshold in thresholds]


def _compressed(states: AttentionStates, factors: KeysValues[Factors]) -> tuple[Tensor, Tensor]:
    """The rotated keys and the values that a cache of latents would give back."""
    keys, values = factors.map(lambda projection: projection.to(states.value.device, states.value.dtype))
    value = project_states(states.value, values)
    if keys.rotated or states.rotation is None:
        return project_states(states.rotated_key, keys), value
    return rotate(project_states(states.key, keys), states.rotation), value
