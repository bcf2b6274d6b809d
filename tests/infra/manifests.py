"""The manifests of infra/kubernetes, as they are in the files and as kustomize builds them."""

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from tests.paths import REPOSITORY

KUBERNETES = REPOSITORY / "infra" / "kubernetes"
NOT_MANIFESTS = ("kustomization.yaml", "zoo.yaml")


@dataclass(frozen=True)
class Manifest:
    """One document of a file."""

    file: Path
    content: dict

    @property
    def kind(self):
        return self.content["kind"]

    @property
    def name(self):
        return self.content["metadata"]["name"]

    @property
    def id(self):
        return f"{self.file.relative_to(KUBERNETES)}:{self.kind}/{self.name}"

    @property
    def pod_specs(self):
        """(labels, spec) of every pod that it is a template of, at any depth."""
        return list(pod_specs(self.content))


def pod_specs(content, labels=None):
    if isinstance(content, list):
        for inner in content:
            yield from pod_specs(inner)
    if isinstance(content, dict):
        if "containers" in content:
            yield labels or {}, content
        for name, inner in content.items():
            if name not in ("containers", "initContainers"):
                yield from pod_specs(inner, content.get("metadata", {}).get("labels", {}) if name == "spec" else None)


@cache
def manifests():
    files = [file for file in sorted(KUBERNETES.rglob("*.yaml")) if file.name not in NOT_MANIFESTS]
    return [Manifest(file, content) for file in files for content in yaml.safe_load_all(file.read_text())]


def of_kind(kind):
    return [manifest for manifest in manifests() if manifest.kind == kind]


def the(kind, name):
    """The one of that kind and name; of two with one name, in folders of which one is applied, the first."""
    return next(manifest for manifest in of_kind(kind) if manifest.name == name)


@cache
def kustomizations():
    """By folder."""
    return {file.parent: yaml.safe_load(file.read_text()) for file in sorted(KUBERNETES.rglob("kustomization.yaml"))}


@cache
def images():
    """By their names in the manifests, as the kustomizations rename them."""
    renamed = [image for content in kustomizations().values() for image in content.get("images", [])]
    return {image["name"]: f"{image['newName']}:{image['newTag']}" for image in renamed}


def kustomize_command():
    """kustomize, or the one in kubectl; None where there is neither."""
    if kubectl := shutil.which("kubectl"):
        return [kubectl, "kustomize"]
    return [found, "build"] if (found := shutil.which("kustomize")) else None


def build(folder):
    """What would be applied."""
    built = subprocess.run([*kustomize_command(), folder], capture_output=True, text=True, check=True)
    return [Manifest(folder, content) for content in yaml.safe_load_all(built.stdout)]


def all_pods():
    """(id, labels, spec) of every pod template."""
    return [(manifest.id, labels, spec) for manifest in manifests() for labels, spec in manifest.pod_specs]


def containers(spec):
    return [*spec.get("initContainers", []), *spec["containers"]]
