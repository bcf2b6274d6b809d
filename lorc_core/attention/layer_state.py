"""One attention module while something is attached to it: its facts, its projections, the call in progress."""

from dataclasses import InitVar, dataclass, field

from lorc_core.attention.call import AttentionCall, Observer
from lorc_core.attention.layer_projections import LayerProjections, compresses_unrotated_keys
from lorc_core.attention.placement import Placement
from lorc_core.attention.positions import RowPositions
from lorc_core.attention.scores.slot_turns import SlotTurns
from lorc_core.decomposition.factors import LayerFactors
from lorc_core.model.rotation import LayerRotation


@dataclass
class LayerState:
    """One attention module's facts, its projections, what looks at it, and the call in progress.

    Attributes:
        placement: Where the module computes.
        rotary: How it rotates its keys; None where it does not.
        num_kv_heads: Of the module.
        head_dim: Channels of each.
        attends: Whether the module calls `latent_attention`; else it attends by itself, on whole states.
        positions: What checks positions, one for all layers.
        turns: Rotations of slots, one table for all layers.
        factors: Of its keys and values, wherever they are.
        observe: Called with what the module is about to attend with.
        call: Between the module's hook and its attention function.
        projections: The factors in their place.
    """

    placement: Placement
    rotary: LayerRotation | None
    num_kv_heads: int
    head_dim: int
    attends: bool
    positions: RowPositions
    turns: SlotTurns
    factors: InitVar[LayerFactors]
    observe: Observer | None = None
    call: AttentionCall | None = None
    projections: LayerProjections = field(init=False)

    def __post_init__(self, factors: LayerFactors) -> None:
        self.use(factors)

    @property
    def unrotates_keys(self) -> bool:
        """Whether keys must arrive before their rotation."""
        wanted = self.observe is not None or compresses_unrotated_keys(self.projections.factors)
        return self.rotary is not None and wanted

    def use(self, factors: LayerFactors) -> None:
        """Take other factors, wherever they are."""
        heads = (self.num_kv_heads, self.head_dim)
        self.projections = LayerProjections.of(factors, self.placement, heads, self.rotary, attends=self.attends)

    def move(self, placement: Placement) -> None:
        """Bring the factors to another device, or to another precision."""
        if placement != self.placement:
            self.placement, self.projections = placement, self.projections.to(placement)

    def take_call(self) -> AttentionCall:
        """The call in progress, which is then over."""
        call, self.call = self.call, None
        assert call is not None, "an attention module was called past its hook"
        return call
