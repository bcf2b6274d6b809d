"""Reading checkpoints: only what is asked, sharded or not, and a clear error for each broken one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorc_core
from lorc_core.errors import ArtifactError, ConfigError, NumericsError, UnsupportedModelError
from lorc_core.model.architecture import architecture_of
from lorc_core.model.stored.checkpoint import Checkpoint, read_config
from lorc_core.model.stored.weights import checkpoint_fingerprint
from tests.models import tiny_model

KEY_WEIGHT = "layers.1.self_attn.k_proj.weight"


@pytest.fixture
def llama_dir(save_tiny):
    return save_tiny("llama")


def edit_tensor(directory, name, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_single_and_sharded_checkpoints_read_alike(llama_dir, tmp_path):
    sharded = tmp_path / "sharded"
    tiny_model("llama").save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    weight = tiny_model("llama").model.layers[1].self_attn.k_proj.weight
    assert torch.equal(Checkpoint(llama_dir).read(KEY_WEIGHT), weight)
    assert torch.equal(Checkpoint(sharded).read(KEY_WEIGHT), weight)


def test_names_without_the_models_prefix_are_found(llama_dir):
    """Hub checkpoints of a bare base model have no "model." before their names."""
    tensors = load_file(llama_dir / "model.safetensors")
    expected = tensors[f"model.{KEY_WEIGHT}"]
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, llama_dir / "model.safetensors")
    assert torch.equal(Checkpoint(llama_dir).read(KEY_WEIGHT), expected)


def test_a_missing_tensor_is_named(llama_dir):
    with pytest.raises(ArtifactError, match=r"layers\.9\.self_attn\.k_proj\.weight: no tensor has that name"):
        Checkpoint(llama_dir).read("layers.9.self_attn.k_proj.weight")


def fingerprint(directory):
    return checkpoint_fingerprint(Checkpoint(directory), architecture_of(read_config(directory)))


def test_fingerprint_moves_with_keys_with_other_tensors_and_with_the_config(llama_dir, tmp_path):
    seen = {fingerprint(llama_dir)}
    assert fingerprint(llama_dir) in seen
    copied = tmp_path / "elsewhere"
    shutil.copytree(llama_dir, copied)
    assert fingerprint(copied) in seen
    # the last element of W_k, past the samples of every tensor; the end of another
    edit_tensor(copied, f"model.{KEY_WEIGHT}", lambda weight: weight[-1, -1].add_(1))
    seen.add(fingerprint(copied))
    edit_tensor(copied, "model.embed_tokens.weight", lambda weight: weight[-500:].zero_())
    seen.add(fingerprint(copied))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    seen.add(fingerprint(copied))
    assert len(seen) == 4


def test_an_absent_directory_and_an_absent_config_are_told_apart(llama_dir, tmp_path):
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        lorc_core.compress(tmp_path / "nowhere")
    (llama_dir / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        lorc_core.compress(llama_dir)


def test_pickles_are_refused_with_the_way_to_convert(llama_dir):
    (llama_dir / "model.safetensors").rename(llama_dir / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"loading a pickle runs code from the file.*save_pretrained"):
        lorc_core.compress(llama_dir)


def test_sharded_pickles_are_refused_too(llama_dir):
    (llama_dir / "model.safetensors").unlink()
    (llama_dir / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(ArtifactError, match="loading a pickle runs code"):
        lorc_core.compress(llama_dir)


def test_a_single_file_is_read_before_an_index_as_transformers_does(llama_dir, tmp_path):
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other", max_shard_size="100KB")
    for file in (tmp_path / "other").glob("model*"):
        shutil.copy(file, llama_dir)
    assert torch.equal(
        Checkpoint(llama_dir).read(KEY_WEIGHT), tiny_model("llama").model.layers[1].self_attn.k_proj.weight
    )


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": []}', "[]"])
def test_a_broken_index_is_an_artifact_error(llama_dir, index):
    (llama_dir / "model.safetensors").rename(llama_dir / "model-00001-of-00001.safetensors")
    (llama_dir / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ArtifactError, match="not an index of safetensors shards"):
        lorc_core.compress(llama_dir)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_attention_heads", "four"), ("hidden_size", None), ("num_attention_heads", 0), ("num_hidden_layers", 0)],
)
def test_a_config_with_impossible_fields_is_refused(llama_dir, field, value):
    config = json.loads((llama_dir / "config.json").read_text())
    (llama_dir / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ArtifactError):
        lorc_core.compress(llama_dir)


def test_no_weights_at_all(llama_dir):
    (llama_dir / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"neither model\.safetensors nor"):
        lorc_core.compress(llama_dir)


@pytest.mark.parametrize("kept_bytes", [4, 200, -1])
def test_a_truncated_file_is_refused(llama_dir, kept_bytes):
    file = llama_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: not a whole safetensors file"):
        lorc_core.compress(llama_dir)


def test_a_missing_shard_is_named(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ArtifactError, match=f"shard {shard.name} is named in"):
        lorc_core.compress(tmp_path)


def test_a_nan_names_layer_and_kind(llama_dir):
    edit_tensor(llama_dir, f"model.{KEY_WEIGHT}", lambda weight: weight[3, 5].fill_(float("nan")))
    with pytest.raises(NumericsError, match="layer 1 keys: the weight or its bias holds NaN"):
        lorc_core.compress(llama_dir, "lorc")
    with pytest.raises(NumericsError, match="layer 1 keys: the weight holds NaN"):
        lorc_core.compress(llama_dir, "lorc_q")


def test_weights_that_contradict_the_config_are_refused(llama_dir):
    config = json.loads((llama_dir / "config.json").read_text())
    (llama_dir / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    with pytest.raises(ConfigError, match=r"layer 0 keys: weight is \(32, 64\), the config says \(64, 64\)"):
        lorc_core.compress(llama_dir)


def test_unknown_architectures_are_refused_with_the_known_ones(llama_dir):
    config = json.loads((llama_dir / "config.json").read_text())
    (llama_dir / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(
        UnsupportedModelError, match="model type 'mamba' is not supported: layers with linear attention or a recurrent"
    ):
        lorc_core.compress(llama_dir)
    (llama_dir / "config.json").write_text(json.dumps(config | {"model_type": "no-such-type"}))
    with pytest.raises(ArtifactError, match="config cannot be read"):
        lorc_core.compress(llama_dir)


def test_a_rank_deficient_weight_stops_progressive_only(llama_dir):
    edit_tensor(llama_dir, f"model.{KEY_WEIGHT}", lambda weight: weight[1].copy_(weight[0]))
    with pytest.raises(NumericsError, match="layer 1 keys: the weight is rank-deficient"):
        lorc_core.compress(llama_dir, "lorc")
    assert lorc_core.compress(llama_dir, "lorc", schedule="uniform").kept_fraction == 0.5


def test_unknown_methods_are_refused_with_the_known_ones(llama_dir):
    with pytest.raises(ConfigError, match=r"method 'lork' is not known; known are eigen, fisher, k_svd, .*, zack"):
        lorc_core.compress(llama_dir, method="lork")
