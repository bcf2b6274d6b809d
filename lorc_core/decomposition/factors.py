"""Projections in the two forms that they are kept in: of every rank at once, and cut to the ranks of a schedule.

Shapes: N kv_width, B blocks, W channels of a block, K rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from lorc_core.errors import ConfigError
from lorc_core.model.blocks import Partition
from lorc_core.model.channels import join_blocks, split_blocks
from lorc_core.model.kinds import KeysValues, Kind
from lorc_core.ranks.spectra import KindSpectrum, LayerSpectrum, RankSchedule

ENERGIES = ("weight_energies", "state_energies", "read_energies")  # fields of a `Decomposition`


@dataclass(frozen=True, repr=False)
class Factors:
    """An affine projection, block by block: states ~ up @ (down @ states) + offset, offset = mean - up @ down @ mean.

    Attributes:
        partition: The blocks.
        ranks: Of each block.
        up: Rows for the W channels of one block; the columns stand block after block, as many as its rank for each.
        own_down: `down`, where it is not the transpose of an orthonormal `up`; None takes no memory.
        mean: The constant that is kept whole; None for zero. It is stored instead of the offset, so that the offset
            fits the factors in whatever precision they are used.
        rotated: Whether keys are projected after the rotation.
    """

    partition: Partition
    ranks: tuple[int, ...]
    up: Float[Tensor, "w k"]
    own_down: Float[Tensor, "k w"] | None
    mean: Float[Tensor, " n"] | None
    rotated: bool = False

    def __repr__(self) -> str:
        floats = f"{sum(self.ranks)} of {self.partition.kv_width} floats"
        facts = [name for name, holds in (("mean", self.mean is not None), ("rotated", self.rotated)) if holds]
        return f"Factors({', '.join([self.partition.block, floats, str(self.up.dtype), *facts])})"

    @property
    def down(self) -> Float[Tensor, "k w"]:
        return self.up.T if self.own_down is None else self.own_down

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored, by field name."""
        tensors = {"up": self.up, "own_down": self.own_down, "mean": self.mean}
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Factors":
        """The same factors elsewhere, or in another precision."""
        own_down = None if self.own_down is None else self.own_down.to(device, dtype)
        mean = None if self.mean is None else self.mean.to(device, dtype)
        return replace(self, up=self.up.to(device, dtype), own_down=own_down, mean=mean)

    @property
    def takes_channels(self) -> bool:
        """Whether what is projected are the channels of heads, in their order."""
        return True

    def reordered(self, order: Int[Tensor, " d"]) -> "Factors":
        """For states whose channels of every head stand in another order; real blocks only."""

        def rows(num_heads: int) -> Int[Tensor, " w"]:
            first = torch.arange(num_heads, device=order.device) * len(order)
            return (first[:, None] + order).flatten().to(self.up.device)

        of_block, of_all = rows(self.partition.heads_per_block), rows(self.partition.num_kv_heads)
        return replace(
            self,
            up=self.up[of_block],
            own_down=None if self.own_down is None else self.own_down[:, of_block],
            mean=None if self.mean is None else self.mean[of_all],
        )

    def project_down(self, states: Float[Tensor, "... n"]) -> Float[Tensor, "... k"]:
        """Latents of the states of all kv heads, block after block."""
        blocks = split_blocks(states, self.partition)
        if len(self.ranks) == 1:
            return blocks.squeeze(-2) @ self.down.T
        padded = torch.einsum("...bw,brw->...br", blocks, self._by_block(self.down)).flatten(-2)
        return padded if self._slots is None else padded[..., self._slots.to(padded.device)]

    def rebuild(self, latents: Float[Tensor, "... k"]) -> Float[Tensor, "... n"]:
        """The states that latents stand for, without the offset."""
        if len(self.ranks) == 1:
            rows = linear(latents.reshape(-1, latents.shape[-1]), self.up)  # one matrix product, not one for each row
            return join_blocks(rows.view(*latents.shape[:-1], 1, -1), self.partition)
        if self._slots is not None:
            padded = latents.new_zeros(*latents.shape[:-1], len(self.ranks) * max(self.ranks))
            latents = padded.index_copy(-1, self._slots.to(latents.device), latents)
        blocks = latents.unflatten(-1, (len(self.ranks), -1))
        return join_blocks(torch.einsum("...br,brw->...bw", blocks, self._by_block(self.up.T)), self.partition)

    def offset(self) -> Float[Tensor, " n"] | None:
        """What must be added to rebuilt states, computed in float64; None where there is no mean."""
        if self.mean is None:
            return None
        exact = self.to(self.up.device, torch.float64)
        assert exact.mean is not None
        return (exact.mean - exact.rebuild(exact.project_down(exact.mean))).to(self.up.dtype)

    @cached_property
    def _slots(self) -> Tensor | None:
        """Places of the latents among blocks padded to one rank; None where all have it."""
        if len(set(self.ranks)) == 1:
            return None
        most = max(self.ranks)
        return torch.cat([torch.arange(rank) + block * most for block, rank in enumerate(self.ranks)])

    def _by_block(self, rows: Float[Tensor, "k w"]) -> Float[Tensor, "b r w"]:
        """The rows of each block, padded with zeros to the largest rank."""
        if self._slots is None:
            return rows.unflatten(0, (len(self.ranks), -1))
        padded = rows.new_zeros(len(self.ranks) * max(self.ranks), rows.shape[1])
        return padded.index_copy(0, self._slots.to(rows.device), rows).unflatten(0, (len(self.ranks), -1))


