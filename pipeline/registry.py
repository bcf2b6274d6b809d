"""The model registry: the one file that knows MLflow.

One parent run per model holds the baseline; one child run per variant holds its recipe, scores, memory, the pinned
tokens it was scored on, and the variant itself as a pyfunc model, registered by its `runs:/` URI.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorc_core.manifest import write_manifest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from lorc_core.errors import ArtifactError, ConfigError
from lorc_core.variant import load_variant
from pipeline.gates import reasons_to_refuse, text_rise
from pipeline.storage.artifacts import WINDOWS_FILE
from pipeline.storage.tables import read_rows
from pipeline.zoo.sections import REGRESSION_TOLERANCE, Gates

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)

BASELINE_TAG = "lorc.baseline"
DETAILS_TAG = "lorc.details"
EVALUATION_TAG = "lorc.evaluation"
REFUSED_TAG = "lorc.refused"
CANDIDATE, CHAMPION = "candidate", "champion"
VARIANT_PATH, EVALUATION_PATH = "model/artifacts/variant", "evaluation"  # in a run's artifact directory


@dataclass(frozen=True)
class Registered:
    """A registered version with what was recorded beside it.

    `details` are the gates, texts, evaluation settings and resources, as the zoo file had them.
    """

    version: ModelVersion
    run_id: str
    metrics: dict[str, float]
    details: dict[str, Any]

    @property
    def gates(self) -> Gates | None:
        """Those it was registered with, if the zoo file had any."""
        return None if self.details["gates"] is None else Gates.model_validate(self.details["gates"])

    @property
    def regression_tolerance(self) -> float:
        return self.gates.regression_tolerance if self.gates else REGRESSION_TOLERANCE


def connect(tracking_uri: str) -> MlflowClient:
    """A client of one store, for runs and registered models alike.

    MLflow's fluent functions are not used: they keep the store in a global variable and in the environment.
    """
    return MlflowClient(tracking_uri, registry_uri=tracking_uri)


def register_variant(
    *,
    tracking_uri: str,
    artifact_root: str | None,
    experiment: str,
    model_name: str,
    label: str,
    gates: dict[str, Any] | None,
    settings: dict[str, Any],
    text_names: Sequence[str],
    trust_remote_code: bool,
    resources: dict[str, Any],
    variant: Path,
    baseline: Path,
    evaluation: Path,
    windows: Sequence[Path],
) -> dict[str, str]:
    """Log a run for the variant, below its model's parent run, and register it as a new version.

    Returns:
        Name, version and run id.
    """
    client = connect(tracking_uri)
    experiment_id = find_experiment(client, experiment, artifact_root)
    parent = parent_run(client, experiment_id, model_name, baseline)
    details = {
        "gates": gates,
        "texts": list(text_names),
        "settings": settings,
        "trust_remote_code": trust_remote_code,
        "resources": resources,
    }
    tags = {
        MLFLOW_PARENT_RUN_ID: parent.info.run_id,
        EVALUATION_TAG: f"{evaluation.name} {label}",
        DETAILS_TAG: json.dumps(details, sort_keys=True),
    }
    if (earlier := registered_before(client, experiment_id, tags)) is not None:
        return {"name": model_name, "version": str(earlier.version), "run_id": str(earlier.run_id)}
    run_id = client.create_run(experiment_id, tags=tags, run_name=label).info.run_id
    log_recipe(client, run_id, variant, settings)
    metrics = variant_metrics(baseline, evaluation)
    for name, value in metrics.items():
        client.log_metric(run_id, name, value)
    log_files(client, run_id, variant, evaluation, dict(zip(text_names, windows, strict=True)), trust_remote_code)
    client.set_terminated(run_id)
    version = create_version(client, model_name, run_id, label, metrics)
    return {"name": model_name, "version": str(version.version), "run_id": run_id}


def find_experiment(client: MlflowClient, name: str, artifact_root: str | None) -> str:
    """Id of the experiment, made if absent; a server chooses its own artifact location."""
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name, artifact_location=artifact_root)


def registered_before(client: MlflowClient, experiment_id: str, tags: dict[str, str]) -> ModelVersion | None:
    """The version that an interrupted step made of the same evaluation; runs that came to no version are deleted."""
    for run in client.search_runs([experiment_id], f"tags.`{EVALUATION_TAG}` = '{tags[EVALUATION_TAG]}'"):
        if run.data.tags.get(DETAILS_TAG) != tags[DETAILS_TAG]:
            continue
        if found := client.search_model_versions(f"run_id='{run.info.run_id}'"):
            return found[0]
        client.delete_run(run.info.run_id)
    return None


def parent_run(client: MlflowClient, experiment_id: str, model_name: str, baseline: Path) -> Run:
    """The run that holds the model's baseline, made at its first variant."""
    query = (
        f"tags.`{BASELINE_TAG}` = '{baseline.name}' and attributes.run_name = '{model_name}' "
        "and attributes.status = 'FINISHED'"
    )
    if found := client.search_runs([experiment_id], query, max_results=1):
        return found[0]
    run = client.create_run(experiment_id, tags={BASELINE_TAG: baseline.name}, run_name=model_name)
    for row in read_rows(baseline, "scores"):
        client.log_metric(run.info.run_id, f"loss.{row['text']}", row["loss"])
        client.log_metric(run.info.run_id, f"perplexity.{row['text']}", row["perplexity"])
        client.log_metric(run.info.run_id, "bytes_per_token", row["bytes_per_token"])
    client.set_terminated(run.info.run_id)
    return run


