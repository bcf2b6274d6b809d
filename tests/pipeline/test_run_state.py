"""The state of a run: what it tells, what is left, and how long that takes."""

import json

import pytest

from pipeline.status.following import StatusFile
from pipeline.status.state import RunState, StepState, remaining_s
from pipeline.steps.outcome import Listener
from pipeline.storage.store import Store


def state_of(*steps):
    return RunState("zoo", started_at=0.0, steps={str(number): step for number, step in enumerate(steps)})


def ran(model, kind, wall_s, began_at=0.0):
    return StepState(model, None, kind, "ran", began_at=began_at, wall_s=wall_s)


def test_nothing_is_foretold_before_a_step_of_each_kind_that_is_left_has_ended():
    left = StepState("a", None, "evaluate")
    assert remaining_s(state_of(left), 10.0) is None
    assert remaining_s(state_of(ran("a", "decompose", 10.0), left), 10.0) is None
    assert remaining_s(state_of(ran("a", "evaluate", 10.0), left), 10.0) == pytest.approx(10.0)
    assert remaining_s(state_of(ran("a", "evaluate", 10.0)), 10.0) is None, "nothing is left"


def test_a_models_own_steps_say_more_than_those_of_others():
    own, others = ran("large", "evaluate", 100.0), ran("small", "evaluate", 1.0, began_at=100.0)
    assert remaining_s(state_of(own, others, StepState("large", None, "evaluate")), 101.0) == pytest.approx(100.0)
    assert remaining_s(state_of(own, others, StepState("new", None, "evaluate")), 101.0) == pytest.approx(50.5)


def test_steps_side_by_side_and_what_has_begun_shorten_the_rest():
    side_by_side = [ran("a", "evaluate", 10.0) for _ in range(4)]
    left = [StepState("a", None, "evaluate") for _ in range(8)]
    assert remaining_s(state_of(*side_by_side, *left), 10.0) == pytest.approx(20.0)
    begun = StepState("a", None, "evaluate", "running", began_at=10.0)
    assert remaining_s(state_of(ran("a", "evaluate", 10.0), begun), 16.0) == pytest.approx(4.0)


def test_a_state_comes_back_from_its_file_as_it_was(tmp_path):
    store = Store(tmp_path)
    with StatusFile("zoo", store, Listener()) as following:
        following.state.steps["evaluate-1"] = StepState("a", "half", "evaluate", "running", 1.0, "host", None, 3, 10)
        following.note("a note")
        following.phase("reading a")
    written = json.loads((tmp_path / "status.json").read_text())
    assert RunState.from_dict(written) == following.state
    assert following.state.ended_at is not None
    assert following.state.phase is None
