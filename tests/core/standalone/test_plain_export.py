"""Plain exports against the same variants attached to their base, and in a process that cannot import lorc.

Worst logit difference measured: 3.5e-6 in float32; the bound is 1e-4.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StaticCache,
)

import lorc_core
from lorc_core.errors import ConfigError, UnsupportedModelError
from lorc_core.methods import METHODS
from lorc_core.model.kinds import KeysValues
from lorc_core.ranks.schedules import Energy, Uniform
from lorc_core.ranks.spectra import LayerRanks
from tests.models import tiny_model
from tests.runs import BOUND, GREEDY, assert_close, one_pass, padded_batch, token_by_token, tokens
from tests.variants import make_variant, random_adapters

# biases or none, one kv head, norms before and after the split into heads, a layer without rotation, none at all
CASES = [
    ("llama", "kq_svd"),
    ("llama-mha", "k_svd"),
    ("llama-mqa", "eigen"),
    ("llama-llama3", "kq_svd"),
    ("mistral", "zack"),
    ("qwen2", "kq_svd"),
    ("qwen3", "kq_svd"),
    ("olmo2", "k_svd"),
    ("granite", "kq_svd"),
    ("smollm3", "kq_svd"),
    ("opt", "kq_svd"),
    ("opt", "k_svd"),
]


@pytest.fixture(autouse=True)
def checkpoints_code_in_the_test(tmp_path, monkeypatch):
    """Where transformers keeps the code that comes with checkpoints."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def save_variant(directory, name, method, schedule=None, kept=0.5):
    """A tiny model of a family, loaded from `directory / "base"`, and a variant of it, saved beside."""
    tiny_model(name).save_pretrained(directory / "base")
    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).eval()
    calibration = tokens(model, rows=16, columns=24, seed=9)
    variant = lorc_core.compress(
        directory / "base", METHODS[method], kept, schedule or Uniform(), calibration=calibration
    )
    variant.save(directory / "variant")
    return model, variant


def exported(directory, **options):
    """The variant of `save_variant` as a plain model."""
    lorc_core.export_plain(directory / "variant", directory / "plain")
    return load(directory / "plain", **options)


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


def cached(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids).past_key_values


@pytest.mark.parametrize(("name", "method"), CASES)
def test_plain_equals_attached_and_caches_as_much(tmp_path, name, method):
    model, variant = save_variant(tmp_path, name, method)
    plain, ids = exported(tmp_path), tokens(model)
    baseline = one_pass(model, ids)
    with lorc_core.attach(model, variant):
        expected, held = one_pass(model, ids), lorc_core.cache_bytes(cached(model, ids))
    assert (baseline - expected).abs().max() > 100 * BOUND
    assert_close(one_pass(plain, ids), expected)
    assert_close(one_pass(plain, ids, use_cache=False), expected)
    assert_close(token_by_token(plain, ids, 7), expected)
    static = StaticCache(config=plain.config, max_cache_len=40)
    assert_close(token_by_token(plain, ids, 7, static), expected)
    assert lorc_core.cache_bytes(cached(plain, ids)) == held < lorc_core.cache_bytes(cached(model, ids))
    check_base_model(tmp_path / "plain", plain, ids)


def check_base_model(directory, plain, ids):
    """vLLM builds `AutoModel.from_config` and fills in the weights itself."""
    expected = plain.base_model(input_ids=ids).last_hidden_state
    loaded = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    built = AutoModel.from_config(config, trust_remote_code=True).eval()
    assert not torch.equal(built(input_ids=ids).last_hidden_state, expected)
    built.load_state_dict(plain.base_model.state_dict())
    for base in (loaded, built):
        assert torch.equal(base(input_ids=ids).last_hidden_state, expected)
        assert lorc_core.cache_bytes(cached(base, ids)) == lorc_core.cache_bytes(cached(plain, ids))


