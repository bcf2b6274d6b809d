"""Run a zoo: resolve its models, run their steps, choose candidates, join the tables."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Literal, TypeVar

from pipeline.candidates import choose_candidates
from pipeline.registry.tracking import default_tracking_uri
from pipeline.status.keeping import kept_status
from pipeline.steps.failures import model_failure
from pipeline.steps.graph import ModelSteps, model_steps
from pipeline.steps.outcome import Listener, Listeners, Outcome
from pipeline.steps.step import Step
from pipeline.steps_run import StepsRun, first_obstacle
from pipeline.storage.holding import held_store
from pipeline.storage.store import Store
from pipeline.storage.tables import TableName, collect, replace_table, rows_table
from pipeline.waiting import Patience
from pipeline.zoo.models import check_whole, find
from pipeline.zoo.schema import Zoo

T = TypeVar("T")
MODELS_READ_AT_A_TIME = 8
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
    zoo: Zoo, store: Store, listener: Listener, patience: Patience
) -> tuple[list[ModelSteps], list[Outcome]]:
    """Every model's steps; a model that cannot be read, or cannot have a variant, is an outcome with its error."""
    tracking_uri = default_tracking_uri(zoo, store.name)
    planned, failed = [], []
    with reading_threads() as threads:
        found = [threads.submit(find, entry, store) for entry in zoo.models]
        for entry, first in zip(zoo.models, found, strict=True):
            listener.phase(f"reading {entry.name}")
            try:
                read = patience.until_possible(first_then(first.result, partial(find, entry, store)))
                model = model_steps(zoo, patience.until_possible(partial(check_whole, read, store)), tracking_uri)
            except Exception as error:  # noqa: BLE001  one model must not cost the others their night
                failed.append(model_failure("resolve", entry.name, error, store))
                continue
            planned.append(model)
            for label, reason in model.refused:
                failed.append(Outcome(f"variant-{entry.name}-{label}", "variant", entry.name, label, "failed", reason))
    for outcome in failed:
        listener.record(outcome)
    return planned, failed


def first_then(first: Callable[[], T], again: Callable[[], T]) -> Callable[[], T]:
    """Calls the one once, and the other from then on."""
    attempts = chain([first], repeat(again))
    return lambda: next(attempts)()


@contextmanager
def reading_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that read models, which need the network more than a processor; none begins another after an error."""
    threads = ThreadPoolExecutor(MODELS_READ_AT_A_TIME)
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


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


def run_zoo(zoo: Zoo, workdir: Path | str, *, until: Until = "register", listener: Listener | None = None) -> ZooRun:
    """Do everything a zoo file asks for that is not done yet.

    Args:
        zoo: A checked zoo file.
        workdir: Holds the store, the tables and, unless there is a server, MLflow's files: a directory, or a URL.
        until: The last kind of step to run.
        listener: Is told how the run goes on.

    Raises:
        ConfigError: The work directory is not writable, another run is using it, or there is no Ray at the address.
        OSError: The tables cannot be written.
    """
    with held_store(workdir) as store, kept_status(store, zoo.name) as status:
        listener = Listeners(status, listener or Listener())
        patience = Patience(zoo.cluster.wait_s, listener.note)
        models, failed = plan_steps(zoo, store, listener, patience)

        def finish(outcomes: list[Outcome]) -> ZooRun:
            run = ZooRun(zoo, store, tuple(models), (*failed, *outcomes))
            if until == "register":
                run = replace(run, outcomes=(*run.outcomes, *choose(run, listener, patience)))
            listener.phase("writing the tables")
            patience.until_possible(partial(write_tables, run))
            return run

        return StepsRun(zoo.cluster, store, wanted_steps(models, until), listener, patience).then(finish)


def choose(run: ZooRun, listener: Listener, patience: Patience) -> list[Outcome]:
    """Choose the candidates; returns the failures."""
    failed = patience.until_possible(
        partial(choose_candidates, run.zoo, run.store, run.models, listener), first_obstacle
    )
    for outcome in failed:
        listener.record(outcome)
    return failed


def write_tables(run: ZooRun) -> None:
    """Join what the steps wrote into `tables/<table>/<zoo>.parquet`, one row source per model and variant."""
    for name, parts in table_parts(run).items():
        finished = run.store.finished([step for _, step in parts])
        file = f"{name}.parquet"
        done = [(labels, run.store.path(step, file)) for labels, step in parts if step.key in finished]
        collect(table_path(run, name), name, done)
        run.store.publish(table_path(run, name))
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
        run.store.publish(table_path(run, "outcomes"))


def table_path(run: ZooRun, name: str) -> Path:
    return run.store.place("tables", name, f"{run.zoo.name}.parquet")


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
