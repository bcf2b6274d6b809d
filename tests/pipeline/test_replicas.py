"""Evaluations in shares: joined, they are bit for bit what one task writes; told, they are the evaluation alone."""

import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from pipeline.running.replicas import Replicas, in_shares, spread
from pipeline.running.runner import Work
from pipeline.running.waiting import Batch, batches_of
from pipeline.running.work import run_group
from pipeline.status.watch import Watch
from pipeline.steps.graph import model_steps
from pipeline.steps.outcome import Listener, Outcome, Started
from pipeline.steps.scores import share_bounds
from pipeline.steps.shares import joining, shared
from pipeline.steps.step import Need, distinct
from pipeline.storage.store import Store
from pipeline.zoo.file import load_zoo
from pipeline.zoo.models import resolve
from pipeline.zoo.sections import Cluster
from tests.models import save_tiny_model
from tests.paths import DEMO

ZOO = """
name: shared
models: [{name: tiny, source: ./tiny, dtype: float32, resources: {num_gpus: 1}}]
variants: [{method: lorc_q, schedule: uniform, kept_fraction: [0.5, 0.25]}]
evaluation:
  texts: [{name: all, source: text.jsonl}, {name: half, source: text.jsonl, part: [0, 0.5]}]
  window_tokens: 32
  num_windows: 7
  batch_size: 2
"""


@pytest.fixture(scope="module")
def decomposed(tmp_path_factory):
    """A work directory with all that evaluations read, and the evaluations of a baseline and two variants."""
    directory = tmp_path_factory.mktemp("shared")
    save_tiny_model("llama", directory / "tiny")
    lines = (DEMO / "heldout.jsonl").read_text().splitlines()[:8]
    (directory / "text.jsonl").write_text("\n".join(lines))
    (directory / "zoo.yaml").write_text(ZOO)
    zoo, store = load_zoo(directory / "zoo.yaml"), Store(directory / "work")
    model = model_steps(zoo, resolve(zoo.models[0], store), "sqlite://")
    evaluations = [model.baseline, *(variant.evaluate for variant in model.variants)]
    run([step for step in distinct(evaluations) if step not in evaluations], store)
    return store, evaluations


@pytest.fixture
def work(decomposed, tmp_path):
    """A copy of the work directory."""
    return Store(shutil.copytree(decomposed[0].root, tmp_path / "work"))


def run(steps, store):
    """Group after group, in this process."""
    told = [told for batch in batches_of(steps) for told in run_group(batch.steps, store)]
    outcomes = [each for each in told if isinstance(each, Outcome)]
    assert not [outcome.error for outcome in outcomes if outcome.error]
    return outcomes


def results(store, step):
    """All that an evaluation wrote but the time it took."""
    tables = [pq.read_table(store.path(step) / f"{name}.parquet") for name in ("scores", "window_losses")]
    return [tables[0].drop_columns(["eval_s"]).to_pylist(), tables[1].to_pylist()]


@pytest.fixture(scope="module")
def alone(decomposed, tmp_path_factory):
    """What one task writes of each evaluation."""
    store = Store(shutil.copytree(decomposed[0].root, tmp_path_factory.mktemp("alone") / "work"))
    run(decomposed[1], store)
    return [results(store, step) for step in decomposed[1]]


@pytest.mark.parametrize("num_shares", [2, 3, 4])
def test_shares_joined_are_bit_for_bit_what_one_task_writes(decomposed, work, alone, num_shares):
    _, evaluations = decomposed
    before = {path.name for path in work.steps.iterdir()}
    run(in_shares(evaluations, num_shares), work)
    assert [results(work, step) for step in evaluations] == alone
    assert {path.name for path in work.steps.iterdir()} - before == {step.key for step in evaluations}
    assert {outcome.key for outcome in run(evaluations, work)} == {step.key for step in evaluations}
    assert alone[0] != alone[1] != alone[2], "the variants lose nothing"


def test_shares_in_another_order_are_not_the_same(decomposed, work, alone):
    """The control."""
    _, (baseline, *_) = decomposed
    shares = shared(baseline, 2)
    run([*shares, joining(baseline, shares[::-1])], work)
    assert results(work, baseline) != alone[0]


def test_a_joined_evaluation_costs_what_its_shares_did(decomposed, work):
    _, (baseline, *_) = decomposed
    *shares, joined = (outcome.cost for outcome in run(in_shares([baseline], 2), work))
    assert joined == work.cost(baseline)
    assert joined.wall_s > max(cost.wall_s for cost in shares)
    assert joined.cpu_s > sum(cost.cpu_s for cost in shares)
    assert (joined.host, joined.attempts) == (shares[0].host, 1)


