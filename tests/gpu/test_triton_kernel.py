"""The fused kernel on a GPU against the function that rebuilds with torch, and the choice between them.

Unproven: no GPU was at hand, none has run.
"""

from dataclasses import replace

import pytest
import torch

from lorc_core.attention.scores.choice import key_scores
from lorc_core.attention.scores.rebuilt import UnrotatedKeys, rebuilt_scores

pytest.importorskip("triton", reason="Triton is made for Linux alone")
from lorc_core.attention.scores.triton_kernel import fused_scores
from tests.scores import CACHED, CASES, Case, difference, in_float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 2e-2}  # the interpreter's, bfloat16 as float16 with three bits fewer
LLAMA = Case(num_heads=32, num_kv_heads=8, head_dim=128, ranks=(512,), num_new=1)


def on_gpu(query, keys):
    offset = None if keys.offset is None else keys.offset.cuda()
    factors, turns = keys.factors.to("cuda", query.dtype), keys.turns.cuda()
    return query.cuda(), UnrotatedKeys(keys.latents.cuda(), factors, offset, turns)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_fused_scores_are_those_of_rebuilt_and_rotated_keys(name, dtype):
    arguments = replace(CASES[name], dtype=dtype).arguments()
    found = fused_scores(*on_gpu(*arguments)).cpu()
    assert difference(found, rebuilt_scores(*in_float32(*arguments))) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_choice_is_measured_once_in_a_setting_and_right_either_way(dtype, monkeypatch):
    case = replace(LLAMA, dtype=dtype)
    given = on_gpu(*case.arguments())
    monkeypatch.setattr("lorc_core.attention.scores.choice.CHOICES", choices := {})
    with torch.no_grad():
        found = [key_scores(*given, None).cpu() for _ in range(2)]
    assert len(choices) == 1
    assert torch.equal(*found)
    assert difference(found[0], rebuilt_scores(*in_float32(*case.arguments()))) < BOUNDS[dtype]


def test_nothing_is_timed_while_gradients_are_on_or_a_graph_is_captured(monkeypatch):
    given = on_gpu(*replace(LLAMA, head_dim=64).arguments())
    monkeypatch.setattr("lorc_core.attention.scores.choice.CHOICES", choices := {})
    key_scores(*given, None)
    with torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        key_scores(*given, None)
    assert choices == {}


@torch.no_grad()
def test_caches_of_more_than_two_billion_floats():
    """The last slots of the last row against a cache of those slots alone."""
    query, keys = on_gpu(*replace(LLAMA, dtype=torch.bfloat16).arguments())
    num_slots, rank = 1 << 21, keys.latents.shape[-1]
    latents = torch.zeros(len(query), 1, num_slots, rank, device="cuda", dtype=torch.bfloat16)
    assert latents.numel() > 1 << 31
    latents[:, :, -CACHED:] = keys.latents
    turns = keys.turns[:, :1].expand(-1, num_slots, -1).clone()
    turns[:, -CACHED:] = keys.turns
    found = fused_scores(query, replace(keys, latents=latents, turns=turns))
    torch.testing.assert_close(found[..., -CACHED:], fused_scores(query, keys), rtol=0, atol=0)
