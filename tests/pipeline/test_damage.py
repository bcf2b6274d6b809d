"""Artifacts that were cut or swapped are put aside and made again; the tables are those of an undisturbed run."""

import shutil

import pytest

from pipeline.candidates import candidates
from pipeline.storage.store import Store
from pipeline.zoo.file import load_zoo
from pipeline.zoo_run import run_zoo
from tests.zoos import TABLES, Noted, copy_of, rows


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.fixture
def damaged(finished, tmp_path):
    """A copy of a finished work directory, and the directories of its first model's steps."""
    zoo_file, work, run = finished
    copy_of(work, tmp_path / "work")
    steps = tmp_path / "work" / "steps"
    return load_zoo(zoo_file), tmp_path / "work", work, lambda step: steps / step.key, run.models[0]


def test_damaged_artifacts_are_put_aside_and_made_again(damaged):
    zoo, work, untouched, place, model = damaged
    first, second = model.variants[:2]
    cut(place(first.evaluate) / "scores.parquet")  # read for the tables
    shutil.copy(place(model.baseline) / "window_losses.parquet", place(second.evaluate))  # swapped
    shutil.rmtree(place(first.variant))  # so that it is made from layers again
    layer = model.decompose["lorc"][0]
    cut(place(layer) / "layer.safetensors")
    told = Noted()
    again = run_zoo(zoo, work, until="evaluate", listener=told)
    assert not again.failures
    for table in TABLES:
        assert rows(work, table) == rows(untouched, table)
    aside = sorted(path.name.rpartition("-")[0] for path in (work / "damaged").iterdir())
    assert aside == sorted(step.key for step in (first.evaluate, second.evaluate, layer))
    for key in aside:
        assert sum(line.startswith(f"{key} was damaged") for line in told.notes) == 1


def test_an_artifact_in_the_place_of_another_is_put_aside_and_made_again(damaged):
    """Each file of it is as its manifest says: its step is not."""
    zoo, work, untouched, place, model = damaged
    first, second = model.variants[:2]
    shutil.rmtree(place(second.evaluate))
    shutil.copytree(place(first.evaluate), place(second.evaluate))
    told = Noted()
    again = run_zoo(zoo, work, until="evaluate", listener=told)
    assert [outcome.key for outcome in again.outcomes if outcome.status == "ran"] == [second.evaluate.key]
    assert rows(work, "scores") == rows(untouched, "scores")
    assert told.notes[0].startswith(f"{second.evaluate.key} was damaged")


def test_what_is_damaged_again_is_an_error_and_not_made_for_ever(damaged, monkeypatch):
    """A worker cannot read what another wrote a moment ago: as on a disk that is not sound."""
    zoo, work, untouched, place, model = damaged
    first = model.variants[0]
    layer = place(model.decompose["lorc"][0]) / "layer.safetensors"
    shutil.rmtree(place(first.variant))
    put_aside = Store.put_aside

    def stays_damaged(store, key):
        aside = put_aside(store, key)
        shutil.copytree(aside, store.steps / key)  # as if it were made again, and again damaged
        return aside

    cut(layer)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_aside", stays_damaged)
        run = run_zoo(zoo, work, until="evaluate", listener=(told := Noted()))
    assert len(told.notes) == 1
    assert {outcome.key for outcome in run.failures} == {first.variant.key}
    assert "layer.safetensors: altered after it was written" in run.failures[0].error
    shutil.rmtree(layer.parent)
    assert not run_zoo(zoo, work, until="evaluate").failures
    assert rows(work, "scores") == rows(untouched, "scores")


def test_a_run_that_finds_all_whole_puts_nothing_aside(damaged):
    zoo, work, _, _, _ = damaged
    assert all(outcome.status == "cached" for outcome in run_zoo(zoo, work, until="evaluate").outcomes)
    assert not (work / "damaged").exists()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_note_of_the_candidates_counts_as_none(damaged, content):
    zoo, work, _, _, _ = damaged
    assert candidates(zoo, Store(work))
    (work / "candidates" / "tiny.json").write_text(content)
    assert not candidates(zoo, Store(work))
