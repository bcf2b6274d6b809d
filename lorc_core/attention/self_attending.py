"""Attention modules that attend by themselves, outside transformers' attention interface, as GPT-J's do.

They get whole keys and values back from the view of their cache: slower than attending over latents, with the same
memory and the same numbers. Calibration looks at them through the same view.

Shapes: B batch, H query heads, C cached heads, G kv heads, D head_dim, Q new tokens, S cached and new tokens, I
hidden_size. Falcon caches every kv head as often as query heads read it, so C may be more than G.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache

from lorc_core.attention.call import AttentionCall, AttentionStates
from lorc_core.attention.latent_cache import LatentCache
from lorc_core.attention.layer_state import LayerState
from lorc_core.attention.positions import key_rotation
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import KINDS
from lorc_core.model.rotation import rotate, unrotate
from lorc_core.model.stored.weights import projection_rows


class GivenStates:
    """Stands in a cache's place and hands out what is to be attended to, whatever the module would store.

    Args:
        keys: Rotated, of all tokens.
        values: Of all tokens.
    """

    def __init__(self, keys: Float[Tensor, "b c s d"], values: Float[Tensor, "b c s d"]) -> None:
        self._states = keys, values

    def update(self, *_: Any) -> tuple[Tensor, Tensor]:
        """As a cache's: what is to be attended to."""
        return self._states

    def get_seq_length(self) -> int:
        """As a cache's."""
        return self._states[0].shape[-2]


@dataclass(frozen=True)
class OwnAttention:
    """One call of a module that attends by itself: its arguments, without the cache.

    Attributes:
        module: That is called.
        architecture: Of its model.
        args: Of its `forward`.
        kwargs: Of its `forward`.
    """

    module: nn.Module
    architecture: Architecture
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def num_copies(self) -> int:
        """Cached heads in a row that are one kv head."""
        return self.architecture.num_cached_heads // self.architecture.num_kv_heads

    def kv_heads(self, states: Float[Tensor, "b c s d"]) -> Float[Tensor, "b g s d"]:
        """Each kv head once, of heads that may be copies."""
        return states[:, :: self.num_copies]

    def cached_heads(self, states: Float[Tensor, "b g s d"]) -> Float[Tensor, "b c s d"]:
        """As many copies of each kv head as the module would cache."""
        return states.repeat_interleave(self.num_copies, dim=1)

    def queries(self, hidden_states: Float[Tensor, "b q i"]) -> Float[Tensor, "b h q d"]:
        """Unrotated, as if scores were scaled by head_dim ** -0.5; MPT may clip them first."""
        architecture = self.architecture
        stored = dict(self.module.get_submodule(architecture.family.projection.format("q")).named_parameters())
        bias = projection_rows(architecture, "q", stored["bias"]) if architecture.bias else None
        joint = nn.functional.linear(hidden_states, projection_rows(architecture, "q", stored["weight"]), bias)
        scale = architecture.head_dim**-0.5 if architecture.family.scaled else 1.0
        if architecture.model_type == "mpt":
            own: Any = self.module
            joint = joint.clamp(-own.clip_qkv, own.clip_qkv) if own.clip_qkv else joint
            scale = own.softmax_scale
        joint = joint * (scale * architecture.head_dim**0.5)
        return joint.unflatten(-1, (self.architecture.num_heads, -1)).transpose(1, 2)

    def attend(self, keys: Float[Tensor, "b g s d"], values: Float[Tensor, "b g s d"]) -> Float[Tensor, "b q h d"]:
        """What the module would hand to its output projection.

        Args:
            keys: Rotated, in place of its own.
            values: In place of its own.
        """
        attended: list[Tensor] = []
        output = self.module.get_submodule(self.architecture.family.output)
        handle = output.register_forward_pre_hook(lambda _, inputs: attended.append(inputs[0]))
        given = {
            self.architecture.family.cache_argument: GivenStates(self.cached_heads(keys), self.cached_heads(values))
        }
        try:
            self.module.forward(*self.args, **(dict(self.kwargs) | given))  # past the hooks of the module itself
        finally:
            handle.remove()
        return attended[0].unflatten(-1, (self.architecture.num_heads, -1))

    def states(
        self,
        call: AttentionCall,
        key: Float[Tensor, "b g s d"],
        value: Float[Tensor, "b g s d"],
        rotated_key: Float[Tensor, "b g s d"],
    ) -> AttentionStates:
        """What observers are shown."""
        assert call.hidden_states is not None
        query = self.queries(call.hidden_states)
        rotated_query = query if call.rotation is None else rotate(query, call.rotation)
        states = (query, key, value, rotated_query, rotated_key)
        return AttentionStates(self.module, call.hidden_states, *states, call.rotation, self.attend)


class RebuildingCache(LatentCache):
    """Stores latents and hands whole states back.

    Keys arrive rotated: where they were compressed before the rotation it is taken off them, and put on the rebuilt
    ones by their positions.

    Args:
        cache: The real one; None where the model runs without.
        state: Of the layer, with the call in progress.
        own: The call of the module.
    """

    def __init__(self, cache: Cache | None, state: LayerState, own: OwnAttention) -> None:
        assert state.call is not None
        super().__init__(cache, state.projections, state.call, state.positions if state.unrotates_keys else None)
        self._state = state
        self._own = own

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Tokens cached; MPT asks, and there may be no cache behind the view."""
        return 0 if self._cache is None else self._cache.get_seq_length(layer_idx)

    def update(
        self,
        keys: Float[Tensor, "b c q d"],
        values: Float[Tensor, "b c q d"],
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "b c s d"], Float[Tensor, "b c s d"]]:
        """Project down, let the real cache append, rebuild all it holds.

        Args:
            keys: Rotated, of the new tokens.
            values: Of the new tokens.
            layer_idx: Of the caller.
            args: Of the real cache's `update`.
            kwargs: Of the real cache's `update`.

        Returns:
            Rotated keys, and values, of all tokens.
        """
        state, call = self._state, self._state.take_call()
        new_keys, new_values = self._own.kv_heads(keys), self._own.kv_heads(values)
        if call.rotation is not None:  # the module has rotated them, and latents are of what stood before
            new_keys = unrotate(new_keys, call.rotation)
        latents = super().update(new_keys, new_values, layer_idx, *args, **kwargs)
        key, value = (state.projections.rebuild(*pair) for pair in zip(latents, KINDS, strict=True))
        rotated_key = key
        if call.rotation is not None:
            rotated_key = rotate(key, key_rotation(state.rotary, call, key, keys.shape[-2]))
        if state.observe is not None:
            state.observe(self._own.states(call, key, value, rotated_key))
        return self._own.cached_heads(rotated_key), self._own.cached_heads(value)
