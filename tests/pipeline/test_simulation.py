"""The simulated schedule against ones counted by hand, and rules that no schedule may break."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.costs.order import remaining_seconds
from pipeline.costs.seconds import StepSeconds
from pipeline.simulation.cluster import Bandwidths
from pipeline.simulation.nodes import Node
from pipeline.simulation.schedule import Pace, simulate
from pipeline.steps.step import Need
from tests.timed_steps import TimedStep

ONE_CPU = Need()


def step(number, seconds=1.0, *after, model="m", need=ONE_CPU, **fields):
    return TimedStep(model=model, number=number, seconds=seconds, after=after, need=need, **fields)


def seconds_on(step, kind):
    return StepSeconds(first_s=0.0, load_s=0.0, work_s=step.seconds, reads={"file": step.reads} if step.reads else {})


def nodes(count=1, cpus=2.0, gpus=0.0, memory=100):
    return [Node(f"node-{number}", "kind", cpus, gpus, memory) for number in range(count)]


def run(steps, machines=None, *, longest_first=True, **options):
    remaining = remaining_seconds(steps, lambda step: step.seconds) if longest_first else {}
    return simulate(steps, machines or nodes(), options.pop("seconds_on", seconds_on), remaining=remaining, **options)


def times(schedule):
    return {interval.step.number: (interval.started, interval.ended) for interval in schedule.intervals}


def test_a_diamond_on_two_workers_is_as_counted_by_hand():
    """0 then 1 and 2 side by side, then 3: 1 + max(2, 5) + 1."""
    first = step(0, 1)
    left, right = step(1, 2, first), step(2, 5, first)
    schedule = run([first, left, right, step(3, 1, left, right)])
    assert times(schedule) == {0: (0, 1), 1: (1, 3), 2: (1, 6), 3: (6, 7)}
    assert (schedule.wall_s, schedule.cpu_s) == (7, 9)


def test_remaining_seconds_are_those_of_the_longest_chain():
    first = step(0, 1)
    left, right = step(1, 2, first), step(2, 5, first)
    steps = [step(3, 1, left, right), first, right, left]
    by_number = {step.number: remaining_seconds(steps, lambda step: step.seconds)[step.key] for step in steps}
    assert by_number == {0: 7, 1: 3, 2: 6, 3: 1}
    assert set(remaining_seconds([right], lambda step: step.seconds).values()) == {5}  # its input is done


def test_the_longest_chain_first_beats_first_come():
    """Four short steps and a chain of 2 + 2 s, two workers: 6 s in the order of the zoo file.

    With the chain first 5 s: its second step waits for short ones that Ray was given ahead.
    """
    short = [step(number, 1) for number in range(4)]
    chain = [step(10, 2)]
    chain.append(step(11, 2, chain[0]))
    assert run([*short, *chain]).wall_s == 5
    assert run([*short, *chain], longest_first=False).wall_s == 6


def test_steps_of_a_group_run_in_one_task_and_each_is_told_when_it_ends():
    """What needs the first of two does not wait for the second."""
    first, second = step(0, 1, together="both"), step(1, 5, together="both")
    schedule = run([first, second, step(2, 1, first)])
    assert times(schedule) == {0: (0, 1), 1: (1, 6), 2: (1, 2)}


def test_the_driver_runs_one_step_at_a_time_and_hears_nothing_meanwhile():
    """1 ends at 2 s, while the driver is busy from 1 s to 4 s: what waits for 1 starts at 4 s."""
    first, second = step(0, 1), step(1, 2)
    steps = [first, second, step(2, 3, first, need=None), step(3, 1, second)]
    assert times(run(steps)) == {0: (0, 1), 1: (0, 2), 2: (1, 4), 3: (4, 5)}


def test_models_in_flight_wait_for_the_ones_before_to_end():
    steps = [step(number, 2, model=f"m{number}") for number in range(3)]
    assert run(steps, nodes(cpus=3)).wall_s == 2
    assert run(steps, nodes(cpus=3), models_in_flight=1).wall_s == 6


def test_a_task_of_several_gpus_is_not_starved_by_small_ones():
    """Both of one node's GPUs are asked for while small tasks keep coming: it starts when the first of those ends."""
    small = [step(number, 1, need=Need(1, 1)) for number in range(6)]
    large = step(10, 3, need=Need(1, 2))
    found = times(run([*small, large], nodes(cpus=8, gpus=2)))
    assert found[10] == (0, 3)
    assert max(ended for _, ended in found.values()) == 6


