"""Bytes of caches against every tensor that Python finds in them, and against the memory of a process."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

import lorc_core
from lorc_core.errors import ConfigError
from lorc_core.ranks.schedules import Uniform
from tests.caches import reachable_bytes
from tests.runs import one_pass, token_by_token, tokens
from tests.variants import case

AVAILABLE = {"hqq": is_hqq_available, "quanto": is_optimum_quanto_available, "fp8": lambda: True}


def filled(name, make, method="lorc_q", schedule=None):
    """A cache after a prefill and single tokens, by an attached variant."""
    model, variant = case(name, method, schedule or Uniform(rank_multiple=16), kept=0.5)
    ids, cache = tokens(model, columns=30), make(model.config)
    with lorc_core.attach(model, variant):
        token_by_token(model, ids, 17, cache)
    return cache, variant


def quantized(backend, **options):
    def make(config):
        settings = {} if backend == "fp8" else {"nbits": 4, "q_group_size": 16, "residual_length": 8} | options
        return QuantizedCache(backend, config, **settings)

    return make


def skip_without(backend):
    if not AVAILABLE[backend]():
        pytest.skip(f"{backend} is not installed: pip install '.[quantized]'")


@pytest.mark.parametrize(
    ("name", "make", "tokens_held"),
    [
        ("llama", lambda config: DynamicCache(config=config), 30),
        ("llama", lambda config: StaticCache(config, max_cache_len=40), 40),
        ("mistral", lambda config: DynamicCache(config=config), 12),  # the window's 11, and the newest token
        ("mistral", lambda config: StaticCache(config, max_cache_len=40), 12),
    ],
    ids=["dynamic", "static", "sliding", "static sliding"],
)
def test_bytes_are_those_of_the_tensors_held(name, make, tokens_held):
    cache, variant = filled(name, make)
    assert lorc_core.cache_bytes(cache) == reachable_bytes(cache)
    assert lorc_core.cache_bytes(cache) == 2 * tokens_held * 4 * variant.ranks.floats_per_token


def test_a_window_that_keeps_a_long_prefill_in_memory_counts_all_of_it():
    """A view of 11 tokens keeps the 30 of the prefill until the next token comes."""
    model, variant = case("mistral", "lorc_q", Uniform(rank_multiple=16), kept=0.5)
    with lorc_core.attach(model, variant), torch.inference_mode():
        cache = model(tokens(model, columns=30), past_key_values=DynamicCache(config=model.config)).past_key_values
    assert cache.layers[0].keys.shape[2] == 11
    assert lorc_core.cache_bytes(cache) == reachable_bytes(cache) == 2 * 30 * 4 * variant.ranks.floats_per_token


@pytest.mark.parametrize("backend", [pytest.param("hqq"), pytest.param("quanto", marks=pytest.mark.slow), "fp8"])
def test_bytes_of_quantized_latents_count_scales_zeros_and_the_residual_window(backend):
    """4 bits for each float, and for each 16 of them a scale and a zero point; the newest tokens in float32."""
    skip_without(backend)
    cache, variant = filled("llama-mha", quantized(backend))
    floats = variant.ranks.floats_per_token
    held = lorc_core.cache_bytes(cache)
    assert held == reachable_bytes(cache)
    residual = 0 if cache.layers[0].keys.dim() < 4 else cache.layers[0].keys.shape[2]
    packed = 2 * (30 - residual) * floats
    if backend == "fp8":
        assert held == packed + 2 * 4 * len(cache.layers)
    else:
        assert residual == 30 - 17 - 8
        assert held == packed // 2 + packed // 16 * 8 + 2 * residual * floats * 4


@pytest.mark.parametrize(
    ("backend", "nbits", "bound"),
    [("hqq", 8, 0.05), ("hqq", 4, 0.7), pytest.param("quanto", 4, 0.7, marks=pytest.mark.slow)],
)
def test_quantized_latents_are_close_and_fewer_bits_are_farther(backend, nbits, bound):
    """Relative error of the logits of decoded tokens; quanto compiles its kernel when it is first used."""
    skip_without(backend)
    model, variant = case("llama-mha", "kq_joint", Uniform(rank_multiple=16), kept=0.5)
    ids = tokens(model, columns=30)
    with lorc_core.attach(model, variant):
        expected = one_pass(model, ids)
        near, far = (
            relative_error(token_by_token(model, ids, 12, quantized(backend, nbits=bits)(model.config)), expected)
            for bits in (nbits, 2)
        )
    assert 0 < near < bound
    assert near < far


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_latents_that_cannot_be_grouped_are_refused_before_the_first_token():
    skip_without("hqq")
    model, variant = case("llama-mha", "lorc_q", Uniform(), kept=0.4)
    message = r"layer 0 keys: 26 floats per token cannot be quantized in groups of 16; take a q_group_size that divides"
    with lorc_core.attach(model, variant), pytest.raises(ConfigError, match=message):
        model(tokens(model), past_key_values=quantized("hqq")(model.config))


PEAK = """
import sys, torch, lorc_core
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, DynamicCache
from lorc_core.caches.memory import cache_bytes
torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=16, num_attention_heads=8,
                     num_key_value_heads=8, head_dim=64, vocab_size=64, initializer_range=0.1)
model = LlamaForCausalLM(config).eval()
if float(sys.argv[1]) < 1:
    lorc_core.attach(model, lorc_core.compress(model, "lorc", float(sys.argv[1]), "uniform"))
cache, ids = DynamicCache(config=config), torch.randint(0, 64, (32, 256))
with torch.inference_mode():
    model(ids[:, :64], past_key_values=DynamicCache(config=config), logits_to_keep=1)
    for start in range(0, 256, 64):
        model(ids[:, start:start + 64], past_key_values=cache, logits_to_keep=1)
# not getrusage: a child begins with the peak of the process that started it
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(cache_bytes(cache), int(peak.split()[1]) * 1024)
"""


@pytest.mark.slow
def test_the_memory_of_a_process_falls_with_the_cache():
    """Peak resident memory with 8,192 tokens cached: what the cache saves, less what rebuilding one layer takes.

    The cache falls by 403 MB.
    """
    # glibc would keep freed blocks of up to 32 MB for later; from 1 MB on they now go back to the system at once
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    (full, full_peak), (quarter, quarter_peak) = (
        map(
            int,
            subprocess.run(
                [sys.executable, "-c", PEAK, kept], env=environment, check=True, capture_output=True, text=True
            ).stdout.split(),
        )
        for kept in ("1", "0.25")
    )
    assert full == 32 * 256 * 16 * 2 * 512 * 4
    assert quarter == full // 4
    rebuilt = full // 16  # one layer's keys and values; rotating the keys takes as much again, twice
    assert full - quarter - 3 * rebuilt < full_peak - quarter_peak < 1.5 * (full - quarter)
