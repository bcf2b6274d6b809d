"""Keys and values: the two kinds of states that a layer caches, and things that there are one of for each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar, get_args

Kind = Literal["keys", "values"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Projection = Literal["q", "k", "v"]
PROJECTION_OF: dict[Kind, Projection] = {"keys": "k", "values": "v"}

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Mapped = TypeVar("Mapped")


class LayerKind(NamedTuple):
    """A place in a model: the keys of one layer, or its values."""

    layer_idx: int
    kind: Kind

    def __str__(self) -> str:
        return f"layer {self.layer_idx} {self.kind}"


@dataclass(frozen=True)
class KeysValues(Generic[T_co]):
    """One thing for a layer's keys and one for its values. Iterates over the two, keys first."""

    keys: T_co
    values: T_co

    @staticmethod
    def of(make: Callable[[Kind], T]) -> "KeysValues[T]":
        """The pair of what `make` gives for keys and for values."""
        return KeysValues(make("keys"), make("values"))

    def __getitem__(self, kind: Kind) -> T_co:
        return self.keys if kind == "keys" else self.values

    def __iter__(self) -> Iterator[T_co]:
        yield self.keys
        yield self.values

    def items(self) -> Iterator[tuple[Kind, T_co]]:
        """The two, each with its kind."""
        yield "keys", self.keys
        yield "values", self.values

    def map(self, change: Callable[[T_co], Mapped]) -> "KeysValues[Mapped]":
        """The pair of what `change` makes of the two."""
        return KeysValues(change(self.keys), change(self.values))


def layer_kinds(num_layers: int) -> list[LayerKind]:
    """Keys and values of every layer in turn, first layer first."""
    return [LayerKind(layer_idx, kind) for layer_idx in range(num_layers) for kind in KINDS]


def by_layer(in_turn: Sequence[T]) -> tuple[KeysValues[T], ...]:
    """Pairs by layer, from a sequence in the order of `layer_kinds`.

    Args:
        in_turn: For each layer first what belongs to its keys, then what belongs to its values.
    """
    return tuple(KeysValues(*pair) for pair in zip(in_turn[::2], in_turn[1::2], strict=True))
