"""What a cache of latents stores: states projected down on their way in, and rebuilt.

Shapes: B batch, H query heads, G kv heads, D head_dim, Q new tokens, S cached and new tokens, L latent heads, R latents
of each, N = G * D.
"""

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from lorc_core.architecture import KINDS, Kind
from lorc_core.caches import check_fits
from lorc_core.projection import Factors
from lorc_core.reading import Reader, reader_of
from lorc_core.rotation import LayerRotation, Rotation, RowPositions
from lorc_core.slot_turns import SlotTurns

LayerFactors = dict[Kind, Factors | None]


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


@dataclass(frozen=True)
class LayerProjections:
    """One layer's factors as the runtime uses them.

    Attributes:
        factors: On the layer's device. Those of keys before the rotation have the channels of a pair side by side.
        offsets: What rebuilt states lack.
        readers: How the latents are read; None for keys that must be rebuilt to be rotated.
        pair_order: The order of a head's channels that the keys' factors have; None for the model's own.
        num_latent_heads: Heads of the cache: as many as both kinds have, else one.
    """

    factors: LayerFactors
    offsets: dict[Kind, Float[Tensor, " n"] | None]
    readers: dict[Kind, Reader | None]
    pair_order: Int[Tensor, " d"] | None
    num_latent_heads: int

    @property
    def compress(self) -> bool:
        return any(self.factors.values())


@dataclass
class LayerState:
    """One attention module's facts, its projections, what looks at it, and the call in progress.

    `attends` says whether the module calls `latent_attention`; else it attends by itself, on whole states.
    """

    placed_at: tuple[torch.device, torch.dtype]
    rotary: LayerRotation | None
    num_kv_heads: int
    head_dim: int
    attends: bool
    positions: RowPositions
    turns: SlotTurns
    factors: InitVar[LayerFactors]
    observe: Callable[[Observed], None] | None = None
    call: Call | None = None
    projections: LayerProjections = field(init=False)

    def __post_init__(self, factors: LayerFactors) -> None:
        self.use(factors)

    @property
    def unrotates_keys(self) -> bool:
        """Whether keys must arrive before their rotation."""
        return self.rotary is not None and (self.observe is not None or before_rotation(self.projections.factors))

    def use(self, factors: LayerFactors) -> None:
        """Take other factors, wherever they are."""
        device, dtype = self.placed_at
        placed = {kind: found.to(device, dtype) if found else None for kind, found in factors.items()}
        keys, order = placed["keys"], None
        rotates = self.rotary is not None and before_rotation(placed)
        if self.rotary is not None and rotates and self.attends and keys is not None:
            order = self.rotary.pair_order(self.head_dim)
        if order is not None and keys is not None:
            placed["keys"] = keys.reordered(order := order.to(device))
        offsets = {kind: found.offset() if found else None for kind, found in placed.items()}
        readers: dict[Kind, Reader | None] = {
            kind: reader_of(placed[kind], offsets[kind], self.num_kv_heads) for kind in KINDS
        }
        if rotates:
            readers["keys"] = None
        heads = {0 if reader is None else reader.num_heads for reader in readers.values()}
        num_latent_heads = heads.pop() if len(heads) == 1 else 1
        self.projections = LayerProjections(placed, offsets, readers, order, num_latent_heads)


def before_rotation(factors: LayerFactors) -> bool:
    """Whether keys are projected before the rotation, where there is one."""
    keys = factors["keys"]
    return keys is not None and not keys.rotated


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
    if not state.projections.compress:
        return states
    factors = state.projections.factors[kind]
    if kind == "keys" and factors is not None and factors.takes_channels:
        states = in_pairs(states, state)
    joint = states.transpose(1, 2).flatten(2)
    latents = joint if factors is None else factors.project_down(joint)
    return latents.unflatten(-1, (state.projections.num_latent_heads, -1)).transpose(1, 2)


def rebuild(latents: Float[Tensor, "b l s _"], state: LayerState, kind: Kind) -> Float[Tensor, "b g s d"]:
    """(B, L, S, R) latents to (B, G, S, D) states."""
    if not state.projections.compress:
        return latents
    joint, factors, offset = (
        latents.transpose(1, 2).flatten(2),
        state.projections.factors[kind],
        state.projections.offsets[kind],
    )
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


def in_pairs(states: Float[Tensor, "b h s d"], state: LayerState) -> Float[Tensor, "b h s d"]:
    """With channels that rotate together side by side, as the keys' factors have them."""
    return states if state.projections.pair_order is None else states[..., state.projections.pair_order]
