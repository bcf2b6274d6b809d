"""The rotations of a cache's slots, kept from call to call.

Shapes: B batch, H query heads, D head_dim, Q new tokens, S slots, P pairs of channels.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from lorc_core.attention.scores.interpolated import SPAN, Interpolation, interpolation_of
from lorc_core.model.rotation import LayerRotation


@dataclass(frozen=True)
class SlotTable:
    """The turns of slots 0 .. S - 1, as if slots were positions.

    Attributes:
        turns: In float32 or float64.
        interpolation: How scores by these turns are interpolated; None but on a CPU.
    """

    turns: Complex[Tensor, "1 s p"]
    interpolation: Interpolation | None


class SlotTurns:
    """One table for each rotation, told apart by its module too, since `Rotary` does not compare frequencies.

    Dot products of rotated queries and keys depend on the distance of their positions alone, and that is the distance
    of their slots, so a table serves all layers, rows and calls.
    """

    BLOCK = 2 * SPAN  # slots; a table is computed anew when it has grown by so many

    def __init__(self) -> None:
        self._tables: dict[tuple[LayerRotation, torch.device, torch.dtype], SlotTable] = {}

    def at(self, rotation: LayerRotation, like: Float[Tensor, "b h q d"], num_slots: int) -> SlotTable:
        """The turns of no fewer than the first `num_slots` slots.

        Args:
            rotation: Of a layer.
            like: On the device and of the precision that they are for.
            num_slots: That will be read.
        """
        key = (rotation, like.device, torch.promote_types(like.dtype, torch.float32))
        table = self._tables.get(key)
        if table is None or table.turns.shape[1] < num_slots:
            length = -(-num_slots // self.BLOCK) * self.BLOCK
            with torch.inference_mode(mode=False):  # it may serve training later
                positions = torch.arange(length, device=like.device)[None]
                turns = rotation(torch.empty(0, device=key[1], dtype=key[2]), positions).turns()
                interpolation = interpolation_of(turns) if turns.device.type == "cpu" else None
                self._tables[key] = table = SlotTable(turns, interpolation)
        return table
