"""The runtime against models whose W_k and W_v are replaced by their truncations, and against itself uncached.

Every method under padding and in static caches is in test_methods_attached.

Worst logit difference measured over all tests below: 2.8e-5 in float32; the bound is 1e-4.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import lorc_core
from lorc_core.attention.latent_attention import turns_of
from lorc_core.attention.latent_cache import LatentCache
from lorc_core.errors import ConfigError
from lorc_core.methods import METHODS
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import KINDS, KeysValues
from lorc_core.ranks.schedules import Uniform
from lorc_core.ranks.spectra import LayerRanks, RankSchedule
from tests.models import tiny_model
from tests.paths import DEMO
from tests.runs import BOUND, assert_close, one_pass, token_by_token, tokens


def truncated(model, variant):
    """The independent reference: numpy-style truncated SVD of each weight, biases untouched."""
    assert "_lorc_attachment" not in model.__dict__, "the reference must be independent of the runtime"
    reference = copy.deepcopy(model)
    architecture = architecture_of(model.config)
    for layer_idx, ranks in enumerate(variant.ranks.layers):
        module = reference.base_model.get_submodule(architecture.attention_module(layer_idx))
        for projection, (rank,) in ((module.k_proj, ranks.keys), (module.v_proj, ranks.values)):
            left, spectrum, right = torch.linalg.svd(projection.weight.data.double(), full_matrices=False)
            projection.weight.data = ((left[:, :rank] * spectrum[:rank]) @ right[:rank]).float()
    return reference


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.2])
def test_variant_equals_truncated_weights(any_tiny_model, kept):
    model = any_tiny_model
    variant = lorc_core.compress(model, "lorc", kept_fraction=kept, schedule="uniform")
    ids = tokens(model)
    with lorc_core.attach(model, variant):
        found = one_pass(model, ids)
        uncached = one_pass(model, ids, use_cache=False)
    expected = one_pass(truncated(model, variant), ids)
    assert_close(found, expected)
    assert_close(uncached, expected)
    # the control: these models feel what is lost, far above the bound
    assert (one_pass(model, ids) - expected).abs().max() > 100 * BOUND


def test_every_rank_of_one_model_equals_truncated_weights():
    model = tiny_model("llama")
    ids, width = tokens(model, columns=12), 32
    for rank in range(1, width + 1):
        variant = lorc_core.compress(model, "lorc", kept_fraction=rank / width, schedule="uniform")
        assert {layer.keys for layer in variant.ranks.layers} == {(rank,)}
        expected = one_pass(truncated(model, variant), ids)
        with lorc_core.attach(model, variant):
            assert_close(one_pass(model, ids), expected)


@pytest.mark.parametrize("schedule", ["uniform", "progressive"])
@pytest.mark.parametrize("kept", [1.0, 0.75, 0.5, 0.25])
def test_demo_models_equal_truncated_weights_and_cached_equals_uncached(demo_dir, schedule, kept):
    check_exactness(demo_dir, schedule, kept)


@pytest.mark.real_models
@pytest.mark.parametrize("kept", [0.75, 0.4])
def test_sample_models_equal_truncated_weights_and_cached_equals_uncached(sample_dir, kept):
    check_exactness(sample_dir, "progressive", kept)


def check_exactness(directory, schedule, kept):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    baseline = one_pass(model, tokens(model))
    variant = lorc_core.compress(directory, "lorc", kept_fraction=kept, schedule=schedule)
    expected = one_pass(truncated(model, variant), tokens(model))
    with lorc_core.attach(model, variant):
        assert_close(one_pass(model, tokens(model)), expected)
        assert_close(token_by_token(model, tokens(model), prefill=15), expected)
    if kept == 1.0:
        assert_close(expected, baseline)
    assert torch.equal(one_pass(model, tokens(model)), baseline)


@pytest.mark.parametrize("prefill", [1, 7])
def test_cached_decode_equals_one_pass(any_tiny_model, prefill):
    model = any_tiny_model
    ids = tokens(model)
    with lorc_core.attach(model, lorc_core.compress(model, "lorc", schedule="uniform")):
        expected = one_pass(model, ids, use_cache=False)
        assert_close(token_by_token(model, ids, prefill), expected)


def test_two_chunks_equal_one_pass(any_tiny_model):
    model = any_tiny_model
    ids = tokens(model)
    with lorc_core.attach(model, lorc_core.compress(model, "lorc", schedule="uniform")), torch.inference_mode():
        cache = DynamicCache(config=model.config)
        first = model(input_ids=ids[:, :13], past_key_values=cache).logits
        second = model(input_ids=ids[:, 13:], past_key_values=cache).logits
        assert_close(torch.cat([first, second], dim=1), one_pass(model, ids))


def test_beam_search_equals_the_truncated_model():
    model = tiny_model("llama")
    variant = lorc_core.compress(model, "lorc", kept_fraction=0.75, schedule="uniform")
    ids, mask = tokens(model, columns=9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = truncated(model, variant).generate(ids, **options)
    with lorc_core.attach(model, variant):
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations_agree(implementation):
    model = tiny_model("qwen2")
    model.set_attn_implementation(implementation)
    variant = lorc_core.compress(model, "lorc", schedule="uniform")
    expected = one_pass(truncated(model, variant), tokens(model))
    with lorc_core.attach(model, variant):
        assert_close(one_pass(model, tokens(model)), expected)
    assert model.config._attn_implementation == implementation


def test_a_wrong_key_position_is_seen(monkeypatch):
    """The control: keys rotated by their slots as if nothing had been cached before fail the bound."""

    def wrong(state, call, query, key):
        call.num_cached = 0
        return turns_of(state, call, query, key)

    monkeypatch.setattr("lorc_core.attention.latent_attention.turns_of", wrong)
    model = tiny_model("llama")
    with lorc_core.attach(model, lorc_core.compress(model, "lorc", schedule="uniform")):
        difference = token_by_token(model, tokens(model), 7) - one_pass(model, tokens(model), use_cache=False)
    assert difference.abs().max() > 100 * BOUND


def test_a_dropped_bias_is_seen():
    """The control: a variant without its means fails the bound."""
    model = tiny_model("qwen2")
    variant = lorc_core.compress(model, "lorc", schedule="uniform")
    expected = one_pass(truncated(model, variant), tokens(model))
    for layer in variant.factors:
        for kind in KINDS:
            object.__setattr__(layer[kind], "mean", None)
    with lorc_core.attach(model, variant):
        difference = one_pass(model, tokens(model)) - expected
    assert difference.abs().max() > 100 * BOUND


def test_cache_holds_latents_alone(any_tiny_model):
    """Bytes = batch x tokens x element size x the sum over layers of the latent floats."""
    model = any_tiny_model
    variant = lorc_core.compress(model, "lorc", kept_fraction=0.6, schedule="uniform")
    rows, columns = 2, 9
    with lorc_core.attach(model, variant), torch.inference_mode():
        cache = model(input_ids=tokens(model, rows, columns)).past_key_values
    assert lorc_core.cache_bytes(cache) == rows * columns * 4 * variant.ranks.floats_per_token
    assert [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers] == [
        (layer.floats("keys"), layer.floats("values")) for layer in variant.ranks.layers
    ]


def test_keys_and_values_and_layers_may_differ():
    """Full keys with cut values, cut keys with full values, and an untouched layer, in one model."""
    model = tiny_model("llama")
    full = lorc_core.compress(model, "lorc", kept_fraction=0.5, schedule="uniform")
    layers = (LayerRanks((32,), (10,)), LayerRanks((7,), (32,)), LayerRanks((32,), (32,)))
    kept = tuple(
        KeysValues(
            *(None if layer.floats(kind) == 32 else rank_of(model, idx, kind, layer.floats(kind)) for kind in KINDS)
        )
        for idx, layer in enumerate(layers)
    )
    ranks = RankSchedule(layers, kv_width=32)
    variant = lorc_core.Variant(full.base, full.architecture, METHODS["lorc"], full.schedule, ranks, kept)
    expected = one_pass(truncated(model, variant), tokens(model))
    with lorc_core.attach(model, variant):
        assert_close(token_by_token(model, tokens(model), 7), expected)
        static = StaticCache(config=model.config, max_cache_len=40)
        assert_close(token_by_token(model, tokens(model), 7, static), expected)


def rank_of(model, layer_idx, kind, rank):
    return lorc_core.compress(model, "lorc", kept_fraction=rank / 32, schedule=Uniform()).factors[layer_idx][kind]


def test_detach_is_bitwise_and_attach_can_swap():
    model = tiny_model("llama")
    ids = tokens(model)
    baseline, hooks = one_pass(model, ids), [len(module._forward_pre_hooks) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attachment = lorc_core.attach(model, lorc_core.compress(model, "lorc", kept_fraction=0.5))
    assert not torch.equal(one_pass(model, ids), baseline)
    attachment.detach()
    attachment.detach()
    with lorc_core.attach(model, lorc_core.compress(model, "lorc", kept_fraction=0.9)):
        pass
    assert torch.equal(one_pass(model, ids), baseline)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(hasattr(module, "_lorc_layer") for module in model.modules())


def test_attach_detaches_when_the_block_raises():
    model = tiny_model("opt")
    baseline = one_pass(model, tokens(model))
    with pytest.raises(RuntimeError, match="inside"), lorc_core.attach(model, lorc_core.compress(model)):
        raise RuntimeError("inside")
    assert torch.equal(one_pass(model, tokens(model)), baseline)


def test_attach_refuses_a_second_variant_and_another_architecture():
    model = tiny_model("llama")
    variant = lorc_core.compress(model)
    with lorc_core.attach(model, variant), pytest.raises(ConfigError, match="attached to this model already"):
        lorc_core.attach(model, variant)
    other = tiny_model("opt")
    with pytest.raises(ConfigError, match="the variant is for Architecture"):
        lorc_core.attach(other, variant)


def feed(model, *calls):
    """Run calls of (ids, position_ids) on one cache."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for ids, positions in calls:
            model(input_ids=ids, position_ids=torch.tensor(positions), past_key_values=cache)


