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

from lorc_core.architecture import KINDS, PROJECTION_OF, Architecture, Kind, architecture_of
from lorc_core.budgets import check_kept_fraction
from lorc_core.checkpoint import Checkpoint, WeightSource, read_config
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.methods import Axes, Method, known_method
from lorc_core.moments import LayerMoments, moments_of
from lorc_core.projection import Decomposition, Factors, LayerDecomposition, decompose, decompose_weight, layer_spectrum
from lorc_core.schedule import Schedule, known_schedule
from lorc_core.spectra import RankSchedule
from lorc_core.variant import BaseModel, Variant
from lorc_core.weights import read_bias, read_weight


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
    return {
        kind: decompose_kind(source, architecture, layer_idx, kind, method.axes(layer_idx, kind), calibrated)
        for kind in KINDS
    }


def decompose_kind(
    source: WeightSource,
    architecture: Architecture,
    layer_idx: int,
    kind: Kind,
    axes: Axes,
    calibrated: LayerMoments | None,
) -> Decomposition:
    projection = PROJECTION_OF[kind]
    weight = read_weight(source, architecture, layer_idx, projection)
    if tuple(weight.shape) != (architecture.kv_width, architecture.hidden_size):
        raise ConfigError(
            f"layer {layer_idx} {kind}: weight is {tuple(weight.shape)}, the config says "
            f"({architecture.kv_width}, {architecture.hidden_size})"
        )
    partition, rotated = axes.partition(architecture), axes.rotated(architecture, layer_idx)
    try:
        if axes.statistics == "weights" and axes.reader == "none" and not rotated:
            bias = read_bias(source, architecture, layer_idx, projection)
            if bias is None or not axes.has_mean(architecture, layer_idx, kind):
                return decompose_weight(weight, partition, None)
            return decompose_weight(weight, partition, bias.double())
        moments = moments_of(source, architecture, layer_idx, kind, axes, calibrated)
        return decompose(moments, weight, partition, axes.reader, rotated=rotated)
    except NumericsError as error:
        raise NumericsError(f"layer {layer_idx} {kind}: {error}") from error


def slice_layer(
    layer: LayerDecomposition, layer_idx: int, ranks: RankSchedule, dtype: torch.dtype
) -> dict[Kind, Factors | None]:
    """The factors of one layer at its scheduled ranks; None where the full width is kept."""
    chosen = ranks.layers[layer_idx]
    return {
        kind: None if chosen.floats(kind) == ranks.kv_width else layer[kind].factors(chosen.of(kind)).to("cpu", dtype)
        for kind in KINDS
    }


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
        measuring = None
        if chosen_method.needs_calibration or chosen.probe is not None:
            if calibration is None:
                needs = f"method {chosen_method.name}" if chosen_method.needs_calibration else f"schedule {chosen.name}"
                raise ConfigError(f"{needs} needs calibration text: pass calibration=token ids or a text file's path")
            from lorc_core.measuring import Measuring  # transformers' modelling code takes seconds

            measuring = stack.enter_context(Measuring(model_or_dir, calibration))
        calibrated = measuring.moments(chosen_method) if measuring and chosen_method.needs_calibration else None
        layers = [
            decompose_layer(source, architecture, idx, chosen_method, calibrated[idx] if calibrated else None)
            for idx in range(architecture.num_layers)
        ]
        layers, adapters = measuring.trained(chosen_method, layers) if measuring else (layers, {})
        spectra = [layer_spectrum(layer) for layer in layers]
        probes = measuring.probes(chosen, layers) if measuring else None
        ranks = chosen.ranks(spectra, kept_fraction, probes)
        if measuring:
            ranks = measuring.refine(chosen, ranks, layers)
    factors = tuple(slice_layer(layer, layer_idx, ranks, dtype) for layer_idx, layer in enumerate(layers))
    adapters = {name: tensor.to(dtype) for name, tensor in adapters.items()}
    return Variant(base, architecture, chosen_method, asdict(chosen), ranks, factors, adapters)
