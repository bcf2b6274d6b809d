"""Registered versions: found by name, number or alias, and read back with all that was recorded beside them."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from lorc_core.errors import ArtifactError, ConfigError, first_line
from pipeline.zoo.sections import REGRESSION_TOLERANCE, Gates

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)

CANDIDATE, CHAMPION = "candidate", "champion"  # aliases
DETAILS_TAG = "lorc.details"  # of a run: gates, texts, evaluation settings and resources
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
        reason = first_line(error)
        raise ArtifactError(f"{version.name}/{version.version}: its files cannot be fetched: {reason}") from error
    return variant, evaluation


def registered_models(client: MlflowClient) -> list[RegisteredModel]:
    """All of them; the client answers in pages."""
    page = client.search_registered_models()
    models = list(page)
    while page.token:
        page = client.search_registered_models(page_token=page.token)
        models += page
    return models


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
        known = ", ".join(known.name for known in registered_models(client)) or "none"
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


def champions(client: MlflowClient, names: Sequence[str]) -> list[ModelVersion]:
    """The champions of the named models, or of all.

    Raises:
        ConfigError: A named model has no champion, or no model at all has one.
    """
    if names:
        return [find_version(client, name, CHAMPION) for name in names]
    versions = [
        client.get_model_version_by_alias(model.name, CHAMPION)
        for model in registered_models(client)
        if CHAMPION in model.aliases
    ]
    if not versions:
        raise ConfigError("no registered model has a champion; `lorc promote NAME` makes one")
    return versions
