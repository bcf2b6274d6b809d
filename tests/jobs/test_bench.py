"""The benchmarks on small models: what they print and what they refuse; the figures themselves are nothing to test."""

import json
import re

import pytest
import torch

from jobs.bench import calibrate as bench_calibrate
from jobs.bench import scores as bench_scores
from jobs.bench.capacity import Capacity, largest
from jobs.bench.models import Subject, bench_model
from jobs.bench.svd import accuracy_table, relative_error, weight_of_condition
from jobs.bench.zoos import checkpoints
from jobs.bench.zoos import plan as bench_plan
from jobs.bench.zoos import units as bench_units
from jobs.bench.zoos.timed_run import StepTime, TimedRun
from lorc_core.model.stored.integrity import check_model
from pipeline.costs.units import default_units
from pipeline.simulation.forecast import forecast
from pipeline.zoo.file import load_zoo
from pipeline.zoo.sections import Resources
from tests.large_zoo import SHAPES, write_large_zoo
from tests.models import save_tiny_model


def test_bench_matrices_have_their_condition_and_errors_are_relative():
    weight = weight_of_condition(24, 64, 1e4)
    spectrum = torch.linalg.svdvals(weight)
    assert (spectrum[0] / spectrum[-1]).item() == pytest.approx(1e4, rel=1e-9)
    assert relative_error(spectrum * (1 + 1e-6), spectrum) == pytest.approx(1e-6, rel=1e-6)
    assert len(accuracy_table(16, 32).rows) == 6


def test_a_checkpoint_with_holes_is_whole_and_takes_no_more_of_the_disk_than_keys_and_values(tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoints.LLAMA_70B, "intermediate_size", 4096)
    monkeypatch.setitem(checkpoints.LLAMA_70B, "hidden_size", 1024)
    monkeypatch.setitem(checkpoints.LLAMA_70B, "num_attention_heads", 8)
    num_bytes = checkpoints.save_with_holes(tmp_path / "model", 2)
    assert num_bytes == 2 * 2 * 1024 * 1024 * 2  # layers, kinds, a square, bfloat16
    checkpoint = check_model(tmp_path / "model")
    read = {name: checkpoint.read(f"layers.1.self_attn.{name}_proj.weight").float() for name in ("q", "k", "v")}
    assert [tensor.abs().max() > 0 for tensor in read.values()] == [False, True, True]
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 20 * num_bytes
    assert sum(file.stat().st_blocks * 512 for file in files) < 1.1 * num_bytes


def test_bench_calibrate_prints_ratios(lorc, monkeypatch):
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    monkeypatch.setattr(bench_calibrate, "SHAPE", small | {"num_attention_heads": 4})
    monkeypatch.setattr(bench_calibrate, "NUM_KV_HEADS", (2, 4))
    monkeypatch.setattr(bench_calibrate, "SEQUENCE_TOKENS", 64)
    monkeypatch.setattr(bench_calibrate, "peak_in_new_process", bench_calibrate.peak_bytes)
    code, out, _ = lorc("bench", "calibrate")
    assert code == 0
    assert "times, float32" in out
    assert "1,024" in out


def test_bench_decode_measures_every_cache_and_draws(lorc, tmp_path):
    """Half of the floats, but for the blocks that a cache which grows has to spare."""
    plot = tmp_path / "decode.png"
    options = ("--model", save_tiny_model("llama", tmp_path / "model"), "--tokens", 2, "--prefill", 8, "--plot", plot)
    code, out, _ = lorc("bench", "decode", *options, "--context", 60, "--context", 500)
    assert code == 0
    settings = re.findall(r"(static|growing) cache, (\d+) tokens, 1 row", out)
    assert settings == [(cache, context) for cache in ("static", "growing") for context in ("60", "500")]
    variants = "untouched", "kq_svd", "phasor_freq", "kq_joint", "lorc"
    rows = [line.split() for line in out.splitlines() if line.startswith(variants)]
    assert len(rows) == 2 * 2 * 5
    for row in rows:
        assert float(row[-1]) == (1.0 if row[0] == "untouched" else 0.5)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bench_decode_measures_a_variant_on_its_model(lorc, variant_dir, tmp_path):
    base = json.loads((variant_dir / "lorc_config.json").read_text())["base"]["source"]
    options = ("--variant", variant_dir, "--context", 40, "--tokens", 2, "--prefill", 8, "--cache", "static")
    code, out, _ = lorc("bench", "decode", "--model", base, *options)
    assert (code, out.count("lorc 0.50")) == (0, 1)
    code, _, err = lorc("bench", "decode", *options)
    assert (code, err) == (2, "error: a variant is measured on its base model; name its directory with --model\n")


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("--shape", "llama-3", "small, llama-3-8b"),
        ("--cache", "paged", "static, growing"),
        ("--dtype", "int8", "float32, bfloat16, float16"),
    ],
)
def test_bench_decode_names_what_it_knows(lorc, option, value, known):
    code, _, err = lorc("bench", "decode", option, value)
    assert code == 2
    assert f"{option[2:]} {value!r} is not known; known are {known}" in err


