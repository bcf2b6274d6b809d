"""Scheduled regression evaluation: score the champions again and compare with what they were registered with."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from lorc_core.errors import ConfigError
from lorc_core.loading import variant_and_base
from pipeline.registry.versions import champions, connect, fetch_files, read_version
from pipeline.steps.failures import model_failure
from pipeline.steps.outcome import Listener, Outcome
from pipeline.steps.scores import RegressStep
from pipeline.steps.step import ModelLoad, Need
from pipeline.steps_run import StepsRun
from pipeline.storage.holding import held_store
from pipeline.storage.tables import collect, read_rows
from pipeline.waiting import Patience
from pipeline.zoo.sections import Cluster, Resources

VERDICT_TAG = "lorc.regression"


@dataclass(frozen=True)
class ChampionVerdict:
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
    tracking_uri: str, names: Sequence[str], cluster: Cluster, workdir: Path | str, listener: Listener | None = None
) -> list[ChampionVerdict]:
    """Re-evaluate champions on their pinned tokens, tag each with the verdict, keep the table.

    Args:
        tracking_uri: Of the MLflow store.
        names: Registered models; all that have a champion if empty.
        cluster: Where steps run.
        workdir: Where the table and the steps go.
        listener: Is told how it goes on.

    Raises:
        ConfigError: There is no champion to evaluate, or another run is using the work directory.
    """
    if "://" in str(workdir):  # the workers read what the registry has from the work directory's storage
        raise ConfigError(f"work directory {workdir}: regress needs a directory that all nodes share")
    listener = listener or Listener()
    patience = Patience(cluster.wait_s, listener.note)
    client = connect(tracking_uri)
    with held_store(workdir) as store:
        started_at = datetime.now(UTC).isoformat()  # to the microsecond: two within a second are two
        versions = patience.until_possible(partial(champions, client, names))
        steps: dict[str, RegressStep] = {}
        failed: list[Outcome] = []
        with fetched_files(store.steps) as directory:
            for version in versions:
                fetch = partial(regress_step, client, version, started_at, directory)
                try:
                    steps[label(version)] = patience.until_possible(fetch)
                except Exception as error:  # noqa: BLE001  one champion must not cost the others their verdicts
                    failed.append(model_failure("regress", label(version), error, store))
                    listener.record(failed[-1])
            run = StepsRun(cluster, store, list(steps.values()), listener, patience)
            outcomes = run.then(lambda outcomes: [*failed, *outcomes])
        done = [store.path(step) for step in steps.values() if store.is_done(step)]
        table = store.place("tables", "regressions", f"{started_at.replace(':', '')}.parquet")
        patience.until_possible(partial(collect, table, "regressions", [({}, path) for path in done]))
        store.publish(table)
        errors = {outcome.model: outcome.error for outcome in outcomes if outcome.error is not None}
        verdicts = []
        for version in versions:
            name, reason = label(version), errors.get(label(version))
            rows = () if reason else tuple(read_rows(store.path(steps[name]), "regressions"))
            verdict = ChampionVerdict(version, rows, reason)
            try:
                patience.until_possible(partial(tag_version, client, verdict, started_at))
            except Exception as error:  # noqa: BLE001  as above
                untagged = model_failure("regress", name, error, store)
                listener.record(untagged)
                verdict = replace(verdict, error=untagged.error)
            verdicts.append(verdict)
        return verdicts


def tag_version(client: MlflowClient, verdict: ChampionVerdict, started_at: str) -> None:
    """Write the verdict on the version."""
    version, told = verdict.version, f"{verdict.summary} at {started_at}"
    client.set_model_version_tag(version.name, str(version.version), VERDICT_TAG, told)


def label(version: ModelVersion) -> str:
    return f"{version.name}/{version.version}"


@contextmanager
def fetched_files(steps: Path) -> Iterator[Path]:
    """A directory on the work directory's storage, which all nodes share, for files from the registry.

    It is scratch of the store: the next run removes what a dead one left.
    """
    directory = steps / f".registry-{uuid4().hex}"
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def regress_step(client: MlflowClient, version: ModelVersion, started_at: str, directory: Path) -> RegressStep:
    """The step that scores one champion again; its recipe holds the time, so it is never taken from the store.

    Its files are fetched into a new directory below `directory`.

    Raises:
        ArtifactError: The registered variant was altered, or its base is gone.
    """
    registered = read_version(client, version)
    variant_dir, evaluation_dir = fetch_files(client, registered, directory / uuid4().hex)
    variant, location = variant_and_base(variant_dir)
    details = registered.details
    resources = Resources.model_validate(details["resources"])
    return RegressStep(
        model=label(version),
        need=Need(resources.num_cpus, resources.num_gpus, resources.memory_bytes),
        loads=ModelLoad(location, details["settings"]["dtype"], details["trust_remote_code"], variant.base.fingerprint),
        registered_name=version.name,
        version=str(version.version),
        started_at=started_at,
        batch_size=details["settings"]["batch_size"],
        text_names=tuple(details["texts"]),
        tolerance=registered.regression_tolerance,
        variant_dir=variant_dir,
        evaluation_dir=evaluation_dir,
    )
