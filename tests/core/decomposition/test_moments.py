"""Moments against loops over heads, tokens and positions; the read-aware projection against every other one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorc_core.compression import LoadedWeights
from lorc_core.decomposition.decompose import decompose
from lorc_core.decomposition.moments import Moments, moments_of
from lorc_core.decomposition.position_average import over_positions, position_average
from lorc_core.decomposition.second_moments import SecondMoment
from lorc_core.errors import ConfigError
from lorc_core.measurement.calibration import calibrate
from lorc_core.methods import METHODS, Axes
from lorc_core.model.architecture import architecture_of
from lorc_core.model.blocks import Partition
from lorc_core.model.channels import diagonal_blocks
from lorc_core.model.kinds import LayerKind
from tests.materialised import channels_of, dense_projection, materialise, rotated
from tests.models import tiny_model
from tests.runs import tokens
from tests.spectra import joint, random_matrix


@given(
    width=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    seed=st.integers(0, 999),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_second_moments_add_in_any_order_and_equal_their_definition(width, sizes, seed, data):
    tokens = random_matrix(sum(sizes), width, seed)
    parts = data.draw(st.permutations([SecondMoment.of(part) for part in tokens.split(sizes)]))
    split = data.draw(st.integers(0, len(parts) - 1))
    pairs = parts[:split], parts[split:]
    first, second = (sum(half[1:], half[0]) if half else None for half in pairs)
    whole = second if first is None else first + second
    centre = random_matrix(1, width, seed + 1)[0]
    assert whole.num_tokens == len(tokens)
    torch.testing.assert_close(whole.total, sum(torch.outer(token, token) for token in tokens))
    torch.testing.assert_close(whole.mean, tokens.mean(dim=0))
    torch.testing.assert_close(whole.about(None), sum(torch.outer(token, token) for token in tokens) / len(tokens))
    about = sum(torch.outer(token - centre, token - centre) for token in tokens) / len(tokens)
    torch.testing.assert_close(whole.about(centre), about)


def test_second_moments_are_summed_in_float64():
    """In float32 the sum of 100,000 ones and a hundredth would lose the hundredth's square."""
    tokens = torch.cat([torch.ones(100_000, 1), torch.full((1, 1), 0.01)])
    assert SecondMoment.of(tokens).total.item() == pytest.approx(100_000.0001, abs=1e-6)


