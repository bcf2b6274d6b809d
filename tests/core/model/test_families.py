"""Every family that lorc supports, and every kind of model that it refuses.

References: the untouched model; the same model with its weights truncated, row by row as its modelling file splits
them; plain projections hooked behind a q/k norm; the states that the untouched module caches at position 0.

Worst logit difference measured over all tests below, in float32: 2.9e-6; the bound is 1e-4.
"""

import copy
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoConfig, DynamicCache, LlamaConfig, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.cohere import modeling_cohere
from transformers.models.phi3 import modeling_phi3

import lorc_core
from lorc_core.attention.attach import Attachment
from lorc_core.attention.latent_attention import turns_of
from lorc_core.attention.positions import key_rotation
from lorc_core.compression import LoadedWeights, decompose_layer
from lorc_core.decomposition.factors import UNTOUCHED
from lorc_core.decomposition.moments import moments_of
from lorc_core.decomposition.position_average import position_average
from lorc_core.decomposition.weight_moments import projected_input
from lorc_core.errors import ConfigError, UnsupportedModelError
from lorc_core.measurement.calibration import calibrate
from lorc_core.measurement.gradients import gradient_moments
from lorc_core.methods import METHODS, Axes
from lorc_core.model.architecture import Architecture, architecture_of
from lorc_core.model.families import FAMILIES, REASONS
from lorc_core.model.kinds import KINDS, KeysValues, LayerKind, layer_kinds
from lorc_core.model.rotation import LayerRotation
from lorc_core.model.stored.checkpoint import Checkpoint
from lorc_core.model.stored.weights import checkpoint_fingerprint, projection_rows, read_bias, read_weight
from lorc_core.ranks.spectra import LayerRanks, RankSchedule
from lorc_core.variant import BaseModel, Variant
from tests.models import CONFIGS, WITHOUT_INTERFACE, tiny_model
from tests.runs import BOUND, assert_close, one_pass, token_by_token, tokens

NAMES = list(CONFIGS)
CLIPPED = ("mpt-clipped",)  # what is cached is no linear map of the input
PLAIN = [name for name in NAMES if not architecture_of(CONFIGS[name]).qk_norm and name not in CLIPPED]
ROTARY = [name for name in NAMES if architecture_of(CONFIGS[name]).rotary]
# The untouched models of these fail on a static cache: an ALiBi bias, a causal mask, for the tokens and not the slots.
NO_STATIC = ("falcon-alibi", "gpt_neo")
NUM_TOKENS = 17  # past the sliding windows of 8 and 12, within the original lengths on which scaled rotations depend


@cache
def model_of(name):
    return tiny_model(name)


@cache
def moments_on_text(name):
    return calibrate(model_of(name), [text_of(name)])


@cache
def moments_with_gradients(name):
    pairs = zip(moments_on_text(name), gradient_moments(model_of(name), [text_of(name)]), strict=True)
    return [layer.beside(of_loss) for layer, of_loss in pairs]


def text_of(name):
    return tokens(model_of(name), rows=8, columns=24, seed=5)


@cache
def decomposed(name, method):
    model, architecture = model_of(name), architecture_of(model_of(name).config)
    calibrated = moments_on_text(name) if METHODS[method].needs_calibration else [None] * architecture.num_layers
    calibrated = moments_with_gradients(name) if METHODS[method].needs_gradients else calibrated
    return [
        decompose_layer(LoadedWeights(model), architecture, idx, METHODS[method], calibrated[idx])
        for idx in range(architecture.num_layers)
    ]


def variant_with(name, method, kept):
    """With this share of every block of every layer, also where it is all."""
    architecture, layers = architecture_of(model_of(name).config), decomposed(name, method)
    ranks = []
    for layer in layers:
        steps = {kind: one.partition.rank_step for kind, one in layer.items()}
        ranks.append(
            LayerRanks(
                *(
                    (round(one.partition.width * kept / steps[kind]) * steps[kind],) * one.partition.num_blocks
                    for kind, one in layer.items()
                )
            )
        )
    schedule = RankSchedule(tuple(ranks), architecture.kv_width)
    factors = tuple(
        KeysValues(*(layer[kind].factors(chosen[kind]).to("cpu", torch.float32) for kind in KINDS))
        for layer, chosen in zip(layers, ranks, strict=True)
    )
    return Variant(BaseModel("", None, None), architecture, METHODS[method], {"name": "by hand"}, schedule, factors)


