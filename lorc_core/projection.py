"""Projections of keys and values onto fewer directions: spectra and nested factors, from second moments.

With C the states' second moment and M that of what reads them, the projection minimises tr(M (I-P) C (I-P)^T), block
by block. With M = I and C = W W^T that is the weight's truncated SVD. Ranks are chosen elsewhere.

Shapes: N kv_width, I in_features, B blocks, W channels of a block (complex: V = W / 2), K rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn.functional import linear

from lorc_core.architecture import Kind
from lorc_core.blocks import Partition
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.methods import Reader
from lorc_core.moments import Moments
from lorc_core.spectra import KindSpectrum, LayerSpectrum

# The Gram route squares the condition number. Worst relative error of a singular value of a 1024 x 8192 matrix:
# 4.6e-11 at kappa 3e3, 3.8e-6 at 1e6; by QR + SVD 9.5e-15 and 2.0e-12 (`lorc bench svd`).
MAX_GRAM_CONDITION = 3e3
MIN_RELATIVE_EIGENVALUE = 1e-12  # below this a direction of a second moment counts as empty

ENERGIES = ("weight_energies", "state_energies", "read_energies")  # fields of a `Decomposition`

Route = Literal["gram", "qr"]


@dataclass(frozen=True)
class Factors:
    """An affine projection, block by block: states ~ up @ (down @ states) + offset, offset = mean - up @ down @ mean.

    The columns of `up` stand block after block, `ranks` of them for each, with rows for the channels of one block. The
    mean is kept, not the offset, so that the offset fits the factors in whatever precision they are used. `own_down`
    is None where `down` is the transpose of an orthonormal `up` and takes no memory. `rotated` says whether keys are
    projected after the rotation.
    """

    partition: Partition
    ranks: tuple[int, ...]
    up: Float[Tensor, "w k"]
    own_down: Float[Tensor, "k w"] | None
    mean: Float[Tensor, " n"] | None
    rotated: bool = False

    @property
    def down(self) -> Float[Tensor, "k w"]:
        return self.up.T if self.own_down is None else self.own_down

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored, by field name."""
        found = {"up": self.up, "own_down": self.own_down, "mean": self.mean}
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}

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
        blocks = self.partition.split(states)
        if len(self.ranks) == 1:
            return blocks.squeeze(-2) @ self.down.T
        padded = torch.einsum("...bw,brw->...br", blocks, self._by_block(self.down)).flatten(-2)
        return padded if self._slots is None else padded[..., self._slots.to(padded.device)]

    def rebuild(self, latents: Float[Tensor, "... k"]) -> Float[Tensor, "... n"]:
        """The states that latents stand for, without the offset."""
        if len(self.ranks) == 1:
            rows = linear(latents.reshape(-1, latents.shape[-1]), self.up)  # one matrix product, not one for each row
            return self.partition.join(rows.view(*latents.shape[:-1], 1, -1))
        if self._slots is not None:
            padded = latents.new_zeros(*latents.shape[:-1], len(self.ranks) * max(self.ranks))
            latents = padded.index_copy(-1, self._slots.to(latents.device), latents)
        blocks = latents.unflatten(-1, (len(self.ranks), -1))
        return self.partition.join(torch.einsum("...br,brw->...bw", blocks, self._by_block(self.up.T)))

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
        mean: The constant known for the states (a bias).
        rotated: Whether these are keys after the rotation.
        singular_values: Of the whole weight.
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
    weight_energies: Float[Tensor, "b w"]
    state_energies: Float[Tensor, "b w"]
    read_energies: Float[Tensor, "b w"]

    def factors(self, ranks: Sequence[int]) -> Factors:
        """The projection with the given rank of each block.

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

    @property
    def log10_condition(self) -> float:
        return log10_condition(self.singular_values, self.partition.kv_width)


LayerDecomposition = dict[Kind, Decomposition]


def layer_spectrum(layer: LayerDecomposition) -> LayerSpectrum:
    """What the schedules need of a decomposed layer."""
    return LayerSpectrum(keys=kind_spectrum(layer["keys"]), values=kind_spectrum(layer["values"]))


def kind_spectrum(found: Decomposition) -> KindSpectrum:
    energies = (getattr(found, name).flatten().tolist() for name in ENERGIES)
    return KindSpectrum.of_flat(found.partition, found.log10_condition, *energies)


def decompose(
    moments: Moments, weight: Float[Tensor, "n i"], partition: Partition, reader: Reader, *, rotated: bool
) -> Decomposition:
    """Best projections of each block, at every rank, in the sense of `reader`.

    `interaction` minimises tr(M (I - P) C (I - P)^T): with U S V^T = svd(M^{1/2} C^{1/2}), up = M^{-1/2} U S^{1/2},
    down = S^{1/2} V^T C^{-1/2}, and the error at rank K is the sum of S^2 past K. `none` is the same with M = I: the
    top eigenvectors of C. `stacked` takes those of C + M.

    Args:
        moments: C, M and the mean of the states.
        weight: (kv_width, in_features), as in `nn.Linear.weight`, for the spectra that schedules read.
        partition: The blocks.
        reader: What is minimised.
        rotated: Whether these are keys after the rotation.

    Returns:
        All factors in float64.

    Raises:
        NumericsError: A moment or the weight holds NaN or infinity.

    Source: KQ-SVD, arXiv 2512.05916, theorem 2, from Gram matrices; Eigen Attention, arXiv 2408.05646 (`stacked`).
    """
    for name, found in (
        ("weight", weight),
        ("states' second moment", moments.states),
        ("readers' second moment", moments.readers),
        ("bias", moments.mean),
    ):
        if found is not None and not torch.isfinite(found).all():
            raise NumericsError(f"the {name} holds NaN or infinity")
    states, readers = partition.diagonal(moments.states), partition.diagonal(moments.readers)
    state_energies = torch.linalg.eigvalsh(states).flip(-1).clamp(min=0)
    own_down = None
    if reader == "interaction":
        up, own_down, read_energies = balanced_factors(states, readers)
    else:
        eigenvalues, vectors = torch.linalg.eigh(states if reader == "none" else states + readers)
        up, read_energies = vectors.flip(-1), eigenvalues.flip(-1).clamp(min=0)
    exact = weight.double()
    weight_energies = torch.linalg.eigvalsh(partition.diagonal(exact @ exact.T)).flip(-1).clamp(min=0)
    return Decomposition(
        partition=partition,
        up=as_real(up),
        own_down=None if own_down is None else as_real(own_down.mH).mT,
        mean=moments.mean,
        rotated=rotated,
        singular_values=left_singular(exact)[1],
        **{
            name: energies.repeat_interleave(partition.rank_step, dim=-1)
            for name, energies in (
                ("weight_energies", weight_energies),
                ("state_energies", state_energies),
                ("read_energies", read_energies),
            )
        },
    )


def balanced_factors(
    states: Num[Tensor, "b w w"], readers: Num[Tensor, "b w w"]
) -> tuple[Num[Tensor, "b w w"], Num[Tensor, "b w w"], Float[Tensor, "b w"]]:
    """`up`, `down` and the squared singular values of M^{1/2} C^{1/2} for each block."""
    found = []
    for block_C, block_M in zip(states, readers, strict=True):
        root_C, inverse_root_C = psd_roots(block_C)
        root_M, inverse_root_M = psd_roots(block_M)
        U, spectrum, Vh = torch.linalg.svd(root_M @ root_C)
        balance = spectrum.sqrt()
        found.append((inverse_root_M @ U * balance, balance[:, None] * (Vh @ inverse_root_C), spectrum.square()))
    up, down, energies = (torch.stack(parts) for parts in zip(*found, strict=True))
    return up, down, energies


def decompose_weight(weight: Float[Tensor, "n i"], partition: Partition, mean: Tensor | None) -> Decomposition:
    """`decompose` for C = W W^T and no reader, without squaring the condition number of an ill-conditioned weight.

    Args:
        weight: (kv_width, in_features), as in `nn.Linear.weight`.
        partition: Real blocks.
        mean: The bias.

    Raises:
        NumericsError: The weight or the bias holds NaN or infinity.

    Source: LoRC, arXiv 2410.03111, section 3; Eckart and Young 1936, https://doi.org/10.1007/BF02288367
    """
    if not torch.isfinite(weight).all() or (mean is not None and not torch.isfinite(mean).all()):
        raise NumericsError("the weight or its bias holds NaN or infinity")
    rows = partition.split(weight.double().T).movedim(0, -1)
    found = [left_singular(block) for block in rows]
    energies = torch.stack([padded_energies(values, partition.width) for _, values, _ in found])
    whole = found[0][1] if len(found) == 1 else left_singular(weight.double())[1]
    up = torch.stack([basis for basis, _, _ in found])
    return Decomposition(partition, up, None, mean, False, whole, energies, energies, energies)


def padded_energies(singular_values: Float[Tensor, " m"], width: int) -> Float[Tensor, " w"]:
    """Squares, with zeros for the directions that a weight narrower than its output does not have."""
    energies = singular_values.new_zeros(width)
    energies[: len(singular_values)] = singular_values.square()
    return energies


def as_real(blocks: Num[Tensor, "b v v"]) -> Float[Tensor, "b w w"]:
    """Columns for real latents: real matrices as they are; complex ones on (real parts, imaginary parts).

    A complex latent is two floats in a row. The result commutes with the rotation of (a, b) as a + ib.
    """
    if not blocks.is_complex():
        return blocks
    real, imaginary = blocks.real, blocks.imag
    of_real, of_imaginary = torch.cat([real, imaginary], dim=-2), torch.cat([-imaginary, real], dim=-2)
    return torch.stack([of_real, of_imaginary], dim=-1).flatten(-2)


def psd_roots(moment: Num[Tensor, "n n"]) -> tuple[Num[Tensor, "n n"], Num[Tensor, "n n"]]:
    """Square root and pseudo-inverse square root of a symmetric (Hermitian) positive semidefinite matrix."""
    eigenvalues, vectors = torch.linalg.eigh(moment)
    kept = eigenvalues > MIN_RELATIVE_EIGENVALUE * eigenvalues[-1]
    values, vectors = eigenvalues[kept].sqrt(), vectors[:, kept]
    return vectors * values @ vectors.mH, vectors / values @ vectors.mH


def left_singular(weight: Float[Tensor, "n i"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, " m"], Route]:
    """Left singular vectors and min(N, I) singular values, falling, of a float64 matrix, by the cheaper safe route.

    The eigenvectors of the Gram matrix cost a tenth of an SVD but lose the small singular values of an
    ill-conditioned matrix, so past `MAX_GRAM_CONDITION` the matrix is reduced by QR and its factor decomposed.
    """
    rows, columns = weight.shape
    if rows <= columns:
        basis, singular_values = left_singular_by_gram(weight)
        if singular_values[0] <= MAX_GRAM_CONDITION * singular_values[-1]:
            return basis, singular_values, "gram"
    return *left_singular_by_qr(weight), "qr"


def left_singular_by_gram(weight: Float[Tensor, "n i"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    eigenvalues, eigenvectors = torch.linalg.eigh(weight @ weight.T)
    return eigenvectors.flip(1), eigenvalues.flip(0).clamp(min=0).sqrt()


def left_singular_by_qr(weight: Float[Tensor, "n i"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, " m"]]:
    """W^T = QR, so W = R^T Q^T has the left singular vectors and the singular values of R^T."""
    triangle = torch.linalg.qr(weight.T, mode="r")[1]
    basis, singular_values, _ = torch.linalg.svd(triangle.T, full_matrices=True)
    return basis, singular_values


def log10_condition(singular_values: Float[Tensor, " m"], size: int) -> float:
    """log10 of sigma_max / sigma_min; infinity where the matrix is rank-deficient in float64.

    Args:
        singular_values: Falling.
        size: The larger dimension of the matrix, for the rounding threshold (that of `matrix_rank`).
    """
    largest, smallest = singular_values[0].item(), singular_values[-1].item()
    if smallest <= size * torch.finfo(torch.float64).eps * largest:
        return math.inf
    return math.log10(largest) - math.log10(smallest)
