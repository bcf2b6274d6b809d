"""Scores of keys that must be rebuilt and rotated, in the way that is fastest.

On a CPU slow pairs of channels are interpolated where that saves; on a GPU a Triton kernel serves where it agreed with
torch and was faster when both were measured.

Shapes: B batch, H query heads, D head_dim, Q new tokens, S cached and new tokens.
"""

import importlib.util
import warnings
from collections.abc import Callable, Hashable
from functools import cache, partial

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.interpolation import Interpolation, slot_scores
from lorc_core.unrotated_keys import UnrotatedKeys, rotated_scores

# Of the largest score, between two ways that round differently: some times the worst of the interpreter's tests, by
# dtype; bfloat16 has three bits fewer than float16.
MAX_DIFFERENCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
MAX_HEAD_DIM = 256
REPETITIONS = 5

ScoreFunction = Callable[[Tensor, UnrotatedKeys], Tensor]
# What was faster on a device in a setting, for as long as the process runs.
FASTER: dict[Hashable, ScoreFunction] = {}


def key_scores(
    query: Float[Tensor, "b h q d"], keys: UnrotatedKeys, slow: Interpolation | None
) -> Float[Tensor, "b h q s"]:
    """As `rotated_scores`; `slow` where the turns are of slots in a row.

    The first call in a setting on a GPU is timed. If the kernel's scores differ, that is a warning and torch serves.
    """
    if slow is not None and slow.saves(query, keys):
        return slot_scores(query, keys, slow)
    score: ScoreFunction = rotated_scores
    if query.is_cuda and may_be_timed() and can_fuse(query, keys):
        setting = (query.device, query.dtype, query.shape, keys.factors.partition, keys.factors.ranks)
        bucket = (*setting, (keys.num_slots - 1).bit_length())
        if bucket not in FASTER:
            FASTER[bucket] = faster(query, keys)
        score = FASTER[bucket]
    return score(query, keys)


def may_be_timed() -> bool:
    """Whether a kernel without a backward may be tried: nothing is recorded, traced or captured."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return False
    return has_triton()


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def can_fuse(query: Float[Tensor, "b h q d"], keys: UnrotatedKeys) -> bool:
    """Whether the kernel knows these blocks and dtypes: a head's channels must be those of one block, and in pairs."""
    latents, up, partition = keys.latents, keys.factors.up, keys.factors.partition
    blocks = not partition.is_complex and partition.head_dim % 2 == 0 and partition.head_dim <= MAX_HEAD_DIM
    same = query.dtype == latents.dtype == up.dtype and query.device == latents.device == up.device
    known = query.dtype in MAX_DIFFERENCE and keys.turns.dtype == torch.complex64
    return blocks and same and known and latents.numel() > 0


def faster(query: Float[Tensor, "b h q d"], keys: UnrotatedKeys) -> ScoreFunction:
    """The function that took less time with these arguments, on their device; the kernel only where both agree."""
    from triton.runtime.errors import OutOfResources

    from lorc_core.fused_scores import fused_rotated_scores

    with torch.cuda.device(query.device):
        try:
            found = fused_rotated_scores(query, keys)
        except OutOfResources:  # an older GPU: its shared memory is smaller than the kernel's tiles
            return rotated_scores
        difference = relative_difference(found, rotated_scores(query, keys))
        if not difference <= MAX_DIFFERENCE[query.dtype]:
            warnings.warn(
                f"the fused kernel's scores differ from torch's by {difference:.1e} of the largest; torch's are used. "
                f"Please report it with the setting: {query.device}, {query.dtype}, {keys.factors.partition}",
                stacklevel=2,
            )
            return rotated_scores
        functions = (fused_rotated_scores, rotated_scores)
        return min(functions, key=lambda function: milliseconds(partial(function, query, keys)))


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
