"""A variant on disk: bitwise round trip, a new process, and every way in which its files can be wrong."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorc_core
from lorc_core.errors import ArtifactError, ConfigError
from lorc_core.manifest import check_manifest, write_manifest
from tests.models import tiny_model
from tests.paths import DEMO
from tests.runs import one_pass, tokens

LLAMA = DEMO / "stdlib-llama"


@pytest.fixture(scope="module")
def variant():
    return lorc_core.compress(LLAMA, "lorc", kept_fraction=0.5)


@pytest.fixture
def saved(variant, tmp_path):
    variant.save(tmp_path / "variant")
    return tmp_path / "variant"


def test_save_and_load_are_bitwise(variant, saved):
    loaded = lorc_core.load_variant(saved)
    for field in ("base", "architecture", "method", "schedule", "ranks"):
        before, after = getattr(variant, field), getattr(loaded, field)
        assert before == after or json.loads(json.dumps(before)) == after
    for before, after in zip(variant.factors, loaded.factors, strict=True):
        for kind, factors in before.items():
            if factors is None:
                assert after[kind] is None
            else:
                assert torch.equal(factors.up, after[kind].up)
                assert torch.equal(factors.down, after[kind].down)


def test_factors_that_are_no_transposes_survive_the_disk(tmp_path):
    variant = lorc_core.compress(DEMO / "stdlib-opt", method="lorc_q")
    variant.save(tmp_path)
    loaded = lorc_core.load_variant(tmp_path)
    before, after = variant.factors[1]["values"], loaded.factors[1]["values"]
    assert not torch.equal(before.down, before.up.T)
    for name, tensor in before.tensors().items():
        assert torch.equal(tensor, after.tensors()[name])
    assert loaded.factor_floats == variant.factor_floats


def test_means_survive_the_disk(tmp_path):
    variant = lorc_core.compress(DEMO / "stdlib-opt", "lorc", schedule="uniform")
    variant.save(tmp_path)
    assert torch.equal(lorc_core.load_variant(tmp_path).factors[0]["keys"].mean, variant.factors[0]["keys"].mean)


def test_a_new_process_gives_the_same_logits_bitwise(variant, saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()
    ids = tokens(model)
    with lorc_core.attach(model, variant):
        expected = one_pass(model, ids)
    torch.save(ids, tmp_path / "ids.pt")
    script = """
import sys, torch, lorc_core
torch.set_num_threads(1)
model = lorc_core.load(sys.argv[1], dtype=torch.float32)
with torch.inference_mode():
    torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
"""
    arguments = [str(saved), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_an_altered_file_is_refused_by_name(saved):
    factors = saved / "factors.safetensors"
    content = bytearray(factors.read_bytes())
    content[-1] ^= 1
    factors.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"factors\.safetensors: altered after it was written"):
        lorc_core.load_variant(saved)


def test_a_regenerated_manifest_is_accepted(saved):
    (saved / "README.md").write_text("edited by its owner")
    write_manifest(saved)
    check_manifest(saved)


def test_an_unfinished_variant_is_refused(saved):
    (saved / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        lorc_core.load_variant(saved)


def test_an_absent_file_is_refused(saved):
    (saved / "factors.safetensors").unlink()
    with pytest.raises(ArtifactError, match="listed in manifest"):
        lorc_core.load_variant(saved)


@pytest.mark.parametrize(("manifest", "message"), [("{}", "does not list lorc_config.json"), ("{", "cannot be read")])
def test_a_manifest_that_vouches_for_nothing_is_refused(saved, manifest, message):
    (saved / "manifest.json").write_text(manifest)
    with pytest.raises(ArtifactError, match=message):
        lorc_core.load_variant(saved)


def test_a_missing_factor_is_refused_not_taken_for_a_full_layer(saved):
    tensors = load_file(saved / "factors.safetensors")
    del tensors["layers.1.keys.up"]
    save_file(tensors, saved / "factors.safetensors")
    write_manifest(saved)
    with pytest.raises(ArtifactError, match=r"layers\.1\.keys\.up must be \(128, \d+\), it is absent"):
        lorc_core.load_variant(saved)


@pytest.mark.parametrize("part", ["own_down", "mean"])
def test_a_missing_part_of_a_factor_is_refused_not_taken_for_a_method_without_it(tmp_path, part):
    """Without `own_down` an oblique projection would be taken for an orthogonal one, without its mean for a biasless."""
    variant = lorc_core.compress(tiny_model("qwen2"), "lorc_q", schedule="uniform")
    variant.save(tmp_path)
    tensors = load_file(tmp_path / "factors.safetensors")
    del tensors[f"layers.1.values.{part}"]
    save_file(tensors, tmp_path / "factors.safetensors")
    write_manifest(tmp_path)
    with pytest.raises(ArtifactError, match=rf"layers\.1\.values\.{part} .*absent"):
        lorc_core.load_variant(tmp_path)


def test_another_schema_is_refused(saved):
    config = json.loads((saved / "lorc_config.json").read_text())
    (saved / "lorc_config.json").write_text(json.dumps(config | {"schema_version": 99}))
    write_manifest(saved)
    with pytest.raises(ArtifactError, match="variant schema 99, this lorc reads 4"):
        lorc_core.load_variant(saved)


@pytest.mark.parametrize("part", ["base", "architecture", "ranks", "method"])
def test_a_config_without_a_part_is_refused(saved, part):
    config = json.loads((saved / "lorc_config.json").read_text())
    del config[part]
    (saved / "lorc_config.json").write_text(json.dumps(config))
    write_manifest(saved)
    with pytest.raises(ArtifactError, match=rf"lorc_config\.json: not a variant's config \('{part}'\)"):
        lorc_core.load_variant(saved)


def test_another_base_model_is_refused(save_tiny, tmp_path):
    base, other = save_tiny("llama", seed=0), save_tiny("llama", seed=1)
    lorc_core.compress(base).save(tmp_path / "variant")
    lorc_core.load(tmp_path / "variant", base=base)
    with pytest.raises(ArtifactError, match="not the base model this variant was made for"):
        lorc_core.load(tmp_path / "variant", base=other)


def test_a_base_that_is_gone_is_named(save_tiny, tmp_path):
    base = save_tiny("llama")
    lorc_core.compress(base).save(tmp_path / "variant")
    base.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=f"model directory {base} does not exist"):
        lorc_core.load(tmp_path / "variant")
    lorc_core.load(tmp_path / "variant", base=tmp_path / "moved")


def test_a_variant_of_a_model_in_memory_asks_for_its_base(save_tiny, tmp_path):
    lorc_core.compress(tiny_model("llama")).save(tmp_path / "variant")
    with pytest.raises(ConfigError, match="made from a model in memory, so name its base"):
        lorc_core.load(tmp_path / "variant")
    lorc_core.load(tmp_path / "variant", base=save_tiny("llama"))


def test_model_and_directory_compress_alike(save_tiny):
    directory = save_tiny("qwen2")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    from_memory, from_disk = lorc_core.compress(model), lorc_core.compress(directory)
    for one, other in zip(from_memory.factors, from_disk.factors, strict=True):
        assert all(torch.equal(mine.up, its.up) for mine, its in zip(one, other, strict=True) if mine is not None)


def test_model_card_says_what_is_kept(saved):
    card = (saved / "README.md").read_text()
    assert "Keeps 0.5000 of the cached floats: 640 of 1,280 per token" in card
    assert "lorc_core.load" in card
