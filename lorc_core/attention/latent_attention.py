"""Attention over a cache of latents.

A few new tokens attend over the latents themselves, many over what can be rebuilt from them, by the implementation that
the model had before. Calibration looks at queries, keys and values through the same function.

Shapes: B batch, H query heads, G kv heads, D head_dim, Q new tokens, S cached and new tokens, L latent heads, P pairs
of rotated channels.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorc_core.attention.call import AttentionCall, Observed
from lorc_core.attention.layer_state import LayerState
from lorc_core.attention.positions import key_rotation
from lorc_core.attention.scores.absorbed import apply_rotary, attend_values, attention_scores, attention_weights
from lorc_core.attention.scores.choice import key_scores
from lorc_core.attention.scores.interpolated import Interpolation
from lorc_core.attention.scores.rebuilt import UnrotatedKeys
from lorc_core.model.rotation import rotate

STATE_ATTRIBUTE = "_lorc_layer"
# Implementations whose mathematics `attention_weights` has, and what they may be given that it has not.
KNOWN_IMPLEMENTATIONS = ("eager", "sdpa")
UNKNOWN_ARGUMENTS = ("s_aux", "position_bias", "cache")


@dataclass(frozen=True)
class AttentionInputs:
    """What a module asks of its attention function, in transformers' terms."""

    underlying: str
    module: nn.Module
    query: Float[Tensor, "b h q d"]
    key: Float[Tensor, "b _ s _"]
    value: Float[Tensor, "b _ s _"]
    mask: Tensor | None
    options: dict[str, Any]

    @property
    def scaling(self) -> float:
        """Of the logits: by whole heads where the module leaves it open, whatever the size of those attended."""
        given = self.options.get("scaling")
        return self.query.shape[-1] ** -0.5 if given is None else given

    def attend(
        self, query: Float[Tensor, "b h q _"], key: Float[Tensor, "b g s _"], value: Float[Tensor, "b g s _"]
    ) -> tuple[Float[Tensor, "b q h _"], Tensor | None]:
        """The model's own attention on other queries, keys and values."""
        attend = implementation(self.underlying, self.module)
        return attend(self.module, query, key, value, self.mask, **(self.options | {"scaling": self.scaling}))


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
    state: LayerState | None = getattr(module, STATE_ATTRIBUTE, None)
    if state is None or (state.observe is None and not state.projections.compress):
        return implementation(underlying, module)(module, query, key, value, attention_mask, **kwargs)
    call = state.take_call()
    asked = AttentionInputs(underlying, module, query, key, value, attention_mask, kwargs)
    if state.observe is not None:
        return observed_attention(state, call, asked)
    if reads_latents(state, asked):
        return attention_over_latents(state, call, asked)
    return attention_over_states(state, call, asked)


def reads_latents(state: LayerState, asked: AttentionInputs) -> bool:
    """Whether attending over latents is cheaper than rebuilding values, and their mathematics is known."""
    num_heads, q_len = asked.query.shape[1:3]
    # scores then take no more than half the memory of rebuilt values
    few = q_len == 1 or (asked.mask is not None and 2 * num_heads * q_len <= state.num_kv_heads * state.head_dim)
    plain = not any(asked.options.get(name) is not None for name in UNKNOWN_ARGUMENTS)
    known = asked.underlying in KNOWN_IMPLEMENTATIONS and plain
    rebuilds = state.projections.readers.keys is None
    return few and known and not asked.module.training and not (rebuilds and torch.compiler.is_compiling())


def attention_over_latents(
    state: LayerState, call: AttentionCall, asked: AttentionInputs
) -> tuple[Float[Tensor, "b q h d"], Tensor | None]:
    """Nothing is rebuilt but keys that must be rotated, those a chunk at a time."""
    reader, values = state.projections.readers.keys, state.projections.readers.values
    assert values is not None
    key, value, mask = used_slots(call, asked)
    query = asked.query * asked.scaling  # not the scores, which float16 may not hold
    if reader is not None and can_pack(state, asked):
        packed = packed_attention(reader.absorb(query), reader.heads(key), values.heads(value), mask)
        return values.restore(packed).transpose(1, 2).contiguous(), None
    if reader is not None:
        scores = attention_scores(reader.absorb(query), reader.heads(key))
    else:
        factors = state.projections.factors.keys
        assert factors is not None
        new, cached, slow = turns_of(state, call, query, key)
        query = apply_rotary(state.projections.in_pairs(query), new[:, None])
        keys = UnrotatedKeys(key, factors, state.projections.offsets.keys, cached)
        scores = key_scores(query, keys, slow)
    weights = attention_weights(scores, mask, asked.options.get("softcap"))
    attended = values.restore(attend_values(weights, values.heads(value)))
    return attended.transpose(1, 2).contiguous(), weights if asked.underlying == "eager" else None


