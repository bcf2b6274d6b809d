"""infra/compose.yaml: what its services are allowed, and that they work together, started as plain processes.

No container runtime is needed: commands and environment are the file's. PostgreSQL is this machine's, moto stands for
the object store.
"""

import re
import subprocess
import sys

import boto3
import pytest
import requests
import yaml
from mlflow import MlflowClient

from tests.infra.compose_services import (
    COMPOSE,
    ENVIRONMENT,
    Services,
    example_settings,
    postgres_programs,
    read_compose,
    short_place,
)
from tests.paths import REPOSITORY
from tests.zoos import write_zoo


def test_every_setting_is_in_the_example_and_none_is_left_over():
    assert set(re.findall(r"\$\{(\w+)", COMPOSE.read_text())) == example_settings().keys()
    assert "$" not in str(read_compose(example_settings()))


def test_a_setting_that_is_missing_is_an_error():
    """The control: docker compose's `:?` ends it too."""
    settings = example_settings()
    del settings["RAY_AUTH_TOKEN"]
    with pytest.raises(KeyError, match="RAY_AUTH_TOKEN"):
        read_compose(settings)
    assert set(re.findall(r"\$\{\w+(.*?)\}", COMPOSE.read_text())) == {":?", "?"}, "a default value"


def test_secrets_are_empty_in_the_example_and_git_ignores_the_copy():
    empty = re.findall(r"^(\w+)=$", ENVIRONMENT.read_text(), re.MULTILINE)
    assert empty == ["RAY_AUTH_TOKEN", "POSTGRES_PASSWORD", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "HF_TOKEN"]
    needed = re.findall(r"\$\{(\w+):\?\}", COMPOSE.read_text())  # an empty value of these is an error
    assert set(empty) - set(needed) == {"HF_TOKEN"}
    ignored = (REPOSITORY / ".gitignore").read_text().splitlines()
    assert str(ENVIRONMENT.with_suffix("").relative_to(REPOSITORY)) in ignored


def test_ports_are_open_to_this_machine_alone():
    ports = [
        port for service in read_compose(example_settings())["services"].values() for port in service.get("ports", [])
    ]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_our_images_run_with_a_read_only_root():
    services = read_compose(example_settings())["services"]
    ours = [service for service in services.values() if service["image"].startswith("lorc")]
    assert len(ours) == 5
    for service in ours:
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


def test_volumes_and_services_that_are_named_exist():
    content = yaml.safe_load(COMPOSE.read_text())
    mounted = {
        volume.partition(":")[0] for service in content["services"].values() for volume in service.get("volumes", [])
    }
    assert {name for name in mounted if not name.startswith("$")} == set(content["volumes"])
    for service in content["services"].values():
        assert service.get("depends_on", {}).keys() <= content["services"].keys()
        healthy = [name for name, on in service.get("depends_on", {}).items() if on["condition"] == "service_healthy"]
        for service in [content["services"][name] for name in healthy]:
            assert "healthcheck" in service or service["image"].startswith("lorc"), "the Dockerfile has ours"


@pytest.mark.parametrize(
    ("command", "healthy"),
    [("ray start --head --block", False), ("docker-init -- ray start --head", False), ("python -m jobs.promote", True)],
)
def test_a_head_that_takes_no_jobs_is_not_healthy_and_other_commands_are(command, healthy, tmp_path):
    (tmp_path / "cmdline").write_bytes(command.replace(" ", "\0").encode())
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")  # no head answers
    (tmp_path / "python").chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["sh", REPOSITORY / "infra" / "healthy.sh", tmp_path / "cmdline"], env=path)
    assert (done.returncode == 0) is healthy


@pytest.mark.slow
@pytest.mark.timeout(900)  # 195 s on two cores that had other work
@pytest.mark.skipif(postgres_programs() is None, reason="PostgreSQL is not installed")
@pytest.mark.skipif(" " in sys.prefix, reason="Ray 2.60 starts no job from a path with a space")
def test_the_services_run_a_zoo_as_plain_processes():
    with short_place() as place:
        folders = {"/zoo": place / "zoo", "/work": place / "work"}
        for folder in folders.values():
            folder.mkdir()
        write_zoo(folders["/zoo"])
        with Services(example_settings(ZOO_FILE="zoo.yaml"), place, folders) as services:
            start_all(services)
            check_a_wrong_host_is_refused(services)
            check_a_job_without_the_token_is_refused(services)
            first = services.run("zoo")
            assert first.returncode == 0, first.stdout + first.stderr
            assert "42 steps ran, 0 were done before" in first.stdout
            check_registered(services)
            again = services.run("zoo")
            assert "0 steps ran, 42 were done before" in again.stdout, again.stdout + again.stderr
            check_regression(services)


def start_all(services):
    services.start_postgres()
    services.start_objects()
    for _ in range(2):  # the second finds the bucket
        made = services.run("bucket")
        assert made.returncode == 0, made.stderr
    services.start_mlflow()
    services.start_ray()


def check_a_wrong_host_is_refused(services):
    url = f"{services.url('5000')}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert requests.get(url).ok
    assert requests.get(url, headers={"Host": "elsewhere.example:5000"}).status_code == 403


def check_a_job_without_the_token_is_refused(services):
    url = f"{services.url('8265')}/api/jobs/"
    token = {"Authorization": f"Bearer {services.settings['RAY_AUTH_TOKEN']}"}
    assert requests.get(url, headers=token).json() == []
    assert requests.get(url).status_code == 401
    wrong = {"Authorization": "Bearer wrong"}
    assert requests.get(url, headers=wrong).status_code == 403


def check_registered(services):
    """Versions are in MLflow, their files in the bucket and nowhere else."""
    versions = MlflowClient(services.url("5000")).search_model_versions()
    assert len(versions) == 6
    keys = services.environment("bucket")
    store = boto3.client(
        "s3",
        endpoint_url=keys["AWS_ENDPOINT_URL"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        region_name=keys["AWS_DEFAULT_REGION"],
    )
    pages = store.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
    held = [found["Key"] for page in pages for found in page["Contents"]]
    for version in versions:
        assert any(version.run_id in key and key.endswith("factors.safetensors") for key in held)
    assert not (services.place / "mlartifacts").exists()


def check_regression(services):
    """Without a champion there is nothing to do, and that is an error; with one it passes."""
    assert "no registered model has a champion" in services.run("regression").stdout
    MlflowClient(services.url("5000")).set_registered_model_alias("small-llama", "champion", "3")
    done = services.run("regression")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
