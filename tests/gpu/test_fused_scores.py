"""The fused kernel on a GPU against the function that rebuilds with torch, and the choice between them.

Unproven: no GPU was at hand, none has run.
"""

from dataclasses import replace

import pytest
import torch

from lorc_core.score_choice import FASTER, key_scores, relative_difference
from lorc_core.unrotated_keys import UnrotatedKeys, rotated_scores
from tests.core.test_fused_scores import CASES, Case, in_float32

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
    from lorc_core.fused_scores import fused_rotated_scores

    arguments = replace(CASES[name], dtype=dtype).arguments()
    found = fused_rotated_scores(*on_gpu(*arguments)).cpu()
    assert relative_difference(found, rotated_scores(*in_float32(*arguments))) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_choice_is_measured_once_in_a_setting_and_right_either_way(dtype, monkeypatch):
    arguments = on_gpu(*replace(LLAMA, dtype=dtype).arguments())
    monkeypatch.setattr("lorc_core.score_choice.FASTER", chosen := {})
    with torch.no_grad():
        found = [key_scores(*arguments, None).cpu() for _ in range(2)]
    assert len(chosen) == 1
    assert torch.equal(*found)
    expected = rotated_scores(*in_float32(*(replace(LLAMA, dtype=dtype).arguments())))
    assert relative_difference(found[0], expected) < BOUNDS[dtype]


def test_nothing_is_timed_while_gradients_are_on_or_a_graph_is_captured():
    arguments = on_gpu(*replace(LLAMA, head_dim=64).arguments())
    known = dict(FASTER)
    key_scores(*arguments, None)
    with torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        key_scores(*arguments, None)
    assert known == FASTER


def test_a_kernel_that_is_wrong_is_not_chosen(monkeypatch):
    arguments = on_gpu(*LLAMA.arguments())
    monkeypatch.setattr("lorc_core.score_choice.FASTER", chosen := {})
    monkeypatch.setattr("lorc_core.fused_scores.fused_rotated_scores", lambda *given: rotated_scores(*given).roll(1))
    with torch.no_grad(), pytest.warns(UserWarning, match="differ from torch's"):
        found = key_scores(*arguments, None)
    assert list(chosen.values()) == [rotated_scores]
    assert torch.equal(found, rotated_scores(*arguments))
