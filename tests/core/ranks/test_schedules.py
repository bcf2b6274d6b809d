"""Schedules against the paper's formulas written out again, and what they promise for every input and every block.

Those that measure on calibration text are in test_measured_schedules.
"""

import json
import math
import re
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorc_core.errors import ConfigError, NumericsError
from lorc_core.model.blocks import Partition
from lorc_core.ranks.prediction import predicted_rise
from lorc_core.ranks.progressive import Progressive, cumulative_log10_condition
from lorc_core.ranks.schedules import Energy, Uniform, WaterLevel, known_schedule, schedule_from_dict
from lorc_core.ranks.spectra import KindSpectrum, LayerRanks, LayerSpectrum, RankSchedule
from lorc_core.ranks.staircase import Staircase
from tests.spectra import BLOCKS, block_spectra, check_meets_target, joint, spectra

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
    schedule = Progressive().ranks(layers, 0.8)
    cumulative = cumulative_log10_condition(layers)
    found = [layer.floats("keys") for layer in schedule.layers]
    d_max, d_min = max(found), min(found)
    assert d_max == width
    for rank, value in zip(found, cumulative, strict=True):
        bracket = (max(cumulative) - value) / (max(cumulative) - min(cumulative))
        assert rank == pytest.approx(d_max * (1 - bracket * (1 - d_min / d_max)), abs=1.0)


def test_progressive_cuts_deep_layers_most_and_keys_as_values():
    ranks = Progressive().ranks(EIGHT, 0.7).layers
    keys = [layer.floats("keys") for layer in ranks]
    assert keys == sorted(keys, reverse=True)
    assert keys[0] > keys[-1]
    assert all(layer.keys == layer.values for layer in ranks)


def test_progressive_lowers_d_max_only_where_d_min_is_at_its_floor():
    assert Progressive().ranks(EIGHT, 0.7).note == ""
    low = Progressive(min_rank=16, floor_kept_fraction=0.0).ranks(EIGHT, 0.4)
    assert re.fullmatch(r"d_max lowered to \d+", low.note)
    keys = [layer.floats("keys") for layer in low.layers]
    assert min(keys) == 16
    assert max(keys) < 128


@pytest.mark.parametrize("kept", [0.4, 0.5, 0.6, 0.8])
def test_progressive_keeps_its_floor_in_the_last_layer_while_the_target_allows(kept):
    """The control: without a floor the last layer falls to rank 1 at half."""
    found = Progressive().ranks(EIGHT, kept)
    assert found.kept_fraction == pytest.approx(kept, abs=0.01)
    assert min(layer.floats("keys") for layer in found.layers) >= 0.35 * 128
    assert "floor" not in found.note
    if kept <= 0.5:
        bare = Progressive(floor_kept_fraction=0.0).ranks(EIGHT, kept)
        assert bare.layers[-1] == LayerRanks((1,), (1,))


def test_progressive_lowers_its_floor_where_the_target_is_below_and_says_so():
    """0.35 of 128 is 44.8; below that all layers are cut alike, down to `min_rank`, which is never lowered."""
    found = Progressive(min_rank=16).ranks(EIGHT, 0.25)
    assert found.note == "d_max and the floor of 45 lowered to 32"
    assert {(layer.keys, layer.values) for layer in found.layers} == {((32,), (32,))}
    assert Progressive(min_rank=16).ranks(EIGHT, 0.36).note.startswith("d_max lowered to ")
    with pytest.raises(ConfigError, match=r"cannot be reached; reachable is 0\.125\.\.1\.000"):
        Progressive(min_rank=16).ranks(EIGHT, 0.1)


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
            for rank in (*layer.keys, *layer.values):
                assert 1 <= rank <= width
                assert rank % multiple == 0 or rank == width


def test_uniform_gives_every_layer_the_same_rank():
    assert {(layer.keys, layer.values) for layer in Uniform().ranks(EIGHT, 0.5).layers} == {((64,), (64,))}


@pytest.mark.parametrize("schedule", [Uniform(skip_layers=(0, 3)), Progressive(skip_layers=(0, 3))])
def test_skipped_layers_stay_full_and_the_others_pay(schedule):
    found = schedule.ranks(EIGHT, 0.7)
    assert found.layers[0].keys == found.layers[3].values == (128,)
    assert found.kept_fraction == pytest.approx(0.7, abs=0.01)


