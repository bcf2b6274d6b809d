"""Scheduled regression evaluation: score the champions again and compare with what they were registered with."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from lorc_core.loading import variant_and_base
from pipeline.registry.versions import champions, connect, fetch_files, read_version
from pipeline.steps.failures import logged_failure
from pipeline.steps.outcome import Outcome
from pipeline.steps.runner import run_steps
from pipeline.steps.scores import RegressStep
from pipeline.steps.step import ModelLoad, Need, Step
from pipeline.storage.lease import held_store
from pipeline.storage.store import Store
from pipeline.storage.tables import collect, read_rows
from pipeline.zoo.sections import Resources

VERDICT_TAG = "lorc.regression"


@dataclass(frozen=True)
class Verdict:
    """What re-evaluating one champion came to: its rows in the table `regressions`, or an error."""

    version: ModelVersion
    rows: tuple[dict[str, Any], ...]
    error: str | None

    @property
    def passed(self) -> bool:
        return self.error is None and not any(row["fell"] for row in self.rows)

    @property
    def summary(self) -> str:
        if self.error is not None:
            return f"failed: {self.error}"
        return "passed" if self.passed else "fell"


def regress(
    tracking_uri: str,
    names: Sequence[str],
    address: str | None,
    workdir: Path,
    on_plan: Callable[[Sequence[Step]], None] = lambda steps: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> list[Verdict]:
    """Re-evaluate champions on their pinned tokens, tag each with the verdict, keep the table.

    Args:
        tracking_uri: Of the MLflow store.
        names: Registered models; all that have a champion if empty.
        address: Of the Ray cluster.
        workdir: Where the table and the steps go.
        on_plan: Called once with all steps.
        on_outcome: Called for every outcome as it comes.
        on_phase: Called before what takes a while and is no step.

    Raises:
        ConfigError: There is no champion to evaluate, or another run is using the work directory.
    """
    client = connect(tracking_uri)
    with held_store(workdir) as store:
        started_at = datetime.now(UTC).isoformat()  # to the microsecond: two within a second are two
        versions = champions(client, names)
        with fetched_files(store.root) as directory:
            steps, errors = regress_steps(client, versions, started_at, directory, store)
            on_plan(list(steps.values()))
            outcomes = (
                run_steps(list(steps.values()), {}, store, address, on_outcome, on_phase=on_phase) if steps else []
            )
        errors |= {outcome.model: outcome.error for outcome in outcomes if outcome.error is not None}
        verdicts = []
        for version in versions:
            reason = errors.get(label(version))
            rows = () if reason else tuple(read_rows(store.path(steps[label(version)]), "regressions"))
            verdicts.append(Verdict(version, rows, reason))
            client.set_model_version_tag(
                version.name, version.version, VERDICT_TAG, f"{verdicts[-1].summary} at {started_at}"
            )
        done = [store.path(step) for step in steps.values() if store.is_done(step)]
        table = store.root / "tables" / "regressions" / f"{started_at.replace(':', '')}.parquet"
        collect(table, "regressions", [({}, path) for path in done])
        return verdicts


def regress_steps(
    client: MlflowClient, versions: Sequence[ModelVersion], started_at: str, directory: Path, store: Store
) -> tuple[dict[str, RegressStep], dict[str, str]]:
    """The steps of the champions by label, and why others have none."""
    steps: dict[str, RegressStep] = {}
    errors: dict[str, str] = {}
    for version in versions:
        try:
            steps[label(version)] = regress_step(client, version, started_at, directory / str(len(steps)))
        except Exception as error:  # noqa: BLE001  one champion must not cost the others their verdicts
            log = store.log(f"regress-{version.name}-{version.version}")
            errors[label(version)] = logged_failure(error, log)
    return steps, errors


def label(version: ModelVersion) -> str:
    return f"{version.name}/{version.version}"


@contextmanager
def fetched_files(root: Path) -> Iterator[Path]:
    """A directory on the work directory's storage, which all nodes share, for files from the registry."""
    directory = root / f"registry-{uuid4().hex}"
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def regress_step(client: MlflowClient, version: ModelVersion, started_at: str, directory: Path) -> RegressStep:
    """The step that scores one champion again; its recipe holds the time, so it is never taken from the store.

    Raises:
        ArtifactError: The registered variant was altered, or its base is gone.
    """
    registered = read_version(client, version)
    variant_dir, evaluation_dir = fetch_files(client, registered, directory)
    variant, model_dir = variant_and_base(variant_dir)
    details = registered.details
    resources = Resources.model_validate(details["resources"])
    return RegressStep(
        model=label(version),
        need=Need(resources.num_cpus, resources.num_gpus, resources.memory_bytes),
        loads=ModelLoad(
            model_dir, details["settings"]["dtype"], details["trust_remote_code"], variant.base.fingerprint
        ),
        registered_name=version.name,
        version=str(version.version),
        started_at=started_at,
        batch_size=details["settings"]["batch_size"],
        text_names=tuple(details["texts"]),
        tolerance=registered.regression_tolerance,
        variant_dir=variant_dir,
        evaluation_dir=evaluation_dir,
    )
