"""Register a variant: a run of its own with all that was measured, and a new version of its model.

One parent run per model holds the baseline; one child run per variant holds its recipe, scores, memory, the pinned
tokens it was scored on, and the variant itself as a pyfunc model, registered by its `runs:/` URI.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from lorc_core.manifest import write_manifest
from lorc_core.variant import load_variant
from pipeline.evaluation.gates import text_rise
from pipeline.registry.versions import DETAILS_TAG, EVALUATION_PATH, connect
from pipeline.storage.artifacts import WINDOWS_FILE
from pipeline.storage.tables import read_rows

BASELINE_TAG = "lorc.baseline"  # of a parent run: its evaluation
EVALUATION_TAG = "lorc.evaluation"  # of a child run: its model, evaluation and label
WORKDIR_TAG = "lorc.workdir"  # of a child run: the host and work directory of the run that made it


def register_variant(
    *,
    tracking_uri: str,
    artifact_root: str | None,
    workdir: str,
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
        EVALUATION_TAG: f"{model_name} {evaluation.name} {label}",
        WORKDIR_TAG: workdir,
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
    experiment = client.get_experiment_by_name(name)
    return experiment.experiment_id if experiment else client.create_experiment(name, artifact_location=artifact_root)


def registered_before(client: MlflowClient, experiment_id: str, tags: dict[str, str]) -> ModelVersion | None:
    """The version that was made of the same evaluation; this work directory's runs that came to none are deleted."""
    for run in client.search_runs([experiment_id], f"tags.`{EVALUATION_TAG}` = '{tags[EVALUATION_TAG]}'"):
        if run.data.tags.get(DETAILS_TAG) != tags[DETAILS_TAG]:
            continue
        if versions := client.search_model_versions(f"run_id='{run.info.run_id}'"):
            return versions[0]
        if run.data.tags.get(WORKDIR_TAG) == tags[WORKDIR_TAG]:  # else another's, which may be at it
            client.delete_run(run.info.run_id)
    return None


def parent_run(client: MlflowClient, experiment_id: str, model_name: str, baseline: Path) -> Run:
    """The run that holds the model's baseline, made at its first variant."""
    query = (
        f"tags.`{BASELINE_TAG}` = '{baseline.name}' and attributes.run_name = '{model_name}' "
        "and attributes.status = 'FINISHED'"
    )
    if runs := client.search_runs([experiment_id], query, max_results=1):
        return runs[0]
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
