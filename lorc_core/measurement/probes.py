"""What schedules measure on calibration text beside spectra: each probe has a file; here one is chosen by its name."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from lorc_core.decomposition.factors import LayerDecomposition
from lorc_core.measurement.attention_errors import attention_errors
from lorc_core.measurement.fisher import fisher_information
from lorc_core.measurement.loss_curves import loss_curves, max_curve_passes
from lorc_core.measurement.losses import Batches
from lorc_core.ranks.spectra import Probe, Probes


def probe(kind: Probe, model: PreTrainedModel, layers: Sequence[LayerDecomposition], batches: Batches) -> Probes:
    """What the schedules that ask for this kind of probe read.

    Args:
        kind: Which measurement.
        model: Without a variant attached.
        layers: Decomposed by one method; `fisher` does not look at them.
        batches: Token ids of sequences of one length.

    Raises:
        NumericsError: A measurement is NaN or infinite; the message names the layer.
    """
    if kind == "fisher":
        return Probes(fisher=fisher_information(model, batches))
    if kind == "attention_errors":
        return Probes(attention_errors=attention_errors(model, layers, batches))
    return Probes(curves=loss_curves(model, layers, batches))


def max_passes(kind: Probe, num_layers: int) -> int:
    """How often `probe` runs the model over all batches, at most."""
    return max_curve_passes(num_layers) if kind == "curves" else 1
