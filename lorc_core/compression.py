"""Compress one model on one machine: decompose every layer, choose ranks, build the variant.

The pipeline runs the same functions as separate steps on many machines.
"""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lorc_core.decomposition.decompose import decompose, decompose_weight
from lorc_core.decomposition.factors import Decomposition, LayerDecomposition, layer_spectrum, slice_layer
from lorc_core.decomposition.moments import LayerMoments, moments_of
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.methods import Axes, Method, known_method
from lorc_core.model.architecture import Architecture, architecture_of
from lorc_core.model.checkpoint import Checkpoint, WeightSource, read_config
from lorc_core.model.kinds import PROJECTION_OF, KeysValues, LayerKind
from lorc_core.model.weights import read_bias, read_weight
from lorc_core.ranks.budgets import check_kept_fraction
from lorc_core.ranks.schedules import Schedule, known_schedule
from lorc_core.variant import BaseModel, Variant


class LoadedWeights:
    """The tensors of a model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tensors = dict(model.base_model.named_parameters())

    def read(self, name: str) -> Float[Tensor, "..."]:
        return self.tensors[name].detach()


def decompose_layer(
    source: WeightSource,
    architecture: Architecture,
    layer_idx: int,
    method: Method,
    calibrated: LayerMoments | None = None,
) -> LayerDecomposition:
    """All projections of one layer's keys and values.

    Args:
        source: Where the weights are; only this layer's are read.
        architecture: Of the model.
        layer_idx: Of the layer.
        method: How projections are chosen.
        calibrated: What calibration measured of the layer; None where the method needs none.

    Raises:
        NumericsError: A weight or a moment holds NaN or infinity; the message names layer and kind.
        ArtifactError: A tensor is absent.
        ConfigError: The method calibrates and there is no calibration.
    """
    return KeysValues.of(
        lambda kind: decompose_kind(
            source, architecture, LayerKind(layer_idx, kind), method.axes(layer_idx, kind), calibrated
        )
    )


def decompose_kind(
    source: WeightSource,
    architecture: Architecture,
    place: LayerKind,
    axes: Axes,
    calibrated: LayerMoments | None,
) -> Decomposition:
    """As `decompose_layer`, of the keys or the values alone."""
    layer_idx, kind = place
    projection = PROJECTION_OF[kind]
    weight = read_weight(source, architecture, layer_idx, projection)
    if tuple(weight.shape) != (architecture.kv_width, architecture.hidden_size):
        raise ConfigError(
            f"{place}: weight is {tuple(weight.shape)}, the config says "
            f"({architecture.kv_width}, {architecture.hidden_size})"
        )
    partition, rotated = axes.partition(architecture), axes.rotated(architecture, layer_idx)
    try:
        if axes.statistics == "weights" and axes.reader == "none" and not rotated:
            bias = read_bias(source, architecture, layer_idx, projection)
            if bias is None or not axes.has_mean(architecture, layer_idx, kind):
                return decompose_weight(weight, partition, None)
            return decompose_weight(weight, partition, bias.double())
        moments = moments_of(source, architecture, place, axes, calibrated)
        return decompose(moments, weight, partition, axes.reader, rotated=rotated)
    except NumericsError as error:
        raise NumericsError(f"{place}: {error}") from error


def compress(
    model_or_dir: PreTrainedModel | Path | str,
    method: str | Method = "lorc_q",
    kept_fraction: float = 0.5,
    schedule: str | Schedule | None = None,
    *,
    calibration: Int[Tensor, "sequences tokens"] | Path | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Variant:
    """Compress a model's key-value cache; its weights are never changed, nor its modules' training modes.

    Args:
        model_or_dir: A loaded model, or a transformers directory with safetensors. Of a directory only the layers'
            projections are read, unless the method or the schedule calibrates.
        method: A name in `METHODS`, or a method of your own.
        kept_fraction: Share of the cached floats to keep, in (0, 1].
        schedule: A schedule, or the name of one with its default fields; the method's own if absent.
        calibration: Token ids (sequences, tokens), or a text file's path, for methods and schedules that measure.
        dtype: That of the stored factors; `attach` casts them to the model's.

    Raises:
        ConfigError: An argument is out of range, does not fit the model, or calibration text is needed and absent or
            too short.
        ArtifactError: The checkpoint cannot be read.
        UnsupportedModelError: lorc does not know the architecture.
        NumericsError: A weight or an activation holds NaN or infinity, or a weight is rank-deficient under the
            progressive schedule.

    Example:
        >>> import lorc_core
        >>> variant = lorc_core.compress("path/to/model", kept_fraction=0.5)
        >>> variant.kept_fraction
        0.5
        >>> variant.save("variants/model-0.5")
    """
    check_kept_fraction(kept_fraction)
    chosen_method = known_method(method) if isinstance(method, str) else method
    schedule = schedule or chosen_method.schedule
    chosen = known_schedule(schedule) if isinstance(schedule, str) else schedule
    source: WeightSource
    if isinstance(model_or_dir, PreTrainedModel):
        architecture = architecture_of(model_or_dir.config)
        source = LoadedWeights(model_or_dir)
        base = BaseModel(source=model_or_dir.name_or_path or "", revision=None, fingerprint=None)
    else:
        directory = Path(model_or_dir).resolve()
        source = Checkpoint(directory)
        architecture = architecture_of(read_config(directory))
        fingerprint = source.fingerprint(architecture.tensor_names())
        base = BaseModel(source=str(directory), revision=None, fingerprint=fingerprint)
    chosen_method.check(architecture)
    chosen_method.check_schedule(chosen)
    with ExitStack() as stack:
        on_text = None
        if chosen_method.needs_calibration or chosen.probe is not None:
            if calibration is None:
                needs = f"method {chosen_method.name}" if chosen_method.needs_calibration else f"schedule {chosen.name}"
                raise ConfigError(f"{needs} needs calibration text: pass calibration=token ids or a text file's path")
            from lorc_core.measurement.calibrated_model import (
                CalibratedModel,  # transformers' modelling code takes seconds
            )

            on_text = stack.enter_context(CalibratedModel(model_or_dir, calibration))
        calibrated = on_text.moments(chosen_method) if on_text and chosen_method.needs_calibration else None
        layers = [
            decompose_layer(source, architecture, idx, chosen_method, calibrated[idx] if calibrated else None)
            for idx in range(architecture.num_layers)
        ]
        layers, adapters = on_text.trained(chosen_method, layers) if on_text else (layers, {})
        spectra = [layer_spectrum(layer) for layer in layers]
        probes = on_text.probes(chosen, layers) if on_text else None
        ranks = chosen.ranks(spectra, kept_fraction, probes)
        if on_text:
            ranks = on_text.refine(chosen, ranks, layers)
    factors = tuple(slice_layer(layer, layer_idx, ranks, dtype) for layer_idx, layer in enumerate(layers))
    adapters = {name: tensor.to(dtype) for name, tensor in adapters.items()}
    return Variant(base, architecture, chosen_method, asdict(chosen), ranks, factors, adapters)
