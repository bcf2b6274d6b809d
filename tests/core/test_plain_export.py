"""Plain exports against the same variants attached to their base; in a process without lorc too.

Worst logit difference measured: TODO in float32; the bound is 1e-4.
"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import lorc_core
from lorc_core.errors import ConfigError, UnsupportedModelError
from lorc_core.methods import METHODS
from lorc_core.plain_export import MODEL_FILE
from lorc_core.schedule import Energy, Uniform
from tests.core import families
from tests.core.test_export import GREEDY, make_variant
from tests.core.test_runtime import BOUND, assert_close, one_pass, token_by_token, tokens

LIKE_SMALL = {"llama-mha", "mistral-sliding", "opt"}


def save_family(name, directory):
    families.tiny_model(name).save_pretrained(directory)
    return directory


def variant_of(base, directory, method, kept=0.5, schedule=None):
    """The base model and a variant of it, saved in `directory`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    calibration = tokens(model, rows=16, columns=24, seed=9)
    variant = lorc_core.compress(base, METHODS[method], kept, schedule or Uniform(), calibration=calibration)
    variant.save(directory)
    return model, variant


def load_plain(directory, tmp_path, monkeypatch, **options):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


@pytest.fixture(autouse=True)
def modules_of_this_test(tmp_path, monkeypatch):
    """Where transformers keeps the code of checkpoints."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


# biases or none, one kv head, a mean that is no bias, norms before and after the split into heads, no rotation
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


@pytest.mark.parametrize(("name", "method"), CASES)
def test_plain_equals_attached(tmp_path, name, method):
    base = save_family(name, tmp_path / "base")
    model, variant = variant_of(base, tmp_path / "variant", method)
    exported = lorc_core.export_plain(tmp_path / "variant", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", trust_remote_code=True).eval()
    ids = tokens(model)
    baseline = one_pass(model, ids)
    with lorc_core.attach(model, variant):
        expected = one_pass(model, ids)
    print("MAXDIFF", name, method, (one_pass(plain, ids) - expected).abs().max().item(), (baseline - expected).abs().max().item())
    assert (baseline - expected).abs().max() > 100 * BOUND
    assert_close(one_pass(plain, ids), expected)
    assert_close(one_pass(plain, ids, use_cache=False), expected)
    assert_close(token_by_token(plain, ids, 7), expected)
