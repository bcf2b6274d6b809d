"""Gradients of the loss against autograd on the untouched model, their labels, and the rise that they predict.

The reference catches the outputs of the projections by plain forward hooks, sums the model's own loss over whole
logits, and asks `torch.autograd.grad`. In float64; worst difference of 12 seeds, relative to the largest: none before
the rotation, 7.1e-8 after it, since the reference has its angles in float64, 7.7e-16 between one batch and several.
"""

import json

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, LlamaConfig

import lorc_core
from lorc_core.compression import LoadedWeights, decompose_layer
from lorc_core.decomposition.factors import layer_spectrum
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.measurement import gradients as module
from lorc_core.measurement.calibration import calibrate
from lorc_core.measurement.calibration_text import load_tokenizer
from lorc_core.measurement.gradients import draws_of, gradient_moments, sampled_labels
from lorc_core.measurement.losses import mean_loss
from lorc_core.methods import METHODS, Axes
from lorc_core.model.architecture import architecture_of
from lorc_core.ranks.prediction import predicted_rise
from lorc_core.ranks.progressive import Progressive
from lorc_core.ranks.schedules import WaterLevel, schedule_from_dict
from tests.materialised import attention_modules, materialise_gradients
from tests.models import GQA, tiny_model
from tests.paths import DEMO
from tests.runs import tokens

FISHER = METHODS["fisher"]
ROTATED_BOUND = 3e-7


def one_layer():
    torch.manual_seed(0)
    config = LlamaConfig(**(GQA | {"num_hidden_layers": 1}))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def second_moment(rows):
    """(T, ...) over all that follows the tokens."""
    return rows.flatten(1).T @ rows.flatten(1)


def assert_near(found, expected, bound=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * expected.abs().max().item())


@pytest.mark.parametrize("labels", ["sampled", "text"])
@pytest.mark.parametrize("name", ["one layer", "llama", "qwen2", "opt"])
def test_moments_are_those_of_autograd_on_the_untouched_model(name, labels):
    model = one_layer() if name == "one layer" else tiny_model(name).double()
    ids = tokens(model, rows=3, columns=20)
    found, expected = gradient_moments(model, [ids], labels=labels), materialise_gradients(model, ids, labels)
    assert len(found) == len(expected) == model.config.num_hidden_layers
    for measured, layer in zip(found, expected, strict=True):
        names = {"key_gradients", "value_gradients"} | ({"rotated_key_gradients"} if name != "opt" else set())
        assert set(measured.moments) == names
        assert {moment.num_tokens for moment in measured.moments.values()} == {60}
        assert_near(measured.moments["key_gradients"].total, second_moment(layer.keys))
        assert_near(measured.moments["value_gradients"].total, second_moment(layer.values))
        assert_near(measured.moments["value_gradients"].sum, layer.values.flatten(1).sum(0))
        if name != "opt":
            by_head = layer.rotated_keys.transpose(0, 1)
            assert_near(measured.moments["rotated_key_gradients"].total, by_head.mT @ by_head, ROTATED_BOUND)


def test_the_other_labels_and_a_mean_loss_fail_the_bound():
    """The control."""
    model = one_layer()
    ids = tokens(model, rows=3, columns=20)
    (found,), (expected,) = gradient_moments(model, [ids]), materialise_gradients(model, ids, "text")
    for scale in (1.0, 1 / 60):
        difference = found.moments["value_gradients"].total - second_moment(scale * expected.values)
        assert difference.abs().max() > 0.1 * found.moments["value_gradients"].total.abs().max()


def test_rotated_keys_are_measured_over_all_heads_where_a_method_asks():
    model = one_layer()
    ids = tokens(model)
    (found,), (expected,) = (
        gradient_moments(model, [ids], join_rotated_heads=True),
        materialise_gradients(model, ids, "sampled"),
    )
    assert_near(found.moments["rotated_key_gradients"].total, second_moment(expected.rotated_keys), ROTATED_BOUND)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_shard_and_four_are_the_same(name):
    model = tiny_model(name).double()
    ids = tokens(model, rows=10, columns=12)
    whole = gradient_moments(model, [ids])
    shards = [gradient_moments(model, ids[shard::4].split(2)) for shard in range(4)]
    for layer, *parts in zip(whole, *shards, strict=True):
        added = parts[0] + parts[1] + parts[2] + parts[3]
        for stage, moment in layer.moments.items():
            assert_near(added.moments[stage].total, moment.total)
            assert added.moments[stage].num_tokens == moment.num_tokens


