"""Scores from latents in one Triton kernel: rebuilt and rotated keys stay in registers.

`choice` decides where it is used; this file imports Triton, which builds of torch without CUDA do not bring.

Shapes: B batch, H query heads, D head_dim, Q new tokens, S cached and new tokens, C blocks and one.
"""

import math
from contextlib import nullcontext
from functools import cache
from itertools import accumulate
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from lorc_core.attention.scores.rebuilt import UnrotatedKeys


@triton.jit(do_not_specialize=["kv_len", "num_rows"])  # else a step of decoding may wait for the compiler
@no_type_check  # its arguments are pointers and constants
def score_kernel(
    query,
    latents,
    up,
    offset,
    turns,
    starts,
    scores,
    kv_len,
    num_rows,
    latents_of_batch,
    latents_of_slot,
    latents_of_rank,
    up_of_channel,
    up_of_rank,
    turns_of_batch,
    turns_of_slot,
    turns_of_pair,
    HEAD_DIM: tl.constexpr,
    HEADS_PER_BLOCK: tl.constexpr,
    NUM_TURNED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    PAIRS: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One kv head's keys in a tile of slots against all rows of queries that read it.

    Heads run fastest, so that those which read one tile of latents find it in the L2 cache. The two channels of a pair
    are accumulated apart: the rotation is then elementwise.
    """
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)  # int64: caches may hold more than 2^31 floats
    slots = tl.program_id(1).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    pairs = tl.arange(0, PAIRS)
    is_slot, is_pair = slots < kv_len, pairs < HEAD_DIM // 2

    block = head // HEADS_PER_BLOCK
    start = tl.multiple_of(tl.load(starts + block), ALIGNMENT)
    end = tl.multiple_of(tl.load(starts + block + 1), ALIGNMENT)
    channels = (head % HEADS_PER_BLOCK) * HEAD_DIM + 2 * pairs
    of_slots = latents + batch * latents_of_batch + slots[:, None] * latents_of_slot
    of_pairs = up + channels[None, :] * up_of_channel
    first = tl.zeros((SLOTS, PAIRS), tl.float32)
    second = tl.zeros((SLOTS, PAIRS), tl.float32)
    for begin in range(start, end, RANKS):
        ranks = begin + tl.arange(0, RANKS)
        is_rank = ranks < end
        read = is_slot[:, None] & is_rank[None, :]
        tile = tl.load(of_slots + ranks[None, :] * latents_of_rank, mask=read, other=0.0)
        used = is_rank[:, None] & is_pair[None, :]
        column = of_pairs + ranks[:, None] * up_of_rank
        first = tl.dot(tile, tl.load(column, mask=used, other=0.0), first, input_precision="ieee")
        second = tl.dot(tile, tl.load(column + up_of_channel, mask=used, other=0.0), second, input_precision="ieee")

    if offset is not None:
        of_head = offset + head * HEAD_DIM + 2 * pairs
        first += tl.load(of_head, mask=is_pair, other=0.0).to(tl.float32)[None, :]
        second += tl.load(of_head + 1, mask=is_pair, other=0.0).to(tl.float32)[None, :]

    is_turned = is_slot[:, None] & (pairs < NUM_TURNED)[None, :]
    turn = turns + batch * turns_of_batch + slots[:, None] * turns_of_slot + pairs[None, :] * turns_of_pair
    cos, sin = tl.load(turn, mask=is_turned, other=1.0), tl.load(turn + 1, mask=is_turned, other=0.0)
    dtype = query.dtype.element_ty
    real = (first * cos - second * sin).to(dtype)
    imaginary = (first * sin + second * cos).to(dtype)

    before = (batch * tl.num_programs(0) + head) * num_rows
    for begin in range(0, num_rows, ROWS):
        rows = begin + tl.arange(0, ROWS)
        is_row = rows < num_rows
        is_read = is_pair[:, None] & is_row[None, :]
        row = query + (before + rows)[None, :] * HEAD_DIM + 2 * pairs[:, None]
        tile_scores = tl.dot(real, tl.load(row, mask=is_read, other=0.0), input_precision="ieee")
        imaginary_row = tl.load(row + 1, mask=is_read, other=0.0)
        tile_scores = tl.dot(imaginary, imaginary_row, tile_scores, input_precision="ieee")
        place = scores + (before + rows)[None, :] * kv_len + slots[:, None]
        tl.store(place, tile_scores.to(dtype), mask=is_slot[:, None] & is_row[None, :])


def fused_scores(query: Float[Tensor, "b h q d"], keys: UnrotatedKeys) -> Float[Tensor, "b h q s"]:
    """What `rebuilt_scores` gives, but for rounding: rebuilt keys are rounded once, after the rotation.

    Args:
        query: Rotated, with the channels of a pair side by side.
        keys: Such as `choice.can_fuse` accepts.

    Raises:
        OutOfResources: The device has too little shared memory for the tiles.
    """
    scores = query.new_empty(*query.shape[:3], keys.num_slots)
    arguments, constants = kernel_arguments(query, keys, scores)
    grid = (keys.factors.partition.num_kv_heads, triton.cdiv(keys.num_slots, constants["SLOTS"]), len(query))
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        score_kernel[grid](*arguments, **constants)
    return scores


def kernel_arguments(
    query: Float[Tensor, "b h q d"], keys: UnrotatedKeys, scores: Float[Tensor, "b h q s"]
) -> tuple[tuple[Tensor | int | None, ...], dict[str, int]]:
    """What `score_kernel` is called with: by position, and what it is compiled for."""
    factors, latents, partition = keys.factors, keys.latents, keys.factors.partition
    rows = query.reshape(len(query), partition.num_kv_heads, -1, partition.head_dim).contiguous()
    parts = torch.view_as_real(keys.turns)
    arguments = (
        *(rows, latents, factors.up, keys.offset, parts, block_starts(factors.ranks, latents.device), scores),
        *(keys.num_slots, rows.shape[2]),
        *(latents.stride(0), latents.stride(2), latents.stride(3)),
        *factors.up.stride(),
        *(parts.stride(0) if len(parts) > 1 else 0, parts.stride(1), parts.stride(2)),
    )
    constants = {
        "HEAD_DIM": partition.head_dim,
        "HEADS_PER_BLOCK": partition.heads_per_block,
        "NUM_TURNED": keys.turns.shape[-1],
        "ALIGNMENT": math.gcd(16, *accumulate(factors.ranks)),
    }
    return arguments, constants | tiles_for(query.dtype, partition.head_dim, rows.shape[2])


@cache
def block_starts(ranks: tuple[int, ...], device: torch.device) -> Int32[Tensor, " c"]:
    """Where the latents of each block begin, and where the last ones end; kept, as copies to a GPU cost a call."""
    return torch.tensor([0, *accumulate(ranks)], dtype=torch.int32, device=device)


def tiles_for(dtype: torch.dtype, head_dim: int, num_rows: int) -> dict[str, int]:
    """Sizes of what one program holds, none below 16, as products need; what is past the ends is masked.

    Compiled for sm_80 and sm_90 none spills registers, or takes more than 120 KiB of shared memory; 128 slots of heads
    of 256 spilled 600 bytes. No GPU was at hand to time them.
    """
    pairs, rows = (max(16, triton.next_power_of_2(size)) for size in (head_dim // 2, num_rows))
    tiles = {"PAIRS": pairs, "ROWS": min(rows, 32), "num_warps": 8}
    if dtype == torch.float32:  # exact products run outside the tensor cores
        return tiles | {"SLOTS": 64, "RANKS": 16, "num_stages": 2}
    return tiles | {"SLOTS": 128 if pairs <= 64 else 64, "RANKS": 64, "num_stages": 3}
