"""How the key or value channels of one layer are split into blocks that are projected apart.

Numbers and names alone, so that a zoo file is read without torch; `channels` splits tensors so.
"""

import re
from dataclasses import dataclass

from lorc_core.errors import ConfigError
from lorc_core.model.rotary import Rotary

BLOCKS = "joint, head, group(HEADS), frequency"
COMPLEX_BLOCKS = ("frequency", "interleaved_frequency")


def group_size(block: str) -> int | None:
    """The number of kv heads in "group(4)"; None for another block."""
    match = re.fullmatch(r"group\((\d+)\)", block)
    return int(match[1]) if match else None


def check_block(block: str) -> None:
    """Raise ConfigError unless a block of that name can exist."""
    if block not in ("joint", "head", "frequency") and not group_size(block):
        raise ConfigError(f"block {block!r} is not known; known are {BLOCKS}")


@dataclass(frozen=True)
class Partition:
    """How one layer's keys or values are split into blocks.

    - `joint`: one block of all kv heads.
    - `group(h)`: one for every h neighbouring heads.
    - `head`: one per head.
    - `frequency`: one per rotary frequency, over all heads. Its channels are the first channel of that pair in every
      head, then the second; the projection takes the two as real and imaginary part of a complex number, so that it
      commutes with the rotation.
    - `interleaved_frequency`: the same where the two channels of a pair are neighbours, not half a head apart.

    Attributes:
        block: One of these.
        num_kv_heads: Of the layer.
        head_dim: Channels of a head.
    """

    block: str
    num_kv_heads: int
    head_dim: int

    @property
    def kv_width(self) -> int:
        """Channels of all blocks."""
        return self.num_kv_heads * self.head_dim

    @property
    def is_complex(self) -> bool:
        """Whether blocks are projected as complex numbers."""
        return self.block in COMPLEX_BLOCKS

    @property
    def num_blocks(self) -> int:
        """Blocks of a layer."""
        if self.is_complex:
            return self.head_dim // 2
        return self.num_kv_heads // self.heads_per_block

    @property
    def width(self) -> int:
        """Channels of a block."""
        return self.kv_width // self.num_blocks

    @property
    def heads_per_block(self) -> int:
        """Kv heads that a block has channels of."""
        return {"head": 1}.get(self.block) or group_size(self.block) or self.num_kv_heads

    @property
    def rank_step(self) -> int:
        """Ranks of a block are multiples of this: a complex latent takes two floats."""
        return 2 if self.is_complex else 1

    @property
    def equal_ranks(self) -> bool:
        """Whether all blocks of a layer must have one rank: attention kernels need equal heads."""
        return self.block == "head"

    @property
    def interleaved(self) -> bool:
        """Whether the two parts of a complex channel are neighbours in a head, not half a head apart."""
        return self.block == "interleaved_frequency"


def partition_of(block: str, num_kv_heads: int, head_dim: int, rotary: Rotary | None) -> Partition:
    """The partition of a model's keys or values.

    Args:
        block: As in `Axes.block`.
        num_kv_heads: Of a layer.
        head_dim: Channels of a head.
        rotary: How keys are rotated; None where they are not.

    Raises:
        ConfigError: A group does not divide the kv heads, or not every channel has a rotary frequency.
    """
    heads = group_size(block)
    if heads is not None and num_kv_heads % heads:
        divisors = [str(size) for size in range(1, num_kv_heads + 1) if num_kv_heads % size == 0]
        raise ConfigError(
            f"block {block}: {heads} does not divide the model's {num_kv_heads} kv heads; possible are "
            f"{', '.join(divisors)}"
        )
    if block != "frequency":
        return Partition(block, num_kv_heads, head_dim)
    if rotary is None:
        raise ConfigError("block frequency: the model has no rotary embedding")
    if rotary.num_channels != head_dim:
        raise ConfigError(
            f"block frequency: of {head_dim} channels of a head only {rotary.num_channels} have a rotary frequency"
        )
    return Partition("interleaved_frequency" if rotary.interleaved else "frequency", num_kv_heads, head_dim)
