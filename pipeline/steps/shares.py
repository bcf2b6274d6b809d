"""Steps that share an evaluation: each replica of the model scores a part of the windows, and the parts are joined.

The joined artifact is that of the evaluation itself, bit for bit but for the time it took, however many shared it.
"""

import functools
import json
import operator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorc_core.manifest import checked_file
from pipeline.steps.scores import EvaluateStep, TextLosses, write_scores
from pipeline.steps.step import FileStep, Input, Need, Place, Recipe, Step
from pipeline.storage.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARE_FILE = "share.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateShareStep(EvaluateStep):
    """Score some batches of every text."""

    name = "evaluate_share"
    revision = 1

    share: Recipe[int]
    num_shares: Recipe[int]
    whole: Place[EvaluateStep]

    @property
    def group(self) -> str:
        """A replica is loaded once for its share of all variants."""
        return f"{self.whole.group} share {self.share} of {self.num_shares}"

    @property
    def log_key(self) -> str:
        return self.whole.key

    def run(self, output: Path, store: Store, model: "PreTrainedModel") -> None:
        texts = [asdict(text) for text in self.scored(store, model, self.share, self.num_shares)]
        # Python writes the shortest number that is read back as the same bits.
        (output / SHARE_FILE).write_text(json.dumps([text | {"losses": text["losses"].tolist()} for text in texts]))


@dataclass(frozen=True, kw_only=True)
class JoinSharesStep(FileStep):
    """Write the artifact of an evaluation from its shares. Runs in the driver: it reads some numbers."""

    name = "join_shares"
    revision = 1

    need: Need | None = None
    whole: Place[EvaluateStep]
    shares: Input[tuple[EvaluateShareStep, ...]]

    @property
    def key(self) -> str:
        return self.whole.key

    @property
    def parts(self) -> tuple[Step, ...]:
        return self.shares

    def run(self, output: Path, store: Store) -> None:
        shares = [read_share(path) for path in store.paths(self.shares)]
        write_scores(output, [functools.reduce(operator.add, parts) for parts in zip(*shares, strict=True)])


def read_share(directory: Path) -> list[TextLosses]:
    texts: list[dict[str, Any]] = json.loads(checked_file(directory / SHARE_FILE).read_text())
    return [TextLosses(**text | {"losses": np.array(text["losses"])}) for text in texts]


def shared(step: EvaluateStep, num_shares: int) -> tuple[EvaluateShareStep, ...]:
    """The shares of an evaluation.

    Args:
        step: The whole evaluation.
        num_shares: At most as many as it has batches.
    """
    same = {spec.name: getattr(step, spec.name) for spec in fields(step)}
    return tuple(
        EvaluateShareStep(**same, share=share, num_shares=num_shares, whole=step) for share in range(num_shares)
    )


def joining(step: EvaluateStep, shares: tuple[EvaluateShareStep, ...]) -> JoinSharesStep:
    """What makes the shares of an evaluation one."""
    return JoinSharesStep(model=step.model, label=step.label, whole=step, shares=shares)
