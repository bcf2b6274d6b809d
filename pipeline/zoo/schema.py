"""The zoo file: which models, compressed how, evaluated on what, accepted by which gates.

Validated here once and trusted everywhere else; `file` reads one.
"""

from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.zoo.consistency import Parts, contradictions
from pipeline.zoo.sections import Calibration, Cluster, Evaluation, Gates, ModelEntry, Name, Registry, Serving, Strict
from pipeline.zoo.variants import VariantEntry

# What a zoo file compresses by where it names no method: the best of docs/quality.md.
DEFAULT_METHOD, DEFAULT_CALIBRATED_METHOD = "lorc_q", "kq_joint"


class Zoo(Strict):
    """A whole zoo file.

    Without `gates`, variants are registered but none becomes a candidate.
    """

    name: Name
    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)]
    variants: Annotated[tuple[VariantEntry, ...], Field(min_length=1)]
    calibration: Calibration | None = None
    evaluation: Evaluation
    gates: Gates | None = None
    registry: Registry = Registry()
    cluster: Cluster = Cluster()
    serving: Serving = Serving()

    @model_validator(mode="before")
    @classmethod
    def choose_methods(cls, content: Any) -> Any:
        return with_methods(content)

    @model_validator(mode="after")
    def is_consistent(self) -> "Zoo":
        if problems := contradictions(self.parts):
            raise ValueError("\n".join(problems))
        return self

    @property
    def parts(self) -> Parts:
        """Those that must fit each other."""
        return Parts(self.models, self.variants, self.calibration, self.evaluation, self.calibration is not None)


def with_methods(content: Any) -> Any:
    """What a zoo file says, each variant without a method given the best one that there is data for."""
    if not isinstance(content, dict) or not isinstance(content.get("variants"), list):
        return content
    method = DEFAULT_CALIBRATED_METHOD if content.get("calibration") else DEFAULT_METHOD
    entries = [{"method": method} | entry if isinstance(entry, dict) else entry for entry in content["variants"]]
    return content | {"variants": entries}
