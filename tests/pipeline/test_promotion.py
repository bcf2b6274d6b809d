"""Candidates and promotion in a real sqlite MLflow, on versions whose scores are written out."""

import json
from itertools import count

import pytest

from pipeline.registry.promotion import choose_candidate, promote
from pipeline.registry.versions import DETAILS_TAG, connect
from pipeline.zoo.sections import Gates

GATES = Gates(max_perplexity_rise=0.01)
NAMES = count()


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def client(uri):
    return connect(uri)


@pytest.fixture
def model(client):
    """A registered model without versions."""
    return client.create_registered_model(f"model-{next(NAMES)}").name


def version_of(client, model, *, bytes_per_token, rise, loss=2.0, gates=GATES):
    """A registered version with these figures on one text."""
    details = {"gates": gates and gates.model_dump(mode="json"), "texts": ["wiki"]}
    run_id = client.create_run("0", tags={DETAILS_TAG: json.dumps(details)}).info.run_id
    metrics = {"bytes_per_token": bytes_per_token, "perplexity_rise": rise, "recovery": 1 / (1 + rise), "loss": loss}
    for name, value in metrics.items():
        client.log_metric(run_id, name if name == "bytes_per_token" else f"{name}.wiki", value)
    return str(client.create_model_version(model, f"runs:/{run_id}/model", run_id).version)


def candidate_of(client, model):
    alias = client.get_registered_model(model).aliases.get("candidate")
    return None if alias is None else str(alias)


def test_the_candidate_is_the_smallest_cache_that_passes_then_the_least_loss(client, uri, model):
    version_of(client, model, bytes_per_token=10, rise=0.5)
    worse = version_of(client, model, bytes_per_token=20, rise=0.005, loss=2.1)
    better = version_of(client, model, bytes_per_token=20, rise=0.005, loss=2.0)
    version_of(client, model, bytes_per_token=30, rise=0.001)
    assert choose_candidate(uri, model, ["1", worse, better, "4"], GATES) == better
    assert candidate_of(client, model) == better


def test_nothing_that_fails_its_gates_becomes_the_candidate(client, uri, model):
    failing = version_of(client, model, bytes_per_token=10, rise=0.5)
    assert choose_candidate(uri, model, [failing], GATES) is None
    assert candidate_of(client, model) is None


def test_an_earlier_candidate_stays_while_it_passes_and_goes_when_it_does_not(client, uri, model):
    earlier = version_of(client, model, bytes_per_token=20, rise=0.005)
    assert choose_candidate(uri, model, [earlier], GATES) == earlier
    failing = version_of(client, model, bytes_per_token=10, rise=0.5)
    assert choose_candidate(uri, model, [failing], GATES) == earlier
    assert candidate_of(client, model) == earlier
    assert choose_candidate(uri, model, [failing], Gates(max_perplexity_rise=0.001)) is None
    assert candidate_of(client, model) is None


def test_without_gates_there_is_no_candidate_and_no_promotion(client, uri, model):
    version = version_of(client, model, bytes_per_token=20, rise=0.0, gates=None)
    assert choose_candidate(uri, model, [version], None) is None
    assert candidate_of(client, model) is None
    refused, reasons = promote(uri, f"{model}/{version}", "champion", None)
    assert reasons == ["it was registered without gates, and none are given"]
    assert client.get_model_version(model, version).tags["lorc.refused"] == reasons[0]
    promoted, reasons = promote(uri, f"{model}/{version}", "champion", GATES)
    assert reasons == []
    assert client.get_model_version_by_alias(model, "champion").version == promoted.version == refused.version
