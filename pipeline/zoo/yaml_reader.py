"""YAML from a stranger: bounded in size, depth and expansion, every key once, UTF-8 alone.

PyYAML itself follows nested aliases for as long as it takes, forgets the first of two equal keys, and falls over a
thousand open brackets.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lorc_core.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 100_000  # with aliases written out


class UniqueKeyLoader(yaml.SafeLoader):
    """`SafeLoader` that refuses a mapping with a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As `SafeLoader`, whose merge keys (`<<`) may be overridden."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is no plain value", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice in one mapping", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str = "zoo file") -> Any:
    """What a YAML file holds, which is a `what`.

    Raises:
        ConfigError: It is absent, too large, too deep, not UTF-8, not YAML, or has a key twice.
    """
    if not path.is_file():
        raise ConfigError(f"{what} {path} does not exist")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{path}: {size:,} bytes; a {what} has at most {MAX_BYTES:,}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from error
    try:
        check_nesting(text)
        return yaml.load(text, UniqueKeyLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a number of 5,000 digits, a false date
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def check_nesting(text: str) -> None:
    """Raise YAMLError where collections are nested too deep, or aliases write out to too many values."""
    depth = 0
    sizes: dict[str, int] = {}  # of what an anchor stands for, aliases written out
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor and size so far of each open collection
    for event in yaml.parse(text, yaml.CSafeLoader):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels, in line {line_of(event)}")
            open_nodes.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            anchor, size = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise yaml.YAMLError(f"*{event.anchor} stands inside itself, in line {line_of(event)}")
            size = sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        anchor, so_far = open_nodes[-1]
        open_nodes[-1] = (anchor, so_far + size)
        if so_far + size > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES:,} values, aliases written out")


def line_of(event: yaml.Event) -> int:
    """The line that it stands in, counted from 1."""
    assert event.start_mark is not None
    return event.start_mark.line + 1
