"""What a session shows of methods, schedules, ranks and variants: what tells them apart, on one line."""

import importlib.metadata
from dataclasses import replace

import pytest

import lorc_core
from lorc_core.methods import METHODS, Axes
from lorc_core.ranks.progressive import Progressive
from lorc_core.ranks.schedules import SCHEDULES, Energy, Sensitivity
from tests.models import tiny_model
from tests.runs import tokens


@pytest.fixture(scope="module")
def variant():
    model = tiny_model("qwen2")
    return lorc_core.compress(model, "phasor_freq", 0.5, calibration=tokens(model, rows=8))


def test_the_version_is_the_distributions():
    assert lorc_core.__version__ == importlib.metadata.version("lorc")
    with pytest.raises(AttributeError, match="module 'lorc_core' has no attribute 'version'"):
        lorc_core.version  # noqa: B018


@pytest.mark.parametrize("configuration", [Energy(spectrum="states"), Progressive(min_rank=3), Axes("calibration")])
def test_a_configuration_is_written_as_it_is_made(configuration):
    assert eval(repr(configuration)) == configuration


def test_a_configuration_shows_what_is_not_its_default():
    assert repr(Axes("weights", block="head")) == "Axes(statistics='weights', block='head')"
    assert [repr(kind()) for kind in SCHEDULES.values()] == [f"{kind.__name__}()" for kind in SCHEDULES.values()]
    assert repr(Sensitivity(skip_layers=(1,), num_rounds=1)) == "Sensitivity(skip_layers=(1,), num_rounds=1)"


def test_a_method_is_written_on_a_line():
    assert repr(METHODS["lorc"]) == (
        "Method(name='lorc', keys=Axes(statistics='weights'), values=Axes(statistics='weights'), "
        "schedule=Progressive())"
    )
    assert all(len(repr(method)) < 250 for method in METHODS.values())
    assert "training=Training()" in repr(METHODS["matryoshka"])
    by_layer = replace(METHODS["lorc"], layers={1: METHODS["k_svd"]})
    assert repr(by_layer).endswith("layers={1: " + repr(METHODS["k_svd"]) + "})")


def test_a_variant_tells_what_it_keeps_of_which_model(variant):
    full = 3 * 2 * variant.ranks.kv_width
    kept = f"{variant.ranks.floats_per_token} of {full} floats per token ({variant.kept_fraction:.4f})"
    assert repr(variant) == f"Variant(a model in memory, phasor_freq, uniform, {kept})"
    assert repr(variant.ranks) == f"RankSchedule(3 layers, {kept})"
    noted = replace(variant.ranks, note="epsilon 0.1")
    assert repr(noted) == f"RankSchedule(3 layers, {kept}, epsilon 0.1)"


def test_factors_and_spectra_show_no_numbers(variant):
    keys, values = variant.factors[1]
    assert repr(keys) == f"Factors(frequency, {sum(keys.ranks)} of 32 floats, torch.float32, rotated)"
    assert repr(values) == f"Factors(joint, {sum(values.ranks)} of 32 floats, torch.float32, mean)"
    assert len(repr(variant.factors)) < 600
