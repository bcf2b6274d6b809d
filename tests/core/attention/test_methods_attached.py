"""Every preset in the runtime against an attention written here that keeps whole keys and values and projects them.

The reference rotates nothing itself: before the rotation it changes the projections' weights, after it it multiplies
rotated keys by the dense matrix. Worst logit difference measured over the presets: 4.4e-6 in float32; bound 1e-4.
"""

import copy
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

import lorc_core
from lorc_core.caches.memory import planned_factor_floats
from lorc_core.compression import LoadedWeights, decompose_layer
from lorc_core.decomposition.factors import slice_layer
from lorc_core.measurement.calibration import calibrate
from lorc_core.measurement.gradients import gradient_moments
from lorc_core.methods import METHODS, Axes, Method
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import KINDS
from lorc_core.ranks.schedules import Energy
from lorc_core.ranks.spectra import LayerRanks, RankSchedule
from lorc_core.variant import BaseModel, Variant
from tests.materialised import attention_modules, channels_of, dense_projection
from tests.models import CONFIGS, REPRESENTATIVES, tiny_model
from tests.runs import BOUND, assert_close, one_pass, token_by_token, tokens

PAIRS = replace(METHODS["palu"], name="pairs", **{kind: Axes("calibration", block="group(2)") for kind in KINDS})
DATA_FREE = Method(
    "data_free", Axes("weights", "interaction", "head", "post_rope"), Axes("weights", "stacked", "head"), Energy(), ""
)
MEASURED = Method("measured", *[Axes("calibration", "interaction", mean="measured")] * 2, Energy(), "")
MIXED = replace(METHODS["kq_svd"], name="mixed", layers={0: METHODS["lorc"], 2: METHODS["kq_joint"]})
UNTRAINED = {name: method for name, method in METHODS.items() if method.training is None}
EVERY_METHOD = UNTRAINED | {one.name: one for one in (PAIRS, DATA_FREE, MEASURED, MIXED)}


def applies(method, name):
    """Whether the model can have the method; the one with 4 kv heads is there for the groups that others lack."""
    if name == "llama-mha" and method not in ("palu", "kv_heads", "pairs"):
        return False
    try:
        EVERY_METHOD[method].check(architecture_of(CONFIGS[name]))
    except lorc_core.ConfigError:
        return False
    return True


CASES = [(method, name) for method in EVERY_METHOD for name in REPRESENTATIVES if applies(method, name)]


@cache
def case(method, name):
    """A model, and a variant of it with half of its floats."""
    model = tiny_model(name)
    calibration = tokens(model, rows=8, columns=24, seed=5)
    return model, lorc_core.compress(model, EVERY_METHOD[method], 0.5, "energy", calibration=calibration)


def test_only_what_cannot_be_is_left_out():
    names = set(REPRESENTATIVES) - {"llama-mha"}
    left_out = {(method, name) for method in EVERY_METHOD for name in names} - set(CASES)
    few_heads = {"llama", "mistral", "qwen2", "llama-llama3"}
    assert left_out == {
        ("phasor_freq", "opt"),
        *(("palu", name) for name in few_heads),
        *((method, "llama-llama3") for method in ("kv_heads", "pairs")),
    }


