"""The work of a step, from shapes alone: what it reads and writes, computes in float64, and runs through the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from lorc_core.methods import Axes
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import KINDS, KeysValues
from pipeline.costs.operations import (
    Operation,
    layer_operations,
    moment_operations,
    projection_error_operations,
)
from pipeline.steps.layers import DecomposeStep, LayerStep, TrainStep
from pipeline.steps.ranks import ProbeStep, SearchStep
from pipeline.steps.scores import EvaluateStep
from pipeline.steps.step import ModelLoad, ModelSize, ModelStep, Step
from pipeline.steps.texts import GradientsStep, ShardStep, WindowsStep
from pipeline.steps.variants import ProjectionErrorsStep, VariantStep
from pipeline.zoo.sections import ELEMENT_BYTES

STORED_BYTES = ELEMENT_BYTES["bfloat16"]  # of a weight, where a step does not say; what models are published in
FACTOR_BYTES, MOMENT_BYTES = 4, 8  # as artifacts have them
BACKWARD = 2  # a backward pass costs two forward ones
GRADIENT_PASSES = 2 + BACKWARD  # of a gradient of the loss, for which layers are run again on the way back
DEEPEST = 2  # forward passes that training makes of a step's batch: the untouched model's and the compressed one's


@dataclass(frozen=True)
class Work:
    """Of one step.

    Attributes:
        operations: In float64, on a CPU.
        forward_flops: Of running the model, where the model is.
        passes: How often the whole model is run over a batch, as far as that is known.
        reads: Bytes that are read of a model's files, by what they are; equal ones are read once in a task.
        artifact_bytes: Read and written in the store.
        layers: Of the model; what a step does for each, however small it is.
    """

    operations: Sequence[Operation] = ()
    forward_flops: float = 0.0
    passes: int = 0
    reads: Mapping[str, int] = field(default_factory=dict)
    artifact_bytes: int = 0
    layers: int = 0


def work_of(step: Step) -> Work:
    """What a step will do; nothing for kinds that only look at a few numbers."""
    if isinstance(step, DecomposeStep):
        return decompose_work(step)
    if isinstance(step, VariantStep):
        read = sum(layer_bytes(layer) for layer in step.layers)
        return Work(artifact_bytes=read + read // 2, layers=step.architecture.num_layers)
    if isinstance(step, ProjectionErrorsStep):
        return projection_errors_work(step)
    if isinstance(step, ModelStep) and step.loads.size is not None:
        return model_work(step, step.loads, step.loads.size)
    return Work(layers=layers_of(step))


def decompose_work(step: DecomposeStep) -> Work:
    """One layer's: W_k and W_v and, where readers count, W_q and W_o."""
    shape = step.architecture
    read = sum(kind_floats(shape, axes) for axes in step.axes) * STORED_BYTES
    return Work(
        operations=layer_operations(shape, step.axes, step.layer_idx),
        reads={f"{step.location.source} layer {step.layer_idx}": read},
        artifact_bytes=len(step.calibrated) * moment_bytes(shape) + layer_bytes(step),
        layers=1,
    )


def projection_errors_work(step: ProjectionErrorsStep) -> Work:
    """Its matrices for every layer and kind; it reads W_k and W_v again."""
    variant, shape = step.variant, step.variant.architecture
    read = len(KINDS) * shape.num_layers * shape.kv_width * shape.hidden_size * STORED_BYTES
    factors = sum(layer_bytes(layer) for layer in variant.layers) // 2
    moments = len(step.calibrated) * shape.num_layers * moment_bytes(shape)
    return Work(
        operations=projection_error_operations(shape, calibrated=bool(step.calibrated)),
        reads={f"{step.location.source} keys and values": read},
        artifact_bytes=factors + moments,
        layers=shape.num_layers,
    )


