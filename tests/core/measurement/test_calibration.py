"""Calibration against moments of materialised states, and the text it reads. The reference is `materialised`."""

import pytest
import torch

import lorc_core
from lorc_core.compression import LoadedWeights, decompose_layer
from lorc_core.decomposition.moments import moments_of
from lorc_core.decomposition.projection_errors import projection_errors
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.measurement.calibration import batches, calibrate
from lorc_core.methods import METHODS, Axes
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import LayerKind
from tests.materialised import dense_projection, materialise
from tests.models import tiny_model
from tests.runs import tokens

NAMES = ["llama", "qwen2", "opt", "mistral"]
LLAMA = architecture_of(tiny_model("llama").config)


def by_tokens(states):
    """(T, ...) to its second moment over tokens and, where there are more, its leading heads."""
    flat = states.flatten(1)
    return flat.T @ flat, flat.sum(dim=0)


def expected_moments(layer, rotary, join_rotated_heads):
    lengths = layer.inputs.norm(dim=-1, keepdim=True)
    found = {"inputs": by_tokens(lengths), "values": by_tokens(layer.values)}
    for prefix in ("", "rotated_") if rotary else ("",):
        queries = getattr(layer, f"{prefix}queries")
        keys = getattr(layer, f"{prefix}keys")
        by_head = keys.transpose(0, 1)
        joined = not prefix or join_rotated_heads
        found[f"{prefix}keys"] = by_tokens(keys) if joined else (by_head.mT @ by_head, by_head.sum(dim=1))
        stacked, summed = queries.transpose(0, 1).flatten(1, 2), queries.sum(dim=2).transpose(0, 1)
        found[f"{prefix}queries"] = stacked.mT @ stacked, stacked.sum(dim=1)
        found[f"{prefix}summed"] = summed.mT @ summed, summed.sum(dim=1)
    return found


