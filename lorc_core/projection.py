"""Projections of keys and values onto fewer directions: spectra and nested factors, from a weight alone.

With M = I and C = W W^T the best projection of the states is the top eigenvectors of C, which are the left
singular vectors of W: projecting the states is truncating the weight's SVD. Ranks are chosen elsewhere.

Shapes: N kv_width, I in_features, K rank.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.errors import ConfigError, NumericsError

# The Gram route squares the condition number. Worst relative error of a singular value over 8 seeds of 256 x 1024
# against QR + SVD: 1e-11 at kappa 3e3, 2e-6 at 1e6 (`lorc bench svd` prints both).
MAX_GRAM_CONDITION = 3e3

Route = Literal["gram", "qr"]


@dataclass(frozen=True)
class Factors:
    """An affine projection of rank K: states ~ up @ (down @ states) + offset, with offset = mean - up @ down @ mean.

    The mean is kept, not the offset, so that the offset fits the factors in whatever precision they are used.
    """

    up: Float[Tensor, "n k"]
    down: Float[Tensor, "k n"]
    mean: Float[Tensor, " n"] | None

    def offset(self) -> Float[Tensor, " n"] | None:
        """What must be added to rebuilt states, computed in float64; None where there is no mean."""
        if self.mean is None:
            return None
        mean = self.mean.double()
        return (mean - self.up.double() @ (self.down.double() @ mean)).to(self.up.dtype)


@dataclass(frozen=True)
class Decomposition:
    """Every projection of one layer's keys or values at once: rank K is the first K columns.

    `basis` is orthonormal, by falling singular value; `mean` is the constant known for the states (a bias).
    """

    basis: Float[Tensor, "n n"]
    singular_values: Float[Tensor, " m"]
    mean: Float[Tensor, " n"] | None

    def factors(self, rank: int) -> Factors:
        """The projection of the given rank, 1 <= rank <= N.

        Raises:
            ConfigError: `rank` is out of range.
        """
        width = self.basis.shape[0]
        if not 1 <= rank <= width:
            raise ConfigError(f"rank must be in 1..{width}, got {rank}")
        up = self.basis[:, :rank]
        return Factors(up=up, down=up.T, mean=self.mean)

    @property
    def log10_condition(self) -> float:
        return log10_condition(self.singular_values, max(self.basis.shape))


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
    return Decomposition(basis, singular_values, None if bias is None else bias.double())


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
