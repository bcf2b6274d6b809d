"""Second moments of tokens, as sums in float64 that add up over batches, texts and workers.

What a projection needs of them, and what weights alone tell, is in `moments`; the tokens come from `calibration`.

Shapes: G kv heads, M query heads of a kv head, D head_dim, N kv_width (G * D), T tokens, I any width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lorc_core.decomposition.symmetric import gram
from lorc_core.methods import Axes


@dataclass(frozen=True)
class SecondMoment:
    """Sums over tokens, in float64: of x x^T and of x. They add up across batches, texts and workers."""

    total: Float[Tensor, "*batch i i"]
    sum: Float[Tensor, "*batch i"]
    num_tokens: int

    @classmethod
    def of(cls, tokens: Float[Tensor, "*batch t i"]) -> "SecondMoment":
        """The sums over T tokens, of each of a batch of things apart."""
        exact = tokens.double()
        return cls(gram(exact.mT), exact.sum(dim=-2), tokens.shape[-2])

    def __add__(self, other: "SecondMoment") -> "SecondMoment":
        return SecondMoment(self.total + other.total, self.sum + other.sum, self.num_tokens + other.num_tokens)

    @property
    def mean(self) -> Float[Tensor, "*batch i"]:
        """E[x]."""
        return self.sum / self.num_tokens

    def about(self, centre: Float[Tensor, " i"] | None) -> Float[Tensor, "*batch i i"]:
        """E[(x - centre)(x - centre)^T], with zero for no centre."""
        raw = self.total / self.num_tokens
        if centre is None:
            return raw
        cross = torch.outer(self.mean, centre)
        return raw - cross - cross.T + torch.outer(centre, centre)


@dataclass(frozen=True)
class LayerMoments:
    """What calibration measured of one layer.

    Attributes:
        moments: By name: `inputs`, the lengths of what the projections read (1); `keys` and `values` over all kv
            heads (N); `queries` (G, D), of the query heads that read each kv head taken as so many tokens; `summed`
            (G, D), of the sum of those query heads; and, where there is a rotation, `rotated_queries`,
            `rotated_summed` and `rotated_keys`, these of each head (G, D) or, where a method asks for it, over all
            (N). Where a method asks for gradients of the loss: `key_gradients`, `value_gradients` and
            `rotated_key_gradients`, shaped as those of the states.
    """

    moments: dict[str, SecondMoment]

    def __add__(self, other: "LayerMoments") -> "LayerMoments":
        return LayerMoments({name: moment + other.moments[name] for name, moment in self.moments.items()})

    def beside(self, other: "LayerMoments") -> "LayerMoments":
        """These moments and others of the same layer, which have other names."""
        return LayerMoments(self.moments | other.moments)

    @property
    def num_tokens(self) -> int:
        """Of the text."""
        return self.moments["values"].num_tokens

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored, by name; the inverse is `of_tensors`."""
        stored: dict[str, Tensor] = {}
        for name, moment in self.moments.items():
            parts = {"total": moment.total, "sum": moment.sum, "num_tokens": torch.tensor(moment.num_tokens)}
            # a copy each: safetensors refuses shared memory, and two names may stand for one moment
            stored |= {f"{name}.{part}": tensor.cpu().clone() for part, tensor in parts.items()}
        return stored

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "LayerMoments":
        """The inverse of `tensors`."""
        names = dict.fromkeys(stored.rpartition(".")[0] for stored in tensors)
        return cls(
            {
                name: SecondMoment(tensors[f"{name}.total"], tensors[f"{name}.sum"], int(tensors[f"{name}.num_tokens"]))
                for name in names
            }
        )

    def in_space(self, name: str, axes: Axes) -> SecondMoment:
        """The moment of keys, values or queries in a method's space: before the rotation or after it.

        Args:
            name: `keys`, `values`, `queries`, `summed`, `key_gradients` or `value_gradients`.
            axes: The method's. Complex blocks commute with the rotation, so they are read before it, where all heads
                are measured together.
        """
        rotated = axes.space == "post_rope" and axes.block != "frequency" and f"rotated_{name}" in self.moments
        return self.moments[f"rotated_{name}" if rotated else name]


def key_and_query_moments(
    keys: Float[Tensor, "g t d"],
    queries: Float[Tensor, "g m t d"],
    prefix: Literal["", "rotated_"],
    *,
    join_heads: bool,
) -> dict[str, SecondMoment]:
    """The moments of keys and queries in one space.

    Args:
        keys: Of each kv head.
        queries: Of the query heads that read each kv head.
        prefix: Of the names: before or after the rotation.
        join_heads: Whether keys are measured over all heads together, N wide, or each head alone, D wide.

    Returns:
        `keys`, `queries` and `summed` by name; see `LayerMoments`.
    """
    stacked = SecondMoment.of(queries.flatten(1, 2))
    return {
        f"{prefix}keys": SecondMoment.of(keys.transpose(0, 1).flatten(1) if join_heads else keys),
        f"{prefix}queries": stacked,
        f"{prefix}summed": stacked if queries.shape[1] == 1 else SecondMoment.of(queries.sum(dim=1)),
    }


def over_all_heads(moment: Float[Tensor, "*g i i"]) -> Float[Tensor, "n n"]:
    """One moment over all kv heads.

    Args:
        moment: Over all heads already (N, N), or of each head alone (G, D, D).

    Returns:
        Zero between heads where each was measured alone: only methods whose blocks do not span heads ask for that.
    """
    return moment if moment.ndim == 2 else torch.block_diag(*moment)
