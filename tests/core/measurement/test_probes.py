"""What schedules measure, against plain backward passes, attention written out on materialised states, and models
compressed in one place by hand."""

import copy
import itertools

import pytest
import torch

import lorc_core
from lorc_core.compression import LoadedWeights, decompose_layer
from lorc_core.errors import NumericsError
from lorc_core.measurement.attention_errors import attention_errors
from lorc_core.measurement.calibration import calibrate
from lorc_core.measurement.fisher import fisher_information
from lorc_core.measurement.loss_curves import loss_curves
from lorc_core.measurement.losses import mean_loss
from lorc_core.methods import METHODS
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import KINDS
from lorc_core.ranks.schedules import Sensitivity
from lorc_core.ranks.spectra import LayerRanks
from tests.materialised import attention_modules, dense_projection, materialise, output_linear, rotated
from tests.models import tiny_model
from tests.runs import tokens


def decomposed(model, method, ids):
    calibrated = calibrate(model, [ids])
    source, architecture = LoadedWeights(model), architecture_of(model.config)
    return [decompose_layer(source, architecture, idx, METHODS[method], calibrated[idx]) for idx in range(3)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_fisher_information_equals_a_plain_backward_over_each_batch(name):
    model = tiny_model(name)
    batches = tokens(model, rows=6, columns=16).split(2)
    found = fisher_information(model, batches)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    squares = {}
    for batch in batches:
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        for idx, module in enumerate(attention_modules(model)):
            for kind, linear in (("keys", module.k_proj), ("values", module.v_proj)):
                squares[idx, kind] = squares.get((idx, kind), 0) + linear.weight.grad.double().square()
    for (idx, kind), total in squares.items():
        expected = (total / len(batches)).sqrt().mean(dim=1)
        torch.testing.assert_close(torch.tensor(found[idx][kind]).double(), expected, rtol=1e-4, atol=1e-9)


def test_fisher_information_names_what_is_not_finite():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NumericsError, match="layer 0 keys: a gradient holds NaN"):
        fisher_information(model, [tokens(model)])


@pytest.mark.parametrize("schedule", ["error_budget", "sensitivity"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_nan_behind_a_layers_attention_names_the_next_layer(schedule, name):
    """The method reads attention weights alone, so that only the schedule's measurements meet the NaN."""
    model = tiny_model(name)
    layer = (model.model.layers if name == "llama" else model.model.decoder.layers)[1]
    with torch.no_grad():
        (layer.mlp.down_proj if name == "llama" else layer.fc2).weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"layer 2: .* NaN or infinity"):
        lorc_core.compress(model, "lorc", 0.5, schedule, calibration=tokens(model))


def test_a_nan_that_one_compressed_layer_makes_names_it():
    model = tiny_model("llama")
    ids = tokens(model)
    layers = decomposed(model, "lorc", ids)
    layers[1]["values"].up[0, 0, 0] = float("nan")
    with pytest.raises(
        NumericsError, match="layer 1 values, compressed alone: the loss on the calibration text is NaN"
    ):
        loss_curves(model, layers, [ids])


def test_a_nan_behind_all_layers_is_no_layers():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NumericsError, match=r"^the loss on the calibration text is NaN or infinite"):
        lorc_core.compress(model, "lorc", 0.5, "sensitivity", calibration=tokens(model))


def attended(model, layer, module, keys, values, num_rows):
    """(rows, T, D) output of causal attention of materialised queries on rotated keys and values of (T, G, d)."""
    by_row = [states.unflatten(0, (num_rows, -1)) for states in (layer.rotated_queries, keys, values)]
    logits = torch.einsum("btgmd,bsgd->bgmts", by_row[0], by_row[1]) / keys.shape[-1] ** 0.5
    future = torch.ones(logits.shape[-2:]).triu(1).bool()
    weights = logits.masked_fill(future, -torch.inf).softmax(-1)
    mixed = torch.einsum("bgmts,bsgd->btgmd", weights, by_row[2]).flatten(2)
    return torch.nn.functional.linear(mixed.float(), output_linear(module).weight, output_linear(module).bias).double()