@cache
def half(name, method="lorc"):
    return variant_with(name, method, 0.5)


def rows_of(model, projection):
    """Where a fused tensor holds the rows of W_k or W_v, head by head, as the modelling files split them."""
    config = model.config
    heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    kind, place = config.model_type, "qkv".index(projection)
    if kind in ("gpt2", "mpt"):
        starts = [place * heads * dim + head * dim for head in range(heads)]
    elif kind == "phi3":
        starts = [heads * dim + (place - 1) * config.num_key_value_heads * dim + head * dim for head in range(2)]
    elif kind in ("bloom", "gpt_neox") or not (config.multi_query or config.new_decoder_architecture):
        starts = [head * 3 * dim + place * dim for head in range(heads)]
    elif config.new_decoder_architecture:
        group = heads // config.num_kv_heads + 2
        starts = [(head * group + group - 3 + place) * dim for head in range(config.num_kv_heads)]
    else:
        starts = [(heads + place - 1) * dim]
    return [start + channel for start in starts for channel in range(dim)]


def truncate_rows(model, weight, projection, rank):
    """Truncated SVD of W_k or W_v within the tensor that holds it."""
    fused = architecture_of(model.config).family.fused
    stored = weight.data.T if model.config.model_type == "gpt2" else weight.data
    rows = rows_of(model, projection) if fused else list(range(len(stored)))
    left, spectrum, right = torch.linalg.svd(stored[rows].double(), full_matrices=False)
    stored[rows] = ((left[:, :rank] * spectrum[:rank]) @ right[:rank]).float()


def attention_modules(model):
    architecture = architecture_of(model.config)
    return [
        model.base_model.get_submodule(architecture.attention_module(idx)) for idx in range(architecture.num_layers)
    ]


def project_output(projection, heads, module, args, output):
    """Forward hook on a norm of the keys: its output, in whatever layout, times a dense projection over all heads."""
    if output.ndim == 3:
        return output @ projection.T
    by_token = output if output.shape[-2] == heads else output.transpose(1, 2)
    found = (by_token.flatten(2) @ projection.T).unflatten(-1, by_token.shape[2:])
    return found if output.shape[-2] == heads else found.transpose(1, 2)


def truncated(model, variant):
    """The same model without lorc's runtime: truncated weights; behind a norm of the keys, projected keys."""
    reference, architecture = copy.deepcopy(model), architecture_of(model.config)
    base = reference.base_model
    for idx, (module, factors) in enumerate(zip(attention_modules(reference), variant.factors, strict=True)):
        value_weight = base.get_parameter(architecture.projection_name(idx, "v", "weight"))
        truncate_rows(reference, value_weight, "v", sum(factors["values"].ranks))
        if not architecture.qk_norm:
            key_weight = base.get_parameter(architecture.projection_name(idx, "k", "weight"))
            truncate_rows(reference, key_weight, "k", sum(factors["keys"].ranks))
            continue
        norm = module.k_norm if hasattr(module, "k_norm") else module.k_layernorm
        projection = factors["keys"].up @ factors["keys"].down
        norm.register_forward_hook(
            lambda *call, P=projection: project_output(P, architecture.num_kv_heads, *call)  # noqa: N803
        )
    return reference


# Every family


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_factors_give_the_baseline_cached_and_uncached(name):
    model, ids = model_of(name), tokens(model_of(name), columns=NUM_TOKENS)
    baseline = one_pass(model, ids)
    for method in ("lorc", "kq_joint", "kq_svd", "fisher"):
        with lorc_core.attach(model, variant_with(name, method, 1.0)):
            assert_close(one_pass(model, ids, use_cache=False), baseline)
            assert_close(token_by_token(model, ids, prefill=9), baseline)
    assert torch.equal(one_pass(model, ids), baseline)  # detached bit for bit


