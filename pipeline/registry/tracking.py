"""Where MLflow keeps its runs and their artifacts, for those who do not talk to it: `registry` alone does."""

import os
from pathlib import Path

from lorc_core.errors import ConfigError
from pipeline.zoo.schema import Zoo

SQLITE = "sqlite:///"


def default_tracking_uri(zoo: Zoo | None, workdir: str) -> str:
    """The zoo file's MLflow, else $MLFLOW_TRACKING_URI, else a sqlite file in the work directory.

    Raises:
        ConfigError: The work directory is in an object store, where no database can be, and there is no server.
    """
    named = (zoo.registry.tracking_uri if zoo is not None else None) or os.environ.get("MLFLOW_TRACKING_URI")
    if named is None and "://" in workdir:
        raise ConfigError(
            f"work directory {workdir}: MLflow's database cannot be in an object store; set MLFLOW_TRACKING_URI, or "
            "registry.tracking_uri in the zoo file"
        )
    return named or f"{SQLITE}{Path(workdir).resolve() / 'mlflow.db'}"


def artifact_root(tracking_uri: str) -> str | None:
    """Artifacts of a sqlite store go beside it; a server has its own place."""
    if not tracking_uri.startswith(SQLITE):
        return None
    return (Path(tracking_uri.removeprefix(SQLITE)).resolve().parent / "mlartifacts").as_uri()
