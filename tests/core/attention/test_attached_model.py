"""What is done to a model while a variant is attached to it: it is saved, cast and copied.

Against the same done to the bare model, with the variant attached afterwards: bitwise, in float64.
"""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorc_core
from tests.models import tiny_model
from tests.runs import BOUND, one_pass, tokens
from tests.variants import case, random_adapters


def test_save_pretrained_warns_that_it_saves_the_base(tmp_path):
    model = tiny_model("llama")
    variant, weights = lorc_core.compress(model), model.state_dict()
    advice = r"the base model alone.*variant\.save.*lorc_core\.export_variant"
    with lorc_core.attach(model, variant), pytest.warns(UserWarning, match=advice):
        model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    model.save_pretrained(tmp_path)  # no warning, which here would be an error


@pytest.mark.parametrize("method", ["lorc", "kq_svd", "phasor_freq"])
def test_a_cast_model_takes_its_factors_along(method):
    _, variant = case("llama", method, "uniform")
    variant = replace(variant, adapters=random_adapters())
    cast_first, cast_later = tiny_model("llama").double(), tiny_model("llama")
    ids = tokens(cast_first)
    untouched = one_pass(cast_first, ids)
    with lorc_core.attach(cast_first, variant):
        expected = one_pass(cast_first, ids)
    assert (untouched - expected).abs().max() > 100 * BOUND
    with lorc_core.attach(cast_later, variant):
        before = one_pass(cast_later, ids)
        torch.testing.assert_close(one_pass(cast_later.double(), ids), expected, rtol=0, atol=1e-13)
        assert torch.equal(one_pass(cast_later.float(), ids), before)
    assert torch.equal(one_pass(cast_later.double(), ids), untouched)


def test_a_cast_model_that_attends_by_itself_takes_its_factors_along():
    model = tiny_model("gptj")
    variant, ids = lorc_core.compress(model, "lorc", 0.5, "uniform"), tokens(model)
    with lorc_core.attach(copy.deepcopy(model).double(), variant) as attachment:
        expected = one_pass(attachment.model, ids)
    with lorc_core.attach(model, variant):
        torch.testing.assert_close(one_pass(model.double(), ids), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_a_copy_is_attached_apart_from_its_original(name):
    model = tiny_model(name)
    variant, ids = lorc_core.compress(model, "lorc", 0.5, "uniform"), tokens(model)
    baseline = one_pass(model, ids)
    attachment = lorc_core.attach(model, variant)
    expected = one_pass(model, ids)
    other = copy.deepcopy(model)
    attachment.detach()
    assert torch.equal(one_pass(model, ids), baseline)
    assert torch.equal(one_pass(other, ids), expected)
    assert one_pass(other.double(), ids).dtype == torch.float64
    assert torch.equal(one_pass(model, ids), baseline)