IDS = torch.arange(5, 29)[None]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([(IDS[:, :4], [[0, 2, 4, 6]])], "have gaps"),
        ([(IDS[:, :6], [[0, 1, 2, 0, 1, 2]])], "have gaps"),
        ([(IDS[:, :5], [[0, 1, 2, 1, 1]])], "have gaps"),
        ([(IDS[:, :6], [[0, 1, 2, 3, 4, 5]]), (IDS[:, 6:7], [[16]])], "do not go on"),
        ([(IDS[:, :6], [[0, 1, 2, 3, 4, 5]]), (IDS[:, 6:9], [[16, 17, 18]])], "do not go on"),
        ([(IDS[:, :5], [[0, 1, 2, 3, 4]]), (IDS[:, 5:6], [[3]])], "do not go on"),
    ],
    ids=["gap", "packed", "right-padded", "jump", "jumping-chunk", "after-right-padding"],
)
def test_positions_that_cached_keys_cannot_have_are_refused(calls, message):
    model = tiny_model("llama")
    with lorc_core.attach(model, lorc_core.compress(model)), pytest.raises(ConfigError, match=message):
        feed(model, *calls)
    opt = tiny_model("opt")  # nothing is rotated, so nothing can be wrong
    with lorc_core.attach(opt, lorc_core.compress(opt)):
        feed(opt, *calls)


