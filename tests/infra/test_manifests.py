"""infra/kubernetes matches the published schemas, and its parts find each other.

Where kubectl or kustomize is installed, what it builds is held to the schemas too.
"""

import copy
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.infra.manifests import (
    KUBERNETES,
    all_pods,
    build,
    containers,
    images,
    kustomizations,
    kustomize_command,
    manifests,
    of_kind,
    the,
)
from tests.infra.published import check, resource_schema

PIECES = [folder.name for folder in kustomizations()]
MADE_BY_KUBERNETES = ("kube-root-ca.crt",)  # a config map in every namespace


@pytest.mark.parametrize("manifest", [pytest.param(manifest, id=manifest.id) for manifest in manifests()])
def test_manifest_matches_its_published_schema(manifest):
    check(manifest.content)


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("Deployment", "mlflow", ("spec", "template", "spec", "containers", 0)),
        ("CronJob", "regression", ("spec",)),
        ("RayCluster", "lorc", ("spec", "workerGroupSpecs", 1, "template", "spec", "containers", 0, "resources")),
        ("RayJob", "zoo", ("spec", "submitterPodTemplate", "spec", "securityContext")),
        ("RayCronJob", "regression", ("spec", "jobTemplate")),
        ("ClusterQueue", "lorc", ("spec", "preemption")),
    ],
)
def test_a_misspelt_field_is_seen(kind, name, path):
    """The control."""
    content = copy.deepcopy(the(kind, name).content)
    inner = content
    for step in path:
        inner = inner[step]
    inner["conccurrency"] = {}
    with pytest.raises(jsonschema.ValidationError, match="conccurrency"):
        check(content)


def test_a_value_of_the_wrong_type_is_seen():
    """The control."""
    content = copy.deepcopy(the("RayJob", "zoo").content)
    content["spec"]["backoffLimit"] = "three"
    with pytest.raises(jsonschema.ValidationError, match="three"):
        check(content)


def test_the_zoo_job_with_the_cluster_that_is_copied_into_it_matches_its_schema():
    content = copy.deepcopy(the("RayJob", "zoo").content)
    content["spec"]["rayClusterSpec"] = the("RayCluster", "lorc").content["spec"]
    check(content)


@pytest.mark.parametrize("folder", [pytest.param(folder, id=folder.name) for folder in kustomizations()])
def test_files_that_a_kustomization_names_are_there(folder):
    content = kustomizations()[folder]
    generators = [*content.get("configMapGenerator", []), *content.get("secretGenerator", [])]
    generated = [name for generator in generators for name in [*generator.get("files", []), *generator.get("envs", [])]]
    for name in [*content.get("resources", []), *generated]:
        path = folder / name
        assert path.exists() or path.with_name(f"{path.name}.example").exists(), name
    listed = {folder / name for name in [*content.get("resources", []), *generated]}
    assert set(folder.glob("*.yaml")) - {folder / "kustomization.yaml"} <= listed, "a file that nothing names"


@pytest.mark.skipif(kustomize_command() is None, reason="neither kubectl nor kustomize is installed")
@pytest.mark.parametrize("piece", PIECES)
def test_what_kustomize_builds_matches_the_schemas(piece, tmp_path):
    copied = shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    for example in copied.rglob("*.env.example"):
        shutil.copy(example, example.with_suffix(""))
    built = build(copied / piece)
    for manifest in built:
        check(manifest.content)
    jobs = [manifest for manifest in built if manifest.kind == "RayJob"]
    for job in jobs:
        spec = job.content["spec"]
        head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        submitter = spec["submitterPodTemplate"]["spec"]["containers"][0]
        assert head["image"] == submitter["image"] == images()["lorc"]
        assert not [manifest for manifest in built if manifest.kind == "RayCluster"], "a cluster that nothing uses"
    assert len(jobs) == (piece in ("zoo", "kueue"))


def names(kind):
    made = {manifest.name for manifest in of_kind(kind)}
    key = {"ConfigMap": "configMapGenerator", "Secret": "secretGenerator"}.get(kind)
    return made | {made["name"] for content in kustomizations().values() for made in content.get(key, [])}


