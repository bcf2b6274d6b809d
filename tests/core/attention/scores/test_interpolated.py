"""Interpolated scores against rebuilt and rotated keys in float64, and through whole models.

With angles rounded from float64 the worst error over the largest score is 3.0e-7 interpolated, 2.7e-7 by rebuilding in
float32; the bound is 1.2e-6. A model's own angles are rounded to float32, more coarsely as positions grow: there both
must be as far from exact angles.
"""

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import lorc_core
from lorc_core.attention.scores import interpolated as interpolation
from lorc_core.attention.scores.interpolated import SPAN, interpolated_scores, interpolation_of
from lorc_core.attention.scores.rebuilt import UnrotatedKeys, rebuilt_scores
from lorc_core.decomposition.factors import Factors
from lorc_core.model.architecture import architecture_of
from lorc_core.model.blocks import Partition
from lorc_core.model.rotation import LayerRotation
from tests.models import SPECIAL
from tests.runs import assert_close, one_pass, token_by_token, tokens

HEADS, HEAD_DIM, RANK, SLOTS, BOUND = 4, 64, 40, 2 * SPAN + 37, 1.2e-6
LARGE = {
    **SPECIAL,
    "vocab_size": 97,
    "hidden_size": 2 * HEAD_DIM,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}
SLIDING = {"head_dim": HEAD_DIM, "sliding_window": SPAN + 88}
LARGE_HEADS = {
    "llama": LlamaConfig(**LARGE, rope_theta=5e5),
    "mistral": MistralConfig(**LARGE, **SLIDING),
    "qwen2": Qwen2Config(**LARGE),
    "gemma3": Gemma3TextConfig(**LARGE, **SLIDING, layer_types=["sliding_attention", "full_attention"]),
    "phi-partial": PhiConfig(**LARGE),
    "cohere-interleaved": CohereConfig(**LARGE),
}


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
    return rebuilt_scores(query.double(), UnrotatedKeys(keys.latents.double(), factors, offset, turns))


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
    rule = interpolation_of(turns)
    assert 0 < rule.first_pair < HEAD_DIM // 2
    assert error(interpolated_scores(*given, rule), exact(*given)) < BOUND


def test_scores_where_every_pair_is_slow():
    given = case(turns := torch.ones(1, SLOTS, HEAD_DIM // 2, dtype=torch.complex64))
    rule = interpolation_of(turns)
    assert rule.first_pair == 1
    assert error(interpolated_scores(*given, rule), exact(*given)) < BOUND


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize("first_slot", [0, 8192, 131072 - SLOTS])
def test_scores_by_a_models_own_angles_are_no_farther_from_exact_ones_than_by_rebuilding(base, first_slot):
    config = LlamaConfig(head_dim=HEAD_DIM, rope_theta=base)
    rotation = LayerRotation(architecture_of(config).layer_rotary(0), LlamaRotaryEmbedding(config))
    table = rotation(torch.zeros(1), torch.arange(first_slot + SLOTS)[None]).turns()
    query, keys = case(table[:, first_slot:])
    expected = exact(query, replace(keys, turns=turns_of_slots(base, first_slot=first_slot)))
    by_rebuilding = error(rebuilt_scores(query, keys), expected)
    by_interpolation = error(interpolated_scores(query, keys, interpolation_of(table)), expected)
    assert by_interpolation < 1.1 * by_rebuilding + BOUND


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
    assert error(interpolated_scores(*given, right), exact(*given)) < BOUND
    assert error(interpolated_scores(*given, wrong(right)), exact(*given)) > 50 * BOUND


def test_interpolation_is_left_where_it_saves_nothing(monkeypatch):
    query, keys = case(turns := turns_of_slots(5e5))
    rule = interpolation_of(turns)
    assert not rule.saves(query, keys)  # too little work
    monkeypatch.setattr(interpolation, "MIN_PRODUCTS", 0)
    assert rule.saves(query, keys)
    assert not rule.saves(query, keys.part(slice(2 * SPAN - 1)))  # half of them left over
    assert not rule.saves(query.bfloat16(), replace(keys, latents=keys.latents.bfloat16()))
    assert not rule.saves(query.double(), replace(keys, latents=keys.latents.double()))
    assert not rule.saves(query, keys.part(slice(SPAN - 1)))
    assert not rule.saves(query.expand(-1, -1, 4, -1), keys)  # as many products as keys have
    halves = Factors(Partition("group(2)", HEADS, HEAD_DIM), (20, 20), random(2 * HEAD_DIM, 40), None, None)
    assert not rule.saves(query, replace(keys, factors=halves))


@pytest.mark.parametrize("name", LARGE_HEADS)
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_models_decode_by_interpolation_what_they_compute_without_a_cache(name, cache_class, monkeypatch):
    """Heads as large as real ones, one row padded on the left, more than a span in a sliding window."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LARGE_HEADS[name], dtype=torch.float32).eval()
    ids, num_padding = tokens(model, columns=2 * SPAN + 16), 7
    mask = torch.ones_like(ids)
    mask[1, :num_padding] = 0
    facts = {"max_cache_len": ids.shape[1]} if cache_class is StaticCache else {}
    interpolated, spans = [], interpolation.span_scores
    monkeypatch.setattr(interpolation, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(interpolation, "MOST_WORK", 2)
    monkeypatch.setattr(interpolation, "span_scores", lambda *given: interpolated.append(1) or spans(*given))
    with lorc_core.attach(model, lorc_core.compress(model, "lorc_q", kept_fraction=0.5, schedule="uniform")):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = one_pass(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
        assert not interpolated
        found = token_by_token(model, ids, ids.shape[1] - 3, cache_class(config=model.config, **facts), mask)
    assert len(interpolated) == 3 * model.config.num_hidden_layers * len(ids)  # tokens, layers, rows
    for row, start in ((0, 0), (1, num_padding)):
        print(
            "DIFF",
            name,
            cache_class.__name__,
            (found[row, start:] - expected[row, start:]).abs().max().item(),
            expected.abs().max().item(),
        )
        assert_close(
            found[row, start:], expected[row, start:], 2e-4
        )  # worst 5.6e-5, in the row whose slots are not positions