def test_contiguous_positions_from_anywhere_and_packed_ones_without_a_cache_are_right():
    model = tiny_model("llama")
    variant = lorc_core.compress(model, "lorc", schedule="uniform")
    reference = truncated(model, variant)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": False}
    with lorc_core.attach(model, variant):
        feed(model, (IDS[:, :4], [[3, 4, 5, 6]]), (IDS[:, 4:5], [[7]]))
        feed(model, (IDS[:, :5], [[1, 1, 0, 1, 2]]), (IDS[:, 5:6], [[3]]))
        found = one_pass(model, IDS[:, :6], **packed)
    assert_close(found, one_pass(reference, IDS[:, :6], **packed))


def test_a_failed_attach_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("llama")
    variant = lorc_core.compress(model)
    baseline = one_pass(model, tokens(model))
    with monkeypatch.context() as patch:
        patch.setattr(
            "lorc_core.decomposition.factors.Factors.to", lambda *_: (_ for _ in ()).throw(MemoryError("full"))
        )
        with pytest.raises(MemoryError):
            lorc_core.attach(model, variant)
    assert torch.equal(one_pass(model, tokens(model)), baseline)
    with lorc_core.attach(model, variant):
        pass


def test_bfloat16_model_takes_float32_factors():
    model = AutoModelForCausalLM.from_pretrained(DEMO / "stdlib-llama", dtype=torch.bfloat16).eval()
    variant = lorc_core.compress(DEMO / "stdlib-llama", "lorc", kept_fraction=0.75, schedule="uniform")
    ids = tokens(model)
    with lorc_core.attach(model, variant), torch.inference_mode():
        output = model(input_ids=ids)
    assert lorc_core.cache_bytes(output.past_key_values) == ids.numel() * 2 * variant.ranks.floats_per_token
    assert isinstance(output.past_key_values, DynamicCache)
    assert not isinstance(output.past_key_values, LatentCache)


@pytest.mark.parametrize("method", ["lorc", "lorc_q"])
def test_what_was_attached_in_inference_mode_lets_gradients_through(method):
    model = tiny_model("llama")
    ids, variant = tokens(model, columns=8), lorc_core.compress(model, method, schedule=Uniform())

    def gradient(mode):
        with mode():
            attachment = lorc_core.attach(model, variant)
            model(ids)
        with attachment:
            model(ids, labels=ids).loss.backward()
        found = model.model.layers[0].self_attn.k_proj.weight.grad
        model.zero_grad()
        return found

    assert torch.equal(gradient(torch.inference_mode), gradient(torch.no_grad))
