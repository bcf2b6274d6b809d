"""Projections of keys and values onto fewer directions: spectra and nested factors, from second moments.

With C the states' second moment and M that of what reads them, the projection minimises tr(M (I-P) C (I-P)^T), block
by block. With M = I and C = W W^T that is the weight's truncated SVD. Ranks are chosen elsewhere.

Shapes: N kv_width, I in_features, B blocks, W channels of a block (complex: V = W / 2), K rank.
"""

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lorc_core.decomposition.factors import Decomposition, log10_condition
from lorc_core.decomposition.left_singular import left_singular, singular_values_of
from lorc_core.decomposition.moments import Moments
from lorc_core.decomposition.symmetric import eigh, eigvalsh, gram
from lorc_core.errors import NumericsError
from lorc_core.methods import BALANCED_READERS, Reader
from lorc_core.model.blocks import Partition
from lorc_core.model.channels import diagonal_blocks, split_blocks

MIN_RELATIVE_EIGENVALUE = 1e-12  # below this a direction of a second moment counts as empty


def decompose(
    moments: Moments, weight: Float[Tensor, "n i"], partition: Partition, reader: Reader, *, rotated: bool
) -> Decomposition:
    """Best projections of each block, at every rank, in the sense of `reader`.

    `interaction` minimises tr(M (I - P) C (I - P)^T): with U S V^T = svd(M^{1/2} C^{1/2}), up = M^{-1/2} U S^{1/2},
    down = S^{1/2} V^T C^{-1/2}, and the error at rank K is the sum of S^2 past K; `gradient` too, with M of the loss's
    gradient. `none` is the same with M = I: the
    top eigenvectors of C. `stacked` takes those of C + M, the SVD of [K; Q].

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
    for name, tensor in (
        ("weight", weight),
        ("states' second moment", moments.states),
        ("readers' second moment", moments.readers),
        ("bias", moments.mean),
    ):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise NumericsError(f"the {name} holds NaN or infinity")
    states, readers = (diagonal_blocks(moment, partition) for moment in (moments.states, moments.readers))
    own_down = None
    if reader in BALANCED_READERS:
        up, own_down, read_energies = balanced_factors(states, readers)
    else:
        eigenvalues, vectors = eigh(states if reader == "none" else states + readers)
        up, read_energies = vectors.flip(-1), eigenvalues.flip(-1).clamp(min=0)
    state_energies = read_energies if reader == "none" else eigvalsh(states).flip(-1).clamp(min=0)
    exact = weight.double()
    singular_values = singular_values_of(exact)
    if partition.width == len(exact) and not partition.is_complex:  # one block, whose energies these are
        weight_energies = _padded_energies(singular_values, partition.width)[None]
    else:
        weight_energies = eigvalsh(diagonal_blocks(gram(exact), partition)).flip(-1).clamp(min=0)
    return Decomposition(
        partition=partition,
        up=_as_real(up),
        own_down=None if own_down is None else _as_real(own_down.mH).mT,
        mean=moments.mean,
        rotated=rotated,
        singular_values=singular_values,
        log10_condition=log10_condition(singular_values, exact.shape),
        **{  # a complex direction is two floats of a latent, each worth as much
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
    """The projections of each block that lose least of what is read: tr(M (I-P) C (I-P)^T) is least at every rank.

    Args:
        states: C of each block, symmetric (Hermitian) positive semidefinite.
        readers: M of each block, likewise.

    Returns:
        `up` and `down` of full rank, whose first K columns and rows are the projection of rank K, and the squared
        singular values of M^{1/2} C^{1/2}, falling: those past K add up to the error at rank K.

    Source: KQ-SVD, arXiv 2512.05916, theorem 2, from Gram matrices.
    """
    blocks = []
    for block_C, block_M in zip(states, readers, strict=True):
        root_C, inverse_root_C = _psd_roots(block_C)
        root_M, inverse_root_M = _psd_roots(block_M)
        # The error is ||M^{1/2} C^{1/2} - M^{1/2} P C^{1/2}||^2: cut the SVD of the first, then solve for P.
        U, spectrum, Vh = torch.linalg.svd(root_M @ root_C)
        # Where S stands is free. Split in two roots, latents and what reads them have the same moment S.
        balance = spectrum.sqrt()
        blocks.append((inverse_root_M @ U * balance, balance[:, None] * (Vh @ inverse_root_C), spectrum.square()))
    up, down, energies = (torch.stack(parts) for parts in zip(*blocks, strict=True))
    return up, down, energies


def decompose_weight(weight: Float[Tensor, "n i"], partition: Partition, mean: Tensor | None) -> Decomposition:
    """`decompose` for C = W W^T and no reader, without squaring the condition number of an ill-conditioned weight.

    With W = U Sigma V^T, `up` is U and `down` U^T: the latents U^T W x are LoRC's Sigma V^T x, and what reads them
    takes in U.

    Args:
        weight: (kv_width, in_features), as in `nn.Linear.weight`.
        partition: Real blocks.
        mean: The bias, which every projection keeps whole; None for zero.

    Returns:
        All factors in float64; the three energies are the same, squared singular values of each block's rows.

    Raises:
        NumericsError: The weight or the bias holds NaN or infinity.

    Source: LoRC, arXiv 2410.03111, section 4.1, equations 5 to 9; Eckart and Young 1936, https://doi.org/10.1007/BF02288367
    """
    if not torch.isfinite(weight).all() or (mean is not None and not torch.isfinite(mean).all()):
        raise NumericsError("the weight or its bias holds NaN or infinity")
    rows = split_blocks(weight.double().T, partition).movedim(0, -1)
    blocks = [left_singular(block)[:2] for block in rows]
    energies = torch.stack([_padded_energies(singular_values, partition.width) for _, singular_values in blocks])
    whole = blocks[0][1] if len(blocks) == 1 else singular_values_of(weight.double())
    up = torch.stack([basis for basis, _ in blocks])
    return Decomposition(
        partition=partition,
        up=up,
        own_down=None,
        mean=mean,
        rotated=False,
        singular_values=whole,
        log10_condition=log10_condition(whole, weight.shape),
        weight_energies=energies,
        state_energies=energies,
        read_energies=energies,
    )


def _padded_energies(singular_values: Float[Tensor, " m"], width: int) -> Float[Tensor, " w"]:
    """Squares, with zeros for the directions that a weight narrower than its output does not have."""
    energies = singular_values.new_zeros(width)
    energies[: len(singular_values)] = singular_values.square()
    return energies


def _as_real(blocks: Num[Tensor, "b v v"]) -> Float[Tensor, "b w w"]:
    """Columns for real latents: real matrices as they are; complex ones on (real parts, imaginary parts).

    The result commutes with the rotation of (a, b) as a + ib, and conjugate transposes become transposes.
    """
    if not blocks.is_complex():
        return blocks
    # A latent l = x + iy adds u l to the states: its x adds (Re u, Im u) to their two parts, its y (-Im u, Re u).
    real, imaginary = blocks.real, blocks.imag
    of_x, of_y = torch.cat([real, imaginary], dim=-2), torch.cat([-imaginary, real], dim=-2)
    return torch.stack([of_x, of_y], dim=-1).flatten(-2)  # x and y of a latent stand side by side


def _psd_roots(moment: Num[Tensor, "n n"]) -> tuple[Num[Tensor, "n n"], Num[Tensor, "n n"]]:
    """Square root and pseudo-inverse square root of a symmetric (Hermitian) positive semidefinite matrix."""
    eigenvalues, vectors = eigh(moment)
    kept = eigenvalues > MIN_RELATIVE_EIGENVALUE * eigenvalues[-1]
    values, vectors = eigenvalues[kept].sqrt(), vectors[:, kept]
    return vectors * values @ vectors.mH, vectors / values @ vectors.mH