@torch.no_grad()
def explicit_error(model, layer, module, factors, num_rows):
    """Relative error of the output with keys and values through dense projections."""
    lost = {}
    for kind, states in (
        ("keys", layer.rotated_keys if factors["keys"].rotated else layer.keys),
        ("values", layer.values),
    ):
        projection, mean = dense_projection(factors[kind]), factors[kind].mean
        mean = torch.zeros(len(projection)).double() if mean is None else mean
        projected = (states.flatten(1) - mean) @ projection.T + mean
        lost[kind] = projected.unflatten(1, states.shape[1:])
    if not factors["keys"].rotated:
        lost["keys"] = rotated(model, lost["keys"].unflatten(0, (num_rows, -1))).flatten(0, 1)
    exact = attended(model, layer, module, layer.rotated_keys, layer.values, num_rows)
    found = attended(model, layer, module, lost["keys"], lost["values"], num_rows)
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("method", "name"), [("kq_joint", "llama"), ("kq_joint", "opt"), ("k_svd", "qwen2"), ("eigen", "llama-mha")]
)
def test_attention_errors_equal_attention_written_out(method, name):
    model = tiny_model(name)
    ids = tokens(model, rows=4, columns=20)
    layers, states = decomposed(model, method, ids), materialise(model, ids)
    found = attention_errors(model, layers, ids.split(3))
    for idx, levels in enumerate(found):
        kept = [level.keys + level.values for level in levels]
        assert kept == sorted(kept, reverse=True)
        for level in (levels[0], levels[len(levels) // 3], levels[-1]):
            factors = {}
            for kind, floats in (("keys", level.keys), ("values", level.values)):
                blocks = layers[idx][kind].partition.num_blocks
                factors[kind] = layers[idx][kind].factors([floats // blocks] * blocks)
            expected = explicit_error(model, states[idx], attention_modules(model)[idx], factors, num_rows=4)
            assert level.error == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert levels[-1].error > 0.1  # the control


def test_the_levels_of_attention_errors_keep_a_share_of_the_singular_values():
    """Of 24 levels the i-th keeps the least directions whose singular values, not squared, sum to 1 - i / 24."""
    model = tiny_model("llama")
    ids = tokens(model, rows=4, columns=20)
    layers = decomposed(model, "kq_joint", ids)
    found = attention_errors(model, layers, [ids])
    for layer, levels in zip(layers, found, strict=True):
        expected = []
        for step in range(24):
            ranks = []
            for kind in KINDS:
                values = layer[kind].read_energies[0].sqrt()
                enough = values.cumsum(0) >= (1 - step / 24) * values.sum() * (1 - 1e-9)
                ranks.append(int(enough.nonzero()[0]) + 1)
            expected.append(tuple(ranks))
        assert [(level.keys, level.values) for level in levels] == list(dict.fromkeys(expected))


@pytest.mark.parametrize(("method", "name"), [("kq_joint", "qwen2"), ("kv_heads", "llama-mha"), ("lorc", "opt")])
def test_loss_curves_equal_models_compressed_in_that_place_by_hand(method, name):
    model = tiny_model(name)
    ids = tokens(model, rows=4, columns=20)
    layers = decomposed(model, method, ids)
    found = loss_curves(model, layers, ids.split(3))
    baseline = hf_loss(model, ids)
    assert mean_loss(model, ids.split(3)) == pytest.approx(baseline, abs=1e-5)
    width = layers[0]["keys"].partition.kv_width
    largest = 0.0
    for idx, layer in enumerate(found):
        for kind in KINDS:
            points = sorted(layer[kind], key=lambda point: point.floats)
            assert points[-1].floats == width
            assert points[-1].rise == 0
            assert len(points) >= 7
            if method == "kv_heads":  # how blocks share floats is the staircase's
                continue
            for point in points[:2]:
                reference = projected_in(model, idx, kind, layers[idx][kind].factors([point.floats]))
                assert point.rise == pytest.approx(hf_loss(reference, ids) - baseline, abs=2e-5)
                largest = max(largest, abs(point.rise))
    assert method == "kv_heads" or largest > 1e-2  # the control: the losses move


@torch.no_grad()
def hf_loss(model, ids):
    return model(input_ids=ids, labels=ids).loss.item()


@torch.no_grad()
def projected_in(model, idx, kind, factors):
    """A copy whose one projection's output is projected, constants kept."""
    reference = copy.deepcopy(model)
    module = attention_modules(reference)[idx]
    linear = module.k_proj if kind == "keys" else module.v_proj
    projection = dense_projection(factors)
    mean = torch.zeros(len(projection)).double() if factors.mean is None else factors.mean
    bias = torch.zeros(len(projection)).double() if linear.bias is None else linear.bias.double()
    linear.weight.data = (projection @ linear.weight.double()).float()
    linear.bias = torch.nn.Parameter((mean + projection @ (bias - mean)).float())
    return reference


def test_sensitivity_ends_with_no_larger_loss_than_its_curves_alone_and_beats_uniform():
    model = tiny_model("llama")
    ids = tokens(model, rows=8, columns=24)
    losses = {}
    for name, schedule in (("uniform", "uniform"), ("curves", Sensitivity(num_rounds=0)), ("exchanged", Sensitivity())):
        variant = lorc_core.compress(model, "kq_joint", 0.5, schedule, calibration=ids)
        assert variant.kept_fraction == pytest.approx(0.5, abs=0.01)
        with lorc_core.attach(model, variant):
            losses[name] = hf_loss(model, ids)
    assert losses["exchanged"] <= losses["curves"] + 1e-6
    assert losses["exchanged"] < losses["uniform"]


def test_ragged_ranks_of_an_exchange_are_those_of_the_staircase():
    model = tiny_model("llama-mha")
    variant = lorc_core.compress(model, "kv_heads", 0.4, Sensitivity(num_rounds=1), calibration=tokens(model, rows=8))
    assert all(isinstance(layer, LayerRanks) and len(layer.keys) == 2 for layer in variant.ranks.layers)
    blocks = itertools.chain.from_iterable(layer.keys + layer.values for layer in variant.ranks.layers)
    assert len(set(blocks)) > 2
