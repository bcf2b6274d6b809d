"""Artifacts are what their manifests say, or an error that names the file."""

import json
import os

import pytest

from lorc_core.errors import ArtifactError
from lorc_core.manifest import MANIFEST_FILE, DamagedArtifactError, check_manifest, checked_file, write_manifest


@pytest.fixture
def artifact(tmp_path):
    (tmp_path / "scores").write_bytes(b"1 2 3")
    (tmp_path / "layer").write_bytes(bytes(1000))
    write_manifest(tmp_path)
    return tmp_path


def test_a_whole_artifact_passes(artifact):
    check_manifest(artifact, required=("scores",))
    assert checked_file(artifact / "layer") == artifact / "layer"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: (directory / "layer").write_bytes(bytes(999)), "layer: altered after it was written"),
        (lambda directory: (directory / "layer").write_bytes(b"1 2 3"), "layer: altered"),
        (lambda directory: (directory / "layer").unlink(), "layer: listed in manifest.json but absent"),
        (lambda directory: (directory / MANIFEST_FILE).write_text("{"), "manifest.json: cannot be read"),
        (lambda directory: (directory / MANIFEST_FILE).write_text("[1]"), "manifest.json: cannot be read"),
        (lambda directory: (directory / MANIFEST_FILE).write_text("[" * 100_000), "manifest.json: cannot be read"),
        (lambda directory: (directory / MANIFEST_FILE).write_text("{}"), "does not list layer"),
    ],
    ids=["truncated", "swapped", "absent", "manifest cut", "no mapping", "nested", "not listed"],
)
@pytest.mark.parametrize(
    "look", [lambda path: checked_file(path), lambda path: check_manifest(path.parent, ("layer",))]
)
def test_damage_is_an_error_that_names_the_file(artifact, damage, message, look):
    look(artifact / "layer")  # a file that was found whole is looked at again once it changed
    damage(artifact)
    os.utime(artifact) if not (artifact / "layer").exists() else os.utime(artifact / "layer")
    with pytest.raises(DamagedArtifactError, match=message) as damaged:
        look(artifact / "layer")
    assert damaged.value.directory == artifact


def test_a_manifest_that_names_files_elsewhere_is_refused(artifact):
    (artifact / MANIFEST_FILE).write_text(json.dumps({"../../etc/passwd": "0"}))
    with pytest.raises(DamagedArtifactError, match=r"lists '\.\./\.\./etc/passwd', which is no file of this directory"):
        check_manifest(artifact)


def test_what_a_killed_save_left_is_no_part_of_the_next(artifact):
    (artifact / f"{MANIFEST_FILE}.partial").write_text("{")
    write_manifest(artifact)
    check_manifest(artifact)
    assert json.loads((artifact / MANIFEST_FILE).read_text()).keys() == {"scores", "layer"}


def test_an_unfinished_artifact_is_no_damaged_one(tmp_path):
    (tmp_path / "layer").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"no manifest\.json") as unfinished:
        checked_file(tmp_path / "layer")
    assert not isinstance(unfinished.value, DamagedArtifactError)