@pytest.mark.parametrize("name", NAMES)
def test_half_rank_equals_truncated_weights_cached_uncached_and_static(name):
    model, variant, ids = model_of(name), half(name), tokens(model_of(name), columns=NUM_TOKENS)
    baseline, expected = one_pass(model, ids), one_pass(truncated(model, variant), ids)
    with lorc_core.attach(model, variant):
        if name in CLIPPED:
            expected = one_pass(model, ids, use_cache=False)
        assert_close(one_pass(model, ids, use_cache=False), expected)
        dynamic = DynamicCache(config=model.config)
        assert_close(token_by_token(model, ids, 9, dynamic), expected)
        if name not in NO_STATIC:
            static = StaticCache(config=model.config, max_cache_len=NUM_TOKENS + 4)
            assert_close(token_by_token(model, ids, 9, static), expected)
    assert (baseline - expected).abs().max() > 100 * BOUND  # the control: the model feels what is lost


@pytest.mark.parametrize("name", NAMES)
def test_left_padding_equals_no_padding(name):
    model, ids = model_of(name), tokens(model_of(name), rows=1, columns=14)
    padded = torch.cat([ids.new_zeros(1, 5), ids], dim=1)
    mask = (torch.arange(19) >= 5).long()[None]
    for method in ("lorc", "kq_svd"):
        with lorc_core.attach(model, half(name, method)):
            assert_close(token_by_token(model, padded, 14, attention_mask=mask)[:, 5:], one_pass(model, ids))


@pytest.mark.parametrize("name", NAMES)
def test_calibrated_methods_cached_equal_uncached(name):
    model, ids = model_of(name), tokens(model_of(name), columns=NUM_TOKENS)
    for method in ("kq_joint", "kq_svd", "fisher"):
        with lorc_core.attach(model, half(name, method)):
            assert_close(token_by_token(model, ids, prefill=9), one_pass(model, ids, use_cache=False))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_and_the_model_is_left_as_it_was(name):
    model, ids = model_of(name), text_of(name)
    baseline = one_pass(model, ids)
    for layer in gradient_moments(model, [ids]):
        for moment in layer.moments.values():
            assert torch.isfinite(moment.total).all()
            assert moment.total.diagonal(dim1=-2, dim2=-1).min() > 0
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(one_pass(model, ids), baseline)


