"""Calibration: second moments of what a model caches and reads, streamed over text.

The hooks are the runtime's, so what is measured is what a variant will project. Sums are float64 and of one layer's
width squared; nothing is kept of single tokens.

Shapes: B sequences, T tokens, H query heads, G kv heads, D head_dim.
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from lorc_core.attention.attach import Attachment
from lorc_core.attention.call import AttentionStates
from lorc_core.decomposition.factors import UNTOUCHED
from lorc_core.decomposition.second_moments import LayerMoments, SecondMoment, key_and_query_moments
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.model.architecture import architecture_of

BATCH_TOKENS = 4096


class _LayerObserver:
    """Adds up the moments of one layer over calls; None before the first."""

    def __init__(self, *, join_rotated_heads: bool) -> None:
        self.join_rotated_heads = join_rotated_heads
        self.moments: LayerMoments | None = None

    def __call__(self, states: AttentionStates) -> None:
        keys, queries = _by_kv_head(states.key), _by_query_head(states.query, states.key.shape[1])
        moments = key_and_query_moments(keys, queries, "", join_heads=True)
        moments["inputs"] = SecondMoment.of(states.hidden_states.double().norm(dim=-1).flatten()[:, None])
        moments["values"] = SecondMoment.of(_by_kv_head(states.value).transpose(0, 1).flatten(1))
        if states.rotation is not None:
            keys, queries = _by_kv_head(states.rotated_key), _by_query_head(states.rotated_query, states.key.shape[1])
            moments |= key_and_query_moments(keys, queries, "rotated_", join_heads=self.join_rotated_heads)
        of_call = LayerMoments(moments)
        self.moments = of_call if self.moments is None else self.moments + of_call


def _by_kv_head(states: Tensor) -> Tensor:
    """(B, G, T, D) to (G, B * T, D)."""
    return states.transpose(0, 1).flatten(1, 2)


def _by_query_head(queries: Tensor, num_kv_heads: int) -> Tensor:
    """(B, H, T, D) to (G, H / G, B * T, D): the queries that read each kv head."""
    return queries.transpose(0, 1).flatten(1, 2).unflatten(0, (num_kv_heads, -1))


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, sequences: Iterable[Int[Tensor, "_ _"]], *, join_rotated_heads: bool = False
) -> tuple[LayerMoments, ...]:
    """Second moments of every layer's keys, queries and values on some text.

    Args:
        model: Without a variant attached, on any devices.
        sequences: Batches of token ids; every token counts, so no padding.
        join_rotated_heads: Whether rotated keys are measured over all heads together; see
            `Method.joins_rotated_heads`.

    Returns:
        One for each layer, on that layer's device. They add up with those of other texts.

    Raises:
        ConfigError: There are no sequences, or something is attached to the model.
        NumericsError: Activations hold NaN or infinity; the message names the first such layer.
    """
    architecture = architecture_of(model.config)
    observers = [_LayerObserver(join_rotated_heads=join_rotated_heads) for _ in range(architecture.num_layers)]
    with Attachment(model, architecture, [UNTOUCHED] * architecture.num_layers, observers):
        for batch in sequences:
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    layers = tuple(observer.moments for observer in observers if observer.moments is not None)
    if not layers:
        raise ConfigError("there are no calibration sequences")
    for layer_idx, layer in enumerate(layers):
        for name, moment in layer.moments.items():
            if not torch.isfinite(moment.total).all():
                raise NumericsError(f"layer {layer_idx}: the {name} hold NaN or infinity on the calibration text")
    return layers


def batches(sequences: Int[Tensor, "s t"]) -> Iterator[Int[Tensor, "_ t"]]:
    """So many sequences at a time that a batch has about 4,096 tokens; the last may be smaller.

    Args:
        sequences: Token ids, of one length; longer ones than 4,096 tokens go one by one.
    """
    yield from sequences.split(max(1, BATCH_TOKENS // sequences.shape[1]))
