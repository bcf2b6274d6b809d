"""The order of steps: each after its inputs, and the one with the longest chain behind it first."""

import math

from hypothesis import given
from hypothesis import strategies as st

from pipeline.running.nodes import NodeKind
from pipeline.running.runner import Work
from pipeline.running.waiting import WaitingBatches, batches_of
from pipeline.steps.outcome import Listener
from pipeline.steps.step import Need
from pipeline.storage.store import Store
from pipeline.zoo.sections import Cluster
from tests.timed_steps import TimedStep


def numbers(batches):
    return [[step.number for step in batch.steps] for batch in batches]


def ready(waiting):
    return numbers(waiting.batches[place] for place in waiting.ready)


def test_a_batch_is_ready_when_the_last_input_of_its_steps_has_an_outcome():
    first, second = TimedStep(model="m", number=1), TimedStep(model="m", number=2)
    both = [
        TimedStep(model="m", number=3 + idx, together="both", after=(step,)) for idx, step in enumerate((first, second))
    ]
    waiting = WaitingBatches(batches_of([first, second, *both]), {}, {})
    assert ready(waiting) == [[1], [2]]
    waiting.take(waiting.ready)
    assert waiting.end(first.key) == []
    assert ready(waiting) == []
    waiting.end(second.key)
    assert ready(waiting) == [[3, 4]]


def test_the_longest_chain_comes_first_and_equal_ones_in_their_order():
    steps = [TimedStep(model="m", number=number) for number in range(4)]
    left_s = dict(zip((step.key for step in steps), (1.0, 5.0, 1.0, 9.0), strict=True))
    assert ready(WaitingBatches(batches_of(steps), {}, left_s)) == [[3], [1], [0], [2]]
    assert ready(WaitingBatches(batches_of(steps), {}, {})) == [[0], [1], [2], [3]]


def test_what_is_known_is_not_waited_for():
    first = TimedStep(model="m", number=1)
    waiting = WaitingBatches(batches_of([TimedStep(model="m", number=2, after=(first,))]), {first.key}, {})
    assert ready(waiting) == [[2]]


def test_a_batch_whose_steps_are_all_skipped_waits_no_longer():
    steps = [TimedStep(model="m", number=number, together="all") for number in range(3)]
    waiting = WaitingBatches(batches_of(steps), {}, {})
    (place,) = waiting.ready
    waiting.keep(place, steps[1:])
    assert ready(waiting) == [[1, 2]]
    waiting.keep(place, [])
    assert len(waiting) == 0


@given(st.lists(st.lists(st.integers(0, 20), max_size=4), max_size=15), st.randoms())
def test_every_step_runs_once_and_after_its_inputs(inputs, random):
    steps: list[TimedStep] = []
    for number, earlier in enumerate(inputs):
        after = tuple({steps[idx % number].key: steps[idx % number] for idx in earlier}.values()) if number else ()
        steps.append(TimedStep(model="m", number=number, after=after))
    waiting = WaitingBatches(batches_of(steps), {}, {step.key: random.random() for step in steps})
    ended: list[str] = []
    while waiting:
        (batch,) = waiting.take([random.choice(waiting.ready)])
        (step,) = batch.steps
        assert all(needed.key in ended for needed in step.after)
        ended.append(step.key)
        waiting.end(step.key)
    assert sorted(ended) == sorted(step.key for step in steps)


def test_batches_that_no_node_can_run_any_more_fail_one_after_another(tmp_path, monkeypatch):
    """The node was there when the run began: the first of them is told, and the others are not lost."""
    steps = [TimedStep(model="m", number=number, need=Need(2)) for number in range(3)]
    work = Work(steps, {}, Store(tmp_path), Cluster(), Listener())
    monkeypatch.setattr(work, "refuse_impossible", lambda: None)
    work.nodes.known, work.nodes.asked_at = [NodeKind({"CPU": 1})], math.inf  # where a cluster is there, too
    work.finish()
    errors = [work.outcomes[step.key].error for step in steps]
    assert errors == ["no node of the cluster can give CPU 2; its nodes have: CPU 1, GPU 0, memory 0"] * 3