def test_threshold_skips_layers_above_a_cumulative_condition():
    cumulative = cumulative_log10_condition(EIGHT)
    found = Progressive(skip_above_log10_condition=cumulative[2]).ranks(EIGHT, 0.6)
    assert [layer.keys == (128,) for layer in found.layers[:4]] == [True, True, False, False]


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
    found = Progressive(min_rank=12, floor_kept_fraction=0.0, rank_multiple=8).ranks(EIGHT, 0.4)
    assert min(layer.keys for layer in found.layers) == (16,)
    found = Progressive(rank_multiple=8).ranks(EIGHT, 0.4)  # so is the floor, 44.8
    assert min(layer.keys for layer in found.layers) == (48,)


def test_the_note_gives_the_ramps_upper_end_even_where_that_layer_is_skipped():
    """The first layer is skipped, so the largest rank of the others is below d_max."""
    found = Progressive(skip_layers=(0,), floor_kept_fraction=0.0).ranks(EIGHT, 0.4)
    d_max = int(re.search(r"\d+", found.note).group())
    cumulative = cumulative_log10_condition(EIGHT)
    share = (cumulative[0] - cumulative[1]) / (cumulative[0] - cumulative[-1])
    assert found.layers[1].floats("keys") == pytest.approx(d_max * (1 - share * (1 - 1 / d_max)), abs=1)


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
    with pytest.raises(
        ConfigError, match="schedule 'progresive' is not known; known are energy, error_budget, fisher, "
    ):
        known_schedule("progresive")
    with pytest.raises(ConfigError, match="rank_multiple must be at least 1, got 0"):
        Uniform(rank_multiple=0)
    with pytest.raises(ConfigError, match=r"min_rank must be in 1\.\.128, the width .*, got 200"):
        Progressive(min_rank=200).ranks(EIGHT, 0.9)
    with pytest.raises(ConfigError, match=r"floor_kept_fraction must be in \[0, 1\], got 1\.5"):
        Progressive(floor_kept_fraction=1.5)
    with pytest.raises(ConfigError, match=r"rank_multiple must be in 1\.\.128"):
        Uniform(rank_multiple=200).ranks(EIGHT, 0.5)
    with pytest.raises(ConfigError, match=r"skip_layers: layer 8 does not exist; layers are 0\.\.7"):
        Uniform(skip_layers=(8,)).ranks(EIGHT, 0.9)


