"""What must be alike in several files of infra is, and the jobs are what docs/operations.md says of them."""

import re
import tomllib
from pathlib import Path

from pipeline.zoo.file import load_zoo
from tests.infra.compose_services import example_settings, read_compose
from tests.infra.manifests import KUBERNETES, images, the
from tests.paths import REPOSITORY


def test_versions_are_those_of_the_project():
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert {image.rpartition(":")[2] for image in images().values()} == {version}
    assert example_settings()["LORC_VERSION"] == version
    pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"ray=={the('RayCluster', 'lorc').content['spec']['rayVersion']}" in pins
    postgres = the("StatefulSet", "postgres").content["spec"]["template"]["spec"]["containers"][0]["image"]
    assert read_compose(example_settings())["services"]["postgres"]["image"] == postgres


def test_mlflow_is_started_as_on_one_machine():
    container = the("Deployment", "mlflow").content["spec"]["template"]["spec"]["containers"][0]
    service = read_compose(example_settings())["services"]["mlflow"]
    asked = [word for word in service["command"] if not word.startswith("--artifacts-destination")]
    assert container["command"] + container["args"] == asked
    assert "MLFLOW_ARTIFACTS_DESTINATION=s3://" in (KUBERNETES / "platform" / "mlflow.env").read_text()


def test_the_zoo_job_survives_preemption_and_ends():
    spec = the("RayJob", "zoo").content["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert "--workdir /work" in spec["entrypoint"]
    groups = {group["groupName"]: group for group in the("RayCluster", "lorc").content["spec"]["workerGroupSpecs"]}
    assert all(group["minReplicas"] == 0 for group in groups.values())
    limits = {name: group["template"]["spec"]["containers"][0]["resources"]["limits"] for name, group in groups.items()}
    assert ["nvidia.com/gpu" in limits[name] for name in ("cpu", "gpu")] == [False, True]


def test_a_night_does_not_begin_before_the_last_one_ended():
    spec = the("CronJob", "regression").content["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    job = the("RayJob", "regression").content["spec"]
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] > job["activeDeadlineSeconds"]
    assert the("RayCronJob", "regression").content["spec"]["jobTemplate"] == job


def test_kueue_has_quota_for_all_workers():
    cluster, total = the("RayCluster", "lorc").content["spec"], {"cpu": 0.0, "memory": 0.0, "nvidia.com/gpu": 0.0}
    submitter = the("RayJob", "zoo").content["spec"]["submitterPodTemplate"]["spec"]["containers"][0]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    parts = [(1, head), (1, submitter), (1, cluster["autoscalerOptions"])]
    parts += [
        (group["maxReplicas"], group["template"]["spec"]["containers"][0]) for group in cluster["workerGroupSpecs"]
    ]
    for count, container in parts:
        for name, asked in container["resources"]["requests"].items():
            total[name] += count * amount(asked)
    (group,) = the("ClusterQueue", "lorc").content["spec"]["resourceGroups"]
    quota = {found["name"]: amount(found["nominalQuota"]) for found in group["flavors"][0]["resources"]}
    assert quota.keys() == total.keys()
    assert all(total[name] <= quota[name] for name in total)


def amount(quantity):
    """CPUs, GPUs or GiB."""
    found = re.fullmatch(r"([\d.]+)(m|Mi|Gi)?", str(quantity))
    return float(found[1]) * {"m": 1e-3, "Mi": 2**-10}.get(found[2], 1)


def test_the_zoo_file_is_one(tmp_path):
    content = (KUBERNETES / "zoo" / "zoo.yaml").read_text()
    assert "/opt/lorc/examples" in content
    assert "COPY examples examples" in (REPOSITORY / "infra" / "Dockerfile").read_text()
    (tmp_path / "zoo.yaml").write_text(content.replace("/opt/lorc/examples", str(REPOSITORY / "examples")))
    zoo = load_zoo(tmp_path / "zoo.yaml")
    assert all(Path(model.source).is_dir() for model in zoo.models)


def test_entry_points_exist():
    text = "".join(file.read_text() for file in [*KUBERNETES.rglob("*.yaml"), REPOSITORY / "infra" / "compose.yaml"])
    modules = set(re.findall(r"-m,? jobs\.(\w+)", text))
    assert modules == {"compress_zoo", "regression_eval"}
    for module in modules:
        assert (REPOSITORY / "jobs" / f"{module}.py").is_file()
