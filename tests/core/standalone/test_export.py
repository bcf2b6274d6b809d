"""Exported variants against the same variants attached to their base, in this process and in new ones.

Worst logit difference measured: 4.3e-6 in float32; the bound is 1e-4.
"""

import copy
import json
import runpy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_imports

import lorc_core
from lorc_core.errors import ArtifactError, ConfigError
from lorc_core.ranks.schedules import Energy, Uniform
from tests.models import save_tiny_model
from tests.runs import BOUND, GREEDY, assert_close, one_pass, token_by_token, tokens
from tests.variants import make_variant, random_adapters

# (model, method, schedule, keys folded): all blocks, biases, offsets, uneven ranks, a layer left full, no rotation
CASES = [
    ("llama", "lorc", Uniform(), True),
    ("qwen2", "lorc_q", Energy(skip_layers=(1,)), True),
    ("mistral", "kv_heads", Uniform(), True),
    ("opt", "kq_svd", Energy(), True),
    ("llama", "kq_svd", Energy(skip_layers=(0,)), False),
    ("qwen2", "phasor_freq", Energy(), False),
]


def read_header(directory):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("name", "method", "schedule", "keys_folded"), CASES)
def test_exported_equals_attached_cached_and_uncached(tmp_path, name, method, schedule, keys_folded):
    model, variant, variant_dir = make_variant(tmp_path, name, method, schedule)
    exported = lorc_core.export_variant(variant_dir, tmp_path / "exported")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    ids = tokens(model)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = {"attention_mask": mask, **GREEDY}
    baseline = one_pass(model, ids)
    with lorc_core.attach(model, variant):
        expected, text = one_pass(model, ids), model.generate(ids, **padded)
    assert (baseline - expected).abs().max() > 100 * BOUND
    assert_close(one_pass(alone, ids), expected)
    assert_close(token_by_token(alone, ids, 7), expected)
    assert torch.equal(alone.generate(ids, **padded), text)
    assert torch.equal(alone.generate(ids, cache_implementation="static", **padded), text)
    assert ("keys" not in exported.kept) == keys_folded
    check_widths(alone, variant, keys_folded)
    base_model = AutoModel.from_pretrained(tmp_path / "exported").eval()
    assert torch.equal(base_model(ids).last_hidden_state, alone.base_model(ids).last_hidden_state)
    assert not base_model.is_backend_compatible()  # engines that replace the cache, which holds the latents


def check_widths(alone, variant, keys_folded):
    """Of a folded projection, only the latents' rows are in memory."""
    architecture = variant.architecture
    for layer_idx, layer in enumerate(variant.ranks.layers):
        for kind in ("keys", "values"):
            weight = alone.base_model.get_parameter(architecture.projection_name(layer_idx, kind[0], "weight"))
            folded = kind == "values" or keys_folded
            assert weight.shape[0] == (layer.floats(kind) if folded else architecture.kv_width)