@pytest.mark.parametrize("name", [name for name in PLAIN if architecture_of(CONFIGS[name]).bias])
def test_gradients_add_up_to_those_of_the_biases(name):
    """A bias is added to every token's state. Worst of 8 seeds of the models 2.4e-6 of the largest gradient's root mean
    square."""
    model, ids = model_of(name), text_of(name)
    architecture = architecture_of(model.config)
    found = gradient_moments(model, [ids], labels="text")
    places = layer_kinds(architecture.num_layers)
    biases = [
        model.base_model.get_parameter(architecture.projection_name(idx, kind[0], "bias")) for idx, kind in places
    ]
    logits = model(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    for (idx, kind), gradient in zip(places, torch.autograd.grad(loss, biases), strict=True):
        moment = found[idx].moments[f"{kind[:-1]}_gradients"]
        # Those of keys that are not rotated add up to nothing: attention does not feel what all keys have in common.
        size = moment.total.diagonal().max().sqrt().item()
        expected = projection_rows(architecture, kind[0], gradient).double()
        torch.testing.assert_close(moment.sum, expected, rtol=0, atol=1e-5 * size)
        assert kind == "keys" or expected.abs().max() > 0.1 * size


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_holds_what_the_ranks_say(name):
    model, variant, ids = model_of(name), half(name), tokens(model_of(name), columns=9)
    held = DynamicCache(config=model.config)
    with lorc_core.attach(model, variant):
        token_by_token(model, ids, 5, held)
    windows = [min(9, getattr(layer, "sliding_window", 9)) for layer in held.layers]
    assert lorc_core.cache_bytes(held) == sum(
        4 * 2 * window * (layer.floats("keys") + layer.floats("values"))
        for window, layer in zip(windows, variant.ranks.layers, strict=True)
    )


def test_a_whole_layer_of_a_module_that_caches_copies_is_cached_once():
    """Falcon's newer decoder repeats kv heads before it caches them; the variant's count of floats does not."""
    model, variant, ids = model_of("falcon-new"), half("falcon-new"), tokens(model_of("falcon-new"), columns=9)
    whole = LayerRanks((32,), (32,))
    ranks = RankSchedule((whole, *variant.ranks.layers[1:]), 32)
    variant = replace(variant, ranks=ranks, factors=(UNTOUCHED, *variant.factors[1:]))
    held = DynamicCache(config=model.config)
    with lorc_core.attach(model, variant):
        assert_close(token_by_token(model, ids, 5, held), one_pass(model, ids, use_cache=False))
    assert held.layers[0].keys.shape[1] == 2
    assert lorc_core.cache_bytes(held) == 4 * 2 * 9 * ranks.floats_per_token


@pytest.mark.parametrize("name", [*WITHOUT_INTERFACE, "gpt2", "gpt_neox", "cohere", "gemma3_text", "smollm3"])
def test_beam_search_under_padding_equals_the_truncated_model(name):
    model, ids = model_of(name), tokens(model_of(name), columns=9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    with lorc_core.attach(model, variant_with(name, "lorc", 1.0)):
        found = model.generate(ids, **options)
    assert torch.equal(found, model.generate(ids, **options))


GAPS = torch.tensor([[0, 2, 4, 9, 10, 30]])


@pytest.mark.parametrize("name", ROTARY)
def test_positions_with_gaps_are_refused_where_keys_are_rotated_anew(name):
    model, ids = model_of(name), tokens(model_of(name), rows=1, columns=6)
    with lorc_core.attach(model, half(name)), pytest.raises(ConfigError, match="gaps"):
        one_pass(model, ids, position_ids=GAPS, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("name", ROTARY)
def test_positions_with_gaps_are_right_where_rotated_keys_are_cached(name):
    model, ids = model_of(name), tokens(model_of(name), rows=1, columns=6)
    with lorc_core.attach(model, half(name, "kq_svd")):
        expected = one_pass(model, ids, position_ids=GAPS, past_key_values=DynamicCache(config=model.config))
        held = DynamicCache(config=model.config)
        found = [
            one_pass(model, ids[:, i : i + 1], position_ids=GAPS[:, i : i + 1], past_key_values=held) for i in range(6)
        ]
    assert_close(torch.cat(found, dim=1), expected)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_positions_with_gaps_are_right_where_nothing_is_rotated(name):
    model, ids = model_of(name), tokens(model_of(name), rows=1, columns=6)
    expected = one_pass(truncated(model, half(name)), ids, position_ids=GAPS)
    with lorc_core.attach(model, half(name)):
        assert_close(one_pass(model, ids, position_ids=GAPS), expected)


@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_what_calibration_sees_of_modules_that_attend_by_themselves_is_what_they_do(name):
    """Attention written out, on the queries, keys and values seen, gives what the untouched output projection reads."""
    model, ids = model_of(name), tokens(model_of(name), columns=NUM_TOKENS)
    architecture, expected, seen = architecture_of(model.config), [], []
    outputs = [module.get_submodule(architecture.family.output) for module in attention_modules(model)]
    handles = [one.register_forward_pre_hook(lambda _, args: expected.append(args[0])) for one in outputs]
    one_pass(model, ids, use_cache=False)
    for handle in handles:
        handle.remove()

    def look(one):
        again = one.attend(one.rotated_key, one.value)
        wrong = one.attend(one.rotated_key, one.value.flip(-1))
        seen.append((one, again, wrong))

    with torch.inference_mode(), Attachment(model, architecture, [UNTOUCHED] * 3, [look] * 3):
        model(input_ids=ids, use_cache=False)
    group = architecture.num_heads // architecture.num_kv_heads
    for (one, again, wrong), output in zip(seen, expected, strict=True):
        assert_close(again.flatten(2), output)
        assert (wrong.flatten(2) - output).abs().max() > 100 * BOUND  # the control
        keys, values = (states.repeat_interleave(group, dim=1) for states in (one.rotated_key, one.value))
        logits = one.rotated_query @ keys.mT / architecture.head_dim**0.5 + alibi_of(model, NUM_TOKENS)
        causal = torch.full((NUM_TOKENS, NUM_TOKENS), -torch.inf).triu(1)
        if getattr(one.module, "attention_type", None) == "local":
            causal = causal + torch.full((NUM_TOKENS, NUM_TOKENS), -torch.inf).tril(-model.config.window_size)
        mixed = (logits + causal).softmax(dim=-1) @ values
        assert_close(mixed.transpose(1, 2).flatten(2), output)


def alibi_of(model, num_tokens):
    """(heads, 1, keys): what four heads of an ALiBi model add to their logits; Falcon scales it with them, in bfloat16."""
    if architecture_of(model.config).rotary or model.config.model_type == "gpt_neo":
        return torch.zeros(1)
    slopes = torch.tensor([2.0 ** -(2 * head) for head in range(1, 5)])
    scale = architecture_of(model.config).head_dim ** -0.5 if model.config.model_type == "falcon" else 1.0
    return slopes[:, None, None] * torch.arange(num_tokens) * scale


# Where the weights are


@pytest.mark.parametrize("name", NAMES)
def test_decomposition_of_the_saved_model_equals_that_of_the_loaded_one(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    architecture = architecture_of(AutoConfig.from_pretrained(tmp_path))
    assert architecture == architecture_of(model.config)
    assert checkpoint_fingerprint(checkpoint, architecture)
    for idx in range(architecture.num_layers):
        for method in ("lorc", "lorc_q"):
            found, expected = (
                decompose_layer(source, architecture, idx, METHODS[method])
                for source in (checkpoint, LoadedWeights(model))
            )
            for kind in KINDS:
                assert torch.equal(found[kind].up, expected[kind].up)
                assert torch.equal(found[kind].read_energies, expected[kind].read_energies)


@torch.inference_mode()
def first_states(name):
    """Of each layer, on one token at position 0: the norm's input, the module's input, the cached keys and values."""
    model, architecture = model_of(name), architecture_of(model_of(name).config)
    seen, handles = {}, []
    for idx, module in enumerate(attention_modules(model)):
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, idx=idx: seen.update({idx: kwargs.get("hidden_states", *args[:1])}),
                with_kwargs=True,
            )
        )
        if architecture.input_norm:
            norm = model.base_model.get_submodule(architecture.norm.format(idx))
            handles.append(
                norm.register_forward_pre_hook(lambda _, args, idx=idx: seen.update({("norm", idx): args[0]}))
            )
    held = DynamicCache(config=model.config)
    model(input_ids=tokens(model, rows=1, columns=1), past_key_values=held)
    for handle in handles:
        handle.remove()
    return seen, held


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CLIPPED])
def test_weights_biases_and_gains_are_those_that_make_the_cached_states(name):
    """At position 0 nothing is turned, so W x + b, of the input and of the normalised one, must be what is cached."""
    model = model_of(name)
    architecture, source = architecture_of(model.config), LoadedWeights(model)
    seen, held = first_states(name)
    copies = architecture.num_cached_heads // architecture.num_kv_heads
    for idx in range(architecture.num_layers):
        inputs = seen[idx].flatten().double()
        for kind, cached in (("keys", held.layers[idx].keys), ("values", held.layers[idx].values)):
            if kind == "keys" and architecture.qk_norm:
                continue
            states = cached[0, ::copies, 0].double().clone()
            if kind == "keys" and (rotary := architecture.layer_rotary(idx)):
                states[:, : rotary.num_channels] /= rotary.scale
            weight = read_weight(source, architecture, idx, kind[0]).double()
            bias = read_bias(source, architecture, idx, kind[0])
            found = weight @ inputs + (0 if bias is None else bias.double())
            torch.testing.assert_close(found, states.flatten(), rtol=0, atol=1e-5)
            white = inputs
            if architecture.input_norm:
                white = seen["norm", idx].flatten().double()
                white = white - white.mean() if architecture.input_norm.startswith("layer") else white
                white = white / white.square().mean().sqrt()
            folded, mean = projected_input(source, architecture, idx, kind[0], gain=True)
            found = folded @ white + (0 if mean is None else mean)
            torch.testing.assert_close(found, states.flatten(), rtol=0, atol=2e-3)  # the norms' epsilon


