"""Fisher information of each key and value channel: how much the loss feels its weights. For the schedule `fisher`."""

import torch
from torch import nn
from transformers import PreTrainedModel

from lorc_core.errors import NumericsError
from lorc_core.measurement.losses import Batches, next_token_loss, only_gradients_of
from lorc_core.model.architecture import Architecture, architecture_of
from lorc_core.model.kinds import PROJECTION_OF, KeysValues, LayerKind, by_layer, layer_kinds
from lorc_core.model.stored.weights import projection_rows


def fisher_information(model: PreTrainedModel, batches: Batches) -> tuple[KeysValues[tuple[float, ...]], ...]:
    """Mean over inputs of sqrt(E[(dL/dW)^2]), for each key and value channel of each layer.

    Args:
        model: Without a variant attached. Gradients of W_k and W_v are held beside it.
        batches: Token ids; the expectation is over batches.

    Returns:
        For each layer and kind one number for each of the kv_width channels.

    Raises:
        NumericsError: A gradient holds NaN or infinity; the message names layer and kind.

    Source: Palu, arXiv 2407.21118, section 3.3
    """
    architecture = architecture_of(model.config)
    places = layer_kinds(architecture.num_layers)
    watched = [_weight_parameter(model, architecture, place) for place in places]
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


def _weight_parameter(model: PreTrainedModel, architecture: Architecture, place: LayerKind) -> nn.Parameter:
    """W_k or W_v, with W_q beside it where they are fused."""
    projection = PROJECTION_OF[place.kind]
    return model.base_model.get_parameter(architecture.projection_name(place.layer_idx, projection, "weight"))
