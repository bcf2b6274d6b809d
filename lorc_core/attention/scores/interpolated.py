"""Scores of keys whose pairs of channels turn slowly, from queries absorbed at a few slots of every span.

Over a span of slots a slow pair's rotation is a smooth curve, and so is the query that its latents would be read by.
The query is absorbed at a few slots, the nodes, and its dot products with the latents are interpolated between them.
Only the fast pairs of the keys are rebuilt: 22 of 64 with LLaMA-3's rotation. It takes fewer products where few query
heads read a kv head: with LLaMA-3-8B's four to one nothing is gained.

Rebuilt keys are rotated by every slot's own angle, whose float32 rounding grows with the position; interpolated scores
see that of the nodes. Either is as far from exact angles as the other (test_interpolated.py).

Shapes: H query heads, G kv heads, D head_dim, Q new tokens, S slots, K latents, P pairs, C spans, N nodes.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from lorc_core.attention.scores.absorbed import apply_rotary, attention_scores
from lorc_core.attention.scores.rebuilt import UnrotatedKeys, rotated_scores

SPAN = 512  # slots
NUM_NODES = 12
MAX_ERROR = 1e-6  # of a slow pair's rotation, interpolated over the first span
# Products over those of rebuilding all pairs. These are narrower matrices: `lorc bench scores` on two CPU threads took
# 0.8 of rebuilding's time at 0.56 of its products, as long at 0.70 and 0.78; of 32 kv heads 0.5 at 0.45, 0.65 at 0.59.
MOST_WORK = 0.6
MIN_PRODUCTS = 1 << 27  # of rebuilding: below it, many small steps cost what they save
STEP_BYTES = 16 << 20  # of rebuilt keys held at once


@dataclass(frozen=True)
class Interpolation:
    """How the slow pairs of one rotation are interpolated.

    Attributes:
        nodes: Slots of a span at which queries are absorbed.
        weights: Of every node for every slot of a span.
        first_pair: All are slow from this one on, and never the one at 0.
    """

    nodes: Int[Tensor, " n"]
    weights: Float[Tensor, "n span"]
    first_pair: int

    def saves(self, query: Float[Tensor, "b h q d"], keys: UnrotatedKeys) -> bool:
        """Whether it is faster than rebuilding: on a CPU, in float32, with one block, few query rows and many slots."""
        float32 = query.dtype == keys.latents.dtype == torch.float32
        if query.device.type != "cpu" or not float32 or len(keys.factors.ranks) > 1 or keys.num_slots < SPAN:
            return False
        num_rows, num_fast, partition = query.shape[1] * query.shape[2], 2 * self.first_pair, keys.factors.partition
        of_nodes = num_rows * NUM_NODES * (1 + (query.shape[-1] - num_fast) / SPAN)
        interpolated = (partition.num_kv_heads * num_fast + of_nodes) / partition.kv_width
        left_over = keys.num_slots % SPAN / keys.num_slots
        products = keys.num_slots * keys.latents.shape[-1] * partition.kv_width
        return products >= MIN_PRODUCTS and interpolated * (1 - left_over) + left_over <= MOST_WORK


def interpolation_of(turns: Complex[Tensor, "1 s p"]) -> Interpolation:
    """How to interpolate.

    Args:
        turns: Of the first span of slots or more, on a CPU.
    """
    places = torch.arange(NUM_NODES, dtype=torch.float64)
    nodes = ((1 - torch.cos((2 * places + 1) * math.pi / (2 * NUM_NODES))) / 2 * (SPAN - 1)).round().long()  # Chebyshev
    weights = lagrange(nodes)
    curves = turns[0, :SPAN].to(torch.complex128)
    errors = (weights.T.to(curves.dtype) @ curves[nodes] - curves).abs().amax(0) / curves.abs().amax(0)
    fast = (errors > MAX_ERROR).nonzero()
    first_pair = int(fast.max()) + 1 if len(fast) else 1
    return Interpolation(nodes, weights.float(), first_pair)


def lagrange(nodes: Int[Tensor, " n"]) -> Float[Tensor, "n span"]:
    """Lagrange's polynomials of the nodes at every slot of a span, in float64."""
    slots, others = torch.arange(SPAN, dtype=torch.float64), nodes.double()
    found = torch.ones(len(nodes), SPAN, dtype=torch.float64)
    for idx, node in enumerate(others):
        rest = torch.cat([others[:idx], others[idx + 1 :]])
        found[idx] = ((slots[:, None] - rest) / (node - rest)).prod(-1)
    return found