@pytest.mark.parametrize(("name", "implementation"), [("llama", "sdpa"), ("mistral", "eager"), ("opt", "sdpa")])
def test_generate_left_padded_with_caches_and_beams(tmp_path, name, implementation):
    model, variant = save_variant(tmp_path, name, "kq_svd", kept=0.25)
    plain = exported(tmp_path, attn_implementation=implementation)
    ids, mask = padded_batch(model)
    options = {"attention_mask": mask, **GREEDY}
    untouched = model.generate(ids, **options)
    with lorc_core.attach(model, variant):
        text, beams = model.generate(ids, **options), model.generate(ids, num_beams=3, **options)
    assert not torch.equal(text, untouched)
    assert torch.equal(plain.generate(ids, **options), text)
    assert torch.equal(plain.generate(ids, cache_implementation="static", **options), text)
    assert torch.equal(plain.generate(ids, num_beams=3, **options), beams)


def test_paged_cache_has_heads_of_the_smaller_size(tmp_path):
    """Continuous batching allocates its pages from the config, as serving engines do."""
    save_variant(tmp_path, "qwen2", "kq_svd")
    plain = exported(tmp_path)
    prompts = tokens(plain, rows=2, columns=9)
    endless = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = plain.generate(prompts, generation_config=endless)[:, 9:]
    small = ContinuousBatchingConfig(page_size=32, num_blocks=4, max_batch_tokens=32)
    found = plain.generate_batch(
        [row.tolist() for row in prompts], generation_config=endless, continuous_batching_config=small
    )
    assert sorted(one.generated_tokens for one in found.values()) == sorted(expected.tolist())


def test_unequal_ranks_are_padded_and_said(tmp_path):
    model, small = save_variant(tmp_path, "qwen2", "kq_svd", kept=0.25)
    large = save_variant(tmp_path, "qwen2", "kq_svd", kept=0.75)[1]
    factors = tuple(KeysValues(large.factors[idx].keys, small.factors[idx].values) for idx in range(3))
    layers = tuple(LayerRanks(large.ranks.layers[idx].keys, small.ranks.layers[idx].values) for idx in range(3))
    variant = replace(large, factors=factors, ranks=replace(large.ranks, layers=layers))
    variant.save(tmp_path / "variant")
    found = lorc_core.export_plain(tmp_path / "variant", tmp_path / "plain")
    assert (found.head_size, found.ranks) == (12, {"keys": 12, "values": 4})
    plain, ids = load(tmp_path / "plain"), tokens(model)
    with lorc_core.attach(model, variant):
        assert_close(token_by_token(plain, ids, 7), one_pass(model, ids))
    assert lorc_core.cache_bytes(cached(plain, ids)) == ids.numel() * 3 * 2 * (12 + 12) * 4  # 3 layers of 2 kv heads


def test_no_path_of_this_machine_is_in_the_config(tmp_path):
    _, variant = save_variant(tmp_path, "llama", "kq_svd")
    lorc_core.export_plain(tmp_path / "variant", tmp_path / "plain")
    lorc_core.export_variant(tmp_path / "variant", tmp_path / "exported")
    for directory, field in (("plain", "lorc_plain"), ("exported", "lorc")):
        text = (tmp_path / directory / "config.json").read_text()
        assert str(tmp_path) not in text
        assert json.loads(text)[field]["base"] == {"source": "base", "fingerprint": variant.base.fingerprint}


def test_a_dropped_value_offset_is_seen(tmp_path):
    """The control: Qwen2's o_proj has no bias of its own; this one holds what the values' biases lost."""
    model, variant = save_variant(tmp_path, "qwen2", "kq_svd")
    plain, ids = exported(tmp_path), tokens(model)
    for layer in plain.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()
    with lorc_core.attach(model, variant):
        assert (one_pass(plain, ids) - one_pass(model, ids)).abs().max() > 100 * BOUND


def test_adapters_are_merged(tmp_path):
    model, variant, _ = make_variant(tmp_path, "llama", "k_svd", Uniform(), adapters=random_adapters())
    plain, ids = exported(tmp_path), tokens(model)
    with lorc_core.attach(model, variant):
        expected = one_pass(model, ids)
    with lorc_core.attach(model, replace(variant, adapters={})):
        assert (one_pass(model, ids) - expected).abs().max() > 100 * BOUND
    assert_close(one_pass(plain, ids), expected)


