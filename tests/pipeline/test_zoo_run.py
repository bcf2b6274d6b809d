"""Whole zoos on a real Ray node: what runs, what is not run again, what a broken model costs the others."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorc_core
from lorc_core.errors import ConfigError
from pipeline.registry.versions import connect
from pipeline.results import results
from pipeline.running.connection import connected
from pipeline.running.nodes import Nodes
from pipeline.steps.outcome import Listener
from pipeline.steps.step import Need
from pipeline.zoo.file import load_zoo
from pipeline.zoo_run import run_zoo
from tests.models import save_tiny_model
from tests.zoos import TABLES, Noted, statuses, write_zoo
from tests.zoos import rows as table_rows

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_every_step_ran_once(finished):
    _, _, run = finished
    assert statuses(run) == {
        ("decompose", "ran"): 8,  # five layers and three, each shared by three variants
        ("schedule", "ran"): 6,
        ("variant", "ran"): 6,
        ("projection_errors", "ran"): 6,
        ("windows", "ran"): 2,
        ("evaluate", "ran"): 8,
        ("register", "ran"): 6,
    }


def test_variants_equal_those_compressed_without_the_pipeline(finished):
    zoo_file, _, run = finished
    steps = run.models[0].variants[1]
    from_pipeline = lorc_core.load_variant(run.store.path(steps.variant))
    directly = lorc_core.compress(zoo_file.parent / "small-llama", "lorc", kept_fraction=0.1, schedule="uniform")
    assert from_pipeline.base == directly.base
    assert from_pipeline.ranks == directly.ranks
    for one, other in zip(from_pipeline.factors, directly.factors, strict=True):
        for mine, its in zip(one, other, strict=True):
            torch.testing.assert_close(mine.up, its.up, rtol=0, atol=1e-6)


def test_results_are_measured_and_paired(finished):
    zoo_file, _, run = finished
    rows = {(row.model, row.variant): row for row in results(run)}
    assert [row.variant for row in results(run)][:4] == [
        "baseline",
        "lorc-uniform-0.9",
        "lorc-uniform-0.1",
        "lorc-progressive-0.75",
    ]
    baseline, tenth = rows["small-llama", "baseline"], rows["small-llama", "lorc-uniform-0.1"]
    assert (baseline.bytes_per_token, tenth.bytes_per_token) == (5 * 256 * 4, 5 * 26 * 4)
    assert tenth.kept_fraction == 26 / 256
    assert tenth.loss_rise == pytest.approx(tenth.loss - baseline.loss)
    assert tenth.perplexity == pytest.approx(np.exp(tenth.loss))
    # the loss again, by transformers' own loss function on the variant loaded from its directory
    steps = run.models[0].variants[1]
    model = lorc_core.load(run.store.path(steps.variant), base=zoo_file.parent / "small-llama", dtype=torch.float32)
    windows = torch.from_numpy(np.load(run.store.path(run.models[0].windows[0]) / "windows.npy"))
    with torch.inference_mode():
        assert model(input_ids=windows, labels=windows).loss.item() == pytest.approx(tenth.loss, rel=1e-5)


def test_tables_open_in_one_query(finished):
    _, workdir, _ = finished
    scores = ds.dataset(workdir / "tables" / "scores").to_table().to_pandas()
    assert len(scores) == 8
    assert set(scores.columns) >= {"model", "variant", "text", "loss", "perplexity", "bytes_per_token"}
    spectra = ds.dataset(workdir / "tables" / "spectra").to_table().to_pandas()
    assert len(spectra) == 16
    losses = ds.dataset(workdir / "tables" / "window_losses").to_table().to_pandas()
    assert losses.groupby(["model", "variant"]).size().eq(8).all()
    ranks = ds.dataset(workdir / "tables" / "ranks").to_table().to_pandas()
    assert ranks[ranks.variant == "lorc-uniform-0.1"].floats.isin([13, 6]).all()
    errors = ds.dataset(workdir / "tables" / "projection_errors").to_table().to_pandas()
    assert (errors[errors.variant == "lorc-uniform-0.1"].bound > 0).all()
    assert errors.error.isna().all()  # nothing was calibrated
    outcomes = ds.dataset(workdir / "tables" / "outcomes").to_table().to_pandas()
    assert outcomes.status.eq("ran").all()
    assert outcomes.wall_s.gt(0).all()
    of_variants = outcomes[outcomes.step.str.match("schedule|variant|projection_errors|register")]
    labels = {"lorc-uniform-0.9", "lorc-uniform-0.1", "lorc-progressive-0.75"}
    assert set(of_variants.variant) == labels
    assert set(outcomes[outcomes.step.str.startswith("evaluate")].variant) == labels | {"baseline"}
    assert outcomes[outcomes.step.str.match("decompose|windows")].variant.isna().all()


def test_a_second_run_runs_nothing(finished):
    zoo_file, workdir, _ = finished
    assert {status for _, status in statuses(run_zoo(load_zoo(zoo_file), workdir))} == {"cached"}


def test_a_partial_run_keeps_what_the_rest_had_cost(finished):
    zoo_file, workdir, run = finished
    before = {outcome.key: outcome.cost for outcome in run.outcomes}
    redone = run.models[0].variants[0].projection_errors
    (run.store.path(redone) / "manifest.json").unlink()
    run_zoo(load_zoo(zoo_file), workdir)
    outcomes = ds.dataset(workdir / "tables" / "outcomes" / "tiny.parquet").to_table().to_pylist()
    assert [row["step"] for row in outcomes if row["status"] == "ran"] == [redone.key]
    assert {row["step"]: row["wall_s"] for row in outcomes if row["status"] == "cached"} == {
        key: cost.wall_s for key, cost in before.items() if key != redone.key
    }


def test_a_lost_candidate_is_chosen_again(finished):
    """As after a kill between the last step and the choice."""
    zoo_file, workdir, _ = finished
    client = connect(f"sqlite:///{workdir / 'mlflow.db'}")
    chosen = client.get_model_version_by_alias("small-llama", "candidate").version
    client.delete_registered_model_alias("small-llama", "candidate")
    (workdir / "candidates" / "tiny.json").unlink()
    assert {status for _, status in statuses(run_zoo(load_zoo(zoo_file), workdir))} == {"cached"}
    assert client.get_model_version_by_alias("small-llama", "candidate").version == chosen


def test_an_interrupted_registration_is_not_repeated(finished):
    zoo_file, workdir, run = finished
    client = connect(f"sqlite:///{workdir / 'mlflow.db'}")
    before = len(client.search_model_versions("name='small-llama'"))
    (run.store.path(run.models[0].variants[0].register) / "manifest.json").unlink()
    again = run_zoo(load_zoo(zoo_file), workdir)
    assert statuses(again)["register", "ran"] == 1
    assert len(client.search_model_versions("name='small-llama'")) == before


def test_a_read_aware_variant_beats_the_plain_one_at_equal_bytes(finished):
    """On the trained model, at a tenth of the cache, through the whole pipeline."""
    zoo_file, workdir, _ = finished
    extra = zoo_file.with_name("extra.yaml")
    entry = "variants:\n  - {method: lorc_q, schedule: energy, kept_fraction: 0.1}"
    extra.write_text(zoo_file.read_text().replace("variants:", entry, 1).replace("name: tiny\n", "name: extra\n"))
    run = run_zoo(load_zoo(extra), workdir, until="evaluate")
    assert statuses(run)["decompose", "ran"] == 8
    rows = {row.variant: row for row in results(run) if row.model == "small-llama"}
    aware, plain = rows["lorc_q-energy-0.1"], rows["lorc-uniform-0.1"]
    assert aware.bytes_per_token <= plain.bytes_per_token
    assert aware.loss_rise < 0.7 * plain.loss_rise


def test_windows_longer_than_the_model_are_refused(tmp_path):
    zoo_file = write_zoo(tmp_path)
    zoo_file.write_text(zoo_file.read_text().replace("window_tokens: 32", "window_tokens: 3000"))
    run = run_zoo(load_zoo(zoo_file), tmp_path / "work")
    assert [outcome.model for outcome in run.failures] == ["small-llama", "tiny-opt"]
    assert "evaluation.window_tokens is 3000, the model takes at most 2048" in run.failures[0].error


def test_an_address_without_a_cluster_is_a_wrong_request(tmp_path):
    zoo_file = write_zoo(tmp_path, kept="0.5")
    zoo_file.write_text(zoo_file.read_text() + "cluster: {address: '127.0.0.1:1'}\n")
    told = Noted()
    with pytest.raises(ConfigError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        run_zoo(load_zoo(zoo_file), tmp_path / "work", listener=told)
    assert told.phases == ["reading small-llama", "reading tiny-opt"]  # what takes a while and is no step is told


def test_a_process_that_is_connected_stays_so_and_asks_no_other_cluster(finished, ray_cluster):
    import ray

    assert ray.is_initialized()  # after the run of `finished`
    with connected(ray_cluster.address, Listener()):
        pass
    assert ray.is_initialized()
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with (
            pytest.raises(ConfigError, match=f"connected to the Ray cluster at .*, not to {address}"),
            connected(address, Listener()),
        ):
            pass


def test_a_changed_budget_decomposes_nothing_again(finished):
    zoo_file, workdir, _ = finished
    changed = zoo_file.with_name("changed.yaml")
    changed.write_text(
        zoo_file.read_text().replace("[0.9, 0.1]", "[0.9, 0.4]").replace("name: tiny\n", "name: changed\n")
    )
    found = statuses(run_zoo(load_zoo(changed), workdir, until="evaluate"))
    assert found == {
        ("decompose", "cached"): 8,
        ("windows", "cached"): 2,
        ("schedule", "cached"): 4,
        ("schedule", "ran"): 2,
        ("variant", "cached"): 4,
        ("variant", "ran"): 2,
        ("projection_errors", "cached"): 4,
        ("projection_errors", "ran"): 2,
        ("evaluate", "cached"): 6,
        ("evaluate", "ran"): 2,
    }


BROKEN_CODE = """
from transformers import LlamaForCausalLM

