"""Step identity: stable between processes, moved by every field of the recipe; artifacts whole or absent."""

import inspect
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorc_core.compression import decompose_layer
from lorc_core.decomposition.position_average import over_positions
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.manifest import check_manifest
from lorc_core.measurement.calibration import calibrate
from lorc_core.methods import METHODS, Axes
from lorc_core.model.kinds import KeysValues
from lorc_core.model.stored.checkpoint import Checkpoint
from lorc_core.model.stored.weights import layer_digest
from lorc_core.ranks.schedules import Sensitivity
from pipeline.running.runner import run_steps
from pipeline.running.work import run_group
from pipeline.steps.graph import calibrated_steps, decompose_step, model_steps
from pipeline.steps.outcome import Listener, Outcome
from pipeline.steps.ranks import SearchStep
from pipeline.steps.step import FileStep, Input, ModelLoad, Pin, Place, Recipe, Step, distinct
from pipeline.storage.artifacts import load_layer, save_digest, save_moments
from pipeline.storage.store import Store
from pipeline.zoo.file import load_zoo
from pipeline.zoo.models import resolve
from pipeline.zoo.sections import Cluster, ModelEntry
from tests.models import save_tiny_model
from tests.paths import REPOSITORY
from tests.zoos import kinds_of_steps

WIDE = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 1000,
}


@dataclass(frozen=True, kw_only=True)
class ProjectStep(FileStep):
    """A field of every role."""

    name = "project"
    revision = 3

    axes: Recipe[KeysValues[Axes]]
    layer_idx: Recipe[int]
    model_fingerprint: Pin[str]
    model_dir: Place[Path] = Path("/m")
    layers: Input[tuple[Step, ...]] = ()
    trained: Input[Step | None] = None
    failure: Place[Exception | None] = None

    def run(self, output, store):
        if self.failure is not None:
            raise self.failure
        (output / "a.txt").write_text("a")


def step(layer_idx=3, reader="none", **changes):
    axes = KeysValues(Axes("weights", reader), Axes("weights"))
    return ProjectStep(**{"model": "m", "axes": axes, "layer_idx": layer_idx, "model_fingerprint": "abc", **changes})


IMPORTS = """
from lorc_core.ranks.schedules import Sensitivity
from pipeline.steps.ranks import SearchStep
from pipeline.steps.step import ModelLoad
"""


def search_step():
    """Of a kind with nested fields."""
    loads = ModelLoad("/m", "float32", False, "abc", {"torch": "2", "numpy": "1"})
    recipe = {"batch_size": 1, "num_windows": 2, "schedule": Sensitivity(skip_layers=(0,))}
    return SearchStep(model="m", loads=loads, **recipe, windows=(), layers=(), ranks=None)


def test_fingerprint_is_the_same_in_another_process():
    script = f"{IMPORTS}\n{inspect.getsource(search_step)}\nprint(search_step().fingerprint)"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == search_step().fingerprint


def test_fingerprint_moves_with_recipe_pins_and_inputs():
    moved = [
        step(),
        step(layer_idx=4),
        step(reader="interaction"),
        step(model_fingerprint="abd"),
        step(trained=step(1)),
        step(layers=(step(1),)),
        step(layers=(step(1), step(2))),
        step(layers=(step(2), step(1))),
    ]
    assert len({each.key for each in moved}) == len(moved)


def test_fingerprint_stays_with_the_model_the_variant_and_places():
    assert step(model="other", label="v", model_dir=Path("/x"), need=None).key == step().key


def test_every_field_of_every_kind_has_one_role_and_no_two_kinds_one_name():
    """A field without a role would be missing from the identity without a word."""
    import pipeline.regression  # with `graph`, which is imported above, all kinds are declared

    assert pipeline.regression.RegressStep
    kinds = list(kinds_of_steps())
    labels = {"model", "need", "loads"}  # `loads` tells its part of the identity itself
    for kind in kinds:
        assert is_dataclass(kind)
        for spec in fields(kind):
            roles = getattr(spec.type, "__metadata__", ())
            assert (spec.name in labels or spec.type == str | None) ^ (len(roles) == 1), (kind, spec.name)
    names = [kind.name for kind in kinds]
    assert len(names) == len(set(names)) >= 14


