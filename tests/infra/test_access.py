"""What infra/kubernetes lets run may do no more than it needs: privileges, tokens, connections, images, secrets."""

import re

import pytest

from tests.infra.compose_services import example_settings, read_compose
from tests.infra.manifests import KUBERNETES, all_pods, containers, images, of_kind, the
from tests.paths import REPOSITORY

MADE_BY_KUBERAY = ("ray.io/is-ray-node", "ray.io/node-type")  # labels of its pods


def test_no_secret_is_in_the_repository():
    assert not of_kind("Secret")
    for example in KUBERNETES.rglob("*.env.example"):
        lines = [line for line in example.read_text().splitlines() if line and not line.startswith("#")]
        assert all(line.endswith("=") for line in lines), example


@pytest.mark.parametrize(("labels", "spec"), [pytest.param(labels, spec, id=name) for name, labels, spec in all_pods()])
def test_pods_run_without_privileges(labels, spec):
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(spec):
        confined = container["securityContext"]
        assert confined["readOnlyRootFilesystem"] is True
        assert confined["allowPrivilegeEscalation"] is False
        assert confined["capabilities"] == {"drop": ["ALL"]}
        assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert "memory" in container["resources"]["limits"]
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()


def test_the_autoscaler_beside_the_head_runs_without_privileges():
    confined = the("RayCluster", "lorc").content["spec"]["autoscalerOptions"]["securityContext"]
    assert confined["readOnlyRootFilesystem"] is True
    assert confined["allowPrivilegeEscalation"] is False


def test_only_the_schedule_and_the_autoscaler_get_a_token_of_the_kubernetes_api():
    automounted = [name for name, _, spec in all_pods() if spec["automountServiceAccountToken"]]
    assert automounted == ["regression/cronjob.yaml:CronJob/regression"]
    assert all(not manifest.content["automountServiceAccountToken"] for manifest in of_kind("ServiceAccount"))
    mounted = [
        container["name"]
        for _, _, spec in all_pods()
        for container in containers(spec)
        for mount in container["volumeMounts"]
        if "serviceaccount" in mount["mountPath"]
    ]
    assert not mounted, "KubeRay's autoscaler has it, by autoscalerOptions"


def test_roles_are_for_ray_jobs_alone():
    assert not of_kind("ClusterRole")
    for role in of_kind("Role"):
        for rule in role.content["rules"]:
            assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])
            assert "*" not in rule["verbs"]
            assert rule["verbs"] == ["create"] or rule["resourceNames"] == [the("RayJob", "regression").name]


def test_nothing_may_talk_to_anything_unless_a_policy_says_so():
    policy = the("NetworkPolicy", "default-deny").content["spec"]
    assert policy == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def selectors(content):
    if isinstance(content, list):
        return [found for inner in content for found in selectors(inner)]
    if not isinstance(content, dict):
        return []
    within = [found for inner in content.values() for found in selectors(inner)]
    return within + (
        [content["podSelector"]] if "podSelector" in content and "namespaceSelector" not in content else []
    )


def test_policies_select_labels_that_pods_have():
    carried = {item for _, labels, _ in all_pods() for item in labels.items()}
    keys = {key for key, _ in carried}
    for policy in of_kind("NetworkPolicy"):
        for selector in selectors(policy.content):
            labels = selector.get("matchLabels", {})
            assert {item for item in labels.items() if item[0] not in MADE_BY_KUBERAY} <= carried, policy.name
            assert {rule["key"] for rule in selector.get("matchExpressions", [])} <= keys, policy.name


def test_postgres_takes_connections_of_mlflow_alone():
    (rule,) = the("NetworkPolicy", "postgres").content["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app": "mlflow"}}}]


def test_images_are_pinned():
    named = {container["image"] for _, _, spec in all_pods() for container in containers(spec)}
    named |= {service["image"] for service in read_compose(example_settings())["services"].values()}
    dockerfile = (REPOSITORY / "infra" / "Dockerfile").read_text()
    stages = set(re.findall(r" AS (\w+)", dockerfile))
    named |= set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) - stages
    for image in named:
        assert re.search(r":v?\d+(\.\d+)+[\w.-]*$", images().get(image, image)), image
