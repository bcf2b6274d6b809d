"""What the table at the end of a run says: every baseline and variant with its scores, its memory and its verdict."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.candidates import candidates, registration
from pipeline.evaluation.gates import Rise, reasons_to_refuse, text_rise
from pipeline.steps.graph import ModelSteps, VariantSteps
from pipeline.storage.tables import read_rows
from pipeline.zoo_run import ZooRun

Verdict = Literal["", "passed", "failed", "candidate"]
BASELINE = "baseline"


@dataclass(frozen=True)
class Result:
    """A model's baseline or one of its variants on one text.

    Attributes:
        version: In the registry; empty where it is not registered.
        verdict: Of the zoo file's gates over all texts, "candidate" of the one that was chosen; empty of a baseline and
            without gates.
        note: Where the schedule left its source's form, or why the variant was not registered.
    """

    model: str
    variant: str
    text: str
    kept_fraction: float
    loss: float
    loss_rise: float
    loss_rise_standard_error: float
    perplexity: float
    bytes_per_token: float
    factor_bytes: int
    eval_s: float
    version: str = ""
    verdict: Verdict = ""
    note: str = ""

    @property
    def is_baseline(self) -> bool:
        return self.variant == BASELINE


@dataclass(frozen=True)
class Unscored:
    """A variant without scores, or a model where no variant is named, and why."""

    model: str
    variant: str
    reason: str


def results(run: ZooRun) -> list[Result]:
    """All evaluated baselines and variants, in the zoo file's order."""
    return [row for model in run.models if run.store.is_done(model.baseline) for row in model_results(run, model)]


def model_results(run: ZooRun, model: ModelSteps) -> Iterator[Result]:
    baseline = run.store.path(model.baseline)
    yield from scored(model.model.entry.name, BASELINE, baseline, baseline)
    for variant in model.variants:
        if run.store.is_done(variant.evaluate):
            evaluation = run.store.path(variant.evaluate)
            is_registered = run.store.is_done(variant.register)
            version = registration(run.store, variant.register)["version"] if is_registered else ""
            yield from scored(
                model.model.entry.name,
                variant.label,
                baseline,
                evaluation,
                version=version,
                verdict=verdict(run, model.model.entry.name, version, baseline, evaluation),
                note=note(run, variant),
            )


def scored(model: str, label: str, baseline: Path, evaluation: Path, **registered: Any) -> Iterator[Result]:
    """One result for each text; `registered` are its version, verdict and note."""
    before = {row["text"]: row for row in read_rows(baseline, "scores")}
    for row in read_rows(evaluation, "scores"):
        rise = text_rise(baseline, evaluation, row["text"])
        yield Result(
            model=model,
            variant=label,
            text=row["text"],
            kept_fraction=row["bytes_per_token"] / before[row["text"]]["bytes_per_token"],
            loss=row["loss"],
            loss_rise=rise.nats,
            loss_rise_standard_error=rise.standard_error,
            perplexity=row["perplexity"],
            bytes_per_token=row["bytes_per_token"],
            factor_bytes=row["factor_bytes"],
            eval_s=row["eval_s"],
            **registered,
        )


def verdict(run: ZooRun, model: str, version: str, baseline: Path, evaluation: Path) -> Verdict:
    """What the zoo file's gates say of one variant, and whether it was chosen."""
    if run.zoo.gates is None:
        return ""
    if version and version == candidates(run.zoo, run.store).get(model):
        return "candidate"
    texts = [text.name for text in run.zoo.evaluation.texts]
    rises = {text: text_rise(baseline, evaluation, text) for text in texts}
    return "failed" if reasons_to_refuse(run.zoo.gates, gate_metrics(rises), texts) else "passed"


def gate_metrics(rises: dict[str, Rise]) -> dict[str, float]:
    """What gates look at, by the names that it has in the registry."""
    metrics = {f"perplexity_rise.{text}": rise.perplexity_rise for text, rise in rises.items()}
    return metrics | {f"recovery.{text}": rise.recovery for text, rise in rises.items()}


def note(run: ZooRun, variant: VariantSteps) -> str:
    notes = [read_rows(run.store.path(variant.schedule), "ranks")[0]["note"]]
    notes += [outcome.error or "" for outcome in run.failures if outcome.key == variant.register.key]
    return "; ".join(part for part in notes if part)


def unscored(run: ZooRun) -> list[Unscored]:
    """Variants that were refused or came to grief on the way, and models that could not be read."""
    errors = {outcome.key: outcome.error for outcome in run.outcomes if outcome.error is not None}
    readable = {model.model.entry.name for model in run.models}
    missing = [
        Unscored(outcome.model, "", outcome.error or "") for outcome in run.failures if outcome.model not in readable
    ]
    for model in run.models:
        name = model.model.entry.name
        missing += [Unscored(name, label, reason) for label, reason in model.refused]
        for variant in model.variants:
            steps = (variant.evaluate, variant.variant, variant.schedule)
            reasons = [errors[step.key] for step in steps if step.key in errors]
            if reasons and not run.store.is_done(variant.evaluate):
                missing.append(Unscored(name, variant.label, reasons[0] or ""))
        if model.baseline.key in errors and not run.store.is_done(model.baseline):
            missing.append(Unscored(name, BASELINE, errors[model.baseline.key] or ""))
    return missing