def test_a_task_of_several_cpus_is_not_starved_by_small_ones():
    """Small tasks run when it becomes ready, and others wait: it starts when those that were given before have ended."""
    first = step(50, 1)
    large = step(100, 10, first, need=Need(4))
    small = [step(number, 2) for number in range(40)]
    found = times(run([first, large, *small], nodes(cpus=4)))
    assert found[100][0] <= 1 + 2 * 2 + 2
    assert max(ended for _, ended in found.values()) < 40


def test_new_workers_import_once_and_those_with_a_gpu_each_time():
    pace = Pace(start_s=10, end_s=2, worker_s=3, task_s=0.5)
    chain = [step(0, 1)]
    chain.append(step(1, 1, chain[0]))
    assert run(chain, pace=pace).wall_s == pytest.approx(10 + (3.5 + 1) + (0.5 + 1) + 2)
    chain = [step(0, 1, need=Need(1, 1))]
    chain.append(step(1, 1, chain[0], need=Need(1, 1)))
    assert run(chain, nodes(gpus=1), pace=pace).wall_s == pytest.approx(10 + 2 * (3.5 + 1) + 2)


def test_tasks_that_read_share_the_bandwidths():
    """100 bytes each. Alone a task gets 100 bytes a second; a node 100, so the second task of it gets 50."""
    steps = [step(number, 0, reads=100) for number in range(2)]
    alone = Bandwidths(task=100)
    assert run(steps, bandwidths=alone).wall_s == 1
    assert run(steps, bandwidths=Bandwidths(task=100, node=100)).wall_s == 2
    assert run(steps, nodes(2, cpus=1), bandwidths=Bandwidths(task=100, node=100)).wall_s == 1
    assert run(steps, nodes(2, cpus=1), bandwidths=Bandwidths(task=100, node=100, storage=100)).wall_s == 2


def test_what_fits_no_node_is_an_error():
    with pytest.raises(ValueError, match="no node can give"):
        run([step(0, 1, need=Need(num_cpus=3))])


@st.composite
def graphs(draw):
    """Steps of any needs, each after some of those before it."""
    steps = []
    for number in range(draw(st.integers(1, 14))):
        need = draw(st.sampled_from([None, Need(1), Need(2), Need(1, 1), Need(1, 2), Need(1, 0, 60)]))
        after = draw(st.lists(st.sampled_from(steps), unique_by=lambda step: step.number, max_size=3)) if steps else []
        seconds, model = draw(st.integers(1, 9)), f"m{draw(st.integers(0, 2))}"
        steps.append(step(number, float(seconds), *after, model=model, need=need))
    return steps


@given(graphs(), st.sampled_from([1, 2, math.inf]), st.booleans())
def test_no_schedule_oversubscribes_or_starts_before_its_inputs_or_beats_the_bounds(steps, models, longest_first):
    schedule = run(steps, nodes(2, cpus=2, gpus=2), models_in_flight=models, longest_first=longest_first)
    found = {interval.step.key: interval for interval in schedule.intervals}
    assert found.keys() == {step.key for step in steps}
    for interval in schedule.intervals:
        assert interval.ended - interval.started == interval.step.seconds
        assert all(found[needed.key].ended <= interval.started for needed in interval.step.input_steps())
    for moment in {interval.started for interval in schedule.intervals}:
        running = [each for each in schedule.intervals if each.started <= moment < each.ended]
        assert sum(each.node is None for each in running) <= 1
        for node in {each.node for each in running} - {None}:
            needs = [each.step.need for each in running if each.node == node]
            assert sum(need.num_cpus for need in needs) <= 2
            assert sum(need.num_gpus for need in needs) <= 2
            assert sum(need.memory_bytes for need in needs) <= 100
    critical = max(remaining_seconds(steps, lambda step: step.seconds).values())
    assert max(critical, schedule.cpu_s / 4) <= schedule.wall_s <= sum(step.seconds for step in steps)
