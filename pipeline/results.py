"""The table at the end of a run: every baseline and variant with its score, its memory and what it cost."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.candidates import registration
from pipeline.gates import text_rise
from pipeline.storage.tables import read_rows
from pipeline.zoo_run import ZooRun


@dataclass(frozen=True)
class Result:
    """One line of the table at the end of a run: a model's baseline or one of its variants on one text."""

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
    note: str
    version: str


def results(run: ZooRun) -> list[Result]:
    """All evaluated baselines and variants, in the zoo file's order."""
    found = []
    for model in run.models:
        if not run.store.is_done(model.baseline):
            continue
        baseline = run.store.path(model.baseline)
        found += result_rows(model.model.entry.name, "baseline", baseline, baseline, note="", version="")
        for one in model.variants:
            if run.store.is_done(one.evaluate):
                note = read_rows(run.store.path(one.schedule), "ranks")[0]["note"]
                version = registration(run.store, one.register)["version"] if run.store.is_done(one.register) else ""
                evaluated = run.store.path(one.evaluate)
                found += result_rows(
                    model.model.entry.name, one.label, baseline, evaluated, note=note, version=str(version)
                )
    return found


def result_rows(model: str, label: str, baseline: Path, evaluated: Path, *, note: str, version: str) -> list[Result]:
    before = {row["text"]: row for row in read_rows(baseline, "scores")}
    rows = []
    for row in read_rows(evaluated, "scores"):
        rise = text_rise(baseline, evaluated, row["text"])
        rows.append(
            Result(
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
                note=note,
                version=version,
            )
        )
    return rows
