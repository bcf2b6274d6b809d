"""Queries and cached latents of every shape that the fused kernel knows, and how far two scores are apart."""

from dataclasses import dataclass, replace

import torch

from lorc_core.attention.scores.rebuilt import UnrotatedKeys
from lorc_core.decomposition.factors import Factors
from lorc_core.model.blocks import Partition

BATCH_SIZE, CACHED = 2, 150  # not a whole number of tiles


@dataclass(frozen=True)
class Case:
    """Grouped queries and an offset, one rotation for all rows of the batch, every pair of channels turned.

    `is_strided` lays factors and latents out the other way, ranks apart.
    """

    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 20
    block: str = "joint"
    ranks: tuple[int, ...] = (37,)
    num_new: int = 2
    num_turned: int | None = None
    has_offset: bool = True
    num_turns: int = 1
    dtype: torch.dtype = torch.float32
    is_strided: bool = False

    def arguments(self, seed=0):
        """Latents are a part of a longer cache, and turns of a longer table."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(self.dtype)

        partition, rank = Partition(self.block, self.num_kv_heads, self.head_dim), sum(self.ranks)
        up = random(rank, partition.width).T if self.is_strided else random(partition.width, rank)
        factors = Factors(partition, self.ranks, up, None, None)
        query = random(BATCH_SIZE, self.num_heads, self.num_new, self.head_dim)
        latents = random(BATCH_SIZE, 1, CACHED + 9, rank)[:, :, 5 : CACHED + 5]
        latents = latents.mT.contiguous().mT if self.is_strided else latents
        offset = random(partition.kv_width) if self.has_offset else None
        angles = torch.randn(self.num_turns, CACHED + 9, self.num_turned or self.head_dim // 2, generator=generator)
        turns = torch.polar(torch.ones(()), angles)[:, 3 : CACHED + 3]
        return query, UnrotatedKeys(latents, factors, offset, turns)


CASES = {
    "grouped queries": Case(),
    "as many heads": Case(num_heads=2, num_new=1),
    "one kv head, two tiles of rows": Case(num_heads=12, num_kv_heads=1, num_new=3),
    "small heads": Case(head_dim=8, ranks=(5,)),
    "heads of 128, many tiles of ranks": Case(head_dim=128, ranks=(80,)),
    "no offset": Case(has_offset=False),
    "a part of the channels turned": Case(num_turned=6),
    "turns of every row": Case(num_turns=BATCH_SIZE),
    "groups of one rank": Case(num_heads=8, num_kv_heads=4, block="group(2)", ranks=(32, 32)),
    "groups of two ranks": Case(num_heads=8, num_kv_heads=4, block="group(2)", ranks=(7, 40)),
    "a group without a rank": Case(num_heads=8, num_kv_heads=4, block="group(2)", ranks=(9, 0)),
    "heads apart": Case(block="head", ranks=(12, 12)),
    "ranks apart": Case(is_strided=True),
    "half precision": Case(dtype=torch.float16),
    "half precision, groups": Case(num_kv_heads=4, num_heads=8, block="group(2)", ranks=(70, 9), dtype=torch.float16),
}


def in_float32(query, keys):
    offset = None if keys.offset is None else keys.offset.float()
    factors = keys.factors.to("cpu", torch.float32)
    return query.float(), replace(keys, latents=keys.latents.float(), factors=factors, offset=offset)


def difference(found, expected):
    """Relative to the largest score."""
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()
