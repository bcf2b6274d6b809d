"""The factors that `lorc plan` promises are the most there can be: against every preset's real ones, and made-up ranks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorc_core.caches.memory import planned_factor_floats
from lorc_core.compression import compress
from lorc_core.errors import ConfigError
from lorc_core.methods import METHODS, Training
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import KINDS, KeysValues
from lorc_core.ranks.schedules import Energy, ErrorBudget, Fisher, Progressive, Sensitivity, Uniform
from lorc_core.ranks.spectra import CurvePoint, ErrorLevel, KindSpectrum, LayerSpectrum, Probes
from pipeline.factor_bound import most_factor_floats
from tests.models import CONFIGS, tiny_model

SCHEDULES = [
    Energy(),
    Energy(rank_multiple=4, skip_layers=(1,)),
    Progressive(),
    Progressive(min_rank=4, rank_multiple=2, skip_layers=(0,)),
    Progressive(floor_kept_fraction=0.0),
    Progressive(rank_multiple=3, floor_kept_fraction=0.5),
    Progressive(skip_above_log10_condition=9.0),
    Fisher(),
    ErrorBudget(),
    Sensitivity(),
    Uniform(rank_multiple=4),
]
METHOD_OF_ITS_OWN = replace(METHODS["lorc"], name="mixed", layers={0: METHODS["kq_svd"], 2: METHODS["phasor_freq"]})


def falling(generator, num_blocks, width, step):
    """Random energies of every block, some of them far below the others; pairs are equal where ranks go in twos."""
    values = torch.rand(num_blocks, width // step, generator=generator).pow(6).sort(descending=True).values
    return tuple(map(tuple, values.repeat_interleave(step, dim=1).tolist()))


def random_spectra(method, architecture, generator):
    def kind_spectrum(layer_idx, kind):
        partition = method.axes(layer_idx, kind).partition(architecture)
        energies = falling(generator, partition.num_blocks, partition.width, partition.rank_step)
        return KindSpectrum(partition, 9 * torch.rand(1, generator=generator).item(), energies, energies, energies)

    return [LayerSpectrum(*(kind_spectrum(idx, kind) for kind in KINDS)) for idx in range(architecture.num_layers)]


def random_probes(architecture, generator):
    def numbers(count, most):
        return sorted((most * torch.rand(count, generator=generator)).tolist())

    width, layers = architecture.kv_width, range(architecture.num_layers)
    return Probes(
        fisher=tuple(KeysValues(*(tuple(numbers(width, 1)) for _ in KINDS)) for _ in layers),
        attention_errors=tuple(
            tuple(
                ErrorLevel(int(keys), int(values), error)
                for keys, values, error in zip(
                    numbers(5, width)[::-1], numbers(5, width)[::-1], numbers(5, 1), strict=True
                )
            )
            for _ in layers
        ),
        curves=tuple(
            KeysValues(
                *(
                    tuple(
                        CurvePoint(int(floats), rise)
                        for floats, rise in zip(numbers(5, width), numbers(5, 1)[::-1], strict=True)
                    )
                    for _ in KINDS
                )
            )
            for _ in layers
        ),
    )


@given(
    method=st.sampled_from([*METHODS.values(), METHOD_OF_ITS_OWN]),
    schedule=st.sampled_from(SCHEDULES),
    model=st.sampled_from(["llama-mha", "llama", "qwen2", "opt"]),
    kept_fraction=st.floats(0.02, 1.0),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=100)
def test_no_ranks_of_any_schedule_need_more_factors(method, schedule, model, kept_fraction, seed):
    architecture = architecture_of(CONFIGS[model])
    generator = torch.Generator().manual_seed(seed)
    try:
        method.check(architecture)
        spectra = random_spectra(method, architecture, generator)
        ranks = schedule.ranks(spectra, kept_fraction, random_probes(architecture, generator))
    except ConfigError:  # the model cannot have the method, or the schedule the share
        assume(False)
    needed = planned_factor_floats(ranks, method, architecture)
    most = most_factor_floats(method, schedule, architecture, kept_fraction)
    assert needed <= most
    if isinstance(schedule, Uniform):
        assert needed == most


@pytest.mark.parametrize("schedule", [Energy(), Uniform()], ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("name", METHODS)
def test_every_presets_real_factors_are_within_the_bound(name, schedule):
    method = METHODS[name]
    if method.training:
        method = replace(method, training=Training(num_steps=1, batch_size=1, eval_every=1, lora_rank=2))
    ids = torch.randint(3, 1024, (8, 32), generator=torch.Generator().manual_seed(0))
    variant = compress(tiny_model("llama-mha"), method, 0.5, schedule, calibration=ids)
    most = most_factor_floats(method, schedule, variant.architecture, 0.5)
    assert variant.factor_floats <= most
    assert most <= 2.5 * variant.factor_floats  # phasor_freq's 2.3: all ranks for its values, 16 times as dear as keys
