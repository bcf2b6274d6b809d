"""Run a zoo: resolve its models, run their steps, choose candidates, join the tables."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from lorc_core.manifest import DamagedArtifactError
from pipeline.candidates import choose_candidates
from pipeline.registry.tracking import default_tracking_uri
from pipeline.steps.failures import model_failure
from pipeline.steps.graph import ModelSteps, model_steps
from pipeline.steps.outcome import Milestone, Outcome, cached_outcomes
from pipeline.steps.step import Step, distinct
from pipeline.storage.lease import held_store
from pipeline.storage.store import Store
from pipeline.storage.tables import TableName, collect, replace_table, rows_table
from pipeline.zoo.models import resolve
from pipeline.zoo.schema import Zoo

Until = Literal["compress", "evaluate", "register"]
Part = tuple[dict[str, str], Step]  # of a table: the labels of its rows, and the step that writes them


@dataclass(frozen=True)
class ZooRun:
    """What a run did, and what its store now holds."""

    zoo: Zoo
    store: Store
    models: tuple[ModelSteps, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]


def plan_steps(
    zoo: Zoo, store: Store, on_phase: Callable[[str], None] = lambda phase: None
) -> tuple[list[ModelSteps], list[Outcome]]:
    """Every model's steps; a model that cannot be read is an outcome with its error."""
    tracking_uri = default_tracking_uri(zoo, store.root)
    planned, failed = [], []
    for entry in zoo.models:
        on_phase(f"reading {entry.name}")
        try:
            model = model_steps(zoo, resolve(entry, store), tracking_uri)
        except Exception as error:  # noqa: BLE001  one model must not cost the others their night
            failed.append(model_failure("resolve", entry.name, error, store))
            continue
        planned.append(model)
        for label, reason in model.refused:
            failed.append(Outcome(f"variant-{entry.name}-{label}", "variant", entry.name, label, "failed", reason))
    return planned, failed


def wanted_steps(models: Sequence[ModelSteps], until: Until) -> list[Step]:
    """The last steps asked for, model after model; what they need follows from their inputs."""
    variants = [variant for model in models for variant in model.variants]
    if until == "compress":
        return [step for variant in variants for step in (variant.variant, variant.projection_errors)]
    if until == "evaluate":
        steps: list[Step] = []
        for model in models:
            steps.append(model.baseline)
            steps += [step for variant in model.variants for step in (variant.projection_errors, variant.evaluate)]
        return steps
    return [step for variant in variants for step in (variant.projection_errors, variant.register)]