def random_gains(model):
    """Norm gains and biases are ones and zeros in a new model."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


@pytest.mark.parametrize("gqa", ["stack", "sum"])
@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_weight_moments_equal_their_definition_head_by_head(name, kind, gain, gqa):
    model = random_gains(tiny_model(name))
    architecture = architecture_of(model.config)
    axes = Axes("weights_with_gain" if gain else "weights", "interaction", gqa=gqa)
    moments = moments_of(LoadedWeights(model), architecture, LayerKind(1, kind), axes, None)
    attention = model.base_model.get_submodule(architecture.attention_module(1))
    size, head_dim = architecture.hidden_size, architecture.head_dim
    input_moment, shift = torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    if name == "opt" and gain:
        norm = model.model.decoder.layers[1].self_attn_layer_norm
        centre = torch.eye(size, dtype=torch.float64) - torch.ones(size, size, dtype=torch.float64) / size
        input_moment = norm.weight.double().diag() @ centre @ norm.weight.double().diag()
        shift = norm.bias.double()
    elif gain:
        input_moment = model.model.layers[1].input_layernorm.weight.double().square().diag()

    def moment_and_mean(weight, bias):
        weight = weight.double()
        bias = bias.double() if bias is not None else torch.zeros(len(weight)).double()
        return weight @ input_moment @ weight.T, bias + weight @ shift

    projection = attention.k_proj if kind == "keys" else attention.v_proj
    states, mean = moment_and_mean(projection.weight, projection.bias)
    torch.testing.assert_close(moments.states, states)
    if name == "llama":
        assert moments.mean is None
    else:
        torch.testing.assert_close(moments.mean, mean)
    readers = torch.zeros_like(states)
    group = architecture.num_heads // architecture.num_kv_heads
    output = getattr(attention, "o_proj", None) or attention.out_proj
    for kv_head in range(architecture.num_kv_heads):
        rows = slice(kv_head * head_dim, (kv_head + 1) * head_dim)
        heads = [
            slice(head * head_dim, (head + 1) * head_dim) for head in range(kv_head * group, (kv_head + 1) * group)
        ]
        bias = attention.q_proj.bias
        weights = [(attention.q_proj.weight[own], None if bias is None else bias[own]) for own in heads]
        read = [output.weight[:, own].double() for own in heads]
        if gqa == "sum":
            weights = [(sum(w for w, _ in weights), None if bias is None else sum(b for _, b in weights))]
            read = [sum(read)]
        if kind == "keys":
            for weight, own_bias in weights:
                moment, query_mean = moment_and_mean(weight, own_bias)
                readers[rows, rows] += moment + torch.outer(query_mean, query_mean)
        else:
            readers[rows, rows] = sum(one.T @ one for one in read)
    torch.testing.assert_close(moments.readers, readers)


def test_methods_that_calibrate_need_calibration():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="needs calibration text"):
        moments_of(
            LoadedWeights(model), architecture_of(model.config), LayerKind(0, "keys"), METHODS["kq_joint"].keys, None
        )


@pytest.mark.parametrize("name", ["llama", "llama-llama3", "qwen2"])
@pytest.mark.parametrize("num_positions", [1, 2, 37])
def test_position_average_is_the_mean_over_explicitly_rotated_moments(name, num_positions):
    model = tiny_model(name)
    architecture = architecture_of(model.config)
    moment = random_moment(architecture.kv_width, 50, 3)
    root = torch.linalg.cholesky(moment).T  # rows whose second moment it is
    expected = torch.zeros_like(moment)
    heads = root.unflatten(-1, (architecture.num_kv_heads, -1))
    turned = rotated(model, heads[:, None].expand(-1, num_positions, -1, -1)).flatten(2)  # (rows, positions, N)
    for position in range(num_positions):
        expected += turned[:, position].T @ turned[:, position] / num_positions
    found = position_average(moment, architecture, 0, num_positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(moment.abs().max()) / 1e3)
    if num_positions == 1:
        torch.testing.assert_close(found, moment)
    else:
        assert (found - moment).abs().max() > 0.01 * moment.abs().max()  # the control


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_measured_moments_over_positions_are_those_of_states_rotated_at_every_position(name, join):
    """The control: those that were measured are of the windows' 20 positions."""
    model, num_positions = tiny_model(name), 50
    architecture, ids = architecture_of(model.config), tokens(model, rows=3, columns=20)
    measured, layer = calibrate(model, [ids], join_rotated_heads=join)[1], materialise(model, ids)[1]
    found = over_positions(measured, architecture, 1, num_positions)
    for part in ("inputs", "keys", "values", "queries", "summed"):
        assert found.moments[part] is measured.moments[part]

    def at_every_position(heads):
        """(T, heads, d) to (T * positions, heads, d)."""
        return rotated(model, heads[:, None].expand(-1, num_positions, -1, -1)).flatten(0, 1)

    keys = at_every_position(layer.keys)
    queries = at_every_position(layer.queries.flatten(1, 2)).unflatten(1, layer.queries.shape[1:3])
    for part, states in (
        ("keys", keys.flatten(1)[None] if join else keys.transpose(0, 1)),
        ("queries", queries.permute(1, 2, 0, 3).flatten(1, 2)),
        ("summed", queries.sum(dim=2).transpose(0, 1)),
    ):
        moment, old = found.moments[f"rotated_{part}"], measured.moments[f"rotated_{part}"]
        total, sums = states.mT @ states / num_positions, states.sum(dim=1) / num_positions
        total, sums = total.view_as(old.total), sums.view_as(old.sum)
        assert moment.num_tokens == old.num_tokens
        torch.testing.assert_close(moment.total, total, rtol=0, atol=1e-5 * total.abs().max().item())
        torch.testing.assert_close(moment.sum, sums, rtol=0, atol=1e-5 * sums.abs().max().item())
        assert (old.total - total).abs().max() > 0.01 * total.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("block", ["head", "frequency"])
def test_weight_moments_after_the_rotation_are_those_of_rotated_biased_states(name, block):
    """States of white inputs, biases among them, rotated at every position; frequency blocks do not feel the rotation."""
    model, num_positions = tiny_model(name), 25
    architecture = replace(architecture_of(model.config), max_tokens=num_positions)
    attention = model.base_model.layers[2].self_attn

    def columns(linear, num_heads):
        """Rows for each white input alone and for the bias: their second moment is C."""
        bias = linear.bias if linear.bias is not None else torch.zeros(len(linear.weight))
        return torch.cat([linear.weight.T, bias[None]]).detach().double().unflatten(-1, (num_heads, -1))

    def averaged(heads):
        turned = rotated(model, heads[:, None].expand(-1, num_positions, -1, -1))
        return turned.flatten(0, 1) / num_positions**0.5

    axes = Axes("weights", "interaction", block, "post_rope")
    found = moments_of(LoadedWeights(model), architecture, LayerKind(2, "keys"), axes, None)
    keys = averaged(columns(attention.k_proj, architecture.num_kv_heads)).flatten(1)
    queries = averaged(columns(attention.q_proj, architecture.num_heads))
    group = architecture.num_heads // architecture.num_kv_heads
    by_kv_head = [queries[:, i * group : (i + 1) * group].flatten(0, 1) for i in range(architecture.num_kv_heads)]
    partition = Partition(block, architecture.num_kv_heads, architecture.head_dim)
    assert found.mean is None
    for moment, expected in (
        (found.states, keys.T @ keys),
        (found.readers, torch.block_diag(*(one.T @ one for one in by_kv_head))),
    ):
        torch.testing.assert_close(
            diagonal_blocks(moment, partition), diagonal_blocks(expected, partition), rtol=1e-5, atol=1e-5
        )


