"""Checkpoints that are not whole are refused by name; every family's own checkpoint passes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from lorc_core.errors import ArtifactError, UnsupportedModelError
from lorc_core.model.stored.checkpoint import Checkpoint, read_config
from lorc_core.model.stored.integrity import check_checkpoint, check_model
from tests.models import CONFIGS, tiny_model

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def llama(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def check(directory):
    check_checkpoint(Checkpoint(directory), read_config(directory))


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory, **fields):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_as_it_is_saved_passes(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path)
    assert check_model(tmp_path).directory == tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(UP), f"tensor {UP} is missing"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".mlp." in name],
            r"tensors model.layers.0.mlp.down_proj.weight, .* and 6 more are missing",
        ),
        (lambda tensors: tensors.update({UP: tensors[UP][:-1]}), rf"tensor {UP} is \(95, 64\), .* has \(96, 64\)"),
        (lambda tensors: tensors.update({UP: tensors[UP].bool()}), f"tensor {UP} is stored as BOOL; .* F64, F32"),
        (lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}), f"tensor {UP} is stored as I8"),
        (lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}), "stored as F8_E4M3"),
        (
            lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": tensors[UP].clone()}),
            "tensor model.layers.7.mlp.up_proj.weight is unexpected",
        ),
    ],
    ids=["missing", "many missing", "shape", "bool", "int8", "float8", "unexpected"],
)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(llama, change, message):
    change_tensors(llama, change)
    with pytest.raises(ArtifactError, match=message):
        check(llama)


def test_transformers_itself_scores_a_missing_tensor_as_random_numbers(llama):
    """The control: without the check a model with a missing tensor loads without an error."""
    from transformers import AutoModelForCausalLM

    whole = load_file(llama / "model.safetensors")[UP]
    change_tensors(llama, lambda tensors: tensors.pop(UP))
    loaded = AutoModelForCausalLM.from_pretrained(llama).get_parameter(UP)
    assert not torch.equal(loaded, whole)


def test_tied_weights_need_no_tensor_of_their_own(tmp_path):
    tiny_model("gemma").save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    check(tmp_path)


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    tiny_model("llama").base_model.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=r"tensor lm_head\.weight is missing"):
        check(tmp_path)


def test_quantized_weights_are_refused(llama):
    change_config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"quantized \(gptq\)"):
        check(llama)


def test_an_unknown_activation_is_refused_by_its_name(llama):
    change_config(llama, hidden_act="no-such-thing")
    with pytest.raises(ArtifactError, match=r"config.json: no model can be built from it .*no-such-thing"):
        check(llama)


def test_shards_are_checked_like_one_file(llama, tmp_path):
    model = tiny_model("llama")
    shutil.rmtree(llama)
    model.save_pretrained(llama, max_shard_size="20KB")
    assert len(list(llama.glob("*.safetensors"))) > 1
    check(llama)
    index = json.loads((llama / "model.safetensors.index.json").read_text())
    shard = llama / index["weight_map"].pop(UP)
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != UP}, shard, {"format": "pt"})
    with pytest.raises(ArtifactError, match=f"tensor {UP} is missing"):
        check(llama)


@pytest.mark.parametrize(
    ("family", "buffer"),
    [
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("gpt_neo", "transformer.h.1.attn.attention.bias"),
        ("gptj", "transformer.h.1.attn.masked_bias"),
    ],
)
def test_masks_that_older_checkpoints_hold_are_no_weights(family, buffer, tmp_path):
    """With them transformers loads bitwise the same weights."""
    tiny_model(family).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({buffer: torch.tensor(-1e9)}))
    assert buffer in check_model(tmp_path).file_of


def test_a_model_that_is_no_causal_one_is_refused(tmp_path):
    T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ArtifactError, match=r"config\.json: no model can be built from it \(ValueError: "):
        check(tmp_path)
