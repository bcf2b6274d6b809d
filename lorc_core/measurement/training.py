"""Trained projections: rotate a variant's latent space by distillation from the untouched model, nothing else.

A full-rank decomposition of any method is the start. Each layer's latents get an orthogonal basis, the identity at
first; ranks are drawn at random at every step, so that the factors stay nested and serve every budget.

Shapes: B blocks, W channels of a block.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from transformers import PreTrainedModel

from lorc_core.attention.adapters import AdapterTensors
from lorc_core.attention.attach import Attachment
from lorc_core.decomposition.factors import UNTOUCHED, Decomposition, Factors, LayerDecomposition, layer_spectrum
from lorc_core.errors import ConfigError, NumericsError
from lorc_core.measurement.lora import Adapters, injected_adapters
from lorc_core.measurement.losses import only_gradients_of
from lorc_core.methods import Method, Reader, Training
from lorc_core.model.architecture import Architecture, architecture_of
from lorc_core.model.kinds import KeysValues, by_layer, layer_kinds
from lorc_core.ranks.budgets import fit
from lorc_core.ranks.schedules import Energy
from lorc_core.ranks.spectra import Probes, RankSchedule
from lorc_core.ranks.staircase import climbed_ranks

CHECKPOINT_FILE = "training.pt"
DRAWS = Energy(spectrum="weights")  # around whose ranks those of a step are drawn
HELDOUT_SHARE = 8  # one in so many sequences is held out
JITTER = 1.25  # a layer's floats are drawn between the schedule's over this and times this


Bases = list[KeysValues[Float[Tensor, "b w w"]]]  # of the latents of each layer: one orthogonal matrix per block


@dataclass(frozen=True)
class TrainingState:
    """Where training is: what was done, of how much, and the divergence on held-out text, best and last."""

    step: int
    num_steps: int
    best: float
    last: float
    bases: Bases
    adapters: AdapterTensors


class LatentBasis(nn.Module):
    """One orthogonal matrix per block, the identity at the start."""

    def __init__(self, num_blocks: int, width: int, device: torch.device) -> None:
        super().__init__()
        identity = torch.eye(width, device=device).repeat(num_blocks, 1, 1)
        self.weight = nn.Parameter(identity)
        orthogonal(self, "weight", orthogonal_map="matrix_exp", use_trivialization=True)


class Trainer:
    """Bases of every layer's keys and values, and the model that they are trained in.

    Args:
        model: Without a variant attached; not changed.
        layers: Decomposed by one method, of real blocks.
        settings: See `Training`.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[LayerDecomposition], settings: Training) -> None:
        self.model, self.settings = model, settings
        self.architecture: Architecture = architecture_of(model.config)
        spectra = [layer_spectrum(layer) for layer in layers]
        self.stairs = DRAWS.stairs(spectra, Probes())
        self.climb = DRAWS.climb(spectra, self.stairs, Probes())
        self.layers = [layer.map(lambda one: on_device(one, model.device)) for layer in layers]
        self.bases = [
            layer.map(lambda one: LatentBasis(len(one.up), one.up.shape[1], model.device)) for layer in layers
        ]
        self.adapters = Adapters({})
        self.generator = torch.Generator().manual_seed(settings.seed)

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
            injected_adapters(self.model, self.architecture, settings.lora_rank, settings.seed) as self.adapters,
            self.attached() as attachment,
        ):
            self.trained = nn.ModuleList([*self.basis_modules(), *self.adapters.modules()])
            optimizer = torch.optim.Adam(self.trained.parameters(), lr=settings.learning_rate)
            scale = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.num_steps)
            step, stale = 0, 0
            best, kept = self.divergence(attachment, heldout), self.matrices()
            if checkpoint is not None and (checkpoint / CHECKPOINT_FILE).is_file():
                step, stale, best, kept = self.resume(checkpoint, optimizer, scale)
            while step < settings.num_steps and stale < settings.patience:
                self.step(attachment, sequences, optimizer)
                scale.step()
                step += 1
                if step % settings.eval_every and step != settings.num_steps:
                    continue
                found = self.divergence(attachment, heldout)
                if not math.isfinite(found):
                    raise NumericsError(f"training step {step}: the divergence on held-out text is {found}")
                stale = 0 if found < best else stale + 1
                if found < best:
                    best, kept = found, self.matrices()
                if checkpoint is not None:
                    self.keep(checkpoint, optimizer, scale, (step, stale, best, kept))
                yield TrainingState(step, settings.num_steps, best, found, *kept)
            yield TrainingState(step, step, best, best, *kept)

    def max_passes(self, num_sequences: int) -> int:
        """Batches that `train` runs through the model, at most; each once untouched and once compressed."""
        settings = self.settings
        num_heldout = math.ceil(num_sequences / HELDOUT_SHARE)
        looks = 1 + math.ceil(settings.num_steps / settings.eval_every)
        return 2 * (settings.num_steps + 3 * looks * math.ceil(num_heldout / settings.batch_size))

    def attached(self) -> Attachment:
        """The model with hooks on every layer; each step brings its own factors."""
        full = self.factors(self.drawn_ranks(1.0, jitter=False))
        return Attachment(self.model, self.architecture, full)

    def basis_modules(self) -> Iterator[LatentBasis]:
        for layer in self.bases:
            yield from layer

    def matrices(self) -> tuple[Bases, AdapterTensors]:
        """What is trained, as it is now."""
        bases = [layer.map(lambda one: one.weight.detach().clone().cpu()) for layer in self.bases]
        return bases, self.adapters.tensors()

    def drawn_ranks(self, kept_fraction: float, *, jitter: bool) -> RankSchedule:
        """Ranks at a share, each layer's and kind's floats drawn around them."""
        steps = self.climb(fit(self.climb, self.stairs, kept_fraction, DRAWS.name))
        for idx, stair in enumerate(self.stairs if jitter else ()):
            factor = JITTER ** (2 * torch.rand((), generator=self.generator).item() - 1)
            steps[idx] = stair.nearest(stair.totals[steps[idx] - 1] * factor)
        return climbed_ranks(self.stairs, steps, self.architecture.kv_width)

    def factors(self, ranks: RankSchedule) -> Sequence[KeysValues[Factors]]:
        """Truncated rotated factors, through which gradients flow to the bases."""
        return by_layer(
            [
                in_basis(self.layers[idx][kind], self.bases[idx][kind].weight).factors(ranks.layers[idx][kind])
                for idx, kind in layer_kinds(len(self.bases))
            ]
        )

    def step(self, attachment: Attachment, sequences: Int[Tensor, "s t"], optimizer: torch.optim.Optimizer) -> None:
        settings = self.settings
        rows = torch.randint(len(sequences), (settings.batch_size,), generator=self.generator)
        share = torch.rand((), generator=self.generator).item()
        kept = settings.min_kept_fraction + share * (settings.max_kept_fraction - settings.min_kept_fraction)
        ranks = self.drawn_ranks(kept, jitter=True)
        loss = self.batch_divergence(attachment, sequences[rows], self.factors(ranks))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def batch_divergence(
        self, attachment: Attachment, batch: Int[Tensor, "b t"], factors: Sequence[KeysValues[Factors]]
    ) -> Float[Tensor, ""]:
        """KL divergence of the compressed model's next-token distribution from the untouched one's, in nats."""
        ids = batch.to(self.model.device)
        attachment.use([UNTOUCHED for _ in factors])
        self.adapters.enable(False)
        with torch.no_grad():
            target = self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        attachment.use(factors)
        self.adapters.enable(True)
        found = self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        return nn.functional.kl_div(found, target, log_target=True, reduction="sum") / ids.numel()

    @torch.no_grad()
    def divergence(self, attachment: Attachment, heldout: Int[Tensor, "h t"]) -> float:
        """Mean over held-out text and the least, middle and largest share that training draws."""
        settings = self.settings
        shares = (settings.min_kept_fraction, settings.max_kept_fraction)
        total = 0.0
        for kept in (shares[0], sum(shares) / 2, shares[1]):
            factors = self.factors(self.drawn_ranks(kept, jitter=False))
            for batch in heldout.split(settings.batch_size):
                total += self.batch_divergence(attachment, batch, factors).item() * len(batch)
        return total / (3 * len(heldout))

    def keep(
        self,
        directory: Path,
        optimizer: torch.optim.Optimizer,
        scale: torch.optim.lr_scheduler.LRScheduler,
        progress: tuple[int, int, float, tuple[Bases, AdapterTensors]],
    ) -> None:
        """Everything that training goes on from, as plain tensors and numbers."""
        step, stale, best, (bases, adapters) = progress
        directory.mkdir(parents=True, exist_ok=True)
        state = {
            "trained": self.trained.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scale": scale.state_dict(),
            "generator": self.generator.get_state(),
            "progress": (step, stale, best, [dict(layer.items()) for layer in bases], adapters),
        }
        torch.save(state, directory / f"{CHECKPOINT_FILE}.partial")
        (directory / f"{CHECKPOINT_FILE}.partial").rename(directory / CHECKPOINT_FILE)

    def resume(
        self, directory: Path, optimizer: torch.optim.Optimizer, scale: torch.optim.lr_scheduler.LRScheduler
    ) -> tuple[int, int, float, tuple[Bases, AdapterTensors]]:
        state = torch.load(directory / CHECKPOINT_FILE, weights_only=True, map_location=self.model.device)
        self.trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        scale.load_state_dict(state["scale"])
        self.generator.set_state(state["generator"].cpu())
        step, stale, best, bases, adapters = state["progress"]
        return step, stale, best, ([KeysValues(**layer) for layer in bases], adapters)


