"""Work and seconds of steps against counts by hand, and unit costs as files; the figures are another machine's."""

import itertools
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jobs.bench.zoos.units import write_units
from lorc_core.errors import ConfigError
from lorc_core.methods import METHODS
from lorc_core.model.kinds import KeysValues
from pipeline.costs.operations import layer_operations
from pipeline.costs.seconds import seconds_of, seconds_parts
from pipeline.costs.units import DEFAULT_UNITS, UnitCosts, default_units, rate_at, read_units
from pipeline.costs.work import work_of
from pipeline.simulation.planned import planned_model
from pipeline.steps.graph import model_steps
from pipeline.steps.step import distinct
from pipeline.zoo.file import load_zoo
from pipeline.zoo.models import config_for_planning
from pipeline.zoo_run import wanted_steps
from tests.large_zoo import write_large_zoo

SHAPES = {"8b": (32, 4096, 14336, 32, 8, 1)}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The model and the steps of an 8B model of which only the config is there."""
    zoo = load_zoo(write_large_zoo(tmp_path_factory.mktemp("zoo"), copies=1, shapes=SHAPES))
    model = planned_model(zoo.models[0], config_for_planning(zoo.models[0]))
    return model, distinct(wanted_steps([model_steps(zoo, model, "")], "register"))


def of_kind(planned, name):
    return [step for step in planned[1] if step.name == name]


def units_with(**changes):
    return read_units(DEFAULT_UNITS).model_copy(update=changes)


def test_parameters_of_a_planned_model_are_those_that_were_published(planned):
    """Llama 3.1 8B has 8,030,261,248."""
    assert planned[0].num_parameters == 8_030_261_248


def test_truncated_svd_of_a_layer_is_a_gram_matrix_and_its_eigenvectors_of_each_kind(planned):
    method = METHODS["lorc"]
    operations = layer_operations(planned[0].architecture, KeysValues(method.keys, method.values), 0)
    counted = [(operation.algebra, operation.width, operation.flops) for operation in operations]
    assert counted == [("gram", 1024, 1024**2 * 4096), ("eigh", 1024, 1024**3)] * 2


def test_a_layer_reads_keys_and_values_and_their_readers_where_they_count(planned):
    """W_k and W_v of 1024 x 4096 in two bytes; `lorc_q` reads W_q and W_o, each 4096 x 4096, too."""
    found = {sum(work_of(step).reads.values()) for step in of_kind(planned, "decompose")}
    assert found == {2 * 2 * 1024 * 4096, 2 * 2 * (1024 + 4096) * 4096}


def test_an_evaluation_runs_two_operations_for_each_parameter_and_token(planned):
    (baseline,) = [step for step in of_kind(planned, "evaluate") if step.label == "baseline"]
    tokens = 64 * 2048
    attention = 4 * 32 * 4096 * 2048 / 2  # two products of two operations, over half of the window in the mean
    assert work_of(baseline).forward_flops == pytest.approx(tokens * (2 * 8_030_261_248 + attention))
    assert work_of(baseline).passes == 2 * 64 / 8
    units = units_with(gpu_flops_per_s={"bfloat16": 1e14}, steps={}, load_s=3.0)
    parts = seconds_parts(baseline, units, copy_s=0.5)
    assert parts.load_s == 3
    assert parts.work_s == pytest.approx(work_of(baseline).forward_flops / 1e14 + 16 * 0.5)
    assert parts.read_bytes == 2 * 8_030_261_248


def test_every_kind_of_step_takes_time_and_more_in_a_slower_world(planned):
    units = default_units()
    slower = units.model_copy(update={"artifact_bytes_per_s": units.artifact_bytes_per_s / 1e6, "load_s": 1e3})
    for step in planned[1]:
        assert 0 <= seconds_of(step) < math.inf
    for name in ("decompose", "variant", "evaluate", "calibrate"):
        step = of_kind(planned, name)[0]
        assert seconds_of(step, slower) > seconds_of(step, units) > 0


@given(st.dictionaries(st.integers(1, 10_000), st.floats(1e3, 1e15), min_size=1), st.integers(1, 20_000))
def test_rates_between_widths_are_between_their_rates(rates, width):
    found = rate_at(rates, width)
    assert min(rates.values()) * (1 - 1e-9) <= found <= max(rates.values()) * (1 + 1e-9)
    assert all(rate_at(rates, known) == pytest.approx(rate) for known, rate in rates.items())


def test_rates_follow_a_power_law_between_two_widths():
    assert rate_at({100: 1e9, 400: 4e9}, 200) == pytest.approx(2e9)
    assert [rate_at({100: 1e9, 400: 4e9}, width) for width in (1, 10_000)] == [1e9, 4e9]


def test_unit_costs_are_read_as_they_were_written(tmp_path):
    units = read_units(DEFAULT_UNITS)
    write_units(units, tmp_path / "units.yaml")
    assert read_units(tmp_path / "units.yaml") == units


def test_wrong_unit_costs_are_refused_by_name(tmp_path):
    content = yaml.safe_load(DEFAULT_UNITS.read_text())
    wrong = {
        "tasks_s: unknown field; did you mean task_s?": content | {"tasks_s": 1},
        "load_s: field required": {name: value for name, value in content.items() if name != "load_s"},
        "algebra_flops_per_s: has no svd": content
        | {"algebra_flops_per_s": dict(itertools.islice(content["algebra_flops_per_s"].items(), 4)) | {"qr": {1: 1.0}}},
        "read_bytes_per_s: input should be greater than 0, got 0": content | {"read_bytes_per_s": 0},
    }
    for message, changed in wrong.items():
        (tmp_path / "units.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(ConfigError) as error:
            read_units(tmp_path / "units.yaml")
        assert f"{tmp_path / 'units.yaml'}: {message}" in str(error.value)


def test_default_units_order_steps_of_a_gpu_too(planned):
    (baseline,) = [step for step in of_kind(planned, "evaluate") if step.label == "baseline"]
    assert isinstance(default_units(), UnitCosts)
    assert seconds_of(baseline) < seconds_of(baseline, read_units(DEFAULT_UNITS))