def energy_spectra(*energies, width=16):
    return [
        LayerSpectrum(*(KindSpectrum(joint(width), 0.0, read=(tuple(found),)) for found in pair)) for pair in energies
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
        for spectrum, (rank,) in ((keys, layer.keys), (values, layer.values)):
            assert 1 <= rank <= 16
            shares = [value / sum(spectrum) for value in spectrum]
            kept_shares += shares[1:rank]
            dropped_shares += shares[rank:]
    assert not kept_shares or not dropped_shares or min(kept_shares) >= max(dropped_shares) - 1e-12


@given(st.lists(st.tuples(falling, falling), min_size=1, max_size=5), st.floats(0.1, 1))
@settings(deadline=None)
def test_water_level_cuts_the_least_energy_that_any_ranks_of_that_size_cut(energies, kept):
    """Of all directions but the first of each, which every layer and kind keeps, the largest are kept."""
    layers = energy_spectra(*energies)
    found = WaterLevel().ranks(layers, kept)
    later = sorted(value for pair in energies for spectrum in pair for value in spectrum[1:])
    num_cut = found.full_floats_per_token - found.floats_per_token
    assert predicted_rise(layers, found) == pytest.approx(sum(later[:num_cut]) / 2, rel=1e-9)


def test_water_level_is_absolute_where_energy_takes_shares():
    """The control: a layer of a thousandth of the energy loses its directions first, though its shares are the same."""
    steep = [2.0**-i for i in range(16)]
    layers = energy_spectra((steep, steep), ([value / 1024 for value in steep],) * 2)
    assert [layer.floats("keys") for layer in WaterLevel().ranks(layers, 0.5).layers] == [13, 3]
    assert [layer.floats("keys") for layer in Energy().ranks(layers, 0.5).layers] == [8, 8]


def test_predicted_rise_counts_every_block():
    partition = Partition("head", 2, 4)
    kind = KindSpectrum(partition, 0.0, read=((8.0, 4.0, 2.0, 1.0), (6.0, 0.5, 0.25, 0.0)))
    ranks = RankSchedule((LayerRanks((1, 2), (4, 0)),), 8)
    assert predicted_rise([LayerSpectrum(kind, kind)], ranks) == (7.0 + 0.25 + 6.75) / 2


def test_energy_gives_a_flat_spectrum_more_than_a_steep_one():
    steep, flat = [4.0**-i for i in range(16)], [1.0] * 16
    (layer,) = Energy().ranks(energy_spectra((steep, flat)), 0.5).layers
    assert layer.floats("keys") < 4
    assert layer.floats("values") > 12


def test_energy_takes_multiples_and_skips_and_says_what_it_reaches():
    spectra_ = energy_spectra(*[([1.0] * 16, [1.0] * 16)] * 4)
    found = Energy(rank_multiple=4, skip_layers=(1,)).ranks(spectra_, 0.6)
    assert found.layers[1] == LayerRanks((16,), (16,))
    assert all(rank % 4 == 0 for layer in found.layers for rank in (*layer.keys, *layer.values))
    with pytest.raises(ConfigError, match=r"kept_fraction 0\.3 cannot be reached; reachable is 0\.438\.\.1\.000"):
        Energy(rank_multiple=4, skip_layers=(1,)).ranks(spectra_, 0.3)


def test_energy_gives_a_weight_of_zeros_the_least():
    (layer,) = Energy().ranks(energy_spectra(([0.0] * 16, [1.0] * 16)), 0.5).layers
    assert layer == LayerRanks((1,), (15,))


@given(
    blocks=st.lists(st.tuples(st.sampled_from(BLOCKS), st.sampled_from(BLOCKS[:3])), min_size=1, max_size=4),
    schedule=st.sampled_from([Uniform, Progressive, Energy, WaterLevel]),
    kept=st.floats(0.02, 1),
    multiple=st.sampled_from([1, 3, 4]),
    skip=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=80)
def test_every_schedule_meets_the_target_in_every_block_or_says_what_it_reaches(
    blocks, schedule, kept, multiple, skip, data
):
    layers = block_spectra(blocks, data)
    chosen = schedule(rank_multiple=multiple, skip_layers=(0,) if skip and len(layers) > 1 else ())
    check_meets_target(chosen, layers, kept, None)


def test_a_rank_multiple_holds_for_complex_blocks_too():
    """A complex latent is two floats: ranks are multiples of both."""
    steps = Staircase(Partition("frequency", 8, 4), ((1.0,) * 16,) * 2, rank_multiple=3).steps
    assert {step.rank for step in steps} == {6, 12, 16}


@given(
    block=st.sampled_from(["joint", "group(2)", "frequency"]),
    multiple=st.sampled_from([1, 2, 3, 8]),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_staircases_climb_every_block_to_the_top_best_first(block, multiple, data):
    (layer,) = block_spectra([(block, "joint")], data)
    stair = Staircase(layer.keys.partition, layer.keys.read, multiple)
    assert [step.gain for step in stair.steps] == sorted((step.gain for step in stair.steps), reverse=True)
    ranks = [stair.ranks(count) for count in range(len(stair.steps) + 1)]
    assert sum(ranks[0]) == 0
    assert sum(ranks[-1]) == stair.totals[-1] == layer.kv_width
    for before, after, total in zip(ranks, ranks[1:], stair.totals, strict=False):
        assert sum(after) == total
        assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
    floats = data.draw(st.floats(0, 40))
    distances = [abs(total - floats) for total in stair.totals]
    assert abs(stair.totals[stair.nearest(floats) - 1] - floats) == min(distances)


def test_energy_gives_blocks_of_a_layer_what_their_energies_ask():
    """Groups with 90 % and 10 % of a flat layer's energy: the first is full before the second gets its second."""
    rich, poor = (0.9 / 8,) * 8, (0.1 / 8,) * 8
    kind = KindSpectrum(Partition("group(1)", 2, 8), 0.0, read=(rich, poor))
    (layer,) = Energy().ranks([LayerSpectrum(kind, kind)], 0.625).layers
    assert layer == LayerRanks((8, 2), (8, 2))
    (layer,) = Energy().ranks([LayerSpectrum(kind, kind)], 0.25).layers
    assert layer == LayerRanks((4, 0), (4, 0))


@pytest.mark.parametrize("spectrum", ["weights", "states", "read"])
def test_energy_levels_the_spectrum_that_it_is_told(spectrum):
    """Only one of the three is flat; its kind then gets most."""
    steep, flat = (tuple(4.0**-i for i in range(16)),), ((1.0,) * 16,)
    energies = {name: flat if name == spectrum else steep for name in ("weights", "states", "read")}
    keys, values = KindSpectrum(joint(16), 0.0, **energies), KindSpectrum(joint(16), 0.0, steep, steep, steep)
    (layer,) = Energy(spectrum=spectrum).ranks([LayerSpectrum(keys, values)], 0.5).layers
    assert layer.floats("keys") > 12


@pytest.mark.parametrize(
    "schedule", [Uniform(4, (1, 2)), Progressive(min_rank=3, skip_above_log10_condition=9.5), Energy(spectrum="states")]
)
def test_schedules_survive_json(schedule):
    assert schedule_from_dict(json.loads(json.dumps(asdict(schedule)))) == schedule
