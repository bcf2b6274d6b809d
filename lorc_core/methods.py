"""The methods lorc knows, by name: what each decomposes and the schedule its source uses."""

from dataclasses import dataclass

from lorc_core.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """A published way to decompose, and the schedule its source uses with it."""

    name: str
    schedule: str
    source: str


METHODS = {
    "lorc": Method("lorc", schedule="progressive", source="LoRC, arXiv 2410.03111: SVD of W_k and W_v"),
}


def known_method(name: str) -> Method:
    """The method of that name; ConfigError with the known names otherwise."""
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is not known; known are {', '.join(sorted(METHODS))}")
    return METHODS[name]
