"""The channels of all kv heads taken apart into the blocks of a partition, and put together again.

Shapes: N kv_width, B blocks, W channels of a block (N = B * W).
"""

import torch
from jaxtyping import Float, Num, Shaped
from torch import Tensor

from lorc_core.model.blocks import Partition


def split_blocks(states: Shaped[Tensor, "... n"], partition: Partition) -> Shaped[Tensor, "... b w"]:
    """The channels of each block, in the last dimension."""
    if partition.is_complex:
        by_part = states.unflatten(-1, (partition.num_kv_heads, *head_parts(partition)))
        by_part = by_part.transpose(-1, -2) if partition.interleaved else by_part
        return by_part.movedim(-1, -3).transpose(-1, -2).flatten(-2)
    return states.unflatten(-1, (partition.num_blocks, partition.width))


def join_blocks(blocks: Shaped[Tensor, "... b w"], partition: Partition) -> Shaped[Tensor, "... n"]:
    """The inverse of `split_blocks`."""
    if partition.is_complex:
        by_part = blocks.unflatten(-1, (2, partition.num_kv_heads)).transpose(-1, -2).movedim(-3, -1)
        return (by_part.transpose(-1, -2) if partition.interleaved else by_part).flatten(-3)
    return blocks.flatten(-2)


def head_parts(partition: Partition) -> tuple[int, int]:
    """How a head's channels stand: all real parts and then all imaginary ones, or pair after pair."""
    return (partition.num_blocks, 2) if partition.interleaved else (2, partition.num_blocks)


def diagonal_blocks(moment: Float[Tensor, "n n"], partition: Partition) -> Num[Tensor, "b w w"]:
    """Each block's part of a second moment of all channels; complex for `frequency`, over half the channels."""
    order = split_blocks(torch.arange(partition.kv_width, device=moment.device), partition)
    parts = moment[order[:, :, None], order[:, None, :]]
    if not partition.is_complex:
        return parts
    (aa, ab), (ba, bb) = (half.chunk(2, dim=-1) for half in parts.chunk(2, dim=-2))
    return torch.complex(aa + bb, ba - ab) / 2  # E[c c^H] / 2 of c = a + ib: the real moment over all rotations
