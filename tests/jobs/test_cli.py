"""The `lorc` command as its users see it: what it prints, where, and its exit codes."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from jobs.cli import main
from lorc_core.compression import compress
from lorc_core.manifest import write_manifest
from lorc_core.methods import METHODS
from pipeline.registry.versions import VARIANT_PATH, connect, find_version
from tests.models import save_tiny_model, tiny_model
from tests.paths import REPOSITORY
from tests.zoos import write_calibrated_zoo, write_zoo


@pytest.fixture
def registry(finished):
    _, workdir, _ = finished
    return connect(f"sqlite:///{workdir / 'mlflow.db'}")


def version_of(client, name, label):
    return next(v for v in client.search_model_versions(f"name='{name}'") if v.tags["variant"] == label)


def test_run_again_prints_the_table_and_runs_nothing(finished, lorc):
    zoo_file, workdir, _ = finished
    code, out, _ = lorc("run", zoo_file, "--workdir", workdir)
    assert code == 0
    assert "0 steps ran, 42 were done before" in out
    for text in ("small-llama", "tiny-opt", "baseline", "lorc-uniform-0.1", "lorc-progressive-0.75", "B/token"):
        assert text in out


def test_the_table_says_which_variants_passed_and_which_became_the_candidate(finished, registry, lorc, monkeypatch):
    zoo_file, workdir, _ = finished
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = lorc("run", zoo_file, "--workdir", workdir)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    of_llama = out.split("small-llama\n", 1)[1].split("\n\n", 1)[0]
    verdicts = {row.split()[0]: row.split()[-2] for row in of_llama.splitlines() if "lorc-" in row}
    assert verdicts["lorc-uniform-0.1"] == "failed"
    assert sorted(verdicts.values()) == ["candidate", "failed", "passed"]
    chosen = next(label for label, verdict in verdicts.items() if verdict == "candidate")
    candidate = registry.get_model_version_by_alias("small-llama", "candidate")
    assert candidate.tags["variant"] == chosen
    assert f"candidates: small-llama/{candidate.version}, " in out


def test_promote_accepts_one_and_refuses_another_with_reasons(finished, registry, lorc):
    _, workdir, _ = finished
    best = version_of(registry, "small-llama", "lorc-uniform-0.9")
    worst = version_of(registry, "small-llama", "lorc-uniform-0.1")
    code, out, _ = lorc("promote", f"small-llama/{best.version}", "--workdir", workdir)
    assert code == 0
    assert f"promoted small-llama version {best.version} (lorc-uniform-0.9) to small-llama@champion" in out
    code, out, _ = lorc("promote", f"small-llama/{worst.version}", "--workdir", workdir)
    assert code == 1
    assert f"refused small-llama version {worst.version} (lorc-uniform-0.1):" in out
    assert "allowed is 10.00%" in out
    assert registry.get_model_version_by_alias("small-llama", "champion").version == best.version
    assert "stdlib: perplexity rose by" in registry.get_model_version("small-llama", worst.version).tags["lorc.refused"]
    lenient = workdir.parent / "lenient.yaml"
    lenient.write_text((workdir.parent / "zoo.yaml").read_text().replace("rise: 0.1", "rise: 1000"))
    code, _, _ = lorc(
        "promote", f"small-llama/{worst.version}", "--to", "trial", "--zoo", lenient, "--workdir", workdir
    )
    assert code == 0
    assert registry.get_model_version_by_alias("small-llama", "trial").version == worst.version


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("small-lama", "no registered model 'small-lama'; registered are small-llama, tiny-opt"),
        ("small-llama/99", "no version small-llama/99; small-llama has the versions small-llama/1 to small-llama/3"),
        ("small-llama@winner", "no version small-llama@winner"),
    ],
)
def test_promote_names_what_there_is(finished, lorc, reference, message):
    code, _, err = lorc("promote", reference, "--workdir", finished[1])
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_regress_passes_then_sees_a_fall_then_an_altered_file(finished, registry, lorc):
    _, workdir, _ = finished
    assert lorc("promote", "small-llama", "--workdir", workdir)[0] == 0
    code, out, _ = lorc("regress", "small-llama", "--workdir", workdir)
    assert code == 0
    assert "passed" in out

    champion = find_version(registry, "small-llama@champion", "champion")
    registered = Path(unquote(urlparse(registry.get_run(champion.run_id).info.artifact_uri).path)) / VARIANT_PATH
    keep = workdir / "keep"
    shutil.copytree(registered, keep)
    worse_factors(registered)
    write_manifest(registered)
    code, out, _ = lorc("regress", "small-llama", "--workdir", workdir)
    assert code == 1, out
    assert "fell" in out
    assert registry.get_model_version("small-llama", champion.version).tags["lorc.regression"].startswith("fell")

    worse_factors(registered, seed=1)
    code, out, _ = lorc("regress", "small-llama", "--workdir", workdir)
    assert code == 1
    assert "factors.safetensors:alteredafteritwaswritten" in "".join(out.split())  # the line is broken anywhere

    shutil.rmtree(registered)
    code, out, _ = lorc("regress", "small-llama", "--workdir", workdir)
    assert code == 1
    assert "its files cannot be fetched" in " ".join(out.split())

    shutil.copytree(keep, registered)
    assert lorc("regress", "small-llama", "--workdir", workdir)[0] == 0
    assert not list(workdir.glob("steps/.registry-*"))


def worse_factors(directory, seed=0):
    """Random orthonormal factors of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.linalg.qr(torch.randn(value.shape, generator=generator))[0].contiguous()
        for name, value in load_file(directory / "factors.safetensors").items()
    }
    save_file(tensors, directory / "factors.safetensors")


