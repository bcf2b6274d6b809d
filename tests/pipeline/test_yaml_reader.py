"""Hostile YAML: each refused in one line, at once."""

import time

import pytest

from lorc_core.errors import ConfigError
from pipeline.zoo.yaml_reader import read_yaml

BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "alias bomb": (BOMB.encode(), "more than 100,000 values"),
    "an alias inside itself": (b"a: &a [*a]", "stands inside itself, in line 1"),
    "10 MB": (b"- a\n" * 2_500_000, "10,000,000 bytes; a zoo file has at most 1,048,576"),
    "a long list": (b"- a\n" * 200_000, "more than 100,000 values"),
    "a key twice": (b"models: 1\nb: {c: 1, c: 2}", "the key 'c' stands twice"),
    "UTF-16": ("a: 1".encode("utf-16"), "not UTF-8 text"),
    "Latin-1": (b"a: \xe9t\xe9", "not UTF-8 text"),
    "binary": (bytes(range(256)), "not UTF-8 text"),
    "a null character": (b"a: \x00", "control characters are not allowed"),
    "deep": (b"[" * 5_000, "nested deeper than 32 levels"),
    "deep and closed": (b"[" * 5_000 + b"]" * 5_000, "nested deeper than 32 levels"),
    "a number of 6,000 digits": (b"a: " + b"9" * 6_000, "4300 digits"),
    "a false date": (b"a: 2026-99-99", "month must be in 1..12"),
    "an object": (b"a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a list as a key": (b"? [1]\n: 2", "a key is no plain value"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_refused_in_one_line_at_once(name, tmp_path):
    content, message = HOSTILE[name]
    path = tmp_path / "zoo.yaml"
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(ConfigError, match=message) as refused:
        read_yaml(path)
    assert time.process_time() - started < 2  # seconds of this process; PyYAML alone takes 40 for the bomb
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_anchors_and_merge_keys_are_read_as_yaml_says(tmp_path):
    (tmp_path / "zoo.yaml").write_text("\ufeffa: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]\n")
    assert read_yaml(tmp_path / "zoo.yaml")["b"] == {"x": 3, "y": 2}
