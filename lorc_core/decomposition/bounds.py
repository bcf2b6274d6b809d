"""What a projection loses: at most, for every input; on average, exactly; and the least that its rank allows.

A projection P = up @ down leaves R = I - P of the states out, called `rest` here. The first needs the weight, the
others second moments alone: no tokens are kept. Which formula of which paper each is, and where the papers differ, is
in docs/papers.md.

Shapes: N kv_width, I in_features. Everything is float64.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.decomposition.symmetric import eigh, eigvalsh, gram
from lorc_core.errors import NumericsError


def projection_bound(weight: Float[Tensor, "n i"], rest: Float[Tensor, "n n"]) -> float:
    """Most that a projection loses of W x for an input of length one: ||R W x|| <= ||R W|| ||x||.

    It holds for oblique and block-diagonal projections too, and the top right singular vector of R W reaches it. With
    P onto the top k left singular vectors of W it is sigma_{k+1}, LoRC's bound; no other P of that rank has a smaller
    one. A bias that the projection keeps whole adds nothing.

    Args:
        weight: (kv_width, in_features), as in `nn.Linear.weight`.
        rest: R = I - P.

    Returns:
        ||R W||, the largest singular value. The bound of an input is that times its length.

    Source: LoRC, arXiv 2410.03111, theorem 1, from truncated SVD to any projection.
    """
    lost = rest @ weight.double()
    # By the Gram matrix: squaring costs the small singular values their digits, not the largest.
    return eigvalsh(gram(lost))[-1].clamp(min=0).sqrt().item()


def read_error(
    states: Float[Tensor, "n n"], readers: Float[Tensor, "n n"], rest: Float[Tensor, "n n"]
) -> Float[Tensor, ""]:
    """Mean squared error of what is read through a projection: tr(M R C R^T).

    With C = K^T K and M = Q^T Q it is ||K P^T Q^T - K Q^T||_F^2: the squared error of the products q . k, summed over
    all pairs of a query and a key. That is not the error of the logits, which have a scale, a mask and, for keys from
    before the rotation, an angle between the two; nor of the softmax, which does not feel what all keys lose alike.
    Where it should be zero, rounding leaves about 1e-16
    of tr(M) tr(C), of either sign.

    Args:
        states: C, the second moment of the centred states.
        readers: M, that of what reads them; the identity for the error of the states themselves.
        rest: R = I - P, of a projection of any kind.

    Returns:
        In the units of C times those of M; its root is a root mean square.

    Raises:
        NumericsError: A moment holds NaN or infinity.

    Source: KQ-SVD, arXiv 2512.05916, equation 2, from Gram matrices.
    """
    _check_finite(states, readers)
    return torch.trace(readers @ (rest @ states @ rest.T))


def least_read_errors(states: Float[Tensor, "n n"], readers: Float[Tensor, "n n"]) -> Float[Tensor, " n+1"]:
    """The least `read_error` that a projection of each rank can have: sum_{i>rank} sigma_i(M^{1/2} C^{1/2})^2.

    Args:
        states: C, the second moment of the centred states.
        readers: M, that of what reads them.

    Returns:
        By rank, 0 to N: the first is tr(M C), all that is read, and the last is zero.

    Raises:
        NumericsError: A moment holds NaN or infinity.

    Source: KQ-SVD, arXiv 2512.05916, theorem 2, from Gram matrices.
    """
    _check_finite(states, readers)
    return _tail_sums(torch.linalg.svdvals(_root(readers).T @ _root(states)).square())


def k_svd_gaps(states: Float[Tensor, "n n"], readers: Float[Tensor, "n n"]) -> Float[Tensor, " n+1"]:
    """What ignoring the readers costs at each rank: the error of K-SVD less the least error.

    K-SVD projects on the top eigenvectors v_i of C. The theorem prints sum_{i<=R} sigma_i(K Q^T)^2 -
    ||K V_R V_R^T Q^T||_F^2, and the last term is sum_{i<=R} lambda_i v_i^T M v_i. Both sums over all i are tr(M C), so
    the difference is also that of the sums past R, which lose less to rounding.

    Args:
        states: C, the second moment of the centred states.
        readers: M, that of what reads them.

    Returns:
        By rank, 0 to N; but for rounding the first and last are zero and none is negative. Where C has equal
        eigenvalues on both sides of a rank, K-SVD is not unique: the gap is that of the vectors that `eigh` returns.

    Raises:
        NumericsError: A moment holds NaN or infinity.

    Source: KQ-SVD, arXiv 2512.05916, theorem 3, from Gram matrices.
    """
    least = least_read_errors(states, readers)
    eigenvalues, vectors = eigh(states)
    losses = eigenvalues.clamp(min=0) * (readers @ vectors * vectors).sum(dim=0)
    return _tail_sums(losses.flip(0)) - least


def _root(moment: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Any R with R R^T = moment."""
    eigenvalues, vectors = eigh(moment)
    return vectors * eigenvalues.clamp(min=0).sqrt()


def _tail_sums(energies: Float[Tensor, " n"]) -> Float[Tensor, " n+1"]:
    """Sums past the first 0 to N."""
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])


def _check_finite(states: Float[Tensor, "n n"], readers: Float[Tensor, "n n"]) -> None:
    for name, moment in (("states", states), ("readers", readers)):
        if not torch.isfinite(moment).all():
            raise NumericsError(f"the second moment of the {name} holds NaN or infinity")