@pytest.mark.parametrize("name", PLAIN)
def test_query_weights_are_those_that_make_the_observed_queries(name):
    model = model_of(name)
    architecture, source = architecture_of(model.config), LoadedWeights(model)
    seen = []
    with Attachment(model, architecture, [UNTOUCHED] * 3, [seen.append] * 3):
        one_pass(model, tokens(model, columns=5), use_cache=False)
    for idx, one in enumerate(seen):
        weight, bias = (read(source, architecture, idx, "q") for read in (read_weight, read_bias))
        expected = torch.nn.functional.linear(one.hidden_states, weight, bias).flatten()
        found = one.query.transpose(1, 2).flatten()
        assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 1 - 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_survives_json(name):
    architecture = architecture_of(CONFIGS[name])
    back = Architecture.from_dict(json.loads(json.dumps(architecture.to_dict())))
    assert back == architecture
    assert [(one.frequencies, one.scale) for one in back.rotaries] == [
        (one.frequencies, one.scale) for one in architecture.rotaries
    ]


# Rotations


@pytest.mark.parametrize("name", [name for name in ROTARY if name != "gptj"])
def test_frequencies_and_scales_are_those_of_the_models_own_module(name):
    module = model_of(name).base_model.rotary_emb
    for rotary in architecture_of(CONFIGS[name]).rotaries:
        prefix = f"{rotary.layer_type}_" if rotary.layer_type else ""
        frequencies = getattr(module, f"{prefix}inv_freq")
        torch.testing.assert_close(torch.tensor(rotary.frequencies), frequencies)
        assert rotary.num_channels == 2 * len(frequencies)
        assert rotary.scale == pytest.approx(getattr(module, f"{prefix}attention_scaling"))


