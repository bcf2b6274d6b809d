"""Keys that are cached before the rotation: rebuilt and rotated a few at a time to be read.

Shapes: B batch, H query heads, G kv heads, D head_dim, Q new tokens, S cached and new tokens, N kv_width, K latents of
all blocks, P pairs of rotated channels.
"""

from dataclasses import dataclass, replace

from jaxtyping import Complex, Float
from torch import Tensor

from lorc_core.attention.scores.absorbed import attention_scores, rotate_pairs
from lorc_core.decomposition.factors import Factors

# Rebuilt keys held at once: few enough to stay in a CPU's caches, or to be little beside an accelerator's memory.
CPU_CHUNK_BYTES = 8 << 20
ACCELERATOR_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class UnrotatedKeys:
    """Cached keys before the rotation.

    Attributes:
        latents: The cache.
        factors: With the channels of a pair side by side.
        offset: What rebuilt keys lack.
        turns: The rotation of every slot.
    """

    latents: Float[Tensor, "b 1 s k"]
    factors: Factors
    offset: Float[Tensor, " n"] | None
    turns: Complex[Tensor, "#b s p"]

    @property
    def num_slots(self) -> int:
        """S."""
        return self.latents.shape[2]

    def part(self, slots: slice) -> "UnrotatedKeys":
        """The keys of some slots."""
        return replace(self, latents=self.latents[:, :, slots], turns=self.turns[:, slots])

    def rotated(self, head_dim: int) -> Float[Tensor, "b s g d"]:
        """Whole keys, as they are read.

        Args:
            head_dim: D.
        """
        keys = self.factors.rebuild(self.latents.squeeze(1))
        keys = keys if self.offset is None else keys + self.offset
        return rotate_pairs(keys.unflatten(-1, (-1, head_dim)), self.turns[:, :, None], may_overwrite=True)


def rebuilt_scores(query: Float[Tensor, "b h q d"], keys: UnrotatedKeys) -> Float[Tensor, "b h q s"]:
    """Dot products of queries with keys that are rebuilt and rotated, a chunk of slots at a time.

    Args:
        query: Scaled and rotated, with the channels of a pair side by side.
        keys: What it reads.
    """
    scores = query.new_empty(*query.shape[:3], keys.num_slots)
    chunk_bytes = CPU_CHUNK_BYTES if query.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    slot_bytes = len(query) * keys.factors.partition.kv_width * max(keys.latents.element_size(), 4)
    chunk = max(1, chunk_bytes // slot_bytes)
    for start in range(0, keys.num_slots, chunk):
        part = slice(start, start + chunk)
        rotated = keys.part(part).rotated(query.shape[-1])
        scores[..., part] = attention_scores(query, rotated.transpose(1, 2))
        del rotated  # before the next ones are made: they take its place
    return scores
