"""One layer's factors as the runtime uses them: states to latents on their way into the cache, and back.

Shapes: B batch, G kv heads, D head_dim, Q new tokens, S cached and new tokens, L latent heads, R latents of each,
N = G * D.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from lorc_core.attention.placement import Placement
from lorc_core.attention.scores.absorbed import LatentReader, latent_reader
from lorc_core.decomposition.factors import Factors, LayerFactors
from lorc_core.model.kinds import KINDS, KeysValues, Kind
from lorc_core.model.rotation import LayerRotation


@dataclass(frozen=True)
class LayerProjections:
    """One layer's factors, placed and laid out for its attention module.

    Attributes:
        factors: On the layer's device. Those of keys before the rotation have the channels of a pair side by side.
        offsets: What rebuilt states lack.
        readers: How the latents are read; None for keys that must be rebuilt to be rotated.
        pair_order: The order of a head's channels that the keys' factors have; None for the model's own.
        num_kv_heads: G.
        num_latent_heads: L, heads of the cache: as many as both kinds have, else one.
    """

    factors: LayerFactors
    offsets: KeysValues[Float[Tensor, " n"] | None]
    readers: KeysValues[LatentReader | None]
    pair_order: Int[Tensor, " d"] | None
    num_kv_heads: int
    num_latent_heads: int

    @classmethod
    def of(
        cls,
        factors: LayerFactors,
        placement: Placement,
        heads: tuple[int, int],
        rotary: LayerRotation | None,
        *,
        attends: bool,
    ) -> "LayerProjections":
        """Place factors.

        Args:
            factors: On any device.
            placement: Of the layer.
            heads: Number of kv heads, and channels of each.
            rotary: How the layer rotates its keys; None where it does not.
            attends: Whether latents are attended over; else states are rebuilt for a module that attends by itself.
        """
        num_kv_heads, head_dim = heads
        placed = factors.map(lambda its: its.to(*placement) if its else None)
        rebuilds_keys = rotary is not None and compresses_unrotated_keys(placed)
        order = None
        if rotary is not None and placed.keys is not None and rebuilds_keys and attends:
            order = rotary.pair_order(head_dim)
        if order is not None and placed.keys is not None:
            # Once here, so that rebuilt keys come out with pairs side by side, to be rotated as complex numbers.
            order = order.to(placement.device)
            placed = KeysValues(placed.keys.reordered(order), placed.values)
        return cls._of_placed(placed, order, num_kv_heads, rebuilds_keys=rebuilds_keys)

    @classmethod
    def _of_placed(
        cls, factors: LayerFactors, pair_order: Int[Tensor, " d"] | None, num_kv_heads: int, *, rebuilds_keys: bool
    ) -> "LayerProjections":
        """Of factors in their place, with channels in their order."""
        offsets = factors.map(lambda its: its.offset() if its else None)
        of_keys, of_values = (latent_reader(factors[kind], offsets[kind], num_kv_heads) for kind in KINDS)
        readers = KeysValues(None if rebuilds_keys else of_keys, of_values)
        return cls(factors, offsets, readers, pair_order, num_kv_heads, num_latent_heads(readers))

    def to(self, placement: Placement) -> "LayerProjections":
        """The same elsewhere, or in another precision."""
        moved = self.factors.map(lambda its: its.to(*placement) if its else None)
        order = None if self.pair_order is None else self.pair_order.to(placement.device)
        return self._of_placed(moved, order, self.num_kv_heads, rebuilds_keys=self.readers.keys is None)

    @property
    def compress(self) -> bool:
        """Whether anything of the layer is compressed."""
        return any(self.factors)

    def project_down(self, states: Float[Tensor, "b g q d"], kind: Kind) -> Float[Tensor, "b l q _"]:
        """States on their way into the cache.

        Whole keys beside compressed values, or the reverse, are laid out as latents are: static caches have as many
        heads of both.

        Args:
            states: Of the new tokens, as the attention module caches them.
            kind: Whose they are.

        Returns:
            (B, L, Q, R) latents; the states as they are where the layer is not compressed.
        """
        if not self.compress:
            return states
        factors = self.factors[kind]
        if kind == "keys" and factors is not None and factors.takes_channels:
            states = self.in_pairs(states)
        joint = states.transpose(1, 2).flatten(2)
        latents = joint if factors is None else factors.project_down(joint)
        return latents.unflatten(-1, (self.num_latent_heads, -1)).transpose(1, 2)

    def rebuild(self, latents: Float[Tensor, "b l s _"], kind: Kind) -> Float[Tensor, "b g s d"]:
        """What the cache holds, as states again.

        Args:
            latents: As `project_down` made them.
            kind: Whose they are.

        Returns:
            (B, G, S, D) states; keys before the rotation with the channels of a pair side by side.
        """
        if not self.compress:
            return latents
        joint, factors, offset = latents.transpose(1, 2).flatten(2), self.factors[kind], self.offsets[kind]
        if factors is not None:
            joint = factors.rebuild(joint)
        if offset is not None:
            joint = joint + offset
        return joint.unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)

    def in_pairs(self, states: Float[Tensor, "b h s d"]) -> Float[Tensor, "b h s d"]:
        """With channels that rotate together side by side, as the keys' factors have them."""
        return states if self.pair_order is None else states[..., self.pair_order]


def num_latent_heads(readers: KeysValues[LatentReader | None]) -> int:
    """Heads of the cache: as many as both kinds have, else one."""
    counts = {0 if reader is None else reader.num_heads for reader in readers}
    return counts.pop() if len(counts) == 1 else 1


def compresses_unrotated_keys(factors: LayerFactors) -> bool:
    """Whether keys are projected before the rotation, where there is one."""
    return factors.keys is not None and not factors.keys.rotated


def project_states(states: Float[Tensor, "b g s d"], factors: Factors) -> Float[Tensor, "b g s d"]:
    """The states that a cache of their latents gives back.

    Args:
        states: Of all kv heads; keys before or after the rotation, as the factors want them.
        factors: On the states' device, in their dtype.
    """
    joint = factors.rebuild(factors.project_down(states.transpose(1, 2).flatten(2)))
    offset = factors.offset()
    joint = joint if offset is None else joint + offset
    return joint.unflatten(-1, (states.shape[1], -1)).transpose(1, 2)
