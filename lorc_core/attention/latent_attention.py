"""Attention over a cache of latents.

A few new tokens attend over the latents themselves. Many attend over keys and values rebuilt from them, by the
implementation that the model had before. Observers are shown queries, keys and values through the same function.

Shapes: B batch, H query heads, G kv heads, D head_dim, Q new tokens, S cached and new tokens, L latent heads, R latents
of each, P pairs of rotated channels.
"""

from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from lorc_core.attention.call import AttentionCall, AttentionInputs, AttentionStates, implementation
from lorc_core.attention.layer_state import LayerState
from lorc_core.attention.positions import key_rotation
from lorc_core.attention.scores.absorbed import attend_values, attention_scores, attention_weights, rotate_pairs
from lorc_core.attention.scores.choice import key_scores
from lorc_core.attention.scores.interpolated import Interpolation
from lorc_core.attention.scores.rebuilt import UnrotatedKeys
from lorc_core.model.rotation import rotate

STATE_ATTRIBUTE = "_lorc_layer"
# Implementations whose mathematics `attention_weights` has, and what they may be given that it has not.
KNOWN_IMPLEMENTATIONS = ("eager", "sdpa")
UNKNOWN_ARGUMENTS = ("s_aux", "position_bias", "cache")


def latent_attention(
    underlying: str,
    module: nn.Module,
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b _ s _"],
    value: Float[Tensor, "b _ s _"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function for transformers' interface, over what a `LatentCache` hands back.

    Args:
        underlying: The implementation that serves wherever whole states are better.
        module: That attends.
        query: Of the new tokens; not rotated where the hook took the rotation away.
        key: (B, L, S, R) latents, or (B, G, S, D) states where the layer's keys are not compressed.
        value: The same of the values.
        attention_mask: Boolean, or added to the scores.
        kwargs: As transformers calls its attention functions: scaling, dropout and the like.

    Returns:
        (B, Q, H, D) attended values, and the attention weights where eager attention gives them.
    """
    state: LayerState | None = getattr(module, STATE_ATTRIBUTE, None)
    if state is None or (state.observe is None and not state.projections.compress):
        return implementation(underlying, module)(module, query, key, value, attention_mask, **kwargs)
    call = state.take_call()
    inputs = AttentionInputs(underlying, module, query, key, value, attention_mask, kwargs)
    if state.observe is not None:
        return observed_attention(state, call, inputs)
    if reads_latents(state, inputs):
        return attention_over_latents(state, call, inputs)
    return attention_over_states(state, call, inputs)


def reads_latents(state: LayerState, inputs: AttentionInputs) -> bool:
    """Whether attending over latents is cheaper than rebuilding values, and their mathematics is known."""
    num_heads, q_len = inputs.query.shape[1:3]
    # scores then take no more than half the memory of rebuilt values
    few = q_len == 1 or (inputs.mask is not None and 2 * num_heads * q_len <= state.num_kv_heads * state.head_dim)
    plain = not any(inputs.options.get(name) is not None for name in UNKNOWN_ARGUMENTS)
    known = inputs.underlying in KNOWN_IMPLEMENTATIONS and plain
    rebuilds = state.projections.readers.keys is None
    return few and known and not inputs.module.training and not (rebuilds and torch.compiler.is_compiling())


def attention_over_latents(
    state: LayerState, call: AttentionCall, inputs: AttentionInputs
) -> tuple[Float[Tensor, "b q h d"], Tensor | None]:
    """Scores against latents, and a weighted sum of latents: nothing of the cache is rebuilt at once.

    Keys that must be rotated are rebuilt a chunk at a time, or interpolated, or rebuilt within a kernel.
    """
    reader, value_reader = state.projections.readers.keys, state.projections.readers.values
    assert value_reader is not None
    key, value, mask = used_slots(call, inputs)
    # Scaled here and not as scores: unscaled scores may be more than float16 can hold.
    query = inputs.query * inputs.scaling

    # Latents that stand by kv head, keys and values equally wide, are what torch's own kernel reads: it needs no more
    # than other queries before and an `up` after.
    if reader is not None and can_pack(state, inputs):
        packed = packed_attention(reader.absorb(query), reader.heads(key), value_reader.heads(value), mask)
        return value_reader.restore(packed).transpose(1, 2).contiguous(), None

    if reader is not None:
        # q . (up l) = (up^T q) . l: one small product for the query, in place of a large one for the whole cache.
        scores = attention_scores(reader.absorb(query), reader.heads(key))
    else:
        # The rotation stands between query and `up`, another one at each slot, so the query cannot absorb `up`.
        factors = state.projections.factors.keys
        assert factors is not None
        query_turns, key_turns, interpolation = turns_of(state, call, query, key)
        query = rotate_pairs(state.projections.in_pairs(query), query_turns[:, None])
        keys = UnrotatedKeys(key, factors, state.projections.offsets.keys, key_turns)
        scores = key_scores(query, keys, interpolation)
    weights = attention_weights(scores, mask, inputs.options.get("softcap"))

    # The weighted sum of rebuilt values is what `up` makes of the weighted sum of latents: `up` is applied once for
    # each query, not once for each slot.
    attended = value_reader.restore(attend_values(weights, value_reader.heads(value)))
    return attended.transpose(1, 2).contiguous(), weights if inputs.underlying == "eager" else None


def can_pack(state: LayerState, inputs: AttentionInputs) -> bool:
    """Whether stock attention can read the latents: of heads apart, all as wide, by one new token."""
    keys, values = state.projections.readers.keys, state.projections.readers.values
    apart = keys is not None and values is not None and keys.num_heads == values.num_heads == state.num_kv_heads
    plain = inputs.underlying == "sdpa" and inputs.options.get("softcap") is None and inputs.query.shape[2] == 1
    mask, dtypes = inputs.mask, (torch.bool, inputs.query.dtype)
    stock_mask = mask is None or (mask.shape[1] == 1 and mask.dtype in dtypes)
    return apart and plain and stock_mask and inputs.key.shape[-1] == inputs.value.shape[-1]


def packed_attention(
    query: Float[Tensor, "b h 1 r"],
    key: Float[Tensor, "b l s r"],
    value: Float[Tensor, "b l s r"],
    mask: Tensor | None,
) -> Float[Tensor, "b h 1 r"]:
    """torch's own attention, with the query heads that read one kv head as its rows, so that no head is repeated.

    Args:
        query: Scaled.
        key: Latents by kv head.
        value: Latents by kv head.
        mask: The same for all heads.
    """
    rows = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    return scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=1.0).reshape(query.shape)


def used_slots(
    call: AttentionCall, inputs: AttentionInputs
) -> tuple[Float[Tensor, "b l s _"], Float[Tensor, "b l s _"], Tensor | None]:
    """Keys, values and mask of the slots in use: a static cache hands back all that it will ever have.

    Only on a CPU: the count is a tensor, and to ask an accelerator for it would wait for all its work.
    """
    key, value, mask = inputs.key, inputs.value, inputs.mask
    counted = isinstance(call.num_cached, Tensor) and call.first_slot == 0 and key.device.type == "cpu"
    if inputs.underlying != "sdpa" or not counted:
        return key, value, mask
    num_used = min(int(call.num_cached) + inputs.query.shape[2], key.shape[2])
    return key[:, :, :num_used], value[:, :, :num_used], None if mask is None else mask[..., :num_used]


def turns_of(
    state: LayerState, call: AttentionCall, query: Float[Tensor, "b h q d"], key: Float[Tensor, "b 1 s _"]
) -> tuple[Complex[Tensor, "#b q p"], Complex[Tensor, "#b s p"], Interpolation | None]:
    """The rotations of the new tokens and of all slots, and how slow ones are interpolated, where they can be.

    Scores depend on the distance of positions alone, which is the distance of slots, so slots serve as positions: one
    table for all rows and layers. Not where angles depend on the length of the text, nor where nothing was cached and
    positions may have gaps (packed texts).
    """
    assert state.rotary is not None
    assert call.rotation is not None
    q_len, kv_len = query.shape[2], key.shape[2]
    if kv_len == q_len or not state.rotary.is_fixed:
        return call.rotation.turns(), key_rotation(state.rotary, call, key, q_len).turns(), None
    table = state.turns.at(state.rotary, query, call.first_slot + kv_len)
    own_slots = call.num_cached + torch.arange(q_len, device=query.device)
    key_turns = table.turns[:, call.first_slot : call.first_slot + kv_len]
    return table.turns[:, own_slots], key_turns, table.interpolation


def attention_over_states(
    state: LayerState, call: AttentionCall, inputs: AttentionInputs
) -> tuple[Float[Tensor, "b q h d"], Tensor | None]:
    """The model's own attention: at the smaller head size where latents stand by kv head, else on rebuilt states."""
    key_reader, value_reader = state.projections.readers.keys, state.projections.readers.values
    if key_reader is not None and key_reader.num_heads == state.num_kv_heads:
        query, key = key_reader.absorb(inputs.query), key_reader.heads(inputs.key)
    else:
        query, key = inputs.query, state.projections.rebuild(inputs.key, "keys")
        if call.rotation is not None:  # what was cached before the rotation is rotated now, queries alike
            query = rotate_pairs(state.projections.in_pairs(query), call.rotation.turns()[:, None])
            key = rotate_pairs(key, key_rotation(state.rotary, call, key, query.shape[2]).turns()[:, None])
    by_head = value_reader if value_reader is not None and value_reader.num_heads == state.num_kv_heads else None
    value = by_head.heads(inputs.value) if by_head else state.projections.rebuild(inputs.value, "values")

    # Kernels want one size of keys and values: zeros add nothing to a score, and are cut off what was attended.
    width, value_width = max(key.shape[-1], value.shape[-1]), value.shape[-1]
    query, key, value = (pad(states, (0, width - states.shape[-1])) for states in (query, key, value))
    attended, weights = inputs.attend(query, key, value)
    attended = attended[..., :value_width]
    if by_head:
        attended = by_head.restore(attended.transpose(1, 2)).transpose(1, 2).contiguous()
    return attended, weights


def observed_attention(
    state: LayerState, call: AttentionCall, inputs: AttentionInputs
) -> tuple[Float[Tensor, "b q h d"], Tensor | None]:
    """The untouched model's attention, shown to the observer."""
    assert state.observe is not None
    assert call.hidden_states is not None
    query, key, value = inputs.query, inputs.key, inputs.value
    rotated_query, rotated_key = query, key
    if call.rotation is not None:
        rotated_query, rotated_key = rotate(query, call.rotation), rotate(key, call.rotation)

    def attend_with(keys: Tensor, values: Tensor) -> Tensor:
        return inputs.attend(rotated_query, keys, values)[0]

    scale = inputs.scaling * query.shape[-1] ** 0.5  # OPT scales its queries itself, not the scores
    states = (query * scale, key, value, rotated_query * scale, rotated_key)
    state.observe(AttentionStates(inputs.module, call.hidden_states, *states, call.rotation, attend_with))
    return inputs.attend(rotated_query, rotated_key, value)