def test_regress_without_a_champion_is_a_wrong_request(tmp_path, ray_cluster, lorc):
    code, _, err = lorc("regress", "--workdir", tmp_path)
    assert code == 2
    assert "no registered model has a champion" in err


def test_generate_continues_a_prompt_from_the_registry_and_from_a_directory(finished, registry, lorc):
    _, workdir, run = finished
    for reference in ("small-llama/1", run.store.path(run.models[0].variants[0].variant)):
        code, out, _ = lorc("generate", reference, "import os", "--max-new-tokens", 5, "--workdir", workdir)
        assert code == 0
        assert out.startswith("import os")
        assert len(out) > len("import os\n")


def test_generate_tells_a_directory_that_is_no_variant(finished, lorc, tmp_path):
    code, _, err = lorc("generate", tmp_path, "x", "--workdir", finished[1])
    assert code == 2
    assert "a directory without lorc_config.json is no variant" in err


def test_generate_names_a_path_that_is_not_there(lorc, tmp_path):
    code, _, err = lorc("generate", tmp_path / "nowhere", "x", "--workdir", tmp_path)
    assert code == 2
    assert err == f"error: variant directory {tmp_path / 'nowhere'} does not exist\n"


def test_generate_takes_what_is_no_version_for_a_path(lorc, tmp_path):
    code, _, err = lorc("generate", "lorc-work/nowhere", "x", "--workdir", tmp_path)
    assert (code, err) == (2, "error: variant directory lorc-work/nowhere does not exist\n")


def test_generate_tells_a_variant_that_does_not_know_its_base(lorc, tmp_path):
    compress(tiny_model("llama"), "lorc", 0.5, "uniform").save(tmp_path / "variant")
    code, out, err = lorc("generate", tmp_path / "variant", "x", "--workdir", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'variant'}: made from a model in memory")


