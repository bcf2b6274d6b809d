"""Rotary kinds against transformers' own modules; slot tables against the rotation they are asked for."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lorc_core.attention.scores.slot_turns import SlotTurns
from lorc_core.model.architecture import architecture_of
from lorc_core.model.rotation import LayerRotation
from tests.models import CONFIGS, tiny_model

VARYING = {"llama-dynamic", "phi3-longrope"}  # their angles change with the length of the text


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "gemma3_text", "gptj", *sorted(VARYING)])
def test_rotations_that_vary_with_the_length_are_told_from_fixed_ones(name):
    found = [rotation.is_fixed for rotation in rotations(name)]
    assert found == [name not in VARYING] * len(found)


def test_module_that_does_not_name_its_kind_is_not_taken_for_a_fixed_one():
    (rotation,) = rotations("llama")
    with pytest.raises(AttributeError, match="rope_type"):
        _ = replace(rotation, module=nn.Identity()).is_fixed


def test_slot_tables_of_two_models_are_told_apart():
    """Their facts are equal, since frequencies are not compared; their modules are not."""
    (first,), (second,) = rotations("llama"), rotations("llama-linear")
    assert first.rotary == second.rotary
    like, slots, turns = torch.zeros(1, 1, 1, 16), torch.arange(SlotTurns.BLOCK)[None], SlotTurns()
    for rotation in (first, second):
        expected = rotation(like, slots).turns()
        torch.testing.assert_close(turns.at(rotation, like, 3).turns, expected, rtol=0, atol=0)
    assert not torch.equal(first(like, slots).turns(), second(like, slots).turns())


def rotations(name):
    """Every kind of rotation of a model, as an attachment makes them."""
    base = tiny_model(name).base_model
    module = getattr(base, "rotary_emb", None)
    return [LayerRotation(rotary, module) for rotary in architecture_of(CONFIGS[name]).rotaries]
