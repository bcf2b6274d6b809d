"""Whether a manifest is what Kubernetes, KubeRay and Kueue publish schemas for; a field that they do not know is an error.

Kubernetes' own kinds are in the package kubernetes-validate, the others in the folder `schemas`.
"""

import gzip
import json
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate

FOLDER = Path(__file__).parent / "schemas"
KUBERNETES = "1.36"  # whose schemas the manifests are held to
PUBLISHED_ELSEWHERE = ("ray.io/", "kueue.x-k8s.io/")


def strict(schema):
    """The schema with unknown fields refused, which an API server drops without a word."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    stricter = {name: strict(inner) for name, inner in schema.items()}
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not keeps_unknown:
        stricter.setdefault("additionalProperties", False)
    return stricter


@cache
def resource_schema(kind):
    """Of a custom resource: its API version and a validator."""
    content = json.loads(gzip.decompress((FOLDER / f"{kind}.json.gz").read_bytes()))
    return content["apiVersion"], jsonschema.Draft202012Validator(strict(content["schema"]))


def check(manifest):
    """Raise where a manifest does not match the schema of its kind, or there is none.

    Raises:
        jsonschema.ValidationError: It does not; kubernetes-validate raises a child of this.
    """
    if not manifest["apiVersion"].startswith(PUBLISHED_ELSEWHERE):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    version, validator = resource_schema(manifest["kind"])
    assert manifest["apiVersion"] == version
    validator.validate(manifest)
