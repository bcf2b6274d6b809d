"""Compress one model on one machine: decompose every layer, choose ranks, build the variant.

The pipeline runs the same functions as separate steps on many machines.
"""

import os
import reprlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lorc_core.decomposition.decompose import decompose, decompose_weight
from lorc_core.decomposition.factors import Decomposition, LayerDecomposition, layer_spectrum, slice_layer
from lorc_core.decomposition.moments import moments_of
from lorc_core.decomposition.second_moments import LayerMoments
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.methods import Axes, Method, known_method
from lorc_core.model.architecture import Architecture, architecture_of
from lorc_core.model.kinds import PROJECTION_OF, KeysValues, LayerKind
from lorc_core.model.stored.checkpoint import Checkpoint, Rows, WeightSource, read_config
from lorc_core.model.stored.locations import ModelLocation, find_model
from lorc_core.model.stored.weights import checkpoint_fingerprint, read_bias, read_weight
from lorc_core.progress import progress_bar
from lorc_core.ranks.budgets import check_kept_fraction
from lorc_core.ranks.prediction import predicted_rise
from lorc_core.ranks.schedule import Schedule
from lorc_core.ranks.schedules import known_schedule
from lorc_core.variant import BaseModel, Variant

# Of a text. At half of the cache of TinyStories-656K (64 floats a kind and layer) kq_joint raised the loss by 0.123,
# 0.107, 0.101, 0.100 and 0.098 with 2, 8, 32, 64 and 128 Ki tokens: little is gained past 500 tokens for each float.
CALIBRATION_TOKENS = 128 * 2048


