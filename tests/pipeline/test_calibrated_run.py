"""Methods that measure on text, through the whole pipeline on a real Ray node: what is shared, refused and resumed."""

import contextlib
import json
import math
from collections import Counter

import psutil
import pyarrow.dataset as ds
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorc_core
from lorc_core.methods import METHODS
from pipeline.results import results
from pipeline.steps.outcome import Listener
from pipeline.steps.step import distinct
from pipeline.storage.artifacts import load_moments, load_windows
from pipeline.storage.tables import read_rows
from pipeline.waiting import Patience
from pipeline.zoo.file import load_zoo
from pipeline.zoo_run import plan_steps, run_zoo, wanted_steps
from tests.models import save_tiny_model
from tests.zoos import CALIBRATED_ZOO, statuses, write_calibrated_zoo

pytestmark = pytest.mark.usefixtures("ray_cluster")

BUDGETS = (0.6, 0.4)
TRAINING = {"num_steps": 18, "eval_every": 6, "batch_size": 4, "learning_rate": 0.01}
MEASURED = (
    {"method": "lorc_q", "schedule": "fisher", "kept_fraction": 0.5},
    {"method": "kq_joint", "schedule": "error_budget", "kept_fraction": 0.5},
    {"method": "kq_joint", "schedule": {"name": "sensitivity", "num_rounds": 1}, "kept_fraction": 0.5},
    {
        "method": {
            "name": "mixed",
            "preset": "kq_joint",
            "per_layer": {0: "palu", "1-2": {"name": "x", "preset": "k_svd"}},
        },
        "schedule": "uniform",
        "kept_fraction": 0.5,
    },
    {"method": "kq_joint", "name": "bytes", "budget": {"memory_gib": 2e-4, "batch_size": 2, "context_tokens": 64}},
    {"method": "fisher", "kept_fraction": 0.5},
    {"method": {"name": "trained", "preset": "kv_heads", "training": TRAINING}, "kept_fraction": list(BUDGETS)},
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Shared by the runs below, so that they find what others of the same recipe have finished."""
    return tmp_path_factory.mktemp("calibrated")


@pytest.fixture(scope="module")
def sweep(ray_cluster, directory):
    """Every preset that is not trained, at several budgets."""
    presets = [name for name, method in METHODS.items() if method.training is None]
    entries = [{"method": name, "schedule": "uniform", "kept_fraction": list(BUDGETS)} for name in presets]
    return presets, run_zoo(load_zoo(write_calibrated_zoo(directory, *entries)), directory / "work", until="compress")


@pytest.fixture(scope="module")
def measured(sweep, directory):
    """Schedules that measure, methods by layer, a budget in bytes and trained projections; three calibration shards."""
    zoo_file = write_calibrated_zoo(directory, *MEASURED, shards=3)
    return zoo_file, run_zoo(load_zoo(zoo_file), directory / "work", until="evaluate")


@pytest.fixture(scope="module")
def deficient(ray_cluster, tmp_path_factory):
    """One calibration window is too little for a model's full rank, and one of three models gives NaN."""
    directory = tmp_path_factory.mktemp("deficient")
    zoo_file = write_calibrated_zoo(directory, {"method": "kq_joint", "schedule": "uniform", "kept_fraction": 0.5})
    weights = save_tiny_model("llama", directory / "broken") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    text = zoo_file.read_text().replace("models:", "models:\n  - {name: broken, source: ./broken, dtype: float32}")
    text = text.replace("num_windows: 12", "num_windows: 1\n  allow_rank_deficient: true")
    zoo_file.write_text(text.replace("probe_windows: 3", "probe_windows: 1"))
    return run_zoo(load_zoo(zoo_file), directory / "work", until="evaluate")


def test_a_sweep_of_eleven_presets_over_budgets_decomposes_each_layer_once(sweep):
    presets, run = sweep
    assert len(presets) == 11
    counts = statuses(run)
    # three layers each; of the model without rotation, the two presets of rotated latents differ
    assert counts["calibrate", "ran"] == counts["gradients", "ran"] == 2
    assert counts["decompose", "ran"] == 3 * 11 + 3 * 10
    assert counts["schedule", "ran"] == counts["variant", "ran"] == len(BUDGETS) * (11 + 10)
    assert [(outcome.model, outcome.variant, outcome.error) for outcome in run.failures] == [
        (
            "plain",
            f"phasor_freq-uniform-{kept}",
            "method phasor_freq, keys: block frequency: the model has no rotary embedding",
        )
        for kept in BUDGETS
    ]


def test_four_budgets_ask_for_the_same_decompositions_and_calibration(sweep, directory):
    presets, run = sweep
    entries = [{"method": name, "schedule": "uniform", "kept_fraction": [0.75, 0.6, 0.5, 0.4]} for name in presets]
    rows = "\n".join(f"  - {json.dumps(entry)}" for entry in entries)
    (directory / "four.yaml").write_text(CALIBRATED_ZOO.format(variants=rows, shards=1))
    models, _ = plan_steps(load_zoo(directory / "four.yaml"), run.store, Listener(), Patience(0))
    steps = distinct(wanted_steps(models, "compress"))
    done = Counter((step.name, run.store.is_done(step)) for step in steps)
    assert (done["decompose", True], done["decompose", False]) == (3 * 11 + 3 * 10, 0)
    assert (done["calibrate", True], done["calibrate", False]) == (2, 0)
    assert (done["variant", True], done["variant", False]) == (2 * (11 + 10), 2 * (11 + 10))


def test_errors_are_below_their_bounds_and_above_the_least(sweep):
    _, run = sweep
    errors = ds.dataset(run.store.root / "tables" / "projection_errors").to_table().to_pandas()
    assert len(errors) == 2 * 3 * len(BUDGETS) * (11 + 10)
    bounded = errors[errors.bound.notna()]
    assert (bounded.error <= bounded.bound * (1 + 1e-6)).all()
    known = errors[errors.least_read_error.notna()]
    assert (known.read_error >= known.least_read_error * (1 - 1e-4) - 1e-6).all()
    best = known[known.variant.str.startswith("kq_joint")]
    assert (best.read_error <= best.least_read_error * (1 + 1e-3) + 1e-4).all()
    plain = known[known.variant.str.startswith("lorc-")]  # the control: it does not know its readers
    assert (plain.read_error > 1.05 * plain.least_read_error).any()


def test_shards_add_up_to_one(sweep, measured):
    for measures in ("calibrated", "gradients"):
        moments = []
        for run, shards in ((sweep[1], 1), (measured[1], 3)):
            steps = getattr(run.models[0].decompose["fisher"][0], measures)
            assert len({step.key for step in steps}) == shards
            moments.append(load_moments([run.store.path(step) for step in steps], 1))
        for stage, whole in moments[0].moments.items():
            assert whole.num_tokens == moments[1].moments[stage].num_tokens
            torch.testing.assert_close(moments[1].moments[stage].total, whole.total, rtol=1e-5, atol=1e-4)


def test_the_predicted_rise_is_kept_with_ranks_and_variant_where_readers_are_gradients(measured):
    """And it is that of the same projections made in one process."""
    _, run = measured
    for model in run.models:
        for one in model.variants:
            ranks, variant = run.store.path(one.schedule), lorc_core.load_variant(run.store.path(one.variant))
            told = {row["predicted_rise"] for row in read_rows(ranks, "ranks")}
            assert told == {variant.ranks.predicted_rise}
            assert (variant.ranks.predicted_rise is not None) == (one.method == "fisher")
    step = next(one for one in run.models[0].variants if one.method == "fisher")
    variant, windows = lorc_core.load_variant(run.store.path(step.variant)), run.store.paths(run_windows(step))
    base = AutoModelForCausalLM.from_pretrained(variant.base.source).eval()
    alone = lorc_core.compress(base, "fisher", 0.5, calibration=torch.from_numpy(load_windows(windows)))
    assert alone.ranks.layers == variant.ranks.layers
    assert alone.ranks.predicted_rise == pytest.approx(variant.ranks.predicted_rise, rel=1e-4)


def run_windows(step):
    return step.variant.layers[0].gradients[0].windows


def test_schedules_that_measure_and_methods_by_layer_run_to_scores(measured):
    _, run = measured
    assert not run.failures
    counts = statuses(run)
    assert (counts["probe", "ran"], counts["search", "ran"]) == (6, 2)
    rows = {(row.model, row.variant): row for row in results(run)}
    for model in ("rotary", "plain"):
        assert rows[model, "kq_joint-error_budget-0.5"].note.startswith("epsilon ")
        assert rows[model, "mixed-uniform-0.5"].kept_fraction == pytest.approx(0.5, abs=0.01)
        held = rows[model, "bytes-0.0002GiB"]
        assert 0.9 * 2e-4 * 2**30 < held.bytes_per_token * 128 + held.factor_bytes <= 2e-4 * 2**30
    variant = lorc_core.load_variant(run.store.path(run.models[0].variants[3].variant))
    assert [variant.method.axes(layer, "keys").block for layer in range(3)] == ["group(4)", "head", "head"]


def test_training_runs_once_for_all_budgets_and_leaves_no_checkpoint(measured, directory):
    _, run = measured
    assert statuses(run)["train", "ran"] == 2
    assert not list((directory / "work" / "training").glob("*/*"))


def test_training_whose_worker_is_killed_goes_on_to_the_same_bases(measured, directory, ray_cluster):
    """At the first milestone; the training of one model is taken out of the finished run and done again."""
    zoo_file, run = measured
    step = run.models[0].variants[-1].variant.trained
    whole = directory / "whole"
    run.store.path(step).rename(whole)
    killer = Killer(ray_cluster)
    again = run_zoo(load_zoo(zoo_file), directory / "work", until="evaluate", listener=killer)
    assert killer.killed
    assert not again.failures
    assert {outcome.key for outcome in again.outcomes if outcome.status == "ran"} == {step.key}
    looks, later = ([row["step"] for row in read_rows(place, "training")] for place in (whole, run.store.path(step)))
    assert 0 < len(later) < len(looks), "training must go on from its checkpoint, not begin again"
    assert later == looks[-len(later) :]
    expected = load_file(whole / "bases.safetensors")
    for name, rotation in load_file(run.store.path(step) / "bases.safetensors").items():
        torch.testing.assert_close(rotation, expected[name], rtol=0, atol=1e-5)


class Killer(Listener):
    """Kills the worker that tells the first milestone."""

    def __init__(self, node):
        self.node, self.killed = node, None

    def advance(self, reached):
        if self.killed is None:
            self.killed = worker_at_work(self.node)
            self.killed.kill()


def worker_at_work(node):
    """The only worker of the test's own Ray node that is running a task."""
    raylet = psutil.Process(node.head_node.all_processes["raylet"][0].process.pid)
    found = []
    for process in raylet.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # an idle worker may end meanwhile
            found += [process] if process.cmdline()[:1] == ["ray::remote_group"] else []
    (worker,) = found
    return worker


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_windows: 12", "num_windows: 1"), "32 calibration tokens cannot fill a block of 64 keys; at least 64"),
        (("dtype: float32}", "dtype: float32, resources: {memory_gib: 0.0001}}"), "schedule fisher runs the whole mod"),
        (("  window_tokens: 32", "  window_tokens: 4000"), "calibration.window_tokens is 4000, the model takes at mo"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(tmp_path, change, message):
    zoo_file = write_calibrated_zoo(tmp_path, {"method": "kq_joint", "schedule": "fisher", "kept_fraction": 0.5})
    text = zoo_file.read_text().replace(*change, 1).replace("probe_windows: 3", "probe_windows: 1")
    zoo_file.write_text(text.replace("  - {name: plain, source: ./plain, dtype: float32}\n", ""))
    run = run_zoo(load_zoo(zoo_file), tmp_path / "work", until="compress")
    failed = [outcome for outcome in run.failures if outcome.model == "rotary"]
    assert message in failed[0].error
    assert not [outcome for outcome in run.outcomes if outcome.model == "rotary" and outcome.status == "ran"]


def test_a_deficient_text_is_used_when_asked(deficient):
    found = {(row.model, row.variant): row.loss for row in results(deficient) if row.variant != "baseline"}
    assert set(found) == {("rotary", "kq_joint-uniform-0.5"), ("plain", "kq_joint-uniform-0.5")}
    assert all(math.isfinite(loss) for loss in found.values())


def test_a_nan_in_the_activations_names_the_layer(deficient):
    failed = {outcome.name: outcome for outcome in deficient.failures}
    assert {outcome.model for outcome in deficient.failures} == {"broken"}
    assert "layer 2: the keys hold NaN or infinity on the calibration text" in failed["calibrate"].error
