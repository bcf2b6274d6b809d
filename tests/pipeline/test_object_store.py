"""A work directory in an object store, on moto's S3: artifacts, one run at a time, a run that was killed and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import boto3
import fsspec
import pytest

from lorc_core.errors import ConfigError
from lorc_core.manifest import DamagedArtifactError, checked_file
from pipeline.status.keeping import kept_status
from pipeline.storage import remote_lease as leases
from pipeline.storage.holding import held_store
from pipeline.storage.lease import Holder
from pipeline.storage.mirror import open_store
from tests.servers import object_store
from tests.zoos import TABLES, rows, write_zoo


@dataclass(frozen=True)
class Made:
    key: str = "made-1"


@pytest.fixture
def work(monkeypatch, tmp_path):
    with object_store(monkeypatch) as bucket:
        monkeypatch.setenv("LORC_CACHE", str(tmp_path / "cache"))
        yield f"{bucket}/work"


@pytest.fixture
def elsewhere(work, monkeypatch, tmp_path):
    """The same work directory as another machine opens it."""

    def opened():
        monkeypatch.setenv("LORC_CACHE", str(tmp_path / "another"))
        return open_store(work)

    return opened


def write(store, step=None, **files):
    with store.writing(step or Made()) as scratch:
        for name, content in files.items():
            (scratch / name).write_text(content)


def objects(prefix="work"):
    listed = boto3.client("s3").list_objects_v2(Bucket="zoo", Prefix=prefix)
    return [entry["Key"] for entry in listed.get("Contents", [])]


def test_what_is_removed_is_gone_on_every_machine_and_may_be_made_again(work, elsewhere):
    store = open_store(work)
    write(store, a="once")
    write(store, Made("made-2"), a="stays")
    other = elsewhere()
    store.remove("made-1")
    store.remove("made-1")
    assert [name for name in objects() if "made-1" in name] == []
    assert (store.is_done(Made()), other.is_done(Made()), other.is_done(Made("made-2"))) == (False, False, True)
    write(other, a="again")
    assert (store.path(Made()) / "a").read_text() == "again"


def test_an_artifact_is_everyones_and_only_what_is_read_of_it_is_fetched(work, elsewhere):
    store = open_store(work)
    assert not store.is_done(Made())
    assert store.finished([Made()]) == set()
    write(store, small="a", large="b" * 1000)
    other = elsewhere()
    assert other.root != store.root
    assert other.is_done(Made())
    assert other.finished([Made(), Made("made-2")]) == {"made-1"}
    assert other.cost(Made()) == store.cost(Made())
    assert not (other.steps / "made-1").exists(), "to know that it is done, nothing is fetched"
    path = other.path(Made(), "small")
    assert checked_file(path / "small").read_text() == "a"
    assert not (path / "large").exists()
    assert checked_file(other.path(Made()) / "large").read_text() == "b" * 1000


def test_of_two_workers_the_first_to_finish_counts(work, elsewhere):
    """Neither sees the other's files, and what both then read is one whole artifact."""
    store = open_store(work)
    with store.writing(Made()) as scratch:
        (scratch / "a").write_text("first")
        other = elsewhere()
        with other.writing(Made()) as slower:
            (slower / "a").write_text("second")
            write(store, Made("made-2"), b="x")
    # the inner one ended first
    for opened in (store, elsewhere()):
        shutil.rmtree(opened.steps / "made-1", ignore_errors=True)
        assert checked_file(opened.path(Made()) / "a").read_text() == "second"


def test_a_damaged_copy_is_told_and_the_artifact_is_made_again(work, elsewhere):
    store = open_store(work)
    write(store, a="whole")
    (store.path(Made()) / "a").write_text("cut")
    with pytest.raises(DamagedArtifactError):
        checked_file(store.path(Made()) / "a")
    store.forget("made-1")
    store.put_aside("made-1")
    assert not store.is_done(Made())
    assert any("damaged/made-1" in name for name in objects())
    write(store, a="again")
    assert checked_file(elsewhere().path(Made()) / "a").read_text() == "again"


def test_what_was_published_is_known_elsewhere(work, elsewhere):
    store = open_store(work)
    place = store.place("candidates", "zoo.json")
    place.write_text("{}")
    store.publish(place)
    assert elsewhere().known("candidates", "zoo.json").read_text() == "{}"
    place.unlink()
    store.publish(place)
    assert objects("work/candidates") == []
    assert not elsewhere().known("candidates", "other.json").exists()


def test_a_second_run_is_refused_by_the_first_ones_process_and_may_begin_when_that_ends(work):
    with held_store(work):
        told = rf"work directory {work} is in use by process {os.getpid()} on .*heartbeat \d s ago"
        with pytest.raises(ConfigError, match=told), held_store(work):
            pass
    with held_store(work):
        pass
    assert objects("work/lease") == []


