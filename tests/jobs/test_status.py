"""`lorc status` and `lorc logs`: what another terminal sees of a run that goes on, ended, failed or was killed."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from jobs.run_table import RunTable
from pipeline.status.state import RunState, StepState
from tests.zoos import write_zoo

KINDS = ("windows", "calibrate", "decompose", "schedule", "variant", "evaluate", "register")


def lorc(*arguments):
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "80", "RAY_ADDRESS": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def printed(state, height=24, **options):
    screen = Console(width=80, height=height, record=True, file=io.StringIO())
    screen.print(RunTable(state, now=100.0, **options))
    return screen.export_text().splitlines()


def zoo_of(num_models):
    steps = {}
    for model in range(num_models):
        for kind in KINDS:
            for part in range(160):
                steps[f"{kind}-{model}-{part}"] = StepState(f"meta-llama-3.1-model-{model:02}", None, kind)
    return RunState("zoo", started_at=0.0, steps=steps)


def test_forty_models_fit_a_screen_of_80_columns_and_24_rows():
    state = zoo_of(40)
    for key in ("evaluate-31-0", "evaluate-31-1", "decompose-7-3", "decompose-39-0", "register-2-2"):
        step = state.steps[key]
        step.status, step.began_at, step.host = "running", 90.0, "a-node-with-a-long-name.cluster.local"
    state.steps["evaluate-38-0"].status = "failed"
    state.phase = "choosing candidates"
    lines = printed(state)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    told = "\n".join(lines)
    for model, cell in ((31, "0/160>"), (38, "0/160!"), (39, "0/160>")):
        (row,) = [line for line in lines if line.startswith(f"meta-llama-3.1-model-{model:02}")]
        assert cell in row
    assert "27 others" in told
    assert "and 2 more steps" in told


def test_a_few_models_are_all_shown_and_stages_without_steps_are_not():
    state = RunState("zoo", started_at=0.0, steps={"a": StepState("m", None, "evaluate", "cached")})
    lines = printed(state, at_work=False)
    assert "calib" not in "\n".join(lines)
    assert [line.split() for line in lines if line.startswith("m")] == [["m", "1/1"]]


@pytest.fixture
def zoo(tmp_path):
    return write_zoo(tmp_path), tmp_path / "work"


def started(zoo_file, work):
    command = [sys.executable, "-m", "jobs.cli", "run", str(zoo_file), "--workdir", str(work)]
    environment = os.environ | {"COLUMNS": "80", "RAY_ADDRESS": ""}
    with work.with_suffix(".txt").open("w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def at_rest(work):
    """When each file was written, once a dead run's workers have ended."""
    written = {}
    while (now := {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.exists()}) != written:
        written = now
        time.sleep(2)
    return written


@pytest.mark.slow
def test_a_run_is_seen_at_work_then_killed_then_ended(zoo):
    zoo_file, work = zoo
    process = started(zoo_file, work)
    while len(list(work.glob("steps/*/manifest.json"))) < 3:
        assert process.poll() is None, work.with_suffix(".txt").read_text()
        time.sleep(0.1)
    seen = lorc("status", work)
    assert seen.returncode == 0, seen.stdout + seen.stderr
    assert f"runs: process {process.pid} on" in seen.stdout
    assert "small-llama" in seen.stdout
    assert max(map(len, seen.stdout.splitlines())) <= 80
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = at_rest(work)
    died = lorc("status", work)
    assert died.returncode == 1
    assert "died with" in died.stdout
    assert at_rest(work) == before, "a look changed something"
    ran = lorc("run", zoo_file, "--workdir", work)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    ended = lorc("status", work)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == "ended"


@pytest.mark.slow
def test_failures_are_told_with_the_way_to_their_logs(zoo):
    zoo_file, work = zoo
    zoo_file.write_text(zoo_file.read_text().replace("num_windows: 8", "num_windows: 8000"))
    assert lorc("run", zoo_file, "--workdir", work).returncode == 1
    seen = lorc("status", work)
    assert seen.returncode == 1
    assert "small-llama: windows: text stdlib:" in seen.stdout
    assert "lorc logs WORKDIR small-llama" in seen.stdout
    logs = lorc("logs", work, "small-llama")
    assert logs.returncode == 0
    assert "small-llama: windows, begun 20" in logs.stdout
    assert "Traceback (most recent call last)" in logs.stdout
    assert "pin_windows" in logs.stdout
    variant = lorc("logs", work, "small-llama", "lorc-uniform-0.9")
    assert "nothing of small-llama lorc-uniform-0.9 failed" in variant.stdout
    for arguments, told in (
        (["smal-llama"], "no model 'smal-llama' in this run; did you mean small-llama? it has small-llama, tiny-opt"),
        (["small-llama", "lorc-uniform-0.8"], "did you mean lorc-uniform-0.9? it has"),
    ):
        refused = lorc("logs", work, *arguments)
        assert refused.returncode == 2
        assert told in " ".join(refused.stderr.split())


def test_where_no_run_was_that_is_told_in_a_line_and_nothing_is_made(tmp_path):
    seen = lorc("status", tmp_path / "nowhere")
    assert seen.returncode == 2
    assert "no run was here" in " ".join(seen.stderr.split())
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "status.json").write_text("{}")
    broken = lorc("status", tmp_path)
    assert broken.returncode == 1
    assert "not the state of a run" in " ".join(broken.stderr.split())
