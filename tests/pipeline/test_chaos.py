"""Workers killed every 20 seconds and a node lost: a zoo's tables are those of an undisturbed run."""

import contextlib
import json
import random
import subprocess
import sys
import time

import psutil
import pytest

from tests.models import save_tiny_model
from tests.paths import DEMO
from tests.zoos import TABLES, rows

KILL_EVERY_S = 10
# Many models of short steps: what is killed is soon done again, and the zoo lasts longer than three kills.
ARCHITECTURES = ("llama", "llama-mha", "qwen2", "opt", "gpt2", "gpt_neox")
MODELS_EACH = 2
ZOO = """
name: tiny
models:
{models}
calibration:
  texts: [{{name: first, source: text.jsonl, part: [0, 0.5]}}]
  window_tokens: 32
  num_windows: 500
  probe_windows: 400
  shards: 2
variants:
  - {{method: lorc, schedule: uniform, kept_fraction: 0.5}}
  - {{method: kq_joint, schedule: fisher, kept_fraction: [0.5, 0.25]}}
evaluation:
  texts: [{{name: rest, source: text.jsonl, part: [0.5, 1]}}]
  window_tokens: 32
  num_windows: 400
gates: {{max_perplexity_rise: 0.5}}
cluster: {{lost_worker_retries: 50}}
"""
# Where all is given back, says so and ends.
RESOURCES = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False)
until = time.monotonic() + 60
while time.monotonic() < until:
    if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"] == 1:  # the lost node's are gone
        break
    time.sleep(1)
print(ray.available_resources().get("CPU"), ray.cluster_resources()["CPU"])
"""


@pytest.fixture(scope="module")
def two_nodes():
    """A head and another node, in processes of their own, with a core each; no process is connected."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = nodes.add_node(num_cpus=1)
    yield nodes.address, [nodes.head_node, other]
    nodes.shutdown()


def write_zoo(directory):
    entries = []
    for seed, architecture in enumerate(ARCHITECTURES * MODELS_EACH):
        name = f"{architecture}-{seed}"
        save_tiny_model(architecture, directory / name, seed)
        entries.append(f"  - {{name: {name}, source: ./{name}, dtype: float32}}")
    (directory / "text.jsonl").write_text((DEMO / "heldout.jsonl").read_text())
    (directory / "zoo.yaml").write_text(ZOO.format(models="\n".join(entries)))
    return directory / "zoo.yaml"


def started(zoo_file, work, address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    command = [sys.executable, "-m", "jobs.cli", "run", str(zoo_file), "--workdir", str(work)]
    with printed_by(work).open("w") as printed:
        return subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)


def printed_by(work):
    return work.with_suffix(".txt")


def raylet(node):
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def busy_workers(nodes):
    found = []
    for node in nodes:
        with contextlib.suppress(psutil.NoSuchProcess):  # the node or a worker may end meanwhile
            for process in raylet(node).children(recursive=True):
                found += [process] if process.cmdline()[:1] == ["ray::remote_group"] else []
    return found


def finished_steps(work):
    """When each step that is done was done."""
    return {path.parent.name: path.stat().st_mtime_ns for path in work.glob("steps/*/manifest.json")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_zoo_survives_killed_workers_and_a_lost_node(two_nodes, tmp_path, monkeypatch):
    address, nodes = two_nodes
    zoo_file = write_zoo(tmp_path)
    undisturbed = started(zoo_file, tmp_path / "undisturbed", address, monkeypatch)
    assert undisturbed.wait() == 0, printed_by(tmp_path / "undisturbed").read_text()

    chance, killed, lost_node = random.Random(0), 0, False
    process = started(zoo_file, tmp_path / "work", address, monkeypatch)
    done = {}
    next_kill = time.monotonic() + KILL_EVERY_S
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        done = finished_steps(tmp_path / "work") | done  # the first time counts
        if time.monotonic() < next_kill:
            continue
        workers = busy_workers(nodes)
        if killed >= 2 and not lost_node:
            raylet(nodes[1]).kill()
            lost_node = True
        elif workers:
            chance.choice(workers).kill()
            killed += 1
        else:
            continue
        next_kill = time.monotonic() + KILL_EVERY_S
    assert process.returncode == 0, printed_by(tmp_path / "work").read_text()
    assert killed >= 2
    assert lost_node
    for table in TABLES:
        assert rows(tmp_path / "work", table) == rows(tmp_path / "undisturbed", table), table
    after = finished_steps(tmp_path / "work")
    assert {key: after[key] for key in done} == done, "a finished step was done again"
    notes = [json.loads((tmp_path / work / "candidates" / "tiny.json").read_text()) for work in ("work", "undisturbed")]
    assert notes[0]["chosen"].keys() == notes[1]["chosen"].keys()
    command = [sys.executable, "-c", RESOURCES, address]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "1.0 1.0"  # Ray tells of the lost node before


@pytest.mark.slow
def test_what_only_a_lost_node_could_run_fails_and_says_so(tmp_path, monkeypatch):
    """Ray would run it again, and wait for such a node for ever."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        other = nodes.add_node(num_cpus=2)
        zoo_file = write_zoo(tmp_path)
        needy = zoo_file.read_text().replace("dtype: float32", "dtype: float32, resources: {num_cpus: 2}")
        zoo_file.write_text(needy)
        process = started(zoo_file, tmp_path / "work", nodes.address, monkeypatch)
        while not busy_workers([other]):
            assert process.poll() is None
            time.sleep(0.2)
        raylet(other).kill()
        assert process.wait(timeout=240) == 1
    finally:
        nodes.shutdown()
    assert "no node of the cluster can give CPU 2" in " ".join(printed_by(tmp_path / "work").read_text().split())
