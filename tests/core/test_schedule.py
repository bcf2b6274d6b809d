"""Schedules against the paper's formulas written out again, and what they promise for every input."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorc_core.errors import ConfigError, NumericsError
from lorc_core.schedule import (
    Energy,
    KindSpectrum,
    LayerRanks,
    LayerSpectrum,
    Progressive,
    Uniform,
    cumulative_log10_condition,
    known_schedule,
)


def spectra(*log_conditions, width=128):
    return [LayerSpectrum(width, KindSpectrum(keys), KindSpectrum(values)) for keys, values in log_conditions]


EIGHT = spectra(*[(1.0 + 0.1 * i, 0.7) for i in range(8)])

any_spectra = st.lists(st.tuples(st.floats(0, 12), st.floats(0, 12)), min_size=1, max_size=12)


def test_cumulative_condition_is_the_product_over_deeper_layers():
    """Eq. 12 with its product written out, where it does not overflow."""
    conditions = [(3.0, 5.0), (2.0, 7.0), (11.0, 1.5)]
    found = cumulative_log10_condition(spectra(*[(math.log10(k), math.log10(v)) for k, v in conditions]))
    for layer, value in enumerate(found):
        assert 10**value == pytest.approx(math.prod(k * v for k, v in conditions[layer:]))


def test_cumulative_condition_does_not_overflow():
    assert cumulative_log10_condition(spectra(*[(10.0, 10.0)] * 200))[0] == pytest.approx(4000)


def test_progressive_follows_equation_13():
    """Eq. 13 written out, with d_max the full width and the d_min that the schedule found."""
    width, layers = 1000, spectra(*[(0.5 + 0.3 * (i % 3), 0.4 + 0.1 * i) for i in range(10)], width=1000)
    schedule = Progressive().ranks(layers, 0.7)
    cumulative = cumulative_log10_condition(layers)
    found = [layer.keys for layer in schedule.layers]
    d_max, d_min = max(found), min(found)
    assert d_max == width
    for rank, value in zip(found, cumulative, strict=True):
        bracket = (max(cumulative) - value) / (max(cumulative) - min(cumulative))
        assert rank == pytest.approx(d_max * (1 - bracket * (1 - d_min / d_max)), abs=1.0)


def test_progressive_cuts_deep_layers_most_and_keys_as_values():
    ranks = Progressive().ranks(EIGHT, 0.7).layers
    assert [layer.keys for layer in ranks] == sorted((layer.keys for layer in ranks), reverse=True)
    assert ranks[0].keys > ranks[-1].keys
    assert all(layer.keys == layer.values for layer in ranks)


def test_progressive_lowers_d_max_only_where_d_min_is_at_its_floor():
    assert Progressive().ranks(EIGHT, 0.6).note == ""
    low = Progressive(min_rank=16).ranks(EIGHT, 0.4)
    assert re.fullmatch(r"d_max lowered to \d+", low.note)
    assert min(layer.keys for layer in low.layers) == 16
    assert max(layer.keys for layer in low.layers) < 128


@given(
    conditions=any_spectra, kept=st.floats(0.02, 1), multiple=st.sampled_from([1, 8]), width=st.sampled_from([64, 96])
)
@settings(deadline=None)
def test_schedules_meet_the_target_or_say_what_they_reach(conditions, kept, multiple, width):
    for schedule in (Uniform(rank_multiple=multiple), Progressive(rank_multiple=multiple)):
        try:
            found = schedule.ranks(spectra(*conditions, width=width), kept)
        except ConfigError as error:
            least, most = map(float, re.search(r"reachable is ([\d.]+)\.\.([\d.]+)", str(error)).groups())
            assert kept < least - 0.009 or kept > most + 0.009
            continue
        assert abs(found.kept_fraction - kept) <= max(0.01, multiple / width)
        for layer in found.layers:
            for rank in (layer.keys, layer.values):
                assert 1 <= rank <= width
                assert rank % multiple == 0 or rank == width


def test_uniform_gives_every_layer_the_same_rank():
    assert {(layer.keys, layer.values) for layer in Uniform().ranks(EIGHT, 0.5).layers} == {(64, 64)}


@pytest.mark.parametrize("schedule", [Uniform(skip_layers=(0, 3)), Progressive(skip_layers=(0, 3))])
def test_skipped_layers_stay_full_and_the_others_pay(schedule):
    found = schedule.ranks(EIGHT, 0.7)
    assert found.layers[0].keys == found.layers[3].values == 128
    assert found.kept_fraction == pytest.approx(0.7, abs=0.01)


def test_threshold_skips_layers_above_a_cumulative_condition():
    cumulative = cumulative_log10_condition(EIGHT)
    found = Progressive(skip_above_log10_condition=cumulative[2]).ranks(EIGHT, 0.6)
    assert [layer.keys == 128 for layer in found.layers[:4]] == [True, True, False, False]


def test_a_target_below_the_skipped_layers_names_the_reachable_range():
    with pytest.raises(ConfigError, match=r"kept_fraction 0\.2 cannot be reached; reachable is 0\.50\d\.\.1\.000"):
        Uniform(skip_layers=(0, 1, 2, 3)).ranks(EIGHT, 0.2)


@pytest.mark.parametrize(
    ("schedule", "kept", "reachable"),
    [
        (Uniform(rank_multiple=32), 0.02, r"0\.250\.\.1\.000"),
        (Uniform(skip_layers=(0, 1, 2, 3, 4, 5, 6)), 0.65, r"0\.876\.\.1\.000"),
        (Progressive(min_rank=64), 0.3, r"0\.500\.\.1\.000"),
    ],
)
def test_a_coarse_rank_step_does_not_widen_the_reach(schedule, kept, reachable):
    with pytest.raises(ConfigError, match=f"cannot be reached; reachable is {reachable}"):
        schedule.ranks(EIGHT, kept)


def test_min_rank_is_rounded_up_to_the_multiple():
    found = Progressive(min_rank=12, rank_multiple=8).ranks(EIGHT, 0.4)
    assert min(layer.keys for layer in found.layers) == 16


def test_the_note_gives_the_ramps_upper_end_even_where_that_layer_is_skipped():
    """The first layer is skipped, so the largest rank of the others is below d_max."""
    found = Progressive(skip_layers=(0,)).ranks(EIGHT, 0.4)
    d_max = int(re.search(r"\d+", found.note).group())
    cumulative = cumulative_log10_condition(EIGHT)
    share = (cumulative[0] - cumulative[1]) / (cumulative[0] - cumulative[-1])
    assert found.layers[1].keys == pytest.approx(d_max * (1 - share * (1 - 1 / d_max)), abs=1)


@pytest.mark.parametrize("kept", [0.0, -0.5, 1.01, float("nan")])
def test_kept_fraction_out_of_range_is_refused(kept):
    with pytest.raises(ConfigError, match=r"kept_fraction must be in \(0, 1\]"):
        Uniform().ranks(EIGHT, kept)


def test_infinite_condition_stops_progressive_naming_the_layer_and_not_uniform():
    layers = spectra((1.0, 1.0), (1.0, math.inf), (1.0, 1.0))
    with pytest.raises(NumericsError, match="layer 1 values: the weight is rank-deficient"):
        Progressive().ranks(layers, 0.5)
    assert Uniform().ranks(layers, 0.5).kept_fraction == 0.5


def test_unknown_names_and_bad_fields_are_refused():
    with pytest.raises(ConfigError, match="schedule 'progresive' is not known; known are energy, progressive, uniform"):
        known_schedule("progresive")
    with pytest.raises(ConfigError, match="rank_multiple must be at least 1, got 0"):
        Uniform(rank_multiple=0)
    with pytest.raises(ConfigError, match=r"min_rank must be in 1\.\.128, the width .*, got 200"):
        Progressive(min_rank=200).ranks(EIGHT, 0.9)
    with pytest.raises(ConfigError, match=r"rank_multiple must be in 1\.\.128"):
        Uniform(rank_multiple=200).ranks(EIGHT, 0.5)
    with pytest.raises(ConfigError, match=r"skip_layers: layer 8 does not exist; layers are 0\.\.7"):
        Uniform(skip_layers=(8,)).ranks(EIGHT, 0.9)


def energy_spectra(*energies, width=16):
    return [
        LayerSpectrum(width, KindSpectrum(0.0, read=tuple(keys)), KindSpectrum(0.0, read=tuple(values)))
        for keys, values in energies
    ]


falling = st.lists(st.floats(1e-6, 1e3), min_size=16, max_size=16).map(lambda values: sorted(values, reverse=True))


@given(st.lists(st.tuples(falling, falling), min_size=1, max_size=5), st.floats(0.1, 1))
@settings(deadline=None)
def test_energy_keeps_the_directions_above_one_water_level(energies, kept):
    """Every direction kept holds at least the share of every direction dropped, first directions apart."""
    found = Energy().ranks(energy_spectra(*energies), kept)
    assert abs(found.kept_fraction - kept) <= max(0.01, 1 / (32 * len(energies)))
    kept_shares, dropped_shares = [], []
    for (keys, values), layer in zip(energies, found.layers, strict=True):
        for spectrum, rank in ((keys, layer.keys), (values, layer.values)):
            assert 1 <= rank <= 16
            shares = [value / sum(spectrum) for value in spectrum]
            kept_shares += shares[1:rank]
            dropped_shares += shares[rank:]
    assert not kept_shares or not dropped_shares or min(kept_shares) >= max(dropped_shares) - 1e-12


def test_energy_gives_a_flat_spectrum_more_than_a_steep_one():
    steep, flat = [4.0**-i for i in range(16)], [1.0] * 16
    (layer,) = Energy().ranks(energy_spectra((steep, flat)), 0.5).layers
    assert layer.keys < 4
    assert layer.values > 12


def test_energy_takes_multiples_and_skips_and_says_what_it_reaches():
    spectra_ = energy_spectra(*[([1.0] * 16, [1.0] * 16)] * 4)
    found = Energy(rank_multiple=4, skip_layers=(1,)).ranks(spectra_, 0.6)
    assert found.layers[1] == LayerRanks(16, 16)
    assert all(rank % 4 == 0 for layer in found.layers for rank in (layer.keys, layer.values))
    with pytest.raises(ConfigError, match=r"kept_fraction 0\.3 cannot be reached; reachable is 0\.438\.\.1\.000"):
        Energy(rank_multiple=4, skip_layers=(1,)).ranks(spectra_, 0.3)


def test_energy_gives_a_weight_of_zeros_the_least():
    (layer,) = Energy().ranks(energy_spectra(([0.0] * 16, [1.0] * 16)), 0.5).layers
    assert layer == LayerRanks(1, 15)
