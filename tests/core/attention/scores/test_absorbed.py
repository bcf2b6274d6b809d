"""Reading latents against rebuilding what they stand for, in float64, and a cache that grows against one that copies.

Equal up to rounding: worst of all cases below 2e-14 of the largest number, bound 1e-12.
"""

import pytest
import torch
from transformers import DynamicCache

import lorc_core
import lorc_core.attention.scores.rebuilt
from lorc_core.attention.scores.absorbed import (
    attend_values,
    attention_scores,
    attention_weights,
    latent_reader,
    rotate_pairs,
)
from lorc_core.attention.scores.rebuilt import UnrotatedKeys, rebuilt_scores
from lorc_core.caches.growing import GrowingCache, GrowingLayer
from lorc_core.decomposition.factors import Factors
from lorc_core.model.blocks import Partition
from lorc_core.model.rotary import Rotary
from lorc_core.model.rotation import LayerRotation, Rotation, rotate
from tests.models import tiny_model
from tests.runs import one_pass, token_by_token, tokens

HEADS, KV_HEADS, HEAD_DIM, NEW, CACHED = 8, 4, 6, 3, 50
PARTITIONS = {
    "joint": ("joint", (11,)),
    "head": ("head", (4,) * 4),
    "groups of one rank": ("group(2)", (5, 5)),
    "groups of two ranks": ("group(2)", (7, 2)),
    "frequency": ("frequency", (4, 0, 6)),
    "interleaved": ("interleaved_frequency", (2, 6, 2)),
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_factors(block, ranks):
    partition = Partition(block, KV_HEADS, HEAD_DIM)
    return Factors(partition, ranks, random(partition.width, sum(ranks), seed=1), None, None)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def whole(states):
    """(B, 1, S, N) to what every query head sees of it, (B, H, S, D)."""
    by_kv_head = states.squeeze(1).unflatten(-1, (KV_HEADS, HEAD_DIM)).transpose(1, 2)
    return by_kv_head.repeat_interleave(HEADS // KV_HEADS, dim=1)


@pytest.mark.parametrize("name", PARTITIONS)
def test_absorbed_queries_and_outputs_are_those_of_rebuilt_states(name):
    factors, offset = random_factors(*PARTITIONS[name]), random(KV_HEADS * HEAD_DIM, seed=2)
    latents, query = random(2, 1, CACHED, sum(factors.ranks), seed=3), random(2, HEADS, NEW, HEAD_DIM, seed=4)
    weights = random(2, HEADS, NEW, CACHED, seed=5).softmax(-1)
    rebuilt = whole(factors.rebuild(latents))
    reader = latent_reader(factors, None, KV_HEADS)
    assert reader.num_heads == {"head": 4, "groups of one rank": 2}.get(name, 1)
    assert_same(attention_scores(reader.absorb(query), reader.heads(latents)), query @ rebuilt.mT)
    shifted = latent_reader(factors, offset, KV_HEADS)
    expected = weights @ (rebuilt + whole(offset.expand(2, 1, CACHED, -1)))
    assert_same(shifted.restore(attend_values(weights, shifted.heads(latents))), expected)
    assert (reader.restore(attend_values(weights, reader.heads(latents))) - expected).abs().max() > 0.1  # the control


def test_whole_states_are_read_as_they_are():
    states, query = random(2, 1, CACHED, KV_HEADS * HEAD_DIM), random(2, HEADS, NEW, HEAD_DIM, seed=1)
    reader = latent_reader(None, None, KV_HEADS)
    assert_same(attention_scores(reader.absorb(query), reader.heads(states)), query @ whole(states).mT)
    assert_same(
        reader.restore(attend_values(weights := query @ whole(states).mT, reader.heads(states))),
        weights @ whole(states),
    )


def rotation_of(num_channels, *, interleaved, positions):
    rotary = Rotary(num_channels, interleaved, None, tuple(0.7**j for j in range(num_channels // 2)), 1.0)
    return LayerRotation(rotary, None), LayerRotation(rotary, None)(random(1), positions)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("num_channels", [4, 6])
@pytest.mark.parametrize("name", ["joint", "head", "groups of one rank", "groups of two ranks"])
def test_rotated_scores_are_those_of_rebuilt_and_rotated_keys(name, num_channels, interleaved, chunk, monkeypatch):
    row_bytes = 2 * KV_HEADS * HEAD_DIM * 8
    monkeypatch.setattr(lorc_core.attention.scores.rebuilt, "CPU_CHUNK_BYTES", chunk * row_bytes)
    factors, offset = random_factors(*PARTITIONS[name]), random(KV_HEADS * HEAD_DIM, seed=2)
    latents, query = random(2, 1, CACHED, sum(factors.ranks), seed=3), random(2, HEADS, NEW, HEAD_DIM, seed=4)
    layer, keys_at = rotation_of(num_channels, interleaved=interleaved, positions=torch.arange(CACHED)[None])
    _, queries_at = rotation_of(num_channels, interleaved=interleaved, positions=torch.tensor([[60, 61, 62]]))
    expected = rotate(query, queries_at) @ rotate(whole(factors.rebuild(latents) + offset), keys_at).mT

    def found(order):
        own = factors if order is None else factors.reordered(order)
        in_order = offset if order is None else offset.unflatten(0, (KV_HEADS, -1))[:, order].flatten()
        rotated = rotate_pairs(query if order is None else query[..., order], queries_at.turns()[:, None])
        return rebuilt_scores(rotated, UnrotatedKeys(latents, own, in_order, keys_at.turns()))

    assert_same(found(layer.pair_order(HEAD_DIM)), expected)
    if not interleaved:  # the control: channels left as they come
        assert (found(None) - expected).abs().max() > 0.1


def test_turns_are_made_anew_for_what_must_not_be_overwritten():
    _, rotation = rotation_of(4, interleaved=True, positions=torch.arange(5)[None])
    states = random(1, 2, 5, HEAD_DIM)
    kept = states.clone()
    expected = rotate(states, rotation)
    assert_same(rotate_pairs(states, rotation.turns()[:, None]), expected)
    assert torch.equal(states, kept)
    assert_same(rotate_pairs(states, rotation.turns()[:, None], may_overwrite=True), expected)
    assert_same(states, expected)


def test_turns_of_half_precision_are_computed_in_float32():
    rotation = Rotation(torch.ones(1, 3, 4).bfloat16(), torch.zeros(1, 3, 4).bfloat16(), interleaved=False)
    assert rotation.turns().dtype == torch.complex64
    assert rotate_pairs(torch.ones(1, 3, 6).bfloat16(), rotation.turns()).dtype == torch.bfloat16


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_weights_are_those_of_masked_softmax(softcap):
    logits, allowed = random(2, 4, 3, 9), random(2, 1, 3, 9, seed=1) > -0.5
    allowed[..., 0] = True
    capped = logits if softcap is None else softcap * (logits / softcap).tanh()
    expected = capped.masked_fill(~allowed, float("-inf")).softmax(-1)
    added = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    assert_same(attention_weights(logits, allowed, softcap), expected)
    assert_same(attention_weights(logits, added, softcap), expected)


@pytest.mark.parametrize("method", ["lorc", "lorc_q"])
@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
def test_a_growing_cache_gives_what_a_dynamic_one_gives(name, method):
    model = tiny_model(name)
    ids = tokens(model)
    with lorc_core.attach(model, lorc_core.compress(model, method, schedule="uniform")):
        expected = token_by_token(model, ids, 7, DynamicCache(config=model.config))
        assert torch.equal(token_by_token(model, ids, 7, GrowingCache(config=model.config)), expected)
        torch.testing.assert_close(expected, one_pass(model, ids, use_cache=False), rtol=0, atol=1e-4)


def test_a_growing_cache_serves_beams_and_lookups():
    """Both reorder or crop what is cached."""
    model = tiny_model("llama")
    ids = tokens(model, columns=9).repeat(1, 3)[:1]
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}):
        with lorc_core.attach(model, lorc_core.compress(model, "lorc", schedule="uniform")):
            expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
            cache = GrowingCache(config=model.config)
            found = model.generate(
                ids, max_new_tokens=12, do_sample=False, pad_token_id=0, past_key_values=cache, **options
            )
        assert torch.equal(found, expected)
        assert cache.get_seq_length() > 27


def test_a_growing_layer_appends_in_place_until_its_room_is_full(monkeypatch):
    monkeypatch.setattr(GrowingLayer, "BLOCK", 8)
    layer, parts = GrowingLayer(), [random(1, 2, 1, 4, seed=seed) for seed in range(20)]
    places = []
    for part in parts:
        layer.update(part, part)
        places.append(layer.keys.data_ptr())
    assert torch.equal(layer.keys, torch.cat(parts, dim=2))
    assert len(set(places[:8])) == len(set(places[8:16])) == len(set(places[16:])) == 1
    layer.crop(-5)
    layer.update(parts[0], parts[0])
    assert torch.equal(layer.values, torch.cat([*parts[:15], parts[0]], dim=2))
    assert layer.keys.data_ptr() == places[-1]
    layer.reset()
    layer.update(parts[3], parts[3])
    assert torch.equal(layer.keys, parts[3])


def test_a_growing_cache_goes_on_outside_inference_mode():
    model = tiny_model("llama")
    ids, cache = tokens(model), GrowingCache(config=model.config)
    expected = one_pass(model, ids)
    with torch.inference_mode():
        model(ids[:, :9], past_key_values=cache)
    with torch.no_grad():
        found = model(ids[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[:, 9:], rtol=0, atol=1e-4)


def test_gradients_flow_through_a_growing_cache():
    def gradient(cache):
        model = tiny_model("llama")
        ids = tokens(model, columns=8)
        parts = [model(part, past_key_values=cache, use_cache=cache is not None).logits for part in ids.split(4, dim=1)]
        torch.cat(parts, dim=1).square().sum().backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad

    expected = gradient(DynamicCache())
    torch.testing.assert_close(gradient(GrowingCache()), expected)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("method", ["lorc", "kq_svd"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "of_mask"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_masks_may_be_of_another_dtype(method, implementation, dtype, of_mask):
    """The same mask in the model's dtype is the reference."""
    model = tiny_model("llama").to(dtype)
    model.set_attn_implementation(implementation)
    ids = tokens(model)
    variant = lorc_core.compress(model, method, schedule="uniform", calibration=tokens(model, rows=8, seed=3))
    mask = torch.zeros(2, 1, 1, ids.shape[1]).masked_fill(torch.arange(ids.shape[1]) < 4, float("-inf")).to(of_mask)

    @torch.no_grad()
    def last_logits(mask):
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], past_key_values=cache)
        return model(ids[:, -1:], past_key_values=cache, attention_mask=mask).logits

    with lorc_core.attach(model, variant):
        found, whole = last_logits(mask), last_logits(torch.zeros_like(mask))
        torch.testing.assert_close(found, last_logits(mask.to(dtype)), rtol=0, atol=0.05)
        assert (found - whole).abs().max() > 0.1


@pytest.mark.parametrize("method", ["lorc", "kq_svd"])
def test_float16_decodes_where_unscaled_logits_overflow(method):
    """As sdpa does, which scales queries and not logits; Qwen2's biases make such logits."""
    model = tiny_model("qwen2")
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.data.fill_(90.0)
        layer.self_attn.k_proj.bias.data.fill_(90.0)
    ids = tokens(model)
    variant = lorc_core.compress(model, method, 0.9, "uniform", calibration=tokens(model, rows=8, seed=3))
    model = model.half()
    with lorc_core.attach(model, variant):
        found, expected = token_by_token(model, ids, 9), one_pass(model, ids)
    assert torch.finfo(torch.float16).max < 90.0**2 * 16
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
