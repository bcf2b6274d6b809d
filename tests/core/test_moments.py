"""Moments from weights against loops over heads, and the read-aware projection against every other one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorc_core.architecture import architecture_of
from lorc_core.compression import LoadedWeights
from lorc_core.errors import NumericsError
from lorc_core.moments import Moments, weight_moments
from lorc_core.projection import decompose_moments
from tests.conftest import tiny_model
from tests.core.test_projection import random_matrix


def random_gains(model):
    """Norm gains and biases are ones and zeros in a new model."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_weight_moments_equal_their_definition_head_by_head(name, kind):
    model = random_gains(tiny_model(name))
    architecture = architecture_of(model.config)
    moments = weight_moments(LoadedWeights(model), architecture, 1, kind)
    attention = model.base_model.get_submodule(architecture.attention_module(1))
    size, head_dim = architecture.hidden_size, architecture.head_dim
    if name == "opt":
        norm = model.model.decoder.layers[1].self_attn_layer_norm
        centre = torch.eye(size, dtype=torch.float64) - torch.ones(size, size, dtype=torch.float64) / size
        input_moment = norm.weight.double().diag() @ centre @ norm.weight.double().diag()
        shift = norm.bias.double()
    else:
        input_moment = model.model.layers[1].input_layernorm.weight.double().square().diag()
        shift = torch.zeros(size, dtype=torch.float64)

    def moment_and_mean(projection):
        weight = projection.weight.double()
        bias = projection.bias.double() if projection.bias is not None else torch.zeros(len(weight)).double()
        return weight @ input_moment @ weight.T, bias + weight @ shift

    states, mean = moment_and_mean(attention.k_proj if kind == "keys" else attention.v_proj)
    torch.testing.assert_close(moments.states, states)
    if name == "llama":
        assert moments.mean is None
    else:
        torch.testing.assert_close(moments.mean, mean)
    readers = torch.zeros_like(states)
    group = architecture.num_heads // architecture.num_kv_heads
    for head in range(architecture.num_heads):
        rows = slice(head // group * head_dim, (head // group + 1) * head_dim)
        own = slice(head * head_dim, (head + 1) * head_dim)
        if kind == "keys":
            moment, query_mean = moment_and_mean(attention.q_proj)
            readers[rows, rows] += (moment + torch.outer(query_mean, query_mean))[own, own]
        else:
            output = getattr(attention, "o_proj", None) or attention.out_proj
            readers[rows, rows] += output.weight.double()[:, own].T @ output.weight.double()[:, own]
    torch.testing.assert_close(moments.readers, readers)


def random_moment(size, rank, seed):
    root = random_matrix(size, rank, seed)
    return root @ root.T


def read_error(moments, projection):
    rest = torch.eye(len(projection), dtype=torch.float64) - projection
    return torch.trace(moments.readers @ rest @ moments.states @ rest.T).item()


@given(
    size=st.integers(2, 12),
    extra=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_read_aware_projection_reaches_the_tail_sum_and_nothing_does_better(size, extra, seed, data):
    """Theorem 2 of KQ-SVD: the least error at rank r is the sum of the squared singular values past r."""
    moments = Moments(random_moment(size, size + extra[0], seed), random_moment(size, size + extra[1], seed + 1), None)
    found = decompose_moments(moments, torch.ones(size))
    rank = data.draw(st.integers(1, size))
    factors = found.factors(rank)
    total = found.read_energies.sum().item()
    error = read_error(moments, factors.up @ factors.down)
    assert error == pytest.approx(found.read_energies[rank:].sum().item(), abs=1e-8 * total)
    states_alone = torch.linalg.eigh(moments.states)[1].flip(1)[:, :rank]
    others = [states_alone @ states_alone.T, *(random_projection(size, rank, seed + i) for i in range(3))]
    assert all(error <= read_error(moments, other) + 1e-8 * total for other in others)


def random_projection(size, rank, seed):
    basis = torch.linalg.qr(random_matrix(size, rank, seed))[0]
    return basis @ basis.T


def test_ignoring_the_readers_can_be_much_worse():
    """The control: where readers look at the states' small directions, plain PCA keeps the wrong ones."""
    moments = Moments(
        torch.diag(torch.tensor([10.0, 1, 1, 1]).double()), torch.diag(torch.tensor([1e-3, 9, 9, 9]).double()), None
    )
    found = decompose_moments(moments, torch.ones(4)).factors(3)
    plain = torch.eye(4, dtype=torch.float64)[:, :3]
    assert read_error(moments, plain @ plain.T) > 100 * read_error(moments, found.up @ found.down)


@given(size=st.integers(2, 10), seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_with_readers_that_see_everything_alike_it_is_pca(size, seed, scale):
    states = random_moment(size, size + 3, seed)
    found = decompose_moments(Moments(states, scale * torch.eye(size, dtype=torch.float64), None), torch.ones(size))
    vectors = torch.linalg.eigh(states)[1].flip(1)
    for rank in range(1, size + 1):
        factors, basis = found.factors(rank), vectors[:, :rank]
        torch.testing.assert_close(factors.up @ factors.down, basis @ basis.T, rtol=0, atol=1e-5)


def test_read_aware_factors_are_nested_and_the_full_rank_is_the_identity():
    found = decompose_moments(Moments(random_moment(8, 12, 0), random_moment(8, 12, 1), None), torch.ones(8))
    full = found.factors(8)
    torch.testing.assert_close(full.up @ full.down, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)
    for rank in range(1, 8):
        assert torch.equal(found.factors(rank).up, full.up[:, :rank])
        assert torch.equal(found.factors(rank).down, full.down[:rank])


def test_a_deficient_moment_is_projected_on_what_it_holds():
    moments = Moments(random_moment(8, 3, 0), random_moment(8, 12, 1), None)
    factors = decompose_moments(moments, torch.ones(8)).factors(3)
    assert abs(read_error(moments, factors.up @ factors.down)) < 1e-8 * torch.trace(moments.readers @ moments.states)


def test_a_moment_that_is_not_finite_is_named():
    broken = random_moment(4, 4, 0)
    broken[1, 2] = float("nan")
    with pytest.raises(NumericsError, match="second moment of the readers holds NaN"):
        decompose_moments(Moments(random_moment(4, 4, 1), broken, None), torch.ones(4))
