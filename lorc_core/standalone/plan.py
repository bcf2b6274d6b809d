"""What an export will do, decided before anything is written: which projections are folded, which tensors change."""

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from lorc_core.attention.adapters import adapted_modules
from lorc_core.decomposition.factors import Factors
from lorc_core.errors import ConfigError
from lorc_core.loading import check_base, variant_and_base
from lorc_core.model.architecture import Architecture
from lorc_core.model.kinds import PROJECTION_OF, Kind, LayerKind
from lorc_core.model.stored.checkpoint import Checkpoint
from lorc_core.standalone.settings import StoredFactors
from lorc_core.variant import Variant


@dataclass(frozen=True)
class Plan:
    """Which projections of a variant are folded, and which tensors of the base change.

    Attributes:
        variant: To be exported.
        checkpoint: Of its base model.
        folded: Whose down-projection is folded into the projection.
        kept: For each kind, why projections of full size stay, if any do.
        places: By the full name of a weight, or of a folded bias: what it projects.
        adapters: By the full name of a weight: the LoRA adapter that it takes in.
    """

    variant: Variant
    checkpoint: Checkpoint
    folded: frozenset[LayerKind]
    kept: dict[Kind, str]
    places: dict[str, list[LayerKind]]
    adapters: dict[str, str]

    @classmethod
    def of(cls, variant: Variant, base_dir: Path) -> "Plan":
        """Look at the model's facts and at the names of its tensors.

        Args:
            variant: To be exported.
            base_dir: Of its base model.
        """
        checkpoint, architecture = Checkpoint(base_dir), variant.architecture
        folded, kept = set(), {}
        places: dict[str, list[LayerKind]] = {}
        for layer_idx, layer in enumerate(variant.factors):
            for kind, factors in layer.items():
                if factors is None:
                    continue
                names = [architecture.projection_name(layer_idx, PROJECTION_OF[kind], "weight")]
                if reason := reason_to_keep(architecture, kind, factors):
                    kept[kind] = reason
                else:
                    folded.add(LayerKind(layer_idx, kind))
                    if architecture.bias:
                        names.append(architecture.projection_name(layer_idx, PROJECTION_OF[kind], "bias"))
                for name in names:
                    places.setdefault(checkpoint.full_name(name), []).append(LayerKind(layer_idx, kind))
        paths = adapted_modules(architecture) if variant.adapters else {}
        adapters = {checkpoint.full_name(f"{path}.weight"): name for name, path in paths.items()}
        return cls(variant, checkpoint, frozenset(folded), kept, places, adapters)

    def weight_name(self, place: LayerKind) -> str:
        """Full name of a projection's weight."""
        name = self.variant.architecture.projection_name(place.layer_idx, PROJECTION_OF[place.kind], "weight")
        return self.checkpoint.full_name(name)

    def bias_name(self, place: LayerKind) -> str | None:
        """Full name of a projection's bias; None where it has none."""
        architecture = self.variant.architecture
        if not architecture.bias:
            return None
        name = architecture.projection_name(place.layer_idx, PROJECTION_OF[place.kind], "bias")
        return self.checkpoint.full_name(name)

    def factors(self, place: LayerKind) -> Factors:
        """The variant's factors of what `places` or `folded` name."""
        factors = self.variant.factors[place.layer_idx][place.kind]
        assert factors is not None
        return factors

    def stored(self, place: LayerKind) -> StoredFactors | None:
        """How one layer's factors stand in the checkpoint; None where the full width is kept."""
        factors = self.variant.factors[place.layer_idx][place.kind]
        if factors is None:
            return None
        folded = place in self.folded
        return StoredFactors(
            block=factors.partition.block,
            ranks=factors.ranks,
            rotated=factors.rotated,
            folded=folded,
            own_down=not folded and factors.own_down is not None,
            constant=factors.mean is not None,
        )

    def read(self, full_name: str) -> Float[Tensor, "..."]:
        """A tensor of the base, with the variant's LoRA adapter added if it has one."""
        tensor, adapter = self.checkpoint.read(full_name), self.adapters.get(full_name)
        if adapter is None:
            return tensor
        down, up = (self.variant.adapters[f"{adapter}.{part}"].double() for part in ("down", "up"))
        return (tensor.double() + up @ down).to(tensor.dtype)


def open_variant(variant_dir: Path | str, directory: Path, base: Path | str | None) -> Plan:
    """The plan for a variant and its base model.

    Args:
        variant_dir: A variant's directory.
        directory: To write to.
        base: Directory of the base model now, if not where it was when the variant was made.

    Raises:
        ConfigError: The directory to write to is not empty, or the base model is not there.
        ArtifactError: The variant is unfinished or altered, or the base is another model.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: exists and is not empty; name a new directory")
    variant, location = variant_and_base(variant_dir, base)
    base_dir = location.directory(weights=True)
    check_base(base_dir, variant)
    return Plan.of(variant, base_dir)


def reason_to_keep(architecture: Architecture, kind: Kind, factors: Factors) -> str | None:
    """Why a projection of full size must stay; None where the down-projection can be folded into it.

    Args:
        architecture: Of the model.
        kind: What is projected.
        factors: Of one layer.
    """
    if factors.rotated:
        return "what is cached is rotated after the projection"
    if architecture.family.fused:
        return "one tensor holds the projections of queries, keys and values"
    if not architecture.family.interface:
        return "the attention module attends by itself, on whole states"
    if kind == "keys" and architecture.qk_norm:
        return "a norm stands between the projection and the cache"
    return None
