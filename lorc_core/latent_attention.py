"""Attention over a cache of latents: what is stored, and how it is read back.

A view of the cache projects keys and values down before they are stored; an attention function rebuilds them from
the latents, rotates what arrived unrotated, and calls the implementation the model had before. Calibration looks at
queries, keys and values through the same function.

Shapes: B batch, H query heads, G kv heads, D head_dim, Q new tokens, S cached and new tokens, K rank, N = G * D.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorc_core.architecture import KINDS, Kind
from lorc_core.caches import check_fits
from lorc_core.projection import Factors
from lorc_core.rotation import Rotation, RowPositions, rotate

STATE_ATTRIBUTE = "_lorc_layer"


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
    """The factors of one attention module, on its device, what looks at it, and the call in progress."""

    placed_at: tuple[torch.device, torch.dtype]
    rotary: nn.Module | None
    num_kv_heads: int
    positions: "RowPositions"
    factors: LayerFactors = field(default_factory=lambda: dict.fromkeys(KINDS))
    observe: Callable[[Observed], None] | None = None
    call: Call | None = None

    @property
    def compresses(self) -> bool:
        return any(self.factors.values())

    @property
    def unrotates_keys(self) -> bool:
        """Whether keys must arrive before their rotation."""
        keys = self.factors["keys"]
        return self.rotary is not None and (self.observe is not None or (keys is not None and not keys.rotated))

    @cached_property
    def offsets(self) -> dict[Kind, Tensor | None]:
        return {kind: found.offset() if found else None for kind, found in self.factors.items()}

    def use(self, factors: LayerFactors) -> None:
        """Take other factors, wherever they are."""
        device, dtype = self.placed_at
        self.factors = {kind: found.to(device, dtype) if found else None for kind, found in factors.items()}
        self.__dict__.pop("offsets", None)


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


def project_down(states: Float[Tensor, "b g q d"], state: LayerState, kind: Kind) -> Float[Tensor, "b _ q _"]:
    """(B, G, Q, D) states to (B, 1, Q, K) latents.

    Whole keys beside compressed values, or the reverse, become one head too: static caches have as many of both.
    """
    if not state.compresses:
        return states
    joint, factors = states.transpose(1, 2).flatten(2), state.factors[kind]
    return (joint if factors is None else factors.project_down(joint)).unsqueeze(1)


def rebuild(latents: Float[Tensor, "b _ s _"], state: LayerState, kind: Kind) -> Float[Tensor, "b g s d"]:
    """(B, 1, S, K) latents to (B, G, S, D) states."""
    if not state.compresses:
        return latents
    joint, factors, offset = latents.squeeze(1), state.factors[kind], state.offsets[kind]
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
    cos, sin = state.rotary(keys, newest - (call.past + q_len - 1 - slots))
    return cos, sin


def latent_attention(
    underlying: str,
    module: nn.Module,
    query: Float[Tensor, "b h q d"],
    key: Float[Tensor, "b _ s _"],
    value: Float[Tensor, "b _ s _"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over latents, by the implementation called `underlying` on rebuilt keys and values."""
    attend = implementation(underlying, module)
    state: LayerState | None = getattr(module, STATE_ATTRIBUTE, None)
    if state is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    call, state.call = state.call, None
    assert call is not None
    key, value = rebuild(key, state, "keys"), rebuild(value, state, "values")
    rotated_key, rotated_query = key, query
    if call.rotation is not None:
        rotated_key = rotate(key, key_rotation(state, call, key, query.shape[-2]))
        rotated_query = rotate(query, call.rotation)
    if state.observe is not None:

        def attend_with(keys: Tensor, values: Tensor) -> Tensor:
            return attend(module, rotated_query, keys, values, attention_mask, **kwargs)[0]

        assert call.inputs is not None
        scale = kwargs["scaling"] * query.shape[-1] ** 0.5  # OPT scales its queries itself, not the logits
        states = (query * scale, key, value, rotated_query * scale, rotated_key)
        state.observe(Observed(module, call.inputs, *states, call.rotation, attend_with))
    return attend(module, rotated_query, rotated_key, value, attention_mask, **kwargs)


def implementation(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' attention function of that name; eager attention lives beside each model's own classes."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
