"""A model spread over several GPUs gives what it gives on one. Unproven until it has run on such a machine."""

import pytest
import torch
from accelerate import dispatch_model

import lorc_core
from tests.models import tiny_model
from tests.runs import token_by_token, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("method", ["lorc", "lorc_q"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_a_variant_on_two_devices_equals_one(name, method):
    model = tiny_model(name)
    variant, ids = lorc_core.compress(model, method, schedule="uniform"), tokens(model)
    model.to("cuda:0")
    with lorc_core.attach(model, variant):
        expected = token_by_token(model, ids.cuda(0), 7)
    layers = f"{'model.decoder' if name == 'opt' else 'model'}.layers"
    device_map = {"": 0, f"{layers}.1": 1}
    spread = dispatch_model(tiny_model(name), device_map=device_map)
    with lorc_core.attach(spread, variant):
        torch.testing.assert_close(token_by_token(spread, ids.cuda(0), 7), expected, rtol=0, atol=1e-4)