def on_device(found: Decomposition, device: torch.device) -> Decomposition:
    """Factors in float32 on the device that trains."""
    own_down = None if found.own_down is None else found.own_down.to(device, torch.float32)
    mean = None if found.mean is None else found.mean.to(device, torch.float32)
    return replace(found, up=found.up.to(device, torch.float32), own_down=own_down, mean=mean)


def in_basis(found: Decomposition, basis: Float[Tensor, "b w w"]) -> Decomposition:
    """The same projections at full rank, along other directions: up Q, Q^T down."""
    own_down = None if found.own_down is None else basis.mT @ found.own_down
    return replace(found, up=found.up @ basis, own_down=own_down)


def trained_layers(layers: Sequence[LayerDecomposition], bases: Bases, method: Method) -> list[LayerDecomposition]:
    """The start's decompositions, rotated."""
    return list(
        by_layer(
            [
                change_basis(layers[idx][kind], bases[idx][kind], method.axes(idx, kind).reader)
                for idx, kind in layer_kinds(len(layers))
            ]
        )
    )


def change_basis(found: Decomposition, basis: Float[Tensor, "b w w"], reader: Reader) -> Decomposition:
    """`in_basis`, with what each new direction saves of the error that the start's method minimises.

    Of the interaction form, with G = Q^T S Q, the error at rank K is the sum of G_ij^2 over i, j > K; of the others the
    sum of (Q^T E Q)_ii over i > K.
    """
    basis = basis.to(found.up.device)
    exact = basis.double()
    energies = found.read_energies.double()
    if reader == "interaction":
        squares = (exact.mT * energies.sqrt()[:, None, :] @ exact).square()
        corner = squares.flip(-1, -2).cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1).flip(-1)
        saved = corner - torch.cat([corner[:, 1:], corner.new_zeros(len(corner), 1)], dim=1)
    else:
        saved = (exact.mT * energies[:, None, :] @ exact).diagonal(dim1=-2, dim2=-1)
    return replace(in_basis(found, basis.to(found.up.dtype)), read_energies=saved.clamp(min=0))