def projecting_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention whose keys go through a dense matrix; both sides of it are whole."""
    if (matrix := getattr(module, "key_projection", None)) is not None:
        joint = key.transpose(1, 2).flatten(2) @ matrix.T
        key = joint.unflatten(-1, key.transpose(1, 2).shape[2:]).transpose(1, 2)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("projecting_reference", projecting_attention)
AttentionMaskInterface.register("projecting_reference", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def reference_of(model, variant):
    """A copy of the model that loses what the variant loses, without a line of the runtime."""
    reference = copy.deepcopy(model)
    for module, layer in zip(attention_modules(reference), variant.factors, strict=True):
        for linear, factors in ((module.k_proj, layer["keys"]), (module.v_proj, layer["values"])):
            if factors is None:
                continue
            projection = dense_projection(factors)
            if factors.rotated:
                module.key_projection = projection.float()
                continue
            mean = torch.zeros(len(projection)).double() if factors.mean is None else factors.mean.double()
            bias = torch.zeros(len(projection)).double() if linear.bias is None else linear.bias.double()
            linear.weight.data = (projection @ linear.weight.double()).float()
            linear.bias = torch.nn.Parameter((mean + projection @ (bias - mean)).float())
    reference.set_attn_implementation("projecting_reference")
    return reference


@pytest.mark.parametrize(("method", "name"), CASES)
def test_preset_equals_the_projecting_reference_cached_and_uncached(method, name):
    model, variant = case(method, name)
    ids = tokens(model, columns=17)  # past the sliding window of 12
    expected = one_pass(reference_of(model, variant), ids)
    baseline = one_pass(model, ids)
    with lorc_core.attach(model, variant):
        assert_close(one_pass(model, ids), expected)
        assert_close(one_pass(model, ids, use_cache=False), expected)
        assert_close(token_by_token(model, ids, prefill=9), expected)
        static = StaticCache(config=model.config, max_cache_len=20)
        assert_close(token_by_token(model, ids, 9, static), expected)
    assert (baseline - expected).abs().max() > 100 * BOUND  # the control: the models feel what is lost
    assert torch.equal(one_pass(model, ids), baseline)  # detached bit for bit


@pytest.mark.parametrize(("method", "name"), CASES)
def test_preset_under_left_padding_equals_no_padding(method, name):
    model, variant = case(method, name)
    ids = tokens(model, rows=1, columns=14)
    padded = torch.cat([ids.new_zeros(1, 5), ids], dim=1)
    mask = (torch.arange(19) >= 5).long()[None]
    with lorc_core.attach(model, variant):
        assert_close(token_by_token(model, padded, 14, attention_mask=mask)[:, 5:], one_pass(model, ids))


@pytest.mark.parametrize(("method", "name"), CASES)
def test_preset_holds_the_bytes_that_it_says(method, name):
    model, variant = case(method, name)
    rows, columns = 2, 9
    with lorc_core.attach(model, variant), torch.inference_mode():
        cache = model(
            input_ids=tokens(model, rows, columns), past_key_values=DynamicCache(config=model.config)
        ).past_key_values
    assert lorc_core.cache_bytes(cache) == rows * columns * 4 * variant.ranks.floats_per_token
    step = max(4 if axes.block == "head" else 1 for axes in (variant.method.keys, variant.method.values))
    assert variant.kept_fraction == pytest.approx(0.5, abs=max(0.01, step / (6 * variant.ranks.kv_width)))
    assert variant.factor_floats == planned_factor_floats(variant.ranks, variant.method, variant.architecture)


@pytest.mark.parametrize(("method", "name"), [case for case in CASES if case[1] in ("qwen2", "opt")])
def test_preset_saved_and_loaded_gives_the_same_logits_bitwise(method, name, tmp_path):
    model, variant = case(method, name)
    variant.save(tmp_path)
    loaded = lorc_core.load_variant(tmp_path)
    assert (loaded.method, loaded.ranks, loaded.architecture) == (variant.method, variant.ranks, variant.architecture)
    assert [one.frequencies for one in loaded.architecture.rotaries] == [
        one.frequencies for one in variant.architecture.rotaries
    ]
    found = []
    for one in (variant, loaded):
        with lorc_core.attach(model, one):
            found.append(token_by_token(model, tokens(model, columns=9), prefill=7))
    assert torch.equal(*found)


def decomposed(model, method):
    text = [tokens(model, rows=8, columns=24, seed=5)]
    pairs = zip(calibrate(model, text), gradient_moments(model, text), strict=True)
    calibrated = [layer.beside(of_loss) for layer, of_loss in pairs]
    architecture = architecture_of(model.config)
    layers = [
        decompose_layer(LoadedWeights(model), architecture, idx, method, calibrated[idx])
        for idx in range(architecture.num_layers)
    ]
    return architecture, layers


def variant_of(model, method, keys, values):
    """With these ranks of the blocks in every layer."""
    architecture, layers = decomposed(model, method)
    ranks = RankSchedule((LayerRanks(keys, values),) * architecture.num_layers, architecture.kv_width)
    factors = tuple(slice_layer(layer, idx, ranks, torch.float32) for idx, layer in enumerate(layers))
    return Variant(BaseModel("", None, None), architecture, method, {"name": "by hand"}, ranks, factors)


RAGGED = [
    ("pairs", "llama-mha", (5, 20), (0, 31)),
    ("pairs", "opt", (32, 0), (1, 2)),
    ("kv_heads", "llama-mha", (0, 32), (32, 7)),
    ("phasor_freq", "llama", (4, 4, 2, 2, 0, 0, 4, 0), (32,)),
    ("phasor_freq", "qwen2", (0, 0, 0, 0, 0, 0, 0, 2), (9,)),
    ("phasor_freq", "mistral", (4, 0, 4, 0, 4, 0, 4, 0), (9,)),
]


@pytest.mark.parametrize(("method", "name", "keys", "values"), RAGGED)
def test_ragged_ranks_with_empty_blocks_equal_the_reference(method, name, keys, values, tmp_path):
    model = tiny_model(name)
    variant = variant_of(model, EVERY_METHOD[method], keys, values)
    ids = tokens(model)
    expected = one_pass(reference_of(model, variant), ids)
    variant.save(tmp_path)
    with lorc_core.attach(model, lorc_core.load_variant(tmp_path)):
        assert_close(token_by_token(model, ids, prefill=7), expected)
        with torch.inference_mode():
            cache = model(input_ids=ids[:, :9]).past_key_values
    assert [(one.keys.shape[1:], one.values.shape[1:]) for one in cache.layers] == [
        ((1, 9, sum(keys)), (1, 9, sum(values)))
    ] * 3


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, name in CASES if name in ("qwen2", "opt")])
def test_full_rank_is_the_baseline(method, name):
    """Bypassed where all is kept, bit for bit; and with all directions in the factors up to rounding."""
    model = tiny_model(name)
    calibration = tokens(model, rows=8, columns=24, seed=5)
    whole = lorc_core.compress(model, EVERY_METHOD[method], 1.0, "uniform", calibration=calibration)
    assert whole.factor_floats == 0
    baseline = one_pass(model, tokens(model))
    with lorc_core.attach(model, whole):
        assert torch.equal(one_pass(model, tokens(model)), baseline)
    _, layers = decomposed(model, EVERY_METHOD[method])
    factors = tuple(
        layer.map(lambda one: one.factors([one.partition.width] * one.partition.num_blocks).to("cpu", torch.float32))
        for layer in layers
    )
    with lorc_core.attach(model, replace(whole, factors=factors)):
        assert_close(one_pass(model, tokens(model)), baseline, bound=1e-3)


@pytest.mark.parametrize("method", ["k_svd", "phasor_freq"])
def test_keys_projected_after_the_rotation_need_no_positions_of_cached_ones(method):
    """What pre_rope must refuse is right here: positions with gaps equal the reference's."""
    model, variant = case(method, "llama")
    ids, positions = tokens(model, rows=1, columns=6), torch.tensor([[0, 2, 4, 9, 10, 30]])
    expected = one_pass(reference_of(model, variant), ids, position_ids=positions)
    with lorc_core.attach(model, variant):
        cache = DynamicCache(config=model.config)
        found = [
            one_pass(model, ids[:, i : i + 1], position_ids=positions[:, i : i + 1], past_key_values=cache)
            for i in range(6)
        ]
    assert_close(torch.cat(found, dim=1), expected)


def test_dense_projections_of_the_reference_are_block_diagonal():
    """The reference itself: outside the blocks' channels there is nothing, and its rank is the schedule's."""
    _, variant = case("phasor_freq", "llama")
    for layer, ranks in zip(variant.factors, variant.ranks.layers, strict=True):
        projection, outside = dense_projection(layer["keys"]), torch.ones(32, 32, dtype=torch.bool)
        for channels in channels_of("frequency", 2, 16):
            outside[torch.tensor(channels)[:, None], channels] = False
        assert not projection[outside].any()
        assert torch.linalg.matrix_rank(projection, rtol=1e-4) == ranks.floats("keys")


def test_the_saved_config_says_the_method_whole(tmp_path):
    _, variant = case("mixed", "llama")
    variant.save(tmp_path)
    saved = json.loads((tmp_path / "lorc_config.json").read_text())["method"]
    assert saved["keys"]["block"] == "head"
    assert saved["layers"]["0"]["name"] == "lorc"
    assert saved["layers"]["2"]["keys"]["reader"] == "interaction"