@pytest.mark.parametrize(
    ("name", "modeling"),
    [("cohere", modeling_cohere), ("phi3-longrope", modeling_phi3)],
    ids=["interleaved", "partial"],
)
def test_position_average_is_the_mean_over_states_that_the_model_rotated(name, modeling):
    model, num_positions = model_of(name), 23
    architecture = architecture_of(model.config)
    heads, dim = architecture.num_kv_heads, architecture.head_dim
    root = torch.randn(40, architecture.kv_width, generator=torch.Generator().manual_seed(0))
    states = root.unflatten(-1, (heads, dim)).transpose(0, 1)[:, :, None].expand(-1, -1, num_positions, -1)
    cos, sin = model.base_model.rotary_emb(root, torch.arange(num_positions)[None])
    turned = modeling.apply_rotary_pos_emb(states, states, cos, sin)[0].permute(2, 1, 0, 3).flatten(2).double()
    expected = (turned.mT @ turned).mean(dim=0)
    found = position_average((root.T @ root).double(), architecture, 0, num_positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert (found - (root.T @ root)).abs().max() > 0.01 * expected.abs().max()  # the control


def test_complex_blocks_pair_the_channels_that_the_model_rotates_together():
    """phasor_freq on interleaved rotation; its latents are cached rotated, so nothing else could be right."""
    model, ids = model_of("cohere"), tokens(model_of("cohere"), columns=NUM_TOKENS)
    baseline = one_pass(model, ids)
    assert half("cohere", "phasor_freq").factors[0]["keys"].partition.block == "interleaved_frequency"
    with lorc_core.attach(model, variant_with("cohere", "phasor_freq", 1.0)):
        assert_close(token_by_token(model, ids, 7), baseline)
    with lorc_core.attach(model, half("cohere", "phasor_freq")):
        assert_close(token_by_token(model, ids, 7), one_pass(model, ids, use_cache=False))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("phi", "of 16 channels of a head only 8 have a rotary frequency"),
        ("smollm3", "layer 1 has no rotary embedding"),
        ("gpt2", "no rotary embedding"),
    ],
)
def test_complex_blocks_are_refused_where_some_channels_are_not_rotated(name, message):
    with pytest.raises(ConfigError, match=message):
        METHODS["phasor_freq"].check(architecture_of(CONFIGS[name]))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_past_the_original_length_all_keys_have_the_frequencies_of_that_length(kind):
    """One layer, whose keys know their own token alone: decode equals one pass, which the untouched model's does not."""
    config = copy.deepcopy(CONFIGS["llama-dynamic" if kind == "dynamic" else "phi3-longrope"])
    config.num_hidden_layers, config.max_position_embeddings = 1, 12 if kind == "dynamic" else 64
    if kind == "longrope":
        config.original_max_position_embeddings = config.rope_parameters["original_max_position_embeddings"] = 12
    CONFIGS[f"long-{kind}"] = config
    try:
        ids = tokens(tiny_model(f"long-{kind}"), rows=1, columns=20)
        expected = one_pass(tiny_model(f"long-{kind}"), ids)[:, -1]
        untouched = token_by_token(tiny_model(f"long-{kind}"), ids, 7)[:, -1]
        with lorc_core.attach(tiny_model(f"long-{kind}"), variant_with(f"long-{kind}", "lorc", 1.0)) as attachment:
            found = token_by_token(attachment.model, ids, 7)[:, -1]
    finally:
        del CONFIGS[f"long-{kind}"]
    assert_close(found, expected)
    assert (untouched - expected).abs().max() > 10 * BOUND


