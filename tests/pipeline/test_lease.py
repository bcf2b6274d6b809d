"""One run at a time in a work directory; a lease whose holder is gone expires."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from lorc_core.errors import ConfigError
from pipeline.storage import lease as lease_module
from pipeline.storage.holding import held_store
from pipeline.storage.lease import LEASE_FILE, Holder, lease
from pipeline.zoo.file import load_zoo

HOLD = "import sys, time; from pathlib import Path; from pipeline.storage.lease import lease\nwith lease(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"


def write_lease(directory, holder, age_s=0.0):
    path = directory / LEASE_FILE
    path.write_text(json.dumps(asdict(holder)))
    stamp = path.stat().st_mtime - age_s
    os.utime(path, (stamp, stamp))


def held_by(directory):
    return json.loads((directory / LEASE_FILE).read_text())


def until(condition):
    """Wait; the test's own time limit ends it."""
    while not condition():
        time.sleep(0.05)


def test_a_second_run_is_refused_by_process_and_host(tmp_path):
    with lease(tmp_path), pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "), lease(tmp_path):
        pass


def test_a_lease_given_back_leaves_nothing(tmp_path):
    with lease(tmp_path):
        pass
    with lease(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_failure_gives_the_lease_back(tmp_path):
    with pytest.raises(KeyError), lease(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_killed_process_of_this_machine_loses_its_lease_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {process.pid} on "), lease(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with lease(tmp_path):
        assert held_by(tmp_path)["pid"] == os.getpid()


def test_a_new_process_with_the_number_of_a_dead_one_is_another(tmp_path):
    mine = Holder.this_process()
    write_lease(tmp_path, replace(mine, process_started=mine.process_started - 1000, token="dead"))
    with lease(tmp_path):
        assert held_by(tmp_path)["token"] != "dead"


def test_a_holder_elsewhere_keeps_its_lease_while_its_heart_beats(tmp_path):
    elsewhere = replace(Holder.this_process(), host="another-machine")
    write_lease(tmp_path, elsewhere, age_s=lease_module.EXPIRES_S - 10)
    with pytest.raises(ConfigError, match=r"on another-machine, since .* \(heartbeat 5\d s ago\)"), lease(tmp_path):
        pass
    write_lease(tmp_path, elsewhere, age_s=lease_module.EXPIRES_S + 1)
    with lease(tmp_path):
        assert held_by(tmp_path)["host"] != "another-machine"


def test_the_heartbeat_renews_the_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    with lease(tmp_path):
        os.utime(tmp_path / LEASE_FILE, (0, 0))
        until(lambda: (tmp_path / LEASE_FILE).stat().st_mtime > 0)
        assert held_by(tmp_path)["pid"] == os.getpid()


def test_a_process_of_this_machine_that_stands_still_keeps_its_lease(tmp_path):
    """As after Ctrl-Z: its heart beats no more, and it may go on at any time."""
    with lease(tmp_path):
        write_lease(tmp_path, Holder(**held_by(tmp_path)), age_s=10 * lease_module.EXPIRES_S)
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "), lease(tmp_path):
            pass


@pytest.fixture
def ignored_sigint():
    """As of what nohup or a script runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_run_whose_lease_was_taken_over_is_stopped(tmp_path, monkeypatch, ignored_sigint):
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    other = replace(Holder.this_process(), host="another-machine", token="other")
    with pytest.raises(ConfigError, match=r"was taken over by process .* on another-machine"), lease(tmp_path):
        write_lease(tmp_path, other)
        until(lambda: False)
    assert held_by(tmp_path)["token"] == "other"


def test_a_lease_that_was_taken_over_is_not_given_back_for_the_new_holder(tmp_path):
    other = replace(Holder.this_process(), token="other")
    with lease(tmp_path):
        write_lease(tmp_path, other)
    assert held_by(tmp_path)["token"] == "other"


def test_a_damaged_lease_is_put_aside(tmp_path):
    (tmp_path / LEASE_FILE).write_text("{")
    with lease(tmp_path):
        assert held_by(tmp_path)["pid"] == os.getpid()


def test_of_many_processes_at_once_one_holds_the_lease(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    until(lambda: sum(process.poll() is not None for process in processes) == 2)
    (holder,) = (process for process in processes if process.poll() is None)
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    for process in processes:
        _, err = process.communicate()
        assert process is holder or f"in use by process {holder.pid} on " in err


def test_a_zoo_is_not_run_in_a_directory_that_another_run_holds(tmp_path):
    from pipeline.zoo_run import run_zoo
    from tests.zoos import write_zoo

    zoo = load_zoo(write_zoo(tmp_path))
    (tmp_path / "work").mkdir()
    with lease(tmp_path / "work"), pytest.raises(ConfigError, match="work is in use by process"):
        run_zoo(zoo, tmp_path / "work")


def test_a_held_store_is_without_the_scratch_of_dead_runs(tmp_path):
    scratch = tmp_path / "steps" / ".decompose-0123-abcd"
    scratch.mkdir(parents=True)
    (scratch / "layer.safetensors").write_bytes(bytes(10))
    (tmp_path / "steps" / "decompose-0123").mkdir()
    with held_store(tmp_path):
        assert [path.name for path in (tmp_path / "steps").iterdir()] == ["decompose-0123"]
