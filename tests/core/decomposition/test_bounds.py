"""Bounds against measured errors and the inputs that reach them; KQ-SVD's formulas against tokens and a full SVD.

Every bound has its control: a smaller one, or the form in print, that the same inputs break.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from lorc_core.decomposition.bounds import (
    chain_bound,
    k_svd_gap,
    k_svd_gaps,
    layer_bound,
    least_read_errors,
    projection_bound,
    read_error,
    truncation_bound,
)
from lorc_core.decomposition.decompose import balanced_factors
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.model.architecture import architecture_of
from lorc_core.model.checkpoint import Checkpoint
from lorc_core.model.kinds import KINDS
from lorc_core.model.weights import read_weight
from tests.spectra import random_matrix

ROUNDING = 1 + 1e-12  # worst of 2,000 random matrices where a bound is reached: 1 + 6e-15

# Name: nonlinearity, Lipschitz constant. The cosine does not map zero to zero.
ACTIVATIONS = {
    "identity": (lambda x: x, 1.0),
    "relu": (torch.relu, 1.0),
    "tanh": (torch.tanh, 1.0),
    "cosine": (torch.cos, 1.0),
    "3 relu": (lambda x: 3 * torch.relu(x), 3.0),
    "tanh(2.5x)": (lambda x: torch.tanh(2.5 * x), 2.5),
    "0.4 x": (lambda x: 0.4 * x, 0.4),
}


def truncated(weight, rank):
    left, spectrum, right = torch.linalg.svd(weight, full_matrices=False)
    return (left[:, :rank] * spectrum[:rank]) @ right[:rank]


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def measured(weight, approximation, inputs):
    return ((weight - approximation) @ inputs.T).norm(dim=0)


def identity(size):
    return torch.eye(size, dtype=torch.float64)


@pytest.mark.real_models
def test_truncation_bound_holds_on_every_real_layer_and_its_worst_input_reaches_it(sample_dir):
    source, architecture = Checkpoint(sample_dir), architecture_of(AutoConfig.from_pretrained(sample_dir))
    inputs = random_matrix(1000, architecture.hidden_size, 0)
    for layer_idx in range(architecture.num_layers):
        for kind in KINDS:
            weight = read_weight(source, architecture, layer_idx, kind[0]).double()
            for rank in (1, architecture.kv_width // 2, architecture.kv_width - 1):
                approximation = truncated(weight, rank)
                bounds = truncation_bound(weight, rank, inputs=inputs)
                assert (measured(weight, approximation, inputs) <= ROUNDING * bounds).all()
                worst = torch.linalg.svd(weight)[2][rank : rank + 1]
                reached, bound = measured(weight, approximation, worst), truncation_bound(weight, rank, inputs=worst)
                assert reached <= bound * (1 + 1e-9)
                assert reached > bound * (1 - 1e-9), "a slightly smaller bound would fail"


@given(rows=st.integers(1, 8), columns=st.integers(1, 12), seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=60, deadline=None)
def test_truncation_bound_holds_and_is_reached_at_every_rank(rows, columns, seed, data):
    weight, rank = random_matrix(rows, columns, seed), data.draw(st.integers(1, rows))
    right = torch.linalg.svd(weight)[2]
    inputs = torch.cat([random_matrix(20, columns, seed + 1), 5 * right])
    errors, bounds = measured(weight, truncated(weight, rank), inputs), truncation_bound(weight, rank, inputs=inputs)
    assert (errors <= ROUNDING * bounds + 1e-12).all()
    if rank < min(rows, columns):
        torch.testing.assert_close(errors[20 + rank], bounds[20 + rank], rtol=1e-9, atol=1e-12)
    else:
        assert (bounds == 0).all()


def test_a_single_input_gives_a_single_bound_whatever_the_precision():
    weight, inputs = random_matrix(6, 9, 0), random_matrix(2, 9, 1).reshape(2, 1, 9)
    bounds = truncation_bound(weight.float(), 3, inputs=inputs.float())
    assert bounds.shape == (2, 1)
    assert bounds.dtype == torch.float64
    torch.testing.assert_close(truncation_bound(weight, 3, inputs=inputs[0, 0]), bounds[0, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [0, 7, -1])
def test_truncation_bound_rank_out_of_range_names_what_is_allowed(rank):
    with pytest.raises(ConfigError, match=rf"rank must be in 1\.\.6, got {rank}"):
        truncation_bound(random_matrix(6, 9, 0), rank, inputs=random_matrix(1, 9, 1))


def oblique(width, rank, seed):
    """`up` and `down` of a projection that is not orthogonal."""
    up, other = random_matrix(width, rank, seed), random_matrix(rank, width, seed + 1)
    return up, torch.linalg.solve(other @ up, other)


def block_diagonal(width, rank, seed):
    """Two oblique blocks, as per-head projections given as dense factors."""
    first, second = oblique(width, rank, seed), oblique(width, rank, seed + 2)
    return torch.block_diag(first[0], second[0]), torch.block_diag(first[1], second[1])


@given(
    width=st.integers(2, 6),
    columns=st.integers(1, 12),
    blocks=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_projection_bound_holds_for_oblique_and_block_diagonal_projections(width, columns, blocks, seed, data):
    rank = data.draw(st.integers(1, width - 1))
    up, down = (block_diagonal if blocks else oblique)(width, rank, seed)
    weight, mean = random_matrix(len(up), columns, seed + 4), random_matrix(1, len(up), seed + 5)
    rest = (identity(len(up)) - up @ down) @ weight
    inputs = torch.cat([random_matrix(20, columns, seed + 6), torch.linalg.svd(rest)[2][:1]])
    states = inputs @ weight.T + mean
    offset = mean - mean @ down.T @ up.T
    errors = (states - (states @ down.T @ up.T + offset)).norm(dim=1)
    bounds = projection_bound(weight, up=up, down=down, inputs=inputs)
    scale = (1 + (up @ down).norm()) * (weight.norm() + mean.norm()) * 10
    assert (errors <= bounds * (1 + 1e-9) + 1e-12 * scale).all()
    torch.testing.assert_close(errors[20], bounds[20], rtol=1e-9, atol=1e-12 * scale.item())


def test_projection_bound_of_the_truncation_is_theorem_1s_which_fails_for_an_oblique_projection():
    """The control: sigma_{k+1} is a bound for the weight's own singular vectors alone."""
    weight, inputs = random_matrix(6, 9, 0), random_matrix(1000, 9, 1)
    basis = torch.linalg.svd(weight)[0][:, :3]
    first = truncation_bound(weight, 3, inputs=inputs)
    torch.testing.assert_close(projection_bound(weight, up=basis, down=basis.T, inputs=inputs), first)
    up, down = oblique(6, 3, 2)
    assert (measured(weight, up @ down @ weight, inputs) > 1.5 * first).any()
    assert (projection_bound(weight, up=up, down=down, inputs=inputs) > first).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_layer_bound_holds_after_a_nonlinearity_and_is_theorem_1_times_its_constant(name):
    activation, lipschitz = ACTIVATIONS[name]
    weight, inputs = random_matrix(6, 9, 0), random_matrix(1000, 9, 1)
    approximation = truncated(weight, 3)
    errors = (activation(inputs @ weight.T) - activation(inputs @ approximation.T)).norm(dim=1)
    bounds = layer_bound(weight, approximation, inputs=inputs, lipschitz=lipschitz)
    assert (errors <= ROUNDING * bounds).all()
    torch.testing.assert_close(bounds, lipschitz * truncation_bound(weight, 3, inputs=inputs))


