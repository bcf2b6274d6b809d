"""Every way to generate that transformers has, on latents, against generation without any cache.

The reference rebuilds everything at each step from the tokens alone, so it knows no cache, no positions of cached keys
and no order of beams. Every case also differs from the untouched model, which sees that a variant is attached at all.
"""

import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, StaticCache

import lorc_core
from lorc_core.errors import ConfigError
from lorc_core.ranks.schedules import Uniform
from tests.models import tiny_model
from tests.runs import GREEDY, NEW_TOKENS, padded_batch, tokens
from tests.variants import VARIANTS, case


def check_generates(model, variant, ids, expected_options=None, **options):
    """Generation with `options` on latents gives the tokens of generation without a cache."""
    untouched = model.generate(ids, **GREEDY, **(expected_options or {}))
    with lorc_core.attach(model, variant):
        expected = model.generate(ids, use_cache=False, **GREEDY, **(expected_options or {}))
        found = model.generate(ids, **GREEDY, **(expected_options or {}), **options)
    assert torch.equal(found, expected)
    assert not torch.equal(expected, untouched)


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize(("name", "implementation"), [("llama", "sdpa"), ("mistral", "eager")])
def test_padded_batch_in_dynamic_and_static_caches(method, name, implementation):
    model, variant = case(name, method)
    ids, mask = padded_batch(model)
    model.set_attn_implementation(implementation)
    check_generates(model, variant, ids, {"attention_mask": mask})
    check_generates(model, variant, ids, {"attention_mask": mask}, cache_implementation="static")


@pytest.mark.parametrize("method", VARIANTS)
def test_beam_search_reorders_latents(method):
    model, variant = case("qwen2", method)
    ids, mask = padded_batch(model)
    for options in ({}, {"cache_implementation": "static"}):
        check_generates(model, variant, ids, {"attention_mask": mask, "num_beams": 3}, **options)


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_assisted_decoding_as_target_and_as_draft(method, name):
    """The draft proposes, so it may be any model: what comes out is the target's; rejected tokens are cropped."""
    model, variant = case(name, method)
    other, ids = tiny_model(name, seed=1), tokens(model, rows=1, columns=9)
    check_generates(model, variant, ids, assistant_model=other)
    expected = other.generate(ids, use_cache=False, **GREEDY)
    with lorc_core.attach(model, variant):
        assert torch.equal(other.generate(ids, assistant_model=model, **GREEDY), expected)


def test_a_draft_of_the_same_model_is_accepted():
    """Self-speculation: the untouched model checks what the same model drafts from fewer directions."""
    draft, variant = case("llama", "lorc_q", Uniform(), kept=0.9)
    model = tiny_model("llama")
    ids = tokens(model, rows=1, columns=9)
    expected = model.generate(ids, **GREEDY)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(None))
    with lorc_core.attach(draft, variant):
        found = model.generate(ids, assistant_model=draft, **GREEDY)
    handle.remove()
    assert torch.equal(found, expected)
    assert len(calls) < NEW_TOKENS


@pytest.mark.parametrize("method", VARIANTS)
def test_prompt_lookup(method):
    model, variant = case("llama", method)
    check_generates(model, variant, tokens(model, rows=1, columns=6).repeat(1, 3), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "phasor_freq"), ("opt", "lorc_q"), ("mistral", "kq_svd"), ("qwen2", "lorc_q")],
)
@pytest.mark.parametrize("static", [False, True])
def test_a_conversation_goes_on_with_the_kept_cache(name, method, static):
    model, variant = case(name, method)
    ids, reply = tokens(model, rows=1, columns=7), tokens(model, rows=1, columns=5, seed=3)
    with lorc_core.attach(model, variant):
        cache = StaticCache(model.config, max_cache_len=48) if static else DynamicCache(config=model.config)
        first = model.generate(ids, past_key_values=cache, **GREEDY)
        both = torch.cat([first, reply], dim=1)
        mask = torch.ones_like(both)
        second = model.generate(both, past_key_values=cache, attention_mask=mask, **GREEDY)
        expected = model.generate(both, use_cache=False, attention_mask=mask, **GREEDY)
    assert torch.equal(second, expected)


@pytest.mark.parametrize("method", VARIANTS)
def test_prefill_in_chunks(method):
    """transformers would allocate the static cache by the config's heads before the first chunk."""
    model, variant = case("llama", method)
    ids = tokens(model, rows=2, columns=11)
    for options in ({}, {"cache_implementation": "static"}):
        check_generates(model, variant, ids, prefill_chunk_size=4, **options)
    assert "_get_static_cache_init_shape" not in vars(model)


def test_a_cache_made_for_other_states_is_refused():
    model, variant = case("llama", "lorc_q", Uniform())
    ids = tokens(model)
    early = StaticCache(model.config, max_cache_len=32)
    early.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    filled = model(ids).past_key_values
    with lorc_core.attach(model, variant), torch.inference_mode():
        for held in (early, filled):
            with pytest.raises(ConfigError, match="layer 0 keys: the cache was made for 2 x 16 floats per token"):
                model(ids, past_key_values=held)


COMPILED = """
import torch
from transformers import CompileConfig
import lorc_core
from tests.runs import GREEDY, tokens
from tests.variants import case
model, variant = case("llama", "lorc_q")
ids = tokens(model, rows=1, columns=9)
options = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
options._compile_all_devices = True
with lorc_core.attach(model, variant):
    expected = model.generate(ids, use_cache=False, **GREEDY)
    found = model.generate(ids, cache_implementation="static", compile_config=options, **GREEDY)
counters = torch._dynamo.utils.counters
print(torch.equal(found, expected), counters["stats"]["unique_graphs"], len(counters["graph_break"]))
"""


@pytest.mark.slow
def test_decoding_compiles_to_one_graph_for_all_steps():
    """In a process of its own, without the shape checks of the tests, which no graph can hold."""
    done = subprocess.run([sys.executable, "-c", COMPILED], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "1", "0"]