def log_recipe(client: MlflowClient, run_id: str, directory: Path, settings: dict[str, Any]) -> None:
    variant = load_variant(directory)
    params = {
        "base": variant.base.source,
        "base_fingerprint": variant.base.fingerprint,
        "method": variant.method.name,
        "rank_note": variant.ranks.note,
        **{f"schedule.{name}": value for name, value in variant.schedule.items()},
        **{f"evaluation.{name}": value for name, value in settings.items()},
    }
    for name, value in params.items():
        client.log_param(run_id, name, value)


def variant_metrics(baseline: Path, evaluation: Path) -> dict[str, float]:
    """Scores, recovery and memory of a variant, and the baseline's beside them."""
    reference = {row["text"]: row for row in read_rows(baseline, "scores")}
    metrics: dict[str, float] = {}
    for row in read_rows(evaluation, "scores"):
        text, before = row["text"], reference[row["text"]]
        rise = text_rise(baseline, evaluation, text)
        metrics |= {
            f"loss.{text}": row["loss"],
            f"loss_rise.{text}": rise.nats,
            f"loss_rise_standard_error.{text}": rise.standard_error,
            f"perplexity.{text}": row["perplexity"],
            f"perplexity_rise.{text}": rise.perplexity_rise,
            f"recovery.{text}": rise.recovery,
            f"baseline_perplexity.{text}": before["perplexity"],
            "bytes_per_token": row["bytes_per_token"],
            "baseline_bytes_per_token": before["bytes_per_token"],
            "kept_fraction": row["bytes_per_token"] / before["bytes_per_token"],
            "factor_bytes": row["factor_bytes"],
        }
    return metrics


def log_files(
    client: MlflowClient,
    run_id: str,
    variant: Path,
    evaluation: Path,
    windows: dict[str, Path],
    trust_remote_code: bool,
) -> None:
    """Put the variant (as a pyfunc model) and what it was scored on into the run's artifact directory."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shutil.copytree(variant, scratch / "variant")
        mlflow.pyfunc.save_model(
            scratch / "model",
            python_model=Path(__file__).with_name("pyfunc_model.py"),
            artifacts={"variant": str(scratch / "variant")},
            model_config={"trust_remote_code": trust_remote_code},
            pip_requirements=["lorc"],
        )
        client.log_artifacts(run_id, str(scratch / "model"), "model")
        (scratch / "evaluation").mkdir()
        shutil.copy(evaluation / "window_losses.parquet", scratch / "evaluation")
        shutil.copy(evaluation / "scores.parquet", scratch / "evaluation")
        for text, directory in windows.items():
            shutil.copy(directory / WINDOWS_FILE, scratch / "evaluation" / f"{text}.npy")
        write_manifest(scratch / "evaluation")
        client.log_artifacts(run_id, str(scratch / "evaluation"), EVALUATION_PATH)


def create_version(
    client: MlflowClient, model_name: str, run_id: str, label: str, metrics: dict[str, float]
) -> ModelVersion:
    """Register the run's model by reference; its memory and accuracy stand as tags on the version."""
    try:
        client.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = RunsArtifactRepository.get_underlying_uri(f"runs:/{run_id}/model", client.tracking_uri)
    tags = {"variant": label} | {name: f"{value:.6g}" for name, value in metrics.items()}
    return client.create_model_version(model_name, source, run_id, tags=tags)


def choose_candidate(tracking_uri: str, model_name: str, versions: Sequence[str]) -> str:
    """Point the alias `candidate` at the smallest cache that passes its gates (the least loss among equals).

    If none passes, at the least loss.

    Returns:
        The version chosen.
    """
    client = connect(tracking_uri)
    found = [read_version(client, client.get_model_version(model_name, version)) for version in versions]
    passing = [one for one in found if not refusals(one)]

    def loss(one: Registered) -> float:
        return sum(one.metrics[f"loss.{text}"] for text in one.details["texts"])

    if passing:
        chosen = min(passing, key=lambda one: (one.metrics["bytes_per_token"], loss(one)))
    else:
        chosen = min(found, key=loss)
    client.set_registered_model_alias(model_name, CANDIDATE, chosen.version.version)
    return chosen.version.version


