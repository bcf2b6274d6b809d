"""Schedules that measure, against their definitions and brute force; exchanges and byte budgets for what they promise.

Measurements are made up here; test_probes shows that the real ones are what they say.
"""

import itertools
import json
import math
import random
import re
from dataclasses import asdict
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorc_core.errors import ConfigError, NumericsError
from lorc_core.measurement.exchange import Exchange
from lorc_core.model.blocks import Partition
from lorc_core.model.kinds import KINDS, KeysValues, by_layer
from lorc_core.ranks.budgets import fit_bytes
from lorc_core.ranks.progressive import Progressive
from lorc_core.ranks.schedules import SCHEDULES, Energy, ErrorBudget, Fisher, Sensitivity, Uniform
from lorc_core.ranks.spectra import (
    CurvePoint,
    ErrorLevel,
    KindSpectrum,
    LayerRanks,
    LayerSpectrum,
    Probes,
    RankSchedule,
)
from lorc_core.ranks.staircase import Staircase
from tests.spectra import BLOCKS, block_spectra, check_meets_target, joint

WIDTH = 32


def flat_layers(*partitions):
    kinds = [KindSpectrum(one, 0.0, read=((1.0,) * one.width,) * one.num_blocks) for one in partitions]
    return [LayerSpectrum(*pair) for pair in zip(kinds[::2], kinds[1::2], strict=True)]


def floats_of(ranks):
    return [layer.floats(kind) for layer in ranks.layers for kind in KINDS]


@pytest.mark.parametrize("name", ["fisher", "error_budget", "sensitivity"])
def test_schedules_that_measure_ask_for_text(name):
    with pytest.raises(ConfigError, match=f"the {name} schedule needs calibration text"):
        SCHEDULES[name]().ranks(flat_layers(joint(8), joint(8)), 0.5)


