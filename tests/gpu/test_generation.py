"""Generation on a GPU: offloaded caches, compiled decoding, flash attention. Unproven: no GPU was at hand, none has run.

transformers offloads caches through CUDA streams, so those have no test on CPU either.
"""

import copy
import importlib.util

import pytest
import torch

import lorc_core
from tests.caches import reachable_bytes
from tests.runs import GREEDY, padded_batch
from tests.variants import case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(name, method, dtype=torch.float32):
    model, variant = case(name, method)
    return copy.deepcopy(model).to("cuda", dtype), variant


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static", "static"])
@pytest.mark.parametrize("method", ["lorc_q", "kq_svd", "phasor_freq"])
def test_caches_on_the_gpu_give_the_tokens_of_no_cache(cache, method):
    """`generate` compiles the static cache's steps here by itself."""
    model, variant = on_gpu("llama", method)
    ids, mask = (part.to("cuda") for part in padded_batch(model))
    options = {"attention_mask": mask, **GREEDY}
    with lorc_core.attach(model, variant):
        expected = model.generate(ids, use_cache=False, **options)
        found = model.generate(ids, cache_implementation=cache, return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, expected)
    assert lorc_core.cache_bytes(found.past_key_values) == reachable_bytes(found.past_key_values)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash_attn")
@pytest.mark.parametrize("method", ["lorc_q", "kq_svd"])
def test_flash_attention_agrees_with_sdpa(method):
    model, variant = on_gpu("llama", method, torch.bfloat16)
    ids, mask = (part.to("cuda") for part in padded_batch(model))
    logits = []
    for implementation in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(implementation)
        with lorc_core.attach(model, variant), torch.inference_mode():
            logits.append(model(ids, attention_mask=mask).logits[:, -1].float())
    assert ((logits[0] - logits[1]).norm() / logits[0].norm()).item() < 0.05
