"""Evaluations on a Ray node that declares four GPUs: spread or not the tables are the same, and no GPU is used twice."""

import itertools
import json
import subprocess
import sys

import pytest

from tests.models import save_tiny_model
from tests.paths import DEMO
from tests.zoos import rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_GPUS = 4
ZOO = """
name: tiny
models:
{models}
variants: [{{method: lorc_q, schedule: uniform, kept_fraction: [0.5, 0.25]}}]
evaluation:
  texts: [{{name: stdlib, source: text.jsonl}}]
  window_tokens: 32
  num_windows: 7
  batch_size: 2
"""
# A model whose own code notes when it ran on which of Ray's GPUs. Where it is said to, it waits for as many tasks to be
# at work at the same time; where `kill` names a file that is not there, it makes it and ends its process.
NOTING = """
import json, os, signal, time
from pathlib import Path
from transformers import LlamaForCausalLM

class Noting(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        import ray
        kill = Path(self.config.kill)
        if self.config.kill and not kill.exists():
            kill.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        begun, context = time.time(), ray.get_runtime_context()
        Path(f"{self.config.notes}-{context.get_task_id()}").touch()
        while len(list(Path(self.config.notes).parent.glob("notes-*"))) < self.config.together:
            time.sleep(0.05)
            assert time.time() - begun < 90, "the others do not come"
        found = super().forward(*args, **kwargs)
        note = {"model": self.config.label, "task": context.get_task_id(), "from": begun, "to": time.time(),
                "gpus": [int(gpu) for gpu in context.get_accelerator_ids()["GPU"]]}
        with open(self.config.notes, "a") as notes:
            notes.write(json.dumps(note) + "\\n")
        return found
"""
# Runs a zoo to its evaluations while a task holds some GPUs: to the end or, if it is to free them, for four seconds more
# when all that the evaluations read is there.
RUN = """
import sys, time, threading
from pathlib import Path
import ray
from pipeline.zoo.file import load_zoo
from pipeline.zoo_run import run_zoo

@ray.remote
def hold(until):
    while not Path(until).exists():
        time.sleep(0.05)

def free_later(work, free):
    while len(list(work.glob("steps/variant-*/manifest.json"))) < 2 or not list(work.glob("steps/windows-*/manifest.json")):
        time.sleep(0.05)
    time.sleep(4)
    free.touch()

if __name__ == "__main__":
    zoo_file, work, address, held, frees = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    free = Path(work).with_suffix(".free")
    if int(held):
        holder = hold.options(num_cpus=0, num_gpus=int(held)).remote(str(free))
        while ray.available_resources().get("GPU", 0) > ray.cluster_resources()["GPU"] - int(held):
            time.sleep(0.05)
    if frees == "True":
        threading.Thread(target=free_later, args=(Path(work), free), daemon=True).start()
    run = run_zoo(load_zoo(Path(zoo_file)), Path(work), until="evaluate")
    if frees == "False":
        free.touch()
    if int(held):
        ray.get(holder)
    print([outcome.error for outcome in run.failures])
"""


@pytest.fixture(scope="module")
def node():
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": NUM_GPUS, "include_dashboard": False}
    )
    yield made.address
    made.shutdown()


def write_zoo(directory, *needs, together=1, kill=""):
    """A zoo of a model for each need of GPUs, which note what they do in `notes`; returns the zoo file."""
    entries = []
    for seed, num_gpus in enumerate(needs):
        name = f"of-{num_gpus}"
        model = save_tiny_model("llama", directory / name, seed)
        (model / "modeling_noting.py").write_text(NOTING)
        own = {"auto_map": {"AutoModelForCausalLM": "modeling_noting.Noting"}, "notes": str(directory / "notes")}
        config = (
            json.loads((model / "config.json").read_text()) | own | {"label": name, "together": together, "kill": kill}
        )
        (model / "config.json").write_text(json.dumps(config))
        resources = f"resources: {{num_gpus: {num_gpus}}}"
        entries.append(f"  - {{name: {name}, source: ./{name}, dtype: float32, trust_remote_code: true, {resources}}}")
    lines = (DEMO / "heldout.jsonl").read_text().splitlines()[:8]
    (directory / "text.jsonl").write_text("\n".join(lines))
    (directory / "zoo.yaml").write_text(ZOO.format(models="\n".join(entries)))
    return directory / "zoo.yaml"


