"""Comparisons of scores, and the gates that accept or refuse a variant."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lorc_core.errors import ArtifactError
from pipeline.storage.tables import read_rows
from pipeline.zoo.sections import Gates

STANDARD_ERRORS = 2  # a rise within this many standard errors of zero is no fall


@dataclass(frozen=True)
class Rise:
    """Mean loss of one text against a reference on the same windows, in nats per token.

    `standard_error` is that of the paired difference, far smaller than those of the two losses.
    """

    reference_loss: float
    loss: float
    standard_error: float

    @property
    def nats(self) -> float:
        return self.loss - self.reference_loss

    @property
    def recovery(self) -> float:
        """Reference over own perplexity: 1 is no loss of accuracy."""
        return math.exp(-self.nats)

    @property
    def perplexity_rise(self) -> float:
        """Relative: 0.05 is five percent."""
        return math.expm1(self.nats)


def paired_rise(reference: Float[np.ndarray, " n"], losses: Float[np.ndarray, " n"]) -> Rise:
    """Compare per-window losses on the same windows.

    Raises:
        ArtifactError: The numbers of windows differ.
    """
    if reference.shape != losses.shape:
        raise ArtifactError(f"{len(reference)} reference windows against {len(losses)}: not the same pinned tokens")
    return Rise(float(reference.mean()), float(losses.mean()), standard_error(losses - reference))


def text_rise(reference: Path, evaluation: Path, text: str) -> Rise:
    """Paired comparison of two evaluations on one text."""
    return paired_rise(losses_of(reference, text), losses_of(evaluation, text))


def losses_of(directory: Path, text: str) -> np.ndarray:
    return np.array([row["loss"] for row in read_rows(directory, "window_losses") if row["text"] == text])


def reasons_to_refuse(gates: Gates, metrics: Mapping[str, float], texts: Sequence[str]) -> list[str]:
    """Why a variant must not be promoted; empty if it may.

    Args:
        gates: Limits relative to the baseline of the same run.
        metrics: `perplexity_rise.<text>` and `recovery.<text>` for every text.
        texts: Names of the evaluated texts.

    Raises:
        ArtifactError: A metric is missing; a missing metric is not a perfect one.
    """
    reasons = []
    for text in texts:
        rise, recovery = (require(metrics, f"{name}.{text}") for name in ("perplexity_rise", "recovery"))
        if gates.max_perplexity_rise is not None and not rise <= gates.max_perplexity_rise:
            reasons.append(f"{text}: perplexity rose by {rise:.2%}, allowed is {gates.max_perplexity_rise:.2%}")
        if gates.min_recovery is not None and not recovery >= gates.min_recovery:
            reasons.append(f"{text}: recovery is {recovery:.4f}, required is {gates.min_recovery:.4f}")
    return reasons


def require(metrics: Mapping[str, float], name: str) -> float:
    if name not in metrics:
        raise ArtifactError(f"metric {name} is missing; recorded are {', '.join(sorted(metrics)) or 'none'}")
    return metrics[name]


def fell(rise: Rise, tolerance: float) -> bool:
    """Whether a re-evaluation is worse than its reference by more than the tolerance and the noise.

    Args:
        rise: Of the new losses over the registered ones.
        tolerance: Nats per token forgiven for other hardware and library versions.
    """
    return rise.nats > tolerance and rise.nats > STANDARD_ERRORS * rise.standard_error


def standard_error(values: Float[np.ndarray, " n"]) -> float:
    """Of the mean of independent values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