def measured(draw, layers):
    """Made-up measurements of any shape: errors and rises need not even be monotone."""
    fisher, errors, curves = [], [], []
    for _ in layers:
        fisher.append(
            KeysValues(*(tuple(draw(st.lists(st.floats(0.01, 9), min_size=WIDTH, max_size=WIDTH))) for _ in KINDS))
        )
        kept = sorted(draw(st.sets(st.integers(1, WIDTH), min_size=2, max_size=6)), reverse=True)
        errors.append(tuple(ErrorLevel(one, max(one // 2, 1), draw(st.integers(0, 20)) / 20) for one in kept))
        curves.append(
            KeysValues(
                *(
                    (
                        CurvePoint(WIDTH, 0.0),
                        *(CurvePoint(one, draw(st.floats(-0.1, 1))) for one in kept if one < WIDTH),
                    )
                    for _ in KINDS
                )
            )
        )
    return Probes(tuple(fisher), tuple(errors), tuple(curves))


@given(
    blocks=st.lists(st.tuples(st.sampled_from(BLOCKS), st.sampled_from(BLOCKS[:3])), min_size=1, max_size=3),
    schedule=st.sampled_from([Fisher, ErrorBudget, Sensitivity]),
    kept=st.floats(0.02, 1),
    multiple=st.sampled_from([1, 4]),
    skip=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=80)
def test_measured_schedules_meet_the_target_in_every_block_or_say_what_they_reach(
    blocks, schedule, kept, multiple, skip, data
):
    layers = block_spectra(blocks, data)
    chosen = schedule(rank_multiple=multiple, skip_layers=(0,) if skip and len(layers) > 1 else ())
    check_meets_target(chosen, layers, kept, measured(data.draw, layers))


def fisher_of(*means, width):
    """Probes with these means of keys and values, layer by layer; single channels differ."""
    channels = [tuple(mean * (1.5 if i % 2 else 0.5) for i in range(width)) for mean in means]
    return Probes(fisher=by_layer(channels))


def test_fisher_ranks_are_proportional_until_a_layer_is_full():
    probes, layers = fisher_of(1, 2, 3, 2, width=100), flat_layers(*[joint(100)] * 4)
    assert floats_of(Fisher().ranks(layers, 0.5, probes)) == [25, 50, 75, 50]
    # at 80 % the third would be 120: it is full, and the others share the rest 44 : 88 : 88
    assert floats_of(Fisher().ranks(layers, 0.8, probes)) == [44, 88, 100, 88]


@given(
    values=st.lists(st.floats(0.1, 10), min_size=4, max_size=8).filter(lambda v: len(v) % 2 == 0),
    kept=st.floats(0.2, 1),
)
@settings(deadline=None, max_examples=50)
def test_fisher_ranks_are_highest_averages(values, kept):
    """No float would stand for more Fisher information elsewhere: f / (rank + 1) of any is at most f / rank of all."""
    ranks = floats_of(Fisher().ranks(flat_layers(*[joint(16)] * len(values)), kept, fisher_of(*values, width=16)))
    wanted = [value / (rank + 1) for value, rank in zip(values, ranks, strict=True) if rank < 16]
    had = [value / rank for value, rank in zip(values, ranks, strict=True) if rank > 1]
    assert not wanted or not had or max(wanted) <= min(had) * (1 + 1e-9)


def test_fisher_shares_are_those_of_channels_however_wide_the_blocks_are():
    """Keys in 8 blocks and values in one, every channel alike: half each, not 8 to 1."""
    layers = flat_layers(Partition("group(1)", 8, 4), Partition("joint", 8, 4))
    found = Fisher().ranks(layers, 0.5, Probes(fisher=(KeysValues.of(lambda kind: (1.0,) * WIDTH),)))
    assert floats_of(found) == [16, 16]


def test_error_budget_takes_the_least_ranks_under_the_epsilon_that_it_notes():
    """Levels at every rank, so that the least floats with an error of at most epsilon can be read off the list."""
    curves = [
        lambda share: 0.5 * (1 - share) ** 2,
        lambda share: 0.2 * (1 - share) ** 2,
        lambda share: (1 - share) ** 3,
    ]
    errors = tuple(tuple(ErrorLevel(one, one, curve(one / WIDTH)) for one in range(WIDTH, 0, -1)) for curve in curves)
    for kept in (0.3, 0.5, 0.8):
        found = ErrorBudget().ranks(flat_layers(*[joint(WIDTH)] * 6), kept, Probes(attention_errors=errors))
        epsilon = float(re.fullmatch(r"epsilon (\S+)", found.note)[1])
        for curve, layer in zip(curves, found.layers, strict=True):
            least = next(one for one in range(1, WIDTH + 1) if curve(one / WIDTH) <= epsilon)
            assert layer.keys == layer.values
            assert abs(layer.floats("keys") - least) <= 1  # between two levels it rounds to the nearer
        assert found.kept_fraction == pytest.approx(kept, abs=0.02)


def convex_curve(draw, width):
    """Falling with floats, by less and less."""
    falls = sorted(draw(st.lists(st.integers(0, 50), min_size=width - 1, max_size=width - 1)))
    rises = [0, *itertools.accumulate(falls)]
    return [CurvePoint(width - idx, float(rise)) for idx, rise in enumerate(rises)]


@given(data=st.data(), floats=st.integers(4, 16))
@settings(deadline=None, max_examples=60)
def test_sensitivity_is_the_best_of_all_allocations_on_convex_curves(data, floats):
    width = 4
    curves = [convex_curve(data.draw, width) for _ in range(4)]
    probes = Probes(curves=by_layer(curves))
    found = floats_of(Sensitivity().ranks(flat_layers(*[joint(width)] * 4), floats / 16, probes))
    assert sum(found) == floats
    rises = [{point.floats: point.rise for point in curve} for curve in curves]

    def loss(allocation):
        return sum(rise[one] for rise, one in zip(rises, allocation, strict=True))

    everything = itertools.product(range(1, width + 1), repeat=4)
    assert loss(found) == min(loss(one) for one in everything if sum(one) == floats)


def test_sensitivity_does_not_stop_on_a_bump_in_a_curve():
    """Keys at half are worse than at a quarter: the hull goes past, values pay first all the same."""
    keys = (CurvePoint(32, 0.0), CurvePoint(16, 0.9), CurvePoint(8, 0.5), CurvePoint(1, 0.6))
    values = (CurvePoint(32, 0.0), CurvePoint(1, 0.1))
    probes = Probes(curves=(KeysValues(keys, values),))
    assert floats_of(Sensitivity().ranks(flat_layers(joint(32), joint(32)), 33 / 64, probes)) == [32, 1]


def separable_loss(costs):
    """A loss that falls with every float, each layer's and kind's by its own."""

    def loss(ranks):
        return sum(cost / one for cost, one in zip(costs, floats_of(ranks), strict=True))

    return loss


@given(
    blocks=st.lists(st.tuples(st.sampled_from(BLOCKS), st.sampled_from(BLOCKS[:3])), min_size=1, max_size=3),
    kept=st.floats(0.2, 0.9),
    data=st.data(),
)
@settings(deadline=None, max_examples=50)
def test_exchanges_never_raise_the_loss_nor_the_total(blocks, kept, data):
    layers = block_spectra(blocks, data)
    noise = data.draw(st.dictionaries(st.integers(0, 30), st.floats(-1, 1)))
    costs = data.draw(st.lists(st.floats(0, 50), min_size=2 * len(layers), max_size=2 * len(layers)))
    measured_losses = {}

    def loss(ranks):
        floats = floats_of(ranks)
        found = separable_loss(costs)(ranks) + noise.get(sum(i * one for i, one in enumerate(floats)) % 31, 0.0)
        return measured_losses.setdefault(ranks.layers, found)

    schedule = Uniform()
    start = schedule.ranks(layers, max(kept, 0.3))
    best = Exchange(schedule.stairs(layers, Probes()), loss).improve(start, num_rounds=3)
    assert best.floats_per_token <= start.floats_per_token
    assert measured_losses[best.layers] <= measured_losses[start.layers]
    assert all(sum(layer[kind]) >= 1 for layer in best.layers for kind in KINDS)


def test_exchanges_find_what_uniform_ranks_miss():
    """Costs 1 and 100 on keys and values: the best of this family gives values most, and four rounds come near."""
    layers = flat_layers(*[joint(32)] * 4)
    loss = separable_loss([1, 100, 1, 100])
    start = Uniform().ranks(layers, 0.5)
    found = Exchange(Uniform().stairs(layers, Probes()), loss).improve(start, num_rounds=4)
    least = min(
        2 * (1 / keys + 100 / values) for keys in range(1, 33) for values in range(1, 33) if keys + values == 32
    )
    assert loss(start) > 1.5 * least
    assert loss(found) < 1.2 * least
    assert found.floats_per_token == start.floats_per_token


def test_an_exchange_measures_each_layer_and_kind_twice_a_round_and_no_more_than_its_halvings():
    calls = []
    layers = flat_layers(*[joint(32)] * 4)

    def loss(ranks):
        calls.append(ranks)
        return float(ranks.floats_per_token)  # less is better: nobody wants to take

    start = Uniform().ranks(layers, 0.5)
    assert Exchange(Uniform().stairs(layers, Probes()), loss).improve(start, num_rounds=1).layers == start.layers
    assert len(calls) == 1 + 2 * 4


def bytes_of(per_float, per_rank):
    """Least bytes of ranks between two: `per_float` for what is cached and `per_rank` for factors, none at full width."""

    def least_bytes(low, high):
        pairs = zip(floats_of(low), floats_of(high), strict=True)
        factors = sum(floats for floats, most in pairs if most < low.kv_width)
        return per_float * low.floats_per_token + per_rank * factors + 10 * len(low.layers)

    return least_bytes


def bisected(ranks_at, needed, budget):
    """The largest that fits, if bytes only rose with the kept fraction."""
    low, high, best = 0.0, 1.0, None
    for _ in range(14):
        kept = (low + high) / 2
        fits = needed(ranks_at(kept), ranks_at(kept)) <= budget
        best = ranks_at(kept) if fits else best
        low, high = (kept, high) if fits else (low, kept)
    return best


@given(
    pairs=st.lists(st.tuples(st.sampled_from(BLOCKS), st.sampled_from(BLOCKS[:3])), min_size=1, max_size=2),
    schedule=st.sampled_from([Uniform(), Energy(), Progressive(), Energy(skip_layers=(0,))]),
    share=st.floats(0.0, 1.1),
    per_float=st.integers(1, 1000),
    per_rank=st.sampled_from([0, 1, 30, 2000]),
    data=st.data(),
)
@settings(deadline=None, max_examples=12)
def test_fit_bytes_is_the_largest_member_of_the_schedule_within_the_budget(
    pairs, schedule, share, per_float, per_rank, data
):
    layers = block_spectra(pairs, data)
    full = 2 * WIDTH * len(layers)
    least_bytes = bytes_of(per_float, per_rank)
    budget = int(share * ((per_float + per_rank / 2) * full + 10 * len(layers)))
    members = {}
    for floats in range(1, full + 1):
        try:
            ranks = schedule.ranks(layers, floats / full)
        except ConfigError:
            continue
        members[ranks.floats_per_token] = least_bytes(ranks, ranks)
    within = [floats for floats, needed in members.items() if needed <= budget]
    fitted = partial(fit_bytes, partial(schedule.ranks, layers), least_bytes, budget_bytes=budget, name=schedule.name)
    if not within:
        with pytest.raises(ConfigError, match=f"{schedule.name}: no ranks make cache and factors fit {budget:,} bytes"):
            fitted()
        return
    assert fitted().floats_per_token == max(within)


def test_fit_bytes_sees_that_layers_at_full_width_have_no_factors():
    """A flat layer and a steep one, which has 3 ranks of 32: with the flat one whole they need less than with half of it.

    The control: bisection takes bytes to rise with the kept fraction, and stops before the first that do not fit.
    """
    steep, flat = (tuple(4.0**-i for i in range(32)),), ((1.0,) * 32,)
    layers = [LayerSpectrum(*(KindSpectrum(joint(32), 0.0, read=one) for _ in KINDS)) for one in (flat, steep)]
    ranks_at, least_bytes = partial(Energy().ranks, layers), bytes_of(per_float=10, per_rank=10)
    whole = ranks_at(1.0)
    assert least_bytes(whole, whole) > 800
    assert bisected(ranks_at, least_bytes, 800).kept_fraction < 0.31
    found = fit_bytes(ranks_at, least_bytes, budget_bytes=800, name="energy")
    assert least_bytes(found, found) <= 800
    assert found.layers == (LayerRanks((32,), (32,)), LayerRanks((4,), (3,)))
    assert found.kept_fraction == pytest.approx(71 / 128)


def test_fit_bytes_looks_at_few_of_the_ranks_of_a_wide_model():
    """4 layers of 2,048 floats a kind; were all of their ranks tried, that would be 16,000."""
    generator = random.Random(0)
    layers = [
        LayerSpectrum(
            *(
                KindSpectrum(joint(2048), 0.0, read=(tuple(sorted(generator.random() for _ in range(2048))[::-1]),))
                for _ in KINDS
            )
        )
        for _ in range(4)
    ]
    calls = []

    def ranks_at(kept):
        calls.append(kept)
        return Energy().ranks(layers, kept)

    fit_bytes(ranks_at, bytes_of(per_float=100, per_rank=300), budget_bytes=3_000_000, name="energy")
    assert len(calls) < 100


def test_ranks_survive_json():
    ranks = RankSchedule((LayerRanks((1, 0, 3), (4,)), LayerRanks((2, 2, 2), (0, 7))), 8, "a note", predicted_rise=0.25)
    assert RankSchedule.from_dict(json.loads(json.dumps(asdict(ranks)))) == ranks
    assert ranks.floats_per_token == 21
    assert ranks.kept_fraction == 21 / 32


def test_stairs_of_a_skipped_layer_have_one_step():
    stair = Staircase(Partition("group(2)", 4, 8), (), always_full=True)
    assert [stair.ranks(stair.nearest(floats)) for floats in (0, 3, 32)] == [(16, 16)] * 3


NAN = float("nan")
LAYER = {
    "fisher": KeysValues.of(lambda kind: (1.0,) * WIDTH),
    "attention_errors": (ErrorLevel(WIDTH, WIDTH, 0.0), ErrorLevel(8, 8, 0.5)),
    "curves": KeysValues.of(lambda kind: (CurvePoint(WIDTH, 0.0), CurvePoint(8, 0.5))),
}
BROKEN = {
    "fisher": KeysValues((1.0,) * WIDTH, (NAN, *(1.0,) * (WIDTH - 1))),
    "attention_errors": (ErrorLevel(WIDTH, WIDTH, 0.0), ErrorLevel(8, 8, NAN)),
    "curves": KeysValues(LAYER["curves"].keys, (CurvePoint(WIDTH, 0.0), CurvePoint(8, math.inf))),
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fisher", "layer 1 values: the Fisher information measured on the calibration text holds NaN"),
        ("error_budget", "layer 1: the attention error measured on the calibration text holds NaN"),
        ("sensitivity", "layer 1 values: the loss curve measured on the calibration text holds NaN"),
    ],
)
def test_a_measurement_that_is_not_finite_stops_the_schedule_and_names_the_layer(name, message):
    probe, layers = SCHEDULES[name].probe, flat_layers(*[joint(WIDTH)] * 4)
    SCHEDULES[name]().ranks(layers, 0.5, Probes(**{probe: (LAYER[probe], LAYER[probe])}))
    with pytest.raises(NumericsError, match=message):
        SCHEDULES[name]().ranks(layers, 0.5, Probes(**{probe: (LAYER[probe], BROKEN[probe])}))