def slot_scores(query: Float[Tensor, "b h q d"], keys: UnrotatedKeys, slow: Interpolation) -> Float[Tensor, "b h q s"]:
    """`rotated_scores` of slots in a row; the last ones, where they are no whole span, are rebuilt.

    Args:
        query: Rotated, with the channels of a pair side by side.
        keys: Of one block, a span of slots or more, with the turns of slots in a row.
        slow: Of those turns.
    """
    whole = keys.num_slots // SPAN * SPAN
    spans = keys.part(slice(whole))
    rows = [
        span_scores(row, replace(spans, latents=latents[None]), slow)
        for row, latents in zip(query, spans.latents, strict=True)
    ]
    rest = rotated_scores(query, keys.part(slice(whole, None)))
    return torch.cat([torch.stack(rows), rest], dim=-1)


def span_scores(query: Float[Tensor, "h q d"], keys: UnrotatedKeys, slow: Interpolation) -> Float[Tensor, "h q s"]:
    """Of one row and whole spans, some of them at a time."""
    latents, turns, offset = keys.latents[0, 0], keys.turns[0], keys.offset
    num_fast, head_dim = 2 * slow.first_pair, query.shape[-1]
    up = keys.factors.up.unflatten(0, (-1, head_dim))  # G D K
    shift = up.new_zeros(up.shape[:2]) if offset is None else offset.view(up.shape[:2])
    up_fast, up_slow = up[:, :num_fast].flatten(0, 1), up[:, num_fast:].contiguous()
    step = SPAN * max(1, STEP_BYTES // (len(up_fast) * SPAN * query.element_size()))
    scores = query.new_empty(*query.shape[:2], len(latents))
    for start in range(0, len(latents), step):
        part = slice(start, start + step)
        fast = torch.addmm(shift[:, :num_fast].flatten(), latents[part], up_fast.T)
        fast = apply_rotary(fast.view(-1, len(up), num_fast), turns[part, None, : slow.first_pair], may_overwrite=True)
        of_fast = attention_scores(query[None, ..., :num_fast], fast.transpose(0, 1)[None])[0]
        scores[..., part] = of_fast + slow_scores(
            query[..., num_fast:], latents[part], up_slow, shift[:, num_fast:], turns[part], slow
        )
    return scores


def slow_scores(
    query: Float[Tensor, "h q e"],
    latents: Float[Tensor, "s k"],
    up: Float[Tensor, "g e k"],
    shift: Float[Tensor, "g e"],
    turns: Complex[Tensor, "s p"],
    slow: Interpolation,
) -> Float[Tensor, "h q s"]:
    """Dot products over the E slow channels of every head."""
    spans = latents.unflatten(0, (-1, SPAN))  # C L K
    back = turns.unflatten(0, (-1, SPAN))[:, slow.nodes, slow.first_pair :].conj()  # C N P
    at_nodes = apply_rotary(query[:, :, None, None].expand(-1, -1, *back.shape[:2], -1), back)  # H Q C N E
    by_kv_head = at_nodes.reshape(len(up), -1, query.shape[-1])
    absorbed = (by_kv_head @ up).view(-1, *back.shape[:2], latents.shape[-1]).transpose(0, 1)  # C HQ N K
    shifts = (by_kv_head @ shift[..., None]).view(-1, *back.shape[:2], 1).transpose(0, 1)
    found = (absorbed.flatten(1, 2) @ spans.mT).view(*absorbed.shape[:3], SPAN) + shifts  # C HQ N L
    return (found * slow.weights).sum(2).transpose(0, 1).reshape(*query.shape[:2], -1)
