"""Ctrl-C and SIGTERM: a line that says what is kept, and the same command goes on."""

import contextlib
import signal
import subprocess
import sys

import pytest

from tests.zoos import write_zoo


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_what_is_kept_and_leaves_no_process(number, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = [sys.executable, "-m", "jobs.cli", "run", str(write_zoo(tmp_path)), "--workdir", str(tmp_path / "work")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list((tmp_path / "work").glob("steps/decompose-*/manifest.json")):  # the time limit ends it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
        assert process.poll() is None
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; what is finished stays in" in printed
    assert "Traceback" not in printed
    assert "*** SIG" not in printed
    assert not (tmp_path / "work" / "lease.json").exists()
