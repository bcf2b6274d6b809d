"""Everything that `compress` measures with the whole model on calibration text."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorc_core.attention.adapters import AdapterTensors
from lorc_core.decomposition.factors import LayerDecomposition
from lorc_core.decomposition.moments import LayerMoments
from lorc_core.measurement.calibration import batches, calibrate, calibration_sequences
from lorc_core.measurement.exchange import exchanged_ranks
from lorc_core.measurement.probes import probe
from lorc_core.measurement.training import Trainer, trained_layers
from lorc_core.methods import Method
from lorc_core.model.architecture import architecture_of
from lorc_core.model.integrity import check_model
from lorc_core.ranks.schedules import Schedule, Sensitivity
from lorc_core.ranks.spectra import Probes, RankSchedule


class CalibratedModel:
    """A model with its calibration text, in evaluation mode until the end of the `with` block.

    Args:
        model_or_dir: A loaded model, whose modules get their own modes back, or the directory to load one from.
        calibration: Token ids (sequences, tokens), or a text file's path.

    Raises:
        ConfigError: The text is absent or too short.
    """

    def __init__(
        self, model_or_dir: PreTrainedModel | Path | str, calibration: Int[Tensor, "s t"] | Path | str
    ) -> None:
        if isinstance(model_or_dir, PreTrainedModel):
            self.model = model_or_dir
        else:
            check_model(Path(model_or_dir))
            self.model = AutoModelForCausalLM.from_pretrained(model_or_dir)
        self.architecture = architecture_of(self.model.config)
        self.sequences = calibration_sequences(calibration, self.model.name_or_path, self.architecture)

    def __enter__(self) -> "CalibratedModel":
        self.modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, mode in self.modes.items():
            module.training = mode

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
        return trained_layers(layers, last.bases, method), last.adapters

    def probes(self, schedule: Schedule, layers: Sequence[LayerDecomposition]) -> Probes | None:
        """What the schedule asks for beside spectra."""
        return None if schedule.probe is None else probe(schedule.probe, self.model, layers, self.batches)

    def refine(self, schedule: Schedule, ranks: RankSchedule, layers: Sequence[LayerDecomposition]) -> RankSchedule:
        """Exchanges of floats, for the schedule that asks for them."""
        if not isinstance(schedule, Sensitivity):
            return ranks
        return exchanged_ranks(self.model, schedule, layers, self.batches, ranks)
