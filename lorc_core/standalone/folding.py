"""Projections folded into the weights that they follow, so that a model computes latents and never the states.

Shapes: N kv_width, I in_features, K latents of all blocks, W channels of a block.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from lorc_core.decomposition.factors import Factors
from lorc_core.model.blocks import Partition
from lorc_core.model.channels import join_blocks, split_blocks


@dataclass(frozen=True)
class StandaloneFactors(Factors):
    """Factors that hold their offset, not the mean it came from, and may find their latents ready.

    Attributes:
        constant: The offset.
        folded: Whether states arrive as `LatentProjection` lays them out: each block's latents in the first of its
            channels, zeros in the others.
    """

    constant: Float[Tensor, " n"] | None = None
    folded: bool = False

    @property
    def down(self) -> Float[Tensor, "k w"]:
        """Where folded, what picks the latents from their block's channels."""
        if not self.folded:
            return super().down
        eye = torch.eye(self.partition.width, device=self.up.device, dtype=self.up.dtype)
        return torch.cat([eye[:rank] for rank in self.ranks])

    @property
    def takes_channels(self) -> bool:
        """Whether what is projected are the channels of heads, in their order."""
        return not self.folded

    def reordered(self, order: Int[Tensor, " d"]) -> "StandaloneFactors":
        """For states whose channels of every head stand in another order."""
        reordered = super().reordered(order)
        assert isinstance(reordered, StandaloneFactors)
        if self.constant is None:
            return reordered
        by_head = self.constant.unflatten(0, (self.partition.num_kv_heads, -1))
        return replace(reordered, constant=by_head[:, order.to(by_head.device)].flatten())

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "StandaloneFactors":
        """The same factors elsewhere, or in another precision."""
        placed = super().to(device, dtype)
        assert isinstance(placed, StandaloneFactors)
        return replace(placed, constant=None if self.constant is None else self.constant.to(device, dtype))

    def project_down(self, states: Float[Tensor, "... n"]) -> Float[Tensor, "... k"]:
        """Latents of the states of all kv heads, block after block."""
        if not self.folded:
            return super().project_down(states)
        blocks = split_blocks(states, self.partition).unbind(-2)
        return torch.cat([block[..., :rank] for block, rank in zip(blocks, self.ranks, strict=True)], dim=-1)

    def offset(self) -> Float[Tensor, " n"] | None:
        """What must be added to rebuilt states."""
        return self.constant


class LatentProjection(nn.Linear):
    """W' = down @ W and b' = down @ b in place of a projection, its latents laid out in the states' shape.

    The module around it takes them for states: each block's latents stand in the first of its channels.

    Args:
        in_features: Of the projection that it replaces.
        partition: The blocks of the states.
        ranks: Of each block.
        bias: Whether it has one.
    """

    def __init__(self, in_features: int, partition: Partition, ranks: tuple[int, ...], bias: bool) -> None:
        super().__init__(in_features, sum(ranks), bias=bias)
        self.partition = partition
        self.ranks = ranks

    def forward(self, inputs: Float[Tensor, "... i"]) -> Float[Tensor, "... n"]:
        """Latents, padded with zeros to the shape of states."""
        latents = linear(inputs, self.weight, self.bias).split(self.ranks, dim=-1)
        width = self.partition.width
        blocks = [pad(part, (0, width - rank)) for part, rank in zip(latents, self.ranks, strict=True)]
        return join_blocks(torch.stack(blocks, dim=-2), self.partition)


@dataclass(frozen=True)
class Folded:
    """What is stored of one folded projection.

    Attributes:
        weight: Of the projection: down W.
        bias: Of the projection: down b.
        constant: What rebuilt states lack.
    """

    weight: Float[Tensor, "k i"]
    bias: Float[Tensor, " k"] | None
    constant: Float[Tensor, " n"] | None


def fold(weight: Float[Tensor, "n i"], bias: Float[Tensor, " n"] | None, factors: Factors) -> Folded:
    """Fold `down` into the projection whose outputs it projects; computed in float64, kept in the weight's dtype.

    The constant is what rebuilt states lack: with m the factors' mean and b the bias, m - up (down (m - b) + b'), with
    `up` and b' as they are stored.

    Args:
        weight: Of the projection, (out_features, in_features).
        bias: Of the projection.
        factors: Of its outputs.
    """
    exact = factors.to(weight.device, torch.float64)
    folded_weight = exact.project_down(weight.double().T).T.to(weight.dtype)
    folded_bias = None if bias is None else exact.project_down(bias.double()).to(weight.dtype)
    if exact.mean is None:
        return Folded(folded_weight, folded_bias, None)
    latents = exact.project_down(exact.mean if bias is None else exact.mean - bias.double())
    if folded_bias is not None:
        latents = latents + folded_bias.double()
    rebuilt = factors.to(weight.device, weight.dtype).to(weight.device, torch.float64).rebuild(latents)
    return Folded(folded_weight, folded_bias, (exact.mean - rebuilt).to(weight.dtype))
