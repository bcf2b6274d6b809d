"""Tensors, and rows of them, read where a model is: only the bytes asked for, whatever they are stored as."""

import json
import shutil

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorc_core
from lorc_core.errors import ArtifactError, ConfigError
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import PROJECTION_OF
from lorc_core.model.stored.checkpoint import Checkpoint, read_config
from lorc_core.model.stored.files import ModelFiles
from lorc_core.model.stored.integrity import check_model
from lorc_core.model.stored.weights import ReadOnce, layer_digest, read_weight
from tests.models import tiny_model

KEY_WEIGHT = "layers.1.self_attn.k_proj.weight"
FP8_ROWS, FP8_COLUMNS = 24, 40  # do not divide the sizes


@pytest.fixture
def elsewhere():
    """A file system that is no directory here."""
    system = fsspec.filesystem("memory")
    yield "memory://model"
    system.rm("/", recursive=True)


def copy_to(url, directory):
    system = fsspec.core.url_to_fs(url)[0]
    for file in directory.iterdir():
        system.put_file(str(file), f"{url}/{file.name}")


def write_fp8(directory, model):
    """A checkpoint whose projections have 8 bits and a scale for each block; returns what they stand for."""
    stored, meant = {}, {}
    for name, weight in model.state_dict().items():
        if not name.endswith("proj.weight"):
            stored[name] = weight.clone()
            continue
        rows, columns = (-(-size // block) for size, block in zip(weight.shape, (FP8_ROWS, FP8_COLUMNS), strict=True))
        scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) + 0.5
        spread = scale.repeat_interleave(FP8_ROWS, 0)[: len(weight)].repeat_interleave(FP8_COLUMNS, 1)
        spread = spread[:, : weight.shape[1]]
        stored[name] = (weight / spread).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        meant[name] = stored[name].float() * spread
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [FP8_ROWS, FP8_COLUMNS]}
    (directory / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_those_of_the_whole_and_no_other_bytes_are_read(save_tiny, dtype):
    directory = save_tiny("llama")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    checkpoint, whole = Checkpoint(directory), tensors[f"model.{KEY_WEIGHT}"]
    before = checkpoint.files.bytes_read
    read = checkpoint.read(KEY_WEIGHT, [(3, 5), (30, 32)])
    assert torch.equal(read, torch.cat([whole[3:5], whole[30:32]]))
    assert checkpoint.files.bytes_read - before == read.nbytes
    assert torch.equal(checkpoint.read(KEY_WEIGHT), whole)
    with pytest.raises(ArtifactError, match=r"k_proj\.weight has 32 rows, 33 are needed"):
        checkpoint.read(KEY_WEIGHT, [(0, 33)])


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "bloom", "falcon", "mpt"])
def test_a_model_elsewhere_is_read_as_one_here(save_tiny, elsewhere, name):
    directory = save_tiny(name)
    copy_to(elsewhere, directory)
    here, there = Checkpoint(directory), Checkpoint(ModelFiles(elsewhere))
    assert here.outline == there.outline
    architecture = architecture_of(read_config(directory))
    for layer_idx in range(architecture.num_layers):
        assert layer_digest(here, architecture, layer_idx) == layer_digest(there, architecture, layer_idx)
    variant = lorc_core.compress(elsewhere, "lorc_q", 0.5)
    assert variant.base.fingerprint == lorc_core.compress(directory, "lorc_q", 0.5).base.fingerprint
    assert variant.base.source == elsewhere


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "bloom", "falcon", "mpt"])
def test_of_a_fused_tensor_only_the_projections_rows_are_read(save_tiny, name):
    directory = save_tiny(name)
    checkpoint = Checkpoint(directory)
    architecture = architecture_of(read_config(directory))
    for kind in ("keys", "values"):
        before = checkpoint.files.bytes_read
        weight = read_weight(checkpoint, architecture, 0, PROJECTION_OF[kind])
        assert checkpoint.files.bytes_read - before == weight.nbytes
        assert weight.shape == (architecture.kv_width, architecture.hidden_size)


def test_a_source_that_reads_once_reads_a_layers_weights_once_for_its_digest_too(save_tiny):
    directory = save_tiny("llama")
    checkpoint = Checkpoint(directory)
    architecture = architecture_of(read_config(directory))
    before, source = checkpoint.files.bytes_read, ReadOnce(checkpoint)
    weights = [read_weight(source, architecture, 0, projection) for projection in ("k", "v")]
    layer_digest(source, architecture, 0)
    assert checkpoint.files.bytes_read - before == sum(weight.nbytes for weight in weights)


