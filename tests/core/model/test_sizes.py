"""Configs with impossible sizes are refused by field before a model is built from them."""

from copy import deepcopy

import pytest

from lorc_core.errors import ArtifactError
from lorc_core.model.architecture import architecture_of
from lorc_core.model.sizes import check_sizes
from tests.models import CONFIGS

HOSTILE = {
    "layers": ("num_hidden_layers", 10**9, "num_hidden_layers must be in 1..1,000, got 1000000000"),
    "no layers": ("num_hidden_layers", 0, "num_hidden_layers must be in 1..1,000, got 0"),
    "hidden size": ("hidden_size", 10**12, "hidden_size must be in 1..1,048,576, got 1000000000000"),
    "text": ("hidden_size", "64", "hidden_size must be in 1..1,048,576, got '64'"),
    "a truth value": ("num_attention_heads", True, "num_attention_heads must be in .*, got True"),
    "head_dim 0": ("head_dim", 0, "head_dim must be in 1..16,384, got 0"),
    "head_dim below 0": ("head_dim", -8, "head_dim must be in 1..16,384, got -8"),
    "no kv heads": ("num_key_value_heads", 0, "num_key_value_heads must be in 1..16,384, got 0"),
    "kv heads that do not divide": ("num_key_value_heads", 3, "num_key_value_heads is 3, which does not divide the 4"),
    "vocabulary": ("vocab_size", 0, "vocab_size must be in 1..16,777,216, got 0"),
    "mlp": ("intermediate_size", 10**13, "intermediate_size must be in"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_passes(name):
    check_sizes(CONFIGS[name])


@pytest.mark.parametrize("name", HOSTILE)
def test_an_impossible_size_is_refused_by_its_field(name):
    field, value, message = HOSTILE[name]
    config = deepcopy(CONFIGS["llama"])
    object.__setattr__(config, field, value)
    with pytest.raises(ArtifactError, match=f"llama: config field {message}"):
        architecture_of(config)


def test_heads_that_do_not_divide_the_hidden_size_need_a_head_dim():
    config = deepcopy(CONFIGS["opt"])
    object.__setattr__(config, "num_attention_heads", 5)
    with pytest.raises(ArtifactError, match="num_attention_heads is 5, which does not divide the hidden_size 64"):
        architecture_of(config)
