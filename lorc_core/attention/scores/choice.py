"""Scores of keys that must be rebuilt and rotated, in the way that is fastest.

On a CPU slow pairs of channels are interpolated where that saves. On a GPU, where decoding is not compiled, a Triton
kernel serves in every setting in which it agreed with torch and was faster, both measured on the first call. So a run
may round otherwise than the next; `torch.use_deterministic_algorithms` leaves the kernel out.

Shapes: B batch, H query heads, D head_dim, Q new tokens, S cached and new tokens.
"""

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Hashable
from functools import cache
from subprocess import CalledProcessError

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.attention.scores.interpolated import Interpolation, slot_scores
from lorc_core.attention.scores.rebuilt import UnrotatedKeys, rotated_scores

# Of the largest score, between two ways that round differently. The interpreter's worst against float32 arithmetic is
# 7.4e-7 and 6.0e-4 (test_triton_kernel.py); bfloat16 has three bits fewer than float16.
MAX_DIFFERENCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
MAX_HEAD_DIM = 256
MAX_ROWS = 65535  # of a batch: of a grid's third dimension
MIN_CAPABILITY = (8, 0)  # the least that the kernel was compiled for
REPETITIONS = 5

ScoreFunction = Callable[[Tensor, UnrotatedKeys], Tensor]
CHOICES: dict[Hashable, ScoreFunction] = {}  # what serves in a setting, for as long as the process runs


def key_scores(
    query: Float[Tensor, "b h q d"], keys: UnrotatedKeys, slow: Interpolation | None
) -> Float[Tensor, "b h q s"]:
    """As `rotated_scores`, by whatever is fastest.

    Args:
        query: Rotated, with the channels of a pair side by side.
        keys: What it reads.
        slow: How slow pairs are interpolated, where the turns are those of slots in a row; None elsewhere.
    """
    if slow is not None and slow.saves(query, keys):
        return slot_scores(query, keys, slow)
    if not query.is_cuda or not can_fuse(query, keys) or not runs_triton(query.device):
        return rotated_scores(query, keys)
    setting = setting_of(query, keys)
    if setting not in CHOICES:
        if torch.cuda.is_current_stream_capturing():
            return rotated_scores(query, keys)
        from lorc_core.attention.scores.triton_kernel import fused_rotated_scores

        with torch.cuda.device(query.device):
            CHOICES[setting] = choice(query, keys, fused_rotated_scores, milliseconds)
    return CHOICES[setting](query, keys)


def can_fuse(query: Float[Tensor, "b h q d"], keys: UnrotatedKeys) -> bool:
    """Whether the kernel, which has no backward, knows these blocks and dtypes and may serve.

    A head's channels must be those of one block, and in pairs.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return False
    if query.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return False  # torch's products are then coarser than the kernel's, and faster
    latents, up, partition = keys.latents, keys.factors.up, keys.factors.partition
    blocks = not partition.is_complex and partition.head_dim % 2 == 0 and partition.head_dim <= MAX_HEAD_DIM
    same = query.dtype == latents.dtype == up.dtype and query.device == latents.device == up.device
    known = query.dtype in MAX_DIFFERENCE and keys.turns.dtype == torch.complex64
    return blocks and same and known and latents.numel() > 0 and len(query) <= MAX_ROWS


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is there, a C compiler that it can call, and such a GPU as the kernel was compiled for."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    installed = importlib.util.find_spec("triton") is not None and torch.version.hip is None
    return installed and compiler is not None and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def setting_of(query: Float[Tensor, "b h q d"], keys: UnrotatedKeys) -> Hashable:
    """What the time depends on, sizes by powers of two."""
    sizes = (len(query), query.shape[2], keys.num_slots, keys.latents.shape[-1])
    return query.device, query.dtype, query.shape[1], keys.factors.partition, *(size.bit_length() for size in sizes)


def choice(
    query: Float[Tensor, "b h q d"],
    keys: UnrotatedKeys,
    fused: ScoreFunction,
    time: Callable[[ScoreFunction, Tensor, UnrotatedKeys], float],
) -> ScoreFunction:
    """`fused` where it runs, agrees with `rotated_scores` and took less time; a failure is a warning."""
    from triton.errors import TritonError

    try:
        agrees = agree(fused(query, keys), rotated_scores(query, keys))
    except (TritonError, CalledProcessError) as error:  # too little shared memory, no headers to compile with
        warnings.warn(f"torch computes scores, since the fused kernel does not run here: {error}", stacklevel=2)
        return rotated_scores
    if not agrees:
        warnings.warn(
            "torch computes scores, since the fused kernel's differ from them. Please report it with the setting: "
            f"{torch.cuda.get_device_name() if query.is_cuda else query.device}, {setting_of(query, keys)}",
            stacklevel=2,
        )
        return rotated_scores
    return min((fused, rotated_scores), key=lambda scores: time(scores, query, keys))


def agree(found: Float[Tensor, "b h q s"], expected: Float[Tensor, "b h q s"]) -> bool:
    """Whether the first row's scores are the same but for rounding, wherever the expected ones are finite."""
    row, bound = expected[0].float(), MAX_DIFFERENCE[found.dtype]
    places = row.isfinite()
    difference = (found[0].float() - row).where(places, 0).abs().max()
    return bool(difference <= bound * row.where(places, 0).abs().max())


def milliseconds(scores: ScoreFunction, query: Float[Tensor, "b h q d"], keys: UnrotatedKeys) -> float:
    """Of some repetitions on the current GPU, after one that fills its caches."""
    scores(query, keys)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPETITIONS):
        scores(query, keys)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