def refusals(registered: Registered, gates: Gates | None = None) -> list[str]:
    """Why the gates (its own, unless others are given) refuse a registered version."""
    gates = gates or registered.gates
    if gates is None:
        return ["it was registered without gates, and none are given"]
    return reasons_to_refuse(gates, registered.metrics, registered.details["texts"])


def read_version(client: MlflowClient, version: ModelVersion) -> Registered:
    """What the registry holds of a version.

    Raises:
        ArtifactError: It was not registered by lorc.
    """
    run = client.get_run(version.run_id) if version.run_id else None
    if version.run_id is None or run is None or DETAILS_TAG not in run.data.tags:
        raise ArtifactError(f"{version.name} version {version.version} was not registered by lorc")
    return Registered(
        version=version,
        run_id=version.run_id,
        metrics=dict(run.data.metrics),
        details=json.loads(run.data.tags[DETAILS_TAG]),
    )


def fetch_files(client: MlflowClient, registered: Registered, destination: Path) -> tuple[Path, Path]:
    """Copy a version's files from the registry into a new directory.

    Returns:
        The variant's directory, and that of `<text>.npy`, `scores.parquet` and `window_losses.parquet`.

    Raises:
        ArtifactError: The files are not there.
    """
    destination.mkdir(parents=True)
    try:
        variant, evaluation = (
            Path(client.download_artifacts(registered.run_id, path, str(destination)))
            for path in (VARIANT_PATH, EVALUATION_PATH)
        )
    except (MlflowException, OSError) as error:
        version = registered.version
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{version.name}/{version.version}: its files cannot be fetched: {reason}") from error
    return variant, evaluation


def registered_models(client: MlflowClient) -> list[RegisteredModel]:
    """All of them; the client answers in pages."""
    page = client.search_registered_models()
    found = list(page)
    while page.token:
        page = client.search_registered_models(page_token=page.token)
        found += page
    return found


def find_version(client: MlflowClient, reference: str, default_alias: str) -> ModelVersion:
    """The version that `name`, `name@alias` or `name/version` means.

    Raises:
        ConfigError: There is none; the message says what there is.
    """
    name, at, alias = reference.partition("@")
    name, slash, number = name.partition("/")
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        known = ", ".join(found.name for found in registered_models(client)) or "none"
        raise ConfigError(f"no registered model {name!r}; registered are {known}") from error
    try:
        if slash and not at:
            return client.get_model_version(name, number)
        return client.get_model_version_by_alias(name, alias if at else default_alias)
    except MlflowException as error:
        numbers = sorted(int(version.version) for version in client.search_model_versions(f"name='{name}'"))
        there = f"the versions {name}/{numbers[0]} to {name}/{numbers[-1]}" if numbers else "no version"
        aliases = ", ".join(f"{name}@{alias} (version {version})" for alias, version in model.aliases.items()) or "none"
        wanted = reference if at or slash else f"{name}@{default_alias}"
        raise ConfigError(f"no version {wanted}; {name} has {there} and the aliases {aliases}") from error


def promote(tracking_uri: str, reference: str, alias: str, gates: Gates | None) -> tuple[ModelVersion, list[str]]:
    """Move an alias to a version if its gates accept it; the reasons of a refusal are written on the version.

    Args:
        reference: `name` (its candidate), `name@alias` or `name/version`.
        alias: To move, `champion` as a rule.
        gates: Instead of those it was registered with.

    Returns:
        The version, and the reasons why it was refused; none if it was promoted.
    """
    client = connect(tracking_uri)
    version = find_version(client, reference, CANDIDATE)
    reasons = refusals(read_version(client, version), gates)
    if reasons:
        client.set_model_version_tag(version.name, version.version, REFUSED_TAG, "; ".join(reasons))
    else:
        client.set_registered_model_alias(version.name, alias, version.version)
        client.delete_model_version_tag(version.name, version.version, REFUSED_TAG)
    return version, reasons


def champions(client: MlflowClient, names: Sequence[str]) -> list[ModelVersion]:
    """The champions of the named models, or of all.

    Raises:
        ConfigError: A named model has no champion, or no model at all has one.
    """
    if names:
        return [find_version(client, name, CHAMPION) for name in names]
    found = [
        client.get_model_version_by_alias(model.name, CHAMPION)
        for model in registered_models(client)
        if CHAMPION in model.aliases
    ]
    if not found:
        raise ConfigError("no registered model has a champion; `lorc promote NAME` makes one")
    return found
