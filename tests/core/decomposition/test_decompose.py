"""Weights alone against float64 SVD, known spectra and Eckart-Young; the unguarded Gram route is the control.

What moments add to it is in test_moments, what each method makes of it in test_methods.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorc_core.decomposition.decompose import decompose, decompose_weight
from lorc_core.decomposition.factors import kind_spectrum, log10_condition
from lorc_core.decomposition.left_singular import left_singular, left_singular_by_gram
from lorc_core.decomposition.moments import Moments
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.model.blocks import Partition
from tests.spectra import joint, random_matrix


def matrix_of_condition(rows, columns, condition, seed=0):
    left = torch.linalg.qr(random_matrix(rows, rows, seed))[0]
    right = torch.linalg.qr(random_matrix(columns, rows, seed + 1))[0]
    spectrum = torch.logspace(0, -math.log10(condition), rows, dtype=torch.float64)
    return left * spectrum @ right.T, spectrum


def spectrum_error(found, exact):
    return ((found - exact).abs() / exact).max().item()


@pytest.mark.parametrize("condition", [1e1, 1e3, 2.9e3, 3.1e3, 1e5, 1e6])
def test_left_singular_spectrum_is_within_1e9_whatever_the_condition(condition):
    # Worst of 20 seeds: 2.0e-10, by the Gram route at 2.9e3; past the guard 1.9e-11, at 1e6.
    weight, _ = matrix_of_condition(64, 256, condition)
    exact = torch.linalg.svdvals(weight)
    assert spectrum_error(left_singular(weight)[1], exact) < 1e-9


def test_left_singular_at_condition_1e8_is_within_1e6():
    weight, spectrum = matrix_of_condition(64, 256, 1e8)
    assert spectrum_error(left_singular(weight)[1], spectrum) < 1e-6


@pytest.mark.parametrize(("condition", "route"), [(2.9e3, "gram"), (3.1e3, "qr"), (1e8, "qr")])
def test_left_singular_takes_the_guarded_route(condition, route):
    weight, _ = matrix_of_condition(64, 256, condition)
    assert left_singular(weight)[2] == route


def test_gram_route_alone_fails_the_bound_at_condition_1e6():
    """The control: without the guard the bound above does not hold."""
    weight, spectrum = matrix_of_condition(64, 256, 1e6)
    assert spectrum_error(left_singular_by_gram(weight)[1], spectrum) > 1e-7


def projection_error(weight, basis):
    return (weight - basis @ (basis.T @ weight)).norm()


@given(
    rows=st.integers(2, 24),
    columns=st.integers(2, 40),
    log_condition=st.floats(0, 7),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_decompose_weight_at_every_rank_is_as_good_as_eckart_young_allows(rows, columns, log_condition, seed, data):
    size = min(rows, columns)
    weight = random_matrix(rows, size, seed) @ (
        torch.logspace(0, -log_condition, size, dtype=torch.float64)[:, None] * random_matrix(size, columns, seed + 1)
    )
    rank = data.draw(st.integers(1, rows))
    factors = decompose_weight(weight, joint(rows), None).factors([rank])
    least = torch.linalg.svdvals(weight)[rank:].norm()
    torch.testing.assert_close(
        projection_error(weight, factors.up), least, rtol=1e-6, atol=1e-10 * weight.norm().item()
    )


def test_a_random_basis_fails_the_eckart_young_bound():
    """The control: another projection of the same rank is worse."""
    weight, _ = matrix_of_condition(16, 32, 1e3)
    random_basis = torch.linalg.qr(random_matrix(16, 4, 5))[0]
    assert projection_error(weight, random_basis) > 1.5 * torch.linalg.svdvals(weight)[4:].norm()


def test_factors_are_nested_and_orthonormal():
    decomposition = decompose_weight(random_matrix(12, 40, 3), joint(12), None)
    full = decomposition.factors([12])
    torch.testing.assert_close(full.up.T @ full.up, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
    for rank in range(1, 12):
        assert torch.equal(decomposition.factors([rank]).up, full.up[:, :rank])


def test_a_bias_is_kept_whole_at_every_rank():
    weight, bias, inputs = random_matrix(12, 40, 3), random_matrix(12, 1, 4)[:, 0], random_matrix(40, 7, 5)
    left, spectrum, right = torch.linalg.svd(weight, full_matrices=False)
    decomposition = decompose_weight(weight, joint(12), bias)
    for rank in (1, 5, 12):
        factors = decomposition.factors([rank])
        states = weight @ inputs + bias[:, None]
        rebuilt = factors.up @ (factors.down @ states) + factors.offset()[:, None]
        truncated = (left[:, :rank] * spectrum[:rank]) @ right[:rank]
        torch.testing.assert_close(rebuilt, truncated @ inputs + bias[:, None], rtol=0, atol=1e-11)


def test_decompose_weight_takes_more_rows_than_columns():
    """Some models have wider keys than hidden states; the missing directions carry nothing."""
    weight = random_matrix(20, 8, 1)
    decomposition = decompose_weight(weight, joint(20), None)
    assert decomposition.up.shape == (1, 20, 20)
    torch.testing.assert_close(decomposition.singular_values, torch.linalg.svdvals(weight))
    assert projection_error(weight, decomposition.factors([8]).up) < 1e-12 * weight.norm()


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([0, 0], r"rank must be in 1\.\.6 in some block, got 0 in all"),
        ([7, 1], r"rank must be in 0\.\.6, got 7"),
        ([2, -1], r"rank must be in 0\.\.6, got -1"),
        ([3], "there are 2 blocks, got 1 ranks"),
    ],
)
def test_factors_ranks_out_of_range_name_what_is_allowed(ranks, message):
    with pytest.raises(ConfigError, match=message):
        decompose_weight(random_matrix(12, 40, 3), Partition("head", 2, 6), None).factors(ranks)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_named(bad):
    weight, bias, moment = random_matrix(4, 8, 0), torch.zeros(4).double(), torch.eye(4).double()
    broken, broken_bias, broken_moment = weight.clone(), bias.clone(), moment.clone()
    broken[2, 3] = broken_bias[1] = broken_moment[1, 2] = bad
    for arguments in ((broken, joint(4), bias), (weight, joint(4), broken_bias)):
        with pytest.raises(NumericsError, match="the weight or its bias holds NaN or infinity"):
            decompose_weight(*arguments)
    for name, moments, of in (
        ("weight", Moments(moment, moment, None), broken),
        ("states' second moment", Moments(broken_moment, moment, None), weight),
        ("readers' second moment", Moments(moment, broken_moment, None), weight),
        ("bias", Moments(moment, moment, broken_bias), weight),
    ):
        with pytest.raises(NumericsError, match=f"the {name} holds NaN or infinity"):
            decompose(moments, of, joint(4), "interaction", rotated=False)


def test_log10_condition_is_infinite_for_a_deficient_matrix_and_exact_otherwise():
    deficient = random_matrix(6, 3, 0) @ random_matrix(3, 20, 1)
    assert decompose_weight(deficient, joint(6), None).log10_condition == math.inf
    weight, _ = matrix_of_condition(16, 40, 1e5)
    assert decompose_weight(weight, joint(16), None).log10_condition == pytest.approx(5, abs=1e-9)
    assert decompose_weight(weight, Partition("head", 4, 4), None).log10_condition == pytest.approx(5, abs=1e-9)
    assert log10_condition(torch.zeros(3, dtype=torch.float64), (3, 3)) == math.inf


def of_moments(weight, partition, mean):
    """`decompose`, whose condition number is the weight's too, whatever the moments."""
    white = torch.eye(len(weight), dtype=torch.float64)
    return decompose(Moments(white, white, mean), weight, partition, "none", rotated=False)


