"""What must fit between the sections of a zoo file, and what its author should know."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lorc_core.methods import Method
from pipeline.zoo.sections import Calibration, Evaluation, ModelEntry
from pipeline.zoo.variants import VariantEntry, variant_label


@dataclass(frozen=True)
class Parts:
    """What could be read of a zoo file: all of it or, where fields are wrong, the rest.

    Attributes:
        has_calibration: Whether it is written, right or wrong.
    """

    models: Sequence[ModelEntry]
    variants: Sequence[VariantEntry]
    calibration: Calibration | None
    evaluation: Evaluation | None
    has_calibration: bool


def contradictions(parts: Parts) -> list[str]:
    """Every way in which the sections do not fit each other, a line for each."""
    return [*missing_calibration(parts), *calibration_that_is_evaluated(parts), *names_used_twice(parts)]


def missing_calibration(parts: Parts) -> Iterator[str]:
    needing = [entry for entry in parts.variants if entry.needs_calibration and not parts.has_calibration]
    for what in dict.fromkeys(
        entry.method.name if entry.method.needs_calibration else f"schedule {entry.schedule.name}" for entry in needing
    ):
        yield f"variants: {what} measures on text, but there is no calibration"


def calibration_that_is_evaluated(parts: Parts) -> Iterator[str]:
    for text in parts.calibration.texts if parts.calibration else ():
        for other in parts.evaluation.texts if parts.evaluation else ():
            same = (text.source, text.config, text.split) == (other.source, other.config, other.split)
            if same and max(text.part[0], other.part[0]) < min(text.part[1], other.part[1]):
                yield f"calibration.texts: {text.name} is also evaluated, as {other.name}; give each its part"


def names_used_twice(parts: Parts) -> Iterator[str]:
    for field, names in (
        ("models", [model.name for model in parts.models]),
        ("evaluation.texts", [text.name for text in parts.evaluation.texts] if parts.evaluation else []),
        ("calibration.texts", [text.name for text in parts.calibration.texts] if parts.calibration else []),
    ):
        for name in repeated(names):
            yield f"{field}: the name {name!r} is used twice"
    methods: dict[str, Method] = {}
    others = [
        entry.method.name
        for entry in parts.variants
        if methods.setdefault(entry.method.name, entry.method) != entry.method
    ]
    for name in dict.fromkeys(others):
        yield f"variants: two methods are called {name!r}"
    for label in repeated([variant_label(entry, budget) for entry in parts.variants for budget in entry.budgets]):
        yield f"variants: two are called {label}; give one of them a name"


def repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def cautions(parts: Parts) -> list[str]:
    """What a zoo file may do but its author should know."""
    calibration, evaluation = parts.calibration, parts.evaluation
    if calibration is None or evaluation is None or calibration.window_tokens >= evaluation.window_tokens:
        return []
    rotated = [
        entry.method.name
        for entry in parts.variants
        for method in (entry.method, *entry.method.layers.values())
        if method.keys.measures_rotated
    ]
    if not rotated:
        return []
    names = ", ".join(dict.fromkeys(rotated))
    caution = (
        f"{names}: rotated keys are calibrated on positions below {calibration.window_tokens} and averaged over the "
        f"{evaluation.window_tokens} that are evaluated, as if no text depended on its position; let "
        "calibration.window_tokens span the positions that will be used"
    )
    return [caution]
