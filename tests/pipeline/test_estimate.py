"""When a run ends, in closed form: by what was foreseen, by the pace of each kind, by how many ran at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.status.estimate import Left, Pace, seconds_left


def test_what_is_left_goes_at_the_pace_of_its_kind_over_the_steps_that_run_at_a_time():
    ended = {"decompose": Pace(2.0, 6.0), "evaluate": Pace(10.0, 5.0)}
    left = [Left("decompose", 1.0), Left("decompose", 4.0), Left("evaluate", 8.0)]
    assert seconds_left(ended, left, 1.0) == pytest.approx(3 * 5 + 4)
    assert seconds_left(ended, left, 4.0) == pytest.approx((3 * 5 + 4) / 4)


def test_a_large_models_steps_are_not_taken_for_a_small_ones():
    assert seconds_left({"decompose": Pace(1.0, 2.0)}, [Left("decompose", 100.0)], 1.0) == pytest.approx(200.0)


def test_of_a_running_step_its_rest_is_left_and_never_less_than_nothing():
    ended = {"evaluate": Pace(1.0, 1.0)}
    assert seconds_left(ended, [Left("evaluate", 10.0, age_s=4.0)], 1.0) == pytest.approx(6.0)
    assert seconds_left(ended, [Left("evaluate", 10.0, age_s=400.0), Left("evaluate", 2.0)], 1.0) == pytest.approx(2.0)


def test_a_kind_of_which_none_has_ended_goes_at_the_pace_of_all():
    ended = {"windows": Pace(1.0, 1.0), "decompose": Pace(3.0, 11.0)}
    assert seconds_left(ended, [Left("evaluate", 5.0)], 1.0) == pytest.approx(5 * 12 / 4)


def test_nothing_is_said_before_a_step_has_ended():
    assert seconds_left({}, [Left("evaluate", 5.0)], 1.0) is None
    assert seconds_left({"resolve": Pace(0.0, 1.0)}, [Left("evaluate", 5.0)], 1.0) is None
    assert seconds_left({"evaluate": Pace(1.0, 1.0)}, [Left("evaluate", 5.0)], 0.0) is None


def test_a_run_without_anything_left_ends_now():
    assert seconds_left({"evaluate": Pace(1.0, 1.0)}, [], 2.0) == 0


@given(
    foreseen=st.lists(st.floats(0.1, 1e4), min_size=2, max_size=20),
    slower=st.floats(0.01, 100),
    split=st.integers(1, 19),
)
def test_where_foresight_is_wrong_by_one_factor_the_time_left_is_right(foreseen, slower, split):
    done, left = foreseen[:split], foreseen[split:]
    ended = {"decompose": Pace(sum(done), slower * sum(done))}
    told = seconds_left(ended, [Left("decompose", seconds) for seconds in left], 1.0)
    assert told == pytest.approx(slower * sum(left))
