"""Attention over a cache of latents: what is stored, and how it is read back.

A view of the cache projects keys and values down before they are stored. The attention function reads them: a few new
tokens attend over the latents themselves, many over what can be rebuilt from them, by the implementation that the model
had before. Calibration looks at queries, keys and values through the same function.

Shapes: B batch, H query heads, G kv heads, D head_dim, Q new tokens, S cached and new tokens, K rank, N = G * D.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorc_core.architecture import KINDS, Kind
from lorc_core.caches import check_fits
from lorc_core.projection import Factors
from lorc_core.reading import Reader, mixed, reader_of, rotated_scores, scores_of, turned, weighted
from lorc_core.rotation import LayerRotation, Rotation, RowPositions, SlotTurns, rotate

STATE_ATTRIBUTE = "_lorc_layer"
# Implementations whose mathematics `weighted` has, and what they may be given that it has not.
KNOWN_IMPLEMENTATIONS = ("eager", "sdpa")
UNKNOWN_ARGUMENTS = ("s_aux", "position_bias", "cache")


@dataclass
class Call:
    """What one forward call of one attention module must remember between its hook and its attention function."""

    rotation: Rotation | None
    position_ids: Int[Tensor, "#b q"] | None
    inputs: Float[Tensor, "b q i"] | None = None
    past: int | Tensor = 0
    first_slot: int = 0


@dataclass(frozen=True)
class Observed:
    """What one attention module is about to attend with, before and after the rotation (the same where there is none).

    Queries are those whose logits are scaled by head_dim ** -0.5. `attend` is the module's own attention on other
    rotated keys or values, without the output projection.
    """

    module: nn.Module
    inputs: Float[Tensor, "b q i"]
    query: Float[Tensor, "b h q d"]
    key: Float[Tensor, "b g s d"]
    value: Float[Tensor, "b g s d"]
    rotated_query: Float[Tensor, "b h q d"]
    rotated_key: Float[Tensor, "b g s d"]
    rotation: Rotation | None
    attend: Callable[[Tensor, Tensor], Float[Tensor, "b q h d"]]


LayerFactors = dict[Kind, Factors | None]


@dataclass
class LayerState:
    """The factors of one attention module, on its device, what looks at it, and the call in progress.

    `attends` says whether the module calls `latent_attention`; else it attends by itself, on whole states. Of
    `readers`, that of keys is None where they must be rebuilt to be rotated.
    """

    placed_at: tuple[torch.device, torch.dtype]
    rotary: LayerRotation | None
    num_kv_heads: int
    head_dim: int
    attends: bool
    positions: "RowPositions"
    turns: SlotTurns
    factors: LayerFactors = field(default_factory=lambda: dict.fromkeys(KINDS))
    observe: Callable[[Observed], None] | None = None
    call: Call | None = None
    order: Int[Tensor, " d"] | None = None
    offsets: dict[Kind, Tensor | None] = field(default_factory=dict)
    readers: dict[Kind, Reader | None] = field(default_factory=dict)
    num_latent_heads: int = 1

    def __post_init__(self) -> None:
        order = self.rotary.pair_order(self.head_dim) if self.rotary is not None else None
        self.order = None if order is None else order.to(self.placed_at[0])
        self.use(self.factors)

    @property
    def compresses(self) -> bool:
        return any(self.factors.values())

    @property
    def unrotates_keys(self) -> bool:
        """Whether keys must arrive before their rotation."""
        keys = self.factors["keys"]
        return self.rotary is not None and (self.observe is not None or (keys is not None and not keys.rotated))

    @property
    def pair_order(self) -> Int[Tensor, " d"] | None:
        """The order of a head's channels in which keys are projected before the rotation; None as they come."""
        return self.order if self.attends and self.factors["keys"] is not None and self.unrotates_keys else None

    def use(self, factors: LayerFactors) -> None:
        """Take other factors, wherever they are."""
        device, dtype = self.placed_at
        self.factors = {kind: found.to(device, dtype) if found else None for kind, found in factors.items()}
        if self.pair_order is not None:
            assert self.factors["keys"] is not None
            self.factors["keys"] = self.factors["keys"].reordered(self.pair_order)
        self.offsets = {kind: found.offset() if found else None for kind, found in self.factors.items()}
        self.readers = {kind: reader_of(self.factors[kind], self.offsets[kind], self.num_kv_heads) for kind in KINDS}
        if self.unrotates_keys:
            self.readers["keys"] = None
        keys, values = self.readers["keys"], self.readers["values"]
        together = keys is not None and values is not None and keys.num_heads == values.num_heads
        self.num_latent_heads = keys.num_heads if keys is not None and together else 1


