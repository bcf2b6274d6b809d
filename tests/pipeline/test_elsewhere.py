"""Models in an object store and on a hub, read by ranges: the results are those of the same models here."""

import json
import os
import subprocess
import sys
import threading

import boto3
import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.bench.zoos.hub import Hub
from tests.models import save_tiny_model
from tests.servers import object_store
from tests.zoos import rows, write_zoo

SAMPLES = 4 * 8192  # bytes of a tensor that its identity reads


@pytest.fixture
def bucket(monkeypatch):
    with object_store(monkeypatch) as url:
        yield url


def upload(directory, prefix):
    for file in directory.iterdir():
        boto3.client("s3").upload_file(str(file), "zoo", f"{prefix}/{file.name}")


def lorc(*arguments, **environment):
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "RAY_ADDRESS": ""} | environment  # a Ray of its own
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def wide_model(directory):
    """Large beside the samples of its tensors; its tokenizer is a tiny one's."""
    save_tiny_model("llama", directory)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=json.loads((directory / "config.json").read_text())["vocab_size"], max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_a_zoo_of_models_elsewhere_has_the_scores_of_the_same_models_here(bucket, tmp_path):
    zoo_file = write_zoo(tmp_path)
    here = lorc("run", zoo_file, "--workdir", tmp_path / "here")
    assert here.returncode == 0, here.stdout + here.stderr
    upload(tmp_path / "small-llama", "models/small-llama")
    written = zoo_file.read_text().replace("./small-llama", f"{bucket}/models/small-llama")
    zoo_file.write_text(written.replace("./tiny-opt", "lab/tiny-opt"))
    caches = {"LORC_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    with Hub({"lab/tiny-opt": tmp_path / "tiny-opt"}) as hub:
        ran = lorc("run", zoo_file, "--workdir", tmp_path / "there", HF_ENDPOINT=hub.url, **caches)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        for table in ("scores", "window_losses", "ranks", "spectra", "projection_errors"):
            assert rows(tmp_path / "there", table) == rows(tmp_path / "here", table), table
        again = lorc("run", zoo_file, "--workdir", tmp_path / "there", HF_ENDPOINT=hub.url, **caches)
        assert "0 steps ran" in again.stdout, again.stdout


def test_decomposing_a_hub_model_asks_for_its_keys_and_values_alone(tmp_path):
    directory = wide_model(tmp_path / "wide")
    zoo_file = write_zoo(tmp_path, kept="[0.5, 0.25]")
    written = zoo_file.read_text().splitlines()
    written = [line for line in written if "small-llama" not in line]
    zoo_file.write_text("\n".join(written).replace("./tiny-opt", "lab/wide").replace("tiny-opt", "wide"))
    tensors = load_file(directory / "model.safetensors")
    needed = sum(tensor.nbytes for name, tensor in tensors.items() if "k_proj" in name or "v_proj" in name)
    whole = (directory / "model.safetensors").stat().st_size
    with Hub({"lab/wide": directory}) as hub:
        caches = {"LORC_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url}
        ran = lorc("compress", zoo_file, "--workdir", tmp_path / "work", **caches)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        looked_at = len(tensors) * SAMPLES + 10_000  # with the headers
        assert needed <= hub.weight_bytes_sent <= needed + looked_at
        assert hub.weight_bytes_sent < whole / 4
        costs = rows(tmp_path / "work", "outcomes")
        assert sum(row["read_bytes"] for row in costs if row["step"].startswith("decompose-")) >= needed
        planned = lorc("plan", zoo_file, "--workdir", tmp_path / "other", **caches)
        assert planned.returncode == 0, planned.stdout + planned.stderr
        assert hub.weight_bytes_sent <= needed + 2 * looked_at, "planning read weights"


PLAN_STEPS = """
import sys
from pathlib import Path
from pipeline.steps.outcome import Listener
from pipeline.storage.store import Store
from pipeline.waiting import Patience
from pipeline.zoo.file import load_zoo
from pipeline.zoo_run import plan_steps
planned, failed = plan_steps(load_zoo(sys.argv[1]), Store(Path(sys.argv[2])), Listener(), Patience(0))
print(f"{len(planned)} planned, {len(failed)} failed")
"""


class WaitingHub(Hub):
    """Answers nothing of two models before it was asked for both."""

    def __init__(self, models):
        super().__init__(models)
        self.both = threading.Barrier(2, timeout=20)
        self.asked = set()

    def told(self, request, model, what):
        with self.counting:
            is_first = model not in self.asked
            self.asked.add(model)
        if is_first:
            self.both.wait()
        return super().told(request, model, what)


def test_hub_models_are_read_several_at_a_time(tmp_path):
    zoo_file = write_zoo(tmp_path)
    names = "small-llama", "tiny-opt"
    for name in names:
        zoo_file.write_text(zoo_file.read_text().replace(f"./{name}", f"lab/{name}"))
    with WaitingHub({f"lab/{name}": tmp_path / name for name in names}) as hub:
        caches = {"LORC_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url}
        command = [sys.executable, "-c", PLAN_STEPS, zoo_file, tmp_path / "work"]
        environment = os.environ | caches | {"HF_HUB_OFFLINE": "0"}
        planned = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert planned.stdout == "2 planned, 0 failed\n", planned.stdout + planned.stderr
