"""What `compress` takes: models by directory or hub id, texts by path or as a list; one clear error for the rest."""

import inspect
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorc_core
from lorc_core.errors import ConfigError
from lorc_core.methods import METHODS
from lorc_core.model.kinds import KINDS
from lorc_core.ranks.schedules import Energy
from tests.models import tiny_model
from tests.paths import DEMO

LLAMA = DEMO / "stdlib-llama"
CODE = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(150))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def unchecked_compress(*args, **kwargs):
    """`compress` without the type checks that only tests have."""
    return inspect.unwrap(lorc_core.compress)(*args, **kwargs)


def assert_same_factors(variant, expected):
    assert variant.ranks == expected.ranks
    for layer, expected_layer in zip(variant.factors, expected.factors, strict=True):
        for kind in KINDS:
            assert layer[kind] is expected_layer[kind] or torch.equal(layer[kind].up, expected_layer[kind].up)


@pytest.mark.parametrize("text", [CODE, "a few words", "x" * 5000, "nul\0nul", ""])
def test_a_text_in_place_of_its_path_is_refused_with_the_way_to_pass_text(text):
    with pytest.raises(ConfigError, match=r"a str is the path of a text file.*pass \[text\]") as error:
        lorc_core.compress(LLAMA, "kq_joint", calibration=text)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_a_list_of_texts_calibrates_as_their_file_does(tmp_path):
    (tmp_path / "text.py").write_text(CODE)
    by_path = lorc_core.compress(LLAMA, "kq_joint", calibration=tmp_path / "text.py")
    assert_same_factors(lorc_core.compress(LLAMA, "kq_joint", calibration=[CODE]), by_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": {"name": "lorc"}}, r"method must be a name in METHODS or a Method, got \{'"),
        ({"method": METHODS["lorc"].to_dict()}, r"method must be a name in METHODS or a Method, got \{'"),
        (
            {"schedule": {"name": "energy"}},
            r"schedule must be a name in SCHEDULES or a Schedule, got \{'name': 'energy'\}",
        ),
        ({"schedule": Energy}, "schedule must be a name in SCHEDULES or a Schedule, got <class .*Energy"),
        ({"kept_fraction": "half"}, "kept_fraction must be a number, got 'half'"),
        ({"kept_fraction": None}, "kept_fraction must be a number, got None"),
        ({"dtype": "float16"}, r"dtype must be a torch\.dtype, got 'float16'"),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        unchecked_compress(LLAMA, **arguments)


def test_a_model_of_another_type_is_refused():
    with pytest.raises(
        ConfigError, match="model must be a loaded PreTrainedModel, a directory or a hub id, got Linear"
    ):
        unchecked_compress(torch.nn.Linear(2, 2))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache on disk with one model in it, and no network."""
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    shutil.copytree(LLAMA, snapshot)
    (tmp_path / "hub" / "models--owner--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--name" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_hub_id_is_compressed_from_its_snapshot_and_loaded_from_it_again(hub, tmp_path):
    variant = lorc_core.compress("owner/name")
    expected = lorc_core.compress(hub)
    assert_same_factors(variant, expected)
    assert (variant.base.source, variant.base.revision) == ("owner/name", COMMIT)
    assert variant.base.fingerprint == expected.base.fingerprint
    variant.save(tmp_path / "variant")
    assert Path(lorc_core.load(tmp_path / "variant").name_or_path) == hub


def test_a_directory_goes_before_a_hub_id_of_the_same_name(hub, tmp_path, save_tiny):
    Path("owner").mkdir()
    save_tiny("llama").rename("owner/name")
    assert lorc_core.compress("owner/name").base.source == str(tmp_path / "owner" / "name")


def test_a_model_that_is_nowhere_is_refused_with_both_ways_to_name_one(hub):
    with pytest.raises(
        ConfigError, match=r"hub model owner/other could not be fetched .*directory is written \./owner"
    ):
        lorc_core.compress("owner/other")
    for missing in ("./owner/other", "a/b/c", "x" * 5000, Path("owner/name")):
        with pytest.raises(ConfigError, match=r"model directory .* does not exist"):
            lorc_core.compress(missing)


def test_a_model_loaded_by_a_relative_path_is_found_again_from_elsewhere(hub, tmp_path, save_tiny, monkeypatch):
    Path("owner").mkdir()
    save_tiny("llama").rename("owner/name")
    variant = lorc_core.compress(AutoModelForCausalLM.from_pretrained("owner/name"))
    assert variant.base.source == str(tmp_path / "owner" / "name")
    variant.save(tmp_path / "variant")
    monkeypatch.chdir("/")
    lorc_core.load(tmp_path / "variant")


def test_a_home_directory_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"model directory ~no-such-user/model: "):
        lorc_core.compress("~no-such-user/model")


def test_a_loaded_model_needs_no_directory():
    assert lorc_core.compress(tiny_model("llama")).base.source == ""