def identity(size):
    return torch.eye(size, dtype=torch.float64)


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
    found = decompose(moments, identity(size), joint(size), "interaction", rotated=False)
    rank = data.draw(st.integers(1, size))
    factors = found.factors([rank])
    total = found.read_energies.sum().item()
    error = read_error(moments, factors.up @ factors.down)
    assert error == pytest.approx(found.read_energies[0, rank:].sum().item(), abs=1e-8 * total)
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
    found = decompose(moments, identity(4), joint(4), "interaction", rotated=False).factors([3])
    plain = torch.eye(4, dtype=torch.float64)[:, :3]
    assert read_error(moments, plain @ plain.T) > 100 * read_error(moments, found.up @ found.down)


@given(size=st.integers(2, 10), seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_with_readers_that_see_everything_alike_it_is_pca(size, seed, scale):
    states = random_moment(size, size + 3, seed)
    moments = Moments(states, scale * identity(size), None)
    found = decompose(moments, identity(size), joint(size), "interaction", rotated=False)
    vectors = torch.linalg.eigh(states)[1].flip(1)
    for rank in range(1, size + 1):
        factors, basis = found.factors([rank]), vectors[:, :rank]
        torch.testing.assert_close(factors.up @ factors.down, basis @ basis.T, rtol=0, atol=1e-5)


def test_read_aware_factors_are_nested_and_the_full_rank_is_the_identity():
    moments = Moments(random_moment(8, 12, 0), random_moment(8, 12, 1), None)
    found = decompose(moments, identity(8), joint(8), "interaction", rotated=False)
    full = found.factors([8])
    torch.testing.assert_close(full.up @ full.down, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)
    for rank in range(1, 8):
        assert torch.equal(found.factors([rank]).up, full.up[:, :rank])
        assert torch.equal(found.factors([rank]).down, full.down[:rank])


def test_a_deficient_moment_is_projected_on_what_it_holds():
    moments = Moments(random_moment(8, 3, 0), random_moment(8, 12, 1), None)
    factors = decompose(moments, identity(8), joint(8), "interaction", rotated=False).factors([3])
    assert abs(read_error(moments, factors.up @ factors.down)) < 1e-8 * torch.trace(moments.readers @ moments.states)


@given(
    block=st.sampled_from(["joint", "group(2)", "head", "frequency"]),
    reader=st.sampled_from(["none", "stacked", "interaction"]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_each_reader_is_optimal_in_every_block_and_its_energies_are_the_errors(block, reader, seed, data):
    """What is minimised, written out: tr((I-P) C), tr((I-P) (C+M)) or tr(M (I-P) C (I-P)^T), of each block's own part.

    Of a frequency's block the part is that which every rotation leaves, and so is every projection allowed there.
    """
    partition = Partition(block, 4, 4)
    C, M = random_moment(16, 20, seed), random_moment(16, 20, seed + 1)
    found = decompose(Moments(C, M, None), identity(16), partition, reader, rotated=False)
    blocks = channels_of(block, 4, 4)
    ranks = [partition.rank_step * data.draw(st.integers(0, partition.width // partition.rank_step)) for _ in blocks]
    ranks[-1] = partition.rank_step
    projection = dense_projection(found.factors(ranks))
    for idx, (channels, rank) in enumerate(zip(blocks, ranks, strict=True)):
        own_C, own_M = (turned_average(moment[channels][:, channels], block) for moment in (C, M))
        rest = identity(len(channels)) - projection[channels][:, channels]
        if reader == "none":
            own_M = identity(len(channels))
        elif reader == "stacked":
            own_C, own_M = own_C + own_M, identity(len(channels))
        error, whole = torch.trace(own_M @ rest @ own_C @ rest.T), torch.trace(own_M @ own_C)
        root = torch.linalg.cholesky(own_M).T @ torch.linalg.cholesky(own_C)
        least = torch.linalg.svdvals(root)[rank:].square().sum()  # Eckart-Young
        torch.testing.assert_close(error, least, rtol=0, atol=1e-8 * whole.item())
        torch.testing.assert_close(found.read_energies[idx, rank:].sum(), least, rtol=0, atol=1e-8 * whole.item())


def turned_average(moment, block):
    """The mean over a full turn of all of a frequency block's (real, imaginary) pairs; other blocks as they are."""
    if block != "frequency":
        return moment
    half = len(moment) // 2
    quarter = torch.zeros_like(moment)
    quarter[:half, half:], quarter[half:, :half] = -identity(half), identity(half)
    return (moment + quarter @ moment @ quarter.T) / 2