def run_zoo(
    zoo: Zoo,
    workdir: Path,
    *,
    until: Until = "register",
    on_plan: Callable[[Sequence[Step]], None] = lambda steps: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    on_progress: Callable[[Milestone], None] = lambda milestone: None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> ZooRun:
    """Do everything a zoo file asks for that is not done yet.

    Args:
        zoo: A checked zoo file.
        workdir: Holds the store, the tables and, unless there is a server, MLflow's files.
        until: The last kind of step to run.
        on_plan: Called once with all steps, done or not, before any runs.
        on_outcome: Called for every outcome as it comes.
        on_progress: Called whenever a long step tells how far it has come.
        on_phase: Called before what takes a while and is no step, "starting Ray" say; it lasts until the next call of
            any of these.

    Raises:
        ConfigError: The work directory is not writable, or another run is using it.
    """
    with held_store(workdir) as store:
        models, failed = plan_steps(zoo, store, on_phase)
        for outcome in failed:
            on_outcome(outcome)
        while True:
            try:
                wanted = wanted_steps(models, until)
                outcomes = run_wanted(zoo, store, wanted, on_plan, on_outcome, on_progress, on_phase)
                run = ZooRun(zoo, store, tuple(models), (*failed, *outcomes))
                return finished(run, until, on_outcome, on_phase)
            except DamagedArtifactError as damage:
                if damage.directory.parent != store.steps:
                    raise
                put_aside(store, damage.directory.name, on_phase)


def finished(
    run: ZooRun, until: Until, on_outcome: Callable[[Outcome], None], on_phase: Callable[[str], None]
) -> ZooRun:
    """Choose candidates, if all was registered, and write the tables.

    Raises:
        DamagedArtifactError: What a step left is not what its manifest says.
    """
    if until == "register":
        failed = choose_candidates(run.zoo, run.store, run.models, on_phase)
        for outcome in failed:
            on_outcome(outcome)
        run = replace(run, outcomes=(*run.outcomes, *failed))
    on_phase("writing the tables")
    write_tables(run)
    return run


def put_aside(store: Store, key: str, on_phase: Callable[[str], None]) -> None:
    """Make room for an artifact that must be made again, and say so."""
    on_phase(f"{key} was damaged; it is now {store.put_aside(key)} and is made again")


def run_wanted(
    zoo: Zoo,
    store: Store,
    wanted: Sequence[Step],
    on_plan: Callable[[Sequence[Step]], None],
    on_outcome: Callable[[Outcome], None],
    on_progress: Callable[[Milestone], None],
    on_phase: Callable[[str], None] = lambda phase: None,
) -> list[Outcome]:
    """Run steps, and all they need, that are not done yet; returns the outcomes of all.

    A step that finds an input damaged is run again once that was made anew.
    """
    steps = distinct(wanted)
    on_plan(steps)
    told: set[str] = set()

    def tell(outcome: Outcome) -> None:
        if outcome.damaged is None and outcome.key not in told:  # each step has one outcome, its last
            told.add(outcome.key)
            on_outcome(outcome)

    while True:
        done = cached_outcomes(steps, store)
        for outcome in done.values():
            tell(outcome)
        left = [step for step in steps if step.key not in done]
        outcomes = list(done.values())
        if left:
            from pipeline.steps.runner import run_steps

            outcomes += run_steps(left, done, store, zoo.cluster.address, tell, on_progress, on_phase)
        damaged = {outcome.damaged for outcome in outcomes if outcome.damaged is not None}
        if not damaged:
            return outcomes
        for key in damaged:
            put_aside(store, key, on_phase)


def write_tables(run: ZooRun) -> None:
    """Join what the steps wrote into `tables/<table>/<zoo>.parquet`, one row source per model and variant."""
    for name, parts in table_parts(run).items():
        done = [(labels, run.store.path(step)) for labels, step in parts if run.store.is_done(step)]
        collect(table_path(run, name), name, done)
    if any(outcome.status != "cached" for outcome in run.outcomes):  # else the last run's account stays
        rows = [
            {
                "model": outcome.model,
                "variant": outcome.variant,
                "step": outcome.key,
                "status": outcome.status,
                "error": outcome.error,
                **(asdict(outcome.cost) if outcome.cost else {}),
            }
            for outcome in run.outcomes
        ]
        replace_table(table_path(run, "outcomes"), rows_table("outcomes", rows))


def table_path(run: ZooRun, name: str) -> Path:
    return run.store.root / "tables" / name / f"{run.zoo.name}.parquet"


def table_parts(run: ZooRun) -> dict[TableName, list[Part]]:
    """By table, the steps that write a part of it, each with its labels."""
    scored: list[Part] = []
    ranks: list[Part] = []
    lost: list[Part] = []
    spectra: list[Part] = []
    for model in run.models:
        of_model = {"model": model.model.entry.name}
        evaluations = {"baseline": model.baseline} | {variant.label: variant.evaluate for variant in model.variants}
        for label, step in evaluations.items():
            scored.append((of_model | {"variant": label, "fingerprint": step.fingerprint}, step))
        for variant in model.variants:
            ranks.append((of_model | {"variant": variant.label}, variant.schedule))
            lost.append((of_model | {"variant": variant.label}, variant.projection_errors))
        for method, steps in model.decompose.items():
            spectra += [(of_model | {"method": method}, step) for step in steps]
    return {
        "scores": scored,
        "window_losses": scored,
        "ranks": ranks,
        "projection_errors": lost,
        "spectra": spectra,
    }
