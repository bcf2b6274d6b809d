"""The loss's own metric: second moments of its gradient with respect to what a model caches.

With the gradient of the summed loss as the reader of the one formula, everything downstream of the cache is in it, and
keys, values and all layers are in one unit, nats. One pass forward and one back, through the hooks of the runtime. Of
each layer its input alone is held in between, and of the vocabulary's logits those of a few tokens at a time.

Shapes: B sequences, T tokens, G kv heads, D head_dim, I hidden_size, V vocabulary, C tokens of a chunk.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lorc_core.attention.attach import Attachment
from lorc_core.attention.call import AttentionStates
from lorc_core.decomposition.factors import UNTOUCHED
from lorc_core.decomposition.second_moments import LayerMoments, SecondMoment
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.measurement.losses import only_gradients_of
from lorc_core.model.architecture import Architecture, architecture_of

Labels = Literal["sampled", "text"]
LOGITS_AT_ONCE = 2**23  # 64 MiB in float64, in which labels are drawn
NO_LABEL = -100  # cross_entropy's


def gradient_moments(
    model: PreTrainedModel,
    sequences: Iterable[Int[Tensor, "_ _"]],
    *,
    labels: Labels = "sampled",
    join_rotated_heads: bool = False,
) -> tuple[LayerMoments, ...]:
    """Second moments of the loss's gradient with respect to every layer's keys and values.

    The loss is the sum over a sequence's tokens. Labels that the model itself draws make the moments its Fisher
    information: to second order, the expected rise of the loss for a small error of the cache is half of
    tr(M E[error error^T]) per token, where errors of different tokens do not work together.

    Args:
        model: In evaluation mode, without a variant attached, on any devices. Its parameters get no gradients.
        sequences: Batches of token ids; every token counts, so no padding.
        labels: Drawn from the model's own distribution at each token, by a generator that the sequence's token ids
            seed, whatever the batch or the shard; or the text's next tokens, of which the last has none.
        join_rotated_heads: As in `calibrate`.

    Returns:
        One for each layer, on that layer's device: `key_gradients` and `value_gradients` over all kv heads (N) and,
        where there is a rotation, `rotated_key_gradients` of each head (G, D) or over all (N). They add up with those
        of other texts.

    Raises:
        ConfigError: There are no sequences, or something is attached to the model.
        NumericsError: A gradient holds NaN or infinity; the message names the first such layer.

    Source: the second-order expansion of the loss in the states; KQ-SVD's formula, arXiv 2512.05916, with its metric.
    """
    architecture = architecture_of(model.config)
    observers = [_GradientObserver(join_rotated_heads=join_rotated_heads) for _ in range(architecture.num_layers)]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(only_gradients_of(model, []))
        stack.enter_context(Attachment(model, architecture, [UNTOUCHED] * architecture.num_layers, observers))
        stack.enter_context(recomputed_layers(model, architecture))
        for batch in sequences:
            _backpropagate(model, batch.to(model.device), labels)
    if not observers[0].moments:
        raise ConfigError("there are no calibration sequences")
    for layer_idx, observer in enumerate(observers):
        for name, moment in observer.moments.items():
            if not torch.isfinite(moment.total).all():
                raise NumericsError(f"layer {layer_idx}: the {name} hold NaN or infinity on the calibration text")
    return tuple(LayerMoments(observer.moments) for observer in observers)


class _GradientObserver:
    """Adds up the moments of the gradients of one layer's states, as they come back through them."""

    def __init__(self, *, join_rotated_heads: bool) -> None:
        self.join_rotated_heads = join_rotated_heads
        self.moments: dict[str, SecondMoment] = {}

    def __call__(self, states: AttentionStates) -> None:
        states.key.register_hook(partial(self._add, "key_gradients", join_heads=True))
        states.value.register_hook(partial(self._add, "value_gradients", join_heads=True))
        if states.rotation is not None:
            joined = self.join_rotated_heads
            states.rotated_key.register_hook(partial(self._add, "rotated_key_gradients", join_heads=joined))

    def _add(self, name: str, gradient: Float[Tensor, "b g t d"], *, join_heads: bool) -> None:
        by_head = gradient.transpose(0, 1).flatten(1, 2)
        moment = SecondMoment.of(by_head.transpose(0, 1).flatten(1) if join_heads else by_head)
        self.moments[name] = self.moments[name] + moment if name in self.moments else moment


