"""What a base's tensors become in a plain export: projections folded head by head, or products beside them.

Values are folded into `v_proj` and `o_proj`, keys without a rotation into `q_proj` and `k_proj`; rotated keys keep two
small matrices per kv head, since a fold would be another one at every position. All in float64.

Shapes: H query heads, G kv heads, M = H / G, D head_dim, R head size of the cache, I hidden_size, N = G * D, K = G * R.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lorc_core.decomposition.factors import Factors
from lorc_core.model.kinds import LayerKind, Projection
from lorc_core.standalone.plan import Plan

Part = Literal["weight", "bias"]
Change = Callable[[Tensor], dict[str, Tensor]]  # of a tensor of the base to those that take its place


@dataclass(frozen=True)
class HeadFactors:
    """One layer's keys or values, head by head in float64, padded with zeros to one size.

    Attributes:
        down: Of every kv head.
        up: Of every kv head.
        mean: Of the states; None where none is known.
    """

    down: Float[Tensor, "g r d"]
    up: Float[Tensor, "g d r"]
    mean: Float[Tensor, "g d"] | None

    @classmethod
    def of(cls, factors: Factors, head_size: int) -> "HeadFactors":
        """Take factors apart.

        Args:
            factors: Of one rank in all heads.
            head_size: R, no less than the rank.
        """
        exact = factors.to("cpu", torch.float64)
        num_heads = len(factors.ranks)
        short = head_size - factors.ranks[0]
        down = pad(exact.down.unflatten(0, (num_heads, -1)), (0, 0, 0, short))
        up = pad(exact.up.unflatten(1, (num_heads, -1)).transpose(0, 1), (0, short))
        return cls(down, up, None if exact.mean is None else exact.mean.unflatten(0, (num_heads, -1)))

    def fold_down(self, rows: Float[Tensor, "n *i"]) -> Float[Tensor, "k *i"]:
        """What makes latents, from the rows of a weight or bias that makes states: down W."""
        return torch.einsum("grd,gd...->gr...", self.down, by_head(rows, len(self.down))).flatten(0, 1)

    def fold_queries(self, rows: Float[Tensor, "h *i"]) -> Float[Tensor, "k *i"]:
        """What makes queries for latents, from what makes queries for states: q . (up l) = (up^T q) . l."""
        rows = by_head(rows, len(self.up)).unflatten(1, (-1, self.up.shape[1]))
        return torch.einsum("gdr,gmd...->gmr...", self.up, rows).flatten(0, 2)

    def fold_output(self, weight: Float[Tensor, "i n"]) -> Float[Tensor, "i k"]:
        """What reads attended latents, from what reads attended states: W_o up."""
        num_heads, head_dim, _ = self.up.shape
        columns = weight.unflatten(1, (num_heads, -1, head_dim))
        return torch.einsum("igmd,gdr->igmr", columns, self.up).flatten(1)


def by_head(rows: Float[Tensor, "n *i"], num_kv_heads: int) -> Float[Tensor, "g m *i"]:
    """Rows by the kv head that they belong to, or that their query heads read.

    Args:
        rows: Of a weight or a bias.
        num_kv_heads: G.
    """
    return rows.unflatten(0, (num_kv_heads, -1))


@dataclass(frozen=True)
class PlainLayer:
    """What one layer's tensors of the base become.

    Attributes:
        plan: Of the export.
        layer_idx: Of the layer.
        keys: Its factors.
        values: Its factors.
        rotated: Whether keys are cached after a rotation.
    """

    plan: Plan
    layer_idx: int
    keys: HeadFactors
    values: HeadFactors
    rotated: bool

    @classmethod
    def of(cls, plan: Plan, layer_idx: int, head_size: int) -> "PlainLayer":
        """Of a layer whose keys and values both have factors.

        Args:
            plan: Of the export.
            layer_idx: Of the layer.
            head_size: R.
        """
        keys = HeadFactors.of(plan.factors(LayerKind(layer_idx, "keys")), head_size)
        values = HeadFactors.of(plan.factors(LayerKind(layer_idx, "values")), head_size)
        return cls(plan, layer_idx, keys, values, plan.variant.architecture.rotary)

    @property
    def has_output_bias(self) -> bool:
        """Whether `o_proj` needs a bias: its own, or for what the values' mean loses."""
        return self.values.mean is not None or self._stored_output_bias is not None

    @property
    def _output_name(self) -> str:
        return self.plan.checkpoint.full_name(self.plan.variant.architecture.output_name(self.layer_idx))

    @property
    def _stored_output_bias(self) -> str | None:
        name = f"{self._output_name.removesuffix('weight')}bias"
        return name if name in self.plan.checkpoint.file_of else None

    def name(self, projection: Projection, part: Part) -> str:
        """Full name of a tensor of the base."""
        architecture = self.plan.variant.architecture
        return self.plan.checkpoint.full_name(architecture.projection_name(self.layer_idx, projection, part))

    def read(self, full_name: str) -> Float[Tensor, "..."]:
        """A tensor of the base in float64."""
        return self.plan.checkpoint.read(full_name).double()

    def changes(self, output_bias: bool) -> dict[str, Change]:
        """What becomes of the layer's tensors, by their full names in the base.

        Args:
            output_bias: Whether `o_proj` has a bias in the export, as it must in all layers or in none.
        """
        folds: dict[Projection, Callable[[Tensor], Tensor]] = {"v": self.values.fold_down}
        if not self.rotated:
            folds |= {"q": self.keys.fold_queries, "k": self.keys.fold_down}
        parts: tuple[Part, ...] = ("weight", "bias") if self.plan.variant.architecture.bias else ("weight",)
        changes: dict[str, Change] = {
            self.name(projection, part): partial(folded_tensor, self.name(projection, part), fold)
            for projection, fold in folds.items()
            for part in parts
        }
        changes[self._output_name] = partial(self._output, output_bias)
        if self._stored_output_bias:
            changes[self._stored_output_bias] = lambda _: {}  # written with the weight
        if self.rotated:
            changes[self.name("k", "weight")] = self._with_products
        return changes

    def _with_products(self, weight: Float[Tensor, "n i"]) -> dict[str, Tensor]:
        """W_k as it was, and what rotated queries and keys are multiplied by."""
        architecture, name = self.plan.variant.architecture, self.name("k", "weight")
        prefix = name.removesuffix(architecture.projection_name(self.layer_idx, "k", "weight"))
        module = f"{prefix}{architecture.attention_module(self.layer_idx)}"
        products = {f"{module}.query_up": self.keys.up, f"{module}.key_down": self.keys.down.mT}
        return {name: weight} | {key: tensor.to(weight.dtype) for key, tensor in products.items()}

    def _output(self, output_bias: bool, weight: Float[Tensor, "i n"]) -> dict[str, Tensor]:
        """W_o for latents, and its bias: with m the values' mean, W_o m less what W_o as stored makes of m's latents.

        Attention weights sum to one, so every query head gets the whole mean of its kv head.
        """
        folded_weight = self.values.fold_output(weight.double()).to(weight.dtype)
        output = {self._output_name: folded_weight}
        if not output_bias:
            return output
        stored = self._stored_output_bias
        bias = torch.zeros(len(weight), dtype=torch.float64) if stored is None else self.read(stored)
        if (mean := self.values.mean) is not None:
            per_query = weight.shape[1] // mean.numel()
            bias = bias + weight.double() @ mean.repeat_interleave(per_query, dim=0).flatten()
            latents = self._latents_of(mean.flatten(), weight.dtype).unflatten(0, (len(mean), -1))
            bias = bias - folded_weight.double() @ latents.repeat_interleave(per_query, dim=0).flatten()
        return output | {f"{self._output_name.removesuffix('weight')}bias": bias.to(weight.dtype)}

    def _latents_of(self, mean: Float[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, " k"]:
        """Latents of the values' mean, of which the bias's part is as `v_proj` has it stored."""
        if not self.plan.variant.architecture.bias:
            return self.values.fold_down(mean)
        bias = self.read(self.name("v", "bias"))
        return self.values.fold_down(mean - bias) + self.values.fold_down(bias).to(dtype).double()


def folded_tensor(full_name: str, fold: Callable[[Tensor], Tensor], tensor: Float[Tensor, "n *i"]) -> dict[str, Tensor]:
    """A projection's weight or bias after a fold; computed in float64, kept in the tensor's dtype."""
    return {full_name: fold(tensor.double()).to(tensor.dtype)}
