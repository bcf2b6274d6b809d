"""`lorc status` and `lorc logs`: what they say while a run goes on and after, and that they change nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

from lorc_core.errors import ConfigError
from pipeline.status.status import STATUS_FILE
from pipeline.steps.outcome import Listener
from pipeline.storage.lease import LEASE_FILE
from pipeline.zoo.file import load_zoo
from pipeline.zoo_run import run_zoo
from tests.zoos import write_zoo


def lorc_apart(*arguments):
    """The command in another process."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    return done.returncode, done.stdout, done.stderr


def named(zoo_file, name):
    """Tests share the work directory of `finished`; each zoo has its own tables."""
    zoo_file.write_text(zoo_file.read_text().replace("name: tiny\n", f"name: {name}\n"))
    return load_zoo(zoo_file)


class Asks(Listener):
    """Asks for the status once steps run, while the run stands still."""

    def __init__(self, work):
        self.work, self.told = work, None

    def start(self, started):
        if self.told is None:
            self.told = "", ""
            until = time.monotonic() + 60
            while time.monotonic() < until and "running" not in self.told[1]:
                self.told = lorc_apart("status", self.work)


def test_status_of_a_run_from_another_process_while_it_goes_on(ray_cluster, tmp_path):
    zoo = named(write_zoo(tmp_path), "asked")
    told = Asks(tmp_path / "work")
    assert not run_zoo(zoo, tmp_path / "work", until="compress", listener=told).failures
    code, out, err = told.told
    assert (code, err) == (0, "")
    assert f"runs: zoo asked, process {os.getpid()} on " in out
    assert "heartbeat" in out
    assert "1 step running" in out or "2 steps running" in out
    assert any(line.startswith(("  windows ", "  decompose ")) for line in out.splitlines())
    assert max(map(len, out.splitlines())) <= 80
    after, out, _ = lorc_apart("status", tmp_path / "work")
    assert after == 0
    assert "ended at " in out
    assert "▸" not in out.split("\n", 1)[1]


def contents(directory):
    return {path: path.stat().st_mtime_ns for path in sorted(directory.rglob("*"))}


def test_status_after_success_says_so_and_changes_nothing(finished, lorc):
    _, work, _ = finished
    run_zoo(load_zoo(finished[0]), work)
    before = contents(work)
    code, out, _ = lorc("status", work)
    assert code == 0
    assert "ended at " in out
    assert "small-llama" in out
    assert "died" not in out
    assert contents(work) == before
    told = json.loads((work / STATUS_FILE).read_text())
    assert told["ended"] >= told["started"]
    assert told["models"]["small-llama"]["stages"]["register"] == {
        "total": 3,
        "done": 3,
        "running": 0,
        "failed": 0,
        "skipped": 0,
    }
    assert not (work / "status.partial").exists()


@pytest.fixture(scope="module")
def failed(ray_cluster, tmp_path_factory):
    """A work directory where one of two models has a layer of NaN."""
    directory = tmp_path_factory.mktemp("failed")
    zoo = named(write_zoo(directory), "failed")
    weights = directory / "tiny-opt" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "layers.1.self_attn.v_proj.weight" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    run_zoo(zoo, directory / "work", until="compress")
    return directory / "work"


def test_status_after_a_failure_tells_it_and_has_exit_code_1(failed, lorc):
    code, out, _ = lorc("status", failed)
    assert code == 1
    row = next(line for line in out.splitlines() if "tiny-opt" in line and "/" in line)
    assert row.startswith("✗")
    assert "✗" not in next(line for line in out.splitlines() if "small-llama" in line)
    assert "tiny-opt: decompose: " in out
    assert "1 failure" in out


def test_logs_are_those_of_the_model_and_no_others(failed, lorc):
    code, out, _ = lorc("logs", failed, "tiny-opt")
    assert code == 0
    assert out.startswith("── decompose of tiny-opt at 20")
    assert "Traceback" in out
    assert "NaN or infinity" in out
    key = next(failed.glob("logs/decompose-*")).stem
    assert key in out
    of_variant = lorc("logs", failed, "tiny-opt", "lorc-uniform-0.9")
    assert of_variant[:2] == (0, out), "the layer is that of all variants"
    assert lorc("logs", failed, "small-llama")[:2] == (0, "no logs: nothing of small-llama failed\n")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tiny-opd",), "no model is called tiny-opd; did you mean tiny-opt? known are small-llama, tiny-opt"),
        (
            ("tiny-opt", "lorc-uniform-0.8"),
            "no variant of tiny-opt is called lorc-uniform-0.8; did you mean lorc-uniform-0.9? known are lorc-progressive-0.75, ",
        ),
    ],
)
def test_logs_name_the_models_and_variants_that_there_are(failed, lorc, names, message):
    code, out, err = lorc("logs", failed, *names)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_failures_of_another_zoo_of_the_directory_are_found_in_its_table(failed, lorc, tmp_path):
    (failed / STATUS_FILE).rename(tmp_path / STATUS_FILE)
    try:
        code, out, _ = lorc("logs", failed, "tiny-opt")
        assert code == 0
        assert "Traceback" in out
        assert lorc("status", failed)[0] == 2
    finally:
        (tmp_path / STATUS_FILE).rename(failed / STATUS_FILE)


@pytest.mark.parametrize("arguments", [("status", "PLACE"), ("logs", "PLACE", "model")])
def test_a_place_where_no_run_was_is_a_wrong_request_and_is_not_made_one(lorc, tmp_path, arguments):
    place = tmp_path / "nowhere"
    code, out, err = lorc(*(place if word == "PLACE" else word for word in arguments))
    assert (code, out) == (2, "")
    assert err == f"error: no run was in {place}; give the work directory of one\n"
    assert not place.exists()


def test_a_run_that_ends_by_an_error_is_not_taken_for_one_that_died(tmp_path, lorc):
    zoo_file = write_zoo(tmp_path, kept="0.5")
    zoo_file.write_text(zoo_file.read_text() + "cluster: {address: '127.0.0.1:1'}\n")
    with pytest.raises(ConfigError):
        run_zoo(load_zoo(zoo_file), tmp_path / "work")
    code, out, _ = lorc("status", tmp_path / "work")
    assert code == 1
    assert "before its last step" in out
    assert "no Ray cluster at 127.0.0.1:1" in out


@pytest.mark.slow
def test_a_killed_run_died_and_one_that_goes_on_does_not(ray_cluster, tmp_path, lorc):
    zoo_file = write_zoo(tmp_path)
    named(zoo_file, "killed")
    work = tmp_path / "work"
    command = [sys.executable, "-m", "jobs.cli", "run", str(zoo_file), "--workdir", str(work)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (work / STATUS_FILE).is_file() or not json.loads((work / STATUS_FILE).read_text())["running"]:
        assert process.poll() is None
        time.sleep(0.1)
    assert lorc("status", work)[0] == 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (work / LEASE_FILE).is_file()
    code, out, _ = lorc("status", work)
    assert code == 1
    assert f"died: zoo killed, process {process.pid} on " in out
    assert "the same command goes on from there" in " ".join(out.split())  # the line is broken anywhere
    assert not run_zoo(load_zoo(zoo_file), work, until="compress").failures
    assert lorc("status", work)[0] == 0


def test_status_imports_neither_torch_nor_ray(finished):
    script = "import sys; from jobs.show.status import show_status; show_status(sys.argv[1], watch=False); sys.exit(bool({'torch', 'ray', 'mlflow', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script, str(finished[1])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
