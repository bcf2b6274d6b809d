"""Compress one model on one machine: decompose every layer, choose ranks, build the variant.

The pipeline runs the same functions as separate steps on many machines.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from lorc_core.architecture import KINDS, Architecture, Kind, architecture_of
from lorc_core.checkpoint import Checkpoint, WeightSource, read_config
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.methods import Method, known_method
from lorc_core.moments import weight_moments
from lorc_core.projection import Decomposition, Factors, decompose, decompose_moments, left_singular
from lorc_core.schedule import KindSpectrum, LayerSpectrum, RankSchedule, Schedule, check_kept_fraction, known_schedule
from lorc_core.variant import BaseModel, Variant

LayerDecomposition = dict[Kind, Decomposition]


class LoadedWeights:
    """The tensors of a model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tensors = dict(model.base_model.named_parameters())

    def read(self, name: str) -> Float[Tensor, "..."]:
        return self.tensors[name].detach()


def decompose_layer(
    source: WeightSource, architecture: Architecture, layer_idx: int, method: Method
) -> LayerDecomposition:
    """All projections of one layer's keys and values, from that layer's weights.

    Args:
        source: Where the weights are; only this layer's are read.
        architecture: Of the model.
        layer_idx: Of the layer.
        method: How projections are chosen.

    Raises:
        NumericsError: A weight holds NaN or infinity; the message names layer and kind.
        ArtifactError: A tensor is absent.
    """
    layer: LayerDecomposition = {}
    for kind in KINDS:
        bias_name = architecture.bias_name(layer_idx, kind)
        weight = source.read(architecture.weight_name(layer_idx, kind))
        if tuple(weight.shape) != (architecture.kv_width, architecture.hidden_size):
            raise ConfigError(
                f"layer {layer_idx} {kind}: weight is {tuple(weight.shape)}, the config says "
                f"({architecture.kv_width}, {architecture.hidden_size})"
            )
        try:
            if method.reader == "none":
                layer[kind] = decompose(weight, source.read(bias_name) if bias_name else None)
            else:
                singular_values = left_singular(weight.double())[1]
                layer[kind] = decompose_moments(weight_moments(source, architecture, layer_idx, kind), singular_values)
        except NumericsError as error:
            raise NumericsError(f"layer {layer_idx} {kind}: {error}") from error
    return layer


def layer_spectrum(layer: LayerDecomposition) -> LayerSpectrum:
    """What the schedules need of a decomposed layer."""
    return LayerSpectrum(
        kv_width=layer["keys"].up.shape[0],
        keys=kind_spectrum(layer["keys"]),
        values=kind_spectrum(layer["values"]),
    )


def kind_spectrum(found: Decomposition) -> KindSpectrum:
    return KindSpectrum(
        log10_condition=found.log10_condition,
        weights=tuple(found.singular_values.square().tolist()),
        states=tuple(found.state_energies.tolist()),
        read=tuple(found.read_energies.tolist()),
    )


def slice_layer(
    layer: LayerDecomposition, layer_idx: int, ranks: RankSchedule, dtype: torch.dtype
) -> dict[Kind, Factors | None]:
    """The factors of one layer at its scheduled ranks; None where the full width is kept."""
    chosen = {"keys": ranks.layers[layer_idx].keys, "values": ranks.layers[layer_idx].values}
    return {
        kind: None if chosen[kind] == ranks.kv_width else layer[kind].factors(chosen[kind]).to("cpu", dtype)
        for kind in KINDS
    }


def compress(
    model_or_dir: PreTrainedModel | Path | str,
    method: str = "lorc",
    kept_fraction: float = 0.5,
    schedule: str | Schedule | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Variant:
    """Compress a model's key-value cache without data or training.

    Args:
        model_or_dir: A loaded model, or a transformers directory with safetensors, of which only the key and value
            projections are read.
        method: A name in `METHODS`.
        kept_fraction: Share of the cached floats to keep, in (0, 1].
        schedule: A schedule, or the name of one with its default fields; the method's own if absent.
        dtype: That of the stored factors; `attach` casts them to the model's.

    Raises:
        ConfigError: An argument is out of range, or the directory does not exist.
        ArtifactError: The checkpoint cannot be read.
        UnsupportedModelError: lorc does not know the architecture.
        NumericsError: A weight holds NaN or infinity, or is rank-deficient under the progressive schedule.
    """
    check_kept_fraction(kept_fraction)
    schedule = schedule or known_method(method).schedule
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
    layers = [
        decompose_layer(source, architecture, idx, known_method(method)) for idx in range(architecture.num_layers)
    ]
    return build_variant(base, architecture, method, chosen, layers, kept_fraction, dtype)


def build_variant(
    base: BaseModel,
    architecture: Architecture,
    method: str,
    schedule: Schedule,
    layers: Sequence[LayerDecomposition],
    kept_fraction: float,
    dtype: torch.dtype,
) -> Variant:
    ranks = schedule.ranks([layer_spectrum(layer) for layer in layers], kept_fraction)
    factors = tuple(slice_layer(layer, layer_idx, ranks, dtype) for layer_idx, layer in enumerate(layers))
    return Variant(base, architecture, method, asdict(schedule), ranks, factors)
