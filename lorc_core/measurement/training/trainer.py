"""Trained projections: rotate a variant's latent space by distillation from the untouched model, nothing else.

A full-rank decomposition of any method is the start. Each layer's latents get an orthogonal basis, the identity at
first; ranks are drawn at random at every step, so that the factors stay nested and serve every budget.

Shapes: B sequences of a batch, T tokens, S sequences of the text, H held-out ones.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorc_core.attention.adapters import AdapterTensors
from lorc_core.attention.attach import Attachment
from lorc_core.decomposition.factors import UNTOUCHED, Decomposition, Factors, LayerDecomposition, layer_spectrum
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.measurement.losses import only_gradients_of
from lorc_core.measurement.training.checkpoint import Stateful, Trained, TrainingCheckpoint, TrainingProgress
from lorc_core.measurement.training.latent_bases import Bases, LatentBasis, in_basis
from lorc_core.measurement.training.lora import LoraLayers, injected_lora
from lorc_core.measurement.training.rank_draws import RankDraws
from lorc_core.methods import Training
from lorc_core.model.architecture import architecture_of
from lorc_core.model.kinds import KeysValues, by_layer, layer_kinds
from lorc_core.ranks.spectra import RankSchedule

HELDOUT_SHARE = 8  # one in so many sequences is held out
NUM_LOOK_FRACTIONS = 3  # kept fractions of a look: the least, middle and largest that training draws


@dataclass(frozen=True)
class TrainingState:
    """Where training is: what was done, of how much, and the divergence on held-out text, best and last."""

    step: int
    num_steps: int
    best: float
    last: float
    bases: Bases
    adapters: AdapterTensors


class Trainer:
    """Bases of every layer's keys and values, and the model that they are trained in.

    Args:
        model: Without a variant attached; not changed.
        layers: Decomposed by one method, of real blocks.
        settings: See `Training`.

    Source: MatryoshkaKV, arXiv 2410.14731, from any decomposition instead of PCA.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[LayerDecomposition], settings: Training) -> None:
        self.model, self.settings = model, settings
        self.architecture = architecture_of(model.config)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.draws = RankDraws([layer_spectrum(layer) for layer in layers], self.generator)
        self.layers = [layer.map(self._on_device) for layer in layers]
        self.bases = [layer.map(LatentBasis) for layer in self.layers]
        self.lora = LoraLayers({})

    def train(self, text: Int[Tensor, "s t"], checkpoint: Path | None = None) -> Iterator[TrainingState]:
        """Train, yielding where it is after every look at the held-out text; the last state has the best bases.

        Args:
            text: Token ids; one sequence in eight is held out.
            checkpoint: Directory in which training is kept after every look, and from which it goes on.

        Raises:
            ConfigError: There are fewer than two sequences.
            NumericsError: The divergence is NaN or infinite.
        """
        if len(text) < 2:
            raise ConfigError(f"training needs two sequences of calibration text at least, got {len(text)}")
        settings = self.settings
        sequences = text[[idx for idx in range(len(text)) if idx % HELDOUT_SHARE]]
        heldout = text[::HELDOUT_SHARE]
        with (
            only_gradients_of(self.model, []),
            injected_lora(self.model, self.architecture, settings.lora_rank, settings.seed) as self.lora,
            self.attached() as attachment,
        ):
            trained = nn.ModuleList([*(basis for layer in self.bases for basis in layer), *self.lora.modules()])
            optimizer = torch.optim.Adam(trained.parameters(), lr=settings.learning_rate)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.num_steps)
            parts: dict[str, Stateful] = {"trained": trained, "optimizer": optimizer, "scale": cosine}
            kept = None if checkpoint is None else TrainingCheckpoint(checkpoint, parts, self.generator)
            progress = kept.load() if kept else None
            if progress is None:
                progress = TrainingProgress(0, 0, self.divergence(attachment, heldout), self._trained())
            step = progress.step
            while step < settings.num_steps and progress.stale_looks < settings.patience:
                self._take_step(attachment, sequences, optimizer)
                cosine.step()
                step += 1
                if step % settings.eval_every and step != settings.num_steps:
                    continue
                divergence = self.divergence(attachment, heldout)
                if not math.isfinite(divergence):
                    raise NumericsError(f"training step {step}: the divergence on held-out text is {divergence}")
                progress = progress.after_look(step, divergence, self._trained())
                if kept:
                    kept.save(progress)
                yield self._state(progress, settings.num_steps, divergence)
            yield self._state(progress, step, progress.least)

    def max_passes(self, num_sequences: int) -> int:
        """Batches that `train` runs through the model, at most; each once untouched and once compressed."""
        settings = self.settings
        num_heldout = math.ceil(num_sequences / HELDOUT_SHARE)
        looks = 1 + math.ceil(settings.num_steps / settings.eval_every)
        batches_of_look = NUM_LOOK_FRACTIONS * math.ceil(num_heldout / settings.batch_size)
        return 2 * (settings.num_steps + looks * batches_of_look)

    def attached(self) -> Attachment:
        """The model with hooks on every layer; each step brings its own factors."""
        return Attachment(self.model, self.architecture, self._factors(self.draws.at(1.0)))

    @torch.no_grad()
    def divergence(self, attachment: Attachment, heldout: Int[Tensor, "h t"]) -> float:
        """Mean divergence in nats per token, over held-out text and three of the kept fractions that training draws.

        Args:
            attachment: See `attached`.
            heldout: Token ids.
        """
        least, most = self.settings.min_kept_fraction, self.settings.max_kept_fraction
        total = 0.0
        for kept_fraction in (least, (least + most) / 2, most):
            factors = self._factors(self.draws.at(kept_fraction))
            for batch in heldout.split(self.settings.batch_size):
                total += self._batch_divergence(attachment, batch, factors).item() * len(batch)
        return total / (NUM_LOOK_FRACTIONS * len(heldout))

    def _take_step(
        self, attachment: Attachment, sequences: Int[Tensor, "s t"], optimizer: torch.optim.Optimizer
    ) -> None:
        """One step down the divergence of a batch at ranks of its own, both drawn."""
        settings = self.settings
        rows = torch.randint(len(sequences), (settings.batch_size,), generator=self.generator)
        factors = self._factors(self.draws.draw(settings.min_kept_fraction, settings.max_kept_fraction))
        loss = self._batch_divergence(attachment, sequences[rows], factors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _batch_divergence(
        self, attachment: Attachment, batch: Int[Tensor, "b t"], factors: Sequence[KeysValues[Factors]]
    ) -> Float[Tensor, ""]:
        """KL divergence of the compressed model's next-token distribution from the untouched one's, in nats."""
        ids = batch.to(self.model.device)
        attachment.use([UNTOUCHED for _ in factors])
        self.lora.enable(False)
        with torch.no_grad():
            target = self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        attachment.use(factors)
        self.lora.enable(True)
        compressed = self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        return nn.functional.kl_div(compressed, target, log_target=True, reduction="sum") / ids.numel()

    def _factors(self, ranks: RankSchedule) -> Sequence[KeysValues[Factors]]:
        """Truncated rotated factors, through which gradients flow to the bases."""
        return by_layer(
            [
                in_basis(self.layers[idx][kind], self.bases[idx][kind].weight).factors(ranks.layers[idx][kind])
                for idx, kind in layer_kinds(len(self.bases))
            ]
        )

    def _trained(self) -> Trained:
        """What is trained, as it is now."""
        bases = [layer.map(lambda basis: basis.weight.detach().clone().cpu()) for layer in self.bases]
        return Trained(bases, self.lora.tensors())

    def _state(self, progress: TrainingProgress, num_steps: int, divergence: float) -> TrainingState:
        best = progress.best
        return TrainingState(progress.step, num_steps, progress.least, divergence, best.bases, best.adapters)

    def _on_device(self, decomposition: Decomposition) -> Decomposition:
        """Factors in float32 on the device that trains."""
        where = self.model.device, torch.float32
        own_down = None if decomposition.own_down is None else decomposition.own_down.to(*where)
        mean = None if decomposition.mean is None else decomposition.mean.to(*where)
        return replace(decomposition, up=decomposition.up.to(*where), own_down=own_down, mean=mean)
