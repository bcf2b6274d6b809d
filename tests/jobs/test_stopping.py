"""Ctrl-C and SIGTERM: a line that says what is kept, and the same command goes on."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.zoos import TABLES, rows, write_zoo


def command(directory):
    return [sys.executable, "-m", "jobs.cli", "run", str(write_zoo(directory)), "--workdir", str(directory / "work")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    subprocess.run(command(directory), check=True, capture_output=True, env=environment)
    return directory / "work"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_what_is_kept_and_goes_on_to_the_same_tables(number, tmp_path, monkeypatch, undisturbed):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = command(tmp_path)
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list((tmp_path / "work").glob("steps/decompose-*/manifest.json")):  # the time limit ends it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
        assert process.poll() is None
    assert of_session(process.pid)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; what is finished stays in" in printed
    assert "Traceback" not in printed
    assert "*** SIG" not in printed
    assert not (tmp_path / "work" / "lease.json").exists()
    assert not left_of_ray(process.pid)
    subprocess.run(run, check=True, capture_output=True)
    for table in TABLES:
        assert rows(tmp_path / "work", table) == rows(undisturbed, table)


def left_of_ray(driver):
    """Ray's processes whose session a driver started, 30 seconds after it ended or at once if there are none."""
    until = time.monotonic() + 30
    while (found := of_session(driver)) and time.monotonic() < until:
        time.sleep(0.5)
    return found


def of_session(driver):
    """A session's directory is named by its driver's process."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if re.search(rf"/session_[\d_-]+_{driver}\b", " ".join(process.cmdline())):
                found.append(process)
    return found
