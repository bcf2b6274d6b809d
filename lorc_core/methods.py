"""The methods lorc knows, by name: points on the axes of one formula."""

from dataclasses import dataclass
from typing import Literal

from lorc_core.errors import ConfigError

Statistics = Literal["weights", "weights_with_gain"]
Reader = Literal["none", "interaction"]


@dataclass(frozen=True)
class Method:
    """How projections are chosen.

    Attributes:
        name: In zoo files.
        statistics: What the states' second moment is taken from: W W^T, or that with the input norm's gain folded in.
        reader: Whose error is minimised: the states' own, or that of what queries and W_o read of them.
        schedule: That of its source.
        source: Where it was published.
    """

    name: str
    statistics: Statistics
    reader: Reader
    schedule: str
    source: str


METHODS = {
    method.name: method
    for method in (
        Method("lorc", "weights", "none", "progressive", "LoRC, arXiv 2410.03111: SVD of W_k and W_v"),
        Method(
            "lorc_q",
            "weights_with_gain",
            "interaction",
            "energy",
            "lorc: needs no data and knows its readers, W_q and W_o, with the norm's gain; as KQ-SVD, arXiv 2512.05916",
        ),
    )
}


def known_method(name: str) -> Method:
    """The method of that name; ConfigError with the known names otherwise."""
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is not known; known are {', '.join(sorted(METHODS))}")
    return METHODS[name]
