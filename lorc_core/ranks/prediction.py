"""What ranks will cost, from spectra alone, where energies are in nats: of methods whose readers are gradients."""

from collections.abc import Sequence

from lorc_core.model.kinds import KINDS
from lorc_core.ranks.spectra import Energies, LayerSpectrum, RankSchedule


def predicted_rise(spectra: Sequence[LayerSpectrum], ranks: RankSchedule) -> float:
    """Half of all energy that is cut: the rise of the loss to second order, in nats per token.

    Errors of all layers and tokens are taken as independent and small; docs/methods.md says how far that held.

    Args:
        spectra: One per layer, of a method whose readers are all `gradient`.
        ranks: Of the same layers.
    """
    return sum(
        cut_energy(spectrum[kind].read, chosen[kind]) / 2
        for spectrum, chosen in zip(spectra, ranks.layers, strict=True)
        for kind in KINDS
    )


def cut_energy(energies: Energies, ranks: Sequence[int]) -> float:
    """What is past the rank of each block, of all blocks together."""
    return sum((sum(block[rank:]) for block, rank in zip(energies, ranks, strict=True)), 0.0)