@pytest.mark.parametrize("content", [b'{"model_type": "lorc_ll', b"\xff\xfe", b"[]", b'{"lorc": {}}'])
def test_generate_tells_a_broken_config(lorc, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    code, out, err = lorc("generate", tmp_path, "x", "--workdir", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / 'config.json'}: not a model's config (")
    assert err.endswith("; expected is a JSON object with a model_type\n")


def test_export_then_generate_the_same_text_at_the_same_cost(lorc, variant_dir, tmp_path):
    code, out, err = lorc("export", variant_dir, tmp_path / "exported", "--workdir", tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith(f"exported to {tmp_path / 'exported'}: ")
    assert "full size stay" not in out
    assert out.endswith("load after `import lorc_core`, or with trust_remote_code=True; both need lorc installed\n")
    texts = []
    for reference in (variant_dir, tmp_path / "exported"):
        code, text, err = lorc("generate", reference, "import os", "--max-new-tokens", 5, "--workdir", tmp_path)
        assert code == 0
        texts.append(text)
        num_new, rest = err.split(" tokens, ")
        per_second, prompt, held, share, untouched = re.fullmatch(
            r"([\d.]+) per second with the prompt's (\d+); cache ([\d,]+) bytes, ([\d.]+) of the untouched model's ([\d,]+)\n",
            rest,
        ).groups()
        assert 1 <= int(num_new) <= 5
        assert float(per_second) > 0
        # three layers of 16 + 16 floats for all tokens but the newest
        assert int(held.replace(",", "")) == (int(prompt) + int(num_new) - 1) * 3 * 32 * 4
        assert (share, int(untouched.replace(",", ""))) == ("0.50", 2 * int(held.replace(",", "")))
    assert texts[0] == texts[1]
    assert texts[0].startswith("import os")


def test_plain_export_says_its_head_size_and_generates(lorc, tmp_path):
    base = save_tiny_model("llama", tmp_path / "base")
    ids = torch.randint(3, 1024, (8, 32), generator=torch.Generator().manual_seed(0))
    compress(base, "k_svd", 0.5, calibration=ids).save(tmp_path / "variant")
    code, out, _ = lorc("export", tmp_path / "variant", tmp_path / "plain", "--plain", "--workdir", tmp_path)
    assert code == 0
    assert out.endswith("attention and cache at head size 8; load with trust_remote_code=True\n")
    texts = [
        lorc("generate", tmp_path / name, "import os", "--max-new-tokens", 5, "--workdir", tmp_path)
        for name in ("variant", "plain")
    ]
    assert texts[0][:2] == texts[1][:2]
    assert texts[0][0] == 0
    costs = [err.split("cache ", 1)[1] for _, _, err in texts]
    assert costs[0] == costs[1]
    assert ", 0.50 of " in costs[0]


def test_plain_export_refuses_with_one_line(lorc, variant_dir, tmp_path):
    code, out, err = lorc("export", variant_dir, tmp_path / "plain", "--plain", "--workdir", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("error: layer 0 keys: lorc projects them by block joint; a plain export is of per-head")


def test_export_says_what_it_cannot_fold(lorc, tmp_path):
    base = save_tiny_model("llama", tmp_path / "base")
    ids = torch.randint(3, 1024, (8, 32), generator=torch.Generator().manual_seed(0))
    compress(base, "k_svd", 0.5, calibration=ids).save(tmp_path / "variant")
    code, out, _ = lorc("export", tmp_path / "variant", tmp_path / "exported", "--workdir", tmp_path)
    assert code == 0
    assert "keys: projections of full size stay, because what is cached is rotated after the projection" in out


def test_export_refuses_with_one_line(lorc, variant_dir, tmp_path):
    save_tiny_model("llama", tmp_path / "other", seed=1)
    cases = [
        (2, (tmp_path / "base", tmp_path / "new"), "a directory without lorc_config.json is no variant"),
        (2, (tmp_path / "nowhere", tmp_path / "new"), "does not exist"),
        (2, (variant_dir, tmp_path / "base"), "exists and is not empty; name a new directory"),
        (2, (variant_dir, tmp_path / "new", "--base", tmp_path / "nowhere"), "does not exist"),
        (1, (variant_dir, tmp_path / "new", "--base", tmp_path / "other"), "not the base model this variant was made"),
    ]
    for expected, arguments, message in cases:
        code, out, err = lorc("export", *arguments, "--workdir", tmp_path)
        assert (code, out) == (expected, "")
        assert message in err
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "new").exists()


def test_plan_prints_the_caches_of_lorcs_table_2_from_configs_alone(lorc, tmp_path):
    """LoRC prints half of these sizes; the arithmetic is 2 x layers x kv_width x 2 bytes x 64 x 2048."""
    code, out, _ = lorc("plan", REPOSITORY / "examples" / "hub.yaml", "--workdir", tmp_path)
    assert code == 0
    rows, model = {}, ""
    for line in out.splitlines():
        name, *cells = line.split() or [""]
        model = model if line.startswith("  ") else name
        rows[model, name] = cells
    assert rows["llama-2-13b", "baseline"][:2] == ["100.00", "GiB"]
    assert rows["llama-3.1-8b", "baseline"][:2] == ["16.00", "GiB"]
    assert rows["llama-3.1-70b", "baseline"][:2] == ["40.00", "GiB"]
    # 13B at 0.55: 55 GiB of cache and 80 factors of 2816 x 5120 at two bytes; 0.1 % more for ranks that are rounded
    assert rows["llama-2-13b", "lorc-progressive-0.55"] == ["55.00", "GiB", "2.15", "GiB", "57.15", "GiB", "57.2%"]
    told = "weights + cache + activations per GPU in GiB, of 80 each: 0: 32.2 + 0.6 + 9.8, 1: 33.5 + 0.7 + 5.5"
    assert told in " ".join(out.split())


def test_plan_simulates_a_cluster_within_80_columns(lorc, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cluster = REPOSITORY / "examples" / "cluster.yaml"
    arguments = "plan", REPOSITORY / "examples" / "hub.yaml", "--workdir", tmp_path, "--cluster"
    code, out, _ = lorc(*arguments, cluster)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if " x " in line}
    assert rows["llama-3.1-70b"][:4] == ["4", "x", "42.6", "gpu"]  # 32.2 + 0.6 + 9.8 on the first
    told = out.split("wall time ")[1]
    assert "GPU hours" in told
    assert "longest chain of steps" in told
    few = tmp_path / "few.yaml"
    few.write_text(cluster.read_text().replace("num_gpus: 8", "num_gpus: 2").replace("../", f"{REPOSITORY}/"))
    code, out, _ = lorc(*arguments, few)
    assert code == 1
    assert "asks for 16 CPUs, 4 GPUs and 160 GiB; nodes have gpu: 96 CPUs, 2 GPUs" in " ".join(out.split())


def test_plan_refuses_a_wrong_cluster_file_in_one_line(lorc, tmp_path):
    (tmp_path / "cluster.yaml").write_text("nodes: [{name: gpu, num_cpu: 8, memory_gib: 1}]\nunits: none.yaml\n")
    code, out, err = lorc("plan", write_zoo(tmp_path), "--cluster", tmp_path / "cluster.yaml", "--workdir", tmp_path)
    assert (code, out) == (2, "")
    assert "cluster.yaml: nodes.0.num_cpu: unknown field; did you mean num_cpus?" in err
    assert "none.yaml does not exist" in err
    assert "Traceback" not in err


def test_plan_says_what_is_done(finished, lorc):
    zoo_file, workdir, _ = finished
    code, out, _ = lorc("plan", zoo_file, "--workdir", workdir)
    assert code == 0
    assert "small-llama: 22 of 22 steps done" in out
    changed = zoo_file.with_name("more.yaml")
    changed.write_text(zoo_file.read_text().replace("[0.9, 0.1]", "[0.9, 0.8]"))
    told = " ".join(lorc("plan", changed, "--workdir", workdir)[1].split())
    left = "1 schedule, 1 variant, 1 projection_errors, 1 evaluate, 1 register"
    assert f"small-llama: 17 of 22 steps done; to do: {left}" in told


def test_version_is_told(lorc):
    code, out, _ = lorc("--version")
    assert (code, out) == (0, f"lorc {importlib.metadata.version('lorc')}\n")


def test_a_misspelt_field_is_one_line_and_exit_code_2(lorc, tmp_path):
    zoo_file = write_zoo(tmp_path)
    zoo_file.write_text(zoo_file.read_text().replace("batch_size", "batchsize"))
    code, out, err = lorc("run", zoo_file, "--workdir", tmp_path / "work")
    assert (code, out) == (2, "")
    assert err.startswith(
        f"error: {zoo_file}: evaluation.batchsize: unknown field; did you mean batch_size? allowed here are texts"
    )
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", ["plan", "run", "compress", "evaluate", "register", "spectrum"])
def test_a_wrong_zoo_file_is_refused_before_what_takes_seconds_to_import(tmp_path, command):
    (tmp_path / "zoo.yaml").write_text("name: x\nmodels: [{name: a, source: ./a, dtype: float33}]\nvariants: 3\n")
    script = (
        f"import sys; sys.argv = ['lorc', '{command}', '{tmp_path / 'zoo.yaml'}']\n"
        "from jobs.cli import main\n"
        "try: main()\n"
        "except SystemExit as error: print(error.code)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'ray', 'mlflow', 'pyarrow', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "2\n[]\n"
    assert [line.split(": ")[-2] for line in done.stderr.splitlines()] == ["models.0.dtype", "variants", "evaluation"]


def test_debug_shows_the_trace(lorc, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["lorc", "--debug", "run", str(tmp_path / "none.yaml")])
    with pytest.raises(ValueError, match="does not exist"):
        main()


def test_a_failed_model_gives_exit_code_1_and_the_others_finish(ray_cluster, lorc, tmp_path):
    zoo_file = write_zoo(tmp_path, kept="0.5")
    zoo_file.write_text(zoo_file.read_text().replace("./small-llama", "./small-lama"))
    code, out, _ = lorc("compress", zoo_file, "--workdir", tmp_path / "work")
    assert code == 1
    assert "small-lama does not exist" in " ".join(out.split())
    assert "steps failed: 1" in out
    assert len(list((tmp_path / "work" / "steps").glob("variant-*/manifest.json"))) == 2


def test_registered_details_are_the_zoos(registry):
    run = registry.get_run(registry.get_model_version("tiny-opt", "1").run_id)
    details = json.loads(run.data.tags["lorc.details"])
    assert details["gates"]["max_perplexity_rise"] == 0.1
    assert details["settings"] == {"batch_size": 4, "dtype": "float32"}


def test_methods_lists_every_preset_with_its_source(lorc):
    code, out, _ = lorc("methods")
    assert code == 0
    for name, method in METHODS.items():
        assert f"{name}, schedule {method.schedule.name}" in out
        assert method.source in " ".join(out.split())
    assert "group(4)" in out
    assert "phasor_freq" in out


def test_spectrum_shows_ranks_gaps_and_the_best_preset_of_each_layer(ray_cluster, lorc, tmp_path):
    entries = [
        {"method": "lorc", "schedule": "uniform", "kept_fraction": 0.5},
        {"method": "kq_joint", "kept_fraction": 0.5},
    ]
    code, out, err = lorc("spectrum", write_calibrated_zoo(tmp_path, *entries), "--workdir", tmp_path / "work")
    assert (code, err) == (0, "")
    for text in (
        "rotary, lorc: 64 floats",
        "plain, kq_joint: 64 floats",
        "log10 cond.",
        "lorc-uniform-0.5",
        "gap at 0.5",
    ):
        assert text in out
    rows = ranking(out, "rotary")
    assert len(rows) == 3
    # before the rotation and over all heads nothing loses less than kq_joint, or its like with other keys
    assert all(row.split()[1] in ("kq_joint", "phasor_freq") for row in rows)


def ranking(out, model):
    """The lines of a model's last table."""
    after = out.split(f"{model}: relative error of the attention output", 1)[1]
    return [line for line in after.splitlines() if line.strip()[:1].isdigit()][:3]


def test_spectrum_without_calibration_shows_what_weights_say(finished, lorc):
    zoo_file, workdir, _ = finished
    code, out, _ = lorc("spectrum", zoo_file, "--workdir", workdir)
    assert code == 0
    assert "small-llama, lorc: 128 floats" in out
    assert "gap" not in out


@pytest.fixture
def without_up_proj(finished):
    """A model of the finished zoo whose checkpoint lost a tensor after its variants were registered."""
    weights = finished[0].parent / "small-llama" / "model.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, weights, {"format": "pt"})
    yield f"tensor {name} is missing"
    weights.write_bytes(whole)


@pytest.mark.parametrize(
    "command",
    [
        ("run", "ZOO"),
        ("evaluate", "ZOO"),
        ("generate", "small-llama/1", "import os"),
        ("export", "small-llama/1", "EXPORTED"),
        ("regress", "small-llama"),
    ],
)
def test_every_command_names_a_tensor_that_a_checkpoint_lost(finished, lorc, without_up_proj, command, tmp_path):
    zoo_file, workdir, _ = finished
    if command[0] == "regress":
        assert lorc("promote", "small-llama", "--workdir", workdir)[0] == 0
    zoo = yaml.safe_load(zoo_file.read_text()) | {"name": "holed"}
    holed = zoo_file.with_name("holed.yaml")
    holed.write_text(yaml.safe_dump(zoo | {"models": zoo["models"][:1]}))
    places = {"ZOO": holed, "EXPORTED": tmp_path / "exported"}
    place = tmp_path / "work" if "ZOO" in command else workdir
    code, out, err = lorc(*(places.get(word, word) for word in command), "--workdir", place)
    assert code == 1
    assert "".join(without_up_proj.split()) in "".join((out + err).split())  # lines are broken anywhere
    assert "Traceback" not in out + err
