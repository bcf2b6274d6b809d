"""Which version becomes the candidate, and what `lorc promote` checks before one becomes the champion."""

from collections.abc import Sequence

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline.evaluation.gates import reasons_to_refuse
from pipeline.registry.versions import CANDIDATE, Registered, connect, find_version, read_version
from pipeline.zoo.sections import Gates

REFUSED_TAG = "lorc.refused"  # of a version: why it was not promoted


def choose_candidate(tracking_uri: str, model_name: str, versions: Sequence[str], gates: Gates | None) -> str | None:
    """Point the alias `candidate` at the smallest cache that passes the gates, of equal ones at the least loss.

    Where none of these versions passes, a candidate of an earlier run stays if it passes the gates; else the alias is
    removed: nothing that fails its gates is a candidate.

    Args:
        tracking_uri: Of the MLflow store.
        model_name: Of the registered model.
        versions: To choose among: those of this run.
        gates: Of the zoo file.

    Returns:
        The version that is the candidate now; None where there is none.
    """
    client = connect(tracking_uri)
    passing = passing_versions(client, model_name, versions, gates)
    earlier = client.get_registered_model(model_name).aliases.get(CANDIDATE)
    if not passing and earlier is not None:
        passing = passing_versions(client, model_name, [str(earlier)], gates)
    if passing:
        best = min(passing, key=lambda registered: (registered.metrics["bytes_per_token"], total_loss(registered)))
        client.set_registered_model_alias(model_name, CANDIDATE, best.version.version)
        return str(best.version.version)
    if earlier is not None:
        client.delete_registered_model_alias(model_name, CANDIDATE)
    return None


def passing_versions(
    client: MlflowClient, model_name: str, versions: Sequence[str], gates: Gates | None
) -> list[Registered]:
    registered = [read_version(client, client.get_model_version(model_name, version)) for version in versions]
    return [version for version in registered if not refusals(version, gates)]


def total_loss(registered: Registered) -> float:
    """Over all evaluated texts."""
    return sum(registered.metrics[f"loss.{text}"] for text in registered.details["texts"])


def refusals(registered: Registered, gates: Gates | None = None) -> list[str]:
    """Why the gates (its own, unless others are given) refuse a registered version."""
    gates = gates or registered.gates
    if gates is None:
        return ["it was registered without gates, and none are given"]
    return reasons_to_refuse(gates, registered.metrics, registered.details["texts"])


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
