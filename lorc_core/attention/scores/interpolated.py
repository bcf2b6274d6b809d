"""Scores of keys that must be rotated, some of them interpolated.

Keys that were cached before the rotation must be rotated again for every query. On a CPU we rotate only the channel
pairs that turn fast, and interpolate the scores of the slow ones; the error stays below that of rounding.

How: at slot s a query q scores q . R_s U l_s = (U^T R_s^-1 q) . l_s, with l_s the latents, U the factors and R_s the
rotation. Over a span of 512 slots R_s^-1 q is a smooth curve where pairs turn slowly. So the query is turned back and
absorbs U at 12 slots of each span, the nodes, and a slot's score is the sum of what the nodes' queries score there, by
Lagrange's weights: two small products in place of a rebuilt key.

When: 22 of 64 pairs are fast with LLaMA-3's rotation. It saves products where few query heads read a kv head; with
LLaMA-3-8B's four to one nothing is gained.

How well: a rebuilt key is rotated by its slot's angle, whose float32 rounding grows with the position; an interpolated
score sees the rounding of the nodes' angles. Either is as far from exact angles as the other
(tests/core/attention/scores/test_interpolated.py).

Shapes: H query heads, G kv heads, D head_dim, E slow channels of a head, Q new tokens, S slots, K latents, P pairs,
C spans, N nodes.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from lorc_core.attention.scores.absorbed import attention_scores, rotate_pairs
from lorc_core.attention.scores.rebuilt import UnrotatedKeys, rebuilt_scores

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
        """Whether it is faster than rebuilding: on a CPU, in float32, with one block, few query rows and many slots.

        Args:
            query: Of the new tokens.
            keys: What it reads.
        """
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
    """How to interpolate the scores of one rotation.

    Args:
        turns: Of the first span of slots or more, on a CPU.
    """
    places = torch.arange(NUM_NODES, dtype=torch.float64)
    nodes = ((1 - torch.cos((2 * places + 1) * math.pi / (2 * NUM_NODES))) / 2 * (SPAN - 1)).round().long()  # Chebyshev
    weights = lagrange(nodes)
    # A pair is slow where interpolation gives its own rotation back; any span is the first one, turned as a whole.
    curves = turns[0, :SPAN].to(torch.complex128)
    errors = (weights.T.to(curves.dtype) @ curves[nodes] - curves).abs().amax(0) / curves.abs().amax(0)
    fast = (errors > MAX_ERROR).nonzero()
    first_pair = int(fast.max()) + 1 if len(fast) else 1
    return Interpolation(nodes, weights.float(), first_pair)


def lagrange(nodes: Int[Tensor, " n"]) -> Float[Tensor, "n span"]:
    """Lagrange's polynomials of the nodes at every slot of a span, in float64."""
    slots, others = torch.arange(SPAN, dtype=torch.float64), nodes.double()
    polynomials = torch.ones(len(nodes), SPAN, dtype=torch.float64)
    for idx, node in enumerate(others):
        rest = torch.cat([others[:idx], others[idx + 1 :]])
        polynomials[idx] = ((slots[:, None] - rest) / (node - rest)).prod(-1)
    return polynomials


def interpolated_scores(
    query: Float[Tensor, "b h q d"], keys: UnrotatedKeys, interpolation: Interpolation
) -> Float[Tensor, "b h q s"]:
    """`rebuilt_scores` of slots in a row; the last ones, where they are no whole span, are rebuilt.

    Args:
        query: Scaled and rotated, with the channels of a pair side by side.
        keys: Of one block, a span of slots or more, with the turns of slots in a row.
        interpolation: Of those turns.
    """
    whole = keys.num_slots // SPAN * SPAN
    spans = keys.part(slice(whole))
    rows = [
        span_scores(row, replace(spans, latents=latents[None]), interpolation)
        for row, latents in zip(query, spans.latents, strict=True)
    ]
    rest = rebuilt_scores(query, keys.part(slice(whole, None)))
    return torch.cat([torch.stack(rows), rest], dim=-1)


def span_scores(
    query: Float[Tensor, "h q d"], keys: UnrotatedKeys, interpolation: Interpolation
) -> Float[Tensor, "h q s"]:
    """Of one row and whole spans, some of them at a time.

    Args:
        query: Scaled and rotated, with the channels of a pair side by side.
        keys: Of one row.
        interpolation: Of its turns.
    """
    latents, turns, offset = keys.latents[0, 0], keys.turns[0], keys.offset
    num_fast, head_dim = 2 * interpolation.first_pair, query.shape[-1]
    up = keys.factors.up.unflatten(0, (-1, head_dim))  # G D K
    shift = up.new_zeros(up.shape[:2]) if offset is None else offset.view(up.shape[:2])
    up_fast, up_slow = up[:, :num_fast].flatten(0, 1), up[:, num_fast:].contiguous()
    step = SPAN * max(1, STEP_BYTES // (len(up_fast) * SPAN * query.element_size()))
    scores = query.new_empty(*query.shape[:2], len(latents))
    for start in range(0, len(latents), step):
        part = slice(start, start + step)
        # The fast channels of the keys, rebuilt and rotated as `rebuilt_scores` does all of them.
        fast_keys = torch.addmm(shift[:, :num_fast].flatten(), latents[part], up_fast.T)
        fast_turns = turns[part, None, : interpolation.first_pair]
        fast_keys = rotate_pairs(fast_keys.view(-1, len(up), num_fast), fast_turns, may_overwrite=True)
        fast_scores = attention_scores(query[None, ..., :num_fast], fast_keys.transpose(0, 1)[None])[0]
        scores[..., part] = fast_scores + slow_scores(
            query[..., num_fast:], latents[part], up_slow, shift[:, num_fast:], turns[part], interpolation
        )
    return scores


def slow_scores(
    query: Float[Tensor, "h q e"],
    latents: Float[Tensor, "s k"],
    up: Float[Tensor, "g e k"],
    shift: Float[Tensor, "g e"],
    turns: Complex[Tensor, "s p"],
    interpolation: Interpolation,
) -> Float[Tensor, "h q s"]:
    """Dot products over the slow channels of every head.

    Args:
        query: Scaled and rotated; its slow channels.
        latents: Of whole spans.
        up: The rows of the slow channels.
        shift: What the slow channels of rebuilt keys lack.
        turns: Of every slot, all pairs.
        interpolation: Of those turns.
    """
    spans = latents.unflatten(0, (-1, SPAN))  # C L K, L slots of a span
    # The query, turned back by the rotation of every node of every span. A scaled rotation (yarn) scales keys once,
    # and so does its conjugate.
    back = turns.unflatten(0, (-1, SPAN))[:, interpolation.nodes, interpolation.first_pair :].conj()  # C N P
    at_nodes = rotate_pairs(query[:, :, None, None].expand(-1, -1, *back.shape[:2], -1), back)  # H Q C N E
    by_kv_head = at_nodes.reshape(len(up), -1, query.shape[-1])
    # It absorbs the factors, and the offset as a constant of each node.
    absorbed = (by_kv_head @ up).view(-1, *back.shape[:2], latents.shape[-1]).transpose(0, 1)  # C HQ N K
    shifts = (by_kv_head @ shift[..., None]).view(-1, *back.shape[:2], 1).transpose(0, 1)
    # What every node's query scores at every slot of its span, and of these the weighted sum over nodes.
    node_scores = (absorbed.flatten(1, 2) @ spans.mT).view(*absorbed.shape[:3], SPAN) + shifts  # C HQ N L
    return (node_scores * interpolation.weights).sum(2).transpose(0, 1).reshape(*query.shape[:2], -1)
