"""Step identity: stable between processes, moved by every field of the recipe; artifacts whole or absent."""

import json
import os
import subprocess
import sys

import pytest

from lorc_core.errors import ConfigError
from pipeline.steps.step import Step, cached_outcomes, distinct
from pipeline.storage.store import Store

RECIPE = {"model_fingerprint": "abc", "method": "lorc", "layer_idx": 3, "fields": {"b": [1, 2], "a": None}}


def step(**changes):
    return Step(name="decompose", model="m", recipe={**RECIPE, **changes})


def test_fingerprint_is_the_same_in_another_process():
    script = (
        "import json, sys; from pipeline.steps.step import Step;"
        "print(Step(name='decompose', model='m', recipe=json.loads(sys.argv[1])).fingerprint)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(RECIPE)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == step().fingerprint


def test_fingerprint_moves_with_every_field_of_the_recipe():
    moved = [step(**{name: "changed"}).fingerprint for name in RECIPE]
    assert len({step().fingerprint, *moved}) == len(RECIPE) + 1


def test_fingerprint_moves_with_inputs_and_name_but_not_with_places():
    base = step()
    assert Step(name="variant", model="m", recipe=RECIPE).fingerprint != base.fingerprint
    assert Step(name="decompose", model="m", recipe=RECIPE, inputs={"layers": (base,)}).fingerprint != base.fingerprint
    assert Step(name="decompose", model="other", recipe=RECIPE, places={"model_dir": "/x"}).key == base.key


def test_distinct_orders_inputs_first_and_keeps_each_once():
    one, two = step(layer_idx=1), step(layer_idx=2)
    schedule = Step(name="schedule", model="m", recipe={}, inputs={"layers": (one, two)})
    variant = Step(name="variant", model="m", recipe={}, inputs={"ranks": schedule, "layers": (one, two)})
    assert distinct([variant, schedule]) == [schedule.inputs["layers"][0], two, schedule, variant]


def test_an_artifact_appears_whole_with_its_manifest(tmp_path):
    store = Store(tmp_path)
    with store.writing(store.path(step())) as scratch:
        (scratch / "a.txt").write_text("a")
        assert not store.is_done(step())
    assert store.is_done(step())
    assert list(cached_outcomes([step(), step(layer_idx=9)], store)) == [step().key]
    assert sorted(path.name for path in store.path(step()).iterdir()) == ["a.txt", "manifest.json"]


def test_a_failed_write_leaves_nothing(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="half"), store.writing(store.path(step())) as scratch:
        (scratch / "a.txt").write_text("a")
        raise RuntimeError("half way")
    assert list(store.steps.iterdir()) == []


def test_a_finished_artifact_is_never_replaced(tmp_path):
    """Two runs on one work directory may do the same step; readers of the first keep their files."""
    store = Store(tmp_path)
    for content in ("first", "second"):
        with store.writing(store.path(step())) as scratch:
            (scratch / "a.txt").write_text(content)
    assert (store.path(step()) / "a.txt").read_text() == "first"
    assert len(list(store.steps.iterdir())) == 1


def test_an_artifact_without_its_manifest_is_written_again(tmp_path):
    store = Store(tmp_path)
    for content in ("old", "new"):
        with store.writing(store.path(step())) as scratch:
            (scratch / "a.txt").write_text(content)
        if content == "old":
            (store.path(step()) / "manifest.json").unlink()
            assert not store.is_done(step())
    assert (store.path(step()) / "a.txt").read_text() == "new"


def test_a_work_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"work directory .* is not writable"):
        Store(tmp_path / "file" / "work")