def test_bench_model_takes_the_sizes_that_are_named():
    config = bench_model(Subject(num_layers=1, intermediate_size=16)).config
    assert (config.num_hidden_layers, config.intermediate_size, config.hidden_size) == (1, 16, 2048)


def test_bench_decode_does_not_change_a_model_in_a_directory(lorc, tmp_path):
    code, _, err = lorc("bench", "decode", "--model", tmp_path, "--mlp", 16)
    assert (code, err) == (2, "error: --layers and --mlp change a named shape; a model in a directory has its own\n")


@pytest.mark.parametrize("most", [0, 1, 2, 3, 63, 64, 65, 1000])
def test_largest_batch_is_the_last_that_fits_found_in_few_trials(most):
    tried = []

    def decodes(batch_size):
        tried.append(batch_size)
        return Capacity("untouched", batch_size, 0.1, 1, 1) if batch_size <= most else None

    best = largest(decodes)
    assert (best.batch_size if best else 0) == most
    assert len(tried) == len(set(tried)) <= 2 * most.bit_length() + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to fill")
def test_bench_capacity_needs_a_gpu(lorc):
    code, _, err = lorc("bench", "capacity")
    assert (code, err) == (2, "error: bench capacity fills a GPU's memory, and there is none here; see bench decode\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernel on")
def test_bench_scores_measures_interpolation_on_a_cpu(lorc, monkeypatch):
    monkeypatch.setattr(bench_scores, "HEADS", ((4, 2), (2, 2)))
    monkeypatch.setattr(bench_scores, "ROUNDS", 1)
    code, out, _ = lorc("bench", "scores", "--context", 600)
    rows = [line.split() for line in out.splitlines() if "interpolated" in line]
    assert code == 0
    settings = [(heads, base) for heads in ("4 / 2", "2 / 2") for base in ("10000", "500000")]
    assert [(" ".join(row[1:4]), row[4]) for row in rows] == settings


def timed(name, model, seconds, variant=None, started=0.0):
    return StepTime(f"{name}-{model}", name, model, variant, started, seconds, seconds, started + seconds)


def tiny_steps():
    """What `lorc bench units` runs, as it would take with 0.2 s a step, 0.01 s a layer, 2 s of imports, 0.5 s of load."""
    seconds = {model: 0.2 + 0.01 * depth for model, depth in bench_units.DEPTHS.items()}
    steps = [timed("variant", "first", 2 + seconds["first"])]
    steps += [timed("variant", model, seconds[model], "x", 10 + place) for place, model in enumerate(seconds)]
    for place, model in enumerate(seconds):
        imports = 2 if model == "first" else 0
        steps.append(timed("evaluate", model, seconds[model] + 0.5 + imports, "baseline", 20 + 2 * place))
        steps.append(timed("evaluate", model, seconds[model], "x", 21 + 2 * place))
    return steps


def test_bench_units_tells_imports_loads_steps_and_layers_apart():
    run = TimedRun(tuple(tiny_steps()), 40)
    load_s = bench_units.model_load_s(run)
    assert load_s == pytest.approx(0.5)
    for kind, fixed in bench_units.fixed_costs(run, load_s).items():
        assert fixed.model_dump() == pytest.approx({"first_s": 2, "step_s": 0.2, "layer_s": 0.01}), kind


def test_bench_units_rates_are_operations_over_seconds(monkeypatch):
    monkeypatch.setattr(bench_units, "best_cpu_seconds_of", lambda work, repeats: work() is None or 2.0)
    rates = bench_units.algebra_rates((8, 16))
    assert rates["eigh"] == {8: 8**3 / 2, 16: 16**3 / 2}
    assert rates["product"] == {8: 8**3 * 8 / 2, 16: 16**3 * 8 / 2}


def test_bench_plan_compares_each_kind_of_step_and_the_schedule(tmp_path):
    """A run of which everything took twice as long as simulated."""
    zoo = load_zoo(write_large_zoo(tmp_path, copies=1, shapes={"1b": SHAPES["1b"]}))
    entry = zoo.models[0].model_copy(update={"resources": Resources()})
    cluster = bench_plan.this_machine(default_units())
    schedule = forecast(zoo.model_copy(update={"models": (entry,)}), cluster).schedule
    steps = [
        timed(interval.step.name, interval.step.model, 2 * interval.seconds, interval.step.label)
        for interval in schedule.intervals
    ]
    run = TimedRun(tuple(steps), 2 * schedule.wall_s)
    rows = {row.name.plain: [cell.plain for cell in row.cells] for row in bench_plan.comparison(schedule, run).rows}
    assert {name: cells[-1] for name, cells in rows.items()} == dict.fromkeys(rows, "0.50")
    assert {"decompose", "evaluate", "all steps", "whole run"} <= rows.keys()
    assert bench_plan.rescheduled(schedule, cluster, run) > schedule.wall_s
