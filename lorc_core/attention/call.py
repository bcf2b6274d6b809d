"""One forward call of one attention module: what its hook leaves for its attention function, and what observers see.

Shapes: B batch, H query heads, G kv heads, D head_dim, Q new tokens, S cached and new tokens, I hidden_size.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from lorc_core.model.rotation import Rotation


@dataclass
class AttentionCall:
    """What one call must remember between the module's hook and its attention function.

    Attributes:
        rotation: Of the new tokens; None where keys stay as the module rotates them.
        position_ids: Of the new tokens, as the module got them.
        inputs: What the module's projections read.
        past: Tokens cached before this call; a tensor in static caches.
        first_slot: Of the slots that this call attends to; past 0 in sliding windows.
    """

    rotation: Rotation | None
    position_ids: Int[Tensor, "#b q"] | None
    inputs: Float[Tensor, "b q i"] | None = None
    past: int | Tensor = 0
    first_slot: int = 0


@dataclass(frozen=True)
class Observed:
    """What one attention module is about to attend with, before and after the rotation (the same where there is none).

    Queries are those whose logits are scaled by head_dim ** -0.5. `attend` is the module's own attention on other
    rotated keys or values, without the output projection.
    """

    module: nn.Module
    inputs: Float[Tensor, "b q i"]
    query: Float[Tensor, "b h q d"]
    key: Float[Tensor, "b g s d"]
    value: Float[Tensor, "b g s d"]
    rotated_query: Float[Tensor, "b h q d"]
    rotated_key: Float[Tensor, "b g s d"]
    rotation: Rotation | None
    attend: Callable[[Tensor, Tensor], Float[Tensor, "b q h d"]]
