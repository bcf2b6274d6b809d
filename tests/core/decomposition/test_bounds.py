"""Bounds against measured errors and the inputs that reach them; KQ-SVD's formulas against tokens and a full SVD.

Every bound has its control: a smaller one, or the form in print, that the same inputs break.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from lorc_core.decomposition.bounds import k_svd_gaps, least_read_errors, projection_bound, read_error
from lorc_core.decomposition.decompose import balanced_factors
from lorc_core.errors import NumericsError
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import KINDS
from lorc_core.model.stored.checkpoint import Checkpoint
from lorc_core.model.stored.weights import read_weight
from tests.spectra import random_matrix


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def identity(size):
    return torch.eye(size, dtype=torch.float64)


def truncation_rest(weight, rank):
    """I - P of the weight's truncated SVD: P W is its best approximation of that rank."""
    basis = torch.linalg.svd(weight)[0][:, :rank]
    return identity(len(weight)) - basis @ basis.T


def truncation_errors(weight, rank, inputs):
    """||W x - W~ x|| of LoRC's theorem 1, W~ from the SVD itself."""
    left, spectrum, right = torch.linalg.svd(weight, full_matrices=False)
    truncated = (left[:, :rank] * spectrum[:rank]) @ right[:rank]
    return ((weight - truncated) @ inputs.T).norm(dim=0)


@pytest.mark.real_models
def test_theorem_1_holds_on_every_real_layer_and_its_worst_input_reaches_it(sample_dir):
    source, architecture = Checkpoint(sample_dir), architecture_of(AutoConfig.from_pretrained(sample_dir))
    inputs = random_matrix(1000, architecture.hidden_size, 0)
    for layer_idx in range(architecture.num_layers):
        for kind in KINDS:
            weight = read_weight(source, architecture, layer_idx, kind[0]).double()
            for rank in (1, architecture.kv_width // 2, architecture.kv_width - 1):
                bound = projection_bound(weight, truncation_rest(weight, rank))
                assert (truncation_errors(weight, rank, inputs) <= bound * inputs.norm(dim=1)).all()
                worst = torch.linalg.svd(weight)[2][rank : rank + 1]
                reached = truncation_errors(weight, rank, worst).item()
                assert reached == pytest.approx(bound, rel=1e-9), "a slightly smaller bound would fail"


@given(rows=st.integers(1, 8), columns=st.integers(1, 12), seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=60, deadline=None)
def test_theorem_1_holds_at_every_rank_and_its_bound_is_the_next_singular_value(rows, columns, seed, data):
    weight, rank = random_matrix(rows, columns, seed), data.draw(st.integers(1, rows))
    spectrum = torch.linalg.svdvals(weight)
    bound, slack = projection_bound(weight, truncation_rest(weight, rank)), 1e-12 * spectrum[0].item()
    inputs = random_matrix(20, columns, seed + 1)
    assert (truncation_errors(weight, rank, inputs) <= (bound + slack) * inputs.norm(dim=1)).all()
    least = spectrum[rank].item() if rank < len(spectrum) else 0.0
    assert bound == pytest.approx(least, rel=1e-9, abs=slack)


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
    rest = identity(len(up)) - up @ down
    inputs = torch.cat([random_matrix(20, columns, seed + 6), torch.linalg.svd(rest @ weight)[2][:1]])
    states = inputs @ weight.T + mean
    offset = mean - mean @ down.T @ up.T
    errors = (states - (states @ down.T @ up.T + offset)).norm(dim=1)
    bound = projection_bound(weight, rest)
    scale = (1 + (up @ down).norm()) * (weight.norm() + mean.norm()) * 10
    assert (errors <= bound * inputs.norm(dim=1) * (1 + 1e-9) + 1e-12 * scale).all()
    assert errors[20].item() == pytest.approx(bound, rel=1e-9, abs=1e-12 * scale.item())  # the worst input


def test_the_next_singular_value_is_no_bound_of_an_oblique_projection():
    """The control: theorem 1 as printed is about the weight's own singular vectors alone."""
    weight, inputs = random_matrix(6, 9, 0), random_matrix(1000, 9, 1)
    up, down = oblique(6, 3, 2)
    rest = identity(6) - up @ down
    least = torch.linalg.svdvals(weight)[3].item()
    assert projection_bound(weight, rest) > least
    assert ((rest @ weight @ inputs.T).norm(dim=0) > 1.5 * least * inputs.norm(dim=1)).any()


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
        assert abs(gaps[rank] - printed) < 3 * slack  # itself a difference of two totals; worst seen 1.1 times slack
    assert (gaps > -slack).all()


def test_k_svd_gaps_of_a_known_spectrum_and_of_swapped_moments():
    """C keeps e1 for its 4; the readers see e2 a hundred times as much. Swapped, K-SVD is right: the control."""
    states, readers = diagonal(4, 1), diagonal(1, 100)
    assert k_svd_gaps(states, readers).tolist() == pytest.approx([0, 100 - 4, 0], abs=1e-12)
    assert k_svd_gaps(readers, states).tolist() == pytest.approx([0, 0, 0], abs=1e-12)


@given(width=st.integers(2, 8), seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_k_svd_loses_nothing_to_readers_that_see_everything_alike(width, seed, scale):
    states = tokens(width, 20, 1, seed).T @ tokens(width, 20, 1, seed)
    gaps = k_svd_gaps(states, scale * identity(width))
    assert (gaps.abs() < 1e-12 * scale * torch.trace(states)).all()


@given(**MANY_TOKENS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_read_error_equals_the_error_measured_on_tokens(width, num_keys, num_queries, decay, seed, data):
    keys, queries = tokens(width, num_keys, decay, seed), tokens(width, num_queries, decay, seed + 2)
    up, down = oblique(width, data.draw(st.integers(1, width)), seed + 4)
    error = read_error(keys.T @ keys, queries.T @ queries, identity(width) - up @ down)
    slack = (1 + (up @ down).norm()) ** 2 * rounding(keys, queries)
    assert abs(error - ((keys @ down.T @ up.T - keys) @ queries.T).square().sum()) < slack


def test_read_error_is_not_that_of_the_transposed_projection():
    """The control: an oblique projection has two sides, and an orthogonal one would hide them."""
    keys, queries = tokens(6, 20, 1, 0), tokens(6, 20, 1, 2)
    up, down = oblique(6, 3, 4)
    states, readers, rest = keys.T @ keys, queries.T @ queries, identity(6) - up @ down
    error = read_error(states, readers, rest)
    assert error == pytest.approx(((keys @ down.T @ up.T - keys) @ queries.T).square().sum().item(), rel=1e-9)
    assert abs(read_error(states, readers, rest.T) - error) > 0.1 * error
    assert abs(read_error(readers, states, rest) - error) > 0.1 * error


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
            assert read_error(states, readers, identity(width) - up @ down) >= least[rank] - slack
    assert least[width] == 0


def in_use(states, readers):
    """`up`, `down` and the squared singular values of the project's projections, at every rank."""
    return (found[0] for found in balanced_factors(states[None], readers[None]))


def test_least_read_errors_are_those_of_the_projections_in_use():
    states, readers = random_moment(8, 0), random_moment(8, 2)
    up, down, _ = in_use(states, readers)
    least = least_read_errors(states, readers)
    for rank in range(1, 9):
        error = read_error(states, readers, identity(8) - up[:, :rank] @ down[:rank])
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
        read_error(**moments, rest=identity(4))


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
    assert read_error(states, readers, identity(6) - B @ A.T) > 1.1 * least_read_errors(states, readers)[3]


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