def test_labels_depend_on_the_window_alone():
    first, second = tokens(one_layer(), rows=2)
    assert torch.equal(draws_of(first), draws_of(first.to(torch.int32)))
    assert (draws_of(first) != draws_of(second)).all()


def test_sampled_labels_follow_the_distribution():
    """A grid of draws: each label comes as often as its probability says, to within one draw."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0)) * 3
    logits[4] = -torch.inf
    draws = torch.arange(10_000, dtype=torch.float64) / 10_000
    found = torch.bincount(sampled_labels(logits.expand(10_000, 7), draws), minlength=7)
    assert (found - 10_000 * logits.double().softmax(0)).abs().max() <= 1.01
    assert found[4] == 0


def test_logits_of_a_few_tokens_at_a_time_give_the_same(monkeypatch):
    model = tiny_model("gemma2").double()  # which caps its logits
    ids = tokens(model, rows=3, columns=10)
    whole, seen = gradient_moments(model, [ids]), []
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * 1024)
    handle = model.lm_head.register_forward_hook(lambda _, args, logits: seen.append(logits.shape[:2].numel()))
    chunked = gradient_moments(model, [ids])
    handle.remove()
    assert seen == [7, 7, 7, 7, 2]
    for one, other in zip(whole, chunked, strict=True):
        for stage, moment in one.moments.items():
            assert_near(other.moments[stage].total, moment.total)


@pytest.mark.parametrize("name", ["qwen2", "gptj"])
def test_gradients_leave_the_model_as_it_was(name):
    model = tiny_model(name)
    settings = {parameter: i % 3 > 0 for i, parameter in enumerate(model.parameters())}
    for parameter, setting in settings.items():
        parameter.requires_grad_(setting)
    held = next(parameter for parameter, setting in settings.items() if setting)
    held.grad = torch.ones_like(held)
    methods = [dict(part.__dict__) for part in model.modules()]
    with torch.no_grad():
        before = model(tokens(model)).logits
        gradient_moments(model, [tokens(model)])
        assert torch.equal(model(tokens(model)).logits, before)
    assert all(parameter.requires_grad == setting for parameter, setting in settings.items())
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not held)
    assert torch.equal(held.grad, torch.ones_like(held))
    assert [set(part.__dict__) for part in model.modules()] == [set(one) for one in methods]
    with lorc_core.attach(model, lorc_core.compress(model)), pytest.raises(ConfigError, match="attached"):
        gradient_moments(model, [tokens(model)])


def test_a_failure_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("llama")
    before = model(tokens(model)).logits
    monkeypatch.setattr(module, "head_logits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradient_moments(model, [tokens(model)])
    assert torch.equal(model(tokens(model)).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in part.__dict__ for part in model.modules())


def test_gradients_that_are_not_finite_name_the_first_layer_that_has_them():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("inf")
    with pytest.raises(NumericsError, match=r"layer 0: the \w+_gradients hold NaN or infinity on the calibration text"):
        gradient_moments(model, [tokens(model)])


def test_no_sequences_and_absent_gradients_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="there are no calibration sequences"):
        gradient_moments(model, [])
    with pytest.raises(ConfigError, match="reader gradient needs statistics calibration"):
        Axes("weights_with_gain", "gradient")
    calibrated = calibrate(model, [tokens(model)])
    with pytest.raises(ConfigError, match="reader gradient needs the moments of `gradient_moments`"):
        decompose_layer(LoadedWeights(model), architecture_of(model.config), 0, FISHER, calibrated[0])


def test_a_constant_added_to_all_keys_moves_no_rank():
    """Attention weights do not feel it where nothing is rotated, and the known mean takes it out of the states."""
    model = tiny_model("opt").double()
    calibration = tokens(model, rows=8, columns=24, seed=5)
    before, raw = lorc_core.compress(model, "fisher", calibration=calibration), key_energy(model, calibration)
    with torch.no_grad():
        for attention in attention_modules(model):
            attention.k_proj.bias += torch.linspace(-3, 3, 64)
    after = lorc_core.compress(model, "fisher", calibration=calibration)
    assert after.ranks.layers == before.ranks.layers
    assert after.ranks.predicted_rise == pytest.approx(before.ranks.predicted_rise, rel=1e-6)
    assert len({floats for layer in after.ranks.layers for floats in (sum(layer.keys), sum(layer.values))}) > 2
    assert key_energy(model, calibration) > 2 * raw  # the control: uncentred keys feel it


def key_energy(model, calibration):
    return calibrate(model, [calibration])[1].moments["keys"].about(None).trace().item()


def test_the_predicted_rise_is_within_a_factor_of_two_of_the_measured_one():
    """Measured / predicted was 1.14 with these windows and 0.93 with 400. Rises below 0.0005 nats are predicted too low,
    by up to 4.5 times at half of this model's cache."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "stdlib-llama", dtype=torch.float32).eval()
    text = "\n".join(json.loads(row)["text"] for row in (DEMO / "heldout.jsonl").read_text().splitlines()[:60])
    ids = torch.tensor(load_tokenizer(DEMO / "stdlib-llama")(text)["input_ids"])
    windows = ids[: 64 * 128].view(64, 128)
    calibration, heldout = windows[::2], [windows[1::2]]
    baseline, rises, predicted = mean_loss(model, heldout), {}, {}
    for method, schedule in (("fisher", None), ("lorc", Progressive(floor_kept_fraction=0.0))):
        variant = lorc_core.compress(model, method, 0.2, schedule, calibration=calibration)
        predicted[method] = variant.ranks.predicted_rise
        with lorc_core.attach(model, variant):
            rises[method] = mean_loss(model, heldout) - baseline
    assert 0.5 < rises["fisher"] / predicted["fisher"] < 2
    assert rises["lorc"] > 10 * predicted["fisher"]  # the control: it is of these projections, not of any
    assert predicted["lorc"] is None