def can_pack(state: LayerState, asked: AttentionInputs) -> bool:
    """Whether stock attention can read the latents: of heads apart, all as wide, by one new token."""
    keys, values = state.projections.readers.keys, state.projections.readers.values
    apart = keys is not None and values is not None and keys.num_heads == values.num_heads == state.num_kv_heads
    plain = asked.underlying == "sdpa" and asked.options.get("softcap") is None and asked.query.shape[2] == 1
    mask, dtypes = asked.mask, (torch.bool, asked.query.dtype)
    stock_mask = mask is None or (mask.shape[1] == 1 and mask.dtype in dtypes)
    return apart and plain and stock_mask and asked.key.shape[-1] == asked.value.shape[-1]


def packed_attention(
    query: Float[Tensor, "b h 1 r"],
    key: Float[Tensor, "b l s r"],
    value: Float[Tensor, "b l s r"],
    mask: Tensor | None,
) -> Float[Tensor, "b h 1 r"]:
    """torch's own attention by scaled queries, those which read one head as its rows, so that no head is repeated."""
    rows = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    return scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=1.0).reshape(query.shape)


def used_slots(
    call: AttentionCall, asked: AttentionInputs
) -> tuple[Float[Tensor, "b l s _"], Float[Tensor, "b l s _"], Tensor | None]:
    """Keys, values and mask of the slots in use; of a static cache the first ones, which a CPU can ask for free."""
    key, value, mask = asked.key, asked.value, asked.mask
    counted = isinstance(call.past, Tensor) and call.first_slot == 0 and key.device.type == "cpu"
    if asked.underlying != "sdpa" or not counted:
        return key, value, mask
    num_filled = min(int(call.past) + asked.query.shape[2], key.shape[2])
    return key[:, :, :num_filled], value[:, :, :num_filled], None if mask is None else mask[..., :num_filled]


def turns_of(
    state: LayerState, call: AttentionCall, query: Float[Tensor, "b h q d"], key: Float[Tensor, "b 1 s _"]
) -> tuple[Complex[Tensor, "#b q p"], Complex[Tensor, "#b s p"], Interpolation | None]:
    """The turns of the new tokens and of all slots: by slots where only distances count, else by positions."""
    assert state.rotary is not None
    assert call.rotation is not None
    q_len, kv_len = query.shape[2], key.shape[2]
    if kv_len == q_len or not state.rotary.is_fixed:
        return call.rotation.turns(), key_rotation(state.rotary, call, key, q_len).turns(), None
    table = state.turns.at(state.rotary, query, call.first_slot + kv_len)
    own_slots = call.past + torch.arange(q_len, device=query.device)
    cached = table.turns[:, call.first_slot : call.first_slot + kv_len]
    return table.turns[:, own_slots], cached, table.slow


def attention_over_states(
    state: LayerState, call: AttentionCall, asked: AttentionInputs
) -> tuple[Float[Tensor, "b q h d"], Tensor | None]:
    """The model's own attention: at the smaller head size where latents stand by kv head, else on rebuilt states."""
    keys, values = state.projections.readers.keys, state.projections.readers.values
    if keys is not None and keys.num_heads == state.num_kv_heads:
        query, key = keys.absorb(asked.query), keys.heads(asked.key)
    else:
        query, key = asked.query, state.projections.rebuild(asked.key, "keys")
        if call.rotation is not None:
            query = apply_rotary(state.projections.in_pairs(query), call.rotation.turns()[:, None])
            key = apply_rotary(key, key_rotation(state.rotary, call, key, query.shape[2]).turns()[:, None])
    by_head = values if values is not None and values.num_heads == state.num_kv_heads else None
    value = by_head.heads(asked.value) if by_head else state.projections.rebuild(asked.value, "values")
    width, value_width = max(key.shape[-1], value.shape[-1]), value.shape[-1]
    query, key, value = (pad(one, (0, width - one.shape[-1])) for one in (query, key, value))  # kernels want one size
    attended, weights = asked.attend(query, key, value)
    attended = attended[..., :value_width]
    if by_head:
        attended = by_head.restore(attended.transpose(1, 2)).transpose(1, 2).contiguous()
    return attended, weights


def observed_attention(
    state: LayerState, call: AttentionCall, asked: AttentionInputs
) -> tuple[Float[Tensor, "b q h d"], Tensor | None]:
    """The untouched model's attention, shown to the observer."""
    assert state.observe is not None
    assert call.inputs is not None
    query, key, value = asked.query, asked.key, asked.value
    rotated_query, rotated_key = query, key
    if call.rotation is not None:
        rotated_query, rotated_key = rotate(query, call.rotation), rotate(key, call.rotation)

    def attend_with(keys: Tensor, values: Tensor) -> Tensor:
        return asked.attend(rotated_query, keys, values)[0]

    scale = asked.scaling * query.shape[-1] ** 0.5  # OPT scales its queries itself, not the logits
    states = (query * scale, key, value, rotated_query * scale, rotated_key)
    state.observe(Observed(asked.module, call.inputs, *states, call.rotation, attend_with))
    return asked.attend(rotated_query, rotated_key, value)


def implementation(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' attention function of that name; eager attention lives beside each model's own classes."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