# Controls: what these tests would see


def decode_difference(name):
    model, ids = model_of(name), tokens(model_of(name), columns=NUM_TOKENS)
    expected = one_pass(truncated(model, half(name)), ids)
    with lorc_core.attach(model, half(name)):
        return (token_by_token(model, ids, 7) - expected).abs().max()


@pytest.mark.parametrize("name", ["llama", "cohere", "gpt_neox", "gptj", "falcon", "smollm3"])
def test_a_wrong_rotation_is_seen(name, monkeypatch):
    """Pairs of channels taken the other way."""
    right = LayerRotation.__call__

    def wrong(self, like, positions):
        found = right(self, like, positions)
        return replace(found, interleaved=not found.interleaved)

    monkeypatch.setattr(LayerRotation, "__call__", wrong)
    assert decode_difference(name) > 100 * BOUND


def test_the_wrong_basis_of_two_is_seen(monkeypatch):
    architecture = architecture_of(CONFIGS["gemma3_text"])
    assert [one.layer_type for one in architecture.rotaries] == ["sliding_attention", "full_attention"]
    monkeypatch.setattr(Architecture, "layer_rotary", lambda self, layer_idx: self.rotaries[0])
    assert decode_difference("gemma3_text") > 100 * BOUND


@pytest.mark.parametrize("name", ["llama", "cohere", "gptj", "falcon-new"])
def test_a_wrong_position_is_seen(name, monkeypatch):
    for module, function in (("latent_attention", turns_of), ("self_attending", key_rotation)):

        def wrong(state, call, *args, right=function):
            call.num_cached = 0
            return right(state, call, *args)

        monkeypatch.setattr(f"lorc_core.attention.{module}.{function.__name__}", wrong)
    assert decode_difference(name) > 100 * BOUND


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gpt_neox", "phi", "bloom", "falcon-alibi", "starcoder2", "opt"])
def test_a_dropped_bias_is_seen(name):
    model, ids = model_of(name), tokens(model_of(name), columns=NUM_TOKENS)
    expected = one_pass(truncated(model, half(name)), ids)
    without = [layer.map(lambda one: replace(one, mean=None)) for layer in half(name).factors]
    with lorc_core.attach(model, replace(half(name), factors=tuple(without))):
        assert (one_pass(model, ids) - expected).abs().max() > 100 * BOUND


