"""A model that accelerate spread over the processor and the disk gives, with a variant attached, the logits of a whole one."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorc_core

# Of each family where what is not a layer is; OPT's head is its embedding. The layers after the first are on the disk.
ON_CPU_AND_DISK = {
    "llama": ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers"),
    "opt": ("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.final_layer_norm", "lm_head",
            "model.decoder.layers"),
}  # fmt: skip


def spread(name, num_layers):
    *others, layers = ON_CPU_AND_DISK[name]
    devices = dict.fromkeys(others, "cpu")
    return devices | {f"{layers}.{idx}": "disk" if idx else "cpu" for idx in range(num_layers)}


@pytest.mark.parametrize("method", ["lorc", "lorc_q"])
@pytest.mark.parametrize("name", sorted(ON_CPU_AND_DISK))
def test_a_dispatched_model_with_a_variant_gives_the_logits_of_a_whole_one(save_tiny, tmp_path, name, method):
    directory = save_tiny(name)
    variant = lorc_core.compress(directory, method, 0.5, schedule="uniform")
    whole = AutoModelForCausalLM.from_pretrained(directory)
    devices = spread(name, whole.config.num_hidden_layers)
    dispatched = AutoModelForCausalLM.from_pretrained(directory, device_map=devices, offload_folder=tmp_path / "disk")
    assert any(parameter.is_meta for parameter in dispatched.parameters()), "nothing is on the disk"
    ids = torch.arange(40).view(2, 20) % 100
    untouched = whole(ids).logits
    with lorc_core.attach(whole, variant), lorc_core.attach(dispatched, variant):
        expected, logits = whole(ids).logits, dispatched(ids).logits
        assert torch.equal(logits, expected)
        assert not torch.allclose(expected, untouched, atol=1e-3), "the variant does nothing"
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(dispatched.generate(ids, **options), whole.generate(ids, **options))
    assert torch.equal(dispatched(ids).logits, untouched)
