"""Where MLflow keeps its runs and their artifacts, for those who do not talk to it: `registry` alone does."""

import os
from pathlib import Path

from pipeline.storage.store import Store
from pipeline.zoo.schema import Zoo


def default_tracking_uri(zoo: Zoo | None, workdir: Path) -> str:
    """The zoo file's MLflow, else $MLFLOW_TRACKING_URI, else a sqlite file in the work directory."""
    named = zoo.registry.tracking_uri if zoo is not None else None
    return named or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workdir / 'mlflow.db'}"


def artifact_root(tracking_uri: str, store: Store) -> str | None:
    """Artifacts of a sqlite store go into the work directory; a server has its own place."""
    return (store.root / "mlartifacts").as_uri() if tracking_uri.startswith("sqlite:") else None