def model_work(step: ModelStep, loads: ModelLoad, size: ModelSize) -> Work:
    """Of a step that runs the model over windows of tokens."""
    shape = size.architecture
    reads = {f"{loads.location.source} weights": model_bytes(loads, size)}
    if isinstance(step, EvaluateStep):
        tokens, window = tokens_of(step.windows), longest(step.windows)
        batches = sum(-(-windows.num_windows // step.batch_size) for windows in step.windows)
        return Work((), forward_flops(size, tokens, window), 2 * batches, reads, 0, shape.num_layers)
    if isinstance(step, ShardStep):
        tokens, window = tokens_of(step.windows) // step.num_shards, longest(step.windows)
        batches = -(-tokens // (window * step.batch_size))
        passes = GRADIENT_PASSES if isinstance(step, GradientsStep) else 1
        moments = moment_operations(shape, tokens, join_rotated_heads=step.join_rotated_heads)
        written = shape.num_layers * moment_bytes(shape)
        flops = passes * forward_flops(size, tokens, window)
        return Work(moments, flops, passes * batches, reads, written, shape.num_layers)
    if isinstance(step, ProbeStep | SearchStep):
        passes, window = passes_of(step, shape), longest(step.windows)
        num_windows = sum(min(step.num_windows, windows.num_windows) for windows in step.windows)
        batches = round(passes * -(-num_windows // step.batch_size))
        flops = passes * forward_flops(size, num_windows * window, window)
        factors = sum(layer_bytes(layer) for layer in step.layers)
        return Work((), flops, batches, reads, factors, shape.num_layers)
    if isinstance(step, TrainStep):
        steps, window = step.training.num_steps, longest(step.windows)
        passes = steps * (DEEPEST + BACKWARD)
        flops = passes * forward_flops(size, step.training.batch_size * window, window)
        factors = sum(layer_bytes(layer) for layer in step.layers)
        return Work((), flops, passes, reads, factors, shape.num_layers)
    return Work(reads=reads, layers=shape.num_layers)


def passes_of(step: ProbeStep | SearchStep, shape: Architecture) -> int:
    """How often the model is run over all batches, at most."""
    # These import what loads models, for which a plan without such steps need not wait.
    if isinstance(step, SearchStep):
        from lorc_core.measurement.exchange import max_exchange_passes

        return max_exchange_passes(step.schedule, shape.num_layers)
    from lorc_core.measurement.probes import max_passes

    return 1 + BACKWARD if step.kind == "fisher" else max_passes(step.kind, shape.num_layers)


def forward_flops(size: ModelSize, tokens: int, window_tokens: int) -> float:
    """Two for each parameter and token, and the two products of attention over half of the window in the mean.

    A mixture of experts counts with all of its experts, which is more than it computes.
    """
    shape = size.architecture
    attention = 2.0 * shape.num_layers * shape.num_heads * shape.head_dim * window_tokens
    return tokens * (2.0 * size.num_parameters + attention)


def model_bytes(loads: ModelLoad, size: ModelSize) -> int:
    """Of its weights, in the dtype that it is run in."""
    return size.num_parameters * ELEMENT_BYTES[loads.dtype]  # type: ignore[index]


def kind_floats(shape: Architecture, axes: Axes) -> int:
    """Of the weights that decomposing a layer's keys, or its values, reads."""
    readers = axes.reader in ("interaction", "stacked") or axes.statistics == "weights_with_gain"
    width = shape.kv_width + (shape.num_heads * shape.head_dim if readers else 0)
    return width * shape.hidden_size


def layer_bytes(step: LayerStep) -> int:
    """Of one layer's factors of all ranks."""
    return factor_bytes(step.decomposed.architecture, step.decomposed.axes)


@lru_cache(maxsize=4096)
def factor_bytes(shape: Architecture, axes: KeysValues[Axes]) -> int:
    sides = sum((2 if kind.is_balanced else 1) * kind.partition(shape).width for kind in axes)
    return sides * shape.kv_width * FACTOR_BYTES


def moment_bytes(shape: Architecture) -> int:
    """Of one layer's second moments: joint ones of keys and values, one for each head of queries and rotated keys."""
    narrow = (5 if shape.rotary else 2) * shape.num_kv_heads * shape.head_dim**2
    return (2 * shape.kv_width**2 + narrow) * MOMENT_BYTES


def layers_of(step: Step) -> int:
    """Of steps that look at a few numbers of each layer."""
    layers = getattr(step, "layers", ())
    return len(layers)


def tokens_of(windows: Sequence[WindowsStep]) -> int:
    return sum(text.num_windows * text.window_tokens for text in windows)


def longest(windows: Sequence[WindowsStep]) -> int:
    return max(text.window_tokens for text in windows)
