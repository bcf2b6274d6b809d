"""Faults of what is around a run: it waits for what may pass, says so, and its tables are an undisturbed run's."""

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys

import pytest

from lorc_core.errors import ConfigError
from pipeline.registry.versions import connect
from pipeline.running import connection
from pipeline.waiting import passing_obstacle
from pipeline.zoo.file import load_zoo
from pipeline.zoo.sections import Cluster, Registry
from pipeline.zoo_run import run_zoo
from tests.zoos import TABLES, Noted, copy_of, rows, statuses


class AtFirstNote(Noted):
    """Mends the fault when the run first says that it waits."""

    def __init__(self, mend):
        super().__init__()
        self.mend = mend

    def note(self, line):
        super().note(line)
        if len(self.notes) == 1:
            self.mend()


def undo(work, *steps):
    """As if these steps had not been done."""
    for step in steps:
        shutil.rmtree(work / "steps" / step.key)


def registered_at(work, zoo_file):
    """The zoo, with the MLflow of a finished work directory: a copy's registrations are then the original's."""
    return load_zoo(zoo_file).model_copy(update={"registry": Registry(tracking_uri=f"sqlite:///{work / 'mlflow.db'}")})


def assert_tables_equal(work, other):
    for table in TABLES:
        assert rows(work, table) == rows(other, table), table


@pytest.mark.slow  # sqlite and MLflow try for 15 s by themselves
def test_a_locked_database_is_waited_for(finished, tmp_path):
    zoo_file, work, run = finished
    zoo, copied = registered_at(work, zoo_file), copy_of(work, tmp_path / "work")
    undo(copied, run.models[0].variants[0].register)
    locker = sqlite3.connect(work / "mlflow.db", isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    told = AtFirstNote(lambda: locker.execute("ROLLBACK"))
    again = run_zoo(zoo, copied, listener=told)
    assert not again.failures
    assert statuses(again)["register", "ran"] == 1
    assert "MLflow's database is not available" in told.notes[0]
    assert "locked" in told.notes[0]
    assert_tables_equal(copied, work)
    assert len(connect(f"sqlite:///{work / 'mlflow.db'}").search_model_versions("name='small-llama'")) == 3


@contextlib.contextmanager
def small_disk(place, mebibytes):
    """A file system of its own at `place`; only those may mount who are root and may use what only root may."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("a full disk needs the right to mount one")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_waited_for(finished, tmp_path):
    zoo_file, work, run = finished
    with small_disk(tmp_path / "disk", mebibytes=64) as disk:
        copied = copy_of(work, disk / "work")
        model = run.models[0]
        layer = model.decompose["lorc"][0]
        undo(copied, layer, model.variants[0].variant, model.variants[0].evaluate, model.variants[1].register)

        told = FillsDisk(disk)
        again = run_zoo(registered_at(work, zoo_file), copied, listener=told)
        assert not again.failures
        assert told.notes[0].startswith("the disk is full")
        names = {name for name, status in statuses(again) if status == "ran"}
        assert names == {"decompose", "variant", "evaluate", "register"}
        assert_tables_equal(copied, work)


class FillsDisk(AtFirstNote):
    """Leaves no byte once the run has begun, until it says that it waits."""

    def __init__(self, disk):
        super().__init__(lambda: self.filler.unlink())
        self.disk, self.failures = disk, []

    def plan(self, steps):
        self.filler = self.disk / "filler"
        with contextlib.suppress(OSError), self.filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def record(self, outcome):
        if outcome.status == "failed":
            self.failures.append(outcome)


def test_a_disk_that_stays_full_is_an_outcome_of_one_line(finished, tmp_path):
    zoo_file, work, run = finished
    with small_disk(tmp_path / "disk", mebibytes=64) as disk:
        copied, undone = copy_of(work, disk / "work"), run.models[0].variants[0].evaluate
        undo(copied, undone)
        zoo = registered_at(work, zoo_file).model_copy(update={"cluster": Cluster(wait_s=0)})
        told = FillsDisk(disk)
        with pytest.raises(OSError, match="No space left on device") as error:
            run_zoo(zoo, copied, listener=told)  # its tables cannot be written either
        assert passing_obstacle(error.value).startswith("the disk is full")
        (failure,) = told.failures
        assert failure.key == undone.key
        assert "No space left on device" in failure.error
        assert "\n" not in failure.error
        told.mend()
        assert not run_zoo(zoo, copied).failures
        assert_tables_equal(copied, work)


def test_what_listens_and_is_not_ray_is_told(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "ANSWER_S", 2)  # 10, for who is not in a hurry
    zoo_file, work, run = finished
    copied = copy_of(work, tmp_path / "work")
    undo(copied, run.models[0].variants[0].evaluate)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        zoo = registered_at(work, zoo_file).model_copy(update={"cluster": Cluster(address=address)})
        with pytest.raises(ConfigError, match=f"no Ray cluster at {address}: something listens there"):
            run_zoo(zoo, copied)
    again = run_zoo(registered_at(work, zoo_file), copied)
    assert not again.failures
    assert_tables_equal(copied, work)


def test_a_dead_ray_address_is_an_error_where_only_registrations_are_left(finished, tmp_path):
    zoo_file, work, run = finished
    copied = copy_of(work, tmp_path / "work")
    undo(copied, run.models[0].variants[0].register)
    zoo = registered_at(work, zoo_file).model_copy(update={"cluster": Cluster(address="127.0.0.1:1")})
    with pytest.raises(ConfigError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        run_zoo(zoo, copied)
    run_zoo(registered_at(work, zoo_file), copied)
    assert_tables_equal(copied, work)


@pytest.mark.slow
def test_a_server_that_is_away_is_waited_for(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    zoo_file, work, _ = finished
    copied = copy_of(work, tmp_path / "work")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    zoo = load_zoo(zoo_file).model_copy(update={"registry": Registry(tracking_uri=uri)})
    servers = []

    def serve():
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
        command += [
            "--backend-store-uri",
            f"sqlite:///{tmp_path / 'server.db'}",
            "--artifacts-destination",
            str(tmp_path),
        ]
        servers.append(subprocess.Popen(command, start_new_session=True))

    try:
        told = AtFirstNote(serve)
        run = run_zoo(zoo, copied, listener=told)
    finally:
        for server in servers:
            os.killpg(server.pid, 15)
            server.wait()
    assert not run.failures
    assert statuses(run)["register", "ran"] == 6
    assert told.notes[0].startswith("MLflow does not answer")
    assert_tables_equal(copied, work)