def other_machines(store, number=1):
    holder = Holder("elsewhere", 1, 0.0, "2026-01-01 00:00:00", "token")
    store.system.pipe_file(leases.lease_url(store, number), leases.content(holder))
    return holder


def test_a_lease_whose_heartbeat_stopped_is_taken_over(work, monkeypatch):
    store = open_store(work)
    other_machines(store)
    with pytest.raises(ConfigError, match="in use by process 1 on elsewhere"), held_store(work):
        pass
    monkeypatch.setattr("pipeline.storage.lease.EXPIRES_S", -1)
    with held_store(work):
        assert objects("work/lease") == ["work/lease/00000002.json"]


def test_a_run_that_was_taken_over_stops(work, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.1)
    store = open_store(work)
    with pytest.raises(ConfigError, match="taken over by process 1 on elsewhere"), held_store(work):
        other_machines(store, number=2)
        for _ in range(200):  # where a signal can come in
            time.sleep(0.1)
    assert objects("work/lease") == ["work/lease/00000002.json"]


def test_a_heartbeat_makes_a_lease_younger(work, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.2)
    store = open_store(work)
    with held_store(work):
        time.sleep(3)  # the object store's clock has whole seconds
        assert leases.age(store, leases.lease_url(store, 1)) <= 1


def test_attempts_are_counted_over_machines_and_their_note_goes_everywhere(work, elsewhere):
    store = open_store(work)
    assert [store.begin("made-1"), elsewhere().begin("made-1"), store.begin("made-1")] == [1, 2, 3]
    write(elsewhere())
    assert objects("work/begun") == []
    assert store.begin("made-1") == 1, "what this machine noted is not what is known"


def test_status_is_told_from_the_object_store(work):
    with held_store(work) as store, kept_status(store, "far"):
        code, out = told(lorc("status", work))
        assert (code, f"runs: zoo far, process {os.getpid()} on " in out) == (0, True), out
    code, out = told(lorc("status", work))
    assert (code, "ended at " in out) == (0, True), out
    assert told(lorc("status", f"{work}/nothing"))[0] == 2


def told(done):
    return done.returncode, done.stdout + done.stderr


def test_without_an_mlflow_server_a_run_is_refused_before_anything_is_done(work, tmp_path):
    zoo_file = write_zoo(tmp_path)
    ran = lorc("run", zoo_file, "--workdir", work)
    assert ran.returncode == 2
    assert "set MLFLOW_TRACKING_URI" in ran.stderr


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://no-such-bucket/work", "cannot be written to: The specified bucket does not exist"),
        ("nosuch://a/b", "Protocol not known: nosuch"),
    ],
)
def test_an_object_store_that_is_not_there_is_told_in_a_line(work, url, told):
    with pytest.raises(ConfigError, match=f"work directory {url}.*{told}"):
        open_store(url)


def test_absent_credentials_are_told_in_a_line(work, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ConfigError, match=f"work directory {work} cannot be written to: Unable to locate credentials"):
        open_store(work)
    ran = lorc("plan", write_zoo(tmp_path), "--workdir", work)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr


def lorc(*arguments, **environment):
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"RAY_ADDRESS": ""} | environment)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_from_another_machine_to_the_same_tables(work, tmp_path):
    zoo_file = write_zoo(tmp_path)
    whole = lorc("run", zoo_file, "--workdir", tmp_path / "here")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    mlflow = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    command = [sys.executable, "-m", "jobs.cli", "run", str(zoo_file), "--workdir", work]
    with (tmp_path / "printed.txt").open("w") as printed:
        process = subprocess.Popen(
            command,
            env=os.environ | mlflow | {"RAY_ADDRESS": ""},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while len(objects("work/done")) < 4:
            assert process.poll() is None, (tmp_path / "printed.txt").read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = set(objects("work/done"))
    stamps = {name: boto3.client("s3").head_object(Bucket="zoo", Key=name)["LastModified"] for name in done}
    resumed = lorc("run", zoo_file, "--workdir", work, LORC_CACHE=str(tmp_path / "another"), **mlflow)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    after = {name: boto3.client("s3").head_object(Bucket="zoo", Key=name)["LastModified"] for name in done}
    assert after == stamps, "a finished step was done again"
    fetched = tmp_path / "fetched"
    fsspec.filesystem("s3").get(f"{work}/tables", str(fetched / "tables"), recursive=True)
    for table in TABLES:
        assert rows(fetched, table) == rows(tmp_path / "here", table), table
    note = json.loads(fsspec.filesystem("s3").cat_file(f"{work}/candidates/tiny.json"))
    assert note["chosen"] == json.loads((tmp_path / "here" / "candidates" / "tiny.json").read_text())["chosen"]
    again = lorc("run", zoo_file, "--workdir", work, **mlflow)
    assert "0 steps ran" in again.stdout
