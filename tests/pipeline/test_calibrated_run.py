"""Methods that measure on text, through the whole pipeline on a real Ray node: what is shared, refused and resumed."""

import json

import pyarrow.dataset as ds
import pytest
import torch

import lorc_core
from lorc_core.methods import METHODS
from pipeline.artifacts import load_moments
from pipeline.results import results
from pipeline.zoo import load_zoo
from pipeline.zoo_run import run_zoo
from tests.conftest import DEMO, save_tiny_model
from tests.pipeline.test_zoo_run import statuses

pytestmark = pytest.mark.usefixtures("ray_cluster")

ZOO = """
name: calibrated
models:
  - {{name: rotary, source: ./rotary, dtype: float32}}
  - {{name: plain, source: ./plain, dtype: float32}}
calibration:
  texts: [{{name: first, source: text.jsonl, part: [0, 0.5]}}]
  window_tokens: 32
  num_windows: 12
  probe_windows: 3
  shards: {shards}
variants:
{variants}
evaluation:
  texts: [{{name: rest, source: text.jsonl, part: [0.5, 1]}}]
  window_tokens: 32
  num_windows: 4
gates: {{max_perplexity_rise: 0.5}}
"""


def write(directory, *variants, shards=1):
    """A rotary model with four kv heads, one without rotation, and their text; returns the zoo file."""
    if not (directory / "text.jsonl").is_file():
        save_tiny_model("llama-mha", directory / "rotary")
        save_tiny_model("opt", directory / "plain")
        lines = (DEMO / "heldout.jsonl").read_text().splitlines()[:8]
        (directory / "text.jsonl").write_text("\n".join(lines))
    rows = "\n".join(f"  - {json.dumps(variant)}" for variant in variants)
    (directory / "zoo.yaml").write_text(ZOO.format(variants=rows, shards=shards))
    return directory / "zoo.yaml"


@pytest.fixture(scope="module")
def sweep(ray_cluster, tmp_path_factory):
    """Every preset that is not trained, at four budgets."""
    directory = tmp_path_factory.mktemp("sweep")
    presets = [name for name, method in METHODS.items() if method.training is None]
    entries = [{"method": name, "schedule": "uniform", "kept_fraction": [0.75, 0.6, 0.5, 0.4]} for name in presets]
    return presets, run_zoo(load_zoo(write(directory, *entries)), directory / "work", until="compress")


def test_a_sweep_of_ten_presets_and_four_budgets_decomposes_each_layer_once(sweep):
    presets, run = sweep
    assert len(presets) == 10
    counts = statuses(run)
    # three layers each; of the model without rotation, the two presets of rotated latents differ
    assert counts["calibrate", "ran"] == 2
    assert counts["decompose", "ran"] == 3 * 10 + 3 * 9
    assert counts["schedule", "ran"] == counts["variant", "ran"] == 4 * 10 + 4 * 9
    assert [(outcome.model, outcome.error) for outcome in run.failures] == [
        (
            "plain",
            f"phasor_freq-uniform-{kept}: method phasor_freq, keys: block frequency: the model has no rotary embedding",
        )
        for kept in (0.75, 0.6, 0.5, 0.4)
    ]


def test_errors_are_below_their_bounds_and_above_the_least(sweep):
    _, run = sweep
    errors = ds.dataset(run.store.root / "tables" / "errors").to_table().to_pandas()
    assert len(errors) == 2 * 3 * 4 * (10 + 9)
    bounded = errors[errors.bound.notna()]
    assert (bounded.error <= bounded.bound * (1 + 1e-6)).all()
    known = errors[errors.least_read_error.notna()]
    assert (known.read_error >= known.least_read_error * (1 - 1e-4) - 1e-6).all()
    best = known[known.variant.str.startswith("kq_joint")]
    assert (best.read_error <= best.least_read_error * (1 + 1e-3) + 1e-4).all()
    plain = known[known.variant.str.startswith("lorc-")]  # the control: it does not know its readers
    assert (plain.read_error > 1.05 * plain.least_read_error).any()


def test_shards_add_up_to_one(tmp_path):
    entry = {"method": "kq_joint", "schedule": "uniform", "kept_fraction": 0.5}
    moments = []
    for shards in (1, 3):
        run = run_zoo(load_zoo(write(tmp_path, entry, shards=shards)), tmp_path / "work", until="compress")
        steps = {step.key: step for step in run.models[0].decompose["kq_joint"][0].inputs["calibrated"]}
        assert len(steps) == shards
        moments.append(load_moments([run.store.path(step) for step in steps.values()], 1))
    for stage, whole in moments[0].moments.items():
        assert whole.num_tokens == moments[1].moments[stage].num_tokens
        torch.testing.assert_close(moments[1].moments[stage].total, whole.total, rtol=1e-5, atol=1e-4)