def test_layer_bound_without_its_constant_fails():
    """The control, and the input that reaches the bound: 3 relu on the direction that was cut."""
    weight, approximation = diagonal(2, 1), diagonal(2, 0)
    activation, lipschitz = ACTIVATIONS["3 relu"]
    worst = torch.tensor([[0.0, 1.0]]).double()
    error = (activation(worst @ weight.T) - activation(worst @ approximation.T)).norm()
    assert error == layer_bound(weight, approximation, inputs=worst, lipschitz=lipschitz) == 3
    assert error > layer_bound(weight, approximation, inputs=worst, lipschitz=1.0)


def run_chain(weights, inputs, activation):
    """What every layer reads, and the output."""
    hidden = [inputs]
    for weight in weights:
        hidden.append(activation(hidden[-1] @ weight.T))
    return hidden


def summed_bound(weights, ranks, read_norms, lipschitz, extra_factors):
    """sum_i sigma_{k_i+1} L^{N-i+extra} prod_{j>i} ||W_j|| read_norms_i, written out."""
    total = 0.0
    for i, (weight, rank) in enumerate(zip(weights, ranks, strict=True)):
        spectrum = torch.linalg.svdvals(weight)
        sigma = spectrum[rank].item() if rank < len(spectrum) else 0.0
        term = sigma * lipschitz ** (len(weights) - 1 - i + extra_factors) * read_norms[i]
        for later in weights[i + 1 :]:
            term = term * torch.linalg.matrix_norm(later, 2)
        total = total + term
    return total


