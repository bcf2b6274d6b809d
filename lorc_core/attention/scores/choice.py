"""Scores of keys that must be rebuilt and rotated, in the way that is fastest.

On a CPU scores are interpolated where that saves. On a GPU, where decoding is not compiled, a Triton kernel serves in
every setting in which it agreed with torch and was faster, both measured on the first call. So a run may round
otherwise than the next; `torch.use_deterministic_algorithms` leaves the kernel out.

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

from lorc_core.attention.scores.interpolated import Interpolation, interpolated_scores
from lorc_core.attention.scores.rebuilt import UnrotatedKeys, rebuilt_scores

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
    query: Float[Tensor, "b h q d"], keys: UnrotatedKeys, interpolation: Interpolation | None
) -> Float[Tensor, "b h q s"]:
    """As `rebuilt_scores`, by whatever is fastest.

    Args:
        query: Scaled and rotated, with the channels of a pair side by side.
        keys: What it reads.
        interpolation: Of the keys' turns, where these are of slots in a row; None elsewhere.
    """
    if interpolation is not None and interpolation.saves(query, keys):
        return interpolated_scores(query, keys, interpolation)
    if not query.is_cuda or not can_fuse(query, keys) or not runs_triton(query.device):
        return rebuilt_scores(query, keys)
    setting = setting_of(query, keys)
    if setting not in CHOICES:
        if torch.cuda.is_current_stream_capturing():
            return rebuilt_scores(query, keys)
        from lorc_core.attention.scores.triton_kernel import fused_scores

        with torch.cuda.device(query.device):
            CHOICES[setting] = faster(query, keys, fused_scores, milliseconds)
    return CHOICES[setting](query, keys)


def can_fuse(query: Float[Tensor, "b h q d"], keys: UnrotatedKeys) -> bool:
    """Whether the kernel, which has no backward, knows these blocks and dtypes and may serve.

    A head's channels must be those of one block, and in pairs.

    Args:
        query: Of the new tokens.
        keys: What it reads.
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


def faster(
    query: Float[Tensor, "b h q d"],
    keys: UnrotatedKeys,
    fused: ScoreFunction,
    time: Callable[[ScoreFunction, Tensor, UnrotatedKeys], float],
) -> ScoreFunction:
    """`fused` where it runs, agrees with `rebuilt_scores` and took less time; a failure is a warning.

    Args:
        query: Scaled and rotated.
        keys: What it reads.
        fused: The kernel.
        time: Of one way on these.
    """
    from triton.errors import TritonError

    try:
        agrees = agree(fused(query, keys), rebuilt_scores(query, keys))
    except (TritonError, CalledProcessError) as error:  # too little shared memory, no headers to compile with
        warnings.warn(f"torch computes scores, since the fused kernel does not run here: {error}", stacklevel=2)
        return rebuilt_scores
    if not agrees:
        warnings.warn(
            "torch computes scores, since the fused kernel's differ from them. Please report it with the setting: "
            f"{torch.cuda.get_device_name() if query.is_cuda else query.device}, {setting_of(query, keys)}",
            stacklevel=2,
        )
        return rebuilt_scores
    return min((fused, rebuilt_scores), key=lambda way: time(way, query, keys))


def agree(scores: Float[Tensor, "b h q s"], expected: Float[Tensor, "b h q s"]) -> bool:
    """Whether the first row's scores are the same but for rounding, wherever the expected ones are finite.

    Args:
        scores: One way's.
        expected: The other's.
    """
    row, bound = expected[0].float(), MAX_DIFFERENCE[scores.dtype]
    places = row.isfinite()
    difference = (scores[0].float() - row).where(places, 0).abs().max()
    return bool(difference <= bound * row.where(places, 0).abs().max())


def milliseconds(way: ScoreFunction, query: Float[Tensor, "b h q d"], keys: UnrotatedKeys) -> float:
    """Of some repetitions on the current GPU, after one that fills its caches.

    Args:
        way: To compute scores.
        query: Scaled and rotated.
        keys: What it reads.
    """
    way(query, keys)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPETITIONS):
        way(query, keys)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