def test_schedules_that_measure_and_methods_by_layer_run_to_scores(tmp_path):
    mixed = {"name": "mixed", "preset": "kq_joint", "per_layer": {0: "palu", "1-2": {"name": "x", "preset": "k_svd"}}}
    entries = [
        {"method": "lorc_q", "schedule": "fisher", "kept_fraction": 0.5},
        {"method": "kq_joint", "schedule": "error_budget", "kept_fraction": 0.5},
        {"method": "kq_joint", "schedule": {"name": "sensitivity", "num_rounds": 1}, "kept_fraction": 0.5},
        {"method": mixed, "schedule": "uniform", "kept_fraction": 0.5},
        {
            "method": "kq_joint",
            "name": "bytes",
            "budget": {"memory_gib": 2e-4, "batch_size": 2, "context_tokens": 64},
        },
    ]
    run = run_zoo(load_zoo(write(tmp_path, *entries)), tmp_path / "work", until="evaluate")
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


def test_trained_projections_lose_less_and_train_once_for_all_budgets(tmp_path):
    training = {"num_steps": 30, "eval_every": 10, "batch_size": 4, "learning_rate": 0.01}
    entries = [
        {"method": {"name": "t", "preset": "kv_heads", "training": training}, "kept_fraction": [0.6, 0.4]},
        {"method": "kv_heads", "kept_fraction": 0.4},
    ]
    run = run_zoo(load_zoo(write(tmp_path, *entries)), tmp_path / "work", until="evaluate")
    assert not run.failures
    assert statuses(run)["train", "ran"] == 2
    assert not list((tmp_path / "work" / "training").glob("*/*"))  # no checkpoint is left
    rows = {(row.model, row.variant): row for row in results(run)}
    for model in ("rotary", "plain"):
        assert rows[model, "t-uniform-0.4"].bytes_per_token == rows[model, "kv_heads-uniform-0.4"].bytes_per_token


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_windows: 12", "num_windows: 1"), "32 calibration tokens cannot fill a block of 64 keys; at least 64"),
        (("dtype: float32}", "dtype: float32, resources: {memory_gib: 0.0001}}"), "schedule fisher runs the whole mod"),
        (("  window_tokens: 32", "  window_tokens: 4000"), "calibration.window_tokens is 4000, the model takes at mo"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(tmp_path, change, message):
    zoo_file = write(tmp_path, {"method": "kq_joint", "schedule": "fisher", "kept_fraction": 0.5})
    text = zoo_file.read_text().replace(*change, 1).replace("probe_windows: 3", "probe_windows: 1")
    zoo_file.write_text(text)
    run = run_zoo(load_zoo(zoo_file), tmp_path / "work", until="compress")
    failed = [outcome for outcome in run.failures if outcome.model == "rotary"]
    assert message in failed[0].error
    assert not [outcome for outcome in run.outcomes if outcome.model == "rotary" and outcome.status == "ran"]


def test_a_deficient_text_is_used_when_asked(tmp_path):
    zoo_file = write(tmp_path, {"method": "kq_joint", "schedule": "uniform", "kept_fraction": 0.5})
    text = zoo_file.read_text().replace("num_windows: 12", "num_windows: 1\n  allow_rank_deficient: true")
    zoo_file.write_text(text.replace("probe_windows: 3", "probe_windows: 1"))
    run = run_zoo(load_zoo(zoo_file), tmp_path / "work", until="evaluate")
    assert not run.failures
    assert all(torch.isfinite(torch.tensor(row.loss)) for row in results(run))


def test_a_nan_in_the_activations_names_the_layer(tmp_path):
    from safetensors.torch import load_file, save_file

    zoo_file = write(tmp_path, {"method": "kq_joint", "schedule": "uniform", "kept_fraction": 0.5})
    weights = tmp_path / "rotary" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    run = run_zoo(load_zoo(zoo_file), tmp_path / "work", until="compress")
    assert [(outcome.model, outcome.name) for outcome in run.failures] == [("rotary", "calibrate")]
    assert "layer 2: the keys hold NaN or infinity on the calibration text" in run.failures[0].error
