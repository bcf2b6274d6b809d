"""Losses of a model on token ids, and which parameters get gradients of them.

Shapes: B sequences, T tokens.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorc_core.errors import NumericsError

Batches = Sequence[Int[Tensor, "_ _"]]  # the last may be smaller


def next_token_loss(model: PreTrainedModel, batch: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Mean loss in nats per token.

    Args:
        model: In any state: with a variant attached or without, with gradients or without.
        batch: Token ids, without padding.
    """
    ids = batch.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:].to(logits.device))


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Batches) -> float:
    """Mean loss over batches, in nats per token.

    Args:
        model: See `next_token_loss`.
        batches: Token ids of sequences of one length, so that each sequence counts alike.

    Raises:
        NumericsError: The loss is NaN or infinite.
    """
    total = sum(next_token_loss(model, batch).item() * len(batch) for batch in batches)
    if not math.isfinite(total):
        raise NumericsError("the loss on the calibration text is NaN or infinite")
    return total / sum(len(batch) for batch in batches)


@contextmanager
def only_gradients_of(model: PreTrainedModel, watched: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for some of a model's parameters alone while the block runs; every parameter's own setting comes back.

    Args:
        model: Whose other parameters get none.
        watched: Those that get them; none, to train something beside the model.
    """
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        for parameter in watched:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, setting in before.items():
            parameter.requires_grad_(setting)
