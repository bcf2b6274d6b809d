"""What a projection can cost at most, and what it costs above the least possible.

LoRC's bounds, of one layer and of a chain, need the weights and hold for every input. KQ-SVD's errors need second
moments alone and are exact means: no tokens are kept. Projections are made in `projection`, moments in `moments`.
Every formula was derived here; KQ-SVD's were compared with its text, LoRC's text was not at hand.

Shapes: N kv_width, I in_features, K rank. Everything is float64.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.errors import ConfigError, NumericsError


def truncation_bound(weight: Float[Tensor, "n i"], rank: int, *, inputs: Float[Tensor, "*t i"]) -> Float[Tensor, "*t"]:
    """Most that truncating `weight` to `rank` can change its output: ||W x - W_k x|| <= sigma_{k+1} ||x||.

    Reached by x along the right singular vector k+1. A bias that is kept whole adds nothing.

    Args:
        weight: (kv_width, in_features), as in `nn.Linear.weight`.
        rank: Singular values kept, 1 <= rank <= kv_width; past the weight's own there is no error.
        inputs: What the weight acts on, one bound each.

    Returns:
        The bound of every input.

    Raises:
        ConfigError: `rank` is out of range.

    Source: LoRC, arXiv 2410.03111, theorem 1, which is Eckart and Young in the spectral norm.
    """
    _check_rank(rank, len(weight))
    singular_values = torch.linalg.svdvals(weight.double())
    return singular_values[rank : rank + 1].sum() * _norms(inputs)


def projection_bound(
    weight: Float[Tensor, "n i"],
    *,
    up: Float[Tensor, "n k"],
    down: Float[Tensor, "k n"],
    inputs: Float[Tensor, "*t i"],
) -> Float[Tensor, "*t"]:
    """Most that a projection P = up @ down can change states s = W x + m: ||(I-P)(s-m)|| <= ||(I-P) W|| ||x||.

    Theorem 1 for any projection, oblique or block-diagonal too: with P onto the weight's top left singular vectors
    the norm is sigma_{k+1}; no other P of that rank has a smaller one. Reached by the top right singular vector of
    (I-P) W.

    Args:
        weight: (kv_width, in_features), as in `nn.Linear.weight`.
        up: Of the projection; m is kept whole by its offset.
        down: Of the projection.
        inputs: What the weight acts on, one bound each.

    Returns:
        The bound of every input.

    Source: derived here; submultiplicativity of the spectral norm.
    """
    weight = weight.double()
    return layer_bound(weight, up.double() @ (down.double() @ weight), inputs=inputs, lipschitz=1.0)


def layer_bound(
    weight: Float[Tensor, "o i"],
    approximation: Float[Tensor, "o i"],
    *,
    inputs: Float[Tensor, "*t i"],
    lipschitz: float,
) -> Float[Tensor, "*t"]:
    """Most that replacing W by W~ can change one layer phi(W x): ||phi(W x) - phi(W~ x)|| <= L ||W - W~|| ||x||.

    ||W - W~|| is sigma_{k+1} for the truncated weight and ||(I-P) W|| for a projection of what is cached. The printed
    text of LoRC's theorem 2 was not at hand: this is what a nonlinearity does to theorem 1.

    Args:
        weight: Of the layer.
        approximation: What stands in its place.
        inputs: What the weight acts on, one bound each.
        lipschitz: L of the nonlinearity phi: ||phi(a) - phi(b)|| <= L ||a - b||.

    Returns:
        The bound of every input.

    Source: derived here; after LoRC, arXiv 2410.03111, theorem 2.
    """
    return lipschitz * _spectral_norm(weight.double() - approximation.double()) * _norms(inputs)


def chain_bound(
    weights: Sequence[Float[Tensor, "_ _"]],
    approximations: Sequence[Float[Tensor, "_ _"]],
    *,
    inputs: Float[Tensor, "*t i"],
    activation: Callable[[Tensor], Tensor],
    lipschitz: float,
) -> Float[Tensor, "*t"]:
    """Most that a chain x_i = phi(W_i x_{i-1}) of N layers can change where every W_i becomes W~_i.

    ||x_N - x~_N|| <= sum_i ||W_i - W~_i|| L^{N-i+1} prod_{j>i} ||W_j|| ||x~_{i-1}||, with ||W_i - W~_i|| =
    sigma_{k_i+1} for truncated weights. By induction from e_0 = 0:
    e_i <= L ||W_i (x_{i-1} - x~_{i-1}) + (W_i - W~_i) x~_{i-1}|| <= L (||W_i|| e_{i-1} + ||W_i - W~_i|| ||x~_{i-1}||).
    LoRC's theorem 3, as quoted to us, lacks the norms ||x~_{i-1}|| of what each layer reads and one factor L, and is
    then not true. It is about a chain of linear maps and nonlinearities, not about attention.

    Args:
        weights: Of the layers, first to last.
        approximations: What stands in their places.
        inputs: What the first layer reads, one bound each.
        activation: phi, after every layer; it need not map zero to zero.
        lipschitz: L of phi.

    Returns:
        The bound of every input, after the last nonlinearity.

    Source: LoRC, arXiv 2410.03111, theorem 3, corrected.
    """
    hidden = inputs.double()
    bound = torch.zeros_like(_norms(hidden))
    for weight, approximation in zip(weights, approximations, strict=True):
        inherited = lipschitz * _spectral_norm(weight.double()) * bound
        bound = inherited + layer_bound(weight, approximation, inputs=hidden, lipschitz=lipschitz)
        hidden = activation(hidden @ approximation.double().T)
    return bound


def read_error(
    states: Float[Tensor, "n n"],
    readers: Float[Tensor, "n n"],
    *,
    up: Float[Tensor, "n k"],
    down: Float[Tensor, "k n"],
) -> float:
    """Mean squared error of what is read through P = up @ down: tr(M (I-P) C (I-P)^T).

    With C = K^T K and M = Q^T Q it is ||K P^T Q^T - K Q^T||_F^2. Where it should be zero, rounding leaves about 1e-16
    of tr(M) tr(C), of either sign.

    Args:
        states: C, the second moment of the centred states.
        readers: M, that of what reads them.
        up: Of the projection, of any kind.
        down: Of the projection.

    Raises:
        NumericsError: A moment holds NaN or infinity.

    Source: KQ-SVD, arXiv 2512.05916, equation 2, from Gram matrices.
    """
    _check_finite(states, readers)
    rest = torch.eye(len(states), dtype=torch.float64, device=states.device) - up.double() @ down.double()
    return float((readers @ rest @ states * rest).sum())


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
    eigenvalues, vectors = torch.linalg.eigh(states)
    losses = eigenvalues.clamp(min=0) * (readers @ vectors * vectors).sum(dim=0)
    return _tail_sums(losses.flip(0)) - least


def k_svd_gap(states: Float[Tensor, "n n"], readers: Float[Tensor, "n n"], rank: int) -> float:
    """One of `k_svd_gaps`.

    Args:
        states: C, the second moment of the centred states.
        readers: M, that of what reads them.
        rank: Directions kept, 1 <= rank <= N.

    Raises:
        ConfigError: `rank` is out of range.
        NumericsError: A moment holds NaN or infinity.

    Source: KQ-SVD, arXiv 2512.05916, theorem 3.
    """
    _check_rank(rank, len(states))
    return float(k_svd_gaps(states, readers)[rank])


def _norms(inputs: Float[Tensor, "*t i"]) -> Float[Tensor, "*t"]:
    return torch.linalg.vector_norm(inputs.double(), dim=-1)


def _spectral_norm(matrix: Float[Tensor, "o i"]) -> Float[Tensor, ""]:
    return torch.linalg.svdvals(matrix)[0]


def _root(moment: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Any R with R R^T = moment."""
    eigenvalues, vectors = torch.linalg.eigh(moment)
    return vectors * eigenvalues.clamp(min=0).sqrt()


def _tail_sums(energies: Float[Tensor, " n"]) -> Float[Tensor, " n+1"]:
    """Sums past the first 0 to N."""
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])


def _check_rank(rank: int, width: int) -> None:
    if not 1 <= rank <= width:
        raise ConfigError(f"rank must be in 1..{width}, got {rank}")


def _check_finite(states: Float[Tensor, "n n"], readers: Float[Tensor, "n n"]) -> None:
    for name, moment in (("states", states), ("readers", readers)):
        if not torch.isfinite(moment).all():
            raise NumericsError(f"the second moment of the {name} holds NaN or infinity")
