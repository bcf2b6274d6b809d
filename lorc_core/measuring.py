"""Everything that `compress` measures with the whole model on calibration text."""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorc_core.adapters import AdapterTensors
from lorc_core.architecture import Architecture, architecture_of
from lorc_core.calibration import batches, calibrate, calibration_sequences
from lorc_core.compression import slice_layer
from lorc_core.methods import Method
from lorc_core.moments import LayerMoments
from lorc_core.probes import Exchange, attention_errors, fisher_information, loss_curves, mean_loss
from lorc_core.projection import LayerDecomposition, layer_spectrum
from lorc_core.runtime import Attachment
from lorc_core.schedule import Schedule, Sensitivity
from lorc_core.spectra import Probes, RankSchedule
from lorc_core.training import Trainer, trained_layers


def loss_at_ranks(
    model: PreTrainedModel,
    architecture: Architecture,
    layers: Sequence[LayerDecomposition],
    batches: Sequence[Int[Tensor, "_ _"]],
    ranks: RankSchedule,
) -> float:
    """The loss of a model compressed to these ranks, in nats per token."""
    factors = [slice_layer(layer, idx, ranks, torch.float32) for idx, layer in enumerate(layers)]
    with Attachment(model, architecture, factors).start():
        return mean_loss(model, batches)


class Measuring:
    """A model with its calibration text.

    Args:
        model_or_dir: A loaded model, or the directory to load one from.
        calibration: Token ids (sequences, tokens), or a text file's path.

    Raises:
        ConfigError: The text is absent or too short.
    """

    def __init__(
        self, model_or_dir: PreTrainedModel | Path | str, calibration: Int[Tensor, "s t"] | Path | str
    ) -> None:
        if isinstance(model_or_dir, PreTrainedModel):
            self.model = model_or_dir.eval()
        else:
            self.model = AutoModelForCausalLM.from_pretrained(model_or_dir).eval()
        self.architecture = architecture_of(self.model.config)
        self.sequences = calibration_sequences(calibration, self.model.name_or_path, self.architecture)

    @cached_property
    def batches(self) -> list[Int[Tensor, "_ _"]]:
        return list(batches(self.sequences))

    def moments(self, method: Method) -> tuple[LayerMoments, ...]:
        """See `calibrate`."""
        method.check_enough_tokens(self.architecture, self.sequences.numel())
        return calibrate(self.model, self.batches, join_rotated_heads=method.joins_rotated_heads)

    def trained(
        self, method: Method, layers: list[LayerDecomposition]
    ) -> tuple[list[LayerDecomposition], AdapterTensors]:
        """The layers after the method's training, if it has any, and its adapters, if it has those."""
        if method.training is None:
            return layers, {}
        *_, last = Trainer(self.model, layers, method.training).train(self.sequences)
        return trained_layers(layers, last.rotations, method), last.adapters

    def probes(self, schedule: Schedule, layers: Sequence[LayerDecomposition]) -> Probes | None:
        """What the schedule asks for beside spectra."""
        if schedule.probe == "fisher":
            return Probes(fisher=fisher_information(self.model, self.batches))
        if schedule.probe == "errors":
            return Probes(errors=attention_errors(self.model, layers, self.batches))
        if schedule.probe == "curves":
            return Probes(curves=loss_curves(self.model, layers, self.batches))
        return None

    def refine(self, schedule: Schedule, ranks: RankSchedule, layers: Sequence[LayerDecomposition]) -> RankSchedule:
        """Exchanges of floats, for the schedule that asks for them."""
        if not isinstance(schedule, Sensitivity):
            return ranks

        loss_of = partial(loss_at_ranks, self.model, self.architecture, layers, self.batches)
        spectra = [layer_spectrum(layer) for layer in layers]
        return Exchange(schedule.stairs(spectra, Probes()), loss_of).improve(ranks, schedule.num_rounds)
