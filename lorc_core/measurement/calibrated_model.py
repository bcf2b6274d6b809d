"""Everything that `compress` measures with the whole model on calibration text."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType

from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorc_core.attention.adapters import AdapterTensors
from lorc_core.decomposition.factors import LayerDecomposition
from lorc_core.decomposition.position_average import over_positions
from lorc_core.decomposition.second_moments import LayerMoments
from lorc_core.errors import ConfigError
from lorc_core.measurement.calibration import batches, calibrate
from lorc_core.measurement.calibration_text import Calibration, calibration_text
from lorc_core.measurement.exchange import exchanged_ranks, max_exchange_passes
from lorc_core.measurement.gradients import gradient_moments
from lorc_core.measurement.probes import max_passes, probe
from lorc_core.measurement.training.latent_bases import trained_layers
from lorc_core.measurement.training.trainer import Trainer
from lorc_core.methods import Method
from lorc_core.model.architecture import architecture_of
from lorc_core.model.stored.integrity import check_model
from lorc_core.model.stored.locations import ModelLocation
from lorc_core.progress import progress_bar
from lorc_core.ranks.schedule import Schedule
from lorc_core.ranks.schedules import Sensitivity
from lorc_core.ranks.spectra import Probes, RankSchedule


class CalibratedModel:
    """A model with its calibration text, in evaluation mode until the end of the `with` block.

    Args:
        model: A loaded one, whose modules get their own modes back, or where it is.
        calibration: Token ids (sequences, tokens), the path of a text file, or a list of texts.
        max_tokens: Of a text.

    Raises:
        ConfigError: The text is absent or too short, or its tokens are not the model's.
    """

    def __init__(self, model: PreTrainedModel | ModelLocation, calibration: Calibration, max_tokens: int) -> None:
        if isinstance(model, PreTrainedModel):
            self.model = model
        else:
            directory = model.directory(weights=True)
            check_model(directory)
            self.model = AutoModelForCausalLM.from_pretrained(directory)
        self.architecture = architecture_of(self.model.config)
        self.text = calibration_text(calibration, self.model, max_tokens)
        self.sequences = self.text.sequences

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

    @contextmanager
    def progress(self, doing: str, num_batches: int) -> Iterator[None]:
        """Show a bar of the batches that went through the model, of `num_batches` at most."""
        with progress_bar(f"{doing} on {self.text}", num_batches, "batches") as bar:

            def count(*_: object) -> None:
                bar.update()

            counter = self.model.get_decoder().register_forward_hook(count)  # OPT's model calls it past its base model
            try:
                yield
            finally:
                counter.remove()

    def moments(self, method: Method, context_tokens: int | None) -> tuple[LayerMoments, ...]:
        """See `calibrate`; keys after the rotation are averaged over positions where the windows do not span them.

        Args:
            method: What is measured for.
            context_tokens: Positions that will be used. If absent nothing is averaged, since an average over positions
                that are never used costs, and a warning says which are known.

        Raises:
            ConfigError: The model does not read so many tokens, or there are too few for the method.
        """
        longest = self.architecture.max_tokens
        if context_tokens is not None and not 1 <= context_tokens <= longest:
            raise ConfigError(
                f"context_tokens must be in 1..{longest}, the model's longest input, got {context_tokens}"
            )
        method.check_enough_tokens(self.architecture, self.sequences.numel())
        joins = method.joins_rotated_heads
        with self.progress("calibrating", len(self.batches)):
            measured = calibrate(self.model, self.batches, join_rotated_heads=joins)
        measured = self.over_context(measured, method, context_tokens)
        if not method.needs_gradients:
            return measured
        gradients = gradient_moments(self.model, self.counted("backpropagating"), join_rotated_heads=joins)
        return tuple(layer.beside(of_loss) for layer, of_loss in zip(measured, gradients, strict=True))

    def over_context(
        self, measured: tuple[LayerMoments, ...], method: Method, context_tokens: int | None
    ) -> tuple[LayerMoments, ...]:
        """Keys after the rotation averaged over positions, where the windows do not span them; see `moments`."""
        longest, window = self.architecture.max_tokens, self.sequences.shape[1]
        if window >= (context_tokens or longest) or not (method.measures_rotated and self.architecture.rotary):
            return measured
        if context_tokens is None:
            warnings.warn(
                f"method {method.name}: rotated keys are calibrated on windows of {window} tokens and know no later "
                f"position of the model's {longest}; pass context_tokens, those of the longest text, or longer windows",
                stacklevel=4,
            )
            return measured
        return tuple(
            over_positions(layer, self.architecture, idx, context_tokens) for idx, layer in enumerate(measured)
        )

    def counted(self, doing: str) -> Iterator[Int[Tensor, "_ _"]]:
        """The batches, with a bar of those that are done: for what calls the decoder more often than once for each."""
        with progress_bar(f"{doing} on {self.text}", len(self.batches), "batches") as bar:
            for batch in self.batches:
                yield batch
                bar.update()

    def trained(
        self, method: Method, layers: list[LayerDecomposition]
    ) -> tuple[list[LayerDecomposition], AdapterTensors]:
        """The layers after the method's training, if it has any, and its adapters, if it has those."""
        if method.training is None:
            return layers, {}
        trainer = Trainer(self.model, layers, method.training)
        with self.progress("training", trainer.max_passes(len(self.sequences))):
            *_, last = trainer.train(self.sequences)
        return trained_layers(layers, last.bases, method), last.adapters

    def probes(self, schedule: Schedule, layers: Sequence[LayerDecomposition]) -> Probes | None:
        """What the schedule asks for beside spectra."""
        if schedule.probe is None:
            return None
        with self.progress("measuring", max_passes(schedule.probe, len(layers)) * len(self.batches)):
            return probe(schedule.probe, self.model, layers, self.batches)

    def refine(self, schedule: Schedule, ranks: RankSchedule, layers: Sequence[LayerDecomposition]) -> RankSchedule:
        """Exchanges of floats, for the schedule that asks for them."""
        if not isinstance(schedule, Sensitivity):
            return ranks
        with self.progress("exchanging", max_exchange_passes(schedule, len(layers)) * len(self.batches)):
            return exchanged_ranks(self.model, schedule, layers, self.batches, ranks)