def test_a_copy_of_a_model_elsewhere_is_loaded_and_made_anew_when_that_changes(
    save_tiny, elsewhere, tmp_path, monkeypatch
):
    monkeypatch.setenv("LORC_CACHE", str(tmp_path / "cache"))
    directory = save_tiny("llama")
    copy_to(elsewhere, directory)
    lorc_core.compress(elsewhere, "lorc", 0.5).save(tmp_path / "variant")
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "weights were fetched to be decomposed"
    tokens = torch.arange(20)[None]
    lorc_core.compress(directory, "lorc", 0.5).save(tmp_path / "expected")
    expected = lorc_core.load(tmp_path / "expected")(tokens).logits
    assert torch.equal(lorc_core.load(tmp_path / "variant")(tokens).logits, expected)
    assert len(list((tmp_path / "cache").rglob("model.safetensors"))) == 1

    shutil.rmtree(directory)
    tiny_model("llama", seed=1).save_pretrained(directory)
    copy_to(elsewhere, directory)
    with pytest.raises(ArtifactError, match="not the base model this variant was made for"):
        lorc_core.load(tmp_path / "variant")


def test_8_bit_weights_are_read_with_their_scales(save_tiny):
    directory = save_tiny("llama")
    meant = write_fp8(directory, tiny_model("llama"))
    checkpoint = check_model(directory)
    for name, weight in meant.items():
        read = checkpoint.read(name)
        assert torch.equal(read, weight), name
        assert torch.equal(checkpoint.read(name, [(1, 3), (20, 27)]), torch.cat([weight[1:3], weight[20:27]]))
    assert lorc_core.compress(directory, "lorc_q", 0.5).kept_fraction == 0.5


@pytest.mark.parametrize("shape", [(), (1,), (32, 1), (32,)])
def test_a_scale_for_all_or_one_for_each_row(save_tiny, shape):
    directory = save_tiny("llama")
    tensors = load_file(directory / "model.safetensors")
    name, scale = f"model.{KEY_WEIGHT}", torch.rand(shape) + 0.5
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors | {f"{name}_scale": scale}, directory / "model.safetensors", {"format": "pt"})
    meant = tensors[name].float() * (scale.view(-1, 1) if scale.numel() > 1 else scale.item())
    assert torch.equal(Checkpoint(directory).read(KEY_WEIGHT), meant)
    assert torch.equal(Checkpoint(directory).read(KEY_WEIGHT, [(7, 9)]), meant[7:9])


def test_8_bits_without_a_scale_are_refused(save_tiny):
    directory = save_tiny("llama")
    write_fp8(directory, tiny_model("llama"))
    tensors = load_file(directory / "model.safetensors")
    del tensors[f"model.{KEY_WEIGHT}_scale_inv"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"k_proj\.weight has 8 bits and no .*k_proj\.weight_scale_inv"):
        check_model(directory)


def test_an_unknown_scheme_and_an_absent_model_are_told_in_a_line(elsewhere):
    with pytest.raises(ConfigError, match="nosuch://bucket/model: Protocol not known: nosuch"):
        lorc_core.compress("nosuch://bucket/model")
    with pytest.raises(ConfigError, match="model memory://nowhere does not exist"):
        lorc_core.compress("memory://nowhere")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda header: header["a"]["data_offsets"].reverse(), "bytes of its shape"),
        (lambda header: header["a"]["shape"].append(2), "bytes of its shape"),
        (lambda header: header["a"].update(dtype="Q9"), "header cannot be read"),
        (lambda header: header["b"].update(data_offsets=[0, 16]), "does not begin where another ends"),
        (lambda header: header.pop("b"), "its header tells of"),
        (lambda header: header.update(a=[]), "header cannot be read"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(save_tiny, damage, told):
    directory = save_tiny("llama")
    file = directory / "model.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, file)
    content = file.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    damage(header)
    written = json.dumps(header).encode()
    file.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + header_bytes :])
    with pytest.raises(ArtifactError, match=f"not a whole safetensors file .*{told}"):
        Checkpoint(directory)


@pytest.mark.parametrize(
    "damage", [lambda held: held[:-40], lambda held: b"x" + held[1:], lambda held: b""], ids=["cut", "changed", "empty"]
)
def test_a_damaged_copy_of_what_is_elsewhere_is_read_again(save_tiny, elsewhere, monkeypatch, tmp_path, damage):
    monkeypatch.setenv("LORC_CACHE", str(tmp_path / "cache"))
    copy_to(elsewhere, save_tiny("llama"))
    whole = Checkpoint(ModelFiles(elsewhere)).read(KEY_WEIGHT)
    (copy,) = (tmp_path / "cache" / "tensors").iterdir()
    again = Checkpoint(ModelFiles(elsewhere))
    before = again.files.bytes_read
    assert torch.equal(again.read(KEY_WEIGHT), whole)
    assert again.files.bytes_read == before, "the copy was not used"
    copy.write_bytes(damage(copy.read_bytes()))
    assert torch.equal(again.read(KEY_WEIGHT), whole)
    assert again.files.bytes_read - before == whole.nbytes
