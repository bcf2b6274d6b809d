"""When a run ends, in closed form: by equal steps, by their kinds, by how many ran at a time."""

import pytest

from pipeline.status.estimate import seconds_left

SMALL, LARGE, SCORE = ("decompose", 20), ("decompose", 26), ("evaluate", 20)


def test_waiting_steps_take_what_their_kind_took_over_the_steps_that_run_at_a_time():
    assert seconds_left({SMALL: [2.0, 4.0]}, {SMALL: 10}, [], 1.0) == pytest.approx(30.0)
    assert seconds_left({SMALL: [2.0, 4.0]}, {SMALL: 10}, [], 4.0) == pytest.approx(7.5)


def test_of_a_running_step_its_rest_is_left_and_never_less_than_nothing():
    assert seconds_left({SMALL: [10.0]}, {}, [(SMALL, 4.0)], 1.0) == pytest.approx(6.0)
    assert seconds_left({SMALL: [10.0]}, {SMALL: 1}, [(SMALL, 400.0)], 1.0) == pytest.approx(10.0)


def test_a_large_models_steps_are_not_taken_for_a_small_ones():
    ended = {SMALL: [1.0], LARGE: [100.0]}
    assert seconds_left(ended, {SMALL: 3, LARGE: 2}, [], 1.0) == pytest.approx(203.0)


def test_nothing_is_said_without_evidence_of_every_kind_that_is_left():
    assert seconds_left({}, {SMALL: 1}, [], 1.0) is None
    assert seconds_left({SMALL: [1.0]}, {SMALL: 1, SCORE: 1}, [], 1.0) is None
    assert seconds_left({SMALL: [1.0]}, {SMALL: 1}, [(LARGE, 5.0)], 1.0) is None
    assert seconds_left({SMALL: [1.0]}, {SMALL: 1, SCORE: 0}, [], 1.0) == pytest.approx(1.0)
    assert seconds_left({SMALL: [1.0]}, {SMALL: 1}, [], 0.0) is None


def test_a_run_without_anything_left_ends_now():
    assert seconds_left({SMALL: [1.0]}, {}, [], 2.0) == 0
