"""Gram matrices and eigenvectors of symmetric matrices, by what is fastest for the size and the device.

torch has no symmetric product, and on a CPU its LAPACK loses to SciPy's where matrices are wide. From `WIDE` on the
Gram matrix is BLAS's `syrk`, half the work of a product, and the eigenvectors are `evd` by SciPy, which copies less and
needs half of torch's time for the eigenvalues alone (`lorc bench svd`). Half of the eigenvectors would cost four fifths
of all, at a width of 5,120; most schedules may ask for all of them. Narrow, complex or single-precision matrices, and
those on a GPU, are torch's.

Shapes: N width, I any other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Num
from scipy.linalg import blas
from scipy.linalg import eigh as scipy_eigh
from threadpoolctl import ThreadpoolController
from torch import Tensor

WIDE = 512
MIRRORED_ROWS = 512  # at a time: both triangles' parts stay in the processor's cache


def gram(rows: Num[Tensor, "*batch n i"]) -> Num[Tensor, "*batch n n"]:
    """X X^H of a matrix X, or of each of a batch."""
    if rows.ndim != 2 or not is_for_scipy(rows):
        return rows @ rows.mH
    columns = rows if rows.mT.is_contiguous() else rows.contiguous().mT  # as BLAS stores matrices, without a copy
    with blas_threads():
        total = blas.dsyrk(1.0, columns.numpy(), trans=columns is not rows, lower=1)
    return torch.from_numpy(mirrored(total).T)  # BLAS leaves columns: the transpose of a symmetric matrix is contiguous


def eigh(moment: Num[Tensor, "*batch n n"]) -> tuple[Float[Tensor, "*batch n"], Num[Tensor, "*batch n n"]]:
    """Eigenvalues, rising, and eigenvectors, as columns, of a symmetric (Hermitian) matrix or of each of a batch."""
    if not is_for_scipy(moment):
        return torch.linalg.eigh(moment)
    if moment.ndim > 2:
        values, vectors = zip(*map(eigh, moment), strict=True)
        return torch.stack(values), torch.stack(vectors)
    with blas_threads():
        # LAPACK wants columns; a symmetric matrix is its transpose
        of_matrix = scipy_eigh(moment.mT.numpy(), driver="evd", check_finite=False)
    return torch.from_numpy(of_matrix[0]), torch.from_numpy(of_matrix[1])


def eigvalsh(moment: Num[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n"]:
    """The eigenvalues of `eigh` alone, which take a third of its time, half where it is very wide."""
    if not is_for_scipy(moment):
        return torch.linalg.eigvalsh(moment)
    if moment.ndim > 2:
        return torch.stack([eigvalsh(matrix) for matrix in moment])
    with blas_threads():
        values = scipy_eigh(moment.mT.numpy(), driver="evd", check_finite=False, eigvals_only=True)
    return torch.from_numpy(values)


def is_for_scipy(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.dtype == torch.float64 and matrix.shape[-2] >= WIDE


def mirrored(lower: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """A matrix whose lower triangle alone is filled, with the upper one written in place."""
    for start in range(0, len(lower), MIRRORED_ROWS):
        stop = start + MIRRORED_ROWS
        corner = lower[start:stop, start:stop]
        corner += np.tril(corner, -1).T
        lower[start:stop, stop:] = lower[stop:, start:stop].T
    return lower


@contextmanager
def blas_threads() -> Iterator[None]:
    """SciPy's BLAS has threads of its own: as many as torch's while the block runs."""
    with libraries().limit(limits=torch.get_num_threads(), user_api="blas"):
        yield


@cache
def libraries() -> ThreadpoolController:
    """The loaded libraries with threads, SciPy's among them; looking for them takes milliseconds."""
    return ThreadpoolController()