def test_a_share_that_is_done_is_not_done_again(decomposed, work, alone):
    """As after a run that was stopped."""
    _, (baseline, *_) = decomposed
    first, second, join = in_shares([baseline], 2)
    run([first], work)
    manifest = work.path(first) / "manifest.json"
    written = manifest.stat().st_mtime_ns
    run([first, second], work)
    assert manifest.stat().st_mtime_ns == written
    run([join], work)
    assert results(work, baseline) == alone[0]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_shares_begin_and_end_with_batches_and_leave_out_no_window(batch_size):
    for num_windows in range(1, 20):
        num_batches = -(-num_windows // batch_size)
        for num_shares in range(1, num_batches + 1):
            bounds = [share_bounds(num_windows, batch_size, share, num_shares) for share in range(num_shares)]
            assert [first for first, _ in bounds] == [0, *(last for _, last in bounds[:-1])]
            assert bounds[-1][1] == num_windows
            assert all(first % batch_size == 0 and first < last for first, last in bounds)
            sizes = [-(-(last - first) // batch_size) for first, last in bounds]
            assert max(sizes) - min(sizes) <= 1


def names(steps):
    return [f"{step.name} {step.label}" for step in steps]


@pytest.mark.parametrize(
    ("free_gpus", "whole", "num_shares"),
    [
        (4, {"CPU": 8}, 4),
        (2.5, {"CPU": 8}, 2),
        (8, {"CPU": 8}, 4),  # no more than batches
        (8, {"CPU": 3}, 3),
        (1, {"CPU": 8}, 1),
        (0, {"CPU": 8}, 1),
        (-3, {"CPU": 8}, 1),
        (4, {"CPU": 8, "accelerator_type:H100": 1}, 4),
        (4, {"CPU": 8, "accelerator_type:H100": 1, "accelerator_type:L4": 1}, 1),
    ],
)
def test_an_evaluation_has_as_many_replicas_as_gpus_are_free(decomposed, free_gpus, whole, num_shares):
    _, evaluations = decomposed
    steps = spread([evaluations], free_gpus, whole)
    if num_shares == 1:
        assert steps == evaluations
        return
    groups = batches_of(steps)
    assert [len(group.steps) for group in groups].count(3) == num_shares
    assert len(groups) == num_shares + 3  # what joins each
    assert {step.group for step in steps if step.name == "evaluate_share"} == {
        f"evaluate tiny share {share} of {num_shares}" for share in range(num_shares)
    }


@pytest.mark.parametrize("need", [None, Need(), Need(num_gpus=0.5), Need(num_gpus=2)])
def test_what_does_not_take_one_gpu_is_not_spread(decomposed, need):
    steps = [replace(step, need=need) for step in decomposed[1]]
    assert spread([steps], 8, {"CPU": 8}) == steps


def test_evaluations_of_several_models_have_a_gpu_each_before_any_has_two(decomposed):
    _, evaluations = decomposed
    others = [[replace(step, model=model) for step in evaluations] for model in ("one", "two", "three")]
    assert [len(spread(others[:count], 4, {"CPU": 8})) // 3 for count in (1, 2, 3)] == [
        5,
        5,
        5,
    ]  # of shares 4, 3 + 1, 2 + 1 + 1
    assert spread([*others, evaluations], 4, {"CPU": 8}) == [step for steps in (*others, evaluations) for step in steps]


class Heard(Listener):
    def __init__(self):
        self.heard = []

    def start(self, started):
        self.heard.append(("start", started.key))

    def advance(self, reached):
        self.heard.append(("advance", reached.key, reached.done, reached.total))

    def record(self, outcome):
        self.heard.append(("record", outcome.key, outcome.name, outcome.status, outcome.error))


def begun(decomposed, store, listener):
    """A run's work with its only evaluation in two shares: the evaluation, its shares, and the work."""
    _, (whole, *_) = decomposed
    done = {step.key: Outcome.done(step, store, "cached") for step in whole.input_steps()}
    work = Work([whole], done, store, Cluster(), listener)
    (batch,) = work.waiting.take(list(work.waiting.ready))
    first, second, join = work.replicas.spread([batch.steps], 2, {"CPU": 2})
    work.waiting.add(Batch((join,)), work.outcomes)
    return whole, first, second, work


def ran(step, work):
    """What a worker tells of a step reaches the work."""
    for told in run_group([step], work.store):
        work.record(told)


def test_what_is_told_of_shares_is_told_of_the_evaluation(decomposed, work):
    told = Heard()
    whole, first, second, running = begun(decomposed, work, told)
    ran(second, running)
    assert not running.waiting.ready
    ran(first, running)
    (batch,) = running.waiting.take(list(running.waiting.ready))
    running.run_here(batch.steps)
    assert told.heard == [
        ("start", whole.key),
        ("advance", whole.key, 1, 2),
        ("advance", whole.key, 2, 2),
        ("record", whole.key, "evaluate", "ran", None),
    ]
    assert not running.waiting
    assert running.outcomes[whole.key].name == "evaluate"


def test_a_share_that_fails_is_the_failure_of_the_evaluation_and_its_trace_is_found(decomposed, work):
    watch = Watch("shared")
    whole, first, second, running = begun(decomposed, work, watch)
    watch.plan([whole])
    ran(first, running)
    assert watch.status().models["tiny"].stages["evaluate"].running == 1
    shutil.rmtree(work.steps / whole.windows[0].key)
    ran(second, running)
    assert not running.waiting
    (failure,) = watch.status().failures
    assert (failure.key, failure.step, failure.host) == (whole.key, "evaluate", running.outcomes[second.key].cost.host)
    assert work.log(whole.key).read_text().startswith("Traceback")
    assert running.outcomes[whole.key].status == "failed"
    assert work.is_done(first)
    assert not work.is_done(whole)


def test_what_is_no_share_is_told_as_it_is(decomposed):
    _, (baseline, *_) = decomposed
    for told in (Started("x", "host", 1.0), Outcome.failed(baseline, "no")):
        assert Replicas().told(told) is told
