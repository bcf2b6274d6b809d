"""Projections of keys and values onto fewer directions: spectra and nested factors, from second moments.

With C the states' second moment and M that of what reads them, the projection minimises tr(M (I-P) C (I-P)^T). With
M = I and C = W W^T that is the weight's truncated SVD. Ranks are chosen elsewhere.

Shapes: N kv_width, I in_features, K rank.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.errors import ConfigError, NumericsError
from lorc_core.moments import Moments

# The Gram route squares the condition number. Worst relative error of a singular value of a 1024 x 8192 matrix:
# 4.6e-11 at kappa 3e3, 3.8e-6 at 1e6; by QR + SVD 9.5e-15 and 2.0e-12 (`lorc bench svd`).
MAX_GRAM_CONDITION = 3e3
MIN_RELATIVE_EIGENVALUE = 1e-12  # below this a direction of a second moment counts as empty

Route = Literal["gram", "qr"]


@dataclass(frozen=True)
class Factors:
    """An affine projection of rank K: states ~ up @ (down @ states) + offset, with offset = mean - up @ down @ mean.

    The mean is kept, not the offset, so that the offset fits the factors in whatever precision they are used.
    `own_down` is None where `down` is the transpose of an orthonormal `up` and takes no memory.
    """

    up: Float[Tensor, "n k"]
    own_down: Float[Tensor, "k n"] | None
    mean: Float[Tensor, " n"] | None

    @property
    def down(self) -> Float[Tensor, "k n"]:
        return self.up.T if self.own_down is None else self.own_down

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored, by field name."""
        found = {"up": self.up, "own_down": self.own_down, "mean": self.mean}
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Factors":
        """The same factors elsewhere, or in another precision."""
        own_down = None if self.own_down is None else self.own_down.to(device, dtype)
        mean = None if self.mean is None else self.mean.to(device, dtype)
        return Factors(self.up.to(device, dtype), own_down, mean)

    def offset(self) -> Float[Tensor, " n"] | None:
        """What must be added to rebuilt states, computed in float64; None where there is no mean."""
        if self.mean is None:
            return None
        mean = self.mean.double()
        return (mean - self.up.double() @ (self.down.double() @ mean)).to(self.up.dtype)


@dataclass(frozen=True)
class Decomposition:
    """Every projection of one layer's keys or values at once: rank K is the first K columns of `up`.

    Attributes:
        up: By falling energy; orthonormal where `own_down` is None.
        own_down: `down` where it is not the transpose of `up`.
        mean: The constant known for the states (a bias).
        singular_values: Of the weight.
        state_energies: Eigenvalues of the states' second moment.
        read_energies: What each direction saves of the error that the method minimises.
    """

    up: Float[Tensor, "n n"]
    own_down: Float[Tensor, "n n"] | None
    mean: Float[Tensor, " n"] | None
    singular_values: Float[Tensor, " m"]
    state_energies: Float[Tensor, " _"]
    read_energies: Float[Tensor, " _"]

    def factors(self, rank: int) -> Factors:
        """The projection of the given rank, 1 <= rank <= N.

        Raises:
            ConfigError: `rank` is out of range.
        """
        width = self.up.shape[0]
        if not 1 <= rank <= width:
            raise ConfigError(f"rank must be in 1..{width}, got {rank}")
        return Factors(self.up[:, :rank], None if self.own_down is None else self.own_down[:rank], self.mean)

    @property
    def log10_condition(self) -> float:
        return log10_condition(self.singular_values, max(self.up.shape))


def decompose(weight: Float[Tensor, "n i"], bias: Float[Tensor, " n"] | None) -> Decomposition:
    """Best projections of the states `weight @ x + bias` for white x, at every rank (LoRC).

    Args:
        weight: (kv_width, in_features), as in `nn.Linear.weight`.
        bias: Added after the weight; kept whole by every projection.

    Returns:
        All factors in float64.

    Raises:
        NumericsError: The weight or bias holds NaN or infinity.

    Source: LoRC, arXiv 2410.03111, section 3; Eckart and Young 1936, https://doi.org/10.1007/BF02288367
    """
    if not torch.isfinite(weight).all() or (bias is not None and not torch.isfinite(bias).all()):
        raise NumericsError("the weight or its bias holds NaN or infinity")
    basis, singular_values, _ = left_singular(weight.double())
    energies = singular_values.square()
    return Decomposition(basis, None, None if bias is None else bias.double(), singular_values, energies, energies)


def decompose_moments(moments: Moments, singular_values: Float[Tensor, " m"]) -> Decomposition:
    """Best projections, at every rank, of what is read: they minimise tr(M (I - P) C (I - P)^T).

    With U S V^T = svd(M^{1/2} C^{1/2}): up = M^{-1/2} U S^{1/2}, down = S^{1/2} V^T C^{-1/2}, and the error at rank K
    is the sum of S^2 past K.

    Args:
        moments: C, M and the mean of the states.
        singular_values: Of the weight, for the schedules.

    Returns:
        All factors in float64.

    Raises:
        NumericsError: A moment holds NaN or infinity.

    Source: KQ-SVD, arXiv 2512.05916, theorem 2, from Gram matrices.
    """
    for name, moment in (("states", moments.states), ("readers", moments.readers)):
        if not torch.isfinite(moment).all():
            raise NumericsError(f"the second moment of the {name} holds NaN or infinity")
    root_C, inverse_root_C = psd_roots(moments.states)
    root_M, inverse_root_M = psd_roots(moments.readers)
    U, spectrum, Vh = torch.linalg.svd(root_M @ root_C)
    balance = spectrum.sqrt()
    return Decomposition(
        up=inverse_root_M @ U * balance,
        own_down=balance[:, None] * (Vh @ inverse_root_C),
        mean=moments.mean,
        singular_values=singular_values,
        state_energies=torch.linalg.eigvalsh(moments.states).flip(0).clamp(min=0),
        read_energies=spectrum.square(),
    )


def psd_roots(moment: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Square root and pseudo-inverse square root of a symmetric positive semidefinite matrix."""
    eigenvalues, vectors = torch.linalg.eigh(moment)
    kept = eigenvalues > MIN_RELATIVE_EIGENVALUE * eigenvalues[-1]
    values, vectors = eigenvalues[kept].sqrt(), vectors[:, kept]
    return vectors * values @ vectors.T, vectors / values @ vectors.T


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