@pytest.mark.parametrize("way", [decompose_weight, of_moments])
@pytest.mark.parametrize("shape", [(4, 2000), (2000, 4)])
@pytest.mark.parametrize("condition", [1e12, 1e13])
def test_log10_condition_is_infinite_where_matrix_rank_says_deficient(shape, condition, way):
    """The threshold is that of the matrix's larger side, whichever it is: 2000 eps is 4e-13, 4 eps is 9e-16.

    The control: with kv_width alone, 4 of (4, 2000), a condition number of 1e13 would pass for finite.
    """
    weight = matrix_of_condition(min(shape), max(shape), condition)[0]
    weight = weight if shape[0] < shape[1] else weight.T.contiguous()
    found = way(weight, joint(shape[0]), None).log10_condition
    singular_values = torch.linalg.svdvals(weight)
    assert log10_condition(singular_values, weight.shape) == pytest.approx(found, abs=0.01)
    assert math.isfinite(log10_condition(singular_values, (4,)))
    if torch.linalg.matrix_rank(weight) < 4:
        assert condition == 1e13
        assert found == math.inf
    else:
        assert condition == 1e12
        assert found == pytest.approx(12, abs=0.01)


@pytest.mark.parametrize("block", ["head", "group(2)"])
def test_each_block_of_a_weight_is_the_svd_of_its_own_rows(block):
    partition = Partition(block, 4, 3)
    weight, ranks = random_matrix(12, 40, 3), [2, 1, 3, 2][: partition.num_blocks]
    found = decompose_weight(weight, partition, None)
    factors, spectrum, done = found.factors(ranks), kind_spectrum(found), 0
    for idx, (rows, rank) in enumerate(zip(weight.split(partition.width), ranks, strict=True)):
        left, values, _ = torch.linalg.svd(rows)
        up = factors.up[:, done : done + rank]
        done += rank
        torch.testing.assert_close(up @ up.T, left[:, :rank] @ left[:, :rank].T, rtol=0, atol=1e-10)
        for energies in (spectrum.weights, spectrum.states, spectrum.read):
            assert energies[idx] == pytest.approx(values.square().tolist(), rel=1e-9)
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(weight))
