"""What a step took is what it took alone: memory, bytes read, attempts; on Ray, with workers that are lost."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from lorc_core.errors import NumericsError
from pipeline.running.runner import run_steps
from pipeline.running.work import run_group
from pipeline.steps.outcome import Listener, Outcome
from pipeline.steps.step import FileStep, Place, Recipe
from pipeline.storage import cost
from pipeline.storage.store import Store
from pipeline.zoo.sections import Cluster

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class HoldStep(FileStep):
    """Holds memory for a moment; all of a name run in one worker."""

    name = "hold"
    revision = 1

    number: Recipe[int]
    num_bytes: Recipe[int]

    @property
    def group(self):
        return "hold"

    def run(self, output, store):
        held = bytearray(b"x") * self.num_bytes
        (output / "size").write_text(str(len(held)))


@dataclass(frozen=True, kw_only=True)
class LostStep(FileStep):
    """Its worker is killed the first times."""

    name = "lost"
    revision = 1

    number: Recipe[int]
    times: Place[int]
    begun: Place[Path]

    def run(self, output, store):
        with self.begun.open("a") as file:
            file.write("x")
        if len(self.begun.read_text()) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        (output / "pid").write_text(str(os.getpid()))


@dataclass(frozen=True, kw_only=True)
class TroubledStep(FileStep):
    """Fails while a file is there."""

    name = "troubled"
    revision = 1

    trouble: Place[Path]
    number: Recipe[int] = 0

    def run(self, output, store):
        if self.trouble.exists():
            bytearray(b"x") * (50 * MIB)
            raise NumericsError("NaN")


def outcomes_of(steps, store):
    return [told for told in run_group(steps, store) if isinstance(told, Outcome)]


def test_memory_that_one_step_held_is_not_the_next_ones(ray_cluster, tmp_path):
    steps = [HoldStep(model="m", number=n, num_bytes=size) for n, size in enumerate((0, 200 * MIB, 0))]
    before, large, after = run_steps(steps, {}, Store(tmp_path), Cluster(), Listener())
    assert large.cost.peak_bytes - before.cost.peak_bytes > 190 * MIB
    assert abs(after.cost.peak_bytes - before.cost.peak_bytes) < 50 * MIB
    assert large.cost.cpu_s > 0


def test_a_lost_worker_counts_as_an_attempt_and_leaves_no_note(ray_cluster, tmp_path):
    store = Store(tmp_path / "work")
    steps = [LostStep(model="m", number=times, times=times, begun=tmp_path / f"begun-{times}") for times in (0, 1)]
    outcomes = run_steps(steps, {}, store, Cluster(), Listener())
    assert [outcome.status for outcome in outcomes] == ["ran", "ran"]
    assert [outcome.cost.attempts for outcome in outcomes] == [1, 2]
    assert not list((tmp_path / "work" / "begun").iterdir())


def test_attempts_go_on_over_runs_that_failed(tmp_path):
    step = TroubledStep(model="m", trouble=tmp_path / "trouble")
    step.trouble.touch()
    for attempts in (1, 2):
        (failed,) = outcomes_of([step], Store(tmp_path / "work"))
        assert failed.status == "failed"
        assert failed.cost.attempts == attempts
        assert failed.cost.wall_s > 0
    step.trouble.unlink()
    (ran,) = outcomes_of([step], Store(tmp_path / "work"))
    assert ran.cost.attempts == 3
    assert failed.cost.peak_bytes > ran.cost.peak_bytes + 40 * MIB
    assert not list((tmp_path / "work" / "begun").iterdir())


def test_a_note_whose_step_was_done_when_its_worker_was_lost_goes_with_the_next_run(tmp_path):
    done = TroubledStep(model="m", trouble=tmp_path / "trouble")
    other = TroubledStep(model="m", trouble=tmp_path / "trouble", number=1)
    store = Store(tmp_path)
    outcomes_of([done], store)
    for step in (done, other):
        store.begin(step.key)
    store.remove_scratch()
    assert [note.stem for note in (tmp_path / "begun").iterdir()] == [other.key]


def test_a_decomposition_reads_its_weights_and_not_the_models(finished, tmp_path):
    """The second one in this process: the first reads code, too."""
    _, _, run = finished
    layers = run.models[0].decompose["lorc"]
    store = Store(tmp_path)
    _, second = outcomes_of(layers[:2], store)
    file = Path(layers[1].location.directory(weights=True)) / "model.safetensors"
    tensors = load_file(file)
    least = sum(tensors[f"model.layers.1.self_attn.{kind}_proj.weight"].nbytes for kind in "kv")
    assert least <= second.cost.read_bytes < least + 64 * 1024 < file.stat().st_size
    assert second.cost.cpu_s > 0


def test_what_the_system_does_not_tell_is_none(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(cost.Path, "write_text", refuse)
    meter = cost.Meter()
    monkeypatch.undo()
    assert meter.cost().peak_bytes is None


def test_outcomes_tell_what_every_step_cost(finished):
    _, work, _ = finished
    for row in pq.read_table(work / "tables" / "outcomes" / "tiny.parquet").to_pylist():
        assert row["cpu_s"] > 0
        assert row["peak_bytes"] > 10 * MIB
        assert row["read_bytes"] > 0
        assert row["attempts"] >= 1


@pytest.mark.parametrize("content", ['{"step": "KEY", "elapsed_s": 1.0, "host": "a"}'])
def test_costs_of_another_schema_make_an_artifact_a_damaged_one(tmp_path, content):
    from lorc_core.manifest import DamagedArtifactError, write_manifest

    step, store = TroubledStep(model="m", trouble=tmp_path / "trouble"), Store(tmp_path)
    outcomes_of([step], store)
    (store.path(step) / "cost.json").write_text(content.replace("KEY", step.key))
    write_manifest(store.path(step))
    with pytest.raises(DamagedArtifactError, match="another schema"):
        store.cost(step)
