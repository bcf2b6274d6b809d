"""Interpolated scores against rebuilt and rotated keys in float64, and through a whole model.

Worst error over the largest score: 3.0e-7 interpolated, 2.7e-7 by rebuilding in float32; the bound is 1.2e-6.
"""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lorc_core
from lorc_core import interpolation
from lorc_core.blocks import Partition
from lorc_core.interpolation import SPAN, interpolation_of, slot_scores
from lorc_core.projection import Factors
from lorc_core.unrotated_keys import UnrotatedKeys, rotated_scores
from tests.core.test_runtime import assert_close, one_pass, token_by_token, tokens

HEADS, HEAD_DIM, RANK, SLOTS, BOUND = 4, 64, 40, 2 * SPAN + 37, 1.2e-6


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turns_of_slots(base, num_channels=HEAD_DIM, first_slot=0, scale=1.0):
    frequencies = base ** (-torch.arange(num_channels // 2, dtype=torch.float64) * 2 / num_channels)
    angles = torch.arange(first_slot, first_slot + SLOTS)[:, None] * frequencies
    return torch.polar(torch.full_like(angles, scale), angles).to(torch.complex64)[None]


def case(turns, num_kv_heads=HEADS, q_len=1, rows=1, shifted=True):
    """A query, and the keys that it reads."""
    partition = Partition("joint", num_kv_heads, HEAD_DIM)
    factors = Factors(partition, (RANK,), random(partition.width, RANK, seed=1), None, None)
    latents, offset = random(rows, 1, SLOTS, RANK, seed=2), random(partition.width, seed=4) if shifted else None
    return random(rows, HEADS, q_len, HEAD_DIM, seed=3), UnrotatedKeys(latents, factors, offset, turns)


def exact(query, keys):
    offset = None if keys.offset is None else keys.offset.double()
    factors, turns = keys.factors.to("cpu", torch.float64), keys.turns.to(torch.complex128)
    return rotated_scores(query.double(), UnrotatedKeys(keys.latents.double(), factors, offset, turns))


def error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("facts", "about_turns"),
    [
        ({}, {"base": 1e4}),
        ({}, {"base": 5e5}),
        ({}, {"base": 5e5, "first_slot": 5000}),
        ({}, {"base": 5e5, "scale": 1.3}),  # as by yarn
        ({}, {"base": 1e4, "num_channels": 16}),  # the others are passed
        ({"num_kv_heads": 2}, {"base": 1e6}),
        ({"rows": 3}, {"base": 5e5}),
        ({"q_len": 2}, {"base": 1e6}),
    ],
)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("step_bytes", [1, 16 << 20])
def test_interpolated_scores_are_those_of_rebuilt_keys(facts, about_turns, shifted, step_bytes, monkeypatch):
    monkeypatch.setattr(interpolation, "STEP_BYTES", step_bytes)
    given = case(turns := turns_of_slots(**about_turns), shifted=shifted, **facts)
    slow = interpolation_of(turns)
    assert 0 < slow.first_pair < HEAD_DIM // 2
    assert error(slot_scores(*given, slow), exact(*given)) < BOUND


def test_scores_where_every_pair_is_slow():
    given = case(turns := torch.ones(1, SLOTS, HEAD_DIM // 2, dtype=torch.complex64))
    slow = interpolation_of(turns)
    assert slow.first_pair == 1
    assert error(slot_scores(*given, slow), exact(*given)) < BOUND


@pytest.mark.parametrize(
    "wrong",
    [
        lambda right: replace(right, first_pair=right.first_pair - 2),  # pairs too fast for so few nodes
        lambda right: replace(right, nodes=right.nodes.flip(0)),
        lambda right: replace(right, weights=right.weights.roll(1, dims=1)),
    ],
)
def test_controls_exceed_the_bound(wrong):
    given = case(turns := turns_of_slots(5e5))
    right = interpolation_of(turns)
    assert error(slot_scores(*given, right), exact(*given)) < BOUND
    assert error(slot_scores(*given, wrong(right)), exact(*given)) > 50 * BOUND


def test_interpolation_is_left_where_it_saves_nothing():
    query, keys = case(turns := turns_of_slots(5e5))
    slow = interpolation_of(turns)
    assert slow.saves(query, keys)
    assert not slow.saves(query.bfloat16(), replace(keys, latents=keys.latents.bfloat16()))
    assert not slow.saves(query.double(), replace(keys, latents=keys.latents.double()))
    assert not slow.saves(query, keys.part(slice(SPAN - 1)))
    assert not slow.saves(query.expand(-1, -1, 4, -1), keys)  # as many products as keys have
    halves = Factors(Partition("group(2)", HEADS, HEAD_DIM), (20, 20), random(2 * HEAD_DIM, 40), None, None)
    assert not slow.saves(query, replace(keys, factors=halves))


def test_model_decodes_by_interpolation_what_it_computes_without_a_cache(monkeypatch):
    """Heads as large as real ones, so that interpolation is what decoding chooses by itself."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        rope_theta=5e5,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids, prefill = tokens(model, columns=SPAN + 20), SPAN + 10
    interpolated = []
    spans = interpolation.span_scores
    monkeypatch.setattr(interpolation, "span_scores", lambda *given: interpolated.append(1) or spans(*given))
    with lorc_core.attach(model, lorc_core.compress(model, "lorc_q", kept_fraction=0.5, schedule="uniform")):
        expected = one_pass(model, ids, use_cache=False)
        assert not interpolated
        assert_close(token_by_token(model, ids, prefill, DynamicCache(config=config)), expected)
        assert len(interpolated) == 10 * 2 * 2  # tokens, layers, rows