def test_no_projection_of_full_size_is_on_disk_and_other_files_are_copied(tmp_path):
    _, variant, variant_dir = make_variant(tmp_path, "llama", "lorc", Uniform())
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "base" / "tekken.json").write_text("{}")
    exported = lorc_core.export_variant(variant_dir, tmp_path / "exported")
    shapes = read_header(tmp_path / "exported")
    rank = variant.ranks.layers[0].floats("keys")
    for projection in ("k_proj", "v_proj"):
        assert shapes[f"model.layers.0.self_attn.{projection}.weight"] == (rank, 64)
    assert exported.weight_bytes < exported.base_weight_bytes
    names = {path.name for path in (tmp_path / "exported").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_lorc.py"} < names
    assert "tekken.json" in names
    assert "pytorch_model.bin" not in names
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("import os")["input_ids"]


def test_sharded_base_gives_a_sharded_export(tmp_path):
    model, variant, variant_dir = make_variant(tmp_path, "llama", "lorc", Uniform())
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    variant = replace(variant, base=replace(variant.base, source=str(tmp_path / "sharded"), fingerprint=None))
    variant.save(variant_dir)
    lorc_core.export_variant(variant_dir, tmp_path / "exported")
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 1
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    with lorc_core.attach(model, variant):
        assert_close(one_pass(alone, tokens(model)), one_pass(model, tokens(model)))


def test_adapters_are_merged(tmp_path):
    adapters = random_adapters()
    model, variant, variant_dir = make_variant(tmp_path, "llama", "lorc", Uniform(), adapters=adapters)
    lorc_core.export_variant(variant_dir, tmp_path / "exported")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    with lorc_core.attach(model, variant):
        expected = one_pass(model, tokens(model))
    with lorc_core.attach(model, replace(variant, adapters={})):
        assert (one_pass(model, tokens(model)) - expected).abs().max() > 100 * BOUND
    assert_close(one_pass(alone, tokens(model)), expected)


def test_exported_model_trains_around_its_factors_and_follows_them_when_written_to(tmp_path):
    model, _, variant_dir = make_variant(tmp_path, "llama", "lorc", Uniform())
    lorc_core.export_variant(variant_dir, tmp_path / "exported")
    alone, other = (AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval() for _ in range(2))
    ids = tokens(model)
    before = one_pass(alone, ids)  # attaches the factors, in inference mode
    factors = {name: tensor.clone() for name, tensor in alone.state_dict().items() if ".lorc_" in name}
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        alone(ids, labels=ids).loss.backward()
        optimizer.step()
    assert (one_pass(alone, ids) - before).abs().max() > 100 * BOUND
    assert all(torch.equal(alone.state_dict()[name], tensor) for name, tensor in factors.items())
    alone.load_state_dict({name: tensor.flip(0) for name, tensor in factors.items()}, strict=False)
    other.load_state_dict(alone.state_dict())
    assert torch.equal(one_pass(alone, ids), one_pass(other, ids))


def test_exported_model_follows_its_weights_and_saves_itself(tmp_path):
    model, _, variant_dir = make_variant(tmp_path, "qwen2", "lorc_q", Energy())
    lorc_core.export_variant(variant_dir, tmp_path / "exported")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager").eval()
    ids = tokens(model)
    expected = one_pass(alone, ids)
    other = copy.deepcopy(alone)
    assert one_pass(alone.double(), ids).dtype == torch.float64
    assert torch.equal(one_pass(other, ids), expected)
    assert torch.equal(one_pass(other.double(), ids), one_pass(alone, ids))
    assert_close(one_pass(alone.float(), ids), expected)
    alone.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    assert torch.equal(one_pass(again, ids), one_pass(alone, ids))


IN_A_NEW_PROCESS = """
import sys, torch
{imports}
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], {options})
torch.save(model.eval()(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
base_model = AutoModel.from_pretrained(sys.argv[1], {options}).eval()
assert type(base_model) is not type(model.base_model)
expected = model.base_model(torch.load(sys.argv[2])).last_hidden_state
assert torch.equal(base_model(torch.load(sys.argv[2])).last_hidden_state, expected)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("imports", "options"),
    [
        ("import lorc_core\nfrom transformers import AutoModel, AutoModelForCausalLM", ""),
        ("from transformers import AutoModel, AutoModelForCausalLM", "trust_remote_code=True"),
    ],
    ids=["lorc", "shim"],
)
def test_transformers_loads_it_in_a_new_process(tmp_path, monkeypatch, imports, options):
    model, variant, variant_dir = make_variant(tmp_path, "llama", "lorc", Uniform())
    lorc_core.export_variant(variant_dir, tmp_path / "exported")
    (tmp_path / "base").rename(tmp_path / "gone")
    ids = tokens(model)
    torch.save(ids, tmp_path / "ids.pt")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # the shim is copied there
    script = IN_A_NEW_PROCESS.format(imports=imports, options=options)
    arguments = [str(tmp_path / name) for name in ("exported", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
    with lorc_core.attach(model, variant):
        assert_close(torch.load(tmp_path / "logits.pt"), one_pass(model, ids))


def test_without_lorc_the_checkpoint_says_how_to_get_it(tmp_path, monkeypatch):
    _, _, variant_dir = make_variant(tmp_path, "llama", "lorc", Uniform())
    lorc_core.export_variant(variant_dir, tmp_path / "exported")
    shim = tmp_path / "exported" / "modeling_lorc.py"
    assert get_imports(shim) == []  # else transformers advises `pip install lorc_core`, which is no distribution
    assert {"LorcLlamaConfig", "LorcLlamaModel", "LorcLlamaForCausalLM"} < runpy.run_path(str(shim)).keys()
    monkeypatch.setitem(sys.modules, "lorc_core.standalone", None)
    with pytest.raises(ImportError, match="on no package index: pip install a checkout"):
        runpy.run_path(str(shim))


def test_importing_lorc_alone_does_not_import_transformers():
    script = "import sys, lorc_core; print('transformers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path):
    _, _, variant_dir = make_variant(tmp_path, "llama", "lorc", Uniform())
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        lorc_core.export_variant(variant_dir, full)
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        lorc_core.export_variant(full, tmp_path / "exported")
    save_tiny_model("llama", tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match="not the base model this variant was made for"):
        lorc_core.export_variant(variant_dir, tmp_path / "exported", base=tmp_path / "other")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="does not exist"):
        lorc_core.export_variant(variant_dir, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    lorc_core.export_variant(variant_dir, tmp_path / "exported", base=tmp_path / "moved")


def test_a_standalone_config_of_another_schema_is_refused(tmp_path):
    _, _, variant_dir = make_variant(tmp_path, "llama", "lorc", Uniform())
    lorc_core.export_variant(variant_dir, tmp_path / "exported")
    path = tmp_path / "exported" / "config.json"
    config = json.loads(path.read_text())
    config["lorc"]["schema_version"] = 99
    path.write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path / "exported").model_type == "lorc_llama"
    with pytest.raises(ArtifactError, match="standalone schema 99, this lorc reads 1"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
