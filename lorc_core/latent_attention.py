"""Attention over a cache of latents.

A few new tokens attend over the latents themselves, many over what can be rebuilt from them, by the implementation that
the model had before. Calibration looks at queries, keys and values through the same function.

Shapes: B batch, H query heads, G kv heads, D head_dim, Q new tokens, S cached and new tokens, L latent heads, P pairs
of rotated channels.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorc_core.latent_cache import Call, LayerState, Observed, in_pairs, rebuild
from lorc_core.reading import mixed, rotated_scores, scores_of, turned, weighted
from lorc_core.rotation import Rotation, rotate

STATE_ATTRIBUTE = "_lorc_layer"
# Implementations whose mathematics `weighted` has, and what they may be given that it has not.
KNOWN_IMPLEMENTATIONS = ("eager", "sdpa")
UNKNOWN_ARGUMENTS = ("s_aux", "position_bias", "cache")


def key_rotation(state: LayerState, call: Call, keys: Float[Tensor, "b g s d"], q_len: int) -> Rotation:
    """cos and sin for every cached key: those given for this call, or from the slots' positions.

    Positions are contiguous along a row, so a slot's position follows from the newest one; that holds under left
    padding, beams, static and sliding caches and needs no storage.
    """
    kv_len = keys.shape[-2]
    if kv_len == q_len:
        assert call.rotation is not None
        return call.rotation
    assert state.rotary is not None
    assert call.position_ids is not None
    slots = torch.arange(kv_len, device=keys.device) + call.first_slot
    newest = call.position_ids[:, -1:].to(keys.device)
    return state.rotary(keys, newest - (call.past + q_len - 1 - slots))


def latent_attention(
    underlying: str,
    module: nn.Module,
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b _ s _"],
    value: Float[Tensor, "b _ s _"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over latents, by the implementation called `underlying` wherever whole states serve better."""
    attend = implementation(underlying, module)
    state: LayerState | None = getattr(module, STATE_ATTRIBUTE, None)
    if state is None or (state.observe is None and not state.projections.compress):
        return attend(module, query, key, value, attention_mask, **kwargs)
    call, state.call = state.call, None
    assert call is not None
    if state.observe is not None:
        return observed_attention(attend, state, call, module, query, key, value, attention_mask, **kwargs)
    if reads_latents(underlying, state, module, query, attention_mask, kwargs):
        return attention_over_latents(underlying, state, call, query, key, value, attention_mask, **kwargs)
    return attention_over_states(attend, state, call, module, query, key, value, attention_mask, **kwargs)