def references(content, field, key="name"):
    """What stands below every field of that name, at any depth."""
    if isinstance(content, list):
        return {name for inner in content for name in references(inner, field, key)}
    if not isinstance(content, dict):
        return set()
    found = {name for inner in content.values() for name in references(inner, field, key)}
    if field in content:
        found.add(content[field][key] if key else content[field])
    return found


@pytest.mark.parametrize(
    ("kind", "field", "key"),
    [
        ("ServiceAccount", "serviceAccountName", None),
        ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
        ("Secret", "secretKeyRef", "name"),
        ("Secret", "secretRef", "name"),
        ("Secret", "secretName", None),
        ("ConfigMap", "configMapRef", "name"),
        ("ConfigMap", "configMap", "name"),
        ("RayCluster", "ray.io/cluster", None),
        ("ClusterQueue", "clusterQueue", None),
        ("Service", "serviceName", None),
    ],
)
def test_names_that_manifests_refer_to_exist(kind, field, key):
    named = {name for manifest in manifests() for name in references(manifest.content, field, key)}
    assert named, "nothing refers to one: the test looks for nothing"
    assert named - set(MADE_BY_KUBERNETES) <= names(kind)


def test_secret_keys_are_those_of_the_examples():
    asked = {(found["name"], found["key"]) for _, _, spec in all_pods() for found in secret_keys(spec)}
    assert asked
    for name, key in asked | {("ray-token", "auth_token")}:  # the key that KubeRay reads
        lines = (KUBERNETES / "secrets" / f"{name}.env.example").read_text().splitlines()
        assert f"{key}=" in lines


def secret_keys(spec):
    variables = [variable for container in containers(spec) for variable in container.get("env", [])]
    return [variable["valueFrom"]["secretKeyRef"] for variable in variables if "valueFrom" in variable]


def test_services_are_reached_where_they_listen():
    hosts = {manifest.name: manifest.content["spec"] for manifest in of_kind("Service")}
    text = "".join(file.read_text() for file in KUBERNETES.rglob("*.yaml"))
    called = set(re.findall(r"(?:@|http://)([a-z-]+):(\d+)", text))
    assert {host for host, _ in called} == set(hosts)
    for host, port in called:
        assert int(port) in [found["port"] for found in hosts[host]["ports"]]
        selected = [spec for _, labels, spec in all_pods() if hosts[host]["selector"].items() <= labels.items()]
        listening = [found["containerPort"] for spec in selected for found in spec["containers"][0]["ports"]]
        assert int(port) in listening


def test_schemas_are_of_the_kinds_that_are_used():
    """None is missing, none is left over."""
    used = {
        manifest.kind
        for manifest in manifests()
        if re.match(r"ray\.io/|kueue\.x-k8s\.io/", manifest.content["apiVersion"])
    }
    assert {file.name.partition(".")[0] for file in (Path(__file__).parent / "schemas").glob("*.json.gz")} == used


def test_kustomizations_are_of_the_kind_that_this_reads():
    known = {"apiVersion", "kind", "namespace", "resources", "images", "patches", "replacements"}
    known |= {"configMapGenerator", "secretGenerator", "generatorOptions"}
    for folder, content in kustomizations().items():
        assert content.keys() <= known, folder
        for replacement in content.get("replacements", []):
            source = replacement["source"]
            assert the(source["kind"], source["name"])
            assert knows(source["kind"], source["fieldPath"])
            for target in replacement["targets"]:
                assert all(knows(target["select"]["kind"], path) for path in target["fieldPaths"])
        for patch in content.get("patches", []):
            assert of_kind(patch["target"]["kind"])
            assert all(found["op"] == "add" for found in yaml.safe_load(patch["patch"]))


def knows(kind, path):
    """Whether the schema of a custom resource has a field."""
    _, validator = resource_schema(kind)
    inner = validator.schema
    for name in path.split("."):
        inner = inner["items"] if name.isdigit() else inner["properties"].get(name)
        if inner is None:
            return False
    return True