def test_plain_model_is_cast_returns_attention_weights_and_saves_itself(tmp_path):
    model, _ = save_variant(tmp_path, "qwen3", "k_svd")
    plain, ids = exported(tmp_path, attn_implementation="eager"), tokens(model)
    expected = one_pass(plain, ids)
    weights = plain(input_ids=ids, output_attentions=True).attentions
    assert [one.shape for one in weights] == [(2, 4, 24, 24)] * 3
    assert one_pass(plain.double(), ids).dtype == torch.float64
    plain.float().save_pretrained(tmp_path / "again")
    assert_close(one_pass(load(tmp_path / "again"), ids), expected)


WITHOUT_LORC = """
import sys
sys.modules["lorc_core"] = None
try:
    import lorc_core
except ImportError:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        AutoTokenizer.from_pretrained(f"{name}/plain", trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(f"{name}/plain", trust_remote_code=True).eval()
        output = model(torch.load(f"{name}/ids.pt"))
        layer = output.past_key_values.layers[0]
        config = AutoConfig.from_pretrained(f"{name}/plain", trust_remote_code=True)
        base = AutoModel.from_config(config, trust_remote_code=True).eval()
        base.load_state_dict(AutoModel.from_pretrained(f"{name}/plain", trust_remote_code=True).state_dict())
        logits = model.lm_head(base(torch.load(f"{name}/ids.pt")).last_hidden_state)
        assert torch.equal(logits, output.logits), name
        torch.save((logits.detach(), layer.keys.shape, layer.values.shape), f"{name}/found.pt")
"""


@pytest.mark.slow
def test_a_new_process_that_cannot_import_lorc_loads_it(tmp_path):
    expected = {}
    for name in ("llama", "opt"):
        model, variant, variant_dir = make_variant(tmp_path / name, name, "kq_svd", Uniform())
        lorc_core.export_plain(variant_dir, tmp_path / name / "plain")
        (tmp_path / name / "base").rename(tmp_path / name / "gone")
        torch.save(tokens(model), tmp_path / name / "ids.pt")
        with lorc_core.attach(model, variant):
            expected[name] = one_pass(model, tokens(model))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", WITHOUT_LORC, *expected],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "hf")},
    )
    for name, num_kv_heads in (("llama", 2), ("opt", 4)):
        logits, *shapes = torch.load(tmp_path / name / "found.pt")
        assert shapes == [(2, num_kv_heads, 24, 10)] * 2  # 0.6 of 16
        assert_close(logits, expected[name])


@pytest.mark.parametrize(
    ("name", "method", "schedule", "error", "message"),
    [
        ("llama", "lorc", Uniform(), ConfigError, "layer 0 keys: lorc projects them by block joint; .*kq_svd"),
        ("llama-mqa", "kq_joint", Uniform(), ConfigError, "layer 0 keys: kq_joint projects them before the rotation"),
        ("llama", "phasor_freq", Uniform(), ConfigError, "layer 0 keys: phasor_freq projects them by block frequency"),
        ("llama", "kq_svd", Energy(), ConfigError, "layer [012] (keys|values): rank [0-9]+, where others have [0-9]+"),
        ("llama", "kq_svd", Uniform(skip_layers=(1,)), ConfigError, "layer 1 keys: full width kept, .*uniform"),
        ("gemma", "kq_svd", Uniform(), UnsupportedModelError, "gemma: no plain export of such models; there is for"),
    ],
    ids=["joint", "before-rotation", "frequency", "uneven", "skipped", "family"],
)
def test_what_is_not_plain_is_refused_and_leaves_nothing(tmp_path, name, method, schedule, error, message):
    save_variant(tmp_path, name, method, schedule)
    with pytest.raises(error, match=message):
        lorc_core.export_plain(tmp_path / "variant", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