def reads_latents(
    underlying: str,
    state: LayerState,
    module: nn.Module,
    query: Float[Tensor, "b h q d"],
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> bool:
    """Whether attending over latents is cheaper than rebuilding values, and their mathematics is known."""
    num_rows = query.shape[1] * query.shape[2]
    # scores then take no more than half the memory of rebuilt values
    few = query.shape[2] == 1 or (mask is not None and 2 * num_rows <= state.num_kv_heads * state.head_dim)
    known = underlying in KNOWN_IMPLEMENTATIONS and not any(kwargs.get(name) is not None for name in UNKNOWN_ARGUMENTS)
    rebuilds = state.projections.readers["keys"] is None
    return few and known and not module.training and not (rebuilds and torch.compiler.is_compiling())


def attention_over_latents(
    underlying: str,
    state: LayerState,
    call: Call,
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b l s _"],
    value: Float[Tensor, "b l s _"],
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b q h d"], Tensor | None]:
    """Nothing is rebuilt but keys that must be rotated, those a chunk at a time."""
    reader, values = state.projections.readers["keys"], state.projections.readers["values"]
    assert values is not None
    if underlying == "sdpa" and isinstance(call.past, Tensor) and call.first_slot == 0 and key.device.type == "cpu":
        filled = min(int(call.past) + query.shape[2], key.shape[2])  # of a static cache; reading it is free on a CPU
        key, value = key[:, :, :filled], value[:, :, :filled]
        mask = None if mask is None else mask[..., :filled]
    query = query * kwargs.get("scaling", query.shape[-1] ** -0.5)  # not the scores, which float16 may not hold
    if reader is not None:
        scores = scores_of(reader.absorb(query), reader.heads(key))
    else:
        factors = state.projections.factors["keys"]
        assert factors is not None
        new, cached = turns_of(state, call, query, key)
        query = turned(in_pairs(query, state), new[:, None])
        scores = rotated_scores(query, key, factors, state.projections.offsets["keys"], cached)
    weights = weighted(scores, mask, kwargs.get("softcap"))
    attended = values.restore(mixed(weights, values.heads(value)))
    return attended.transpose(1, 2).contiguous(), weights if underlying == "eager" else None


def turns_of(
    state: LayerState, call: Call, query: Float[Tensor, "b h q d"], key: Float[Tensor, "b 1 s _"]
) -> tuple[Complex[Tensor, "#b q p"], Complex[Tensor, "#b s p"]]:
    """The rotations of the new tokens and of all slots: by slots where only distances count, else by positions."""
    assert state.rotary is not None
    assert call.rotation is not None
    q_len, kv_len = query.shape[2], key.shape[2]
    if kv_len == q_len or not state.rotary.is_fixed:
        return call.rotation.turns(), key_rotation(state, call, key, q_len).turns()
    table = state.turns.at(state.rotary, query, call.first_slot + kv_len)
    own_slots = call.past + torch.arange(q_len, device=query.device)
    return table[:, own_slots], table[:, call.first_slot : call.first_slot + kv_len]


def attention_over_states(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    state: LayerState,
    call: Call,
    module: nn.Module,
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b l s _"],
    value: Float[Tensor, "b l s _"],
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b q h d"], Tensor | None]:
    """The model's own attention: at the smaller head size where latents stand by kv head, else on rebuilt states."""
    keys, values = state.projections.readers["keys"], state.projections.readers["values"]
    kwargs.setdefault("scaling", query.shape[-1] ** -0.5)  # of whole heads, whatever the size of those attended
    if keys is not None and keys.num_heads == state.num_kv_heads:
        query, key = keys.absorb(query), keys.heads(key)
    else:
        q_len = query.shape[2]
        key = rebuild(key, state, "keys")
        if call.rotation is not None:
            query = turned(in_pairs(query, state), call.rotation.turns()[:, None])
            key = turned(key, key_rotation(state, call, key, q_len).turns()[:, None])
    by_head = values if values is not None and values.num_heads == state.num_kv_heads else None
    value = by_head.heads(value) if by_head else rebuild(value, state, "values")
    width, value_width = max(key.shape[-1], value.shape[-1]), value.shape[-1]
    query, key, value = (pad(one, (0, width - one.shape[-1])) for one in (query, key, value))  # kernels want one size
    attended, weights = attend(module, query, key, value, mask, **kwargs)
    attended = attended[..., :value_width]
    if by_head:
        attended = by_head.restore(attended.transpose(1, 2)).transpose(1, 2).contiguous()
    return attended, weights


def observed_attention(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    state: LayerState,
    call: Call,
    module: nn.Module,
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s d"],
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b q h d"], Tensor | None]:
    """The untouched model's attention, shown to the observer."""
    assert state.observe is not None
    assert call.inputs is not None
    rotated_key, rotated_query = key, query
    if call.rotation is not None:
        rotated_key, rotated_query = rotate(key, call.rotation), rotate(query, call.rotation)

    def attend_with(keys: Tensor, values: Tensor) -> Tensor:
        return attend(module, rotated_query, keys, values, mask, **kwargs)[0]

    scale = kwargs["scaling"] * query.shape[-1] ** 0.5  # OPT scales its queries itself, not the logits
    states = (query * scale, key, value, rotated_query * scale, rotated_key)
    state.observe(Observed(module, call.inputs, *states, call.rotation, attend_with))
    return attend(module, rotated_query, rotated_key, value, mask, **kwargs)


def implementation(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' attention function of that name; eager attention lives beside each model's own classes."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
