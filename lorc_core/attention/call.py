"""One forward call of one attention module: what its hook leaves for its attention function, what that is asked for.

Shapes: B batch, H query heads, G kv heads, D head_dim, Q new tokens, S cached and new tokens, I hidden_size.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorc_core.model.rotation import Rotation


@dataclass
class AttentionCall:
    """What one call must remember between the module's hook and its attention function.

    Attributes:
        rotation: Of the new tokens; None where keys stay as the module rotates them.
        position_ids: Of the new tokens, as the module got them.
        hidden_states: What the module's projections read.
        num_cached: Tokens cached before this call; a tensor in static caches, which count on their device.
        first_slot: The first slot that this call attends to: 0 but in sliding windows, which forget the oldest.
    """

    rotation: Rotation | None
    position_ids: Int[Tensor, "#b q"] | None
    hidden_states: Float[Tensor, "b q i"] | None = None
    num_cached: int | Tensor = 0
    first_slot: int = 0


@dataclass(frozen=True)
class AttentionInputs:
    """What an attention function is given, in transformers' terms.

    Attributes:
        underlying: The implementation that the model had before lorc's took its place, such as "sdpa".
        module: That attends.
        query: Of the new tokens.
        key: What the cache handed back: latents, or states where keys are not compressed.
        value: The same of the values.
        mask: Boolean, or added to the scores; None for none.
        options: The function's other arguments: scaling, softcap, dropout, and what else the model's family has.
    """

    underlying: str
    module: nn.Module
    query: Float[Tensor, "b h q d"]
    key: Float[Tensor, "b _ s _"]
    value: Float[Tensor, "b _ s _"]
    mask: Tensor | None
    options: dict[str, Any]

    @property
    def scaling(self) -> float:
        """Of the scores: by whole heads where the module leaves it open, whatever the size of those attended."""
        given = self.options.get("scaling")
        return self.query.shape[-1] ** -0.5 if given is None else given

    def attend(
        self, query: Float[Tensor, "b h q _"], key: Float[Tensor, "b g s _"], value: Float[Tensor, "b g s _"]
    ) -> tuple[Float[Tensor, "b q h _"], Tensor | None]:
        """The model's own attention on other queries, keys and values.

        Returns:
            The attended values, and the attention weights where the implementation gives them.
        """
        attend = implementation(self.underlying, self.module)
        return attend(self.module, query, key, value, self.mask, **(self.options | {"scaling": self.scaling}))


def implementation(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' attention function of that name.

    Args:
        name: Such as "sdpa" or "eager".
        module: That will attend; eager attention lives beside each model's own classes.
    """
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


@dataclass(frozen=True)
class AttentionStates:
    """What one attention module is about to attend with, as observers are shown it.

    Attributes:
        module: That attends.
        hidden_states: What its projections read.
        query: Before the rotation, as if scores were scaled by head_dim ** -0.5.
        key: Before the rotation.
        value: The values.
        rotated_query: As scored; the same as `query` where nothing is rotated.
        rotated_key: As scored.
        rotation: Of the new tokens; None where nothing is rotated.
        attend: The module's own attention on other rotated keys and other values, without the output projection.
    """

    module: nn.Module
    hidden_states: Float[Tensor, "b q i"]
    query: Float[Tensor, "b h q d"]
    key: Float[Tensor, "b g s d"]
    value: Float[Tensor, "b g s d"]
    rotated_query: Float[Tensor, "b h q d"]
    rotated_key: Float[Tensor, "b g s d"]
    rotation: Rotation | None
    attend: Callable[[Tensor, Tensor], Float[Tensor, "b q h d"]]


Observer = Callable[[AttentionStates], None]