@dataclass(frozen=True)
class Decomposition:
    """Every projection of one layer's keys or values at once: a block's rank K is the first K columns of its `up`.

    Attributes:
        partition: The blocks.
        up: By falling energy; orthonormal where `own_down` is None.
        own_down: `down` where it is not the transpose of `up`.
        mean: The constant known for the states (a bias); None for zero.
        rotated: Whether these are keys after the rotation.
        singular_values: Of the whole weight.
        log10_condition: Of the whole weight; see `log10_condition`.
        weight_energies: Squared singular values of each block's rows of the weight.
        state_energies: Eigenvalues of the states' second moment.
        read_energies: What each direction saves of the error that the method minimises.
    """

    partition: Partition
    up: Float[Tensor, "b w w"]
    own_down: Float[Tensor, "b w w"] | None
    mean: Float[Tensor, " n"] | None
    rotated: bool
    singular_values: Float[Tensor, " m"]
    log10_condition: float
    weight_energies: Float[Tensor, "b w"]
    state_energies: Float[Tensor, "b w"]
    read_energies: Float[Tensor, "b w"]

    def factors(self, ranks: Sequence[int]) -> Factors:
        """The projection with the given rank of each block.

        Args:
            ranks: Columns of `up` kept of each block, 0 to W; some block keeps one at least.

        Raises:
            ConfigError: A rank is out of range, or there are not as many as blocks.
        """
        blocks, width = self.up.shape[:2]
        if len(ranks) != blocks:
            raise ConfigError(f"there are {blocks} blocks, got {len(ranks)} ranks")
        for rank in ranks:
            if not 0 <= rank <= width:
                raise ConfigError(f"rank must be in 0..{width}, got {rank}")
        if not any(ranks):
            raise ConfigError(f"rank must be in 1..{width} in some block, got 0 in all")
        up = torch.cat([block[:, :rank] for block, rank in zip(self.up, ranks, strict=True)], dim=1)
        own_down = None
        if self.own_down is not None:
            own_down = torch.cat([block[:rank] for block, rank in zip(self.own_down, ranks, strict=True)])
        return Factors(self.partition, tuple(ranks), up, own_down, self.mean, self.rotated)


LayerFactors = KeysValues[Factors | None]  # None where the full width is kept
LayerDecomposition = KeysValues[Decomposition]
UNTOUCHED: LayerFactors = KeysValues(None, None)


def slice_layer(layer: LayerDecomposition, layer_idx: int, ranks: RankSchedule, dtype: torch.dtype) -> LayerFactors:
    """The factors of one layer at its scheduled ranks.

    Args:
        layer: Of every rank.
        layer_idx: Whose ranks of the schedule are taken.
        ranks: Of all layers.
        dtype: In which the factors are stored.

    Returns:
        On the CPU; None where the full width is kept.

    Raises:
        ConfigError: The ranks do not fit the layer's blocks.
    """
    chosen = ranks.layers[layer_idx]

    def cut(kind: Kind) -> Factors | None:
        if chosen.floats(kind) == ranks.kv_width:
            return None
        return layer[kind].factors(chosen[kind]).to("cpu", dtype)

    return KeysValues.of(cut)


def layer_spectrum(layer: LayerDecomposition) -> LayerSpectrum:
    """What the schedules need of a decomposed layer."""
    return LayerSpectrum(*layer.map(kind_spectrum))


def kind_spectrum(decomposition: Decomposition) -> KindSpectrum:
    """What the schedules need of one layer's keys or values."""
    energies = (getattr(decomposition, name).flatten().tolist() for name in ENERGIES)
    return KindSpectrum.of_flat(decomposition.partition, decomposition.log10_condition, *energies)


def log10_condition(singular_values: Float[Tensor, " m"], shape: Sequence[int]) -> float:
    """log10 of sigma_max / sigma_min; infinity where the matrix is rank-deficient in float64.

    Args:
        singular_values: Of the matrix, falling.
        shape: Of the matrix. The threshold is its larger side times the rounding unit, as in `matrix_rank`.

    Returns:
        LoRC's kappa (equation 10) as a logarithm to base 10.

    Source: LoRC, arXiv 2410.03111, equation 10
    """
    largest, smallest = singular_values[0].item(), singular_values[-1].item()
    if smallest <= max(shape) * torch.finfo(torch.float64).eps * largest:
        return math.inf
    return math.log10(largest) - math.log10(smallest)
