"""Make tests/infra/schemas from published definitions: `python -m tests.infra.vendor_schemas VERSION FILE...`."""

import gzip
import json
import sys
from pathlib import Path

import yaml

from tests.infra.published import FOLDER


def without_descriptions(schema):
    """What validates; a property may be called `description`."""
    if isinstance(schema, list):
        return [without_descriptions(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: inner for name, inner in schema.items() if name != "description"}
    if isinstance(properties := kept.pop("properties", None), dict):
        kept["properties"] = {name: without_descriptions(inner) for name, inner in properties.items()}
    return {name: inner if name == "properties" else without_descriptions(inner) for name, inner in kept.items()}


def vendor(file, version):
    spec = yaml.safe_load(Path(file).read_text())["spec"]
    (found,) = [found for found in spec["versions"] if found["name"] == version and found["served"]]
    content = {
        "apiVersion": f"{spec['group']}/{version}",
        "kind": spec["names"]["kind"],
        "schema": without_descriptions(found["schema"]["openAPIV3Schema"]),
    }
    written = json.dumps(content, separators=(",", ":"), sort_keys=True).encode()
    (FOLDER / f"{content['kind']}.json.gz").write_bytes(gzip.compress(written, mtime=0))


if __name__ == "__main__":
    for name in sys.argv[2:]:
        vendor(name, sys.argv[1])