def test_identities_are_those_of_finished_work_directories(tmp_path):
    """A change of any of these makes all work directories begin again: raise a revision, and say why, or mend it."""
    zoo = load_zoo(REPOSITORY / "examples" / "demo.yaml")
    steps = model_steps(zoo, resolve(zoo.models[0], Store(tmp_path)), "sqlite://")
    assert steps.windows[0].key == "windows-5cb2f693831a727baaff"
    assert steps.decompose["lorc"][0].key == "decompose-18db136677c4436df9a0"
    assert steps.variants[0].schedule.key == "schedule-f09bc7335de5977ee357"


@pytest.mark.parametrize(("calibrated", "context"), [(256, None), (64, 256)])
def test_rotated_keys_are_averaged_over_the_windows_that_are_evaluated_where_those_are_longer(
    tmp_path, calibrated, context
):
    """The control: keys before the rotation, and complex blocks, are the same at every position."""
    zoo = load_zoo(REPOSITORY / "examples" / "demo.yaml")
    zoo = zoo.model_copy(update={"calibration": zoo.calibration.model_copy(update={"window_tokens": calibrated})})
    model = resolve(zoo.models[0], Store(tmp_path))
    shared = calibrated_steps(zoo, model)
    found = {name: decompose_step(model, METHODS[name], 0, shared) for name in ("kq_svd", "kq_joint", "phasor_freq")}
    assert {name: one.context_tokens for name, one in found.items()} == {
        "kq_svd": context,
        "kq_joint": None,
        "phasor_freq": None,
    }
    assert all(one.calibrated == shared.shards for one in found.values())


def test_a_decomposition_averaged_over_a_context_is_that_of_moments_over_positions(tmp_path):
    """From the files of the steps before it; the control is the step without a context."""
    zoo = load_zoo(REPOSITORY / "examples" / "demo.yaml")
    store = Store(tmp_path)
    settings = zoo.calibration.model_copy(update={"window_tokens": 64, "num_windows": 8, "probe_windows": 8})
    model = resolve(zoo.models[0], store)
    shared = calibrated_steps(zoo.model_copy(update={"calibration": settings}), model)
    loaded = AutoModelForCausalLM.from_pretrained(model.location.directory(weights=True)).eval()
    moments = calibrate(loaded, [torch.randint(3, 1000, (8, 64), generator=torch.Generator().manual_seed(0))])
    (shard,) = shared.shards
    with store.writing(shard) as scratch:
        save_moments(scratch, moments)
    wanted = decompose_step(model, METHODS["kq_svd"], 0, shared)
    for one in (wanted, replace(wanted, context_tokens=None)):
        with store.writing(one) as scratch:
            one.run(scratch, store)
        measured = moments[0]
        if one.context_tokens is not None:
            measured = over_positions(measured, model.architecture, 0, 256)
        expected = decompose_layer(
            Checkpoint(model.location.files()), model.architecture, 0, METHODS["kq_svd"], measured
        )
        found = load_layer(store.path(one))["keys"].read_energies
        torch.testing.assert_close(found, expected["keys"].read_energies.to(found.dtype))
    one, other = (
        load_layer(store.path(each))["keys"].read_energies for each in (wanted, replace(wanted, context_tokens=None))
    )
    assert (one - other).abs().max() > 0.01 * one.max()


def test_distinct_orders_inputs_first_and_keeps_each_once():
    one, two = step(1), step(2)
    trained = step(5, layers=(one, two))
    last = step(6, trained=trained, layers=(one, step(2)))
    assert [each.layer_idx for each in distinct([last, trained])] == [1, 2, 5, 6]


def outcomes_of(steps, store):
    return [told for told in run_group(steps, store) if isinstance(told, Outcome)]


def test_whatever_a_step_raises_is_its_outcome_with_a_log(tmp_path):
    """The others of its group run; a LorcError's message stays what it is, another names the log."""
    store = Store(tmp_path)
    ours = step(1, label="v", failure=NumericsError("layer 3 keys: NaN"))
    foreign = step(2, failure=IndexError("index out of range\nin self"))
    outcomes = outcomes_of([ours, foreign, step(3)], store)
    assert [outcome.status for outcome in outcomes] == ["failed", "failed", "ran"]
    assert [outcome.variant for outcome in outcomes] == ["v", None, None]
    assert outcomes[0].error == "layer 3 keys: NaN"
    assert outcomes[1].error == f"IndexError: index out of range (trace in {tmp_path / 'logs' / foreign.key}.log)"
    for each in (ours, foreign):
        log = store.log(each.key).read_text()
        assert log.startswith("Traceback")
        assert str(each.failure) in log
        assert "raise self.failure" in log
    assert sorted(path.name for path in store.steps.iterdir()) == [step(3).key]