@given(
    widths=st.lists(st.integers(2, 6), min_size=2, max_size=5),
    name=st.sampled_from(sorted(ACTIVATIONS)),
    scale=st.floats(0.1, 5),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_chain_bound_is_the_corrected_sum_and_holds(widths, name, scale, seed, data):
    activation, lipschitz = ACTIVATIONS[name]
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    weights = [scale * random_matrix(*shape, seed + i) for i, shape in enumerate(shapes)]
    ranks = [data.draw(st.integers(1, min(shape))) for shape in shapes]
    approximations = [truncated(weight, rank) for weight, rank in zip(weights, ranks, strict=True)]
    inputs = random_matrix(20, widths[0], seed + 10)
    exact, found = run_chain(weights, inputs, activation), run_chain(approximations, inputs, activation)
    bounds = chain_bound(weights, approximations, inputs=inputs, activation=activation, lipschitz=lipschitz)
    size = max(hidden.norm().item() for hidden in exact + found)
    assert ((exact[-1] - found[-1]).norm(dim=1) <= ROUNDING * bounds + 1e-12 * size).all()
    written_out = summed_bound(weights, ranks, [hidden.norm(dim=1) for hidden in found], lipschitz, extra_factors=1)
    # A layer that is not truncated differs from itself by rounding, where the written sum has zero.
    slack = 1e-11 * (summed_bound(weights, [0] * len(weights), [size] * len(weights), lipschitz, 1) + size)
    torch.testing.assert_close(bounds, written_out + torch.zeros(20).double(), rtol=1e-9, atol=float(slack))


def test_theorem_3_as_printed_is_broken_by_two_layers_and_the_corrected_form_is_reached():
    """A first layer that amplifies and is not cut; a second that is cut along what it then reads.

    The printed form, as quoted to us, has no ||x~_{i-1}||. With ||x_0|| = 1 it makes no difference whether it is read
    with ||x_0|| or with no norm at all. Neither correction alone saves it: one more Lipschitz factor, or the norms.
    """
    activation, lipschitz = ACTIVATIONS["3 relu"]
    weights, ranks = [diagonal(10, 1), diagonal(1, 2)], [2, 1]
    approximations = [diagonal(10, 1), diagonal(0, 2)]
    inputs = torch.tensor([[1.0, 0.0]]).double()
    error = (run_chain(weights, inputs, activation)[-1] - run_chain(approximations, inputs, activation)[-1]).norm()
    assert error == 90
    assert summed_bound(weights, ranks, [1, 1], lipschitz, extra_factors=0) == 1
    assert summed_bound(weights, ranks, [1, 1], lipschitz, extra_factors=1) == 3
    assert summed_bound(weights, ranks, [1, 30], lipschitz, extra_factors=0) == 30
    bound = chain_bound(weights, approximations, inputs=inputs, activation=activation, lipschitz=lipschitz)
    assert bound.item() == pytest.approx(90, rel=1e-12)


def test_theorem_3_as_printed_is_broken_by_random_chains_cut_in_their_last_layer():
    """The same without a construction: four layers of Gaussian weights that amplify."""
    activation, lipschitz = ACTIVATIONS["3 relu"]
    weights, ranks = [random_matrix(8, 8, seed) for seed in range(4)], [8, 8, 8, 4]
    approximations = [*weights[:3], truncated(weights[3], 4)]
    inputs = random_matrix(100, 8, 9)
    inputs = inputs / inputs.norm(dim=1, keepdim=True)
    exact, found = run_chain(weights, inputs, activation), run_chain(approximations, inputs, activation)
    errors = (exact[-1] - found[-1]).norm(dim=1)
    bounds = chain_bound(weights, approximations, inputs=inputs, activation=activation, lipschitz=lipschitz)
    assert (errors <= bounds).all()
    assert (errors > summed_bound(weights, ranks, [1] * 4, lipschitz, extra_factors=0)).all()


def tokens(width, num_tokens, decay, seed):
    """Rows with unequal energy along mixed directions."""
    spread = torch.logspace(0, -decay, width, dtype=torch.float64)
    return random_matrix(num_tokens, width, seed) * spread @ random_matrix(width, width, seed + 1)


def rounding(keys, queries):
    """Of an error from Gram matrices. Worst of 2,000 draws of `MANY_TOKENS`: 1.7e-15 of ||K||^2 ||Q||^2.

    That is 3e-13 of the total energy ||K Q^T||^2, or more where keys and queries hardly meet.
    """
    return 1e-14 * keys.norm() ** 2 * queries.norm() ** 2


MANY_TOKENS = {
    "width": st.integers(2, 8),
    "num_keys": st.integers(1, 30),
    "num_queries": st.integers(1, 30),
    "decay": st.floats(0, 2),
    "seed": st.integers(0, 2**31),
}


@given(**MANY_TOKENS)
@settings(max_examples=80, deadline=None)
def test_k_svd_gaps_equal_the_gaps_measured_on_tokens(width, num_keys, num_queries, decay, seed):
    keys, queries = tokens(width, num_keys, decay, seed), tokens(width, num_queries, decay, seed + 2)
    logits = keys @ queries.T
    spectrum, slack = torch.linalg.svdvals(logits), rounding(keys, queries)
    vectors = torch.linalg.svd(keys)[2].T
    gaps = k_svd_gaps(keys.T @ keys, queries.T @ queries)
    assert gaps.shape == (width + 1,)
    for rank in range(1, min(width, num_keys) + 1):  # past the number of keys V_R is arbitrary and nothing is lost
        kept = vectors[:, :rank]
        error = (keys @ kept @ kept.T @ queries.T - logits).square().sum()
        gap = error - spectrum[rank:].square().sum()
        printed = spectrum[:rank].square().sum() - (keys @ kept @ kept.T @ queries.T).square().sum()
        assert abs(gaps[rank] - gap) < slack
        assert abs(gaps[rank] - printed) < slack
    assert (gaps > -slack).all()


def test_k_svd_gap_of_a_known_spectrum_and_of_swapped_moments():
    """C keeps e1 for its 4; the readers see e2 a hundred times as much. Swapped, K-SVD is right: the control."""
    states, readers = diagonal(4, 1), diagonal(1, 100)
    assert k_svd_gap(states, readers, 1) == pytest.approx(100 - 4, rel=1e-12)
    assert k_svd_gap(states, readers, 2) == 0
    assert k_svd_gap(readers, states, 1) == pytest.approx(0, abs=1e-12)
    assert k_svd_gaps(states, readers).tolist() == pytest.approx([0, 96, 0], abs=1e-12)


@given(width=st.integers(2, 8), seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_k_svd_loses_nothing_to_readers_that_see_everything_alike(width, seed, scale):
    states = tokens(width, 20, 1, seed).T @ tokens(width, 20, 1, seed)
    gaps = k_svd_gaps(states, scale * identity(width))
    assert (gaps.abs() < 1e-12 * scale * torch.trace(states)).all()


@pytest.mark.parametrize("rank", [0, 3, -1])
def test_k_svd_gap_rank_out_of_range_names_what_is_allowed(rank):
    with pytest.raises(ConfigError, match=rf"rank must be in 1\.\.2, got {rank}"):
        k_svd_gap(identity(2), identity(2), rank)


@given(**MANY_TOKENS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_read_error_equals_the_error_measured_on_tokens(width, num_keys, num_queries, decay, seed, data):
    keys, queries = tokens(width, num_keys, decay, seed), tokens(width, num_queries, decay, seed + 2)
    up, down = oblique(width, data.draw(st.integers(1, width)), seed + 4)
    error = read_error(keys.T @ keys, queries.T @ queries, up=up, down=down)
    slack = (1 + (up @ down).norm()) ** 2 * rounding(keys, queries)
    assert abs(error - ((keys @ down.T @ up.T - keys) @ queries.T).square().sum()) < slack


def test_read_error_is_not_that_of_the_transposed_projection():
    """The control: an oblique projection has two sides, and an orthogonal one would hide them."""
    keys, queries = tokens(6, 20, 1, 0), tokens(6, 20, 1, 2)
    up, down = oblique(6, 3, 4)
    states, readers = keys.T @ keys, queries.T @ queries
    error = read_error(states, readers, up=up, down=down)
    assert error == pytest.approx(((keys @ down.T @ up.T - keys) @ queries.T).square().sum().item(), rel=1e-9)
    assert abs(read_error(states, readers, up=down.T, down=up.T) - error) > 0.1 * error
    assert abs(read_error(readers, states, up=up, down=down) - error) > 0.1 * error


@given(**MANY_TOKENS)
@settings(max_examples=60, deadline=None)
def test_least_read_errors_are_the_tails_of_the_logits_spectrum_and_nothing_does_better(
    width, num_keys, num_queries, decay, seed
):
    keys, queries = tokens(width, num_keys, decay, seed), tokens(width, num_queries, decay, seed + 2)
    energies = torch.zeros(width + 1, dtype=torch.float64)
    spectrum = torch.linalg.svdvals(keys @ queries.T)[:width]
    energies[: len(spectrum)] = spectrum.square()
    states, readers = keys.T @ keys, queries.T @ queries
    least = least_read_errors(states, readers)
    for rank in range(width + 1):
        assert abs(least[rank] - energies[rank:].sum()) < rounding(keys, queries)
        if rank > 0:
            up, down = oblique(width, rank, seed + 4)
            slack = (1 + (up @ down).norm()) ** 2 * rounding(keys, queries)
            assert read_error(states, readers, up=up, down=down) >= least[rank] - slack
    assert least[width] == 0


def in_use(states, readers):
    """`up`, `down` and the squared singular values of the project's projections, at every rank."""
    return (found[0] for found in balanced_factors(states[None], readers[None]))


def test_least_read_errors_are_those_of_the_projections_in_use():
    states, readers = random_moment(8, 0), random_moment(8, 2)
    up, down, _ = in_use(states, readers)
    least = least_read_errors(states, readers)
    for rank in range(1, 9):
        error = read_error(states, readers, up=up[:, :rank], down=down[:rank])
        assert error == pytest.approx(least[rank].item(), abs=1e-10 * least[0].item())


def random_moment(width, seed):
    sample = tokens(width, 4 * width, 0.5, seed)
    return sample.T @ sample


@pytest.mark.parametrize("name", ["states", "readers"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_named(name, bad):
    moments = {"states": random_moment(4, 0), "readers": random_moment(4, 2)}
    moments[name][1, 2] = bad
    with pytest.raises(NumericsError, match=f"second moment of the {name} holds NaN"):
        k_svd_gaps(**moments)
    with pytest.raises(NumericsError, match=f"second moment of the {name} holds NaN"):
        read_error(**moments, up=identity(4), down=identity(4))


def conditioned_moment(width, seed):
    """A condition number below 1e3, as both forms lose digits to a square root's inverse."""
    moment = random_moment(width, seed)
    return moment + 1e-3 * torch.trace(moment) * identity(width)


def kq_svd_factors(states, readers, rank, upper=True):
    """A and B of KQ-SVD from Cholesky factors: K A is cached, q B reads it."""
    root_K, root_Q = (torch.linalg.cholesky(moment, upper=upper) for moment in (states, readers))
    left = torch.linalg.svd(root_K @ root_Q.T)[0][:, :rank]
    return torch.linalg.solve(root_K, left), root_K.T @ left


@given(width=st.integers(2, 8), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_kq_svds_cholesky_form_gives_the_products_of_the_projections_in_use(width, seed):
    states, readers = conditioned_moment(width, seed), conditioned_moment(width, seed + 2)
    up, down, energies = in_use(states, readers)
    for rank in range(1, width + 1):  # worst of 2,000 examples: 7e-13
        if rank < width and energies[rank] > (1 - 1e-4) * energies[rank - 1]:
            continue  # two directions tie: both forms are optimal, with different ones
        A, B = kq_svd_factors(states, readers, rank)
        torch.testing.assert_close(A @ B.T, (up[:, :rank] @ down[:rank]).T, rtol=0, atol=1e-8)


def test_kq_svd_with_lower_cholesky_factors_is_another_projection():
    """The control: torch's default is the lower factor, and then the products differ."""
    states, readers = random_moment(6, 0), random_moment(6, 2)
    up, down, _ = in_use(states, readers)
    A, B = kq_svd_factors(states, readers, 3, upper=False)
    assert (A @ B.T - (up[:, :3] @ down[:3]).T).norm() > 0.1
    assert read_error(states, readers, up=B, down=A.T) > 1.1 * least_read_errors(states, readers)[3]


def group_error(keys, heads, reading, rank):
    """Summed over the heads of a group, the squared error of their logits where `reading` was taken for them."""
    up, down, _ = in_use(keys.T @ keys, reading.T @ reading)
    rebuilt = keys @ down[:rank].T @ up[:, :rank].T
    return sum((rebuilt @ head.T - keys @ head.T).square().sum() for head in heads).item()


@given(
    width=st.integers(2, 6),
    num_heads=st.integers(1, 4),
    opposed=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_stacked_heads_of_a_group_are_never_worse_than_summed_ones(width, num_heads, opposed, seed, data):
    """Theorem 5 of KQ-SVD; `opposed` mixes in a part of the queries that cancels between heads."""
    rank = data.draw(st.integers(1, width))
    keys, shared = tokens(width, 30, 1, seed), tokens(width, 30, 1, seed + 2)
    heads = [tokens(width, 30, 1, seed + 4 + 2 * i) + opposed * (-1) ** i * 3 * shared for i in range(num_heads)]
    stacked, summed = group_error(keys, heads, torch.cat(heads), rank), group_error(keys, heads, sum(heads), rank)
    total = sum((keys @ head.T).square().sum() for head in heads).item()
    assert stacked <= summed + 1e-8 * total
    if num_heads == 1:
        assert stacked == pytest.approx(summed, abs=1e-8 * total)


def test_stacked_heads_can_be_100_times_better_than_summed_ones():
    """Two heads that look the same way with opposite signs: their sum does not look there at all."""
    keys, common, apart = random_matrix(40, 4, 0), random_matrix(40, 4, 1), random_matrix(40, 1, 2)
    along = torch.tensor([[10.0, 0, 0, 0]]).double()
    heads = [0.1 * common + apart @ along, 0.1 * common - apart @ along]
    stacked, summed = group_error(keys, heads, torch.cat(heads), 2), group_error(keys, heads, sum(heads), 2)
    assert summed > 100 * stacked
