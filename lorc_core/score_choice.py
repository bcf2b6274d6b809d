"""Scores of keys that must be rebuilt and rotated, in the way that is fastest.

On a CPU slow pairs of channels are interpolated where that saves; on a GPU a Triton kernel serves where it agreed with
torch and was faster when both were measured.

Shapes: B batch, H query heads, D head_dim, Q new tokens, S cached and new tokens, N kv_width, K latents of all blocks,
P pairs of rotated channels.
"""

import importlib.util
import warnings
from collections.abc import Callable, Hashable
from functools import cache, partial

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from lorc_core.interpolation import Interpolation, slot_scores
from lorc_core.projection import Factors
from lorc_core.reading import rotated_scores

# Of the largest score, between two ways that round differently: some times the worst of the interpreter's tests, by
# dtype; bfloat16 has three bits fewer than float16.
MAX_DIFFERENCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
MAX_HEAD_DIM = 256
REPETITIONS = 5

ScoreFunction = Callable[..., Tensor]
# What was faster on a device in a setting, for as long as the process runs.
FASTER: dict[Hashable, ScoreFunction] = {}


def key_scores(
    query: Float[Tensor, "b h q d"],
    latents: Float[Tensor, "b 1 s k"],
    factors: Factors,
    offset: Float[Tensor, " n"] | None,
    turns: Complex[Tensor, "#b s p"],
    slow: Interpolation | None,
) -> Float[Tensor, "b h q s"]:
    """As `rotated_scores`; `slow` where the turns are of slots in a row.

    The first call in a setting on a GPU is timed. If the kernel's scores differ, that is a warning and torch serves.
    """
    if slow is not None and slow.saves(query, latents, factors):
        return slot_scores(query, latents, factors, offset, turns, slow)
    score: ScoreFunction = rotated_scores
    if latents.is_cuda and may_be_timed() and can_fuse(query, latents, factors, turns):
        setting = (latents.device, query.dtype, query.shape, factors.partition, factors.ranks)
        bucket = (*setting, (latents.shape[2] - 1).bit_length())
        if bucket not in FASTER:
            FASTER[bucket] = faster(query, latents, factors, offset, turns)
        score = FASTER[bucket]
    return score(query, latents, factors, offset, turns)


def may_be_timed() -> bool:
    """Whether a kernel without a backward may be tried: nothing is recorded, traced or captured."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return False
    return has_triton()


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def can_fuse(
    query: Float[Tensor, "b h q d"],
    latents: Float[Tensor, "b 1 s k"],
    factors: Factors,
    turns: Complex[Tensor, "#b s p"],
) -> bool:
    """Whether the kernel knows these blocks and dtypes: a head's channels must be those of one block, and in pairs."""
    partition = factors.partition
    blocks = not partition.is_complex and partition.head_dim % 2 == 0 and partition.head_dim <= MAX_HEAD_DIM
    same = query.dtype == latents.dtype == factors.up.dtype and query.device == latents.device == factors.up.device
    return blocks and same and query.dtype in MAX_DIFFERENCE and turns.dtype == torch.complex64 and latents.numel() > 0


def faster(
    query: Float[Tensor, "b h q d"],
    latents: Float[Tensor, "b 1 s k"],
    factors: Factors,
    offset: Float[Tensor, " n"] | None,
    turns: Complex[Tensor, "#b s p"],
) -> ScoreFunction:
    """The function that took less time with these arguments, on their device; the kernel only where both agree."""
    from triton.runtime.errors import OutOfResources

    from lorc_core.fused_scores import fused_rotated_scores

    arguments = (query, latents, factors, offset, turns)
    with torch.cuda.device(latents.device):
        try:
            found = fused_rotated_scores(*arguments)
        except OutOfResources:  # an older GPU: its shared memory is smaller than the kernel's tiles
            return rotated_scores
        difference = relative_difference(found, rotated_scores(*arguments))
        if not difference <= MAX_DIFFERENCE[query.dtype]:
            warnings.warn(
                f"the fused kernel's scores differ from torch's by {difference:.1e} of the largest; torch's are used. "
                f"Please report it with the setting: {latents.device}, {query.dtype}, {factors.partition}",
                stacklevel=2,
            )
            return rotated_scores
        functions = (fused_rotated_scores, rotated_scores)
        return min(functions, key=lambda function: milliseconds(partial(function, *arguments)))


def relative_difference(found: Float[Tensor, "b h q s"], expected: Float[Tensor, "b h q s"]) -> float:
    """Of the largest score; NaN where either is not finite."""
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def milliseconds(work: Callable[[], object]) -> float:
    """Of some repetitions on the current device, after one that fills its caches."""
    work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPETITIONS):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