def test_a_log_goes_when_the_step_is_done(tmp_path):
    store = Store(tmp_path)
    list(run_group([step(failure=ValueError("once"))], store))
    assert store.log(step().key).is_file()
    list(run_group([step()], store))
    assert not store.log(step().key).exists()


def test_a_failure_whose_log_cannot_be_written_is_still_one_line(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "logs").write_text("no directory")
    (outcome,) = outcomes_of([step(failure=OSError(28, "No space left on device"))], store)
    assert outcome.error == "OSError: [Errno 28] No space left on device (its trace cannot be written: File exists)"


def test_a_bug_of_the_runner_stops_the_job(tmp_path):
    class Broken(Listener):
        def record(self, outcome):
            raise RuntimeError("a bug of ours")

    with pytest.raises(RuntimeError, match="a bug of ours"):
        run_steps([step(need=None)], {}, Store(tmp_path), Cluster(), Broken())


def test_an_artifact_appears_whole_with_its_manifest(tmp_path):
    store = Store(tmp_path)
    with store.writing(step()) as scratch:
        (scratch / "a.txt").write_text("a")
        assert not store.is_done(step())
    assert store.is_done(step())
    assert not store.is_done(step(9))
    assert sorted(path.name for path in store.path(step()).iterdir()) == ["a.txt", "cost.json", "manifest.json"]


def test_the_cost_of_an_artifact_is_kept_with_it(tmp_path):
    """A run that finds it done tells what it took to make, and not 0.0 seconds."""
    store = Store(tmp_path)
    (ran,) = outcomes_of([step()], store)
    assert ran.cost.wall_s > 0
    assert ran.cost.cpu_s > 0
    assert ran.cost.host == socket.gethostname()
    assert Outcome.done(step(), store, "cached").cost == ran.cost
    (again,) = outcomes_of([step()], store)  # as a retry, after its worker was lost
    assert (again.status, again.cost) == ("ran", ran.cost)
    check_manifest(store.path(step()), required=["cost.json"])


def test_a_failed_write_leaves_nothing(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="half"), store.writing(step()) as scratch:
        (scratch / "a.txt").write_text("a")
        raise RuntimeError("half way")
    assert list(store.steps.iterdir()) == []


def test_a_finished_artifact_is_never_replaced(tmp_path):
    """Two runs on one work directory may do the same step; readers of the first keep their files."""
    store = Store(tmp_path)
    for content in ("first", "second"):
        with store.writing(step()) as scratch:
            (scratch / "a.txt").write_text(content)
    assert (store.path(step()) / "a.txt").read_text() == "first"
    assert len(list(store.steps.iterdir())) == 1


def test_an_artifact_without_its_manifest_is_written_again(tmp_path):
    store = Store(tmp_path)
    for content in ("old", "new"):
        with store.writing(step()) as scratch:
            (scratch / "a.txt").write_text(content)
        if content == "old":
            (store.path(step()) / "manifest.json").unlink()
            assert not store.is_done(step())
    assert (store.path(step()) / "a.txt").read_text() == "new"


def test_a_work_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"work directory .* is not writable"):
        Store(tmp_path / "file" / "work")


def test_a_model_that_was_only_touched_is_the_same_and_one_edited_between_the_samples_is_not(tmp_path):
    directory, store = tmp_path / "model", Store(tmp_path / "work")
    save_tiny_model("llama", directory)
    LlamaForCausalLM(LlamaConfig(**WIDE)).save_pretrained(directory)
    entry = ModelEntry(name="wide", source=str(directory), dtype="float32")

    def content():
        return resolve(entry, store).content

    first = content()
    assert content() == first
    checkpoint, architecture = Checkpoint(directory), resolve(entry, store).architecture
    for layer_idx in range(architecture.num_layers):
        with store.writing(step(layer_idx)) as scratch:
            save_digest(scratch, first, layer_idx, layer_digest(checkpoint, architecture, layer_idx))
    weights = directory / "model.safetensors"
    os.utime(weights)
    assert content() == first
    tensors = load_file(weights)
    outline = Checkpoint(directory).outline
    tensors["model.layers.1.self_attn.k_proj.weight"][100, 3] += 1
    save_file(tensors, weights, {"format": "pt"})
    assert Checkpoint(directory).outline == outline, "the edit is not between the samples"
    edited = content()
    assert edited != first
    assert content() == edited
    assert resolve(entry, Store(tmp_path / "another")).content == outline
