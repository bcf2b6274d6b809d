"""A base model that is not whole is refused wherever a variant meets it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorc_core
from lorc_core.errors import ArtifactError
from lorc_core.standalone.export import export_variant
from tests.models import save_tiny_model

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def holed(tmp_path):
    """A variant made from a model that lost a tensor the decomposition never looked at."""
    base = save_tiny_model("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors[UP]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    lorc_core.compress(base, "lorc", 0.5, "uniform").save(tmp_path / "variant")
    return tmp_path / "variant"


def test_load_refuses_a_base_with_a_missing_tensor_by_name(holed):
    with pytest.raises(ArtifactError, match=f"tensor {UP} is missing"):
        lorc_core.load(holed)


def test_export_refuses_a_base_with_a_missing_tensor_by_name(holed, tmp_path):
    with pytest.raises(ArtifactError, match=f"tensor {UP} is missing"):
        export_variant(holed, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_calibration_refuses_a_model_with_a_missing_tensor_by_name(holed):
    with pytest.raises(ArtifactError, match=f"tensor {UP} is missing"):
        lorc_core.compress(holed.parent / "base", "kq_joint", 0.5, calibration=torch.ones(64, 4, dtype=torch.long))