def assert_near(found, expected):
    """Within what the model's float32 leaves: worst of 20 seeds 2.2e-7 of the largest."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_calibrated_moments_equal_those_of_materialised_states(name, join):
    model = tiny_model(name)
    ids = tokens(model, rows=3, columns=20)
    found, expected = calibrate(model, [ids], join_rotated_heads=join), materialise(model, ids)
    assert len(found) == len(expected) == 3
    for measured, layer in zip(found, expected, strict=True):
        reference = expected_moments(layer, rotary=name != "opt", join_rotated_heads=join)
        assert set(measured.moments) == set(reference)
        assert measured.num_tokens == 60
        for stage, (total, sums) in reference.items():
            assert measured.moments[stage].total.dtype == torch.float64
            assert_near(measured.moments[stage].total, total)
            assert_near(measured.moments[stage].sum, sums)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_one_batch_or_many_and_sums_of_several_texts_are_the_same(name):
    model = tiny_model(name)
    ids = tokens(model, rows=6, columns=12)
    whole, single = calibrate(model, [ids]), calibrate(model, ids.split(1))
    added = [one + other for one, other in zip(calibrate(model, [ids[:2]]), calibrate(model, [ids[2:]]), strict=True)]
    for layer, one, other in zip(whole, single, added, strict=True):
        for stage, moment in layer.moments.items():
            for found in (one.moments[stage], other.moments[stage]):
                assert_near(found.total, moment.total)
                assert_near(found.sum, moment.sum)
                assert found.num_tokens == moment.num_tokens


@pytest.mark.parametrize("mean", ["known", "measured"])
@pytest.mark.parametrize("gqa", ["stack", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_moments_of_a_calibrated_method_are_centred_means_over_tokens(name, gqa, mean):
    model = tiny_model(name)
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            if name_.endswith("layer_norm.bias"):
                parameter.normal_(std=0.5)
    ids = tokens(model, rows=3, columns=30)
    calibrated, layers = calibrate(model, [ids]), materialise(model, ids)
    architecture, source = architecture_of(model.config), LoadedWeights(model)
    axes = Axes("calibration", "interaction", gqa=gqa, mean=mean)
    for idx, layer in enumerate(layers):
        attention = model.base_model.get_submodule(architecture.attention_module(idx))
        for kind, linear in (("keys", attention.k_proj), ("values", attention.v_proj)):
            states = getattr(layer, kind).flatten(1)
            found = moments_of(source, architecture, LayerKind(idx, kind), axes, calibrated[idx])
            constant = torch.zeros(len(states[0])).double() if linear.bias is None else linear.bias.detach().double()
            if name == "opt":  # what the LayerNorm adds is known too
                norm = model.model.decoder.layers[idx].self_attn_layer_norm
                constant = constant + (linear.weight @ norm.bias).detach().double()
            centre = states.mean(dim=0) if mean == "measured" else constant
            if mean == "known" and name in ("llama", "mistral"):
                assert found.mean is None
            else:
                assert_near(found.mean, centre)
            assert_near(found.states, (states - centre).T @ (states - centre) / len(states))
            queries = layer.queries if gqa == "stack" else layer.queries.sum(dim=2, keepdim=True)
            output = layer.output if gqa == "stack" else layer.output.sum(dim=2, keepdim=True)
            if kind == "keys":
                blocks = torch.einsum("tgmd,tgme->gde", queries, queries) / len(states)
            else:
                blocks = torch.einsum("ogmd,ogme->gde", output, output)
            assert_near(found.readers, torch.block_diag(*blocks))


def test_calibration_leaves_the_model_as_it_was():
    model = tiny_model("qwen2")
    with torch.inference_mode():
        before = model(tokens(model)).logits
        calibrate(model, [tokens(model)])
        assert torch.equal(model(tokens(model)).logits, before)
    with lorc_core.attach(model, lorc_core.compress(model)), pytest.raises(ConfigError, match="attached"):
        calibrate(model, [tokens(model)])


@pytest.mark.parametrize(("projection", "stage"), [("k_proj", "keys"), ("v_proj", "values"), ("q_proj", "queries")])
def test_activations_that_are_not_finite_name_the_first_layer_that_has_them(projection, stage):
    model = tiny_model("llama")
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, projection).weight[3, 5] = float("nan")
    with pytest.raises(NumericsError, match=f"layer 1: the {stage} hold NaN or infinity on the calibration text"):
        calibrate(model, [tokens(model)])


def test_no_sequences_are_refused():
    with pytest.raises(ConfigError, match="there are no calibration sequences"):
        calibrate(tiny_model("llama"), [])


@pytest.mark.parametrize(
    ("method", "least"), [("kq_joint", 32), ("kv_heads", 32), ("k_svd", 16), ("phasor_freq", 32), ("lorc", 0)]
)
def test_fewer_tokens_than_a_blocks_width_are_refused_with_the_number_needed(method, least):
    METHODS[method].check_enough_tokens(LLAMA, least)
    if least:
        with pytest.raises(ConfigError, match=f"{least - 1} calibration tokens cannot fill a block of {least}"):
            METHODS[method].check_enough_tokens(LLAMA, least - 1)


def test_batches_have_about_4096_tokens_and_lose_none():
    sequences = torch.arange(10 * 1000).view(10, 1000)
    found = list(batches(sequences))
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert torch.equal(torch.cat(found), sequences)
    assert [len(batch) for batch in batches(torch.zeros(2, 5000, dtype=torch.long))] == [1, 1]


@pytest.mark.parametrize("method", ["kq_svd", "phasor_freq"])
def test_errors_of_rotated_keys_are_those_of_the_materialised_ones(method):
    """Head blocks are measured head by head, and complex blocks before the rotation, which they commute with."""
    model = tiny_model("llama")
    ids = tokens(model, rows=3, columns=30)
    calibrated, layer = calibrate(model, [ids])[1], materialise(model, ids)[1]
    source = LoadedWeights(model)
    found = decompose_layer(source, LLAMA, 1, METHODS[method], calibrated)["keys"]
    factors = found.factors([found.partition.width // 2] * found.partition.num_blocks)
    errors = projection_errors(source, LLAMA, LayerKind(1, "keys"), factors, calibrated)
    keys = layer.rotated_keys.flatten(1)
    lost = keys - keys @ dense_projection(factors).T
    assert errors.error == pytest.approx(lost.square().sum(1).mean().sqrt().item(), rel=1e-6)
    wrong = layer.keys.flatten(1) @ (torch.eye(32, dtype=torch.float64) - dense_projection(factors)).T
    if method == "kq_svd":
        assert abs(wrong.square().sum(1).mean().sqrt().item() / errors.error - 1) > 1e-2  # the control
        assert errors.bound is None
    else:
        assert errors.error < errors.bound