class Broken(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        raise IndexError("deep within")
"""


def break_nan(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def break_file(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def break_rank(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.model.layers[0].self_attn.k_proj.weight.data[1] = model.model.layers[0].self_attn.k_proj.weight.data[0]
    model.save_pretrained(directory)


def break_padding(directory):
    """torch refuses to build it, with an AssertionError that no one foresaw."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"pad_token_id": 5000}))


def break_vocabulary(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(500)
    model.save_pretrained(directory)


def break_tokenizer(directory):
    (directory / "tokenizer.json").write_text("[]")


def break_at_work(directory):
    """Its own code raises when it runs what no one foresaw."""
    (directory / "modeling_broken.py").write_text(BROKEN_CODE)
    config = json.loads((directory / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_broken.Broken"}
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))


BROKEN = (
    break_nan,
    break_file,
    break_rank,
    break_padding,
    break_vocabulary,
    break_tokenizer,
    break_at_work,
)


@pytest.fixture(scope="module")
def troubled(ray_cluster, tmp_path_factory):
    """The zoo of `finished` with seven broken models, one that is not there and one that asks for what no node has."""
    directory = tmp_path_factory.mktemp("troubled")
    zoo_file = write_zoo(directory)
    entries = ["  - {name: missing, source: ./tiny-otp}"]
    entries += ["  - {name: greedy, source: ./small-llama, resources: {num_gpus: 4}}"]
    for damage in BROKEN:
        damage(save_tiny_model("llama", directory / damage.__name__, seed=1))
        own_code = "true" if damage is break_at_work else "false"
        entry = f"name: {damage.__name__}, source: ./{damage.__name__}, dtype: float32, trust_remote_code: {own_code}"
        entries.append(f"  - {{{entry}}}")
    zoo_file.write_text(zoo_file.read_text().replace("models:", "\n".join(["models:", *entries]), 1))
    return zoo_file, run_zoo(load_zoo(zoo_file), directory / "work", until="evaluate")


def test_only_what_is_wrong_fails(troubled):
    _, run = troubled
    wrong = {"missing", "greedy", *(damage.__name__ for damage in BROKEN)}
    assert {outcome.model for outcome in run.failures} == wrong
    rows = [row for row in results(run) if row.model not in wrong]
    assert {row.model for row in rows} == {"small-llama", "tiny-opt"}
    assert len(rows) == 8


@pytest.mark.parametrize("table", TABLES)
def test_good_models_have_the_rows_of_a_zoo_without_trouble(troubled, finished, table):
    _, run = troubled
    good = [row for row in table_rows(run.store.root, table) if row["model"] in ("small-llama", "tiny-opt")]
    assert good == table_rows(finished[1], table)


@pytest.mark.parametrize(
    ("model", "message", "survivors"),
    [
        ("break_nan", "layer 2 values: the weight or its bias holds NaN", []),
        ("break_file", "not a whole safetensors file", []),
        ("break_tokenizer", "the tokenizer cannot be loaded", []),
        ("break_rank", "layer 0 keys: the weight is rank-deficient", ["lorc-uniform-0.9", "lorc-uniform-0.1"]),
        (
            "break_vocabulary",
            "in the texts stdlib, the model's vocabulary has ids below 500: it is not this model's tokenizer",
            [],
        ),
    ],
)
def test_a_broken_model_says_what_is_wrong_and_keeps_what_can_be_had(troubled, model, message, survivors):
    _, run = troubled
    assert any(message in outcome.error for outcome in run.failures if outcome.model == model)
    assert [row.variant for row in results(run) if row.model == model and row.variant != "baseline"] == survivors


@pytest.mark.parametrize(
    ("model", "steps", "message"),
    [
        ("break_padding", {("resolve", None)}, "AssertionError: Padding_idx must be within num_embeddings"),
        (
            "break_at_work",
            {
                ("evaluate", label)
                for label in ("baseline", "lorc-uniform-0.9", "lorc-uniform-0.1", "lorc-progressive-0.75")
            },
            "IndexError: deep within",
        ),
    ],
)
def test_what_no_one_foresaw_is_one_line_that_names_its_log(troubled, model, steps, message):
    """In this process, before anything runs, and in a worker."""
    _, run = troubled
    failed = [outcome for outcome in run.failures if outcome.model == model]
    assert {(outcome.name, outcome.variant) for outcome in failed} == steps
    for outcome in failed:
        log = run.store.log(outcome.key)
        assert outcome.error.startswith(message)
        assert outcome.error.endswith(f"(trace in {log})")
        assert "\n" not in outcome.error
        assert log.read_text().startswith("Traceback")
    scores = ds.dataset(run.store.root / "tables" / "scores").to_table().to_pandas()
    assert set(scores.model) >= {"small-llama", "tiny-opt"}


def test_a_missing_model_is_an_outcome(troubled):
    zoo_file, run = troubled
    (error,) = (outcome.error for outcome in run.failures if outcome.model == "missing")
    assert f"model directory {zoo_file.with_name('tiny-otp')} does not exist" in error


def test_registrations_without_mlflow_are_outcomes_and_tables_are_written(finished, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    zoo_file, workdir, _ = finished
    away = zoo_file.with_name("away.yaml")
    text = zoo_file.read_text().replace("name: tiny\n", "name: away\n")
    away.write_text(text + "registry: {tracking_uri: 'http://127.0.0.1:1'}\ncluster: {wait_s: 1}\n")
    told = Noted()
    run = run_zoo(load_zoo(away), workdir, listener=told)
    assert [line.partition(" (")[0] for line in told.notes] == ["MLflow does not answer"]
    assert {(outcome.name, outcome.model) for outcome in run.failures} == {
        ("register", "small-llama"),
        ("register", "tiny-opt"),
    }
    (told,) = {outcome.error for outcome in run.failures}  # one waited, the others were not tried
    assert told.endswith(f"(trace in {run.store.log(run.failures[0].key)})")
    assert len(results(run)) == 8
    for table in TABLES:
        assert table_rows(workdir, table, "away") == table_rows(workdir, table)


def test_a_request_that_no_node_can_meet_is_refused_before_submission(troubled):
    _, run = troubled
    failed = [outcome for outcome in run.failures if outcome.model == "greedy"]
    assert {outcome.name for outcome in failed} == {"evaluate"}
    assert "no node of the cluster can give CPU 1, GPU 4; its nodes have: CPU 2, GPU 0" in failed[0].error


def test_a_short_text_is_an_outcome_and_what_needs_it_is_skipped(finished):
    zoo_file, workdir, _ = finished
    short = zoo_file.with_name("short.yaml")
    short.write_text(
        zoo_file.read_text().replace("num_windows: 8", "num_windows: 80000").replace("name: tiny\n", "name: short\n")
    )
    run = run_zoo(load_zoo(short), workdir, until="evaluate")
    assert {outcome.name for outcome in run.failures} == {"windows"}
    assert all("80000 are asked; lower num_windows" in outcome.error for outcome in run.failures)
    assert {outcome.name for outcome in run.outcomes if outcome.status == "skipped"} == {"evaluate"}


@pytest.mark.slow
def test_a_killed_run_loses_no_finished_step(finished, tmp_path):
    zoo_file = write_zoo(tmp_path)
    workdir = tmp_path / "work"
    command = [sys.executable, "-m", "jobs.compress_zoo", str(zoo_file), "--workdir", str(workdir)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(workdir.glob("steps/evaluate-*/manifest.json")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.parent.name: path.stat().st_mtime_ns for path in workdir.glob("steps/*/manifest.json")}
    assert 0 < len(before) < 42
    run = run_zoo(load_zoo(zoo_file), workdir, until="evaluate")
    after = {path.parent.name: path.stat().st_mtime_ns for path in workdir.glob("steps/*/manifest.json")}
    assert not run.failures
    assert before.items() <= after.items()
    cached = {outcome.key for outcome in run.outcomes if outcome.status == "cached"}
    # a worker that outlived its driver for a moment may have finished one more
    assert {key for key in before if not key.startswith("register")} <= cached
    for table in TABLES:
        assert table_rows(workdir, table) == table_rows(finished[1], table)


def test_what_lacks_is_empty_for_what_fits():
    assert Nodes().lack(Need(num_cpus=2)) is None
    assert "CPU 3" in Nodes().lack(Need(num_cpus=3))


def test_registrations_hold_memory_and_accuracy(finished):
    _, workdir, run = finished
    client = connect(f"sqlite:///{workdir / 'mlflow.db'}")
    versions = client.search_model_versions("name='small-llama'")
    assert len(versions) == 3
    for version in versions:
        logged = client.get_run(version.run_id)
        parent = client.get_run(logged.data.tags["mlflow.parentRunId"])
        assert parent.data.metrics["bytes_per_token"] == 5120
        assert logged.data.metrics["recovery.stdlib"] == pytest.approx(
            parent.data.metrics["perplexity.stdlib"] / logged.data.metrics["perplexity.stdlib"]
        )
        assert float(version.tags["bytes_per_token"]) == logged.data.metrics["bytes_per_token"]
        assert version.tags["variant"].startswith("lorc-")
        assert json.loads(logged.data.tags["lorc.details"])["texts"] == ["stdlib"]
    candidate = client.get_model_version_by_alias("small-llama", "candidate")
    passing = [row for row in results(run) if row.model == "small-llama" and np.exp(row.loss_rise) <= 1.1][1:]
    assert candidate.tags["variant"] == min(passing, key=lambda row: row.bytes_per_token).variant


def test_a_registered_version_generates_text_through_mlflow(finished, monkeypatch):
    import mlflow

    _, workdir, _ = finished
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workdir / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model("models:/small-llama/1")
    texts = model.predict(["import os", "def f(x):"], params=None)
    assert len(texts) == 2
    assert all(isinstance(text, str) and text for text in texts)
