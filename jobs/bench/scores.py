"""Benchmark of reading keys cached before the rotation: `lorc bench scores`.

One new token's scores by rebuilding all keys with torch, over that by interpolation on a CPU, by the Triton kernel on a
GPU; on random latents.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jobs.bench.models import check_known
from jobs.bench.timing import device, device_line, seconds_of
from jobs.screen.console import console
from jobs.screen.fitted_table import Column, FittedTable
from lorc_core.attention.scores.choice import CHOICES, key_scores, setting_of
from lorc_core.attention.scores.interpolated import interpolated_scores, interpolation_of
from lorc_core.attention.scores.rebuilt import UnrotatedKeys, rebuilt_scores
from lorc_core.decomposition.factors import Factors
from lorc_core.model.blocks import Partition
from lorc_core.model.rotation import Rotation
from pipeline.zoo.sections import ELEMENT_BYTES

HEADS = ((16, 8), (32, 8), (32, 32))  # query heads, kv heads
HEAD_DIM = 128
KEPT = 0.25
ROPE_BASES = (1e4, 5e5)
ROUNDS = 15


def case(
    heads: tuple[int, int], base: float, context: int, batch_size: int, dtype: str
) -> tuple[Tensor, UnrotatedKeys]:
    """A query and the keys that it reads, with a LLaMA's rotation."""
    num_heads, num_kv_heads = heads
    like = {"device": device(), "dtype": getattr(torch, dtype)}
    facts: dict[str, Any] = {"head_dim": HEAD_DIM, "rope_theta": base, "max_position_embeddings": context}
    rotary = LlamaRotaryEmbedding(LlamaConfig(**facts))
    cos, sin = rotary(torch.zeros(1), torch.arange(context)[None])
    turns = Rotation(cos, sin, interleaved=False).turns().to(like["device"])
    partition = Partition("joint", num_kv_heads, HEAD_DIM)
    rank = int(KEPT * partition.width)
    factors = Factors(partition, (rank,), torch.randn(partition.width, rank, **like), None, None)
    latents = torch.randn(batch_size, 1, context, rank, **like)
    return torch.randn(batch_size, num_heads, 1, HEAD_DIM, **like), UnrotatedKeys(latents, factors, None, turns)


def others(query: Tensor, keys: UnrotatedKeys) -> dict[str, Callable[[], Tensor]]:
    """The other ways that this device has."""
    if not query.is_cuda:
        return {"interpolated": partial(interpolated_scores, query, keys, interpolation_of(keys.turns))}
    from lorc_core.attention.scores.triton_kernel import fused_scores

    return {"fused": partial(fused_scores, query, keys)}


def rebuilds(query: Tensor, keys: UnrotatedKeys) -> bool:
    """Whether decoding rebuilds all keys with torch in this setting."""
    if not query.is_cuda:
        return not interpolation_of(keys.turns).saves(query, keys)
    key_scores(query, keys, None)  # the first call in a setting decides
    return CHOICES.get(setting_of(query, keys), rebuilt_scores) is rebuilt_scores


def medians(ways: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Seconds of each, in turn, after one round that is not counted."""
    seconds = [{name: seconds_of(way) for name, way in ways.items()} for _ in range(ROUNDS + 1)][1:]
    return {name: median(round_s[name] for round_s in seconds) for name in ways}


@torch.inference_mode()
def main(context: int, batch_size: int, dtype: str) -> None:
    """Print the table.

    Raises:
        ConfigError: The dtype is not known.
    """
    check_known("dtype", [dtype], ELEMENT_BYTES)
    screen = console()
    screen.print(f"{device_line()}, {dtype}, {context:,} slots, batch {batch_size}, kept {KEPT:g}")
    titles = "query / kv heads", "rope base", "rebuilt, ms", "over rebuilt", "chosen"
    table = FittedTable("way", [Column(title) for title in titles])
    for heads, base in product(HEADS, ROPE_BASES):
        query, keys = case(heads, base, context, batch_size, dtype)
        seconds = medians({"rebuilt": partial(rebuilt_scores, query, keys), **others(query, keys)})
        rebuilt_s = seconds.pop("rebuilt")
        for way, way_s in seconds.items():
            chosen = "no" if rebuilds(query, keys) else "yes"
            heads_text, over_rebuilt = f"{heads[0]} / {heads[1]}", f"{way_s / rebuilt_s:.2f}"
            table.add_row(way, heads_text, f"{base:g}", f"{1e3 * rebuilt_s:.1f}", over_rebuilt, chosen)
    screen.print(table)