def test_the_predicted_rise_is_half_of_what_water_level_cuts(tmp_path):
    """It is kept with the variant; at every budget no other ranks would cut less."""
    model = tiny_model("llama")
    calibration = tokens(model, rows=8, columns=24, seed=5)
    variant = lorc_core.compress(model, "fisher", 0.5, calibration=calibration)
    moments = [
        layer.beside(of_loss)
        for layer, of_loss in zip(calibrate(model, [calibration]), gradient_moments(model, [calibration]), strict=True)
    ]
    architecture = architecture_of(model.config)
    layers = [decompose_layer(LoadedWeights(model), architecture, i, FISHER, one) for i, one in enumerate(moments)]
    spectra = [layer_spectrum(layer) for layer in layers]
    energies = np.sort(np.concatenate([layer[kind].read[0] for layer in spectra for kind in ("keys", "values")]))
    assert variant.ranks.floats_per_token == 96
    assert variant.ranks.predicted_rise == pytest.approx(energies[:96].sum() / 2, rel=1e-6)
    uniform = lorc_core.compress(model, "fisher", 0.5, "uniform", calibration=calibration)
    assert uniform.ranks.predicted_rise > variant.ranks.predicted_rise
    assert predicted_rise(spectra, WaterLevel().ranks(spectra, 1.0)) == 0
    variant.save(tmp_path)
    loaded = lorc_core.load_variant(tmp_path)
    assert (loaded.ranks, schedule_from_dict(loaded.schedule)) == (variant.ranks, WaterLevel())
    assert f"predicted rise {variant.ranks.predicted_rise:.4f} nats per token" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("labels", ["sampled", "text"])
def test_inference_mode_around_it_changes_nothing(labels):
    model = tiny_model("llama")
    whole = gradient_moments(model, [tokens(model)], labels=labels)
    with torch.inference_mode():
        found = gradient_moments(model, [tokens(model)], labels=labels)
    for one, other in zip(whole, found, strict=True):
        for stage, moment in one.moments.items():
            assert torch.equal(other.moments[stage].total, moment.total)


def test_a_model_with_accelerates_hooks_is_measured_and_keeps_them():
    """They stand in the place of each module's forward."""
    model = tiny_model("llama")
    ids = tokens(model)
    whole = gradient_moments(model, [ids])
    model = dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    forwards = {name: part.__dict__.get("forward") for name, part in model.named_modules()}
    assert any(forwards.values())
    for one, other in zip(whole, gradient_moments(model, [ids]), strict=True):
        for stage, moment in one.moments.items():
            assert_near(other.moments[stage].total, moment.total)
    assert {name: part.__dict__.get("forward") for name, part in model.named_modules()} == forwards


def test_a_model_in_bfloat16_has_nearly_the_same_gradients():
    """Of the text's labels, since those that are drawn may differ. Sums stay float64; worst of 8 seeds 2.4 %."""
    model = tiny_model("qwen2")
    ids = tokens(model, rows=8)
    exact = gradient_moments(model, [ids], labels="text")
    for one, other in zip(exact, gradient_moments(model.bfloat16(), [ids], labels="text"), strict=True):
        for stage, moment in one.moments.items():
            found = other.moments[stage].total
            assert found.dtype == torch.float64
            assert (found - moment.total).norm() < 0.1 * moment.total.norm()