class LoadedWeights:
    """The tensors of a model in memory, as a `WeightSource`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tensors = dict(model.base_model.named_parameters())

    def read(self, name: str, rows: Rows | None = None) -> Float[Tensor, "..."]:
        """The tensor called `name` below the base model, or some of its rows."""
        tensor = self.tensors[name].detach()
        return tensor if rows is None else torch.cat([tensor[start:stop] for start, stop in rows])

    def num_rows(self, name: str) -> int:
        """Of the tensor called `name` below the base model."""
        return len(self.tensors[name])


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
    """As `decompose_layer`, of the keys or the values alone.

    Args:
        source: Where the weights are.
        architecture: Of the model.
        place: Which layer, and keys or values.
        axes: How projections are chosen.
        calibrated: What calibration measured of the layer; None where the axes need none.

    Raises:
        ConfigError: The weight has not the shape that the config says; also as `decompose_layer`.
    """
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


@dataclass(frozen=True)
class OpenedModel:
    """A model whose config was read.

    Attributes:
        architecture: Its facts.
        weights: Where its tensors are read.
        base: How the variant will name it.
        loaded: The model itself, or where it is, for what runs it.
    """

    architecture: Architecture
    weights: WeightSource
    base: BaseModel
    loaded: PreTrainedModel | ModelLocation


def open_model(model: PreTrainedModel | Path | str) -> OpenedModel:
    """A loaded model, or the facts of one on disk or on the hub; see `compress`."""
    if isinstance(model, PreTrainedModel):
        named = model.name_or_path or ""
        source = os.path.abspath(named) if os.path.isdir(named) else named  # a relative one would read as a hub id
        base = BaseModel(source, revision=None, fingerprint=None)
        return OpenedModel(architecture_of(model.config), LoadedWeights(model), base, model)
    location = find_model(model)
    checkpoint = Checkpoint(location.files())
    architecture = architecture_of(read_config(location.directory(weights=False)))
    base = BaseModel(location.source, location.commit, checkpoint_fingerprint(checkpoint, architecture))
    return OpenedModel(architecture, checkpoint, base, location)


def compress(
    model: PreTrainedModel | Path | str,
    method: str | Method = "lorc_q",
    kept_fraction: float = 0.5,
    schedule: str | Schedule | None = None,
    *,
    calibration: Int[Tensor, "sequences tokens"] | Sequence[Sequence[int]] | Sequence[str] | Path | str | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    context_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Variant:
    """Compress a model's key-value cache; its weights are never changed, nor its modules' training modes.

    In a terminal and in a notebook bars show what is measured (not with $HF_HUB_DISABLE_PROGRESS_BARS=1).

    Args:
        model: A loaded model, a transformers directory with safetensors, or a hub id, whose files are fetched. Only
            the layers' projections are read, unless the method or the schedule calibrates.
        method: A name in `METHODS`, or a method of your own.
        kept_fraction: Share of the cached floats to keep, in (0, 1].
        schedule: A schedule, or the name of one with its default fields; the method's own if absent.
        calibration: For methods and schedules that measure: token ids (sequences, tokens), the path of a text file,
            or a list of texts.
        calibration_tokens: How many tokens of a text are used, those at its beginning; token ids are used whole.
        context_tokens: Of the longest text that the cache will hold. Keys after the rotation that are calibrated on
            shorter windows are averaged over so many positions; if absent they know those of the windows alone.
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
    check_type("model", model, (PreTrainedModel, Path, str), "a loaded PreTrainedModel, a directory or a hub id")
    check_type("method", method, (str, Method), "a name in METHODS or a Method")
    check_type("kept_fraction", kept_fraction, (int, float), "a number")
    check_type("schedule", schedule, (str, Schedule, NoneType), "a name in SCHEDULES or a Schedule")
    check_type("dtype", dtype, (torch.dtype,), "a torch.dtype")
    check_kept_fraction(kept_fraction)
    chosen_method = known_method(method) if isinstance(method, str) else method
    schedule = schedule or chosen_method.schedule
    chosen = known_schedule(schedule) if isinstance(schedule, str) else schedule
    if calibration is None and (needs := needs_text(chosen_method, chosen)):
        raise ConfigError(
            f"{needs} needs calibration text: pass calibration=token ids or a text file's path, or a list of texts"
        )
    opened = open_model(model)
    chosen_method.check(opened.architecture)
    chosen_method.check_schedule(chosen)
    with ExitStack() as stack:
        on_text = None
        if calibration is not None and needs_text(chosen_method, chosen):
            from lorc_core.measurement.calibrated_model import (
                CalibratedModel,  # transformers' modelling code takes seconds
            )

            on_text = stack.enter_context(CalibratedModel(opened.loaded, calibration, calibration_tokens))
        calibrated = (
            on_text.moments(chosen_method, context_tokens) if on_text and chosen_method.needs_calibration else None
        )
        layers = decompose_layers(opened, chosen_method, calibrated)
        layers, adapters = on_text.trained(chosen_method, layers) if on_text else (layers, {})
        spectra = [layer_spectrum(layer) for layer in layers]
        probes = on_text.probes(chosen, layers) if on_text else None
        ranks = chosen.ranks(spectra, kept_fraction, probes)
        if on_text:
            ranks = on_text.refine(chosen, ranks, layers)
    if chosen_method.is_in_nats:
        ranks = replace(ranks, predicted_rise=predicted_rise(spectra, ranks))
    factors = tuple(slice_layer(layer, layer_idx, ranks, dtype) for layer_idx, layer in enumerate(layers))
    adapters = {name: tensor.to(dtype) for name, tensor in adapters.items()}
    return Variant(opened.base, opened.architecture, chosen_method, asdict(chosen), ranks, factors, adapters)


def needs_text(method: Method, schedule: Schedule) -> str | None:
    """Which of the two measures on calibration text, in words; None where neither does."""
    if method.needs_calibration:
        return f"method {method.name}"
    return None if schedule.probe is None else f"schedule {schedule.name}"


def decompose_layers(
    opened: OpenedModel, method: Method, calibrated: Sequence[LayerMoments] | None
) -> list[LayerDecomposition]:
    """`decompose_layer` of every layer in turn, with a bar."""
    num_layers = opened.architecture.num_layers
    layers = []
    with progress_bar("decomposing", num_layers, "layers") as bar:
        for layer_idx in range(num_layers):
            moments = None if calibrated is None else calibrated[layer_idx]
            layers.append(decompose_layer(opened.weights, opened.architecture, layer_idx, method, moments))
            bar.update()
    return layers


def check_type(name: str, argument: object, allowed: tuple[type, ...], described: str) -> None:
    """Raise ConfigError where an argument is of another type, before hours went into what it does not fit."""
    if not isinstance(argument, allowed):
        raise ConfigError(f"{name} must be {described}, got {reprlib.repr(argument)}")