# What is refused


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v2", "latent attention"),
        ("deepseek_v3", "latent attention"),
        ("minicpm3", "latent attention"),
        ("longcat_flash", "latent attention"),
        ("mamba", "recurrent state"),
        ("mamba2", "recurrent state"),
        ("jamba", "recurrent state"),
        ("bamba", "recurrent state"),
        ("qwen3_next", "linear attention"),
        ("nemotron_h", "recurrent state"),
        ("recurrent_gemma", "recurrent state"),
        ("lfm2", "recurrent state"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("whisper", "encoder-decoder"),
        ("gemma3n_text", "share one cache"),
        ("gemma4_text", "share one cache"),
        ("gpt_oss", "attention sinks"),
        ("gemma3", "multimodal"),
        ("llava", "multimodal"),
        ("gpt_bigcode", "nobody has told lorc where it keeps its projections; supported are bloom, cohere"),
    ],
)
def test_unsupported_types_are_refused_with_the_reason(model_type, reason):
    config = AutoConfig.for_model(model_type)
    with pytest.raises(UnsupportedModelError, match=f"model type '{model_type}' is not supported: .*{reason}"):
        architecture_of(config)


def test_every_type_with_a_reason_exists():
    named = [model_type for types in REASONS.values() for model_type in types.split()]
    assert set(named) <= set(CONFIG_MAPPING_NAMES)
    assert len(named) == len(set(named))
    assert not set(named) & set(FAMILIES)


def test_supported_types_in_a_form_that_is_not_are_refused():
    unknown = {"rope_type": "proportional", "rope_theta": 1e4}
    with pytest.raises(UnsupportedModelError, match="rope type 'proportional' is not supported"):
        architecture_of(LlamaConfig(rope_parameters=unknown))
    for name, change, reason in (
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
    ):
        config = copy.deepcopy(CONFIGS[name])
        config.update(change)
        with pytest.raises(UnsupportedModelError, match=reason):
            architecture_of(config)


@pytest.mark.parametrize(("name", "schedule"), [("gpt2", "fisher"), ("falcon-new", "fisher"), ("mpt", "sensitivity")])
def test_schedules_that_measure_the_loss_take_fused_weights(name, schedule):
    model = tiny_model(name)
    ids = tokens(model, rows=2, columns=12)
    variant = lorc_core.compress(model, "lorc_q", 0.5, schedule, calibration=ids)
    with lorc_core.attach(model, variant):
        assert_close(token_by_token(model, ids, 7), one_pass(model, ids, use_cache=False))


def test_adapters_are_refused_for_fused_projections():
    from lorc_core.attention.adapters import adapted_modules

    with pytest.raises(UnsupportedModelError, match="gpt2 holds W_q, W_k and W_v in one tensor"):
        adapted_modules(architecture_of(CONFIGS["gpt2"]))


def test_every_family_is_in_the_matrix():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


def test_moments_before_a_norm_of_the_keys_know_no_mean():
    model = model_of("cohere-qk-norm")
    architecture = architecture_of(model.config)
    assert architecture.bias
    assert architecture.qk_norm
    axes = Axes("weights_with_gain", "interaction")
    keys, values = (moments_of(LoadedWeights(model), architecture, LayerKind(0, kind), axes, None) for kind in KINDS)
    assert keys.mean is None
    assert values.mean is not None
    assert not axes.has_mean(architecture, 0, "keys")
