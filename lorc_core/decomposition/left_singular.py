"""Left singular vectors and singular values of a weight, by the cheaper of two routes that is accurate enough.

Shapes: N rows, I columns, M = min(N, I).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.decomposition.symmetric import eigh, eigvalsh, gram

# The Gram route squares the condition number. Worst relative error of a singular value of a 1024 x 8192 matrix:
# 4.6e-11 at kappa 3e3, 3.8e-6 at 1e6; by QR + SVD 9.5e-15 and 2.0e-12 (`lorc bench svd`).
MAX_GRAM_CONDITION = 3e3

Route = Literal["gram", "qr"]


def left_singular(weight: Float[Tensor, "n i"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, " m"], Route]:
    """Left singular vectors and singular values of a matrix, by the cheaper safe route.

    The eigenvectors of the Gram matrix cost a tenth of an SVD but lose the small singular values of an
    ill-conditioned matrix, so past `MAX_GRAM_CONDITION` the matrix is reduced by QR and its factor decomposed.

    Args:
        weight: In float64.

    Returns:
        All N left singular vectors as columns, the M singular values, falling, and the route that was taken.
    """
    rows, columns = weight.shape
    if rows <= columns:
        basis, singular_values = left_singular_by_gram(weight)
        if singular_values[0] <= MAX_GRAM_CONDITION * singular_values[-1]:
            return basis, singular_values, "gram"
    return *left_singular_by_qr(weight), "qr"


def singular_values_of(weight: Float[Tensor, "n i"]) -> Float[Tensor, " m"]:
    """The singular values of `left_singular` alone."""
    rows, columns = weight.shape
    if rows <= columns:
        singular_values = eigvalsh(gram(weight)).flip(0).clamp(min=0).sqrt()
        if singular_values[0] <= MAX_GRAM_CONDITION * singular_values[-1]:
            return singular_values
    return torch.linalg.svdvals(torch.linalg.qr(weight.T, mode="r")[1])


def left_singular_by_gram(weight: Float[Tensor, "n i"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """W W^T = U S^2 U^T. For no more rows than columns; see `left_singular`."""
    eigenvalues, eigenvectors = eigh(gram(weight))
    return eigenvectors.flip(1), eigenvalues.flip(0).clamp(min=0).sqrt()


def left_singular_by_qr(weight: Float[Tensor, "n i"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, " m"]]:
    """W^T = QR, so W = R^T Q^T has the left singular vectors and the singular values of R^T; see `left_singular`."""
    triangle = torch.linalg.qr(weight.T, mode="r")[1]
    basis, singular_values, _ = torch.linalg.svd(triangle.T, full_matrices=True)
    return basis, singular_values