class LatentCache:
    """A view of a model's cache, or of none, that stores latents: the attention module sees no difference."""

    def __init__(self, cache: Cache | None, state: LayerState) -> None:
        self._cache = cache
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(
        self,
        keys: Float[Tensor, "b g q d"],
        values: Float[Tensor, "b g q d"],
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Project down, let the real cache append, return all latents (or states, where a kind is not compressed)."""
        states = {"keys": keys, "values": values}
        latents = [project_down(states[kind], self._state, kind) for kind in KINDS]
        if self._cache is None:
            return latents[0], latents[1]
        check_fits(self._cache, layer_idx, latents[0], latents[1])
        call = self._state.call
        assert call is not None
        past = self._cache.get_query_offset(layer_idx)
        if self._state.unrotates_keys:
            self._state.positions.check(self._cache, layer_idx, call.position_ids, past)
        call.past = past.clone() if isinstance(past, Tensor) else past  # static caches count in place
        _, call.first_slot = self._cache.get_mask_sizes(keys.shape[-2], layer_idx)
        return self._cache.update(latents[0], latents[1], layer_idx, *args, **kwargs)


def project_down(states: Float[Tensor, "b g q d"], state: LayerState, kind: Kind) -> Float[Tensor, "b l q _"]:
    """(B, G, Q, D) states to (B, L, Q, R) latents: several heads where keys and values have as many, else one.

    Whole keys beside compressed values, or the reverse, are laid out so too: static caches have as many heads of both.
    """
    if not state.compresses:
        return states
    factors = state.factors[kind]
    if kind == "keys" and factors is not None and factors.takes_channels:
        states = in_pairs(states, state)
    joint = states.transpose(1, 2).flatten(2)
    latents = joint if factors is None else factors.project_down(joint)
    return latents.unflatten(-1, (state.num_latent_heads, -1)).transpose(1, 2)


def rebuild(latents: Float[Tensor, "b l s _"], state: LayerState, kind: Kind) -> Float[Tensor, "b g s d"]:
    """(B, L, S, R) latents to (B, G, S, D) states."""
    if not state.compresses:
        return latents
    joint, factors, offset = latents.transpose(1, 2).flatten(2), state.factors[kind], state.offsets[kind]
    if factors is not None:
        joint = factors.rebuild(joint)
    if offset is not None:
        joint = joint + offset
    return joint.unflatten(-1, (state.num_kv_heads, -1)).transpose(1, 2)


def project_states(states: Float[Tensor, "b g s d"], factors: Factors) -> Float[Tensor, "b g s d"]:
    """The states that a cache of their latents gives back."""
    joint = factors.rebuild(factors.project_down(states.transpose(1, 2).flatten(2)))
    offset = factors.offset()
    joint = joint if offset is None else joint + offset
    return joint.unflatten(-1, (states.shape[1], -1)).transpose(1, 2)


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
    if state is None or (state.observe is None and not state.compresses):
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
    few = query.shape[2] == 1 or (mask is not None and num_rows <= state.num_kv_heads * state.head_dim)
    known = underlying in KNOWN_IMPLEMENTATIONS and not any(kwargs.get(name) is not None for name in UNKNOWN_ARGUMENTS)
    rebuilds = state.readers["keys"] is None
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
    reader, values = state.readers["keys"], state.readers["values"]
    assert values is not None
    if underlying == "sdpa" and isinstance(call.past, Tensor) and call.first_slot == 0 and key.device.type == "cpu":
        filled = min(int(call.past) + query.shape[2], key.shape[2])  # of a static cache; reading it is free on a CPU
        key, value = key[:, :, :filled], value[:, :, :filled]
        mask = None if mask is None else mask[..., :filled]
    query = query * kwargs.get("scaling", query.shape[-1] ** -0.5)  # not the scores, which float16 may not hold
    if reader is not None:
        scores = scores_of(reader.absorb(query), reader.heads(key))
    else:
        factors = state.factors["keys"]
        assert factors is not None
        new, cached = turns_of(state, call, query, key)
        query = turned(in_pairs(query, state), new[:, None])
        scores = rotated_scores(query, key, factors, state.offsets["keys"], cached)
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


def in_pairs(states: Float[Tensor, "b h s d"], state: LayerState) -> Float[Tensor, "b h s d"]:
    """With channels that rotate together side by side, as the keys' factors have them."""
    return states if state.pair_order is None else states[..., state.pair_order]


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
    keys, values = state.readers["keys"], state.readers["values"]
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