def _backpropagate(model: PreTrainedModel, ids: Int[Tensor, "b t"], labels: Labels) -> None:
    """The summed loss forward, and its gradient back to the embedded tokens, past every layer's keys and values."""
    with embedded_leaf(model) as leaves:
        output = model.get_decoder()(input_ids=ids, use_cache=False)
    torch.autograd.grad(output.last_hidden_state, leaves, loss_gradient(model, output, ids, labels))


@contextmanager
def embedded_leaf(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The embedded tokens of a call in the block, made the leaf of its graph: frozen parameters start none."""
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_(True))
        return leaves[-1]

    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


def loss_gradient(
    model: PreTrainedModel, output: Any, ids: Int[Tensor, "b t"], labels: Labels
) -> Float[Tensor, "b t i"]:
    """The gradient of the summed loss with respect to what the decoder leaves, a chunk of tokens at a time.

    Args:
        model: With frozen parameters.
        output: Its decoder's.
        ids: The token ids.
        labels: See `gradient_moments`.
    """
    hidden = output.last_hidden_state.detach()
    chunk_tokens = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    if labels == "sampled":
        told = torch.stack([draws_of(sequence) for sequence in ids.cpu()])
    else:
        told = nn.functional.pad(ids[:, 1:], (0, 1), value=NO_LABEL)
    gradients = []
    for chunk, of_chunk in zip(*(part.flatten(0, 1).split(chunk_tokens) for part in (hidden, told)), strict=True):
        leaf = chunk[None].requires_grad_(True)
        logits = head_logits(model, output, leaf)[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wanted = of_chunk.to(logits.device)
        if labels == "sampled":
            wanted = sampled_labels(logits.detach(), wanted)
        loss = nn.functional.cross_entropy(logits, wanted, ignore_index=NO_LABEL, reduction="sum")
        gradients.append(torch.autograd.grad(loss, leaf)[0][0])
    return torch.cat(gradients).view_as(hidden)


def head_logits(model: PreTrainedModel, output: Any, hidden: Float[Tensor, "1 c i"]) -> Float[Tensor, "1 c v"]:
    """The logits that a model makes of what its decoder might have left.

    They are its own forward's past the decoder, so that what a family does to logits is in them: Gemma 2 caps them,
    Cohere scales them.

    Args:
        model: Whose decoder is passed over.
        output: Of the decoder, for its class.
        hidden: Of any tokens.
    """
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)  # nobody looks at them
    with replaced_forward(model.get_decoder(), lambda *_, **__: type(output)(last_hidden_state=hidden)):
        return model(input_ids=tokens, use_cache=False).logits


def draws_of(sequence: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
    """One number from [0, 1) for each token of a sequence, the same wherever and beside whatever it is read."""
    digest = hashlib.sha256(sequence.long().numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(len(sequence), generator=generator, dtype=torch.float64)


def sampled_labels(logits: Float[Tensor, "c v"], draws: Float[Tensor, " c"]) -> Int[Tensor, " c"]:
    """A label for each token from the distribution that its logits are of: where its sums pass the draw."""
    sums = logits.double().softmax(dim=-1).cumsum(dim=-1)
    passed = torch.searchsorted(sums, (draws[:, None] * sums[:, -1:]), right=True)
    return passed[:, 0].clamp(max=logits.shape[-1] - 1)


@contextmanager
def recomputed_layers(model: PreTrainedModel, architecture: Architecture) -> Iterator[None]:
    """In the block each layer keeps its input for the way back, and computes the rest a second time.

    transformers' own checkpointing needs training mode, in which there may be dropout. The hooks on states are those of
    the first time: the graph of the second one is read but not followed back.
    """
    with ExitStack() as stack:
        for layer_idx in range(architecture.num_layers):
            layer = model.base_model.get_submodule(architecture.attention_module(layer_idx).rpartition(".")[0])
            recomputed = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(replaced_forward(layer, recomputed))
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for one module in the block; its own or, from accelerate, the one set on it comes back."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
