"""Blocks of channels against lists written out by loops, and what a frequency block promises: rotations pass through."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorc_core.decomposition.decompose import decompose
from lorc_core.decomposition.moments import Moments
from lorc_core.errors import ConfigError
from lorc_core.methods import Axes
from lorc_core.model.blocks import Partition, group_size, partition_of
from lorc_core.model.channels import diagonal_blocks, join_blocks, split_blocks
from lorc_core.model.rotary import Rotary
from tests.materialised import channels_of, dense_projection
from tests.spectra import random_matrix

BLOCKS = ["joint", "head", "group(1)", "group(2)", "group(4)", "frequency"]


def rotary(num_channels, *, interleaved=False):
    return Rotary(num_channels, interleaved, None, (1.0,) * (num_channels // 2), 1.0)


def random_moment(size, columns, seed):
    root = random_matrix(size, columns, seed)
    return root @ root.T


@given(
    block=st.sampled_from([*BLOCKS, "interleaved_frequency"]),
    groups=st.integers(1, 3),
    half=st.integers(1, 4),
    rows=st.lists(st.integers(1, 3), max_size=2),
)
@settings(deadline=None)
def test_split_takes_each_blocks_channels_and_join_is_its_inverse(block, groups, half, rows):
    heads = 4 * groups
    partition = Partition(block, heads, 2 * half)
    states = torch.arange(partition.kv_width).expand(*rows, -1) + torch.rand(*rows, 1)
    blocks = split_blocks(states, partition)
    expected = channels_of(block, heads, 2 * half)
    assert (partition.num_blocks, partition.width) == (len(expected), len(expected[0]))
    torch.testing.assert_close(blocks, torch.stack([states[..., channels] for channels in expected], dim=-2))
    assert torch.equal(join_blocks(blocks, partition), states)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block != "frequency"])
def test_diagonal_is_each_blocks_part_of_the_moment(block):
    moment = random_moment(24, 30, 0)
    found = diagonal_blocks(moment, partition_of(block, 4, 6, rotary(6)))
    for part, channels in zip(found, channels_of(block, 4, 6), strict=True):
        for row, channel in enumerate(channels):
            for column, other in enumerate(channels):
                assert part[row, column] == moment[channel, other]


def test_the_frequency_diagonal_is_the_moment_averaged_over_all_rotations():
    """The real matrix [[A, -B], [B, A]] of the complex A + iB is the mean of R S R^T over a full turn."""
    heads, head_dim, turns = 3, 4, 12
    states = random_matrix(heads * head_dim, 50, 1)
    averaged = torch.zeros(heads * head_dim, heads * head_dim, dtype=torch.float64)
    for turn in range(turns):
        turned = rotate(states.T, torch.full((2,), 2 * torch.pi * turn / turns, dtype=torch.float64), heads).T
        averaged += turned @ turned.T / turns
    found = diagonal_blocks(states @ states.T, partition_of("frequency", heads, head_dim, rotary(head_dim)))
    for part, channels in zip(found, channels_of("frequency", heads, head_dim), strict=True):
        real = torch.cat([torch.cat([part.real, -part.imag], 1), torch.cat([part.imag, part.real], 1)])
        torch.testing.assert_close(real, averaged[channels][:, channels])


def rotate(states, angles, num_kv_heads, *, interleaved=False):
    """(..., G * d) turned by one angle for each pair of channels of a head."""
    part = -1 if interleaved else -2
    shape = (num_kv_heads, -1, 2) if interleaved else (num_kv_heads, 2, -1)
    real, imaginary = states.unflatten(-1, shape).unbind(part)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.stack([turned.real, turned.imag], dim=part).flatten(-3)


@given(
    heads=st.integers(1, 4),
    half=st.integers(1, 4),
    reader=st.sampled_from(["none", "stacked", "interaction"]),
    seed=st.integers(0, 999),
    interleaved=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_frequency_projections_commute_with_every_rotation(heads, half, reader, seed, interleaved, data):
    width = 2 * heads * half
    partition = partition_of("frequency", heads, 2 * half, rotary(2 * half, interleaved=interleaved))
    moments = Moments(random_moment(width, 2 * width, seed), random_moment(width, 2 * width, seed + 1), None)
    found = decompose(moments, torch.eye(width, dtype=torch.float64), partition, reader, rotated=True)
    ranks = [2 * data.draw(st.integers(0, heads)) for _ in range(half)]
    ranks[0] = max(ranks[0], 2)
    projection = dense_projection(found.factors(ranks))
    states, angles = random_matrix(5, width, seed + 2), random_matrix(1, half, seed + 3)[0]
    before = rotate(states, angles, heads, interleaved=interleaved) @ projection.T
    after = rotate(states @ projection.T, angles, heads, interleaved=interleaved)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-8 * max(1.0, float(projection.abs().max())))


def test_a_real_block_does_not_commute_with_rotations():
    """The control."""
    partition = partition_of("head", 2, 8, rotary(8))
    moments = Moments(random_moment(16, 32, 0), random_moment(16, 32, 1), None)
    found = decompose(moments, torch.eye(16, dtype=torch.float64), partition, "none", rotated=True)
    projection = dense_projection(found.factors([4, 4]))
    states, angles = random_matrix(5, 16, 2), random_matrix(1, 4, 3)[0]
    difference = rotate(states, angles, 2) @ projection.T - rotate(states @ projection.T, angles, 2)
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize(
    ("block", "kind", "message"),
    [
        (
            "group(3)",
            rotary(16),
            r"block group\(3\): 3 does not divide the model's 8 kv heads; possible are 1, 2, 4, 8",
        ),
        ("group(16)", rotary(16), "16 does not divide"),
        ("frequency", None, "block frequency: the model has no rotary embedding"),
        ("frequency", rotary(4), "block frequency: of 16 channels of a head only 4 have a rotary frequency"),
    ],
)
def test_blocks_that_a_model_cannot_have_are_refused(block, kind, message):
    with pytest.raises(ConfigError, match=message):
        partition_of(block, 8, 16, kind)


@pytest.mark.parametrize("block", ["joined", "group", "group(0)", "group(-1)", "group(2) ", ""])
def test_blocks_that_do_not_exist_are_refused_with_those_that_do(block):
    with pytest.raises(ConfigError, match=r"known are joint, head, group\(HEADS\), frequency"):
        Axes("calibration", block=block)


def test_only_head_blocks_need_equal_ranks_and_only_complex_ones_even_ranks():
    partitions = {block: Partition(block, 4, 8) for block in BLOCKS}
    assert [block for block, one in partitions.items() if one.equal_ranks] == ["head"]
    assert [block for block, one in partitions.items() if one.rank_step == 2] == ["frequency"]
    assert group_size("group(4)") == 4
    assert group_size("joint") is None