def run(node, zoo_file, *, held=0, frees=False):
    """Run a zoo in a process of its own; returns its work directory."""
    work = zoo_file.with_name("work")
    command = [sys.executable, "-c", RUN, str(zoo_file), str(work), node, str(held), str(frees)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    return work


def notes(work):
    return [json.loads(line) for line in (work.parent / "notes").read_text().splitlines()]


def check_gpus(found, most=NUM_GPUS):
    """No GPU is used by two tasks at a time: each task holds its own from its first note to its last."""
    spans = {}
    for note in found:
        begun, ended = spans.get((note["task"], *note["gpus"]), (note["from"], note["to"]))
        spans[note["task"], *note["gpus"]] = (min(begun, note["from"]), max(ended, note["to"]))
    for (one, (one_from, one_to)), (other, (other_from, other_to)) in itertools.combinations(spans.items(), 2):
        if one_from < other_to and other_from < one_to:
            assert not set(one[1:]) & set(other[1:]), (one, other)
    moments = [begun for begun, _ in spans.values()]
    at_once = [sum(len(key) - 1 for key, (begun, ended) in spans.items() if begun <= at < ended) for at in moments]
    assert max(at_once) <= most
    return max(at_once), spans


@pytest.fixture(scope="module")
def alone(node, tmp_path_factory):
    """The tables where nothing is spread, since the model asks for no GPU, and the artifacts' names."""
    zoo_file = write_zoo(tmp_path_factory.mktemp("alone"), 1)
    zoo_file.write_text(zoo_file.read_text().replace("num_gpus: 1", "num_gpus: 0"))
    work = run(node, zoo_file)
    assert len({note["task"] for note in notes(work)}) == 1
    return work


def names(work):
    return {path.name for path in work.glob("steps/*")}


@pytest.mark.parametrize(("held", "num_replicas"), [(0, 4), (2, 2), (3, 1)])
def test_replicas_write_what_one_task_does_each_on_a_gpu_of_its_own(node, alone, tmp_path, held, num_replicas):
    work = run(node, write_zoo(tmp_path, 1, together=num_replicas), held=held)
    for table in ("scores", "window_losses"):
        assert len(rows(work, table)) == {"scores": 3, "window_losses": 21}[table]
        written = [row | {"model": None} for row in rows(work, table)]
        assert written == [row | {"model": None} for row in rows(alone, table)]
    at_once, spans = check_gpus(notes(work), NUM_GPUS - held)
    assert at_once == len(spans) == num_replicas
    assert not [name for name in names(work) if name.startswith("evaluate_share")]


def test_a_replica_that_is_killed_is_run_again_and_the_others_are_not(node, alone, tmp_path):
    work = run(node, write_zoo(tmp_path, 1, kill=str(tmp_path / "killed")))
    assert (tmp_path / "killed").exists()
    assert rows(work, "window_losses") == rows(alone, "window_losses")
    assert len(notes(work)) == 4 * 2 * 3  # batches, halves of a window, baseline and variants: none is scored twice
    check_gpus(notes(work))


def test_models_of_one_two_and_four_gpus_share_four_and_each_has_all_that_it_asks_for(node, tmp_path):
    work = run(node, write_zoo(tmp_path, 1, 2, 4))
    _, spans = check_gpus(notes(work))
    tasks = {note["task"]: (note["model"], len(note["gpus"])) for note in notes(work)}
    assert {(model, count) for model, count in tasks.values()} == {("of-1", 1), ("of-2", 2), ("of-4", 4)}
    assert len(spans) == len(tasks)


def test_what_needs_four_gpus_waits_whole_while_two_are_taken(node, tmp_path):
    work = run(node, write_zoo(tmp_path, 4), held=2, frees=True)
    freed = work.with_suffix(".free").stat().st_mtime
    assert min(note["from"] for note in notes(work)) > freed
    # It was ready long before: what it reads was there.
    assert max(path.stat().st_mtime for path in work.glob("steps/variant-*/manifest.json")) < freed - 3
    assert all(note["gpus"] == [0, 1, 2, 3] for note in notes(work))
